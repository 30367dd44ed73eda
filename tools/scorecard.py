"""Compute the scorecard from result files, write it as JSON, print a summary: make scorecard."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from harmlens.evidence import results
from harmlens.keep import files


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/scorecard.py", description=__doc__)
    parser.add_argument(
        "folders",
        nargs="*",
        help="folders with result files, the first wins (default: yours, then the shipped ones)",
    )
    parser.add_argument(
        "--output", type=Path, help="file to write (default: scorecard.json in the build folder)"
    )
    options = parser.parse_args(arguments)
    if missing := [item for item in options.folders if not Path(item).is_dir()]:
        parser.error(f"no such folder: {', '.join(missing)}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = results.scorecard(options.folders or None)
    path = options.output or files.build_dir() / "scorecard.json"
    files.write_json(path, rows)
    print(results.summary(rows))
    print(f"written to {os.path.relpath(path)}")
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
