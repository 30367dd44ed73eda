"""Neurons against weights: whose weights they are, counts against chance, matched sets, directions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from harmlens.asking import tasks
from harmlens.asking.source import WORLD
from harmlens.flow import interventions
from harmlens.models import forward
from harmlens.models import parts as decoder
from harmlens.weights import attribution, masks, meeting, scores
from harmlens.weights.meeting import Meeting

WIDTH, UNITS = tiny.SHAPE.width, tiny.SHAPE.hidden
DOWN, UP = "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def lm():
    return tiny.model()


def of_layer(scored, layer):
    values = {name: v for name, v in scored.values.items() if scores.layer_of(name) == layer}
    return dataclasses.replace(scored, values=values)


def some_mask(lm, share=0.05):
    return masks.top(scores.random(lm), share)


def one(mask, name, *places):
    """A mask that holds these (row, column) of one matrix only."""
    columns = mask.shapes[name][1]
    indices = {n: i[:0] for n, i in mask.indices.items()}
    indices[name] = torch.tensor(sorted(r * columns + c for r, c in places))
    return dataclasses.replace(mask, indices=indices)


# --------------------------------------------------------------------------- the weights of neurons


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_without_its_weights_a_neuron_is_silent(architecture):
    lm, units = tiny.model(architecture), {0: [3, 60], 1: [5]}
    texts, own = tiny.texts(lm), meeting.weights_of(lm, units, some_mask(lm))
    with masks.without(lm, own):
        got = forward.last_logits(lm, texts)
        said = forward.generate(lm, texts, max_new_tokens=5)
    with interventions.overwriting(lm, units, interventions.scale(0.0), where="both", every_position=True):
        wanted = forward.last_logits(lm, texts)
        silent = forward.generate(lm, texts, max_new_tokens=5)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert said == silent
    assert (got - forward.last_logits(lm, texts)).abs().max() > 1e-3
    others = meeting.weights_of(lm, {0: [u for u in range(UNITS) if u not in (3, 60)]}, some_mask(lm))
    assert len(own & others) == 0


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt_neox"])
def test_all_neurons_of_a_layer_own_its_whole_mlp_once(architecture):
    lm = tiny.model(architecture)
    whole = meeting.weights_of(lm, {1: range(UNITS)}, some_mask(lm))
    names = {n for n, index in whole.indices.items() if len(index)}
    inside = {id(m) for m in decoder.mlp(decoder.blocks(lm)[1]).modules()}
    assert names == {n for n, m in scores.matrices(lm).items() if id(m) in inside}
    for name in names:
        assert whole.indices[name].tolist() == list(range(np.prod(whole.shapes[name])))


def test_which_weights_by_hand(lm):
    own = meeting.weights_of(lm, {1: [4]}, some_mask(lm))
    assert own.name == "neurons" and len(own) == 3 * WIDTH
    assert own.indices[UP].tolist() == list(range(4 * WIDTH, 5 * WIDTH))  # a row
    assert own.indices[DOWN].tolist() == list(range(4, UNITS * WIDTH, UNITS))  # a column
    assert len(meeting.weights_of(lm, {}, some_mask(lm))) == 0


def test_bad_neurons_are_refused(lm):
    mask = some_mask(lm)
    with pytest.raises(ValueError, match="layer 1 has units 0 to 63"):
        meeting.weights_of(lm, {1: [64]}, mask)
    with pytest.raises(ValueError, match="layer=2 does not exist"):
        meeting.weights_of(lm, {2: [0]}, mask)
    first = masks.top(of_layer(scores.random(lm), 0), 0.1)
    with pytest.raises(ValueError, match="select it from scores of layer 1 too"):
        meeting.weights_of(lm, {1: [0]}, first)
    with pytest.raises(ValueError, match="does not fit"):
        meeting.weights_of(tiny.model("gpt_neox"), {1: [0]}, mask)


# --------------------------------------------------------------------------- counts and chance


def test_hits_are_counted_by_matrix(lm):
    mask = some_mask(lm) - some_mask(lm)
    mask = one(mask, DOWN, (0, 4), (9, 4), (9, 5)) | one(mask, UP, (4, 0), (6, 4))
    met = meeting.overlap_with_neurons(lm, mask, [4], layer=1)
    found = {n.split(".")[-2]: row[:2].tolist() for n, row in zip(met.matrices, met.columns, strict=True)}
    assert found == {"gate_proj": [0, 0], "up_proj": [1, 2], "down_proj": [2, 3]}
    assert met.columns[:, 2:].tolist() == [[WIDTH, UNITS * WIDTH]] * 3
    assert met.enrichment == pytest.approx(np.log2(3.5 / (5 / UNITS + 0.5)))
    assert meeting.overlap_with_neurons(lm, mask, [4], layer=0).columns[:, 1].sum() == 0


def test_enrichment_is_zero_where_shares_are_equal_and_finite_without_hits():
    def ratio(*row):
        return float(meeting.log2_enrichment(*np.array([row], dtype=float).T))

    assert ratio(10, 100, 50, 500) == 0
    assert ratio(0, 100, 50, 500) == pytest.approx(np.log2(0.5 / 10.5))
    assert ratio(0, 0, 50, 500) == 0
    columns = np.random.default_rng(0).integers(1, 9, size=(4, 7, 3)).astype(float)
    rows = [meeting.log2_enrichment(*columns[:, i]) for i in range(7)]
    np.testing.assert_allclose(meeting.log2_enrichment(*columns, axis=-1), rows)


@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30)),
        min_size=1,
        max_size=3,
    )
)
def test_chance_is_that_of_independent_draws(rows):
    size = np.array([r[0] for r in rows])
    members, chosen = (np.minimum([r[k] for r in rows], size) for k in (1, 2))
    least = np.maximum(0, members + chosen - size)
    hits = np.clip([r[3] for r in rows], least, np.minimum(members, chosen))
    met = Meeting(tuple("abc"[: len(rows)]), np.stack([hits, chosen, members, size], axis=1).astype(float))
    if len(rows) == 1:
        wanted = scipy_stats.hypergeom.sf(hits[0] - 1, size[0], members[0], chosen[0])
        assert met.p_value == pytest.approx(wanted, abs=1e-9)
    assert -1e-12 <= met.p_value <= 1
    if hits.sum() == least.sum():
        assert met.p_value == pytest.approx(1)


def test_chance_agrees_with_random_masks(lm):
    def met(seed):
        mask = masks.top(of_layer(scores.random(lm, seed=seed), 1), 0.02)
        return meeting.overlap_with_neurons(lm, mask, range(8), layer=1)

    drawn = np.array([met(seed).columns[:, 0].sum() for seed in range(120)])
    at, rigged = int(np.median(drawn)), met(0)
    rigged.columns[:, 0] = at, 0, 0  # only the sum counts
    assert rigged.p_value == pytest.approx((drawn >= at).mean(), abs=0.12)


def test_norms_by_hand(lm):
    parts = [m.weight for m in decoder.mlp(decoder.blocks(lm)[1]).children() if hasattr(m, "weight")]
    by_hand = parts[0][9].square().sum() + parts[1][9].square().sum() + parts[2][:, 9].square().sum()
    torch.testing.assert_close(meeting.norms(lm, 1)[9], by_hand.sqrt().detach())


# --------------------------------------------------------------------------- scores and directions


def test_scores_of_outgoing_weights_add_up_to_the_neurons_effect():
    """Weakening neurons a little raises the scored loss by the sum of their scores, as a slope."""
    lm, units, dose = tiny.model(spread=0.1), [3, 9, 40, 41], 1e-2
    task = WORLD.task("harmful")
    task = dataclasses.replace(task, chats=task.chats[:6], answers=task.answers[:6], units=task.units[:6])
    given = [f"{task.prefill} {accepted[0]}" for accepted in task.answers]
    rows = tasks.rows(lm, task.chats, given, given=task.prefill, end=True)
    prune = attribution.prune_score(lm, rows)
    losses = []
    for sign in (1, -1):
        scene = interventions.scale(1 - sign * dose)
        with interventions.overwriting(lm, {0: units}, scene, where="both", every_position=True):
            losses.append(tasks.measure(lm, task).loss.mean())
    slope = (losses[0] - losses[1]) / (2 * dose)
    got = float(meeting.unit_scores(lm, prune, 0)[units].sum()) / prune.n
    assert abs(slope) > 1e-4 and got == pytest.approx(slope, rel=0.05)


def test_unsigned_scores_are_no_effects(lm):
    with pytest.raises(ValueError, match="give signed ones"):
        meeting.unit_scores(lm, scores.magnitude(lm), 1)
    first = dataclasses.replace(of_layer(scores.random(lm), 0), kind="signed")
    with pytest.raises(ValueError, match="score layer 1 too"):
        meeting.unit_scores(lm, first, 1)


def test_along_a_direction_by_hand(lm):
    empty, axis = some_mask(lm) - some_mask(lm), torch.eye(WIDTH)[7]
    for name, place, share in ((DOWN, (7, 2), WIDTH), (DOWN, (6, 7), 0), (UP, (3, 7), WIDTH)):
        # Writes into coordinate 7, writes elsewhere, reads from coordinate 7.
        got = meeting.along_direction(lm, one(empty, name, place), 3 * axis)
        assert got == pytest.approx(share)
    weights = [float(scores.matrices(lm)[DOWN].weight[row, 2].detach()) ** 2 for row in (7, 8)]
    got = meeting.along_direction(lm, one(empty, DOWN, (7, 2), (8, 2)), axis)
    assert got == pytest.approx(WIDTH * weights[0] / sum(weights))


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt_neox"])
def test_along_a_whole_basis_is_everything(architecture):
    lm = tiny.model(architecture)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0]
    shares = [meeting.along_direction(lm, some_mask(lm), v) for v in basis]
    assert np.mean(shares) == pytest.approx(1, rel=1e-4)
