"""Printed numbers on another processor.

The last place of a printed decimal depends on how a processor adds up: 0.435 is shown as 0.43 on one and as
0.44 on the next, and zero with or without its sign. Notebooks are therefore compared up to one unit in the
last place that is shown. Everything else, whole numbers included, has to be the same.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

# With the blanks before it: a sign takes one of them. No part of a version or a name.
_DECIMAL = re.compile(r"[ ]*(?<![\w.])-?\d+\.\d+(?:e[+-]?\d+)?(?![\w.]\d)")


def same_but_for_rounding(one: str, other: str) -> bool:
    """Whether two texts differ at most by one unit in the last place of decimal numbers.

    >>> same_but_for_rounding("used 0.44, n = 54", "used 0.43, n = 54")
    True
    >>> same_but_for_rounding("used 0.45, n = 54", "used 0.43, n = 54")
    False
    """
    if _DECIMAL.split(one) != _DECIMAL.split(other):
        return False
    pairs = zip(_DECIMAL.findall(one), _DECIMAL.findall(other), strict=True)
    return all(_near(a.strip(), b.strip()) for a, b in pairs)


def _near(a: str, b: str) -> bool:
    unit = max(_unit(a), _unit(b))
    return abs(float(a) - float(b)) <= 1.001 * unit


def _unit(number: str) -> float:
    """What the last place that is shown is worth."""
    mantissa, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def settle(outputs: Sequence[Mapping[str, Any]], stored: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Outputs with the stored text wherever the texts are the same but for rounding."""
    settled = [copy.deepcopy(output) for output in outputs]
    if len(outputs) != len(stored):
        return settled
    for output, reference in zip(settled, stored, strict=True):
        for mine, theirs in ((output, reference), (output.get("data", {}), reference.get("data", {}))):
            for key in ("text", "text/plain"):
                a, b = mine.get(key), theirs.get(key)
                if isinstance(a, str) and isinstance(b, str) and same_but_for_rounding(a, b):
                    mine[key] = b
    return settled
