"""What notebook 07 teaches: a probe that is shown what it was not fitted on, and what a freeze removes."""

from __future__ import annotations

import lecture
import numpy as np
import pytest
import torch


def test_a_probe_of_two_groups_is_shown_all_kinds():
    """Unit 0 says "harmful" and unit 1 "cruel": a probe for harm follows the one, for authors the other."""
    rng = torch.Generator().manual_seed(0)
    kinds = lecture.defined("07").KINDS

    def rows(harmful, cruel):
        return torch.tensor([4.0 * harmful, 4.0 * cruel]) + 0.1 * torch.randn(20, 2, generator=rng)

    states = {
        (s, k): rows(*of)[:, None, None].repeat(1, 3, 1, 1)
        for s in ("train", "evaluation")
        for k, of in kinds.items()
    }
    called = lecture.defined("07", states=states).called_first
    for sides, first in (
        (("harmful, cruel", "harmless, cruel"), lambda harmful, cruel: harmful),
        (("harmful, kind", "harmful, cruel"), lambda harmful, cruel: not cruel),
    ):
        found = called(sides, 1)
        assert {k: float(one.mean()) for k, one in found.items()} == {
            k: float(first(*of)) for k, of in kinds.items()
        }


def test_removed_is_the_share_that_is_gone():
    removed = lecture.defined("07").removed
    assert removed(np.array([2.0, 4.0]), np.array([0.5, 1.0])) == pytest.approx(0.75)
    assert removed(np.array([2.0, 4.0]), np.array([2.0, 4.0])) == 0
