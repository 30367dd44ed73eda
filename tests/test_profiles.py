"""Statistics of a profile over layers: hand-worked cases, properties, and how they read a sweep."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harmlens.evidence import stats
from harmlens.flow import profiles
from harmlens.flow.patching import Sweep

PAIRS = ("a", "b", "c", "d")


def made(
    effects, total=(1.0, 1.0, 1.0, 1.0), *, size=1.0, positions=("last",), direction="denoising", pairs=PAIRS
):
    """A sweep with given effects [site, layer, position, pair] of ``mlp_out`` (and ``attn_out``)."""
    effects = torch.as_tensor(effects, dtype=torch.float32)
    y0, y1 = torch.zeros(len(pairs)), torch.tensor(total, dtype=torch.float32)
    patched = y0 + effects if direction == "denoising" else y1 - effects
    return Sweep(
        ("mlp_out", "attn_out")[: len(effects)], tuple(range(effects.shape[1])), positions, tuple(pairs),
        direction, y1, y0, patched, torch.full_like(effects, size),
    )  # fmt: skip


def flat(*layers):
    """One array of identical units for each layer."""
    return [np.full(3, float(value)) for value in layers]


# ------------------------------------------------------------------ depth


@given(st.integers(1, 100))
def test_each_layer_is_shared_out_whole_and_thirds_are_equal(depth):
    weights = profiles.thirds(depth)
    assert weights.shape == (3, depth) and (weights >= 0).all()
    assert np.allclose(weights.sum(0), 1)
    assert np.allclose(weights.sum(1), depth / 3)


def test_thirds_of_eight_layers():
    expected = [[1, 1, 2 / 3, 0, 0, 0, 0, 0], [0, 0, 1 / 3, 1, 1, 1 / 3, 0, 0], [0, 0, 0, 0, 0, 2 / 3, 1, 1]]
    assert np.allclose(profiles.thirds(8), expected)


@given(st.integers(3, 100))
def test_last_of_the_first_third_is_the_last_one_wholly_in_it(depth):
    layer = profiles.last_of_first_third(depth)
    inside = profiles.thirds(depth)[0]
    assert inside[layer] == pytest.approx(1)
    assert inside[layer + 1] < 1 - 1e-6


@pytest.mark.parametrize("depth", [1, 2])
def test_shallow_models_end_their_first_third_with_the_first_layer(depth):
    assert profiles.last_of_first_third(depth) == 0


def test_shares_of_thirds_by_hand():
    assert np.allclose(profiles.third_shares(*flat(1, 2, -1)), [0.25, 0.5, 0.25])
    # The middle layer of two lies half in the first and half in the last third, plus the middle one.
    assert np.allclose(profiles.third_shares(*flat(1, 1)), [1 / 3, 1 / 3, 1 / 3])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5).filter(lambda x: abs(x) > 1e-3), min_size=2, max_size=12), st.floats(0.1, 9))
def test_shares_add_up_and_ignore_scale_and_sign(effects, factor):
    shares = profiles.third_shares(*flat(*effects))
    assert shares.sum() == pytest.approx(1)
    assert np.allclose(shares, profiles.third_shares(*flat(*(-factor * e for e in effects))))
    surplus = profiles.late_surplus(*flat(*effects))
    assert -1 - 1e-9 <= surplus <= 1 + 1e-9
    assert surplus == pytest.approx(shares[2] - max(shares[0], shares[1]))


@pytest.mark.parametrize(
    ("effects", "surplus"), [((0, 0, 3), 1), ((3, 0, 0), -1), ((0, 3, 0), -1), ((1, 1, 1), 0)]
)
def test_late_surplus_of_one_layer_alone(effects, surplus):
    assert profiles.late_surplus(*flat(*effects)) == pytest.approx(surplus)


def test_centre_by_hand():
    assert profiles.centre(*flat(1, 0, 0)) == 0
    assert profiles.centre(*flat(0, 0, -2)) == 1
    assert profiles.centre(*flat(1, 0, 3)) == pytest.approx(0.75)


def test_centre_shift_is_first_series_minus_second():
    assert profiles.centre_shift(*flat(0, 1), *flat(1, 0)) == 1
    assert profiles.centre_shift(*flat(1, 0, 1), *flat(1, 0, 3)) == pytest.approx(-0.25)


def test_units_are_averaged_before_absolute_values():
    """Noise of single pairs that cancels is no effect."""
    layers = [np.array([5.0, -5.0]), np.array([1.0, 1.0])]
    assert profiles.centre(*layers) == 1
    assert profiles.mlp_surplus(*layers) == -1


# ------------------------------------------------------------------ modules


def test_mlp_surplus_by_hand():
    assert profiles.mlp_surplus(*flat(3, 0), *flat(0, 1)) == pytest.approx(0.5)
    assert profiles.mlp_surplus(*flat(1, -1), *flat(2, 0)) == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 5), st.floats(-5, 5)), min_size=1, max_size=8))
def test_mlp_surplus_turns_its_sign_when_the_modules_change_places(pairs):
    mlp, attention = zip(*pairs, strict=True)
    one = profiles.mlp_surplus(*flat(*mlp), *flat(*attention))
    assert -1 <= one <= 1
    assert one == pytest.approx(-profiles.mlp_surplus(*flat(*attention), *flat(*mlp)))


def test_removed_surplus_by_hand():
    """Of an effect of 4, freezing one kind leaves 1 and the other 3: 3/4 removed against 1/4."""
    effect, frozen, other = (np.array(v) for v in ([3.0, 5.0], [0.0, 2.0], [3.0, 3.0]))
    assert profiles.removed_surplus(effect, frozen, other) == pytest.approx(0.5)
    assert profiles.removed_surplus(effect, other, frozen) == pytest.approx(-0.5)


STATISTICS = {
    "late_surplus": profiles.late_surplus, "mlp_surplus": profiles.mlp_surplus, "centre": profiles.centre,
    "centre_shift": profiles.centre_shift,
}  # fmt: skip


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_work_on_many_resamples_at_once(name):
    """over_seeds hands them [resample, unit]; each row must give what it gives alone."""
    layers = [np.random.default_rng(i).normal(1, 1, size=(5, 7)) for i in range(6)]
    together = STATISTICS[name](*layers, axis=-1)
    assert together.shape == (5,)
    assert np.allclose(together, [STATISTICS[name](*(layer[i] for layer in layers)) for i in range(5)])


def test_interval_of_a_statistic_over_seeds():
    values = {s: np.random.default_rng(s).normal([3, 0, 1, 0], 0.1, size=(20, 4)) for s in (0, 1)}
    got = stats.over_seeds(values, profiles.mlp_surplus, shared_units=True, n_resamples=200)
    assert set(got.per_seed) == {0, 1} and got.n == 20
    assert 0.3 < got.low <= got.value <= got.high < 0.6  # (3 - 1) / (3 + 1), give or take


# ------------------------------------------------------------------ from sweeps to columns


def test_strong_keeps_what_has_a_total_effect_in_every_seed():
    effects = np.ones((1, 2, 1, 4))
    sweeps = {0: made(effects, (1.0, 0.0, 1.0, 1.0)), 1: made(effects, (1.0, 1.0, 0.01, 1.0))}
    assert profiles.strong(sweeps) == ["a", "d"]
    assert profiles.strong(sweeps, floor=0.001) == ["a", "c", "d"]


def test_strong_refuses_seeds_on_different_pairs_and_pairs_without_effect():
    effects = np.ones((1, 1, 1, 4))
    with pytest.raises(ValueError, match="same pairs"):
        profiles.strong({0: made(effects), 1: made(effects, pairs=("a", "b", "d", "c"))})
    with pytest.raises(ValueError, match="none of 4 pairs"):
        profiles.strong({0: made(effects, (1, 1, 0, 0)), 1: made(effects, (0, 0, 1, 1))}, floor=0.5)


def test_columns_are_layers_of_each_series_in_order_and_rows_the_kept_pairs():
    effects = np.arange(2 * 3 * 2 * 4).reshape(2, 3, 2, 4)
    sweep = made(effects, positions=("changed", "last"))
    got = profiles.columns(sweep, ["c", "a"], ("attn_out", "last"), ("mlp_out", "changed"))
    expected = [
        [*effects[1, :, 1, pair], *effects[0, :, 0, pair]]  # by hand: site, layer, position, pair
        for pair in (2, 0)
    ]
    assert got.tolist() == expected and got.dtype == np.float64


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_columns_hold_effects_of_either_direction(direction):
    sweep = made(np.full((1, 2, 1, 4), 0.25), direction=direction)
    assert np.allclose(profiles.columns(sweep, list(PAIRS), ("mlp_out", None)), 0.25)


def test_effect_per_size_divides_by_each_patchs_own_norm():
    sweep = made(np.full((2, 1, 2, 4), 6.0), positions=("changed", "last"))
    sweep.size[1, 0, 1] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    sweep.patched[1, 0, 1, 3] = 0.0  # nothing was changed, so nothing followed
    got = profiles.columns(sweep, list(PAIRS), ("attn_out", "last"), what="effect per size")
    assert got[:, 0].tolist() == [6.0, 3.0, 2.0, 0.0]


def test_columns_refuse_what_was_not_swept():
    sweep = made(np.ones((1, 2, 2, 4)), positions=("changed", "last"))
    with pytest.raises(ValueError, match="effect per size"):
        profiles.columns(sweep, ["a"], ("mlp_out", "last"), what="effect per norm")
    with pytest.raises(ValueError, match="was not swept"):
        profiles.columns(sweep, ["a"], ("attn_out", "last"))
    with pytest.raises(ValueError, match="choose one of changed, last"):
        profiles.columns(sweep, ["a"], ("mlp_out", None))


def test_curve_is_the_ratio_of_means_and_not_the_mean_of_ratios():
    effects = np.zeros((1, 2, 1, 4))
    effects[0, 1, 0] = [0.5, 0, 0, 0]  # half of a pair's total effect of 1
    sweeps = {s: made(effects, (1.0, 1.0, 1.0, 5.0)) for s in (0, 1)}
    first, second = profiles.curve(sweeps, list(PAIRS), "mlp_out", n_resamples=200)
    assert first.value == first.low == first.high == 0
    assert second.value == pytest.approx(0.5 / 8) and second.n == 4
    (_, kept) = profiles.curve(sweeps, ["a", "d"], "mlp_out", n_resamples=200)
    assert kept.value == pytest.approx(0.5 / 6)


def test_curve_averages_over_seeds():
    sweeps = {s: made(np.full((1, 1, 1, 4), share)) for s, share in enumerate((0.2, 0.6))}
    (got,) = profiles.curve(sweeps, list(PAIRS), "mlp_out", n_resamples=200)
    assert got.value == pytest.approx(0.4)
    assert [e.value for e in got.per_seed.values()] == pytest.approx([0.2, 0.6])


def test_totals_come_in_the_order_of_the_kept_pairs():
    sweep = made(np.ones((1, 1, 1, 4)), (1.0, 2.0, 3.0, 4.0))
    assert profiles.columns_of_total(sweep, ["d", "b"]).tolist() == [4.0, 2.0]


def test_removed_share_by_hand():
    effect = np.array([1.0, 3.0])  # mean 2: the pairs' own shares do not matter
    for left, share in (
        ([0.0, 0.0], 1.0),
        ([3.0, 1.0], 0.0),
        ([1.0, 0.0], 0.75),
        ([-1.0, -1.0], 1.5),
        ([4.0, 2.0], -0.5),
    ):
        assert profiles.removed(effect, np.array(left)) == pytest.approx(share)
    rows = np.stack([np.stack([effect, 2 * effect]), np.zeros((2, 2))])  # vectorised, as resampling needs it
    assert profiles.removed(rows[0], rows[1], axis=-1).tolist() == [1.0, 1.0]


def test_removed_surplus_is_a_difference_of_removed_shares():
    rng = np.random.default_rng(0)
    effect, one, other = rng.normal(2, 1, (3, 20))
    expected = profiles.removed(effect, one) - profiles.removed(effect, other)
    assert profiles.removed_surplus(effect, one, other) == pytest.approx(expected)
