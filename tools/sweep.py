"""A sweep over models, seeds and notebooks: read its YAML file, run its cells, draw the forest plot.

A cell is one notebook on one model with one training seed. The order, the workers and the cluster are the
business of Snakemake, which has this file run each cell that is not finished (sweep/Snakefile). A cell that
fails stops no other one, and the forest plot is made from what there is. This is `make sweep`; the page
book/many_machines explains it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import execute
from harmlens.keep import files
from harmlens.keep.files import read_yaml
from layout import ROOT, read_notebook

FAILED = "FAILED"  # begins the last line of a failed cell's log
STARTS = 3  # tries to start a kernel


class SweepError(ValueError):
    """The sweep's file is not valid; the message names the file, the key and the remedy."""


# --------------------------------------------------------------------------- the file


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """Text is short for a mapping with this name; a key without a value is as good as none."""
        if isinstance(value, str) and "name" in cls.model_fields:
            return {"name": value}
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class Needs(_Strict):
    """What a cell asks for: GPUs, megabytes of memory, minutes, processor cores."""

    gpu: int = Field(0, ge=0)
    mem_mb: int = Field(4000, ge=1)
    runtime: int = Field(60, ge=1)
    threads: int = Field(1, ge=1)


class Model(_Strict):
    name: str = Field(min_length=1)
    stages: dict[str, str] | list[str] = Field(default_factory=dict)
    resources: Needs = Needs()

    def pairs(self) -> dict[str, str]:
        """Label in figures -> name of the model."""
        if isinstance(self.stages, list):
            if self.name != "organism":
                raise SweepError(
                    f"models: {self.name}: stages must be a mapping, such as {{base: owner/model}}"
                )
            return {f"organism/{stage}": f"organism/{stage}" for stage in self.stages}
        return {f"{self.name}, {stage}": m for stage, m in self.stages.items()} or {self.name: self.name}


class Notebook(_Strict):
    name: str = Field(min_length=1)
    parameters: dict[str, Any] = Field(default_factory=dict)
    resources: Needs = Needs()


class Rule(_Strict):
    notebook: str | None = None
    model: str | None = None
    seed: int | None = None

    def matches(self, cell: Cell) -> bool:
        stem = cell.notebook.stem
        names = {"notebook": (stem, stem.split("_")[0]), "model": (cell.model, cell.label)}
        names["seed"] = (cell.seed,)
        return all(value in names[key] for key, value in self.model_dump(exclude_unset=True).items())


class File(_Strict):
    """What a sweep's file may hold."""

    models: list[Model] = Field(min_length=1)
    seeds: list[int] = Field([0], min_length=1)
    notebooks: list[Notebook] = Field(min_length=1)
    parameters: dict[str, Any] = Field(default_factory=dict)
    exclude: list[Rule] = Field(default_factory=list)
    resources: Needs = Needs()
    output: str = ""


@dataclass(frozen=True)
class Cell:
    """One notebook on one model with one seed (None where it has none); ``folder`` holds what it makes."""

    id: str
    notebook: Path
    model: str
    label: str
    seed: int | None
    parameters: Mapping[str, Any]
    resources: Mapping[str, int]
    key: str
    folder: Path

    @property
    def done(self) -> Path:
        """Written last, in one step: a cell with this file is finished."""
        return self.folder / "done.json"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def results(self) -> Path:
        return self.folder / "results"


@dataclass(frozen=True)
class Sweep:
    """A valid sweep: where it is described, where its output goes, its cells in the order of the file."""

    source: Path
    output: Path
    cells: tuple[Cell, ...]


