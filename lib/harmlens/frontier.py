"""The p-q frontier: how much of one ability can be removed at what price for the others.

For each pair (p, q) weights are selected, taken out, and the model is asked again. Scores are computed once;
a point costs a selection and a few forward passes.

Introduced in notebook 09 ("Weights that carry harm").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harmlens import pruning, tasks
from harmlens.masks import Mask
from harmlens.models import LanguageModel
from harmlens.scores import Scores
from harmlens.tasks import Marks, Task

# Shares for the organism, whose matrices hold ten to twenty-five thousand weights; large models need shares a
# thousand times smaller (the paper's: p = 5e-5, q = 1e-5).
P = (0.0, 0.01, 0.03, 0.1)
Q = (0.0003, 0.001, 0.002, 0.005, 0.01)


@dataclass(frozen=True)
class Point:
    """One pair (p, q), the set it selects, and how the model does without it.

    Attributes:
        marks: task -> marks, as :func:`harmlens.tasks.sit` gives them.
    """

    p: float
    q: float
    mask: Mask
    marks: dict[str, Marks]


def sweep(
    lm: LanguageModel,
    prune: Scores,
    preserve: Scores,
    asked: Mapping[str, Task],
    *,
    ps: Sequence[float] = P,
    qs: Sequence[float] = Q,
    scope: str = "matrix",
) -> list[Point]:
    """The model without the selected weights, for each p and q."""
    points = []
    for p in ps:
        for q in qs:
            mask = pruning.select(prune, preserve, q=q, p=p, scope=scope, name=f"p={p:g}, q={q:g}")
            with pruning.pruned(lm, mask):
                points.append(Point(p, q, mask, {name: tasks.sit(lm, task) for name, task in asked.items()}))
    return points


def relative_drop(before: np.ndarray, after: np.ndarray) -> float:
    """Share of what was there that is gone: 1 - mean(after) / mean(before).

    Raises:
        ValueError: nothing was there.
    """
    if not before.mean() > 0:
        raise ValueError("before: the ability is absent (mean 0), so it has no relative drop")
    return float(1 - after.mean() / before.mean())


def table(points: Sequence[Point], before: Mapping[str, Marks], removed: str = "suppressed") -> pd.DataFrame:
    """One row for each point: share of weights, relative drop of one ability, losses of the others."""
    rows = []
    for point in points:
        row = {"p": point.p, "q": point.q, "weights": len(point.mask), "share": point.mask.share}
        row["drop"] = relative_drop(before[removed].exact, point.marks[removed].exact)
        row["rise of loss"] = float(point.marks[removed].loss.mean() - before[removed].loss.mean())
        for name in point.marks:
            if name != removed:
                row[f"lost: {name}"] = float(before[name].exact.mean() - point.marks[name].exact.mean())
        rows.append(row)
    return pd.DataFrame(rows)


def best(
    points: Sequence[Point],
    before: Mapping[str, Marks],
    *,
    removed: str = "suppressed",
    most_lost: float = 0.035,
) -> Point:
    """The point with the largest relative drop among those that cost every other ability at most so much.

    Among equals the one with the fewest weights. Where every point costs more, the cheapest one. Choose on
    other requests than those that are reported.
    """

    if not points:
        raise ValueError("points is empty: sweep over at least one p and one q")

    def lost(point: Point) -> float:
        return max(
            float(before[name].exact.mean() - marks.exact.mean())
            for name, marks in point.marks.items()
            if name != removed
        )

    fair = [point for point in points if lost(point) <= most_lost + 1e-9]
    if not fair:
        return min(points, key=lambda point: (lost(point), len(point.mask)))
    return min(fair, key=lambda point: (point.marks[removed].exact.mean(), len(point.mask)))
