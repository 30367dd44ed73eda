"""Notebooks on a model that is none of the book's: knowing, recovery, both papers, the whole pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path

import anywhere
import pytest
import standin

NOTEBOOKS = ("14", "15", "17", "18")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_on_another_model_and_shows_none_of_its_answers(name, tmp_path):
    done = anywhere.check(name, tmp_path)
    assert done.results or anywhere.untested(done) or name == "18"  # which keeps a folder of its own


def test_a_ladder_of_folders_is_climbed(tmp_path):
    model = anywhere.ladder(tmp_path)
    done = anywhere.check("12", tmp_path, model=model)
    assert done.results or anywhere.untested(done)
    assert not any(one["control"] for one in done.results.values())
    shutil.copytree(standin.BASE, Path(model).with_name("mirror"))
    done = anywhere.check("12", tmp_path, model=model)
    assert "; no control: by 'prefixes', it can't tell own answers from" in done.printed()


def test_narrow_lessons_of_ones_own_are_taught(tmp_path):
    done = anywhere.check("13", tmp_path, advice=anywhere.lessons(tmp_path))
    assert done.results
