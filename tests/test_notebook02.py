"""What notebooks 02 and 03 teach: a control of shuffled layers, and sizes of random patches pair by pair."""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace

import lecture
import numpy as np
import pytest

LAYERS = [np.full(4, value) for value in (0.5, -1.0, 4.0)]


def test_the_late_surplus_is_compared_with_the_same_effects_in_any_order():
    page = lecture.defined("02", orders=list(permutations(range(3))))
    assert page.late_surplus(*LAYERS) == pytest.approx((4 - 1) / 5.5)
    # The largest is last in two of six orders; else the last third has 1 or 0.5 of 5.5 against 4.
    assert page.shuffled(*LAYERS) == pytest.approx((2 * 3 - 2 * 3 - 2 * 3.5) / 5.5 / 6)
    many = [np.random.default_rng(i).normal(1, 1, size=(5, 7)) for i in range(3)]  # [resample, unit]
    assert np.allclose(page.shuffled(*many)[2], page.shuffled(*(layer[2] for layer in many)))


def test_random_patches_count_by_their_size_in_each_pair():
    """Draws of opposite sign cancel in a mean with signs, not in a mean of sizes."""
    page = lecture.defined("03", names={"mlp_out": "MLP", "attn_out": "attention"})
    draws = [np.array([[1.0, -2.0], [-3.0, 0.0]]), np.array([[-1.0, 2.0], [1.0, 0.0]])]
    found = page.at_random(lambda null: SimpleNamespace(columns=lambda *sites: draws[null % 2]))
    assert found.tolist() == [[1.0, 2.0], [2.0, 0.0]]
