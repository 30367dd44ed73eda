"""harmlens: why do language models generate harmful content? The library behind the book.

>>> import harmlens as hl

What the notebooks use most is here, each name loaded when it is first used. The rest is found in the rooms:
``keep``, ``evidence``, ``models``, ``world``, ``judging``, ``asking``, ``flow``, ``weights``, ``training``.

===============  ==========================================================================
run              ``start`` checks a notebook's parameters and gives a ``Run``; ``remember``
models           ``load``, ``generate``, ``stages``, ``at_stage``
what is asked    ``source`` (its ``pairs``, ``requests``, ``exam``), ``first_look``, ``measure``
what flows       ``y1``, ``patch``, ``neurons``, ``overwriting``
what is stored   ``score``, ``select``, ``find_weights``, ``without``
teaching         ``tune``, ``Recipe``
judging          ``grader``, ``completions``
evidence         ``estimate``, ``record``, ``scorecard``, ``plots``
===============  ==========================================================================
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Where a name is: module, and behind the colon what it is called there if that differs.
FACE = {
    "start": "notebook",
    "remember": "keep",
    "load": "models.loading",
    "generate": "models.forward",
    "stages": "models.loading",
    "at_stage": "models.loading",
    "source": "asking.source",
    "first_look": "asking.source",
    "measure": "asking.tasks",
    "y1": "flow.outcomes",
    "patch": "flow.patching",
    "neurons": "flow.neurons:screen",
    "overwriting": "flow.interventions",
    "score": "weights.attribution:prune_score",
    "select": "weights.masks",
    "find_weights": "weights.frontier",
    "without": "weights.masks",
    "tune": "training.tune",
    "Recipe": "training.tune",
    "grader": "judging.graders",
    "completions": "judging.completions:complete",
    "estimate": "evidence.stats:bootstrap_ci",
    "record": "evidence.results",
    "scorecard": "evidence.results",
    "plots": "evidence.plots:",
}


def __getattr__(name: str) -> Any:
    if name not in FACE:
        raise AttributeError(f"harmlens has no {name!r}; it has {', '.join(FACE)}")
    module, colon, called = FACE[name].partition(":")
    found = import_module(f"harmlens.{module}")
    globals()[name] = found = found if colon and not called else getattr(found, called or name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *FACE})
