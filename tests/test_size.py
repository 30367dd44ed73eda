"""The package stays small: limits that a newcomer's reading time sets."""

from __future__ import annotations

import pytest

import size

LIMITS = {
    "lines": 14_642,
    "import depth": 8,
    "names defined twice": 0,
    "functions with more than 10 arguments": 0,
    "circles of imports": 0,
    "code lines of the notebooks": 4_111,
    "longest cell of a notebook": 15,
    "lines of notebooks beyond 80 characters": 0,
    "MB of shipped organisms": 30,
}


def test_most_lines_of_the_notebooks_state_the_idea():
    assert size.measure()["percent of notebooks' lines that state the idea"] >= 60


@pytest.mark.parametrize("what", LIMITS)
def test_the_package_stays_within_its_limits(what):
    found = size.measure()[what]
    print(f"{what}: {found}")
    assert (len(found) if isinstance(found, list) else found) <= LIMITS[what], found
