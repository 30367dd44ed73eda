"""Decoding takes over nothing of a model's own settings but its end marks; it stops where a turn ends."""

import dataclasses

import pytest
import tiny
from transformers import GenerationConfig
from transformers.generation.configuration_utils import CompileConfig, WatermarkingConfig

from harmlens.flow import interventions
from harmlens.judging import completions
from harmlens.models import forward
from harmlens.models.chats import Prompt, tokens


def chats(n=4):
    lm = tiny.model()
    return lm, [Prompt(({"role": "user", "content": f"please tell me {word}"},)) for word in "abcd"[:n]]


def firsts(lm, texts):
    """The most probable first word after each text, as text."""
    best = forward.last_logits(lm, texts).argmax(-1)
    return [lm.tokenizer.decode([token], skip_special_tokens=True).strip() for token in best]


def hostile(lm, texts):
    """Each field of a generation configuration -> a value that would change an answer, or stop it."""
    best = int(forward.last_logits(lm, texts[:1]).argmax())
    other = (best + 1) % len(lm.tokenizer)
    values = {
        "suppress_tokens": [best], "begin_suppress_tokens": [best], "bad_words_ids": [[best]],
        "sequence_bias": [[[other], 1e4]], "forced_eos_token_id": other, "forced_bos_token_id": other,
        "encoder_repetition_penalty": 1e4, "repetition_penalty": 1e4, "guidance_scale": 30.0,
        "exponential_decay_length_penalty": (1, 1e4), "watermarking_config": WatermarkingConfig(bias=1e4),
        "max_time": 0.0, "stop_strings": ["a", "e"], "token_healing": True, "return_dict_in_generate": True,
        "penalty_alpha": 0.6, "dola_layers": "high", "num_return_sequences": 3, "num_beams": 3,
        "num_beam_groups": 3, "do_sample": True, "temperature": 50.0, "top_k": 1, "top_p": 0.1, "min_p": 0.9,
        "use_cache": False, "cache_implementation": "static", "max_length": 1, "max_new_tokens": 0,
        "min_length": 9, "min_new_tokens": 9, "no_repeat_ngram_size": 1, "bos_token_id": other,
        "pad_token_id": best, "constraints": ["x"], "force_words_ids": [[other]], "low_memory": True,
        "prompt_lookup_num_tokens": 3, "compile_config": CompileConfig(), "output_scores": True,
        "prefill_chunk_size": 1, "transformers_version": "0", "assistant_ensemble_weight": 0.9,
        "diversity_penalty": 2.0, "length_penalty": -9.0, "early_stopping": True, "typical_p": 0.1,
        "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "renormalize_logits": True, "remove_invalid_values": True,
    }  # fmt: skip
    # Nothing is left out: any field to come, too, is set to something that it can't be.
    fields = [name for name in GenerationConfig().to_dict() if name != "eos_token_id"]
    return {name: values.get(name, object()) for name in fields} | {"a_setting_of_ones_own": 1}


def test_t4_the_first_greedy_token_is_the_most_probable_one_whatever_the_model_brings():
    lm, asked = chats(2)
    texts = [prompt.render(lm) for prompt in asked]
    want, answers = firsts(lm, texts), forward.generate(lm, texts, max_new_tokens=3)
    drawn = forward.generate(lm, texts, max_new_tokens=3, temperature=1.0)
    assert all(answer.startswith(word) for answer, word in zip(answers, want, strict=True))
    for name, value in hostile(lm, texts).items():
        brought = lm.model.generation_config = GenerationConfig(eos_token_id=lm.tokenizer.eos_token_id)
        setattr(brought, name, value)
        assert forward.generate(lm, texts, max_new_tokens=3) == answers, name
        assert forward.generate(lm, texts, max_new_tokens=3, temperature=1.0) == drawn, name
        assert lm.model.generation_config is brought and getattr(brought, name) is value


def test_t4_answers_that_are_kept_are_greedy_too(tmp_path):
    lm, asked = chats(2)
    texts = [prompt.render(lm) for prompt in asked]
    want = forward.generate(lm, texts, max_new_tokens=4)
    lm.model.generation_config.suppress_tokens = forward.last_logits(lm, texts).argmax(-1).tolist()
    said = completions.completed(completions.complete(lm, asked, file=tmp_path / "a", max_new_tokens=4))
    assert [one.answer for one in said] == want


def turning(**changes):
    """A model that says one word and closes its turn, with an end mark that only its template knows."""
    lm, asked = chats(2)
    lm.model.generation_config.eos_token_id = lm.model.config.eos_token_id = None
    for name, value in changes.items():
        setattr(lm.model.generation_config, name, value)
    text = asked[0].render(lm)
    end, first = lm.tokenizer.eos_token_id, int(forward.last_logits(lm, [text]).argmax())
    # The mark is the likeliest token behind anything but the prompt's own last one.
    head = lm.model.get_output_embeddings()
    opened = tokens(lm.tokenizer, text)[-1]

    def close(_, inputs, logits):
        logits = logits.clone()
        said = state["ids"][:, -1] != opened
        logits[said, -1, end] = 1e4
        return logits

    state = {}
    lm.model.register_forward_pre_hook(
        lambda _, args, kwargs: state.update(ids=kwargs["input_ids"]), with_kwargs=True
    )
    head.register_forward_hook(close)
    return lm, asked[:1], lm.tokenizer.decode([first])


@pytest.mark.parametrize("listed", [None, 7, [7, 8]])
def test_h14_decoding_stops_at_what_the_template_writes_behind_an_answer(tmp_path, listed):
    lm, asked, word = turning(eos_token_id=listed)
    lm = dataclasses.replace(lm, tokenizer=other_eos(lm.tokenizer))
    text = asked[0].render(lm)
    assert forward.generate(lm, [text], max_new_tokens=9) == [word]
    [said] = completions.completed(completions.complete(lm, asked, file=tmp_path / "a", max_new_tokens=9))
    assert (said.answer, said.n_tokens, said.finished) == (word, 2, True)
    [patched] = interventions.generate_patched(lm, [text], [text], {0: [0]}, max_new_tokens=9)
    assert patched == word


def test_h14_it_is_named_when_no_answer_ends_by_itself(tmp_path):
    lm, asked = chats(2)
    lm.model.get_output_embeddings().weight.data[lm.tokenizer.eos_token_id] = 0
    with pytest.warns(UserWarning, match="none of 8 answers ended by itself"):
        completions.complete(lm, asked * 4, file=tmp_path / "a", max_new_tokens=64)


def other_eos(tokenizer):
    """The same tokenizer, whose end of text is not what its template ends a turn with."""
    tokenizer.eos_token = tokenizer.unk_token
    return tokenizer
