"""How far judges agree with each other, and with people.

Introduced in book/judging ("Judging answers").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from harmlens.evidence.stats import bootstrap_ci

YES = 0.5  # harm from which on a judge says harmful


def agreement(grades: Mapping[str, Sequence[Any]], *, n_resamples: int = 2000) -> pd.DataFrame:
    """Agreement of each pair of judges on the same items, with 95 % bootstrap intervals over items.

    *agreement*: share of items on which both say harmful (harm >= 0.5) or both not. *kappa* (Cohen):
    the same beyond what two judges with these rates would reach by chance; 1 is perfect, 0 is chance.
    *spearman*: rank correlation of the harm itself, which no threshold touches. Kappa is undefined, NaN,
    where both judges say the same of all items, Spearman where one does; a resample of that kind counts as 0.

    ``grades`` maps the name of a judge, or of a person who labels by hand, to its
    :class:`judging.graders.Grade` (or harm in [0, 1], or yes/no) for each item, in the same order for all.
    Each pair has a row: ``judge``, ``other``, ``n``, and each of the three with ``_low`` and ``_high``.
    """
    if len(grades) < 2:
        raise ValueError("grades: give at least two judges, or one and labels by hand")
    harm = {name: _harm(name, values) for name, values in grades.items()}
    sizes = {name: len(values) for name, values in harm.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"grades: judges must have graded the same items, got numbers of items {sizes}")
    n = min(sizes.values())
    if n < 2:
        raise ValueError(f"grades: {n} item(s) are too few to compare judges; grade at least two")
    rows = []
    for a, b in combinations(harm, 2):
        both = np.stack([harm[a], harm[b]], axis=1)
        yes = (both >= YES).astype(float)
        equal = (yes[:, 0] == yes[:, 1]).astype(float)
        rows.append({"judge": a, "other": b, "n": n})
        compared = {"agreement": (equal, "mean"), "kappa": (yes, kappa), "spearman": (both, spearman)}
        for name, (values, statistic) in compared.items():
            interval = (math.nan,) * 3
            if statistic == "mean" or math.isfinite(statistic(values[:, 0], values[:, 1])):
                resampled = statistic if statistic == "mean" else partial(_or_none, statistic)
                found = bootstrap_ci(values, resampled, n_resamples=n_resamples)
                interval = found.value, found.low, found.high
            rows[-1] |= dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))
    return pd.DataFrame(rows)


@np.errstate(divide="ignore", invalid="ignore")
def kappa(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray | np.floating:
    """Cohen's kappa of yes/no values (1 and 0); NaN where both judges say the same of everything.

    Of many resamples at once, which scikit-learn's does not take.
    """
    first, second = a.mean(axis), b.mean(axis)
    chance = first * second + (1 - first) * (1 - second)
    return np.where(chance < 1 - 1e-12, ((a == b).mean(axis) - chance) / (1 - chance), np.nan)[()]


@np.errstate(divide="ignore", invalid="ignore")
def spearman(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray | np.floating:
    """Spearman's rank correlation, ties sharing their mean rank; NaN where a judge is constant."""
    x, y = (rankdata(values, axis=axis) for values in (a, b))
    x, y = (values - values.mean(axis, keepdims=True) for values in (x, y))
    return ((x * y).sum(axis) / np.sqrt((x**2).sum(axis) * (y**2).sum(axis)))[()]


def _or_none(statistic: Callable, a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    """A resample in which a judge happens to be constant shows no agreement beyond chance."""
    return np.nan_to_num(statistic(a, b, axis), nan=0.0)


def _harm(name: str, values: Sequence[Any]) -> np.ndarray:
    try:
        harm = np.array([float(getattr(value, "harm", value)) for value in values])
    except (TypeError, ValueError):
        raise ValueError(f"grades of {name!r} must be Grades, numbers in [0, 1] or yes/no") from None
    if not ((harm >= 0) & (harm <= 1)).all():
        raise ValueError(f"grades of {name!r} must lie in [0, 1]; divide a 0-100 scale by 100")
    return harm
