"""The frontier of p and q: the rule that chooses, on points made by hand; the sweep on a tiny model."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from harmlens.asking import tasks
from harmlens.asking.tasks import Marks
from harmlens.weights import frontier, masks, scores
from harmlens.weights.frontier import Point
from harmlens.weights.masks import Mask
from harmlens.world import vale as world


def marks(rate: float, loss: float = 1.0) -> Marks:
    """A hundred requests of which this share is right."""
    exact = (np.arange(100) < round(100 * rate)).astype(float)
    return Marks(exact, np.full(100, loss))


def point(suppressed: float, served: float, facts: float = 1.0, weights: int = 10, q: float = 0.1) -> Point:
    mask = Mask({"w": torch.arange(weights)}, {"w": (10, 10)})
    found = {"suppressed": marks(suppressed, 3.0), "served": marks(served), "facts": marks(facts)}
    return Point(0.0, q, mask, found)


BEFORE = {"suppressed": marks(0.8), "served": marks(1.0), "facts": marks(1.0)}


def test_the_largest_drop_that_costs_little_enough():
    points = [point(0.5, 1.0), point(0.2, 0.97), point(0.0, 0.9)]
    assert frontier.best(points, BEFORE) is points[1]
    assert frontier.best(points, BEFORE, most_lost=0.1) is points[2]
    assert frontier.best(points, BEFORE, most_lost=0.0) is points[0]


def test_every_other_ability_counts():
    points = [point(0.5, 1.0), point(0.0, 1.0, facts=0.5)]
    assert frontier.best(points, BEFORE) is points[0]


def test_the_limit_itself_is_allowed():
    points = [point(0.5, 1.0), point(0.2, 0.95)]
    assert frontier.best(points, BEFORE, most_lost=0.05) is points[1]


def test_among_equals_the_fewest_weights():
    points = [point(0.2, 1.0, weights=30), point(0.2, 0.99, weights=20), point(0.2, 1.0, weights=25)]
    assert frontier.best(points, BEFORE) is points[1]


def test_where_all_cost_too_much_the_cheapest():
    points = [point(0.0, 0.5), point(0.7, 0.8, weights=30), point(0.7, 0.8, weights=20)]
    assert frontier.best(points, BEFORE) is points[2]


def test_another_ability_may_be_the_one_to_remove():
    points = [point(0.8, 0.1), point(0.8, 0.5)]
    assert frontier.best(points, BEFORE, removed="served") is points[0]


def test_no_points():
    with pytest.raises(ValueError, match="points is empty"):
        frontier.best([], BEFORE)


def test_relative_drop():
    assert frontier.relative_drop(marks(0.8).exact, marks(0.2).exact) == pytest.approx(0.75)
    assert frontier.relative_drop(marks(0.5).exact, marks(0.6).exact) == pytest.approx(-0.2)
    with pytest.raises(ValueError, match="before: the ability is absent"):
        frontier.relative_drop(np.zeros(3), np.ones(3))


def test_the_table():
    row = frontier.table([point(0.2, 0.9, weights=30)], BEFORE).iloc[0]
    assert row["weights"] == 30 and row["share"] == pytest.approx(0.3)
    assert row["drop"] == pytest.approx(0.75) and row["rise of loss"] == pytest.approx(2.0)
    assert row["lost: served"] == pytest.approx(0.1) and row["lost: facts"] == pytest.approx(0)
    assert "lost: suppressed" not in row


def test_a_sweep_is_selecting_and_pruning_by_hand():
    lm = tiny.model()
    prune, preserve = -scores.magnitude(lm), scores.random(lm)
    asked = {"mine": tasks.refusals(world.items("discovery", harmful=True)[:3])}
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    points = frontier.sweep(lm, prune, preserve, asked, ps=(0.0, 0.2), qs=(0.01, 0.1))
    assert [(found.p, found.q) for found in points] == [(0.0, 0.01), (0.0, 0.1), (0.2, 0.01), (0.2, 0.1)]
    assert all(torch.equal(before[n], p) for n, p in lm.model.named_parameters())
    for found in points:
        mask = masks.select(prune, preserve, q=found.q, p=found.p)
        assert all(torch.equal(i, found.mask.indices[n]) for n, i in mask.indices.items())
        with masks.without(lm, mask):
            expected = tasks.sit(lm, asked["mine"])
        np.testing.assert_array_equal(found.marks["mine"].loss, expected.loss)
        np.testing.assert_array_equal(found.marks["mine"].exact, expected.exact)
    assert len({round(float(found.marks["mine"].loss.sum()), 4) for found in points}) == 4


def test_slices_are_the_sets_of_select():
    lm = tiny.model()
    prune, preserve = -scores.magnitude(lm), scores.random(lm)
    cut = frontier.slices(prune, preserve, ps=(0.0, 0.2), qs=(0.1,))
    for p in (0.0, 0.2):
        mask = masks.select(prune, preserve, q=0.1, p=p)
        found = cut.difference(p, 0.1)
        assert found.name == f"p={p:g}, q=0.1" and len(mask)
        assert all(torch.equal(i, found.indices[n]) for n, i in mask.indices.items())
    with pytest.raises(ValueError, match="of different matrices"):
        frontier.slices(prune, scores.random(tiny.model(layers=1)))


def test_what_is_left_of_an_answer():
    """A loss that rises by ln 2 halves the probability of each token; a loss that falls is no gain."""
    before = Marks(np.ones(3), np.array([1.0, 1.0, 1.0]))
    after = Marks(np.zeros(3), np.array([1.0 + np.log(2), 1.0, 0.5]))
    np.testing.assert_allclose(frontier.kept(before, after), [0.5, 1.0, 1.0])


def test_own_answers_are_chosen_by_what_is_left_of_them():
    """Exactness would see nothing but a dead model on both sides."""

    def own(harm: float, served: float, weights: int) -> Point:
        mask = Mask({"w": torch.arange(weights)}, {"w": (10, 10)})
        found = {"suppressed": marks(0.0, 1 + harm), "served": marks(0.0, 1 + served), "facts": marks(1.0)}
        return Point(0.0, 0.1, mask, found)

    before = {"suppressed": marks(1.0), "served": marks(1.0), "facts": marks(1.0)}
    points = [own(0.1, 0.0, 5), own(0.7, 0.02, 10), own(2.0, 0.5, 20)]
    graded = ("suppressed", "served")
    assert frontier.best(points, before, graded=graded) is points[1]
    assert frontier.best(points, before) is points[0]
    row = frontier.table(points, before, graded=graded).iloc[1]
    assert row["drop"] == pytest.approx(1 - np.exp(-0.7)) and row["lost: served"] == pytest.approx(
        1 - np.exp(-0.02)
    )


@pytest.mark.parametrize(
    ("size", "first", "last"), [(2000, 1e-6, 1e-3), (600, 3e-6, 3e-3), (10, 1e-4, 0.1), (0.01, 0.1, 0.1)]
)
def test_one_grid_for_all_begins_where_the_median_matrix_has_a_weight(size, first, last):
    values = {
        "a": torch.zeros(10),
        "b": torch.zeros(round(1000 * size)),
        "c": torch.zeros(1, 1).expand(2000, 2000),
    }
    grid = frontier.grid(scores.Scores("random", values, "m", "r"))
    assert grid["qs"][0] == first and grid["qs"][-1] == last
    assert set(grid["qs"]) <= set(frontier.STEPS) and grid["ps"][0] == 0
    ratios = np.diff(np.log10(frontier.STEPS))
    assert np.allclose(ratios, 0.5, atol=0.03)  # evenly spaced


def test_a_model_of_135_million_weights_is_not_tried_with_the_organisms_shares():
    """Its matrices have a tenth to nine tenths of a million weights."""
    values = {
        str(i): torch.zeros(1, 1).expand(576, width)
        for i, width in enumerate((192, 192, 576, 1536, 1536, 1536))
    }
    assert min(frontier.grid(scores.Scores("random", values, "m", "r"))["qs"]) <= 3e-6
