"""Effects of hidden units: the closed form against real patching, sets, searches, the first-order screen."""

from __future__ import annotations

import lecture
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive import Naive

from harmlens.asking import pairs as prompts
from harmlens.flow import neurons, outcomes, patching, record
from harmlens.flow.outcomes import TokenSets
from harmlens.models import loading as models
from harmlens.models import parts as decoder
from harmlens.models.chats import tokens

SETS = TokenSets((20, 21, 22), (30, 31))
Y1 = outcomes.y1(SETS)
PAIRS = prompts.pairs("prompt", n=4)
UNITS = tiny.SHAPE.hidden
PAGE = lecture.defined("05")  # searches in blocks are the notebook's own
BEHIND_A_NORM = {"gemma2", "gemma3", "olmo2"}  # a norm stands behind the MLP: no closed form


@pytest.fixture(scope="module")
def lm():
    return tiny.model()


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_last_layer_unit_equals_real_patching(architecture, direction):
    lm = tiny.model(architecture)
    got = neurons.last_layer(lm, PAIRS, Y1, direction=direction)
    units = {str(u): {1: [u]} for u in range(UNITS)}
    options = {"layers": [1], "direction": direction}
    real = patching.patch(lm, PAIRS, Y1, sites=units, **options)
    whole = patching.patch(lm, PAIRS, Y1, sites="mlp_out", **options)
    assert got.method == ("patching" if architecture in BEHIND_A_NORM else "closed form")
    assert got.effects.abs().max() > 0.01
    torch.testing.assert_close(got.effects, real.effects[:, 0, 0].T, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.sizes, real.size[:, 0, 0].T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.whole, whole.effects[0, 0, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(got.total, real.total, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_single_units_equal_a_whole_forward_pass_with_a_hook(architecture):
    lm = tiny.model(architecture)
    got = neurons.last_layer(lm, PAIRS[:1], Y1)
    plain = Naive(lm)
    x1, x0 = (torch.tensor([tokens(lm.tokenizer, side.render(lm))]) for side in (PAIRS[0].x1, PAIRS[0].x0))
    base, source = plain.record(x0), plain.record(x1)
    for unit in (0, 17, UNITS - 1):
        logits = plain.patched(x0, base, source, "neurons", [1], [x0.shape[1] - 1], units=[unit])
        after, before = (outcomes.logit_difference(z[0, -1], SETS) for z in (logits, base["logits"]))
        torch.testing.assert_close(got.effects[0, unit], after - before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_with_patching_as_far_as_it_carries(dtype):
    lm = tiny.model(spread=0.15)
    lm.model.to(dtype)
    got = neurons.last_layer(lm, PAIRS, Y1)
    units = {str(u): {1: [u]} for u in range(UNITS)}
    real = patching.patch(lm, PAIRS, Y1, sites=units, layers=[1])
    assert got.effects.dtype == torch.float32
    assert (got.effects - real.effects[:, 0, 0].T).abs().max() < 0.1


@pytest.mark.parametrize(
    "outcome",
    [outcomes.y2(SETS), lambda logits: logits[:, 25].float(), outcomes.Reply(["sure. take ash."] * 4)],
    ids=["Y2", "function", "reply"],
)
def test_other_outcomes_too(lm, outcome):
    got = neurons.last_layer(lm, PAIRS, outcome)
    units = {str(u): {1: [u]} for u in range(UNITS)}
    real = patching.patch(lm, PAIRS, outcome, sites=units, layers=[1])
    torch.testing.assert_close(got.effects, real.effects[:, 0, 0].T, atol=1e-4, rtol=0)


def test_last_layer_units_do_nothing_but_write_the_first_word(lm):
    """No block follows: whatever they are set to, the second word of a given reply is as likely as before."""
    replies = outcomes.Replies(["sure. take ash."] * 4, ["i will not help with that."] * 4)
    first = neurons.last_layer(lm, PAIRS, replies)
    later = neurons.last_layer(lm, PAIRS, outcomes.Replies(replies.harmful, replies.refusals, skip=1))
    assert first.effects.abs().max() > 1e-3
    assert later.effects.abs().max() == 0
    assert later.whole.abs().max() == 0
    assert later.total.abs().max() > 0


def test_memory_bound_does_not_change_the_answer(lm, monkeypatch):
    def measured():
        return neurons.last_layer(lm, PAIRS, Y1), neurons.set_effects(
            lm, PAIRS, Y1, [[0, 1], [5], [8, 9, 10]]
        )

    wide = measured()
    monkeypatch.setattr(neurons, "MOST_VALUES", 1)
    monkeypatch.setattr(record, "BATCH", 1)
    for one, other in zip(wide, measured(), strict=True):
        torch.testing.assert_close(one.effects, other.effects, atol=1e-5, rtol=0)


def test_pairs_of_several_lengths_keep_their_order(lm):
    pairs = [*prompts.pairs("prompt", n=6), *prompts.pairs("behaviour", n=6)]
    pairs = list({pair.id: pair for pair in pairs}.values())
    together = neurons.last_layer(lm, pairs, Y1)
    for i in (0, len(pairs) - 1):
        alone = neurons.last_layer(lm, [pairs[i]], Y1)
        torch.testing.assert_close(together.effects[i], alone.effects[0], atol=1e-5, rtol=0)


# --------------------------------------------------------------------------- sets


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_sets_equal_real_patching(architecture, direction):
    lm = tiny.model(architecture)
    sets = {"few": [3, 40, 11], "one": [7], "all": range(UNITS)}
    got = neurons.set_effects(lm, PAIRS, Y1, sets, direction=direction)
    units = {name: {1: list(some)} for name, some in sets.items()}
    real = patching.patch(lm, PAIRS, Y1, sites=units, layers=[1], direction=direction)
    torch.testing.assert_close(got.effects, real.effects[:, 0, 0].T, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.effects[:, 2], got.whole, atol=1e-4, rtol=0)


def test_an_empty_set_has_no_effect_and_a_single_one_the_units_own(lm):
    single = neurons.last_layer(lm, PAIRS, Y1)
    got = neurons.set_effects(lm, PAIRS, Y1, [[], [9]])
    assert got.effects[:, 0].abs().max() < 1e-5
    torch.testing.assert_close(got.effects[:, 1], single.effects[:, 9], atol=1e-5, rtol=0)


def test_permuting_hidden_units_leaves_the_function_and_the_effects_unchanged(lm):
    """Why index adjacency means nothing."""
    before = neurons.last_layer(lm, PAIRS, Y1)
    other = tiny.model()
    order = torch.randperm(UNITS, generator=torch.Generator().manual_seed(0))
    mlp = decoder.mlp(decoder.stack(other).blocks[-1])
    with torch.no_grad():
        for rows in (mlp.gate_proj, mlp.up_proj):
            rows.weight.copy_(rows.weight[order])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
    after = neurons.last_layer(other, PAIRS, Y1)
    torch.testing.assert_close(after.total, before.total, atol=1e-4, rtol=0)
    torch.testing.assert_close(after.effects, before.effects[:, order], atol=1e-4, rtol=0)


def test_notebook_05_reads_the_share_that_chosen_units_carry():
    effects = np.array([[3.0, -1.0, 0.0, 0.5]] * 3 + [[3.0, -1.0, 0.0, -0.5]] * 3)
    got = PAGE.carried(effects, [0, 1])  # the last unit cancels over pairs
    assert got.value == 1.0 and 0.85 < got.low < 1 == got.high
    assert PAGE.carried(effects, [1]).value == 0.25


def test_notebook_05_tempting_statistic_calls_noise_sparse_and_the_claims_does_not():
    page = lecture.defined("05", few=13)
    draws = np.random.default_rng(0).normal(size=(200, 256))
    assert np.mean([page.few_reach(draw) <= 0.05 for draw in draws]) > 0.8
    assert np.mean([page.top_carries(draw) >= 0.5 for draw in draws]) == 0
    one = np.eye(256)[0] + 0.0001
    assert page.few_reach(one) <= 0.05 and page.top_carries(one) > 0.7


# --------------------------------------------------------------------------- blocks of notebook 05


def blocks(count, size, stride, order=None):
    """The notebook's own, which looks the two sizes up."""
    PAGE.neighbours.__globals__.update(count=count, size=size)
    return PAGE.neighbours(stride, order)


@given(st.integers(1, 60), st.integers(1, 20), st.randoms(use_true_random=False))
def test_blocks_cover_every_unit_once_in_the_order_given(n, size, rng):
    order = list(range(n))
    rng.shuffle(order)
    got = blocks(n, size, size, order)
    assert [u for block in got for u in block] == order
    assert all(len(block) == size for block in got[:-1])


def test_overlapping_blocks():
    assert blocks(6, 4, 2) == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert blocks(3, 8, 8) == [[0, 1, 2]]


# --------------------------------------------------------------------------- the screen


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
def test_screen_is_the_derivative_of_patching(architecture):
    """A small step of one unit towards its value in the other run changes Y1 by step * estimate."""
    lm, step = tiny.model(architecture), 1e-2
    got = neurons.screen(lm, PAIRS[:1], Y1)
    source, base = (torch.tensor([tokens(lm.tokenizer, s.render(lm))]) for s in (PAIRS[0].x1, PAIRS[0].x0))
    lm.model.double()
    plain = Naive(lm)
    ours, theirs = plain.record(base), plain.record(source)
    for layer in (0, 1):
        for unit in (0, 33):
            partly = {
                "neurons": [
                    a + step * (b - a) for a, b in zip(ours["neurons"], theirs["neurons"], strict=True)
                ]
            }
            after = plain.patched(base, ours, partly, "neurons", [layer], [base.shape[1] - 1], units=[unit])
            slope = [outcomes.logit_difference(z[0, -1], SETS).item() for z in (after, ours["logits"])]
            slope = (slope[0] - slope[1]) / step
            assert got[layer][unit].item() == pytest.approx(slope, abs=0.02 + 0.05 * abs(slope))


def test_screen_sums_to_transformerlens_scores():
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch

    lm = tiny.model()
    got = neurons.screen(lm, PAIRS[:1], Y1)
    clean, corrupt = (
        torch.tensor([tokens(lm.tokenizer, getattr(p, side).render(lm)) for p in PAIRS[:1]])
        for side in ("x1", "x0")
    )
    # Bridging wants a tokenizer that lies in a folder, and changes the model that it is given.
    stored = models.load("organism/sft", seed=0).tokenizer
    bridge = TransformerBridge.boot_transformers("tiny", hf_model=tiny.model().model, tokenizer=stored)
    bridge.eval()
    theirs = attribution_patch(
        bridge, clean, corrupt, lambda logits: outcomes.logit_difference(logits[0, -1], SETS)
    )
    for layer in (0, 1):
        node = next(
            score for node, score in theirs.node_scores.items()
            if node.kind == "mlp_out" and node.layer == layer and node.position == clean.shape[1] - 1
        )  # fmt: skip
        assert got[layer].sum().item() == pytest.approx(node, abs=1e-4)


def test_screen_leaves_no_gradient_behind(lm):
    before = [p.requires_grad for p in lm.model.parameters()]
    got = neurons.screen(lm, PAIRS, Y1)
    assert list(got) == [0, 1] and not got[0].requires_grad
    assert [p.requires_grad for p in lm.model.parameters()] == before
    assert all(p.grad is None for p in lm.model.parameters())


# --------------------------------------------------------------------------- bad input


def test_bad_input_is_refused_by_name(lm):
    for call, words in (
        (lambda: neurons.last_layer(lm, [], Y1), "pairs is empty"),
        (lambda: neurons.last_layer(lm, PAIRS, Y1, direction="sideways"), "direction"),
        (lambda: neurons.set_effects(lm, PAIRS, Y1, []), "sets is empty"),
        (lambda: neurons.set_effects(lm, PAIRS, Y1, [[UNITS]]), r"not \[64\]"),
        (lambda: neurons.set_effects(lm, PAIRS, Y1, {"a": [1, 1]}), "twice"),
        (lambda: neurons.screen(lm, PAIRS, outcomes.Reply(["a"] * 4)), "first-token"),
        (lambda: neurons.top_k(torch.zeros(3), 4), "k=4"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()


def test_an_mlp_without_a_single_projection_is_refused_by_name(lm, monkeypatch):
    other = tiny.model()

    class Experts(torch.nn.Module):
        def forward(self, x):
            return x

    other.model.model.layers[-1].mlp = Experts()
    with pytest.raises(ValueError, match="Experts has no single output projection"):
        neurons.last_layer(other, PAIRS, Y1)
