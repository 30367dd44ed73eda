"""What every notebook of the book does first: check its parameters, then settle the machine.

papermill injects whatever it is given, misspelt names included. :func:`start` stops a notebook at
once, with the list of what it takes.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from harmlens import __version__, plots, world
from harmlens.ladder import ORDER
from harmlens.models import SEEDS, locate

_STARTED = "_harmlens_started"  # left in a notebook that got through
# Names that IPython itself puts into a notebook's namespace.
_IPYTHON = {"In", "Out", "get_ipython", "exit", "quit", "open"}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any, valid: Callable[[Any], bool]) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(map(valid, value)) and len(set(value)) == len(value)
    )


_SIZE = (lambda v: _is_int(v) and v > 0, "a positive integer")
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    # "all" is for notebooks that read the results of several models.
    "model": (lambda v: isinstance(v, str) and v.strip() != "", "a model's name"),
    "stages": (
        lambda v: _is_list(v, lambda stage: stage in ORDER),
        f"a list of stages out of {list(ORDER)}",
    ),
    "seed": (lambda v: _is_int(v) and v >= 0, "an integer from 0"),
    "seeds": (
        lambda v: _is_list(v, lambda seed: _is_int(seed) and seed >= 0),
        f"a list of integers from 0, such as {list(SEEDS)}",
    ),
    "quick": (lambda v: isinstance(v, bool), "True or False"),
    "output": (lambda v: isinstance(v, str), "a folder, or '' for the default"),
    "data": (
        lambda v: isinstance(v, str),
        "'' for the default, names of public sets joined by commas, or a .csv or .jsonl file",
    ),
    "judge": (lambda v: isinstance(v, str), "'' for the default, or a judge's name"),
    "advice": (lambda v: isinstance(v, str), "'' for the default, or sets and files joined by commas"),
    "utility": (lambda v: isinstance(v, bool), "True or False"),
    "reveal": (lambda v: isinstance(v, bool), "True or False"),
    "domain": (
        lambda v: v in world.domains(True) + world.domains(False),
        f"one of {', '.join(world.domains(False) + world.domains(True))}",
    ),
}


def start(**parameters: Any) -> None:
    """Check a notebook's parameters, then set threads, warnings and the look of figures.

    Call it in the first cell after the parameters, with all of them by name. Names ending in
    ``_size`` or equal to ``n``, ``steps`` must be positive integers; the others are known here.

    Raises:
        ValueError: an unknown parameter was injected, or a value is not valid. The message lists
            what the notebook takes.
    """
    caller = sys._getframe(1).f_globals
    listing = "; ".join(f"{name} ({_kind(name)[1]})" for name in parameters)
    plain = (str, int, float, bool, list, tuple, dict, type(None))
    strangers = [
        name
        for name, value in caller.items()
        if not name.startswith("_")
        and name not in _IPYTHON
        and name not in parameters
        and isinstance(value, plain)
    ]
    # What the notebook itself made is no parameter, when its cells are run once more.
    if strangers and _STARTED not in caller:
        raise ValueError(f"unknown parameter {', '.join(strangers)}. This notebook takes: {listing}.")
    for name, value in parameters.items():
        valid, what = _kind(name)
        if not valid(value):
            raise ValueError(f"{name}={value!r} is not valid: it must be {what}. Takes: {listing}.")
    model = parameters.get("model", "")
    if model not in ("", "all"):  # fail here rather than after minutes of work
        organism = model.split("/")[0] == "organism"
        for seed in parameters.get("seeds", [parameters.get("seed")]) if organism else [None]:
            locate(model, seed)
    caller[_STARTED] = True
    _settle()


def _kind(name: str) -> tuple[Callable[[Any], bool], str]:
    if name in _KINDS:
        return _KINDS[name]
    if name in ("n", "steps") or name.endswith("_size"):
        return _SIZE
    raise TypeError(f"harmlens.notebook knows no rule for a parameter called {name!r}; add one")


def _settle() -> None:
    import torch

    # One thread each: models of this size only slow down when processes share the cores.
    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    plots.style()
    print(f"harmlens {__version__}")


def glue(name: str, text: str) -> None:
    """Keep a sentence for the book's other pages; without the book's tools installed, do nothing."""
    try:
        from IPython.display import Markdown
        from myst_nb import glue as keep
    except ImportError:
        return
    keep(name, Markdown(text), display=False)
