"""Generation with hidden units overwritten, against plain generation and against doing it without a cache."""

from __future__ import annotations

import pytest
import tiny
import torch

from harmlens.asking import prompts
from harmlens.flow import interventions, neurons, outcomes
from harmlens.models import forward
from harmlens.models import parts as decoder
from harmlens.models.chats import tokens

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


def test_batches_do_not_change_the_answers(lm):
    texts, sources = _texts(lm, "x0"), _texts(lm, "x1")
    together, alone = (
        interventions.generate_patched(lm, texts, sources, EVERY, max_new_tokens=5, batch_size=b)
        for b in (9, 1)
    )
    assert together == alone


def test_patched_logits_agree_with_the_closed_form(lm):
    sets = outcomes.TokenSets((20, 21), (30,))
    units = [4, 8, 15]
    want = neurons.set_effects(lm, PAIRS, outcomes.y1(sets), [units])
    logits = interventions.patched_logits(lm, _texts(lm, "x0"), _texts(lm, "x1"), {1: units})
    got = outcomes.logit_difference(logits, sets) - want.y0
    assert want.at(0).abs().max() > 1e-3
    torch.testing.assert_close(got, want.at(0), atol=1e-4, rtol=0)


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
    with interventions.overwriting(lm, SOME, interventions.toward(target)):
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


def test_a_dose_goes_part_of_the_way(lm):
    texts, target = _texts(lm, "x0"), {1: torch.tensor([2.0, -1.0])}
    own = interventions.activations(lm, texts, {1: [5, 6]})[1]
    edit = interventions.toward(target, dose=0.25)
    torch.testing.assert_close(edit(1, own[:, None])[:, 0], 0.75 * own + 0.25 * target[1])


def test_resampling_takes_whole_rows_of_the_bank():
    bank = {0: torch.arange(12.0).view(6, 2), 1: torch.arange(12.0).view(6, 2) + 100}
    edit, again = interventions.resample(bank, seed=1), interventions.resample(bank, seed=1)
    values = torch.zeros(5, 1, 2)
    low, high = edit(0, values), edit(1, values)
    assert torch.equal(low + 100, high)  # all layers from the same prompts
    assert all(row.tolist() in bank[0].tolist() for row in low[:, 0])
    assert torch.equal(low, again(0, values))
    assert not torch.equal(low, edit(0, values))  # drawn anew for the next run


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
        (lambda: interventions.toward({1: torch.zeros(3)})(1, torch.zeros(1, 1, 2)), "target"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
    with (
        pytest.raises(ValueError, match="where"),
        interventions.overwriting(lm, {1: [0]}, interventions.scale(0.0), where="x"),
    ):
        pass
