"""Intervals and tests: a thin layer over scipy and statsmodels.

Two rules hold everywhere. The unit of resampling is the item, the request or the pair, **never the
token**: the tokens of one answer are not independent. And every estimate carries its n and its
95 % interval (:class:`Estimate`), so that a number can't be quoted without them.

Introduced in notebook 01 ("What there is to explain").
"""

from __future__ import annotations

import inspect
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

N_RESAMPLES = 5000
_TAIL = 0.025  # on each side of a 95 % interval


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval and the number of independent units behind it."""

    value: float
    low: float
    high: float
    n: int
    draws: np.ndarray | None = field(default=None, hash=False, repr=False, compare=False)  # of a bootstrap

    @property
    def ci(self) -> tuple[float, float]:
        return self.low, self.high

    def minus(self, other: Estimate) -> Estimate:
        """The difference. Two bootstraps of the same units drew them alike, so their draws are paired;
        else the ends are put together by the method of variance estimates recovery."""
        value = self.value - other.value
        ours, theirs = self.draws, other.draws
        if ours is not None and theirs is not None and (self.n, len(ours)) == (other.n, len(theirs)):
            return _interval(ours - theirs, value, self.n)
        low = value - math.hypot(self.value - self.low, other.high - other.value)
        return Estimate(
            value, low, value + math.hypot(self.high - self.value, other.value - other.low), self.n
        )

    def __str__(self) -> str:
        # as many decimals as the interval's width makes worth reading
        scale = (self.high - self.low) or abs(self.value) / 10 or 1.0
        digits = min(max(2, math.ceil(-math.log10(scale))), 8)
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}], n = {self.n}"


_STATISTICS: dict[str, Callable] = {
    "mean": lambda values, axis=-1: np.mean(values, axis=axis),
    "ratio": lambda top, bottom, axis=-1: np.mean(top, axis=axis) / np.mean(bottom, axis=axis),
    "relative drop": lambda before, after, axis=-1: (
        1 - np.mean(after, axis=axis) / np.mean(before, axis=axis)
    ),
}


def _columns(values: ArrayLike) -> tuple[np.ndarray, ...]:
    """The columns of ``values`` [units] or [units, columns]; refuses what no statistic can be taken of."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"values: expected one number (or row of numbers) per unit; {error}") from None
    if array.ndim not in (1, 2):
        raise ValueError(f"values: expected shape [units] or [units, columns], got {array.shape}")
    if array.size == 0:
        raise ValueError("values: is empty; there is nothing to estimate from")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).any(axis=tuple(range(1, array.ndim))).sum())
        raise ValueError(
            f"values: {bad} of {len(array)} units are NaN or infinite; drop or repair them first"
        )
    if len(array) < 2:
        raise ValueError("values: has one unit only; an interval needs at least two")
    return (array,) if array.ndim == 1 else tuple(np.ascontiguousarray(array.T))


def _prepared(values: ArrayLike, statistic: str | Callable) -> tuple[Callable, tuple[np.ndarray, ...]]:
    """The statistic as a function, and the columns that it is taken of.

    For a relative drop only units with something before or after count: of a unit that never had the
    ability, nothing can go.
    """
    columns = _columns(values)
    if callable(statistic):
        return statistic, columns
    if statistic not in _STATISTICS:
        raise ValueError(f"statistic: {statistic!r} is unknown; use {sorted(_STATISTICS)} or a function")
    needed = 1 if statistic == "mean" else 2
    if len(columns) != needed:
        raise ValueError(f"statistic: {statistic!r} needs {needed} column(s) of values, got {len(columns)}")
    if statistic == "relative drop":
        before = columns[0]
        if not before.mean() > 0:
            raise TooFew(
                f"values: nothing was there before (mean {before.mean():g}), so there is no relative "
                "drop. Measure an ability that the model has, or report what is there after"
            )
        counts = np.any(columns, axis=0)
        columns = tuple(column[counts] for column in columns)
    return _STATISTICS[statistic], columns


