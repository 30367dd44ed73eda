"""Register what decides the confirmatory runs before they are measured, or log a later deviation from it.

    python tools/register.py                                       # once
    python tools/register.py --deviation C3b --why "the control drew from the wrong layer"

It writes ``data/registration.json``: for each claim the checksum of what decides its word, for each notebook
that of what it computes, for each kind of organism that of its recipe. A result of a confirmatory run that
goes by other checksums does not count.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime

from harmlens.evidence import claims, results
from harmlens.keep import files


def checksums() -> dict[str, str]:
    """What is registered, as it stands now."""
    from harmlens.training.organism import COURSES, recipe_digest

    known = claims.load_claims()
    notebooks = dict.fromkeys(claim.notebook for claim in known.values())
    return {
        **{name: claim.registered_sha256 for name, claim in known.items()},
        **{name: results.notebook_sha256(name) for name in notebooks},
        **{kind: recipe_digest(kind) for kind in COURSES},
    }


def measured() -> list[str]:
    """Result files of confirmatory runs that are there."""
    fresh = claims.read_runs().confirmatory
    folders = [
        folder for home in results.default_folders() for run in fresh for folder in home.rglob(f"run-{run}")
    ]
    return [path.name for folder in folders for path in folder.glob("*.json")]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deviation", metavar="WHAT", help="a claim, a notebook or a kind of organism")
    parser.add_argument("--why", help="the reason, in a sentence that readers will see")
    options = parser.parse_args(arguments)
    path, now, today = files.data_dir() / "registration.json", checksums(), f"{datetime.now(UTC):%Y-%m-%d}"
    if (options.deviation is None) != (not options.why):
        parser.error("--deviation and --why belong together")
    if options.deviation:
        if not path.is_file():
            parser.error("nothing is registered yet, so nothing deviates from it")
        if options.deviation not in now:
            parser.error(f"--deviation: {options.deviation!r} is none of {', '.join(now)}")
        content = json.loads(path.read_text())
        entry = {
            "what": options.deviation,
            "sha256": now[options.deviation],
            "date": today,
            "why": options.why,
        }
        if entry["sha256"] in claims.registration().get(options.deviation, ()):
            parser.error(f"--deviation: {options.deviation} is as it was registered")
        content["deviations"].append(entry)
    else:
        if not claims.read_runs().confirmatory:
            parser.error("data/runs.yaml names no confirmatory runs; enter them first, with a stop rule")
        if path.is_file() and (there := measured()):
            parser.error(
                f"{len(there)} results of confirmatory runs are there already; log a deviation instead"
            )
        content = {"date": today, "sha256": now, "deviations": []}
    files.write_json(path, content)
    print(f"{len(now)} checksums, {len(content['deviations'])} deviations in {path.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
