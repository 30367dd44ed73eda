"""A sweep over models, seeds and notebooks: read its YAML file, run its cells, draw the forest plot.

A cell is one notebook on one model with one training seed. The order, the workers and the cluster are the
business of Snakemake, which has this file run each cell that is not finished (see the Snakefile). A cell that
fails stops no other one, and the forest plot is made from what there is. This is `make sweep`; the page
book/many_machines explains it. `make evidence` is the sweep of all notebooks that record claims.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

import execute  # noqa: E402
from harmlens.evidence import results  # noqa: E402
from harmlens.keep import files  # noqa: E402
from layout import read_notebook, tags  # noqa: E402

FAILED = "FAILED"  # begins the last line of a failed cell's log
WATCHED = 20  # seconds between two looks at cells whose results are kept
STARTS = 3  # tries to start a kernel: two cells may choose one port
LACKING = ("NotKnown", "TooFew")  # what the library raises where a run lacks what is measured
REMEDIES = {
    "DeadKernelError": "its kernel died: killed, or out of memory (resources: mem_mb)",
    "CellTimeoutError": "a code cell took too long (resources: runtime)",
}


class SweepError(ValueError):
    """The sweep's file is not valid; the message names the file, the key and the remedy."""


# --------------------------------------------------------------------------- the file


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """Text is short for a mapping with this name; a key without a value is as good as none."""
        if isinstance(value, str) and "name" in cls.model_fields:
            return {"name": value}
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class Needs(_Entry):
    """What a cell asks for: GPUs, megabytes of memory, minutes, processor cores."""

    gpu: int = Field(0, ge=0)
    mem_mb: int = Field(4000, ge=1)
    runtime: int = Field(60, ge=1)
    threads: int = Field(1, ge=1)


class Model(_Entry):
    name: str = Field(min_length=1)
    stages: dict[str, str] = Field(default_factory=dict)
    resources: Needs = Needs()

    def labels(self) -> dict[str, str]:
        """Label in figures -> name of the model."""
        stages = {f"{self.name}, {stage}": model for stage, model in self.stages.items()}
        return stages or {self.name: self.name}


class Notebook(_Entry):
    name: str = Field(min_length=1)
    parameters: dict[str, Any] = Field(default_factory=dict)
    resources: Needs = Needs()


class Rule(_Entry):
    notebook: str | None = None
    model: str | None = None
    seed: int | None = None

    def matches(self, cell: Cell) -> bool:
        stem = cell.notebook.stem
        known = {"notebook": (stem, stem[:2]), "model": (cell.model, cell.label), "seed": (cell.seed,)}
        return all(value in known[key] for key, value in self.model_dump(exclude_unset=True).items())


def _once(values: list) -> list:
    named = [getattr(value, "name", value) for value in values]
    if twice := [value for value, times in Counter(named).items() if times > 1]:
        raise ValueError(f"{twice[0]} occurs twice; keep one of them")
    return values


class File(_Entry):
    """What a sweep's file may hold."""

    models: list[Model] = Field([], min_length=1)  # left out: each notebook on its own
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_once)] = [0]
    notebooks: Annotated[list[Notebook], Field(min_length=1), AfterValidator(_once)]
    parameters: dict[str, Any] = Field(default_factory=dict)
    exclude: list[Rule] = Field(default_factory=list)
    resources: Needs = Needs()
    output: str = ""
    kept: bool = False  # results go to the data folder as they come, and count with another library too
    registered: bool = False  # so do runs of data/runs.yaml, trained where that is missing; see evidence()


@dataclass(frozen=True)
class Cell:
    """One notebook on one model with one seed (None where it has none)."""

    id: str
    notebook: Path
    model: str
    label: str
    seed: int | None
    parameters: dict[str, Any]
    resources: dict[str, int]
    key: str  # digest of all that the outcome depends on
    folder: Path  # of what it makes; named after the key, so that other code gets another folder

    @property
    def done(self) -> Path:
        """Written last, in one step: a cell with this file is finished."""
        return self.folder / "done.json"


@dataclass(frozen=True)
class Sweep:
    """A valid sweep: where it is described, where its output goes, its cells in the order of the file."""

    source: Path
    output: Path
    cells: list[Cell]
    kept: bool = False
    registered: bool = False