def read(path: str | Path) -> Sweep:
    """Read, check and expand the YAML file of a sweep. Loads no model.

    Raises:
        FileNotFoundError: there is no such file.
        SweepError: anything that is wrong in it; the message names the key and the remedy.
    """
    path = Path(path).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path.name}. Copy sweep/sweep.yaml and change it.")
    try:
        content = read_yaml(path)
        if not isinstance(content, dict):
            raise SweepError(f"expected a mapping with the keys {', '.join(File.model_fields)}")
        return _expand(File.model_validate(content), path)
    except yaml.YAMLError as error:
        raise SweepError(f"{path.name}: is not valid YAML: {error}") from error
    except ValidationError as error:
        told = [
            f"{_place(e['loc'], content)}: {_WORDS.get(e['type'], e['msg'].lower())}, got {e['input']!r}"
            for e in error.errors()[:3]
        ]
        raise SweepError(f"{path.name}: {'; '.join(told)}. sweep/sweep.yaml shows every key") from None
    except SweepError as error:
        raise SweepError(f"{path.name}: {error}") from None


_WORDS = {
    "extra_forbidden": "unknown key",
    "missing": "is missing",
    "too_short": "must have at least one entry",
    "dict_type": "must be a mapping, such as {quick: true}",
    "model_type": "must be text, or a mapping with a name",
    "int_type": "must be a whole number",
}


def _place(where: Sequence[Any], content: Any) -> str:
    """Where in the file an error lies; an entry of a list is called by its name."""
    out = []
    for step in where:
        try:
            content = content[step]
        except (KeyError, IndexError, TypeError):
            content = None
        name = content.get("name") if isinstance(content, dict) and isinstance(step, int) else None
        out.append(str(name or step))
    return ": ".join(out)


def _expand(file: File, path: Path) -> Sweep:
    if wrong := [seed for seed in file.seeds if seed < 0]:
        raise SweepError(f"seeds: {wrong[0]} is no seed. Give integers from 0, such as [0, 1, 2]")
    _once(file.seeds, "seeds")
    _once([n.name for n in file.notebooks], "notebooks")
    models = [
        (label, _model(name, file.seeds, path.parent), entry.resources)
        for entry in file.models
        for label, name in entry.pairs().items()
    ]
    _once([name for _, name, _ in models], "models")
    # A relative path is meant from the file's own folder: the same wherever the command is typed.
    output = path.parent / Path(file.output).expanduser() if file.output else None
    output = (output or files.build_dir() / "sweep" / path.stem).resolve()
    base, cells = file.resources.model_dump(), []
    for entry in file.notebooks:
        notebook = _notebook(entry.name, path.parent)
        takes = execute.parameter_names(notebook)
        _parameters(notebook, takes, "parameters", file.parameters)
        _parameters(notebook, takes, f"notebooks: {entry.name}: parameters", entry.parameters)
        for label, name, needs in models:
            # A large model and a demanding notebook: the larger of the two needs.
            asked = [n.model_dump(exclude_unset=True) for n in (entry.resources, needs)]
            resources = {k: max([a[k] for a in asked if k in a] or [v]) for k, v in base.items()}
            for seed in file.seeds if name.startswith("organism/") else [None]:
                given = {**file.parameters, **entry.parameters, "model": name}
                if seed is not None:
                    given |= {"seeds": [seed]} if "seeds" in takes else {}
                    given |= {"seed": seed} if "seed" in takes else {}
                cells.append(_cell(notebook, name, label, seed, given, resources, output))
    for rule in file.exclude:
        if not rule.model_fields_set or not any(map(rule.matches, cells)):
            raise SweepError(f"exclude: {rule!r} matches no cell. Correct it, or remove it")
    kept = [cell for cell in cells if not any(rule.matches(cell) for rule in file.exclude)]
    if not kept:
        raise SweepError("exclude: leaves no cell at all. Remove some of it")
    _once([cell.id for cell in kept], "models: two models or notebooks give the same cell")
    return Sweep(path, output, tuple(kept))


def _once(values: list, where: str) -> None:
    if twice := [value for value, times in Counter(values).items() if times > 1]:
        raise SweepError(f"{where}: {twice[0]} occurs twice. Keep one of them")


