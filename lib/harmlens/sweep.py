"""A sweep over models, seeds and notebooks: run its cells, see what is finished, draw the forest plot.

The file that describes it is read by :mod:`harmlens.sweepfile`. The order, the workers and the cluster are
the business of Snakemake, which has :mod:`harmlens.sweepcells` run each cell that is not finished; see
``sweep/Snakefile``. A cell that fails stops no other one, and the forest plot is made from what there is.

Introduced in the page book/many_machines ("More than one machine").
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from harmlens.paths import repo_root
from harmlens.sweepcells import FAILED, find, run_cell, state
from harmlens.sweepfile import Sweep, SweepError, read

# --------------------------------------------------------------------------- forest


def collect(sweep: Sweep) -> dict[str, Any]:
    """The numbers of the forest plot from the cells that are finished.

    Returns:
        ``claims``: id -> statement, scale, direction, threshold and rows (model, seed, value, ci, n, unit,
        control); ``missing``: the cells without a result, each with its state and reason; ``unreadable``:
        result files that could not be used; counts of cells.
    """
    from harmlens.results import ResultFileWarning, load_claims, load_measurements

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
            control = one.control and {
                "name": one.control.name, "value": one.control.value, "ci": one.control.ci,
            }  # fmt: skip
            claims.setdefault(one.claim, []).append(
                {**name, "value": one.value, "ci": one.ci, "n": one.n, "unit": one.unit, "control": control}
            )
    about = {
        key: {
            "statement": claim.statement, "scale": claim.scale, "direction": claim.direction,
            "threshold": claim.rule.threshold, "rows": claims[key],
        }
        for key, claim in known.items() if key in claims
    }  # fmt: skip
    return {
        "cells": len(sweep.cells), "finished": len(sweep.cells) - len(missing), "claims": about,
        "models": list(dict.fromkeys(cell.label for cell in sweep.cells)), "missing": missing,
        "unreadable": unreadable,
    }  # fmt: skip


def write_forest(sweep: Sweep) -> dict[str, Any]:
    """Write ``forest.json`` and, if any claim was measured, ``forest.png`` to the output folder."""
    from harmlens.results import write_json

    content = collect(sweep)
    write_json(sweep.output / "forest.json", content)
    picture = sweep.output / "forest.png"
    if not content["claims"]:
        picture.unlink(missing_ok=True)
        return content
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from harmlens import plots
    from harmlens.stats import Estimate

    values: dict[str, dict[str, dict[str, Estimate]]] = {}
    controls: dict[str, dict[str, dict[str, Estimate]]] = {}
    for key, claim in content["claims"].items():
        for row in claim["rows"]:
            place = (row["model"], "no seed" if row["seed"] is None else f"seed {row['seed']}")
            at = Estimate(row["value"], *row["ci"], row["n"])
            values.setdefault(key, {}).setdefault(place[0], {})[place[1]] = at
            if beside := row["control"]:
                low, high = beside["ci"] or (beside["value"],) * 2
                at = Estimate(beside["value"], low, high, row["n"])
                controls.setdefault(key, {}).setdefault(place[0], {})[place[1]] = at
    plots.style()
    figure = plots.forest(
        values, controls=controls, models=content["models"],
        thresholds={key: claim["threshold"] for key, claim in content["claims"].items()},
        xlabels={key: claim["scale"] for key, claim in content["claims"].items()},
        missing=[f"{item['cell']} ({item['state']})" for item in content["missing"]],
    )  # fmt: skip
    part = picture.with_name(".forest.part.png")
    figure.savefig(part)
    os.replace(part, picture)
    plt.close(figure)
    return content


# --------------------------------------------------------------------------- engine


def engine() -> list[str]:
    """The command that starts Snakemake.

    Looked for in this order: the program that HARMLENS_SNAKEMAKE names, this interpreter, ``.venv-sweep`` of
    the clone, the search path.

    Raises:
        SweepError: there is none; says how to install it.
    """
    named = os.environ.get("HARMLENS_SNAKEMAKE", "").strip()
    if named:
        return [named]
    if importlib.util.find_spec("snakemake"):
        return [sys.executable, "-m", "snakemake"]
    root = repo_root()
    # Snakemake's requirements differ from the book's, so it has an environment of its own.
    own = root / ".venv-sweep" / "bin" if root else None
    if own and (own / "snakemake").is_file():
        return [str(own / "python"), "-m", "snakemake"]  # as a module: its program breaks in a moved clone
    found = shutil.which("snakemake")
    if found is None:
        raise SweepError(
            "snakemake was not found. In a clone, make sweep installs it; elsewhere put it into an own "
            "environment (pip install 'snakemake>=9,<10') and name the program in HARMLENS_SNAKEMAKE"
        )
    return [found]


def run(sweep: Sweep, *, profile: str = "local", options: Sequence[str] = ()) -> int:
    """Run the cells that are not finished with Snakemake, then always write the forest plot.

    Args:
        profile: a folder below ``sweep/profiles``, or the path of one of your own.
        options: passed on to Snakemake, such as ``["--cores", "4"]``; they win over the profile.

    Returns:
        0 if every cell is finished, else 1.
    """
    root = repo_root()
    if root is None:
        raise SweepError("sweep/Snakefile is part of the repository: run sweeps from a clone of it")
    named = root / "sweep" / "profiles" / profile
    folder = named if named.is_dir() else Path(profile)
    if not (folder / "config.yaml").is_file():
        there = sorted(p.name for p in (root / "sweep" / "profiles").iterdir())
        raise SweepError(f"--profile: no {profile}. Choose one of {', '.join(there)}, or give a folder")
    sweep.output.mkdir(parents=True, exist_ok=True)
    # Snakemake hands its sources to other machines only from below its working directory.
    snakefile = shutil.copyfile(root / "sweep" / "Snakefile", sweep.output / "Snakefile")
    command = [
        *engine(), "--snakefile", str(snakefile), "--profile", str(folder),
        "--directory", str(sweep.output), *_storage(folder, sweep), *options,
        "--config", f"sweep={sweep.source}", f"interpreter={sys.executable}",
    ]  # fmt: skip
    before = {cell.id for cell in sweep.cells if state(cell)[0] == "finished"}
    process = subprocess.Popen(command, cwd=root)
    while True:
        try:  # Ctrl-C reaches Snakemake too, which ends its cells; the forest is drawn all the same
            process.wait()
            break
        except KeyboardInterrupt:
            continue
    content = write_forest(sweep)
    print(f"\n{content['cells']} cells: {len(before)} were finished before, {content['finished']} are now")
    for item in content["missing"]:
        print(f"  {item['state']}: {item['cell']}\n    {item['reason']}")
    print(f"{len(content['claims'])} claims in {os.path.relpath(sweep.output)}/forest.json")
    return int(bool(content["missing"]))


def _storage(profile: Path, sweep: Sweep) -> list[str]:
    """Where Snakemake assumes no common file system: the output folder is the place that it copies to."""
    content = yaml.safe_load((profile / "config.yaml").read_text(encoding="utf-8")) or {}
    if content.get("default-storage-provider") != "fs":
        return []
    return ["--default-storage-prefix", str(sweep.output)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: check a sweep, list its cells, run it, draw its forest plot."""
    parser = argparse.ArgumentParser(prog="python -m harmlens.sweep", description=main.__doc__)
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
        sweep = read(options.file)
        return _command(sweep, options, rest)
    except (SweepError, FileNotFoundError) as error:
        told = f"{FAILED} {options.name}: {error}" if options.command == "cell" else f"error: {error}"
        print(told, file=sys.stderr)
        return 2


def _command(sweep: Sweep, options: argparse.Namespace, rest: list[str]) -> int:
    if options.command == "run":
        return run(sweep, profile=options.profile, options=rest)
    if options.command == "cell":
        return int(not run_cell(find(sweep, options.name)))
    if options.command == "forest":
        content = write_forest(sweep)
        print(f"{len(content['claims'])} claims, {len(content['missing'])} cells missing")
    elif options.command == "check":
        counts = Counter(state(cell)[0] for cell in sweep.cells)
        states = ", ".join(f"{number} {name}" for name, number in counts.items())
        print(f"{sweep.source.name}: valid, {len(sweep.cells)} cells ({states})")
    elif options.json:
        listing = [
            {"id": c.id, "done": str(c.done), "resources": dict(c.resources), "state": state(c)[0]}
            for c in sweep.cells
        ]
        print(json.dumps({"output": str(sweep.output), "cells": listing}))
    else:
        for cell in sweep.cells:
            print(f"{state(cell)[0]:<9} {cell.id}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