def read(path: str | Path) -> Sweep:
    """Read, check and expand the YAML file of a sweep; a SweepError names what is wrong in it."""
    path = Path(path).expanduser().resolve()
    if not path.is_file():
        raise SweepError(f"no such file: {path.name}. Copy sweep/sweep.yaml and change it.")
    try:
        return _expand(File.model_validate(files.read_yaml(path)), path)
    except ValidationError as error:
        told = [
            f"{': '.join(map(str, e['loc'])) or 'file'}: {e['msg'].removeprefix('Value error, ')}, "
            f"got {e['input']!r}"
            for e in error.errors()[:3]
        ]
        raise SweepError(f"{path.name}: {'; '.join(told)}. sweep/sweep.yaml shows every key") from None
    except (SweepError, yaml.YAMLError) as error:
        raise SweepError(f"{path.name}: {error}") from None


def _expand(file: File, path: Path) -> Sweep:
    models: dict[str, tuple[str, Needs]] = {}
    for entry in file.models:
        for label, model in entry.labels().items():
            name = _model(model, path.parent)
            if name in models:
                raise SweepError(f"models: {model} occurs twice; keep one of them")
            models[name] = (label, entry.resources)
    # A relative path is meant from the file's own folder: the same wherever the command is typed.
    own = path.parent / Path(file.output).expanduser()
    output = (own if file.output else files.build_dir() / "sweep" / path.stem).resolve()
    notebooks = [_notebook(entry.name, path.parent) for entry in file.notebooks]
    cells = []
    for entry, common in zip(file.notebooks, _parameters(notebooks, file.parameters), strict=True):
        notebook, takes = common.source, execute.defaults(common.source)
        if models and "model" not in takes:
            raise SweepError(
                f"notebooks: {entry.name} takes no parameter 'model', so it gives the same for every model. "
                "Remove it here; make notebooks runs it"
            )
        [alone] = _parameters([notebook], entry.parameters)
        own = ast.literal_eval(takes["model"]) if "model" in takes else "organism"
        for name, (label, needs) in models.items() or [(own, (own, Needs()))]:
            if not file.registered:
                _check_trained(name, file.seeds)
            # A large model and a demanding notebook: the larger of the two needs.
            asked = [n.model_dump(exclude_unset=True) for n in (entry.resources, needs)]
            default = file.resources.model_dump()
            resources = {k: max([a[k] for a in asked if k in a] or [v]) for k, v in default.items()}
            for seed in file.seeds if _in_runs(name) else [None]:
                given = {"model": name, "seed": seed, "seeds": [seed]}
                given = {k: v for k, v in given.items() if k in takes and (seed is not None or k == "model")}
                given |= common.parameters | alone.parameters
                stands_on = "" if file.kept else _library()
                key, run = _key(notebook, name, given, stands_on), f"seed-{seed}"
                run = "single" if seed is None else run
                cell = f"{notebook.stem}/{files.slug(name)}/{run}"
                folder = output / "cells" / f"{cell}-{key[:12]}"
                cells.append(Cell(cell, notebook, name, label, seed, given, resources, key, folder))
    for rule in file.exclude:
        if not rule.model_fields_set or not any(map(rule.matches, cells)):
            raise SweepError(f"exclude: {rule!r} matches no cell. Correct it, or remove it")
    kept = [cell for cell in cells if not any(rule.matches(cell) for rule in file.exclude)]
    if not kept:
        raise SweepError("exclude: leaves no cell at all. Remove some of it")
    return Sweep(path, output, kept, file.kept, file.registered)


def _check_trained(name: str, seeds: list[int]) -> None:
    """Whether an organism is there with these seeds; read from disk, since this stays without torch."""
    kind, _, stage = name.partition("/")
    if _in_runs(name) and kind != "organism":
        missing = [seed for seed in seeds if not Path(f"{name}-{seed}").is_dir()]
        if missing:
            raise SweepError(
                f"seeds: there is no {Path(name).name}-{missing[0]}; take the run out, or train it"
            )
    if kind != "organism" or not stage:
        return
    trained: dict[str, set[int]] = {}
    for found in sorted(f for home in files.organism_homes() for f in home.glob("*-[0-9]*/")):
        of, _, seed = found.name.rpartition("-")
        trained.setdefault(of, set()).add(int(seed))
    if stage not in trained:
        raise SweepError(f"models: {name}: unknown stage {stage!r}. Choose one of {', '.join(trained)}")
    if strange := sorted(set(seeds) - trained[stage]):
        raise SweepError(
            f"seeds: {name} was not trained with seed {strange[0]}. There are {sorted(trained[stage])}; "
            f'the others are made by: make organism ARGS="--seeds {" ".join(map(str, strange))}"'
        )


