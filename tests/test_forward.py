"""Batches and padding change nothing, and what is generated agrees with the logits."""

import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from harmlens.models import chats, forward
from harmlens.models.forward import LanguageModel

# --------------------------------------------------------------------------- padding

row = st.lists(st.integers(1, 99), min_size=1, max_size=12)


@given(st.lists(row, min_size=1, max_size=8))
def test_padding_on_the_left_keeps_the_rows(rows):
    lm = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0), device="cpu")
    ids, mask, places = forward.inputs_of(lm, rows).values()
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for i, r in enumerate(rows):
        assert ids[i, -len(r) :].tolist() == r == ids[i][mask[i].bool()].tolist()
        assert (ids[i, : -len(r)] == 0).all()
        assert places[i][mask[i].bool()].tolist() == list(range(len(r)))
    assert (places >= 0).all()


@pytest.mark.parametrize("rows", [[], [[1], []]])
def test_empty_rows_are_refused(rows):
    with pytest.raises(ValueError, match="rows must hold at least one row, and no row may be empty"):
        forward.inputs_of(None, rows)


@given(st.lists(row, max_size=20), st.integers(1, 7))
def test_batches_by_length_hold_each_row_once(rows, size):
    made = list(forward.by_length(rows, size))
    assert sorted(i for batch in made for i in batch) == list(range(len(rows)))
    assert all(len(batch) == size for batch in made[:-1])
    lengths = [len(rows[i]) for batch in made for i in batch]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_holds_at_least_one_row(size):
    with pytest.raises(ValueError, match=f"batch_size={size} must be at least 1"):
        list(forward.by_length([[1]], size))


# --------------------------------------------------------------------------- logits


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@torch.no_grad()
def test_batched_logits_are_those_of_a_plain_forward_pass(architecture):
    lm = tiny.model(architecture)
    texts = tiny.texts(lm)
    assert len({len(chats.tokens(lm.tokenizer, t)) for t in texts}) > 2  # so there is padding
    batched = forward.last_logits(lm, texts)
    single = forward.last_logits(lm, texts, batch_size=1)
    plain = torch.stack(
        [lm.model(torch.tensor([chats.tokens(lm.tokenizer, t)])).logits[0, -1] for t in texts]
    )
    assert plain.std() > 0.3  # not flat, so that agreement means something
    torch.testing.assert_close(batched, plain, atol=1e-4, rtol=0)
    torch.testing.assert_close(single, plain, atol=1e-4, rtol=0)


@torch.no_grad()
def test_these_comparisons_would_notice_a_missing_mask():
    lm = tiny.model()
    texts = tiny.texts(lm)
    ids = forward.inputs_of(lm, [chats.tokens(lm.tokenizer, t) for t in texts])["input_ids"]
    assert (lm.model(ids).logits[:, -1] - forward.last_logits(lm, texts)).abs().max() > 0.1


def test_logits_keep_the_order_of_the_texts():
    lm = tiny.model()
    texts = tiny.texts(lm)
    there = forward.last_logits(lm, texts, batch_size=2)
    back = forward.last_logits(lm, texts[::-1], batch_size=2)
    torch.testing.assert_close(there, back.flip(0), atol=1e-4, rtol=0)


# --------------------------------------------------------------------------- generation


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_batched_greedy_answers_are_those_of_one_by_one(architecture):
    lm = tiny.model(architecture)
    texts = tiny.texts(lm)
    batched = forward.generate(lm, texts, max_new_tokens=8)
    assert batched == forward.generate(lm, texts, max_new_tokens=8, batch_size=1)
    assert len(set(batched)) > 1


def greedy(lm: LanguageModel, text: str, n: int) -> str:
    """Greedy decoding spelt out: the likeliest token again and again."""
    ids = chats.tokens(lm.tokenizer, text)
    new: list[int] = []
    with torch.no_grad():
        while len(new) < n and lm.tokenizer.eos_token_id not in new:
            new.append(lm.model(torch.tensor([ids + new])).logits[0, -1].argmax().item())
    return lm.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_greedy_means_the_likeliest_token_each_time(architecture):
    lm = tiny.model(architecture)
    text = tiny.texts(lm)[0]
    assert forward.generate(lm, [text], max_new_tokens=6) == [greedy(lm, text, 6)]


