"""What a notebook of the book does first: check its parameters, settle the machine, name what it works on.

papermill injects whatever it is given, misspelt names included. :func:`start` stops a notebook at once, with
the list of what it takes. From then on an error that this package raises on purpose is shown as its message
alone, and a cell that begins with :data:`WORLD_ONLY` is left out where the notebook's ``source`` is not the
fictional world.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from harmlens import __version__, keep
from harmlens.asking import source as material
from harmlens.evidence import claims as claims_
from harmlens.evidence import plots, results, stats, words
from harmlens.evidence.stats import Estimate
from harmlens.flow import outcomes
from harmlens.keep import files
from harmlens.models import loading
from harmlens.weights import frontier
from harmlens.world import vale as world

WORLD_ONLY = "# world-only"
_STARTED = "_harmlens_started"  # left in a notebook that got through
_INJECTED = "# Parameters\n"  # how papermill begins the cell that it injects
_ASSIGNED = re.compile(r"(?m)^(\w+)\s*=(?!=)")
# Kinds of error that are raised for bad input, a model that does not fit, or a file that is not there.
_RAISED = (ValueError, TypeError, OSError, MemoryError, RuntimeError, ImportError)


def _from(least: int) -> Callable[[Any], bool]:
    return lambda v: type(v) is int and v >= least


def _one_of(names: Iterable[str]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, str) and v in names


def _some_of(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list) and v != [] and all(map(valid, v)) and len(set(v)) == len(v)


_DOMAINS = world.domains(False) + world.domains(True)
_TEXT, _FLAG = (lambda v: isinstance(v, str)), (lambda v: isinstance(v, bool), "True or False")
_SIZE = (_from(1), "a positive integer")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("n", "steps"), _SIZE),
    "model": (lambda v: isinstance(v, str) and v.strip() != "", "a model's name"),
    "stages": (_some_of(_one_of(loading.ORDER)), f"a list of stages out of {list(loading.ORDER)}"),
    "seed": (_from(0), "an integer from 0"),
    "output": (_TEXT, "a folder, or '' for the default"),
    "data": (_TEXT, "'' for the default, names of public sets joined by commas, or a .csv or .jsonl file"),
    "judge": (_TEXT, "'' for the default, or a judge's name"),
    "marker": (_TEXT, "'' for none, or the name of a model"),
    "advice": (_TEXT, "'' for the default, or sets and files joined by commas"),
    "domain": (_one_of(_DOMAINS), f"one of {', '.join(_DOMAINS)}"),
    **dict.fromkeys(("quick", "utility", "reveal", "live"), _FLAG),
}


class Run:
    """One training run; models and requests are loaded when they are first asked for.

    ``parameters`` are the notebook's, by name. ``folder`` is for result files, None for the default; ``n`` is
    how many items, requests or pairs are asked at most, None for all.
    """

    def __init__(self, parameters: Mapping[str, Any], notebook: str = "") -> None:
        self.parameters, self.notebook = dict(parameters), notebook
        self.model = parameters.get("model", "organism/sft")
        self.seed = parameters.get("seed", 0)
        self.quick = parameters.get("quick", False)
        self.folder = parameters.get("output") or None
        self.n = 12 if self.quick else parameters.get("n")

    @cached_property
    def lm(self) -> loading.LanguageModel:
        """The model; an organism with the training seed of this run."""
        return self.load(self.model)

    def load(self, name: str) -> loading.LanguageModel:
        """Another model beside it, such as "organism/mirror"; of several training runs the same one.

        Stages of a real model read the chat template of the last one, so that all read the same text.
        """
        if loading.in_runs(name):
            return loading.load(name, seed=self.seed)
        rungs = list(loading.stages(self.model).values())
        return loading.load(name, template_from=rungs[-1] if name in rungs else None)

    @cached_property
    def before(self) -> loading.LanguageModel | None:
        """The model before refusal training, a real one's before alignment; None where none is known."""
        rungs = loading.stages(self.model).items()
        early = [name for stage, name in rungs if stage in ("base", "mid", "long")]
        return self.load(early[-1]) if early and self.model not in early else None

    def first_look(self, **options: Any) -> Any:
        """:func:`asking.source.first_look` at the model."""
        return material.first_look(self.lm, self.source, **options)

    @cached_property
    def source(self) -> material.Material:
        """What the model is asked: the fictional world, or real requests."""
        return material.source(self.lm, self.parameters.get("data", ""), self.parameters.get("judge", ""))

    @cached_property
    def stages(self) -> dict[str, str]:
        """The stages of the model that can be compared: stage -> name to load it by."""
        return loading.stages(self.model, self.parameters.get("stages"), least=2)

    def y1(self) -> outcomes.Outcome:
        """Compliance minus refusal in logits, by tokens that are chosen on discovery pairs."""
        return outcomes.y1(outcomes.fit_to_pairs(self.lm, self.source.pairs("prompt", split="discovery")))

    def pairs(self, contrast: str, **options: Any) -> list:
        """Prompt pairs of this run's source."""
        return self.source.pairs(contrast, **{"n": self.n, **options})

    def requests(self, harmful: bool, **options: Any) -> list:
        """Plain requests of one side."""
        return self.source.requests(harmful, **{"n": self.n, **options})

    def exam(self, **options: Any) -> dict:
        """All that a model is asked before and after a treatment."""
        return self.source.exam(**{"n": self.n, **options})

    def left(self, name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> np.ndarray:
        """What is left of an ability [item]: exact answers; of a model's own answers, whose truth is not
        known, the share of their probability (:func:`weights.frontier.remaining`)."""
        own = name in self.source.own
        return frontier.remaining(before[name], after[name]) if own else after[name].exact

    def drop(self, name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Estimate:
        """Relative drop of an ability, by exam results before and after: 1 - mean after / mean before."""
        both = [self.left(name, before, x) for x in (before, after)]
        return stats.bootstrap_ci(np.stack(both, axis=1), "relative drop")

    def lost(self, name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Estimate:
        """How much of an ability is lost, as a difference of shares."""
        return stats.bootstrap_ci(self.left(name, before, before) - self.left(name, before, after))

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """:func:`keep.remember` under a name, this run's model and parameters.

        What real models say stays outside the repository.
        """
        asked = {key: value for key, value in self.parameters.items() if key != "output"}
        folder = Path(self.folder) / "runs" if self.folder else None
        if not self.source.printable:
            folder = files.cache_dir() / "runs"
        return keep.remember([name, self.lm, asked], compute, folder)

    def record(
        self,
        claim: str,
        effect: Estimate | None,
        control: tuple[str, Estimate] | None = None,
        *,
        note: str = "",
        unless: str = "",
        model: str = "",
        **told: Any,
    ) -> None:
        """:func:`evidence.results.record` of this run, and a line that says what was recorded.

        ``unless`` says why the claim can't be tested here; the run counts as one without a value then.
        ``model`` is named where the claim is about another one than the run's; ``values`` and ``attainable``
        go to :func:`evidence.results.record`.
        """
        if unless or effect is None:
            effect, control, note = None, None, unless or "there is no value"
        made = {"params": self.parameters, "folder": self.folder, "note": note, "run": self.seed, **told}
        made["notebook"] = self.notebook
        if not model:
            made |= {
                "revision": self.lm.revision,
                "device": str(self.lm.device),
                "dtype": self.lm.model.dtype,
            }
        if not loading.in_runs(model or self.model):
            made["run"] = 0
        results.record(claim, effect, control, model=model or self.model, **made)
        print(claim, effect or note, *(("  control:", control[1]) if control else ()))

    def all_runs(self, *claims: str) -> Figure:
        """All recorded runs of these claims, this one marked: dots for runs, the control, threshold and word.

        Result files that can't be used are named.
        """
        folders = [
            Path(self.folder) if self.folder else results.results_dir(),
            *results.default_folders()[1:],
        ]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", results.ResultFileWarning)
            found = results.findings(folders)
            fresh = any(one.role == "confirmatory" for one in found)  # else those are what is shown
            earlier = results.findings(folders, role="exploratory") if fresh else []
        said = dict.fromkeys(str(w.message) for w in caught)
        for line in (line for line in said if any(f"/{claim}.json" in line for claim in claims)):
            print(line)
        known, own, said = claims_.load_claims(), files.model_name(self.model), words.all_words(found)
        rows = [
            (known[one.claim], one, said[one.claim, one.model][0])
            for claim in claims
            for one in found
            if one.claim == claim and (one.model == own or one.model.startswith("organism"))
        ]
        before = {(one.claim, one.model): one for one in earlier}
        ringed = self.seed if loading.in_runs(self.model) else 0
        return plots.forest(rows, run=ringed, own=own, earlier=before)

    def _ipython_display_(self) -> None:
        """Nothing is shown of a run where a cell ends with :func:`start`."""


def start(notebook: str = "", /, **parameters: Any) -> Run:
    """Check a notebook's parameters, then set threads, warnings and the look of figures; show its answer.

    Call it in the first cell after the parameters, with the notebook's name and all parameters by name. Other
    plain variables, set before, are named as ignored. What is shown is :func:`evidence.results.answer`.

    Raises:
        ValueError: an unknown parameter was injected, or a value is not valid; lists what the notebook takes.
        TypeError: a parameter that has no rule here.
    """
    import torch

    caller = sys._getframe(1).f_globals
    if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()) is not None:
        _show_messages_alone(shell)
        _leave_out_cells(shell)
    listing = "; ".join(f"{name} ({_rule(name)[1]})" for name in parameters)
    injected = _injected(caller.get("In", []), parameters)
    if strangers := [name for name in injected if name not in parameters]:
        raise ValueError(f"unknown parameter {', '.join(strangers)}. This notebook takes: {listing}.")
    for name, value in parameters.items():
        valid, what = _rule(name)
        if not valid(value):
            raise ValueError(f"{name}={value!r} is not valid: it must be {what}. Takes: {listing}.")
    model = parameters.get("model", "")
    if model not in ("", "all"):  # fail here rather than after minutes of work
        loading.locate(model, parameters.get("seed") if loading.in_runs(model) else None)
    # One thread each: models of this size only slow down when processes share the cores.
    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    plots.style()
    print(f"harmlens {__version__}")
    if _STARTED not in caller:  # when cells are run once more, what the notebook itself made is there too
        kinds, known = (str, int, float, bool, list, tuple, dict, type(None)), {*parameters, "In", "Out"}
        plain = [n for n, v in caller.items() if n not in known and n[0] != "_" and isinstance(v, kinds)]
        if plain:
            print(f"no parameters of this notebook, ignored: {', '.join(plain)}")
    caller[_STARTED] = True
    if notebook and (told := results.answer(notebook, results.default_folders()[1:])):
        from IPython.display import Markdown, display

        display(Markdown(told))
    return Run(parameters, notebook)


def _rule(name: str) -> tuple[Callable[[Any], bool], str]:
    if name not in _RULES and not name.endswith("_size"):
        raise TypeError(f"harmlens.notebook knows no rule for a parameter called {name!r}; add one")
    return _RULES.get(name, _SIZE)


def _injected(history: Iterable[str], parameters: Iterable[str]) -> list[str]:
    """Names in papermill's cell, if one ran after the last run of the cell that sets the ``parameters``.

    ``history`` holds the source of the cells that were run, as IPython keeps it in ``In``.
    """
    names: list[str] = []
    for source in history:
        assigned = _ASSIGNED.findall(source)
        if source.startswith(_INJECTED):
            names = assigned
        elif set(parameters) <= set(assigned):
            names = []
    return names


def _leave_out_cells(shell: Any) -> None:
    """Put a print in the place of a cell about the fictional world alone, where something else is asked.

    A transformer of IPython's input does so in papermill, nbval and "Run all" alike.
    """

    def left_out(lines: list[str]) -> list[str]:
        if not lines or lines[0].strip() != WORLD_ONLY:
            return lines
        source = shell.user_ns.get("source") or getattr(shell.user_ns.get("run"), "source", None)
        if getattr(source, "knows_world", True):
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
