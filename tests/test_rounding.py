"""Notebooks are compared up to the last place of what they print, and no further."""

import copy
import doctest
from types import SimpleNamespace

import nbformat
import pytest
import rounding
from rounding import same_but_for_rounding, settle


def test_the_examples():
    assert doctest.testmod(rounding).failed == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("read 0.44, used 0.10", "read 0.43, used 0.10"),
        ("seed 0  0.00  seed 1 -0.00", "seed 0 -0.00  seed 1  0.00"),
        ("[0.99, 1.00]", "[0.98, 1.01]"),
        ("loss 2.1e-05", "loss 2.2e-05"),
        ("12.5%", "12.4%"),
        ("a\n  10.0 b", "a\n   9.9 b"),
    ],
)
def test_one_unit_in_the_last_place(one, other):
    assert same_but_for_rounding(one, other) and same_but_for_rounding(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("used 0.45", "used 0.43"),
        ("used 0.44", "used -0.44"),
        ("n = 54", "n = 55"),  # whole numbers count things
        ("harmlens 0.1.0", "harmlens 0.1.1"),
        ("torch 2.13.0", "torch 2.13.1"),
        ("loss 2.1e-05", "loss 2.1e-04"),
        ("0.44 and 0.10", "0.44"),
        ("supported 0.44", "inconclusive 0.44"),
        ("sft0.1", "sft0.2"),
        ("", "0.1"),
    ],
)
def test_what_is_not_rounding(one, other):
    assert not same_but_for_rounding(one, other) and not same_but_for_rounding(other, one)


def test_only_what_is_close_is_settled():
    stored = [{"output_type": "stream", "text": "0.43"}, {"data": {"text/plain": "0.5 x", "image/png": "a"}}]
    close = [{"output_type": "stream", "text": "0.44"}, {"data": {"text/plain": "0.6 x", "image/png": "b"}}]
    before = copy.deepcopy(close)
    assert settle(close, stored) == [stored[0], {"data": {"text/plain": "0.5 x", "image/png": "b"}}]
    assert close == before
    far = [{"output_type": "stream", "text": "0.49"}, {"data": {"text/plain": "0.5 y"}}]
    assert settle(far, stored) == far
    assert settle(close[:1], stored) == close[:1]


def test_the_notebooks_are_compared_so():
    """nbval's own comparison decides, on settled outputs."""
    from nbval.plugin import IPyNbCell, nocolors

    cell = SimpleNamespace(
        parent=SimpleNamespace(skip_compare=("metadata",)),
        colors=nocolors,
        sanitize=lambda text: text,
        format_output_compare=lambda *args: None,
        comparison_traceback=[],
    )

    def compare(one, other):
        made = [[nbformat.v4.new_output("stream", text=text)] for text in (one, other)]
        return IPyNbCell.compare_outputs(cell, *made)

    assert compare("a 0.43", "a 0.44")
    assert not compare("a 0.43", "a 0.46")
    assert not compare("a 43", "a 44")
