"""Run notebooks with papermill, each in its own process, and never the same one twice.

A run is kept in build/executed: the notebook with its outputs, and beside it a JSON file with the key of the
run, written last. The key covers everything that decides the outcome: code cells, parameters, lib/, data/ and
the installed packages. Result files go to build/results/<notebook>.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import nbformat
import yaml

from layout import ROOT, dependencies, read_notebook, tags

CELL_TIMEOUT = 1800  # seconds; a hanging cell fails instead of blocking for ever


class ParameterError(ValueError):
    """A parameter that no notebook has."""


@dataclass(frozen=True)
class Run:
    """One notebook of one build, its parameters other than the defaults, and what it has to wait for."""

    source: Path
    parameters: dict[str, object] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    root: Path = ROOT

    @property
    def name(self) -> str:
        return self.source.stem

    @property
    def executed(self) -> Path:
        return self.root / "build" / "executed" / f"{self.name}.ipynb"

    @property
    def record(self) -> Path:
        return self.executed.with_suffix(".json")

    @property
    def partial(self) -> Path:
        return self.executed.with_name(f"{self.name}.partial.ipynb")

    @property
    def log(self) -> Path:
        return self.executed.with_suffix(".log")

    @property
    def results(self) -> Path:
        """Folder of its result files; a notebook that reads those of others gets the common one."""
        common = self.root / "build" / "results"
        return common if self.needs else common / self.name

    def result_files(self) -> dict[Path, tuple[int, int]]:
        """Its result files with time and size, those in the folders of other notebooks left out."""
        others = [self.results / name for name in self.needs]
        own = (p for p in files(self.results, "*") if not any(o in p.parents for o in others))
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in own}


def parse_value(text: str) -> object:
    """A value from the command line: Python literals, true, false, none, everything else text."""
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def defaults(path: Path) -> dict[str, ast.expr]:
    """What the notebook's `parameters` cell assigns: the expressions by name."""
    source = next((cell.source for cell in read_notebook(path).cells if "parameters" in tags(cell)), "")
    found = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {t.id: node.value for t in targets if isinstance(t, ast.Name)}
    return found


def plan(sources: list[Path], parameters: dict[str, object], root: Path = ROOT) -> list[Run]:
    """One Run per notebook, each with those parameters that it has.

    Raises ParameterError, with the valid names, if a parameter exists in no notebook: papermill alone would
    inject it and go on.
    """
    valid = {path: list(defaults(path)) for path in sources}
    known = {name for names in valid.values() for name in names}
    unknown = sorted(set(parameters) - known)
    if unknown:
        lines = "\n".join(f"  {path.stem}: {', '.join(names) or '(none)'}" for path, names in valid.items())
        raise ParameterError(f"no notebook has a parameter {', '.join(unknown)}. Valid names:\n{lines}")
    names = [path.stem for path in sources]
    return [
        Run(
            source=path,
            parameters={k: v for k, v in parameters.items() if k in valid[path]},
            needs=tuple(dependencies(path.stem, names)),
            root=root,
        )
        for path in sources
    ]


def environment_digest(root: Path = ROOT, apart: Sequence[str] = ("results",)) -> str:
    """Digest of what all notebooks stand on: lib/, data/ without what is ``apart``, packages, Python."""
    digest = hashlib.sha256()
    for path in files(root / "lib", "*.py") + files(root / "data", "*"):
        if not any((root / "data" / name) in (path, *path.parents) for name in apart):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    packages = {(d.metadata["Name"] or "").lower(): d.version for d in metadata.distributions()}
    packages.pop("harmlens", None)  # lib/ itself is in the key
    digest.update(json.dumps([sys.version_info[:3], sorted(packages.items())]).encode())
    return digest.hexdigest()