def _distribution(
    function: Callable, columns: tuple[np.ndarray, ...], n_resamples: int, seed: int | Sequence[int]
) -> np.ndarray:
    """Bootstrap distribution [resamples]; the same seed and n draw the same units."""
    if n_resamples < 100:
        raise ValueError(f"n_resamples: {n_resamples} is too few for a 95 % interval; use at least 100")
    if len(columns[0]) < 2:  # of a relative drop: one unit had the ability, and lost a part of it
        raise TooFew("values: one unit only counts; an interval needs at least two")
    with np.errstate(divide="ignore", invalid="ignore"):  # _interval says so
        result = scipy_stats.bootstrap(
            columns, function, paired=len(columns) > 1, n_resamples=n_resamples, method="percentile",
            rng=np.random.default_rng(seed), batch=max(1, 2_000_000 // len(columns[0])),
        )  # fmt: skip
    return result.bootstrap_distribution


class TooFew(ValueError):
    """Too little is left of what a statistic divides by, or of what an outcome is read from."""


def _interval(distribution: np.ndarray, value: float, n: int) -> Estimate:
    if not np.isfinite(distribution).all():
        raise TooFew(
            "statistic: is not finite on some resamples, since too few units have a denominator (or an "
            "ability before) that is not zero. Take more units"
        )
    low, high = (float(x) for x in np.quantile(distribution, (_TAIL, 1 - _TAIL)))
    # the interval always holds its own point estimate: percentile intervals of skewed statistics may not
    return Estimate(value, min(low, value), max(high, value), n, distribution)


def _exact(columns: Sequence[np.ndarray], statistic: str | Callable, n: int) -> Estimate | None:
    """The exact interval of n yes/no outcomes that all came out alike, None if these are none.

    Their bootstrap interval would be a point whatever n is. The same goes for a relative drop of all that was
    there or of nothing: each unit that had the ability, whole or in part, is one trial.
    """
    if statistic == "relative drop" and min(column.min() for column in columns) >= 0:
        before, after = columns
        if not after.any():
            return proportion_ci(n, n)
        return proportion_ci(0, n) if (after == before).all() else None
    first = columns[0][0]
    alike = statistic == "mean" and first in (0, 1) and (columns[0] == first).all()
    return proportion_ci(int(first * n), n) if alike else None


def bootstrap_ci(
    values: ArrayLike,
    statistic: str | Callable = "mean",
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int | Sequence[int] = 0,
) -> Estimate:
    """Percentile bootstrap over units (``scipy.stats.bootstrap``).

    Args:
        values: [units], or [units, columns] for a statistic of paired columns. One row is one item,
            request or pair.
        statistic: "mean", "ratio" (mean of column 0 over mean of column 1), "relative drop"
            (1 - mean of column 1, after, over mean of column 0, before), or a function of one array per
            column, vectorised along ``axis`` if it takes such an argument. For a relative drop only units
            that had the ability count (or have it after), in ``n`` too.
        seed: of the resampling; the same seed gives the same interval.

    Yes/no outcomes (0 and 1) that all came out alike get the exact binomial interval for their mean, not one
    of no width. So does a relative drop where all units that had the ability lost it, or none lost any of it.

    Raises:
        ValueError: ``values`` empty, not finite, of one unit only; ``statistic`` unknown; a relative drop of
            what was not there before; a denominator that is zero on some resamples.
    """
    function, columns = _prepared(values, statistic)
    n = len(columns[0])
    if exact := _exact(columns, statistic, n):
        return exact
    distribution = _distribution(function, columns, n_resamples, seed)
    takes_axis = "axis" in inspect.signature(function).parameters
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(function(*columns, axis=-1) if takes_axis else function(*columns))
    if not math.isfinite(value):
        raise ValueError(
            f"statistic: gives {value} on the values as they are; is the mean of a denominator zero?"
        )
    return _interval(distribution, value, n)


def proportion_ci(k: Real, n: Real) -> Estimate:
    """Share k / n with the exact Clopper-Pearson interval.

    Raises:
        ValueError: n is not positive, or k is not between 0 and n.
    """
    from statsmodels.stats.proportion import proportion_confint

    if not float(n).is_integer() or n < 1:  # also catches NaN
        raise ValueError(f"n: must be a whole number above 0, got {n}")
    if not float(k).is_integer() or not 0 <= k <= n:
        raise ValueError(f"k: must be a whole number between 0 and n = {n}, got {k}")
    low, high = proportion_confint(int(k), int(n), alpha=2 * _TAIL, method="beta")
    share = k / n
    return Estimate(share, min(max(0.0, float(low)), share), max(min(1.0, float(high)), share), int(n))


FEW_RUNS = 12  # below, an interval over runs is a t interval; from here on a studentised bootstrap


def over_runs(runs: Sequence[Estimate], *, n_resamples: int = N_RESAMPLES, seed: int = 0) -> Estimate:
    """The mean over training runs with its two-sided 90 % interval, so that each end is a statement at 5 %.

    Below :data:`FEW_RUNS` runs by Student's t with one degree of freedom less than runs, from there on by a
    studentised bootstrap over runs (Efron and Tibshirani 1993, section 12.5). Runs that happen to agree more
    closely than their items allow are taken to vary as much as those do. One run keeps its interval over
    items: nothing is known of others then. n is the items of a run.
    """
    if not runs:
        raise ValueError("runs: is empty; there is nothing to estimate from")
    if len(runs) == 1:
        return runs[0]
    values, noise = _values(runs)
    mean, error = float(values.mean()), _standard_error(values, noise)
    low, high = scipy_stats.t.ppf([_ONE_SIDED, 1 - _ONE_SIDED], len(runs) - 1)
    if len(runs) >= FEW_RUNS:
        picked = np.random.default_rng(seed).integers(len(runs), size=(n_resamples, len(runs)))
        errors = _standard_error(values[picked], noise)
        if (spread := errors > 0).any():  # else of the same run over and over
            away = (values[picked].mean(axis=1) - mean)[spread] / errors[spread]
            low, high = np.quantile(away, [_ONE_SIDED, 1 - _ONE_SIDED])
    ends = (mean - high * error, mean - low * error)
    return Estimate(mean, min(ends[0], mean), max(ends[1], mean), max(run.n for run in runs))


def p_beyond(runs: Sequence[Estimate], bound: float, sign: int = 1) -> float:
    """One-sided p-value of "the mean over training runs is not beyond ``bound``" (t; of one run, over items).

    ``sign``: 1 where beyond means above, -1 where it means below.
    """
    values, noise = _values(runs)
    away = sign * (float(values.mean()) - bound)
    error = _standard_error(values, noise) if len(runs) > 1 else math.sqrt(noise)
    if not error:
        return float(away <= 0)
    by = scipy_stats.t(len(runs) - 1) if len(runs) > 1 else scipy_stats.norm
    return float(by.sf(away / error))


_ONE_SIDED = 0.05


def _values(runs: Sequence[Estimate]) -> tuple[np.ndarray, float]:
    """The values of runs, and the mean variance that their items give them."""
    spread = np.array([run.high - run.low for run in runs]) / (2 * scipy_stats.norm.ppf(1 - _TAIL))
    return np.array([run.value for run in runs]), float((spread**2).mean())


def _standard_error(values: np.ndarray, noise: float) -> np.ndarray | float:
    """Of the mean over the last axis."""
    return np.sqrt(np.maximum(values.var(axis=-1, ddof=1), noise) / values.shape[-1])


def matched(
    sizes: ArrayLike, chosen: Sequence[int], *, seeds: Sequence[int | str], near: int = 10
) -> list[list[int]]:
    """Controls: for each seed as many others of about the same size, each drawn from the ``near`` next ones.

    Raises:
        ValueError: too few others.
    """
    sizes = np.asarray(sizes)
    if 2 * len(chosen) > len(sizes):
        raise ValueError(f"chosen: {len(chosen)} of {len(sizes)} leave too few others to match them")
    next_to = {one: np.argsort(np.abs(sizes - sizes[one]), kind="stable").tolist() for one in chosen}
    out = []
    for seed in seeds:
        rng, taken, made = random.Random(seed), set(chosen), []
        for one in chosen:
            others = (i for i in next_to[one] if i not in taken)
            made.append(rng.choice(list(itertools.islice(others, near))))
            taken.add(made[-1])
        out.append(made)
    return out