def _in_runs(name: str) -> bool:
    """As models.loading.in_runs, without torch: an organism, or a folder that is there with numbers."""
    folder = Path(name)
    return name.partition("/")[0] == "organism" or (folder.is_absolute() and files.numbered(folder))


def _model(name: str, folder: Path) -> str:
    """The model's name as the notebooks take it: organism, absolute folder or Hugging Face id."""
    if name.startswith("organism/"):
        return name
    local = (folder / Path(name).expanduser()).resolve()
    if local.is_dir() or _in_runs(str(local)):
        return str(local)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        raise SweepError(
            f"models: {name!r} is no organism/<stage>, no folder (from the folder of this file) and no "
            "Hugging Face id (owner/model). Correct it"
        )
    return name


def _notebook(name: str, folder: Path) -> Path:
    own = (folder / Path(name).expanduser()).resolve()
    if name.endswith(".ipynb") and own.is_file():
        return own
    there = sorted((ROOT / "notebooks").glob("*.ipynb"))
    found = [path for path in there if name in (path.stem, path.stem[:2])]
    if not found:
        raise SweepError(
            f"notebooks: no notebook {name!r}. Choose from {', '.join(p.stem for p in there)}, or give a "
            "file (paths count from the folder of the sweep's file)"
        )
    return found[0]


def _parameters(notebooks: list[Path], given: dict[str, Any]) -> list[execute.Run]:
    """Those parameters that each notebook takes."""
    if own := sorted({"model", "seed", "seeds", "output"} & set(given)):
        raise SweepError(f"parameters: {own[0]} is set by the sweep (models, seeds, output). Remove it")
    try:
        return execute.plan(notebooks, given)
    except execute.ParameterError as error:
        raise SweepError(f"parameters: {error}") from None


def _key(notebook: Path, model: str, parameters: dict[str, Any], stands_on: str) -> str:
    """Digest of code cells that don't only draw, parameters, library and data, the notebook's claims, the
    precision of real models, and files of a local model by size and time."""
    cells = [cell for cell in read_notebook(notebook).cells if cell.cell_type == "code"]
    code = [cell.source for cell in cells if not {"setup", "hide-input"} & set(tags(cell))]
    folder = Path(model)  # a Hugging Face id has no files here
    if _in_runs(model) and folder.is_absolute():
        folder = folder.with_name(f"{folder.name}-{parameters.get('seed', 0)}")
    local = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in execute.files(folder, "*")]
    claims = [claim.sha256 for claim in results.load_claims().values() if claim.notebook == notebook.stem]
    text = [code, sorted(parameters.items()), stands_on, claims]
    text += local if folder.is_absolute() else []
    dtype = os.environ.get("HARMLENS_DTYPE")  # of real models
    text += [dtype] if dtype and not model.startswith("organism") else []
    return hashlib.sha256(json.dumps(text, default=str).encode()).hexdigest()


@cache
def _library() -> str:
    return execute.environment_digest(ROOT, apart=("results", "organisms", "claims.yaml", "runs.yaml"))


def _organisms(run: int | None) -> list[str]:
    """Each organism of a run with the checksum on its card."""
    cards = (card for home in files.organism_homes() for card in home.glob(f"*-{run}/card.json"))
    return sorted(f"{card.parent.name} {json.loads(card.read_text())['sha256']}" for card in cards)


# --------------------------------------------------------------------------- cells


def state(cell: Cell) -> tuple[str, str]:
    """One of "finished", "failed", "not run"; and the reason in one line, empty for a finished cell.

    A cell whose organisms were trained anew since is not finished.
    """
    try:
        record = json.loads(cell.done.read_text(encoding="utf-8"))
        same = record["key"] == cell.key and set(record["organisms"]) <= set(_organisms(cell.seed))
        if same and all((cell.folder / name).is_file() for name in record["results"]):
            return "finished", ""
    except (OSError, ValueError, KeyError, TypeError):
        pass
    log = cell.folder / "log.txt"
    if not log.is_file():
        return "not run", "not started yet"
    # A dying kernel may still have written something behind the line that counts.
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    killed = "ended without a message: killed, out of memory or out of time, or still running"
    return "failed", [killed, *(line for line in lines if line.startswith(FAILED))][-1]


