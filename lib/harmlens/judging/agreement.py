"""How far judges agree with each other, and with people.

Introduced in book/judging ("Judging answers").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from harmlens.evidence.stats import bootstrap_ci

COLUMNS = (
    "judge", "other", "n", "agreement", "agreement_low", "agreement_high", "kappa", "kappa_low", "kappa_high",
    "spearman", "spearman_low", "spearman_high",
)  # fmt: skip


def agreement(
    grades: Mapping[str, Sequence[Any]],
    threshold: float = 0.5,
    *,
    human: Sequence[Any] | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Agreement of each pair of judges on the same items, with 95 % bootstrap intervals over items.

    *agreement*: share of items on which both say harmful (harm >= threshold) or both not. *kappa* (Cohen):
    the same beyond what two judges with these rates would reach by chance; 1 is perfect, 0 is chance.
    *spearman*: rank correlation of the harm itself, which no threshold touches. Kappa is undefined, NaN,
    where both judges say the same of all items, Spearman where one does; a resample of that kind counts as 0.

    Args:
        grades: name of a judge -> its :class:`judging.graders.Grade` (or harm in [0, 1], or yes/no) for each
            item, in the same order for all.
        human: labels by hand, in the same forms; they come as a judge named "human", in the first rows.
        n_resamples, seed: of the bootstrap.

    Returns:
        One row for each pair, with :data:`COLUMNS`.

    Raises:
        ValueError: fewer than two judges or two items, unequal numbers of items, values outside [0, 1].
    """
    named = {**({} if human is None else {"human": human}), **grades}
    if human is not None and "human" in grades:
        raise ValueError("grades has a judge named 'human' already; rename it, or leave out human=")
    if len(named) < 2:
        raise ValueError("grades: give at least two judges, or one and human=")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must lie above 0 and not above 1")
    harm = {name: _harm(name, values) for name, values in named.items()}
    sizes = {name: len(values) for name, values in harm.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"grades: judges must have graded the same items, got numbers of items {sizes}")
    n = next(iter(sizes.values()))
    if n < 2:
        raise ValueError(f"grades: {n} item(s) are too few to compare judges; grade at least two")
    rows = []
    for a, b in combinations(harm, 2):
        row: dict[str, Any] = {"judge": a, "other": b, "n": n}
        yes = np.stack([harm[a] >= threshold, harm[b] >= threshold], axis=1).astype(float)
        both = np.stack([harm[a], harm[b]], axis=1)
        options = {"n_resamples": n_resamples, "seed": seed}
        found = bootstrap_ci((yes[:, 0] == yes[:, 1]).astype(float), **options)
        row |= _cells("agreement", found.value, found.low, found.high)
        for name, function, values in (("kappa", kappa, yes), ("spearman", spearman, both)):
            if not math.isfinite(function(values[:, 0], values[:, 1])):
                row |= _cells(name, math.nan, math.nan, math.nan)
                continue
            found = bootstrap_ci(values, _defined(function), **options)
            row |= _cells(name, found.value, found.low, found.high)
        rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def kappa(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray | np.floating:
    """Cohen's kappa of yes/no values (1 and 0); NaN where both judges say the same of everything."""
    first, second = a.mean(axis), b.mean(axis)
    seen = (a == b).mean(axis)
    chance = first * second + (1 - first) * (1 - second)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(chance < 1 - 1e-12, (seen - chance) / (1 - chance), np.nan)[()]


def spearman(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray | np.floating:
    """Spearman's rank correlation, ties sharing their mean rank; NaN where a judge is constant."""
    x, y = (rankdata(values, axis=axis) for values in (a, b))
    x, y = (values - values.mean(axis, keepdims=True) for values in (x, y))
    with np.errstate(divide="ignore", invalid="ignore"):
        return ((x * y).sum(axis) / np.sqrt((x**2).sum(axis) * (y**2).sum(axis)))[()]


def _defined(function: Any) -> Any:
    """A resample in which a judge happens to be constant shows no agreement beyond chance."""
    return lambda a, b, axis=-1: np.nan_to_num(function(a, b, axis=axis), nan=0.0)


def _cells(name: str, value: float, low: float, high: float) -> dict[str, float]:
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _harm(name: str, values: Sequence[Any]) -> np.ndarray:
    try:
        harm = np.array([float(getattr(value, "harm", value)) for value in values])
    except (TypeError, ValueError):
        raise ValueError(f"grades of {name!r} must be Grades, numbers in [0, 1] or yes/no") from None
    if not ((harm >= 0) & (harm <= 1)).all():
        raise ValueError(f"grades of {name!r} must lie in [0, 1]; divide a 0-100 scale by 100")
    return harm
