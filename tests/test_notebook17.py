"""What notebook 17 teaches: neurons against weights, counts against chance, what is taken."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import lecture
import numpy as np
import pytest
import tiny
import torch
from scipy import stats as scipy_stats

from harmlens.asking import tasks
from harmlens.asking.source import WORLD
from harmlens.flow import interventions
from harmlens.models import forward
from harmlens.models import parts as decoder
from harmlens.weights import attribution, masks, scores

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


def page(lm, harm, prune=None):
    """The notebook about a model of two layers."""
    found = SimpleNamespace(prune=prune)
    return lecture.defined("17", lm=lm, harm=harm, found=found, count=UNITS, last=1)


def weights_of(lm, units, mask):
    return page(lm, mask).owned(units)


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
    texts, own = tiny.texts(lm), weights_of(lm, units, some_mask(lm))
    with masks.without(lm, own):
        got = forward.last_logits(lm, texts)
        said = forward.generate(lm, texts, max_new_tokens=5)
    with interventions.overwriting(lm, units, interventions.scale(0.0), where="both", every_position=True):
        wanted = forward.last_logits(lm, texts)
        silent = forward.generate(lm, texts, max_new_tokens=5)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert said == silent
    assert (got - forward.last_logits(lm, texts)).abs().max() > 1e-3
    others = weights_of(lm, {0: [u for u in range(UNITS) if u not in (3, 60)]}, some_mask(lm))
    assert len(own & others) == 0


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt_neox"])
def test_all_neurons_of_a_layer_own_its_whole_mlp_once(architecture):
    lm = tiny.model(architecture)
    whole = weights_of(lm, {1: range(UNITS)}, some_mask(lm))
    names = {n for n, index in whole.indices.items() if len(index)}
    inside = {id(m) for m in decoder.mlp(decoder.blocks(lm)[1]).modules()}
    assert names == {n for n, m in scores.matrices(lm).items() if id(m) in inside}
    for name in names:
        assert whole.indices[name].tolist() == list(range(np.prod(whole.shapes[name])))


def test_which_weights_by_hand(lm):
    own = weights_of(lm, {1: [4]}, some_mask(lm))
    assert own.name == "neurons" and len(own) == 3 * WIDTH
    assert own.indices[UP].tolist() == list(range(4 * WIDTH, 5 * WIDTH))  # a row
    assert own.indices[DOWN].tolist() == list(range(4, UNITS * WIDTH, UNITS))  # a column
    assert len(weights_of(lm, {}, some_mask(lm))) == 0


def test_bad_neurons_are_refused(lm):
    with pytest.raises(IndexError):
        weights_of(lm, {1: [64]}, some_mask(lm))
    with pytest.raises(ValueError, match=r"layers=\[2\] must be"):
        weights_of(lm, {2: [0]}, some_mask(lm))


# --------------------------------------------------------------------------- counts and chance


def test_hits_are_counted_by_matrix(lm):
    mask = some_mask(lm).empty
    mask = one(mask, DOWN, (0, 4), (9, 4), (9, 5)) | one(mask, UP, (4, 0), (6, 4))
    found = page(lm, mask)
    table = found.counts([4], layer=1)
    assert table[:, :2].tolist() == [[0, 0], [1, 2], [2, 3]]  # gate, up, down
    assert table[:, 2:].tolist() == [[WIDTH, UNITS * WIDTH]] * 3
    assert found.enrichment([4], layer=1) == pytest.approx(np.log2(3.5 / (5 / UNITS + 0.5)))
    assert found.counts([4], layer=0)[:, 1].sum() == 0


def test_enrichment_is_zero_where_shares_are_equal_and_finite_without_hits(lm):
    meeting = page(lm, some_mask(lm))

    def ratio(*row):
        return float(meeting.log2_enrichment(*np.array([row], dtype=float).T))

    assert ratio(10, 100, 50, 500) == 0
    assert ratio(0, 100, 50, 500) == pytest.approx(np.log2(0.5 / 10.5))
    assert ratio(0, 0, 50, 500) == 0
    columns = np.random.default_rng(0).integers(1, 9, size=(4, 7, 3)).astype(float)
    rows = [meeting.log2_enrichment(*columns[:, i]) for i in range(7)]
    np.testing.assert_allclose(meeting.log2_enrichment(*columns, axis=-1), rows)


def test_chance_is_that_of_blind_draws(lm):
    textbook = page(lm, some_mask(lm)).textbook
    rows = np.array([[3, 10, 20, 100], [1, 5, 10, 50]])
    wanted = scipy_stats.hypergeom(150, 30, 15).pmf(range(4, 16)).sum()
    assert textbook(rows) == pytest.approx(wanted)
    assert textbook(np.array([[0, 10, 20, 100]])) == 1


def test_norms_by_hand(lm):
    parts = [m.weight for m in decoder.mlp(decoder.blocks(lm)[1]).children() if hasattr(m, "weight")]
    by_hand = parts[0][9].square().sum() + parts[1][9].square().sum() + parts[2][:, 9].square().sum()
    squares = {name: p.detach().square() for name, p in lm.model.named_parameters()}
    got = page(lm, some_mask(lm)).by_neuron(1, squares)
    assert len(got) == UNITS and got[9] == pytest.approx(float(by_hand.detach()))


# --------------------------------------------------------------------------- scores and what is taken


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
    got = float(page(lm, some_mask(lm), prune).support(0)[units].sum()) / prune.n
    assert abs(slope) > 1e-4 and got == pytest.approx(slope, rel=0.05)


def test_taken_is_what_goes_beyond_the_control():
    found = lecture.defined(
        "17",
        after={
            "view": [{"o": np.array([1.0, 2.0])}, {"o": np.array([4.0, 4.0])}, {"o": np.array([4.0, 2.0])}]
        },
        start={"o": np.array([5.0, 5.0])},
    )
    assert found.crossing("view", "o").value == pytest.approx((3.5 - 1.5) / 5)


def test_matched_sets_are_compared_by_their_mean_enrichment(lm):
    found, rows = page(lm, some_mask(lm)), np.array([[3, 10, 20, 100], [1, 5, 10, 50]])
    other = np.array([[5, 10, 20, 100], [1, 5, 10, 50]])
    both = found.mean_enrichment(*np.concatenate([rows, other], axis=1).T)
    assert both == pytest.approx(np.mean([found.log2_enrichment(*one.T) for one in (rows, other)]))