def find(sweep: Sweep, name: str) -> Cell:
    """The cell of a name such as ``05_neurons/organism--sft/seed-0-<key>``, as its folder is called."""
    for cell in sweep.cells:
        if cell.folder == sweep.output / "cells" / name:
            return cell
        if cell.id == name.rpartition("-")[0]:
            raise SweepError(
                f"cell {name} was planned with other code, data or parameters than there are on this machine "
                f"(here its key is {cell.key[:12]}). Bring both to the same version of the repository"
            )
    raise SweepError(f"no cell {name}. sweep.py cells lists them")


def run_cell(cell: Cell) -> bool:
    """Run one cell with papermill in this process, from nothing; returns whether it finished.

    The last line of a failed cell's log begins with FAILED and names the cell.
    """
    results, partial, begun = cell.folder / "results", cell.folder / "partial.ipynb", time.monotonic()
    shutil.rmtree(results, ignore_errors=True)
    cell.done.unlink(missing_ok=True)
    results.mkdir(parents=True)
    os.environ |= {
        "OMP_NUM_THREADS": str(cell.resources["threads"]), "HARMLENS_RESULTS": str(results),
        "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled",
        "JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by a signal"))
    parameters = dict(cell.parameters)
    if "output" in execute.defaults(cell.notebook):
        parameters["output"] = str(results)
    print(f"{cell.id}: started, process {os.getpid()}", flush=True)
    try:
        _execute(cell, partial, parameters)
    except BaseException as error:  # a signal too: the log must say which cell it was
        if cell.seed is not None and getattr(error, "ename", "") in LACKING:
            record_lacking(cell, _line(error.evalue))
            return run_done(cell, partial, begun)
        print(files.portable(str(error)))
        told = REMEDIES.get(type(error).__name__, f"{type(error).__name__}: {_line(error)}")
        if hasattr(error, "ename"):  # of a code cell
            begins = next((line.strip() for line in error.source.splitlines() if line.strip()), "")
            told = f"in the code cell that begins with '{begins[:80]}': {error.ename}: {_line(error.evalue)}"
        print(f"{FAILED} {cell.id}: {told}", flush=True)
        return False
    return run_done(cell, partial, begun)


def record_lacking(cell: Cell, reason: str) -> None:
    """Where a run lacks what its notebook measures: claims that it did not come to are without a value."""
    folder, kept = cell.folder / "results", files.data_dir() / "results" / cell.notebook.stem
    print(f"{cell.id}: the run lacks what is measured: {reason}", flush=True)
    known = results.load_claims().values()
    own = [claim for claim in known if Path(claim.notebook).stem == cell.notebook.stem]
    about = {"params": cell.parameters, "note": f"not tested: {reason}"}
    for name in (claim.id for claim in own if not claim.parts):
        others = (json.loads(path.read_text())["model"] for path in sorted(kept.rglob(f"{name}.json")))
        organisms = (of for of in others if of.startswith("organism") and cell.model.startswith("organism"))
        model = next(organisms, cell.model)
        if not any(folder.rglob(f"{name}.json")):
            results.record(name, None, model=model, run=cell.seed, folder=folder, **about)


def run_done(cell: Cell, partial: Path, begun: float) -> bool:
    """Say that a cell is finished, last of all."""
    results = cell.folder / "results"
    os.replace(partial, cell.folder / "notebook.ipynb")
    seconds, seeds = time.monotonic() - begun, [] if cell.seed is None else [cell.seed]
    about = files.provenance(cell.model, seeds=seeds, params=cell.parameters, wall_s=seconds)
    written = sorted(p.relative_to(cell.folder).as_posix() for p in results.glob("*/run-*/*.json"))
    record = {"key": cell.key, "cell": cell.id, "results": written, "organisms": _organisms(cell.seed)}
    files.write_json(cell.done, record | {"provenance": about})
    print(f"{cell.id}: finished", flush=True)
    return True


