"""The description of a sweep: one YAML file of models, seeds and notebooks becomes a list of cells.

A cell is one notebook on one model with one training seed. Everything that can be wrong with the file is
found here, before anything runs. Its key covers what decides its numbers: the notebook's code cells, the
parameters, the library, the data that ship with it, the files of a local model.

Introduced in the page book/many_machines ("More than one machine").
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from harmlens.claims import read_yaml
from harmlens.paths import build_dir, data_dir, repo_root
from harmlens.provenance import sha256, slug

KEYS = ("models", "seeds", "notebooks", "parameters", "exclude", "resources", "output")
# What one cell asks for unless the file says otherwise: GPUs, megabytes of memory, minutes, processor cores.
RESOURCES = {"gpu": 0, "mem_mb": 4000, "runtime": 60, "threads": 1}
_SET_HERE = ("model", "seed", "seeds", "output")  # parameters that every cell gets from the sweep itself


class SweepError(ValueError):
    """The sweep's file is not valid; the message names the file, the key and the remedy."""


@dataclass(frozen=True)
class Cell:
    """One notebook on one model with one seed.

    ``seed`` is None for models that have no training seeds. ``parameters`` are the notebook's, without the
    output folder; ``label`` is the model's name in figures; ``folder`` holds everything that the cell makes.
    """

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


@dataclass(frozen=True)
class _Model:
    name: str
    label: str
    resources: Mapping[str, int]


@dataclass(frozen=True)
class _Notebook:
    path: Path
    takes: tuple[str, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    resources: Mapping[str, int] = field(default_factory=dict)


def read(path: str | Path) -> Sweep:
    """Read, check and expand the YAML file of a sweep. Loads no model.

    Raises:
        FileNotFoundError: there is no such file.
        SweepError: an unknown key, an empty list, a duplicate, an unknown model, stage, seed or notebook, a
            parameter that a notebook does not take, an exclusion that matches nothing. The message names
            the key and the remedy.
    """
    path = Path(path).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path.name}. Copy sweep/sweep.yaml and change it.")
    try:
        content = read_yaml(path)
        return _sweep(content, path)
    except yaml.YAMLError as error:
        raise SweepError(f"{path.name}: is not valid YAML: {error}") from error
    except SweepError as error:
        raise SweepError(f"{path.name}: {error}") from None


def _sweep(content: Any, path: Path) -> Sweep:
    if not isinstance(content, dict):
        raise SweepError(f"expected a mapping with the keys {', '.join(KEYS)}")
    if unknown := sorted(set(map(str, content)) - set(KEYS)):
        raise SweepError(f"{', '.join(unknown)}: unknown key. Valid keys: {', '.join(KEYS)}")
    seeds = _items(content, "seeds", default=[0])
    if wrong := [s for s in seeds if isinstance(s, bool) or not isinstance(s, int) or s < 0]:
        raise SweepError(f"seeds: {wrong[0]!r} is no seed. Give integers from 0, such as [0, 1, 2]")
    models = _models(content, path.parent)
    common = _mapping(content.get("parameters"), "parameters")
    notebooks = [
        _notebook(entry, common, path.parent) for entry in _items(content, "notebooks", key=_notebook_name)
    ]
    given = content.get("output")
    if given is not None and (not isinstance(given, str) or not given.strip()):
        raise SweepError(f"output: {given!r} is no folder. Give a path as text, or leave the key out")
    # A relative path is meant from the file's own folder: the same wherever the command is typed.
    output = (
        (path.parent / Path(given).expanduser()).resolve() if given else build_dir() / "sweep" / path.stem
    )
    base = _resources(content.get("resources"), "resources")
    cells = [
        _cell(notebook, model, seed, {**RESOURCES, **base}, output)
        for notebook in notebooks
        for model in models
        for seed in (seeds if _is_organism(model.name) else [None])
    ]
    kept = _without(cells, content.get("exclude"))
    if twice := [c.id for c in kept if [k.id for k in kept].count(c.id) > 1]:
        raise SweepError(f"models: two models or notebooks give the same cell {twice[0]}. Rename one of them")
    return Sweep(path, output, tuple(kept))


# --------------------------------------------------------------------------- models and seeds


def _is_organism(name: str) -> bool:
    return name.split("/")[0] == "organism"


