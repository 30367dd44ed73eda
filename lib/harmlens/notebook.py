"""What every notebook of the book does first: check its parameters, then settle the machine.

papermill injects whatever it is given, misspelt names included. :func:`start` stops a notebook at
once, with the list of what it takes. From then on an error that this package raises on purpose is
shown as its message alone, and a cell that begins with :data:`WORLD_ONLY` is left out where the notebook's
``source`` is not the fictional world.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from harmlens import __version__
from harmlens.evidence import plots
from harmlens.models.loading import ORDER, locate
from harmlens.models.organisms import SEEDS
from harmlens.world import vale as world

WORLD_ONLY = "# world-only"
_STARTED = "_harmlens_started"  # left in a notebook that got through
_INJECTED = "# Parameters\n"  # how papermill begins the cell that it injects
_ASSIGNED = re.compile(r"(?m)^(\w+)\s*=(?!=)")
# Kinds of error that are raised for bad input, a model that does not fit, or a file that is not there.
_RAISED = (ValueError, TypeError, OSError, MemoryError, RuntimeError, ImportError)


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
    Other plain variables, set before, are named as ignored.

    Raises:
        ValueError: an unknown parameter was injected, or a value is not valid. The message lists
            what the notebook takes.
    """
    caller = sys._getframe(1).f_globals
    if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()) is not None:
        _show_messages_alone(shell)
        _leave_out_cells(shell)
    listing = "; ".join(f"{name} ({_kind(name)[1]})" for name in parameters)
    injected = _injected(caller.get("In", []), parameters)
    if strangers := [name for name in injected if name not in parameters]:
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
    _settle()
    # When cells are run once more, what the notebook itself made is there too.
    if ignored := [] if _STARTED in caller else _plain(caller, parameters):
        print(f"no parameters of this notebook, ignored: {', '.join(ignored)}")
    caller[_STARTED] = True


def _injected(history: Iterable[str], parameters: Iterable[str]) -> list[str]:
    """Names in papermill's cell, if one ran after the last run of the notebook's parameters cell.

    Args:
        history: source of the cells that were run, as IPython keeps it in ``In``.
        parameters: names in the parameters cell.
    """
    names: list[str] = []
    for source in history:
        assigned = _ASSIGNED.findall(source)
        if source.startswith(_INJECTED):
            names = assigned
        elif set(parameters) <= set(assigned):
            names = []
    return names


def _plain(space: dict[str, Any], parameters: Iterable[str]) -> list[str]:
    """Plain values in a namespace that are no parameters, and neither IPython's nor private."""
    kinds = (str, int, float, bool, list, tuple, dict, type(None))
    known = {*parameters, "In", "Out"}
    return [n for n, v in space.items() if n not in known and n[0] != "_" and isinstance(v, kinds)]


def _leave_out_cells(shell: Any) -> None:
    """Put a print in the place of a cell about the fictional world alone, where something else is asked.

    A transformer of IPython's input does so in papermill, nbval and "Run all" alike.
    """

    def left_out(lines: list[str]) -> list[str]:
        known = getattr(shell.user_ns.get("source"), "knows_world", True)
        if known or not lines or lines[0].strip() != WORLD_ONLY:
            return lines
        return ['print("left out: this cell asks about the fictional world alone")\n']

    before = shell.input_transformers_cleanup  # without that of an earlier run
    before[:] = [one for one in before if getattr(one, "__name__", "") != left_out.__name__] + [left_out]


def _show_messages_alone(shell: Any) -> None:
    """In a notebook, show an error that this package raises itself without its trace. It stays an error."""

    def show(shell: Any, kind: type, error: BaseException, trace: Any, tb_offset: int | None = None) -> None:
        origin = traceback.extract_tb(trace)[-1]
        here = Path(__file__).parent in Path(origin.filename).parents
        if here and (origin.line or "").startswith("raise "):
            message = [f"{kind.__name__}: {error}", "(%tb in a new cell shows where.)"]
            error._render_traceback_ = lambda: message
        try:
            shell.showtraceback((kind, error, trace), tb_offset=tb_offset)
        finally:
            vars(error).pop("_render_traceback_", None)

    shell.set_custom_exc(_RAISED, show)


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
