"""Train the organisms: the ladder, what grows beside it, what is planted. This is `make organism`.

Finished checkpoints are left alone, and an interrupted one goes on from the last stage.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harmlens.keep import files
from harmlens.models.loading import SEEDS, STAGES
from harmlens.training import offshoots, organism, planted


def make_seed(seed: int, folder: Path, *, until: str = STAGES[-1], line: int = 0) -> None:
    """Train the ladder of one seed and, if it is whole, what grows beside it and what is planted."""
    organism.train_seed(seed, folder, until=until, line=line)
    if until == STAGES[-1]:
        offshoots.train_seed(seed, folder, line=line)
        planted.train_seed(seed, folder, line=line)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m harmlens.training.train", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument(
        "--until",
        choices=STAGES,
        default=STAGES[-1],
        help="last stage to train; with the last, those beside the ladder follow",
    )
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="seeds side by side")
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints go (data/organisms)")
    options = parser.parse_args(argv)
    folder = options.folder or files.data_dir() / "organisms"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    context = multiprocessing.get_context("spawn")
    waiting = list(options.seeds)
    running: dict[int, multiprocessing.Process] = {}
    lines: dict[int, int] = {}  # which line of the terminal a seed's bar has
    failed = []
    while waiting or running:
        while waiting and len(running) < max(1, options.workers):
            seed = waiting.pop(0)
            line = min(set(range(len(running) + 1)) - set(lines.values()))
            lines[seed] = line
            running[seed] = context.Process(
                target=make_seed, args=(seed, folder), kwargs={"until": options.until, "line": line}
            )
            running[seed].start()
        for seed, process in list(running.items()):
            process.join(timeout=0.5)
            if process.exitcode is not None:
                failed += [seed] if process.exitcode else []
                del running[seed], lines[seed]
    if failed:
        print(f"seeds {failed} failed; run the same command again to go on from the last checkpoint")
        return 1
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6
    print(f"organisms in {folder.name}/: {size:.1f} MB, {(time.time() - began) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
