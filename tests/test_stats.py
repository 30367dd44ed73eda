"""Intervals and tests: hand-worked cases, properties, coverage, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from harmlens.evidence import stats

finite = st.floats(-1e3, 1e3, allow_nan=False)
FAST = {"n_resamples": 200}


def test_estimate_reads_as_in_the_book():
    assert str(stats.Estimate(0.97, 0.94, 0.99, 108)) == "0.97 [0.94, 0.99], n = 108"
    assert str(stats.Estimate(0.0012, 0.0011, 0.0014, 9)) == "0.0012 [0.0011, 0.0014], n = 9"
    assert str(stats.Estimate(1.0, 1.0, 1.0, 3)) == "1.00 [1.00, 1.00], n = 3"


# ------------------------------------------------------------------ one sample


@settings(max_examples=25, deadline=None)
@given(st.lists(finite, min_size=2, max_size=30))
def test_interval_holds_its_value_and_lies_within_the_data(values):
    got = stats.bootstrap_ci(values, **FAST)
    assert got.n == len(values)
    assert got.low <= got.value <= got.high
    if not set(values) <= {0.0, 1.0}:
        slack = 1e-9 * max(map(abs, [1.0, *values]))
        assert min(values) - slack <= got.low and got.high <= max(values) + slack


def test_interval_agrees_with_the_normal_one_on_many_normal_values():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    got = stats.bootstrap_ci(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(2000)
    assert got.value == pytest.approx(values.mean())
    assert got.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert got.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_same_seed_same_interval_other_seed_other_interval():
    values = np.random.default_rng(1).normal(size=40)
    assert stats.bootstrap_ci(values, seed=3) == stats.bootstrap_ci(values, seed=3)
    assert stats.bootstrap_ci(values, seed=3) != stats.bootstrap_ci(values, seed=4)


def test_equal_values_give_a_point_but_equal_outcomes_do_not():
    point = stats.bootstrap_ci([2.5] * 8)
    assert point.ci == (2.5, 2.5)
    all_right = stats.bootstrap_ci([1] * 20)
    assert all_right == stats.proportion_ci(20, 20)
    assert all_right.low < 0.9 and all_right.high == 1.0


def test_a_function_of_columns_as_statistic():
    rows = [[1.0, 2.0], [3.0, 5.0], [5.0, 2.0], [2.0, 4.0]]
    slow = stats.bootstrap_ci(rows, lambda a, b: float(np.mean(a) - np.mean(b)), **FAST)
    fast = stats.bootstrap_ci(rows, lambda a, b, axis: np.mean(a, axis=axis) - np.mean(b, axis=axis), **FAST)
    assert slow.value == pytest.approx(11 / 4 - 13 / 4)
    assert slow.ci == pytest.approx(fast.ci)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "values: is empty"),
        ([1.0], "values: has one unit only"),
        ([1.0, math.nan, math.inf, 2.0], "values: 2 of 4 units are NaN"),
        (np.ones((2, 2, 2)), r"values: expected shape \[units\]"),
        ([1.0, "many"], "values: expected one number"),
    ],
)
def test_bad_values_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        stats.bootstrap_ci(values)


def test_bad_options_are_refused_by_name():
    with pytest.raises(ValueError, match="statistic: 'mode' is unknown"):
        stats.bootstrap_ci([1, 2], "mode")
    with pytest.raises(ValueError, match=r"statistic: 'ratio' needs 2 column"):
        stats.bootstrap_ci([1.0, 2.0], "ratio")
    with pytest.raises(ValueError, match="n_resamples"):
        stats.bootstrap_ci([1.0, 2.0], n_resamples=1)


# ------------------------------------------------------------------ ratio of means, shares


def test_ratio_of_means_is_not_the_mean_of_ratios():
    got = stats.bootstrap_ci([[1.0, 1.0], [3.0, 1.5]], "ratio")
    assert got.value == pytest.approx(4.0 / 2.5)
    assert got.n == 2


def test_ratio_resamples_pairs_together():
    bottom = np.random.default_rng(2).uniform(1, 9, size=30)
    got = stats.bootstrap_ci(np.stack([0.4 * bottom, bottom], axis=1), "ratio")
    assert got.ci == pytest.approx((0.4, 0.4))  # exact only if numerator and denominator stay paired


def test_proportion_matches_scipy_and_knows_the_ends():
    expected = scipy_stats.binomtest(7, 20).proportion_ci(method="exact")
    assert stats.proportion_ci(7, 20).ci == pytest.approx((expected.low, expected.high))
    assert stats.proportion_ci(0, 6).ci == pytest.approx((0.0, 0.4593), abs=1e-4)
    assert stats.proportion_ci(6, 6).ci == pytest.approx((0.5407, 1.0), abs=1e-4)


@pytest.mark.parametrize(("k", "n", "name"), [(1, 0, "n:"), (5, 4, "k:"), (-1, 4, "k:"), (1.5, 4, "k:")])
def test_bad_counts_are_refused(k, n, name):
    with pytest.raises(ValueError, match=name):
        stats.proportion_ci(k, n)


# ------------------------------------------------------------------ what never varies, coverage


def test_outcomes_that_never_vary_keep_an_honest_interval():
    assert stats.bootstrap_ci([1] * 60).ci == stats.proportion_ci(60, 60).ci
    assert stats.bootstrap_ci([0] * 60).ci == stats.proportion_ci(0, 60).ci


def test_coverage_on_simulated_data():
    """Loose on purpose: the nominal 95 % must neither be missed widely nor be met by a useless interval."""
    rng, hits, widths, runs = np.random.default_rng(7), 0, [], 120
    for run in range(runs):
        got = stats.bootstrap_ci(rng.normal(1.0, 1.0, size=60), n_resamples=400, seed=run)
        hits += got.low <= 1.0 <= got.high
        widths.append(got.high - got.low)
    assert hits / runs >= 0.88
    assert np.mean(widths) < 1.3 * 2 * 1.96 / math.sqrt(60)


# ------------------------------------------------------------------ differences, recorded runs


def test_a_difference_is_by_hand_where_nothing_is_shared():
    one, other = stats.Estimate(0.6, 0.5, 0.8, 9), stats.Estimate(0.2, 0.1, 0.5, 9)
    got = one.minus(other)
    assert (got.value, got.n) == (pytest.approx(0.4), 9)
    assert got.ci == pytest.approx((0.4 - math.hypot(0.1, 0.3), 0.4 + math.hypot(0.2, 0.1)))


def test_a_difference_on_the_same_units_is_paired():
    rng = np.random.default_rng(8)
    hard = rng.normal(size=80)  # items differ much, and alike in both
    one, other = hard + 1 + rng.normal(0, 0.1, 80), hard + rng.normal(0, 0.1, 80)
    paired = stats.bootstrap_ci(one).minus(stats.bootstrap_ci(other))
    direct = stats.bootstrap_ci(one - other)
    assert paired.value == pytest.approx(direct.value) and paired.ci == pytest.approx(direct.ci)
    unpaired = stats.bootstrap_ci(one).minus(stats.bootstrap_ci(other[:79]))
    assert paired.high - paired.low < 0.3 * (unpaired.high - unpaired.low)


def exact(*values, half=0.0):
    return [stats.Estimate(value, value - half, value + half, 5) for value in values]


def test_few_runs_have_a_t_interval_by_hand():
    """0.1, 0.3, 0.8: mean 0.4, variance 0.13, t of 2 degrees of freedom at 95 % 2.920."""
    got = stats.over_runs(exact(0.1, 0.3, 0.8))
    half = 2.920 * math.sqrt(0.13 / 3)
    assert (got.value, got.n) == (pytest.approx(0.4), 5)
    assert got.ci == pytest.approx((0.4 - half, 0.4 + half), abs=1e-3)
    assert stats.over_runs([(one := exact(0.1)[0])]) is one
    with pytest.raises(ValueError, match="runs: is empty"):
        stats.over_runs([])


def test_runs_that_agree_more_closely_than_their_items_allow():
    """Items alone give each run a standard error of half / 1.96; runs vary at least as much."""
    assert stats.over_runs(exact(0.4, 0.4, 0.4)).ci == pytest.approx((0.4, 0.4))
    half = 2.920 * (0.196 / 1.96) / math.sqrt(3)
    for values in ((0.4, 0.4, 0.4), (0.39, 0.4, 0.41)):
        assert stats.over_runs(exact(*values, half=0.196)).ci == pytest.approx(
            (0.4 - half, 0.4 + half), abs=1e-3
        )


@settings(max_examples=25, deadline=None)
@given(st.lists(finite, min_size=2, max_size=14), st.floats(0, 10), finite)
def test_the_interval_over_runs_holds_its_value_widens_and_moves_along(values, half, shift):
    got, moved, sharp = (
        stats.over_runs(exact(*(v + by for v in values), half=wide), n_resamples=400)
        for by, wide in ((0, half), (shift, half), (0, 0.0))
    )
    assert got.low <= got.value <= got.high and got.value == pytest.approx(np.mean(values), abs=1e-9)
    assert moved.ci == pytest.approx((got.low + shift, got.high + shift), abs=1e-6)
    if len(values) < stats.FEW_RUNS:  # intervals over items can't make runs more certain
        assert got.high - got.low >= (sharp.high - sharp.low) * (1 - 1e-9)
        assert got.high - got.value == pytest.approx(got.value - got.low, abs=1e-6)


@pytest.mark.parametrize(("runs", "draw"), [(3, "normal"), (14, "normal"), (14, "exponential")])
def test_intervals_over_runs_cover_as_often_as_they_say(runs, draw):
    """Two-sided 90 %: a range of three runs, as of old, held the mean in 75 %."""
    rng, hits, tries = np.random.default_rng(3), 0, 300
    truth = {"normal": 0.0, "exponential": 1.0}[draw]
    for n in range(tries):
        got = stats.over_runs(exact(*getattr(rng, draw)(size=runs)), n_resamples=400, seed=n)
        hits += got.low <= truth <= got.high
    assert 0.85 <= hits / tries <= 0.95


def test_many_runs_have_a_studentised_bootstrap():
    """It is wider on the side of the long tail; and it can't trip over a run that is drawn twelve times."""
    skewed = exact(*np.random.default_rng(1).exponential(size=20))
    got, t = stats.over_runs(skewed), stats.over_runs(skewed[:11])
    assert got.high - got.value > got.value - got.low
    assert t.high - t.value == pytest.approx(t.value - t.low)
    assert stats.over_runs(skewed, seed=1) == stats.over_runs(skewed, seed=1) != got
    one_stands_out = stats.over_runs(exact(*[0.0] * 11, 1.0))
    assert np.isfinite(one_stands_out.ci).all() and one_stands_out.low < one_stands_out.high
    assert stats.over_runs(exact(*[0.4] * 12)).ci == pytest.approx((0.4, 0.4))


