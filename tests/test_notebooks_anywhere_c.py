"""Notebooks on a model that is none of the book's: weights."""

from __future__ import annotations

import anywhere
import pytest

NOTEBOOKS = ("09", "10", "11", "16")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_on_another_model_and_shows_none_of_its_answers(name, tmp_path):
    done = anywhere.check(name, tmp_path)
    assert done.results or anywhere.untested(done)


@pytest.mark.parametrize("name", ["19", "20"])
def test_what_is_recorded_can_be_asked_of_one_model(name, tmp_path):
    for model in ("smollm2/dpo", "organism/sft"):
        done = anywhere.run(name, tmp_path, model=model, data=None, quick=None)
        assert done.returncode == 0, done.log
