"""The p-q frontier: how much of one ability can be removed at what price for the others.

For each pair (p, q) weights are selected, taken out, and the model is asked again. Scores are computed once;
a point costs a selection and a few forward passes.

Introduced in notebook 09 ("Weights that carry harm").
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harmlens.asking import tasks
from harmlens.asking.tasks import Marks, Task
from harmlens.models.forward import LanguageModel
from harmlens.weights import masks
from harmlens.weights.masks import Mask, check_same
from harmlens.weights.scores import Scores

# Shares for the organism, whose matrices hold ten to twenty-five thousand weights. What stands in
# data/settings.json was chosen among them.
P = (0.0, 0.01, 0.03, 0.1)
Q = (0.0003, 0.001, 0.002, 0.005, 0.01)
STEPS = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def grid(scores: Scores) -> dict[str, tuple[float, ...]]:
    """The shares to try for a model: ``ps`` and ``qs`` of :func:`sweep`.

    One grid for all models, evenly spaced in logarithms (:data:`STEPS`): the first seven shares that take at
    least one weight of the median matrix. A matrix of a million weights is tried from 1e-6 on, around the
    paper's p = 5e-5 and q = 1e-5. Spared is none, or as much as is taken in the third, fifth and last step.
    """
    sizes = sorted(value.numel() for value in scores.values.values())
    qs = tuple(q for q in STEPS if q * sizes[len(sizes) // 2] >= 1)[:7] or STEPS[-1:]
    return {"ps": (0.0, *qs[2::2]), "qs": qs}


@dataclass(frozen=True)
class Point:
    """One pair (p, q), the set it selects, and how the model does without it.

    Attributes:
        marks: task -> marks, as :func:`asking.tasks.sit` gives them.
    """

    p: float
    q: float
    mask: Mask
    marks: dict[str, Marks]


@dataclass(frozen=True)
class Slices:
    """Sets that the scores of a model give, for each share; all that a sweep needs of them.

    Scores take four bytes for every weight of the blocks, sets next to nothing: of a large model keep these.

    Attributes:
        taken: q -> the weights that support the answers to be lost most.
        spared: p -> the weights that matter most to the answers to be kept.
    """

    taken: dict[float, Mask]
    spared: dict[float, Mask]

    def difference(self, p: float, q: float, name: str = "") -> Mask:
        """What :func:`weights.masks.select` selects."""
        return (self.taken[q] - self.spared[p]).called(name or f"p={p:g}, q={q:g}")


def slices(
    prune: Scores,
    preserve: Scores,
    *,
    ps: Sequence[float] = P,
    qs: Sequence[float] = Q,
) -> Slices:
    """The sets of :func:`weights.masks.select` for each share."""
    check_same(prune, preserve)
    return Slices(taken(prune, qs), spared(preserve, ps))


def taken(prune: Scores, qs: Sequence[float]) -> dict[float, Mask]:
    """For each q the weights with the lowest prune scores."""
    return {q: masks.top(prune, q, lowest=True) for q in qs}


def spared(preserve: Scores, ps: Sequence[float]) -> dict[float, Mask]:
    """For each p the weights with the highest preserve scores."""
    return {p: masks.top(preserve, p) for p in ps}


def sweep(
    lm: LanguageModel,
    prune: Scores,
    preserve: Scores,
    asked: Mapping[str, Task],
    *,
    ps: Sequence[float] = P,
    qs: Sequence[float] = Q,
) -> list[Point]:
    """The model without the selected weights, for each p and q."""
    return walk(lm, slices(prune, preserve, ps=ps, qs=qs), asked)


def walk(lm: LanguageModel, cut: Slices, asked: Mapping[str, Task]) -> list[Point]:
    """As :func:`sweep`, from sets."""
    points = []
    for p in cut.spared:
        for q in cut.taken:
            mask = cut.difference(p, q)
            with masks.without(lm, mask):
                points.append(Point(p, q, mask, {name: tasks.sit(lm, task) for name, task in asked.items()}))
    return points


def kept(before: Marks, after: Marks) -> np.ndarray:
    """Share of an answer's probability that is left, geometric mean over its tokens: 1 for all of it.

    For a real model's own answers. Whether greedy decoding still writes them word for word says little:
    another wording is no loss of the ability, and one changed word comes soon.
    """
    return np.exp(np.minimum(0.0, before.loss - after.loss))


def relative_drop(before: np.ndarray, after: np.ndarray) -> float:
    """Share of what was there that is gone: 1 - mean(after) / mean(before).

    Args:
        before, after: [units], one number each for the same units.

    Raises:
        ValueError: nothing was there; different units; a value that is missing or not finite.
    """
    before, after = (np.asarray(values, dtype=np.float64) for values in (before, after))
    if before.shape != after.shape or not before.size:
        raise ValueError(f"before, after: must be of the same units, got {before.shape} and {after.shape}")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("before, after: a value is NaN or infinite; drop or repair these units first")
    if not before.mean() > 0:
        raise ValueError("before: the ability is absent (mean 0), so it has no relative drop")
    return float(1 - after.mean() / before.mean())


def table(
    points: Sequence[Point],
    before: Mapping[str, Marks],
    removed: str = "suppressed",
    graded: Collection[str] = (),
) -> pd.DataFrame:
    """One row for each point: share of weights, relative drop of one ability, losses of the others.

    Args:
        graded: abilities that are measured by :func:`kept`, not by exact answers.
    """
    rows = []
    for point in points:
        row = {"p": point.p, "q": point.q, "weights": len(point.mask), "share": point.mask.share}
        row["drop"] = relative_drop(*_pair(point, before, removed, graded))
        row["rise of loss"] = float(point.marks[removed].loss.mean() - before[removed].loss.mean())
        for name in point.marks:
            if name != removed:
                row[f"lost: {name}"] = _lost(point, before, name, graded)
        rows.append(row)
    return pd.DataFrame(rows)


def best(
    points: Sequence[Point],
    before: Mapping[str, Marks],
    *,
    removed: str = "suppressed",
    most_lost: float = 0.035,
    graded: Collection[str] = (),
) -> Point:
    """The point with the largest relative drop among those that cost every other ability at most so much.

    Among equals the one with the fewest weights. Where every point costs more, the cheapest one. Choose on
    other requests than those that are reported.

    Args:
        graded: abilities that are measured by :func:`kept`, not by exact answers.
    """

    if not points:
        raise ValueError("points is empty: sweep over at least one p and one q")

    def lost(point: Point) -> float:
        return max(_lost(point, before, name, graded) for name in point.marks if name != removed)

    fair = [point for point in points if lost(point) <= most_lost + 1e-9]
    if not fair:
        return min(points, key=lambda point: (lost(point), len(point.mask)))
    return min(fair, key=lambda point: (_pair(point, before, removed, graded)[1].mean(), len(point.mask)))


def _pair(
    point: Point, before: Mapping[str, Marks], name: str, graded: Collection[str]
) -> tuple[np.ndarray, np.ndarray]:
    """What there was of an ability, and what is left."""
    if name in graded:
        left = kept(before[name], point.marks[name])
        return np.ones_like(left), left
    return before[name].exact, point.marks[name].exact


def _lost(point: Point, before: Mapping[str, Marks], name: str, graded: Collection[str]) -> float:
    was, left = _pair(point, before, name, graded)
    return float(was.mean() - left.mean())