def _execute(cell: Cell, notebook: Path, parameters: dict) -> None:
    """Run the notebook; a kernel that does not come up is started again."""
    import papermill

    for left in reversed(range(STARTS)):
        try:
            papermill.execute_notebook(
                cell.notebook, notebook, parameters=parameters, kernel_name="python3", cwd=ROOT,
                progress_bar=False, log_output=False, start_timeout=300,
                execution_timeout=60 * cell.resources["runtime"],
            )  # fmt: skip
            return
        except RuntimeError as error:  # what Jupyter raises before the first cell
            if not left or not str(error).startswith(("Kernel died before", "Kernel didn't respond")):
                raise
            print(f"{cell.id}: {_line(error)}; started again", flush=True)


def _line(text: Any) -> str:
    return str(files.portable(" ".join(str(text).split())))[:400]


# --------------------------------------------------------------------------- the forest plot


def write_forest(sweep: Sweep) -> dict[str, Any]:
    """Write ``forest.json`` and, if a claim was measured, ``forest.png``: finished cells and missing ones."""
    from harmlens.evidence import plots

    states = {cell.id: state(cell) for cell in sweep.cells}
    finished = [cell for cell in sweep.cells if states[cell.id][0] == "finished"]
    labels = {files.model_name(cell.model): cell.label for cell in finished}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", results.ResultFileWarning)
        found = results.findings(cell.folder / "results" for cell in finished)
    known, words, rows, claims = results.load_claims(), results.all_words(found), [], {}
    for one in found:
        claim, label = known[one.claim], labels.get(one.model, one.model)
        word = words[one.claim, one.model][0]
        rows.append((claim, replace(one, model=label), word))
        row: dict[str, Any] = {
            "word": word,
            "runs": {run.run: run.effect.value for run in one.runs if run.effect},
        }
        row |= {"value": one.effect.value, "ci": [one.effect.low, one.effect.high]} if one.effect else {}
        claims.setdefault(claim.id, {})[label] = row
    content = {
        "cells": len(sweep.cells), "finished": len(finished), "claims": claims,
        "missing": [{"cell": c, "state": word, "reason": why} for c, (word, why) in states.items() if why],
        "left_out": [str(w.message) for w in caught],
    }  # fmt: skip
    files.write_json(sweep.output / "forest.json", content)
    (sweep.output / "forest.png").unlink(missing_ok=True)
    if rows:
        plots.plt.switch_backend("Agg")
        plots.style()
        figure = plots.forest(rows)
        files.write_whole(sweep.output / "forest.png", lambda part: figure.savefig(part, format="png"))
    return content


# --------------------------------------------------------------------------- the evidence


def evidence(runs: str) -> Sweep:
    """The sweep of all notebooks that record claims, each on its own model; ``runs``: "0-2,5" or "all".

    Organisms that are missing are trained. What a cell stands on is what is registered: its notebook, claims
    and organisms. Another version of the library is no reason to measure anew; results name theirs.
    """
    registered, asked = results.registered_runs(), []
    for part in [] if runs == "all" else runs.split(","):
        ends = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        some = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else []
        if not some:
            raise SweepError(f"RUNS: {part!r} is no run. Give numbers and ranges such as 0-2,5, or all")
        asked += [run for run in some if run not in asked]
    if strange := [run for run in asked if run not in registered]:
        raise SweepError(
            f"RUNS: run {strange[0]} is not registered, so its results would not count. Registered are "
            f"{', '.join(map(str, registered))}; enter it in data/runs.yaml before you look at its results"
        )
    notebooks = list(dict.fromkeys(claim.notebook for claim in results.load_claims().values()))
    path = files.build_dir() / "sweep" / "evidence.yaml"
    content = {"seeds": asked or list(registered), "notebooks": notebooks, "kept": True, "registered": True}
    text = yaml.safe_dump(content)
    files.write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
    return read(path)


def store(cell: Cell) -> None:
    """Put the result files of a finished cell in the place of those in the data folder."""
    made = [cell.folder / name for name in json.loads(cell.done.read_text())["results"]]
    kept = files.data_dir() / "results" / cell.notebook.stem
    execute.store_results(made, cell.folder / "results", kept)


def _stands_on(run: int) -> dict[str, Any]:
    """What says that a run is trained: its organisms, and the file of their recipes."""
    recipes = files.data_dir() / "organisms.yaml"
    return {"organisms": _organisms(run), "recipes": files.sha256(recipes) if recipes.is_file() else ""}


