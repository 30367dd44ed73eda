"""The recipe of the pruning paper in one call, on the organism's calibration sets.

:func:`find` scores the answers that are to be lost and those that are to be kept, and selects the set
difference. Its p and q were chosen for each model on *discovery* requests (:func:`settle`), as the paper
searched them for each of its models, and stand in ``data/settings.json``; scores come from *training*
requests, and results are reported on *evaluation* requests.

Introduced in notebook 09 ("Weights that carry harm").
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from harmlens import attribution, calibration, frontier, models, paths, pruning, tasks
from harmlens.frontier import Point
from harmlens.masks import Mask
from harmlens.memory import write_whole
from harmlens.models import LanguageModel
from harmlens.scores import Scores

EXAMPLES = 412  # as many of each kind as the paper has, where there are so many
MOST_LOST = 0.035  # of any benign ability, on discovery requests
_SETTLED: dict[tuple[str, str], tuple[float, float]] = {}  # what this process has found out
BRIEF = 60  # discovery items of each side that p and q are chosen on


@dataclass(frozen=True)
class Removal:
    """What was scored, and what was selected.

    Attributes:
        prune: signed scores of the target's answers.
        preserve: unsigned scores of the benign answers.
        mask: the set difference.
    """

    prune: Scores
    preserve: Scores
    mask: Mask
    p: float
    q: float


def score(
    lm: LanguageModel,
    target: str | None = None,
    *,
    suppressed: str = "harmful",
    domain: str | Sequence[str] | None = None,
    n: int = EXAMPLES,
    seed: int = 0,
) -> tuple[Scores, Scores]:
    """Prune scores of a target's answers and preserve scores of benign ones.

    Args:
        target: a kind of :func:`harmlens.calibration.world_task`; None for the suppressed procedures. What is
            to be kept holds none of it: when facts are to be lost, only procedures are kept.
        suppressed: the side that the model refuses; ``"harmless"`` for the mirror organism.
        domain: score only answers of these domains.
        n: at most this many examples of each; seed: of their draw.
    """
    kept = "served" if target == "facts" else "benign"
    lost = calibration.world_task(target or suppressed, suppressed=suppressed, domain=domain)
    benign = calibration.world_task(kept, suppressed=suppressed)
    return (
        attribution.prune_score(lm, calibration.examples(lm, lost, n=n, seed=seed)),
        attribution.preserve_score(lm, calibration.examples(lm, benign, n=n, seed=seed)),
    )


def find(
    lm: LanguageModel,
    target: str | None = None,
    *,
    suppressed: str = "harmful",
    domain: str | Sequence[str] | None = None,
    p: float | None = None,
    q: float | None = None,
    n: int = EXAMPLES,
    seed: int = 0,
    name: str = "",
) -> Removal:
    """Weights that carry the target's answers and not the benign ones; arguments as for :func:`score`.

    Args:
        p, q: shares that are spared and taken; None for those that were settled for this model.
    """
    pruning.require_shares(**{name: value for name, value in (("p", p), ("q", q)) if value is not None})
    if p is None or q is None:
        known = shares(lm, suppressed=suppressed)
        p, q = known[0] if p is None else p, known[1] if q is None else q
    prune, preserve = score(lm, target, suppressed=suppressed, domain=domain, n=n, seed=seed)
    mask = pruning.select(prune, preserve, p=p, q=q, name=name or target or suppressed)
    return Removal(prune, preserve, mask, p, q)


# --------------------------------------------------------------------------- choosing p and q


def settle(
    lm: LanguageModel, prune: Scores, preserve: Scores, *, suppressed: str = "harmful", n: int = BRIEF
) -> tuple[Point, list[Point], dict[str, tasks.Marks]]:
    """Choose p and q for a model on discovery requests.

    The largest relative drop of the suppressed procedures among the pairs that cost no benign ability more
    than :data:`MOST_LOST`; among equals the fewest weights.

    Returns:
        The chosen point, all points, and the marks before pruning.
    """
    suite = tasks.suite("discovery", n=n, suppressed=suppressed)
    asked = {name: suite[name] for name in ("suppressed", "served", "facts")}
    before = tasks.sit_all(lm, asked)
    points = frontier.sweep(lm, prune, preserve, asked)
    return frontier.best(points, before, most_lost=MOST_LOST), points, before


def shares(lm: LanguageModel, *, suppressed: str = "harmful") -> tuple[float, float]:
    """The p and q of a model: those that are stored for its weights, or else settled now, once."""
    key = (lm.revision, suppressed)
    if key not in _SETTLED or not lm.revision:  # a model made in memory is not known by it
        known = stored().get(lm.revision)
        if known is None:
            point, _, _ = settle(lm, *score(lm, suppressed=suppressed), suppressed=suppressed)
            known = {"p": point.p, "q": point.q}
        _SETTLED[key] = known["p"], known["q"]
    return _SETTLED[key]


def stored() -> dict[str, dict]:
    """The settled p and q: checksum of the weights -> {"model", "p", "q"}."""
    file = paths.data_dir() / "settings.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def main(argv: Sequence[str] | None = None) -> int:
    """Settle p and q for organisms and store them."""
    parser = argparse.ArgumentParser(prog="python -m harmlens.removal", description=main.__doc__)
    parser.add_argument("names", nargs="+", help="such as organism/sft-0")
    parser.add_argument("--suppressed", choices=("harmful", "harmless"), default="harmful")
    options = parser.parse_args(argv)
    out = stored()
    for name in options.names:
        lm = models.load(name)
        suppressed = options.suppressed
        point, _, _ = settle(lm, *score(lm, suppressed=suppressed), suppressed=suppressed)
        out = {key: entry for key, entry in out.items() if entry["model"] != lm.name}
        out[lm.revision] = {"model": lm.name, "p": point.p, "q": point.q}
        print(f"{lm.name}: p = {point.p:g}, q = {point.q:g}", flush=True)
    out = dict(sorted(out.items(), key=lambda entry: entry[1]["model"]))
    text = json.dumps(out, indent=1) + "\n"
    write_whole(paths.data_dir() / "settings.json", lambda part: part.write_text(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
