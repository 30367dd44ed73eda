"""Choose p and q for organisms and store them beside them: python tools/settings.py organism/sft-0"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from harmlens.asking.source import WORLD
from harmlens.keep import files
from harmlens.models import loading, organisms
from harmlens.weights import frontier


def settle(names: Sequence[str], suppressed: str) -> None:
    """Choose p and q for organisms whose weights have none yet."""
    for name in names:
        # beside the organisms that ship, or those that were trained here
        file = organisms.organism_folder(name).parents[1] / "settings.json"
        stored = json.loads(file.read_text()) if file.is_file() else {}
        lm = loading.load(name, device="cpu")
        if lm.revision in stored:
            continue
        sets = frontier.candidate_sets(lm, WORLD, suppressed=suppressed)
        point, _, _ = frontier.choose_pq(lm, WORLD, sets, suppressed=suppressed)
        stored = {key: entry for key, entry in stored.items() if entry["model"] != lm.name}
        stored[lm.revision] = {"model": lm.name, "p": point.p, "q": point.q}
        print(f"{lm.name}: p = {point.p:g}, q = {point.q:g}", flush=True)
        files.write_json(file, dict(sorted(stored.items(), key=lambda entry: entry[1]["model"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", help="such as organism/sft-0")
    parser.add_argument("--suppressed", choices=("harmful", "harmless"), default="harmful")
    options = parser.parse_args()
    settle(options.names, options.suppressed)


if __name__ == "__main__":
    main()