def _models(content: Mapping[str, Any], folder: Path) -> list[_Model]:
    found: list[_Model] = []
    for entry in _items(content, "models", key=lambda e: json.dumps(e, sort_keys=True, default=str)):
        if isinstance(entry, str):
            entry = {"name": entry}
        where = _fields(entry, "models", ("name", "stages", "resources"))
        resources = _resources(entry.get("resources"), f"{where}: resources")
        stages, name = entry.get("stages"), entry["name"]
        if stages is None:
            pairs = {name: name}
        elif isinstance(stages, dict) and stages:
            pairs = {f"{name}, {stage}": model for stage, model in stages.items()}
        elif isinstance(stages, list) and stages and name == "organism":
            pairs = {f"organism/{stage}": f"organism/{stage}" for stage in stages}
        else:
            raise SweepError(
                f"{where}: stages must be a mapping of stages to models, such as {{base: owner/model}}, or "
                f"for the organism a list of its stages ({', '.join(_stages())}); got {stages!r}"
            )
        found += [_Model(_known(model, content, folder), label, resources) for label, model in pairs.items()]
    names = [model.name for model in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SweepError(f"models: {', '.join(twice)} occurs twice. Keep one of them")
    return found


def _known(name: Any, content: Mapping[str, Any], folder: Path) -> str:
    """The model's name as the notebooks take it: organism, absolute folder or Hugging Face id."""
    if not isinstance(name, str) or not name.strip():
        raise SweepError(f"models: {name!r} is no name of a model. Give text such as organism/sft")
    if _is_organism(name):
        stage = name.partition("/")[2]
        if stage not in _stages():
            raise SweepError(
                f"models: {name!r}: unknown stage {stage!r}. Choose one of {', '.join(_stages())}"
                " (the seed goes under seeds)"
            )
        seeds = content.get("seeds", [0])
        for seed in seeds if isinstance(seeds, list) else []:
            if seed not in _stages()[stage] and isinstance(seed, int):
                there = ", ".join(map(str, sorted(_stages()[stage])))
                raise SweepError(f"seeds: {name} was not trained with seed {seed}. There are {there}")
        return name
    if (folder / Path(name).expanduser()).is_dir():
        return str((folder / Path(name).expanduser()).resolve())
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise SweepError(
            f"models: {name!r} is no organism/<stage>, no folder (from the folder of this file) and no "
            "Hugging Face id (owner/model). Correct it"
        )
    return name


@cache
def _stages() -> dict[str, set[int]]:
    """Stage -> training seeds of the checkpoints that are there. Read from disk: this stays without torch."""
    found: dict[str, set[int]] = {}
    for folder in sorted((data_dir() / "organisms").glob("*-*")):
        stage, _, seed = folder.name.rpartition("-")
        if folder.is_dir() and seed.isdigit():
            found.setdefault(stage, set()).add(int(seed))
    return found


# --------------------------------------------------------------------------- notebooks


def _notebook_name(entry: Any) -> str:
    return str(entry.get("name") if isinstance(entry, dict) else entry)


def _notebook(entry: Any, common: Mapping[str, Any], folder: Path) -> _Notebook:
    if not isinstance(entry, dict):
        entry = {"name": str(entry)}
    where = _fields(entry, "notebooks", ("name", "parameters", "resources"))
    path = _find(entry["name"], folder)
    takes = parameter_names(path)
    if "model" not in takes:
        raise SweepError(
            f"{where} takes no parameter 'model', so it gives the same for every model. "
            "Remove it here; make notebooks runs it"
        )
    own = _mapping(entry.get("parameters"), f"{where}: parameters")
    for key, given in (("parameters", common), (f"{where}: parameters", own)):
        for name in given:
            if name in _SET_HERE:
                raise SweepError(f"{key}: {name} is set by the sweep (models, seeds, output). Remove it")
            if name not in takes:
                raise SweepError(
                    f"{key}: {path.stem} takes no parameter {name!r}. It takes {', '.join(takes)}. Correct "
                    "it, or put it under the notebooks that take it (name: ..., parameters: ...)"
                )
    return _Notebook(
        path, takes, {**common, **own}, _resources(entry.get("resources"), f"{where}: resources")
    )


def _find(name: str, folder: Path) -> Path:
    if name.endswith(".ipynb"):
        path = (folder / Path(name).expanduser()).resolve()
        if not path.is_file():
            raise SweepError(f"notebooks: no file {name} (paths count from the folder of this file)")
        return path
    root = repo_root()
    there = sorted((root / "notebooks").glob("*.ipynb")) if root else []
    found = [path for path in there if name in (path.stem, path.stem.split("_")[0])]
    if len(found) != 1:
        listing = ", ".join(path.stem for path in there) or "none here: give a path that ends in .ipynb"
        raise SweepError(f"notebooks: no notebook {name!r}. Choose from {listing}")
    return found[0]


def _content(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def parameter_names(path: Path) -> tuple[str, ...]:
    """Names assigned in a notebook's cell that is tagged ``parameters``; none if it has no such cell."""
    for cell in _content(path):
        if "parameters" in cell["metadata"].get("tags", []):
            nodes = [n for n in ast.parse("".join(cell["source"])).body if isinstance(n, ast.Assign)]
            return tuple(t.id for node in nodes for t in node.targets if isinstance(t, ast.Name))
    return ()


# --------------------------------------------------------------------------- cells


def _cell(
    notebook: _Notebook, model: _Model, seed: int | None, base: Mapping[str, int], output: Path
) -> Cell:
    parameters = {**notebook.parameters, "model": model.name}
    if seed is not None:
        parameters |= {"seeds": [seed]} if "seeds" in notebook.takes else {}
        parameters |= {"seed": seed} if "seed" in notebook.takes else {}
    # A large model and a demanding notebook: the larger of the two needs.
    asked = [notebook.resources, model.resources]
    resources = {k: max([a[k] for a in asked if k in a] or [v]) for k, v in base.items()}
    key = _key(notebook.path, parameters)
    name = f"{notebook.path.stem}/{slug(model.name)}/{'single' if seed is None else f'seed-{seed}'}"
    # The key is in the folder's name: other code, another folder, and going back finds the old one.
    folder = output / "cells" / f"{name}-{key[:12]}"
    return Cell(name, notebook.path, model.name, model.label, seed, parameters, resources, key, folder)


def _key(notebook: Path, parameters: Mapping[str, Any]) -> str:
    code = ["".join(c["source"]) for c in _content(notebook) if c["cell_type"] == "code"]
    model = Path(parameters["model"])
    # Large weights are not read: the size and time of each file tell a changed one.
    local = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in _files(model)]
    text = json.dumps([code, sorted(parameters.items()), _library(), local], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _library() -> str:
    """Digest of the library and of the data that ship with it, without results."""
    out = hashlib.sha256()
    package, data = Path(__file__).parent, data_dir()
    kept = [p for p in _files(data) if data / "results" not in p.parents]
    for path in [*sorted(package.glob("*.py")), *kept]:
        out.update(f"{path.name}\0{sha256(path)}".encode())
    return out.hexdigest()


def _files(folder: Path) -> list[Path]:
    """Files below an absolute folder, sorted; none for a Hugging Face id."""
    if not folder.is_absolute():
        return []
    return sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def _without(cells: list[Cell], exclude: Any) -> list[Cell]:
    rules = [] if exclude is None else exclude
    if not isinstance(rules, list):
        raise SweepError(
            f"exclude: expected a list of mappings such as {{notebook: ..., model: ...}}, got {rules!r}"
        )
    for rule in rules:
        if not isinstance(rule, dict) or not rule or set(rule) - {"notebook", "model", "seed"}:
            raise SweepError(f"exclude: {rule!r}: give a mapping with some of notebook, model, seed")
        if not any(_matches(cell, rule) for cell in cells):
            raise SweepError(f"exclude: {rule!r} matches no cell. Correct it, or remove it")
    kept = [cell for cell in cells if not any(_matches(cell, rule) for rule in rules)]
    if not kept:
        raise SweepError("exclude: leaves no cell at all. Remove some of it")
    return kept


def _matches(cell: Cell, rule: Mapping[str, Any]) -> bool:
    names = {"notebook": (cell.notebook.stem, cell.notebook.stem.split("_")[0]),
             "model": (cell.model, cell.label), "seed": (cell.seed,)}  # fmt: skip
    return all(value in names[key] for key, value in rule.items())


# --------------------------------------------------------------------------- small checks


def _items(content: Mapping[str, Any], name: str, default: Any = None, key: Any = repr) -> list[Any]:
    value = content.get(name, default)
    if not isinstance(value, list) or not value:
        raise SweepError(f"{name}: expected a list with at least one entry, got {value!r}. Add one")
    keys = [key(item) for item in value]
    if twice := [item for item, k in zip(value, keys, strict=True) if keys.count(k) > 1]:
        raise SweepError(f"{name}: {twice[0]} occurs twice. Keep one of them")
    return value


def _fields(entry: Any, where: str, known: Iterable[str]) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise SweepError(f"{where}: expected text, or a mapping with a name, got {entry!r}")
    if unknown := sorted(set(entry) - set(known)):
        raise SweepError(f"{where}: {entry['name']}: unknown {', '.join(unknown)}. Valid: {', '.join(known)}")
    return f"{where}: {entry['name']}"


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SweepError(f"{where}: expected a mapping such as {{quick: true}}, got {value!r}")
    return value


def _resources(value: Any, where: str) -> dict[str, int]:
    given = _mapping(value, where)
    for name, amount in given.items():
        least = 0 if name == "gpu" else 1
        if name not in RESOURCES:
            raise SweepError(f"{where}: unknown {name}. Valid: {', '.join(RESOURCES)}")
        if isinstance(amount, bool) or not isinstance(amount, int) or amount < least:
            raise SweepError(f"{where}: {name}: {amount!r} must be a whole number from {least}")
    return given