def _model(name: str, seeds: Sequence[int], folder: Path) -> str:
    """The model's name as the notebooks take it: organism, absolute folder or Hugging Face id."""
    kind, _, stage = name.partition("/")
    if kind == "organism":
        there: dict[str, set[int]] = {}  # read from disk: this stays without torch
        for found in sorted((files.data_dir() / "organisms").glob("*-*/")):
            of, _, seed = found.name.rpartition("-")
            if seed.isdigit():
                there.setdefault(of, set()).add(int(seed))
        if stage not in there:
            raise SweepError(
                f"models: {name}: unknown stage {stage!r}. Choose one of {', '.join(there)} "
                "(the seed goes under seeds)"
            )
        if strange := sorted(set(seeds) - there[stage]):
            listing = ", ".join(map(str, sorted(there[stage])))
            raise SweepError(f"seeds: {name} was not trained with seed {strange[0]}. There are {listing}")
        return name
    if (local := folder / Path(name).expanduser()).is_dir():
        return str(local.resolve())
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        raise SweepError(
            f"models: {name!r} is no organism/<stage>, no folder (from the folder of this file) and no "
            "Hugging Face id (owner/model). Correct it"
        )
    return name


def _notebook(name: str, folder: Path) -> Path:
    if name.endswith(".ipynb"):
        path = (folder / Path(name).expanduser()).resolve()
        if not path.is_file():
            raise SweepError(f"notebooks: no file {name} (paths count from the folder of this file)")
        return path
    there = sorted((ROOT / "notebooks").glob("*.ipynb"))
    found = [path for path in there if name in (path.stem, path.stem.split("_")[0])]
    if len(found) != 1:
        raise SweepError(f"notebooks: no notebook {name!r}. Choose from {', '.join(p.stem for p in there)}")
    return found[0]


def _parameters(notebook: Path, takes: Sequence[str], where: str, given: Mapping[str, Any]) -> None:
    if "model" not in takes:
        raise SweepError(
            f"notebooks: {notebook.stem} takes no parameter 'model', so it gives the same for every model. "
            "Remove it here; make notebooks runs it"
        )
    for name in given:
        if name in ("model", "seed", "seeds", "output"):
            raise SweepError(f"{where}: {name} is set by the sweep (models, seeds, output). Remove it")
        if name not in takes:
            raise SweepError(
                f"{where}: {notebook.stem} takes no parameter {name!r}. It takes {', '.join(takes)}. Correct "
                "it, or put it under the notebooks that take it (name: ..., parameters: ...)"
            )


# --------------------------------------------------------------------------- cells


def _cell(
    notebook: Path, model: str, label: str, seed: int | None, parameters: dict, resources: dict, output: Path
) -> Cell:
    """Its key covers code cells, parameters, library, data, and files of a local model by size and time."""
    code = [cell.source for cell in read_notebook(notebook).cells if cell.cell_type == "code"]
    local = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in _files(Path(model))]
    text = json.dumps([code, sorted(parameters.items()), _library(), local], default=str)
    key = hashlib.sha256(text.encode()).hexdigest()
    run = "single" if seed is None else f"seed-{seed}"
    name = f"{notebook.stem}/{files.slug(model)}/{run}"
    # The key is in the folder's name: other code, another folder, and going back finds the old one.
    folder = output / "cells" / f"{name}-{key[:12]}"
    return Cell(name, notebook, model, label, seed, parameters, resources, key, folder)


@cache
def _library() -> str:
    return execute.environment_digest(ROOT)


def _files(folder: Path) -> list[Path]:
    """Files below an absolute folder; none for a Hugging Face id."""
    return execute.files(folder, "*") if folder.is_absolute() else []


def state(cell: Cell) -> tuple[str, str]:
    """One of "finished", "failed", "not run"; and the reason in one line, empty for a finished cell."""
    try:
        record = json.loads(cell.done.read_text(encoding="utf-8"))
        if record["key"] == cell.key and all((cell.folder / name).is_file() for name in record["results"]):
            return "finished", ""
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if not cell.log.is_file():
        return "not run", "not started yet"
    lines = cell.log.read_text(encoding="utf-8", errors="replace").splitlines()
    # A dying kernel may still have written something behind the line that counts.
    told = [line for line in lines if line.startswith(FAILED)]
    killed = "ended without a message: killed, out of memory or out of time, or still running"
    return "failed", told[-1] if told else killed


