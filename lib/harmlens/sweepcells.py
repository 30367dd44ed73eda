"""The cells of a sweep: whether one is finished, and the run of a single one.

A cell's folder holds its notebook with outputs, its result files, its log and, written last of all,
``done.json``. What has that file is finished, whatever happened to the machine since.

Introduced in the page book/many_machines ("More than one machine").
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from harmlens import provenance
from harmlens.paths import repo_root
from harmlens.sweepfile import Cell, Sweep, SweepError, parameter_names

FAILED = "FAILED"  # begins the last line of a failed cell's log
STARTS = 3  # tries to start a kernel


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
    for line in reversed(lines):  # a dying kernel may still have written something behind it
        if line.startswith(FAILED):
            return "failed", line
    return "failed", "ended without a message: killed, out of memory or out of time, or still running"


def _execute(cell: Cell, notebook: Path, parameters: dict) -> None:
    """Run the notebook. A kernel that does not come up is started again.

    Kernels that start at the same moment can choose the same port, and then one of them ends at once.
    """
    import papermill

    for left in reversed(range(STARTS)):
        try:
            papermill.execute_notebook(
                cell.notebook, notebook, parameters=parameters, kernel_name="python3",
                cwd=repo_root() or Path.cwd(), progress_bar=False, log_output=False,
                start_timeout=300, execution_timeout=60 * cell.resources["runtime"],
            )  # fmt: skip
            return
        except RuntimeError as error:  # what Jupyter raises before the first cell
            if not left or not str(error).startswith(("Kernel died before", "Kernel didn't respond")):
                raise
            print(f"{cell.id}: {_line(str(error))}; started again", flush=True)


def run_cell(cell: Cell) -> bool:
    """Run one cell with papermill in this process; returns whether it finished.

    Everything goes to ``cell.folder``: the notebook with its outputs, the result files, the log, and last
    of all ``done.json``. What an earlier, unfinished try left is removed. The last line of a failed cell's
    log begins with FAILED and names the cell.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    shutil.rmtree(cell.results, ignore_errors=True)
    cell.done.unlink(missing_ok=True)
    cell.results.mkdir(parents=True)
    os.environ |= {
        "OMP_NUM_THREADS": str(cell.resources["threads"]),
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        "JUPYTER_PREFER_ENV_PATH": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "HARMLENS_RESULTS": str(cell.results),
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by a signal"))
    partial, begun, failure = cell.folder / "partial.ipynb", time.monotonic(), ""
    parameters = dict(cell.parameters)
    if "output" in parameter_names(cell.notebook):
        parameters["output"] = str(cell.results)
    print(f"{cell.id}: started, process {os.getpid()}", flush=True)
    try:
        _execute(cell, partial, parameters)
    except papermill.PapermillExecutionError as error:
        print(provenance.portable(str(error)))
        begins = next((line.strip() for line in error.source.splitlines() if line.strip()), "")
        failure = f"in the code cell that begins with '{begins[:80]}': {error.ename}: {_line(error.evalue)}"
    except DeadKernelError:
        failure = "its kernel died: killed, or out of memory (resources: mem_mb)"
    except CellTimeoutError:
        failure = f"a code cell took longer than {cell.resources['runtime']} minutes (resources: runtime)"
    except BaseException as error:  # a signal too: the log must say which cell it was
        failure = f"{type(error).__name__}: {_line(str(error))}"
    if failure:
        print(f"{FAILED} {cell.id}: {failure}", flush=True)
        return False
    os.replace(partial, cell.folder / "notebook.ipynb")
    _write_done(cell, time.monotonic() - begun)
    print(f"{cell.id}: finished", flush=True)
    return True


def _line(text: str) -> str:
    return str(provenance.portable(" ".join(text.split())))[:400]


def _write_done(cell: Cell, seconds: float) -> None:
    from harmlens.results import write_json

    written = sorted(p.relative_to(cell.folder).as_posix() for p in cell.results.rglob("*.json"))
    seeds = [] if cell.seed is None else [cell.seed]
    record = {
        "key": cell.key, "cell": cell.id, "seconds": round(seconds, 1), "results": written,
        "provenance": provenance.collect(cell.model, seeds=seeds, params=cell.parameters, wall_s=seconds),
    }  # fmt: skip
    write_json(cell.done, record)


def find(sweep: Sweep, name: str) -> Cell:
    """The cell of a name such as ``05_neurons/organism--sft/seed-0-<key>``, as its folder is called.

    Raises:
        SweepError: no such cell, or one with another key: the code here differs from the code of the
            machine that planned the sweep.
    """
    for cell in sweep.cells:
        if cell.folder == sweep.output / "cells" / name:
            return cell
        if cell.id == name.rpartition("-")[0]:
            raise SweepError(
                f"cell {name} was planned with other code, data or parameters than there are on this machine "
                f"(here its key is {cell.key[:12]}). Bring both to the same version of the repository"
            )
    raise SweepError(f"no cell {name}. python -m harmlens.sweep cells lists them")
