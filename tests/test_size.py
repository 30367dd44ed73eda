"""The package stays small: limits that a newcomer's reading time sets."""

from __future__ import annotations

import pytest

import size

LIMITS = {
    "lines": 14_400,
    "import depth": 8,
    "names defined twice": 0,
    "functions with more than 10 arguments": 0,
    "circles of imports": 0,
}


@pytest.mark.parametrize("what", LIMITS)
def test_the_package_stays_within_its_limits(what):
    found = size.measure()[what]
    print(f"{what}: {found}")
    assert (len(found) if isinstance(found, list) else found) <= LIMITS[what], found