def _execute(cell: Cell, notebook: Path, parameters: dict) -> None:
    """Run the notebook; a kernel that does not come up is started again, since two may choose one port."""
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


def run_cell(cell: Cell) -> bool:
    """Run one cell with papermill in this process; returns whether it finished.

    What an earlier, unfinished try left is removed. The last line of a failed cell's log begins with FAILED
    and names the cell.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    from harmlens.keep.files import write_json

    shutil.rmtree(cell.results, ignore_errors=True)
    cell.done.unlink(missing_ok=True)
    cell.results.mkdir(parents=True)
    os.environ |= {
        "OMP_NUM_THREADS": str(cell.resources["threads"]), "HARMLENS_RESULTS": str(cell.results),
        "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled",
        "JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by a signal"))
    partial, begun, failure = cell.folder / "partial.ipynb", time.monotonic(), ""
    parameters = dict(cell.parameters)
    if "output" in execute.parameter_names(cell.notebook):
        parameters["output"] = str(cell.results)
    print(f"{cell.id}: started, process {os.getpid()}", flush=True)
    try:
        _execute(cell, partial, parameters)
    except papermill.PapermillExecutionError as error:
        print(files.portable(str(error)))
        begins = next((line.strip() for line in error.source.splitlines() if line.strip()), "")
        failure = f"in the code cell that begins with '{begins[:80]}': {error.ename}: {_line(error.evalue)}"
    except DeadKernelError:
        failure = "its kernel died: killed, or out of memory (resources: mem_mb)"
    except CellTimeoutError:
        failure = f"a code cell took longer than {cell.resources['runtime']} minutes (resources: runtime)"
    except BaseException as error:  # a signal too: the log must say which cell it was
        failure = f"{type(error).__name__}: {_line(error)}"
    if failure:
        print(f"{FAILED} {cell.id}: {failure}", flush=True)
        return False
    os.replace(partial, cell.folder / "notebook.ipynb")
    seconds, seeds = time.monotonic() - begun, [] if cell.seed is None else [cell.seed]
    about = files.provenance(cell.model, seeds=seeds, params=cell.parameters, wall_s=seconds)
    written = sorted(p.relative_to(cell.folder).as_posix() for p in cell.results.rglob("*.json"))
    write_json(cell.done, {"key": cell.key, "cell": cell.id, "results": written, "provenance": about})
    print(f"{cell.id}: finished", flush=True)
    return True


def _line(text: Any) -> str:
    return str(files.portable(" ".join(str(text).split())))[:400]


def find(sweep: Sweep, name: str) -> Cell:
    """The cell of a name such as ``05_neurons/organism--sft/seed-0-<key>``, as its folder is called.

    Raises:
        SweepError: no such cell, or one with another key: the code here differs from that of the machine that
            planned the sweep.
    """
    for cell in sweep.cells:
        if cell.folder == sweep.output / "cells" / name:
            return cell
        if cell.id == name.rpartition("-")[0]:
            raise SweepError(
                f"cell {name} was planned with other code, data or parameters than there are on this machine "
                f"(here its key is {cell.key[:12]}). Bring both to the same version of the repository"
            )
    raise SweepError(f"no cell {name}. sweep.py cells lists them")


# --------------------------------------------------------------------------- forest


def collect(sweep: Sweep) -> dict[str, Any]:
    """The numbers of the forest plot from finished cells; the others with their state and reason."""
    from harmlens.evidence.results import ResultFileWarning, load_claims, load_measurements

    known, claims, missing, unreadable = load_claims(), {}, [], []
    for cell in sweep.cells:
        status, reason = state(cell)
        name = {"cell": cell.id, "notebook": cell.notebook.stem, "model": cell.label, "seed": cell.seed}
        if status != "finished":
            missing.append({**name, "state": status, "reason": reason})
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ResultFileWarning)
            measured = load_measurements([cell.results])
        unreadable += [f"{cell.id}: {w.message}" for w in caught]
        for one in measured:
            c, claim = one.control, known[one.claim]
            control = c and {"name": c.name, "value": c.value, "ci": c.ci}
            row = {**name, "value": one.value, "ci": one.ci, "n": one.n, "unit": one.unit, "control": control}
            about = {
                "statement": claim.statement, "scale": claim.scale, "direction": claim.direction,
                "threshold": claim.rule.threshold, "rows": [],
            }  # fmt: skip
            claims.setdefault(one.claim, about)["rows"].append(row)
    return {
        "cells": len(sweep.cells), "finished": len(sweep.cells) - len(missing), "claims": claims,
        "models": list(dict.fromkeys(cell.label for cell in sweep.cells)), "missing": missing,
        "unreadable": unreadable,
    }  # fmt: skip


def write_forest(sweep: Sweep) -> dict[str, Any]:
    """Write ``forest.json`` and, if any claim was measured, ``forest.png`` to the output folder."""
    from harmlens.keep.files import write_json

    content = collect(sweep)
    write_json(sweep.output / "forest.json", content)
    picture = sweep.output / "forest.png"
    if not content["claims"]:
        picture.unlink(missing_ok=True)
        return content
    import matplotlib

    matplotlib.use("Agg")
    import forest
    from harmlens.evidence import plots
    from harmlens.evidence.stats import Estimate

    values: dict[str, dict] = {}
    controls: dict[str, dict] = {}
    for key, claim in content["claims"].items():
        for row in claim["rows"]:
            seed = "no seed" if row["seed"] is None else f"seed {row['seed']}"
            for into, one in ((values, row), (controls, row["control"])):
                if one:
                    at = Estimate(one["value"], *(one["ci"] or (one["value"],) * 2), row["n"])
                    into.setdefault(key, {}).setdefault(row["model"], {})[seed] = at
    plots.style()
    figure = forest.forest(
        values, controls=controls, models=content["models"],
        thresholds={key: claim["threshold"] for key, claim in content["claims"].items()},
        xlabels={key: claim["scale"] for key, claim in content["claims"].items()},
        missing=[f"{item['cell']} ({item['state']})" for item in content["missing"]],
    )  # fmt: skip
    part = picture.with_name(".forest.part.png")
    figure.savefig(part)
    os.replace(part, picture)
    return content


# --------------------------------------------------------------------------- engine


def engine() -> list[str]:
    """The command that starts Snakemake: HARMLENS_SNAKEMAKE, or this interpreter's, .venv-sweep's, any.

    Raises:
        SweepError: there is none; says how to install it.
    """
    if named := os.environ.get("HARMLENS_SNAKEMAKE", "").strip():
        return [named]
    own = ROOT / ".venv-sweep" / "bin"  # Snakemake's requirements differ from the book's
    interpreters = [sys.executable] if importlib.util.find_spec("snakemake") else []
    interpreters += [str(own / "python")] if (own / "snakemake").is_file() else []
    if interpreters:
        return [interpreters[0], "-m", "snakemake"]  # as a module: its program breaks in a moved clone
    if found := shutil.which("snakemake"):
        return [found]
    raise SweepError(
        "snakemake was not found. In a clone, make sweep installs it; elsewhere put it into an own "
        "environment (pip install 'snakemake>=9,<10') and name the program in HARMLENS_SNAKEMAKE"
    )


def run(sweep: Sweep, *, profile: str = "local", options: Sequence[str] = ()) -> int:
    """Run the cells that are not finished with Snakemake, then always write the forest plot.

    Args:
        profile: a folder below ``sweep/profiles``, or the path of one of your own.
        options: passed on to Snakemake, such as ``["--cores", "4"]``; they win over the profile.

    Returns:
        0 if every cell is finished, else 1.
    """
    named = ROOT / "sweep" / "profiles" / profile
    folder = named if named.is_dir() else Path(profile)
    if not (folder / "config.yaml").is_file():
        there = sorted(p.name for p in (ROOT / "sweep" / "profiles").iterdir())
        raise SweepError(f"--profile: no {profile}. Choose one of {', '.join(there)}, or give a folder")
    sweep.output.mkdir(parents=True, exist_ok=True)
    # Snakemake hands its sources to other machines only from below its working directory.
    snakefile = shutil.copyfile(ROOT / "sweep" / "Snakefile", sweep.output / "Snakefile")
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    # Where it assumes no common file system, the output folder is the place that it copies to.
    storage = settings.get("default-storage-provider") == "fs"
    command = [
        *engine(), "--snakefile", str(snakefile), "--profile", str(folder), "--directory", str(sweep.output),
        *(["--default-storage-prefix", str(sweep.output)] if storage else []), *options,
        "--config", f"sweep={sweep.source}", f"interpreter={sys.executable}", f"script={ROOT}/tools/sweep.py",
    ]  # fmt: skip
    before = sum(state(cell)[0] == "finished" for cell in sweep.cells)
    process = subprocess.Popen(command, cwd=ROOT)
    while True:
        try:  # Ctrl-C reaches Snakemake too, which ends its cells; the forest is drawn all the same
            process.wait()
            break
        except KeyboardInterrupt:
            continue
    content = write_forest(sweep)
    print(f"\n{content['cells']} cells: {before} were finished before, {content['finished']} are now")
    for item in content["missing"]:
        print(f"  {item['state']}: {item['cell']}\n    {item['reason']}")
    print(f"{len(content['claims'])} claims in {os.path.relpath(sweep.output)}/forest.json")
    return int(bool(content["missing"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: check a sweep, list its cells, run it, draw its forest plot."""
    parser = argparse.ArgumentParser(prog="sweep.py", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("check", "check the file and say how many cells there are"),
        ("cells", "list the cells and their state"),
        ("run", "run what is not finished, then draw; further options go to Snakemake"),
        ("cell", "run one cell in this process (this is what Snakemake calls)"),
        ("forest", "draw the forest plot of what is finished"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("file", help="the YAML file of the sweep")
        if name == "cells":
            command.add_argument("--json", action="store_true", help="everything, for programs")
        if name == "cell":
            command.add_argument("name", help="the cell's folder below cells/")
        if name == "run":
            command.add_argument("--profile", default="local", help="local, slurm, kubernetes or a folder")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "run":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _command(read(options.file), options, rest)
    except (SweepError, FileNotFoundError) as error:
        told = f"{FAILED} {options.name}: {error}" if options.command == "cell" else f"error: {error}"
        print(told, file=sys.stderr)
        return 2


def _command(sweep: Sweep, options: argparse.Namespace, rest: list[str]) -> int:
    if options.command == "run":
        return run(sweep, profile=options.profile, options=rest)
    if options.command == "cell":
        return int(not run_cell(find(sweep, options.name)))
    states = [(cell, state(cell)[0]) for cell in sweep.cells]
    if options.command == "forest":
        content = write_forest(sweep)
        print(f"{len(content['claims'])} claims, {len(content['missing'])} cells missing")
    elif options.command == "check":
        counts = ", ".join(f"{n} {name}" for name, n in Counter(name for _, name in states).items())
        print(f"{sweep.source.name}: valid, {len(sweep.cells)} cells ({counts})")
    elif options.json:
        listing = [
            {"id": c.id, "done": str(c.done), "resources": dict(c.resources), "state": s} for c, s in states
        ]
        print(json.dumps({"output": str(sweep.output), "cells": listing}))
    else:
        for cell, name in states:
            print(f"{name:<9} {cell.id}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
