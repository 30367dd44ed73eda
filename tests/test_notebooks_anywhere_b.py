"""Notebooks on a model that is none of the book's: neurons, the gate, probes, trust."""

from __future__ import annotations

import anywhere
import pytest

NOTEBOOKS = ("05", "06", "07", "08")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_on_another_model_and_shows_none_of_its_answers(name, tmp_path):
    done = anywhere.check(name, tmp_path)
    assert done.results
