"""Activations as the model has them; generation with units overwritten, against doing it without a cache."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import lecture
import numpy as np
import pytest
import tiny
import torch

from harmlens.asking import pairs as prompts
from harmlens.flow import interventions, neurons, outcomes, patching
from harmlens.models import forward
from harmlens.models import parts as decoder
from harmlens.models.chats import Prompt, tokens

PAIRS = prompts.pairs("prompt", n=4)
UNITS = tiny.SHAPE.hidden
EVERY = {0: range(UNITS), 1: range(UNITS)}
SOME = {0: [3, 9], 1: [1, 40, 41]}


@pytest.fixture(scope="module")
def lm():
    return tiny.model()


def _texts(lm, side):
    return [getattr(pair, side).render(lm) for pair in PAIRS]


def _slowly(lm, text, source, units, where, steps, dose=1.0, every_position=False):
    """Dynamic patching without a cache: at every step both texts are run as a whole."""
    parts = decoder.stack(lm)
    base, other = tokens(lm.tokenizer, text), tokens(lm.tokenizer, source)
    prompt, new, values = len(base), [], {}
    for _ in range(steps):
        length = prompt + len(new)
        first = 0 if every_position else prompt - 1
        at = list(range(first, prompt)) if where != "answer" else []
        at += list(range(prompt, length)) if where != "prompt" else []
        handles = []
        for layer in units:
            linear = decoder.projection(decoder.mlp(parts.blocks[layer]))

            def keep(_, inputs, layer=layer):
                values[layer] = inputs[0].clone()

            handles.append(linear.register_forward_pre_hook(keep))
        with torch.no_grad():
            lm.model(torch.tensor([other + new]))
        for handle in handles:
            handle.remove()
        handles = []
        for layer, some in units.items():
            linear = decoder.projection(decoder.mlp(parts.blocks[layer]))

            def put(_, inputs, layer=layer, some=some, at=at):
                hidden = inputs[0].clone()
                for column in at:
                    for unit in some:
                        hidden[0, column, unit] += dose * (
                            values[layer][0, column, unit] - hidden[0, column, unit]
                        )
                return (hidden,)

            handles.append(linear.register_forward_pre_hook(put))
        with torch.no_grad():
            logits = lm.model(torch.tensor([base + new])).logits[0, -1]
        for handle in handles:
            handle.remove()
        new.append(int(logits.argmax()))
        if new[-1] == lm.model.generation_config.eos_token_id:
            break
    return lm.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral", "gpt_neox", "olmo2"])
@pytest.mark.parametrize("where", interventions.WHERE)
def test_dynamic_patching_equals_whole_runs_at_every_step(architecture, where):
    lm = tiny.model(architecture)
    texts, sources = _texts(lm, "x0"), _texts(lm, "x1")
    got = interventions.generate_patched(lm, texts, sources, SOME, where=where, dose=2.0, max_new_tokens=6)
    slow = [_slowly(lm, t, s, SOME, where, 6, dose=2.0) for t, s in zip(texts, sources, strict=True)]
    assert got == slow


def test_every_prompt_position(lm):
    texts, sources = _texts(lm, "x0"), _texts(lm, "x1")
    got = interventions.generate_patched(lm, texts, sources, EVERY, every_position=True, max_new_tokens=6)
    assert got == [
        _slowly(lm, t, s, EVERY, "both", 6, every_position=True) for t, s in zip(texts, sources, strict=True)
    ]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_text_patched_with_itself_or_with_no_dose_is_plain_generation(architecture):
    lm = tiny.model(architecture)
    texts, sources = _texts(lm, "x0"), _texts(lm, "x1")
    plain = forward.generate(lm, texts, max_new_tokens=8)
    own = interventions.generate_patched(lm, texts, texts, EVERY, max_new_tokens=8, every_position=True)
    none = interventions.generate_patched(lm, texts, sources, EVERY, dose=0.0, max_new_tokens=8)
    assert own == plain
    assert none == plain


def test_batches_do_not_change_the_answers(lm, monkeypatch):
    texts, sources = _texts(lm, "x0"), _texts(lm, "x1")
    together = interventions.generate_patched(lm, texts, sources, EVERY, max_new_tokens=5)
    monkeypatch.setattr(interventions, "BATCH", 1)
    assert interventions.generate_patched(lm, texts, sources, EVERY, max_new_tokens=5) == together


def test_patched_logits_agree_with_the_closed_form(lm):
    sets = outcomes.TokenSets((20, 21), (30,))
    units = [4, 8, 15]
    want = neurons.set_effects(lm, PAIRS, outcomes.y1(sets), [units])
    logits = interventions.patched_logits(lm, _texts(lm, "x0"), _texts(lm, "x1"), {1: units})
    got = outcomes.logit_difference(logits, sets) - want.y0
    assert want.effects.abs().max() > 1e-3
    torch.testing.assert_close(got, want.effects[:, 0], atol=1e-4, rtol=0)


# --------------------------------------------------------------------------- reading


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@torch.no_grad()
def test_states_are_those_of_a_plain_forward_pass(architecture):
    lm = tiny.model(architecture)
    texts = tiny.texts(lm)
    own = interventions.states(lm, texts, positions=[-3, -1], batch_size=3)
    normed = interventions.states(lm, texts, positions=[-3, -1], normed=True)
    assert own.shape == (len(texts), tiny.SHAPE.layers + 1, 2, tiny.SHAPE.width)
    for text, got, last in zip(texts, own, normed, strict=True):
        ids = torch.tensor([tokens(lm.tokenizer, text)])
        plain = torch.stack(lm.model(ids, output_hidden_states=True).hidden_states)[:, 0, [-3, -1]]
        torch.testing.assert_close(last, plain, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got[:-1], plain[:-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(decoder.stack(lm).norm(got[-1]), plain[-1], atol=1e-4, rtol=1e-4)


def test_depth_nought_is_the_last_tokens_embedding(lm):
    text = tiny.texts(lm)[0]
    table = lm.model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(
        interventions.states(lm, [text])[0, 0, 0], table[tokens(lm.tokenizer, text)[-1]]
    )


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@torch.no_grad()
def test_a_text_read_at_a_length_is_read_as_it_stands_in_the_whole(architecture):
    lm = tiny.model(architecture)
    prompt = Prompt(({"role": "user", "content": "how do i brew a salted draught?"},))
    chat, at = prompt.render(lm), lecture.defined("07", lm=lm).up_to(prompt, "salted draught")
    ids = tokens(lm.tokenizer, chat)
    assert at < len(ids)
    whole = lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    got = interventions.states(lm, [chat] * 2, lengths=[at, at - 1], normed=True)[:, :, 0]
    for row, length in zip(got, (at, at - 1), strict=True):
        wanted = torch.stack([s[0, length - 1] for s in whole])
        torch.testing.assert_close(row, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [0]}, "must lie between 1 and the number of the text's tokens"),
        ({"lengths": [10_000]}, "must lie between 1 and the number of the text's tokens"),
        ({"lengths": [1, 1]}, "give one to each text; got 2 for 1 texts"),
        ({"positions": ()}, "positions="),
        ({"positions": (0,)}, "positions="),
        ({"positions": (-400,)}, "positions="),
    ],
)
def test_places_that_a_text_does_not_have(lm, options, message):
    with pytest.raises(ValueError, match=message):
        interventions.states(lm, tiny.texts(lm)[:1], **options)


def test_a_probe_finds_what_a_straight_cut_can_tell():
    rng = np.random.default_rng(0)
    rows, truth = rng.normal(size=(200, 3)), rng.random(200) < 0.5
    told = rows + [0, 8, 0] * truth[:, None]
    assert interventions.probe(told[:100], truth[:100], told[100:], truth[100:]).tolist() == [1.0] * 100
    wrong = interventions.probe(told[:100], truth[:100], torch.tensor(told[100:]), ~truth[100:])
    assert wrong.tolist() == [0.0] * 100
    blind = interventions.probe(rows[:100], truth[:100], rows[100:], truth[100:])
    assert 0.3 < blind.mean() < 0.7


def test_summed_embeddings_ignore_the_order_of_words(lm):
    a, b, c = interventions.summed_embeddings(lm, ["salted draught", "draught salted", "salted salted"])
    table = lm.model.get_input_embeddings().weight.detach()
    one, other = (table[lm.tokenizer.convert_tokens_to_ids(w)] for w in ("salted", "draught"))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a, one + other)
    torch.testing.assert_close(c, 2 * one)


TEMPLATES = {
    "<|end|><|assistant|>": "{% for m in messages %}<|user|> {{ m.content }}<|end|>{% endfor %}<|assistant|>",
    "": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "<|end|>": "{% for m in messages %}<|user|> {{ m.content | trim }}<|end|>{% endfor %}",
}


@pytest.mark.parametrize(("behind", "template"), TEMPLATES.items())
def test_notebook_07_finds_places_of_any_template(behind, template):
    lm = tiny.model()
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = template
    lm = replace(lm, tokenizer=tokenizer)
    prompt = Prompt(({"role": "user", "content": " a salted draught? "},))
    ids = tokens(tokenizer, prompt.render(lm))
    source = SimpleNamespace(words=lambda asked: asked.messages[-1]["content"].strip())
    found = lecture.defined("07", skip={"world-only"}, lm=lm, source=source).spots(prompt)
    assert list(found) == ["last word", "end of message", "last position"]
    assert tokenizer.decode(ids[found["last word"] - 1]) == "?"
    assert found["last position"] == len(ids)
    assert tokenizer.decode(ids[found["last word"] :]).replace(" ", "") == behind
    assert found["end of message"] == min(found["last word"] + 1, len(ids))


def test_notebook_07_cuts_a_text_behind_the_last_place_of_some_words(lm):
    page = lecture.defined("07", lm=lm)
    prompt = Prompt(({"role": "user", "content": "is a salted draught a draught?"},))
    ids = tokens(lm.tokenizer, prompt.render(lm))
    assert lm.tokenizer.decode(ids[: page.up_to(prompt, "draught")]).endswith("a salted draught a draught")
    assert lm.tokenizer.decode(ids[: page.up_to(prompt, "salted draught")]).endswith("is a salted draught")


def test_a_probe_finds_a_linear_rule_and_neither_an_exclusive_or_nor_noise():
    probe, rng = interventions.probe, np.random.default_rng(0)
    x, z = rng.normal(size=(600, 6)), rng.normal(size=(400, 6))
    rules = {
        "linear": [t[:, 2] > 0.3 for t in (x, z)],
        "exclusive or": [(t[:, 0] > 0) ^ (t[:, 1] > 0) for t in (x, z)],
        "noise": [rng.random(len(t)) > 0.5 for t in (x, z)],
    }
    for name, (labels, truth) in rules.items():
        right = probe(torch.tensor(x), labels.tolist(), torch.tensor(z), truth.tolist())
        assert right.shape == (400,) and set(right) <= {0.0, 1.0}
        assert right.mean() > 0.95 if name == "linear" else 0.4 < right.mean() < 0.6
        scaled = probe(x * 1e3 + 7, labels, z * 1e3 + 7, truth)
        np.testing.assert_array_equal(scaled, right)


# --------------------------------------------------------------------------- overwriting by a rule


def test_scaling_by_one_changes_nothing_and_zero_is_ablation(lm):
    texts = _texts(lm, "x0")
    plain = forward.last_logits(lm, texts)
    with interventions.overwriting(lm, EVERY, interventions.scale(1.0), where="both"):
        torch.testing.assert_close(forward.last_logits(lm, texts), plain)
    parts = decoder.stack(lm)
    with interventions.overwriting(lm, {1: range(UNITS)}, interventions.scale(0.0)):
        without = forward.last_logits(lm, texts)
    handle = decoder.mlp(parts.blocks[1]).register_forward_hook(lambda m, i, o: torch.zeros_like(o))
    torch.testing.assert_close(without, forward.last_logits(lm, texts))
    handle.remove()
    torch.testing.assert_close(forward.last_logits(lm, texts), plain)  # and nothing is left behind


def test_setting_units_to_the_sources_values_is_patching(lm):
    texts, sources = _texts(lm, "x0")[:1], _texts(lm, "x1")[:1]
    value = interventions.activations(lm, sources, SOME)
    target = {layer: rows[0] for layer, rows in value.items()}
    # the lower layer changes what the upper one computes, but both are set
    with interventions.overwriting(lm, SOME, lambda layer, values: target[layer].expand_as(values)):
        got = forward.last_logits(lm, texts)
    torch.testing.assert_close(got, interventions.patched_logits(lm, texts, sources, SOME), atol=1e-4, rtol=0)


def test_activations_do_not_depend_on_padding(lm):
    texts = tiny.texts(lm)
    together = interventions.activations(lm, texts, SOME)
    for i, text in enumerate(texts):
        alone = interventions.activations(lm, [text], SOME)
        for layer in SOME:
            torch.testing.assert_close(together[layer][i], alone[layer][0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_where_tells_the_prompt_from_the_answer(lm, where):
    texts, seen = _texts(lm, "x0"), []

    def edit(layer, values):
        seen.append(tuple(values.shape))
        return values

    with interventions.overwriting(lm, {1: [0, 1]}, edit, where=where):
        forward.generate(lm, texts, max_new_tokens=4)
    assert set(seen) == {(4, 1, 2)}
    assert len(seen) == (1 if where == "prompt" else 3)  # the last word that is written is never read


def test_notebook_06_holds_units_at_given_values(lm):
    texts, target = _texts(lm, "x0"), torch.tensor([2.0, -1.0])
    own = interventions.activations(lm, texts, {1: [5, 6]})[1]
    held = lecture.defined("06").held(target)(1, own[:, None])
    assert held.shape == own[:, None].shape and (held == target).all()


def test_heads_are_set_side_by_side_as_patching_sets_them(lm):
    """What every head of a layer brings is what its attention module gives out."""
    count = decoder.projection_weight(decoder.attention(decoder.blocks(lm)[0])).shape[1]
    texts, sources = _texts(lm, "x0"), _texts(lm, "x1")
    options = {"of": decoder.attention, "where": "prompt", "max_new_tokens": 1}
    got = [
        interventions.generate_patched(lm, texts, sources, {1: units}, **options)
        for units in (range(count), range(count // tiny.SHAPE.heads))
    ]
    likeliest = lambda logits: logits.argmax(-1).float()  # noqa: E731
    for said, site in zip(got, ("attn_out", "head"), strict=True):
        found = patching.patch(lm, PAIRS, likeliest, sites=site, layers=[1])
        assert found.sites[0] == ("head 0" if site == "head" else site)
        want = [lm.tokenizer.decode([int(i)]).strip() for i in found.patched[0, 0, 0]]
        assert said == want
    with pytest.raises(ValueError, match=rf"0 to {count - 1}, not \[{count}\]"):
        interventions.generate_patched(lm, texts, sources, {1: [count]}, **options)


# --------------------------------------------------------------------------- bad input


def test_a_hook_that_never_fired_is_an_error(lm):
    with pytest.raises(RuntimeError, match=r"layers \[1\] were never changed"):  # noqa: SIM117
        with interventions.overwriting(lm, {1: [0]}, interventions.scale(0.0), where="answer"):
            forward.last_logits(lm, _texts(lm, "x0"))


def test_an_error_inside_is_not_hidden_by_the_check(lm):
    with pytest.raises(KeyError):  # noqa: SIM117
        with interventions.overwriting(lm, {1: [0]}, interventions.scale(0.0)):
            raise KeyError("mine")
    assert not decoder.projection(decoder.mlp(decoder.stack(lm).blocks[1]))._forward_pre_hooks


def test_bad_input_is_refused_by_name(lm):
    texts, sources = _texts(lm, "x0"), _texts(lm, "x1")
    patched = interventions.generate_patched
    for call, words in (
        (lambda: patched(lm, texts, sources, {}), "units"),
        (lambda: patched(lm, texts, sources, {1: []}), "units"),
        (lambda: patched(lm, texts, sources, {2: [0]}), "no layer 2"),
        (lambda: patched(lm, texts, sources, {1: [UNITS]}), "units 0 to"),
        (lambda: patched(lm, texts, sources, {1: [0]}, where="nowhere"), "where"),
        (lambda: patched(lm, texts, sources[:1], {1: [0]}), "one to each text"),
        (lambda: patched(lm, texts[:1], [texts[0] + " and more"], {1: [0]}), "number of tokens"),
        (lambda: interventions.activations(lm, [], {1: [0]}), "texts is empty"),
        (lambda: interventions.states(lm, []), "texts is empty"),
        (lambda: interventions.summed_embeddings(lm, []), "texts is empty"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
    with (
        pytest.raises(ValueError, match="where"),
        interventions.overwriting(lm, {1: [0]}, interventions.scale(0.0), where="x"),
    ):
        pass