def forget_untrained(sweep: Sweep) -> None:
    """Remove what says that a run is trained where that is no longer so: it is looked at again."""
    for run in {cell.seed for cell in sweep.cells}:
        told = sweep.output / "organisms" / f"seed-{run}.json"
        if told.is_file() and execute.read_json(told) != _stands_on(run):
            told.unlink()


def train(sweep: Sweep, run: int) -> None:
    """Train the organisms of a run that are missing, and choose p and q for those that are pruned."""
    import settings
    from harmlens.training import train

    train.train_seed(run)
    settings.settle([f"organism/sft-{run}"], "harmful")
    settings.settle([f"organism/mirror-{run}"], "harmless")
    files.write_json(sweep.output / "organisms" / f"seed-{run}.trained", _stands_on(run))


class Watch:
    """Follows the cells of a sweep: stores the results of each when it finishes, says how far it is."""

    def __init__(self, sweep: Sweep, cores: int) -> None:
        self.cells, self.cores, self.finished, self.said = sweep.cells, cores, set(), ""

    def look(self) -> None:
        """Store what has finished since the last look, and say so."""
        new = [c for c in self.cells if c.id not in self.finished and state(c)[0] == "finished"]
        for cell in new:
            store(cell)
            self.finished.add(cell.id)
        runs = Counter(cell.seed for cell in self.cells)
        left = Counter(cell.seed for cell in self.cells if cell.id not in self.finished)
        told = f"{len(self.finished)} of {len(self.cells)} cells, {len(runs) - len(left)} of {len(runs)} runs"
        if told != self.said and left:
            print(f"{told}; {self.remaining()}", flush=True)
        self.said = told

    def remaining(self) -> str:
        """How much time is left, by what finished cells and trained organisms took."""
        took: dict[str, list[float]] = {}
        for cell in self.cells:
            if cell.id in self.finished:
                record = json.loads(cell.done.read_text(encoding="utf-8"))
                took.setdefault(cell.notebook.stem, []).append(record["provenance"]["wall_s"])
        if not took:
            return "no estimate of the time left yet"
        mean = {name: sum(some) / len(some) for name, some in took.items()}
        other = sum(mean.values()) / len(mean)
        left = [cell for cell in self.cells if cell.id not in self.finished]
        seconds = sum(mean.get(cell.notebook.stem, other) for cell in left)
        trained = _seconds()
        for run in {cell.seed for cell in left if cell.model.startswith("organism")}:
            there = {name.rpartition("-")[0] for name in _organisms(run)}
            seconds += sum(mean for kind, mean in trained.items() if kind not in there)
        minutes = seconds / self.cores / 60
        return f"about {minutes // 60:.0f} h {minutes % 60:.0f} min left"


def _seconds() -> dict[str, float]:
    """How long the training of each kind of organism took, by the cards that are there."""
    took: dict[str, list[float]] = {}
    for card in (card for home in files.organism_homes() for card in home.glob("*-*/card.json")):
        about = json.loads(card.read_text())
        took.setdefault(about.get("stage", ""), []).append(about.get("seconds", 0))
    return {kind: sum(some) / len(some) for kind, some in took.items()}


# --------------------------------------------------------------------------- engine


def engine() -> list[str]:
    """The command that starts Snakemake, in its own environment or as HARMLENS_SNAKEMAKE names it."""
    own = ROOT / ".venv-sweep" / "bin" / "python"
    if own.is_file():
        return [str(own), "-m", "snakemake"]  # as a module: its program breaks in a moved clone
    if found := shutil.which(os.environ.get("HARMLENS_SNAKEMAKE", "snakemake")):
        return [found]
    raise SweepError(
        "snakemake was not found. In a clone, make sweep installs it; elsewhere put it into an own "
        "environment (pip install 'snakemake>=9,<10') and name the program in HARMLENS_SNAKEMAKE"
    )