def run_key(run: Run, environment: str) -> str:
    """Digest that decides whether a kept run still holds."""
    code = [c.source for c in read_notebook(run.source).cells if c.cell_type == "code"]
    digest = hashlib.sha256(json.dumps([environment, code, sorted(run.parameters.items())]).encode())
    # Its last figure shows what is recorded of its claims: values count, not when they were measured.
    for path in files(run.root / "data" / "results" / run.name, "*.json"):
        one = read_json(path)
        digest.update(json.dumps([path.name, one.get("run"), one.get("effect"), one.get("control")]).encode())
    if run.needs:
        own = read_record(run).get("results", [])
        read = [p for p in files(run.results, "*") if p.relative_to(run.root).as_posix() not in own]
        for path in read + files(run.root / "data" / "results", "*"):
            digest.update(path.relative_to(run.root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def read_json(path: Path) -> dict:
    """What a file holds; nothing where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def read_record(run: Run) -> dict:
    return read_json(run.record)


def is_kept(run: Run, key: str) -> bool:
    """Whether the finished run for `key` is still there, result files included."""
    record = read_record(run)
    results_exist = all((run.root / name).exists() for name in record.get("results", []))
    return record.get("key") == key and run.executed.exists() and results_exist


def execute(runs: list[Run], *, jobs: int, force: bool = False) -> dict[str, str]:
    """Run what has to be run, `jobs` at a time; returns a message for each notebook that failed.

    A failure stops neither the other notebooks nor loses finished ones; notebooks that need the failed one
    are not started. On Ctrl-C the running ones are ended and the finished ones are kept.
    """
    environment = environment_digest(runs[0].root) if runs else ""
    names = {run.name for run in runs}
    pending, done, failed = list(runs), set(), {}
    running: dict[str, tuple[Run, str, subprocess.Popen, float, dict]] = {}
    try:
        while pending or running:
            for run in list(pending):
                lost = [n for n in run.needs if n in failed]
                if lost:
                    pending.remove(run)
                    failed[run.name] = f"{run.name}: not run, because it needs {', '.join(lost)}"
                elif len(running) < jobs and all(n in done for n in run.needs if n in names):
                    pending.remove(run)
                    key = run_key(run, environment)
                    if not force and is_kept(run, key):
                        print(f"{run.name}: unchanged, kept", flush=True)
                        done.add(run.name)
                        continue
                    running[run.name] = (run, key, *_start(run))
                    print(f"{run.name}: started", flush=True)
            time.sleep(0.05)
            for name, (run, key, process, begun, before) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                seconds = time.monotonic() - begun
                if process.returncode == 0:
                    _finish(run, key, seconds, before)
                    done.add(name)
                    print(f"{name}: finished in {seconds:.0f} s", flush=True)
                else:
                    failed[name] = describe_failure(run, process.returncode)
                    print(f"{name}: FAILED after {seconds:.0f} s", flush=True)
    except BaseException:
        for _, _, process, _, _ in running.values():
            process.terminate()
        for _, _, process, _, _ in running.values():
            process.wait()
        raise
    return failed


def _start(run: Run) -> tuple[subprocess.Popen, float, dict]:
    run.executed.parent.mkdir(parents=True, exist_ok=True)
    record = read_record(run)
    if record.get("parameters") == run.parameters:  # a claim that is no longer measured must not survive
        for name in record.get("results", []):
            (run.root / name).unlink(missing_ok=True)
    run.partial.unlink(missing_ok=True)
    run.results.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "papermill", str(run.source), str(run.partial), "--kernel", "python3"]
    command += ["--cwd", str(run.root), "--no-progress-bar", "--execution-timeout", str(CELL_TIMEOUT)]
    if run.parameters:
        text = yaml.safe_dump(run.parameters).encode()
        command += ["--parameters_base64", base64.b64encode(text).decode()]
    variables = {
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        "JUPYTER_PREFER_ENV_PATH": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "HARMLENS_RESULTS": run.results.relative_to(run.root).as_posix(),
    }
    before = run.result_files()
    with run.log.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=run.root, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT
        )
    return process, time.monotonic(), before


def _finish(run: Run, key: str, seconds: float, before: dict) -> None:
    run.record.unlink(missing_ok=True)
    os.replace(run.partial, run.executed)
    written = [p for p, stamp in run.result_files().items() if before.get(p) != stamp]
    record = {
        "key": key,
        "parameters": run.parameters,
        "seconds": round(seconds, 1),
        "results": sorted(p.relative_to(run.root).as_posix() for p in written),
    }
    part = run.record.with_suffix(".json.part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, run.record)


def store_results(made: list[Path], folder: Path, kept: Path) -> None:
    """Copy result files, <model>/run-<n>/<claim>.json below `folder`, to `kept`.

    They take the place of all that organisms gave in these runs, or that the same real model gave; the files
    of other runs and models stay.
    """
    for run, model in {(path.parent.name, path.parent.parent.name) for path in made}:
        for old in kept.glob(f"{'organism*' if model.startswith('organism') else model}/{run}"):
            shutil.rmtree(old)
    for path in made:
        target = kept / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def describe_failure(run: Run, code: int) -> str:
    """Which cell failed and how: notebook, cell number, its first lines, the end of the traceback."""
    source = read_notebook(run.source)
    order = {cell.id: number for number, cell in enumerate(source.cells, start=1)}
    cell = error = None
    if run.partial.exists():
        cell, error = _failed_cell(read_notebook(run.partial))
    if cell is None:
        tail = run.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        return f"{run.name}: papermill ended with exit code {code}\n" + _indent(tail)
    where = f"cell {order[cell.id]} of {len(order)}" if cell.id in order else "the cell with the parameters"
    lines = [f"{run.name}, {where}:", *_indent(cell.source.splitlines()[:4]).splitlines()]
    if error is not None:
        trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).splitlines()
        lines += ["", *_indent(trace[-12:]).splitlines()]
    else:
        tail = run.log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
        lines += ["", *_indent(tail).splitlines()]
    kept = run.partial.relative_to(run.root)
    return "\n".join([*lines, f"  The notebook as far as it got: {kept}"])


def _failed_cell(notebook: nbformat.NotebookNode) -> tuple:
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    for cell in cells:
        for output in cell.outputs:
            if output.output_type == "error":
                return cell, output
    for cell in cells:  # a dead kernel or a timeout leaves no error output
        if cell.metadata.get("papermill", {}).get("status") in ("running", "failed"):
            return cell, None
    return None, None


def _indent(lines: list[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


def files(folder: Path, pattern: str) -> list[Path]:
    """Files below a folder, sorted; none if it does not exist."""
    return sorted(p for p in folder.rglob(pattern) if p.is_file() and "__pycache__" not in p.parts)
