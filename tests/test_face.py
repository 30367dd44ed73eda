"""The face of the package: every name loads, says what it does, and importing it costs next to nothing."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import harmlens


@pytest.mark.parametrize("name", harmlens.FACE)
def test_every_name_of_the_face_loads_and_says_what_it_does(name):
    assert inspect.getdoc(getattr(harmlens, name))
    assert name in dir(harmlens) and f"``{name}``" in harmlens.__doc__


def test_the_docstring_fits_on_a_screen():
    assert len(harmlens.__doc__.splitlines()) <= 45 and len(harmlens.FACE) <= 30


def test_another_name_is_refused_with_those_there_are():
    with pytest.raises(AttributeError, match="harmlens has no 'stat'; it has start, remember"):
        harmlens.stat  # noqa: B018


def test_importing_the_face_loads_neither_torch_nor_the_rooms():
    code = (
        "import sys, time; began = time.time(); import harmlens as hl; took = time.time() - began; "
        "assert took < 1, took; assert 'torch' not in sys.modules and 'harmlens.keep' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