def test_p_values_over_runs():
    values = [0.1, 0.3, 0.8]
    by_hand = scipy_stats.ttest_1samp(values, 0.05, alternative="greater").pvalue
    assert stats.p_beyond(exact(*values), 0.05) == pytest.approx(by_hand)
    assert stats.p_beyond(exact(*values), 0.05, -1) == pytest.approx(1 - by_hand)
    mirrored = stats.p_beyond(exact(*(-v for v in values)), -0.05, -1)
    assert mirrored == pytest.approx(by_hand)
    ends = stats.over_runs(exact(*values)).ci  # each end is a statement at 5 %
    for end, sign in zip(ends, (1, -1), strict=True):
        assert stats.p_beyond(exact(*values), end, sign) == pytest.approx(0.05)
    assert stats.p_beyond(exact(0.5, half=0.196), 0.5 - 0.1645) == pytest.approx(0.05, abs=1e-3)  # over items
    assert [stats.p_beyond(exact(0.5, 0.5), bound) for bound in (0.4, 0.5, 0.6)] == [0.0, 1.0, 1.0]


# ------------------------------------------------------------------ controls


def test_matched_controls_are_others_of_about_the_same_size():
    sizes, chosen = np.random.default_rng(0).random(64), [3, 9, 40]
    draws = stats.matched(sizes, chosen, seeds=range(20), near=4)
    assert draws[7:] == stats.matched(sizes, chosen, seeds=range(7, 20), near=4)
    order = sizes.argsort().tolist()
    for made in draws:
        assert len(set(made)) == 3 and not set(made) & set(chosen)
        assert all(abs(order.index(a) - order.index(b)) <= 12 for a, b in zip(made, chosen, strict=True))
    assert len({tuple(made) for made in draws}) > 5
    with pytest.raises(ValueError, match="leave too few others"):
        stats.matched(sizes, range(40), seeds=[0])
