"""Run the notebooks, stage them with the pages in build/src and render the book. This is `make book`.

    python tools/build_book.py                          everything, with the default parameters
    python tools/build_book.py --quick --model organism/dpo -p seed 1
    python tools/build_book.py --from-stored            render the committed outputs, run nothing

Exit code 0 only if every notebook ran, the renderer gave no warning and every page is there with its outputs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat

import execute
import front
from layout import ROOT, merge_outputs, notebooks, read_notebook, source_of, toc_pages, write_notebook
from sync import BADGE

RAW = argparse.RawDescriptionHelpFormatter


class BookError(Exception):
    """The book can't be built; the message says what to do."""


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: _interrupt())
    try:
        return build(options)
    except KeyboardInterrupt:
        print("\ninterrupted: finished notebooks are kept, make book goes on from there", file=sys.stderr)
        return 130
    except (BookError, FileNotFoundError, execute.ParameterError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("--model", help="model for every notebook that takes one")
    parser.add_argument("--quick", action="store_true", help="quick mode in every notebook that has one")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="any other parameter"
    )
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="notebooks at a time")
    parser.add_argument("--force", action="store_true", help="run the unchanged notebooks as well")
    parser.add_argument("--from-stored", action="store_true", help="render stored outputs, run nothing")
    return parser.parse_args(arguments)


def default_jobs() -> int:
    """One notebook per core that this process may use, at most 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, 4))


def parameters(options: argparse.Namespace) -> dict[str, object]:
    given = {name: execute.parse_value(value) for name, value in options.p}
    if options.model is not None:
        given["model"] = options.model
    if options.quick:
        given["quick"] = True
    return given


def build(options: argparse.Namespace, root: Path = ROOT) -> int:
    work = root / "build" / "stored" if options.from_stored else root / "build"
    sources = notebooks(root)
    pages = toc_pages(root)
    for page in pages:
        source_of(page, root)
    if options.from_stored:
        shown = {path: read_notebook(path) for path in sources}
    else:
        runs = execute.plan(sources, parameters(options), root)
        failures = execute.execute(runs, jobs=options.jobs, force=options.force)
        if failures:
            text = "\n\n".join(failures.values())
            raise BookError(
                f"the book was not rendered, because notebooks failed:\n\n{text}\n\n"
                "The finished notebooks are kept and will not be run again."
            )
        shown = {run.source: merged(run) for run in runs}
    empty = [
        path.stem for path, notebook in shown.items() if not any(c.get("outputs") for c in notebook.cells)
    ]
    if empty:
        raise BookError(f"{', '.join(empty)}: no outputs; make notebooks stores them")
    staged = stage(shown, work / "src", root)
    render(work, staged, root)
    check_pages(work, shown, pages, root)
    print(f"The book: {(work / '_build' / 'html' / 'index.html').relative_to(root)}")
    return 0


def merged(run: execute.Run):
    try:
        return merge_outputs(
            read_notebook(run.source), read_notebook(run.executed), keep_injected=bool(run.parameters)
        )
    except ValueError as error:
        raise BookError(f"{run.name}: {error}; it was changed during the run, start again") from error


def stage(shown: dict, target: Path, root: Path = ROOT) -> str:
    """Fill `target` with what is rendered; returns a digest of it."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(root / name, target / name)
    shutil.copytree(root / "book", target / "book", ignore=shutil.ignore_patterns(".*"))
    for path, notebook in shown.items():
        for cell in notebook.cells:
            if cell.cell_type == "markdown":  # the badge is an image from the network; a page needs none
                cell.source = BADGE.sub(r"[Open this notebook in Google Colab](\1)", cell.source)
        answer_first(notebook)
        write_notebook(notebook, target / path.relative_to(root))
    for page in (target / "book").glob("*.md"):
        page.write_text(front.filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    digest = hashlib.sha256()
    for path in execute.files(target, "*"):
        digest.update(f"{path.relative_to(target).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def answer_first(notebook: nbformat.NotebookNode) -> None:
    """What hl.start says of the claims stands on the page under the title, before any code, and in the
    summary."""
    outputs = [out for c in notebook.cells if "hl.start(" in c.source for out in c.get("outputs", [])]
    said = next((out for out in outputs if "text/markdown" in out.get("data", {})), None)
    if said is None:
        return
    told = said["data"]["text/markdown"]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out is not said]
        else:
            found = f"## Summary\n\n*What was found.* {told}\n\n*What was learnt about method.*\n"
            cell.source = cell.source.replace("## Summary\n", found)
    box = f"```{{admonition}} In short\n:class: important\n{told}\n```"
    notebook.cells.insert(1, nbformat.v4.new_markdown_cell(box))


def render(work: Path, staged: str, root: Path = ROOT) -> None:
    """Call jupyter-book, unless the same content was rendered before.

    Always from nothing: a second build over an old one leaves out pages that did not change, and with them
    their warnings.
    """
    out = work / "_build"
    done = out / ".complete"
    if done.exists() and done.read_text() == staged:
        print("pages: unchanged, kept")
        return
    shutil.rmtree(out, ignore_errors=True)
    print("pages: rendering", flush=True)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build"]
    command += [str(work / "src"), "--path-output", str(work), "-W", "-n", "--keep-going"]
    result = subprocess.run(
        command,
        cwd=root,
        env=os.environ | {"PYTHONWARNINGS": "ignore", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    log = work / "render.log"
    log.write_text(result.stdout, encoding="utf-8")
    if result.returncode:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout).replace(f"{work / 'src'}{os.sep}", "")
        lines = plain.splitlines()
        warnings = [line for line in lines if "WARNING" in line or "ERROR" in line]
        text = "\n".join(f"  {line}" for line in warnings or lines[-20:])
        shutil.rmtree(out, ignore_errors=True)
        raise BookError(f"rendering gave warnings or failed:\n{text}\n(all of it: {log.relative_to(root)})")
    thin_mathjax(out / "html" / "_static" / "mathjax")
    done.write_text(staged)


def thin_mathjax(folder: Path) -> None:
    """Keep of MathJax what the pages can load: the TeX component, its extensions and its fonts."""
    kept = [folder / "tex-chtml.js", folder / "input" / "tex", folder / "output" / "chtml"]
    for path in execute.files(folder, "*"):
        if not any(path == k or k in path.parents for k in kept):
            path.unlink()


def check_pages(work: Path, shown: dict, pages: list[str], root: Path = ROOT) -> None:
    """Every page of the table of contents exists, and the pages of notebooks show outputs."""
    html = work / "_build" / "html"
    problems = [f"no page {n}.html" for n in ("index", *pages) if not (html / f"{n}.html").exists()]
    for path in shown:
        page = html / path.relative_to(root).with_suffix(".html")
        if page.exists() and "cell_output" not in page.read_text(encoding="utf-8"):
            problems.append(f"the page of {path.stem} shows no outputs")
    if problems:
        (work / "_build" / ".complete").unlink(missing_ok=True)
        raise BookError("; ".join(problems))


def _interrupt() -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