def test_a_models_own_generation_settings_do_not_bend_greedy_decoding():
    """Qwen2.5's instruct models bring a repetition penalty; what is generated has to fit the logits."""
    lm = tiny.model(seed=1)
    texts = tiny.texts(lm)
    truth = [greedy(lm, text, 8) for text in texts]
    lm.model.generation_config = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, top_k=3, temperature=0.7,
        eos_token_id=lm.tokenizer.eos_token_id,
    )  # fmt: skip
    assert forward.generate(lm, texts, max_new_tokens=8) == truth


def test_a_models_own_generation_settings_do_not_bend_sampling():
    lm = tiny.model()
    texts = tiny.texts(lm) * 3
    free = forward.generate(lm, texts, max_new_tokens=4, temperature=1.0)
    lm.model.generation_config = GenerationConfig(
        repetition_penalty=5.0, min_p=0.5, top_k=1, top_p=0.1, typical_p=0.2,
        eos_token_id=lm.tokenizer.eos_token_id,
    )  # fmt: skip
    assert forward.generate(lm, texts, max_new_tokens=4, temperature=1.0) == free


def test_sampling_is_seeded_and_leaves_the_global_generator_alone():
    lm = tiny.model()
    texts = tiny.texts(lm)

    def sample(seed):
        return forward.generate(lm, texts, max_new_tokens=8, temperature=1.0, seed=seed)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = sample(0)
    assert torch.equal(torch.rand(3), expected)
    assert first == sample(0)
    assert first != sample(1)


def test_sampled_first_tokens_follow_the_models_distribution():
    lm = tiny.model(spread=0.1)
    text = tiny.texts(lm)[0]
    p = forward.last_logits(lm, [text])[0].softmax(-1)
    drawn = forward.generate(lm, [text] * 4000, max_new_tokens=1, temperature=1.0, batch_size=4000)
    top = p.argsort(descending=True)
    words = [w for w in lm.tokenizer.convert_ids_to_tokens(top.tolist()) if re.fullmatch(r"\w+", w)][:3]
    for word in words:
        chance = p[lm.tokenizer.convert_tokens_to_ids(word)].item()
        assert drawn.count(word) / 4000 == pytest.approx(chance, abs=5 * (chance / 4000) ** 0.5)


def test_only_new_words_are_returned():
    lm = tiny.model()
    for answer in forward.generate(lm, tiny.texts(lm), max_new_tokens=8):
        assert not re.search(r"<\|", answer)
        assert len(chats.tokens(lm.tokenizer, answer)) <= 8
        assert answer == answer.strip()


def test_a_negative_temperature_is_refused():
    with pytest.raises(ValueError, match=r"temperature=-1\.0 must be 0 \(greedy\) or positive"):
        forward.generate(tiny.model(), ["x"], temperature=-1.0)


def test_no_texts():
    lm = tiny.model()
    assert forward.generate(lm, []) == []
    with pytest.raises(ValueError, match="texts is empty"):
        forward.last_logits(lm, [])


def test_only_large_models_are_multiplied_in_bfloat16_and_a_prune_is_seen(monkeypatch):
    from harmlens.models import forward

    lm = tiny.model()
    texts = ["one", "another"]
    exact = forward.last_logits(lm, texts)
    with forward.faster(lm):
        assert torch.equal(forward.last_logits(lm, texts), exact)
    monkeypatch.setattr(forward, "SMALL", 0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    weight = next(p for name, p in lm.model.named_parameters() if name.endswith("0.mlp.down_proj.weight"))
    with forward.faster(lm):
        rounded = forward.last_logits(lm, texts)
        weight.data.zero_()
        pruned = forward.last_logits(lm, texts)
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()
    assert torch.allclose(pruned, forward.last_logits(lm, texts), atol=0.1 * float(exact.abs().max()))
    assert (pruned - rounded).abs().max() > (rounded - exact).abs().max()