def run(sweep: Sweep, profile: str, options: list[str]) -> int:
    """Run the cells that are not finished with Snakemake, then always write the forest; 0 if all finished.

    ``profile`` is a folder below ``sweep/profiles`` or one of your own; ``options`` go to Snakemake,
    such as ``["--cores", "4"]``, and win over the profile. Where results are kept they are stored as they
    come, with a line on how much is left.
    """
    own = ROOT / "sweep" / "profiles"
    folder = own / profile if (own / profile).is_dir() else Path(profile)
    if not (folder / "config.yaml").is_file():
        there = ", ".join(sorted(p.name for p in own.iterdir()))
        raise SweepError(f"--profile: no {profile}. Choose one of {there}, or give a folder")
    sweep.output.mkdir(parents=True, exist_ok=True)
    forget_untrained(sweep)
    # Snakemake hands its sources to other machines only from below its working directory.
    snakefile = shutil.copyfile(ROOT / "sweep" / "Snakefile", sweep.output / "Snakefile")
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    # Where it assumes no common file system, the output folder is the place that it copies to.
    storage = settings.get("default-storage-provider") == "fs"
    command = [
        *engine(), "--snakefile", str(snakefile), "--profile", str(folder), "--directory", str(sweep.output),
        *(["--default-storage-prefix", str(sweep.output)] if storage else []), *options,
        "--config", f"sweep={sweep.source}", f"interpreter={sys.executable}", f"script={__file__}",
    ]  # fmt: skip
    before = sum(state(cell)[0] == "finished" for cell in sweep.cells)
    given = [n for name, n in pairwise(options) if name == "--cores" and n.isdigit()]
    watch = Watch(sweep, int([os.cpu_count() or 1, *given][-1])) if sweep.kept else None
    process = subprocess.Popen(command, cwd=ROOT)
    while process.returncode is None:
        # Ctrl-C reaches Snakemake too, which ends its cells; the forest is drawn all the same.
        with suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
            process.wait(WATCHED if watch else None)
        if watch:
            watch.look()
    content = write_forest(sweep)
    print(f"\n{content['cells']} cells: {before} were finished before, {content['finished']} are now")
    for item in content["missing"]:
        print(f"  {item['state']}: {item['cell']}\n    {item['reason']}")
    print(f"{len(content['claims'])} claims in {os.path.relpath(sweep.output)}/forest.json")
    return int(bool(content["missing"]))


def main(arguments: list[str] | None = None) -> int:
    """Check a sweep's file, list its cells, run it, draw its forest plot."""
    parser = argparse.ArgumentParser(prog="sweep.py", description=main.__doc__)
    parser.add_argument("command", choices=("check", "cells", "run", "cell", "train", "forest", "evidence"))
    parser.add_argument("file", help="the YAML file of the sweep; of evidence: runs such as 0-2,5, or all")
    parser.add_argument(
        "name", nargs="?", default="", help="of cell: its folder below cells/; of train: the run"
    )
    parser.add_argument("--json", action="store_true", help="of cells: everything, for programs")
    parser.add_argument("--profile", default="local", help="of run: local, slurm, kubernetes or a folder")
    options, rest = parser.parse_known_args(arguments)  # what is left goes to Snakemake
    if rest and options.command not in ("run", "evidence"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.command == "evidence":  # Snakemake says how far it is, and what failed
            quietly = ["--quiet", "rules", "reason", "host", *rest]
            return run(evidence(options.file), options.profile, quietly)
        sweep = read(options.file)
        if options.command == "run":
            return run(sweep, options.profile, rest)
        if options.command == "cell":
            return int(not run_cell(find(sweep, options.name)))
        if options.command == "train":
            return train(sweep, int(options.name.removeprefix("seed-"))) or 0
    except SweepError as error:
        print(f"{FAILED} {options.name}: {error}" if options.name else f"error: {error}", file=sys.stderr)
        return 2
    states = {cell.id: state(cell)[0] for cell in sweep.cells}
    if options.command == "forest":
        content = write_forest(sweep)
        print(f"{len(content['claims'])} claims, {len(content['missing'])} cells missing")
    elif options.command == "check":
        counts = ", ".join(f"{n} {name}" for name, n in Counter(states.values()).items())
        print(f"{sweep.source.name}: valid, {len(sweep.cells)} cells ({counts})")
    elif options.json:
        cells = [{"id": c.id, "done": str(c.done), "resources": c.resources} for c in sweep.cells]
        plan = {"output": str(sweep.output), "registered": sweep.registered, "cells": cells}
        print(json.dumps(plan))
    else:
        print("\n".join(f"{name:<9} {cell}" for cell, name in states.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
