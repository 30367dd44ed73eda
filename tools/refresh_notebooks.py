"""Run the notebooks with their default parameters and store outputs and results in the repository.

This is `make notebooks`. Outputs go into notebooks/*.ipynb, result files into data/results, the figures that
pages outside the notebooks show into book/figures. A notebook whose
run is kept from `make book` is not run again, unless --force is given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import execute
from build_book import RAW, default_jobs
from layout import PICTURES, ROOT, figure, merge_outputs, notebooks, read_notebook, write_notebook


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("names", nargs="*", help="names or numbers of notebooks, such as 01; default: all")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="notebooks at a time")
    parser.add_argument("--force", action="store_true", help="run the unchanged ones as well")
    options = parser.parse_args(arguments)
    sources = notebooks(root)
    unknown = [n for n in options.names if not any(p.stem.startswith(n) for p in sources)]
    if unknown:
        print(f"error: no notebook {', '.join(unknown)}. There are: {', '.join(p.stem for p in sources)}")
        return 1
    runs = [
        run
        for run in execute.plan(sources, {}, root)
        if not options.names or any(run.name.startswith(n) for n in options.names)
    ]
    # Those that read the results of others come last, when data/results is up to date for them.
    waves = [[r for r in runs if not r.needs], [r for r in runs if r.needs]]
    failures: dict[str, str] = {}
    try:
        for wave in waves:
            ready = [r for r in wave if not set(r.needs) & set(failures)]
            failed = execute.execute(ready, jobs=options.jobs, force=options.force)
            failures |= failed
            for run in ready:
                if run.name not in failed:
                    store(run)
    except KeyboardInterrupt:
        print("\ninterrupted: make notebooks goes on from there", file=sys.stderr)
        return 130
    if failures:
        print("\n" + "\n\n".join(failures.values()), file=sys.stderr)
        return 1
    return 0


def store(run: execute.Run) -> None:
    """Write outputs and result files of a finished run to their committed places."""
    notebook = merge_outputs(read_notebook(run.source), read_notebook(run.executed))
    write_notebook(notebook, run.source)
    for picture, (name, label) in PICTURES.items():
        if name == run.name:
            (run.root / picture).parent.mkdir(parents=True, exist_ok=True)
            (run.root / picture).write_bytes(figure(notebook, label))
    kept = run.root / "data" / run.results.relative_to(run.root / "build")
    made = [run.root / name for name in execute.read_record(run)["results"]]
    execute.store_results(made, run.results, kept)
    print(f"{run.name}: outputs stored")


if __name__ == "__main__":
    sys.exit(main())
