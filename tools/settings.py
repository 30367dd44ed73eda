"""Choose p and q for organisms and store them: python tools/settings.py organism/sft-0"""

from __future__ import annotations

import argparse

from harmlens.asking.source import WORLD
from harmlens.keep import files
from harmlens.models import loading
from harmlens.weights import frontier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", help="such as organism/sft-0")
    parser.add_argument("--suppressed", choices=("harmful", "harmless"), default="harmful")
    options = parser.parse_args()
    stored = frontier.stored_pq()
    for name in options.names:
        lm = loading.load(name)
        sets = frontier.candidate_sets(lm, WORLD, suppressed=options.suppressed)
        point, _, _ = frontier.choose_pq(lm, WORLD, sets, suppressed=options.suppressed)
        stored = {key: entry for key, entry in stored.items() if entry["model"] != lm.name}
        stored[lm.revision] = {"model": lm.name, "p": point.p, "q": point.q}
        print(f"{lm.name}: p = {point.p:g}, q = {point.q:g}", flush=True)
    stored = dict(sorted(stored.items(), key=lambda entry: entry[1]["model"]))
    files.write_json(files.data_dir() / "settings.json", stored)


if __name__ == "__main__":
    main()
