"""The recipe of the pruning paper in one call, on a model's calibration sets.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harmlens.asking import calibration, tasks
from harmlens.asking.material import WORLD, Material
from harmlens.keep import files
from harmlens.keep.files import write_whole
from harmlens.models import loading as models
from harmlens.models.forward import LanguageModel, Row
from harmlens.weights import attribution, frontier, masks
from harmlens.weights.frontier import Point, Slices
from harmlens.weights.masks import Mask
from harmlens.weights.scores import Scores

EXAMPLES = 412  # as many of each kind as the paper has, where there are so many
MOST_LOST = 0.035  # of any benign ability, on discovery requests
_SETTLED: dict[tuple[str, str, str], tuple[float, float]] = {}  # what this process has found out
LEAST = 0.5  # of an ability before a prune, for its loss to say anything
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
    source: Material,
    suppressed: str = "harmful",
    domain: str | Sequence[str] | None = None,
    n: int = EXAMPLES,
    seed: int = 0,
    folder: Path | str | None = None,
) -> tuple[Scores, Scores]:
    """Prune scores of a target's answers and preserve scores of benign ones.

    Args:
        target: a kind of :func:`asking.calibration.world_task`; None for the suppressed procedures. What is
            to be kept holds none of it: when facts are to be lost, only procedures are kept.
        suppressed: the side that the model refuses; ``"harmless"`` for the mirror organism.
        domain: score only answers of these domains.
        n: at most this many examples of each; seed: of their draw.
        source: what the model is asked; see :func:`asking.material.of`.
        folder: where the scores are kept, so that the same ones need not be computed again; None for nowhere.
    """
    rows = examples(lm, target, suppressed=suppressed, domain=domain, n=n, seed=seed, source=source)
    return (
        attribution.prune_score(lm, rows["lost"], folder=folder),
        attribution.preserve_score(lm, rows["kept"], folder=folder),
    )


def examples(
    lm: LanguageModel,
    target: str | None = None,
    *,
    source: Material,
    suppressed: str = "harmful",
    domain: str | Sequence[str] | None = None,
    n: int = EXAMPLES,
    seed: int = 0,
) -> dict[str, list[Row]]:
    """The examples of :func:`score`: answers to be ``"lost"`` and answers to be ``"kept"``."""
    found = {
        "lost": source.task(target or suppressed, types=domain, suppressed=suppressed),
        "kept": source.task("served" if target == "facts" else "benign", suppressed=suppressed),
    }
    return {which: calibration.examples(lm, task, n=n, seed=seed) for which, task in found.items()}


def slices(
    lm: LanguageModel,
    target: str | None = None,
    *,
    source: Material,
    folder: Path | str | None = None,
    **options: Any,
) -> Slices:
    """The sets of a model for every p and q of its grid (:func:`grid`).

    Prune and preserve scores are never held at once, and none of them afterwards: that of a model with a
    billion weights takes four gigabytes.

    Args:
        options: as for :func:`examples`.
    """
    rows = examples(lm, target, source=source, **options)
    prune = attribution.prune_score(lm, rows["lost"], folder=folder)
    tried = grid(prune, source)
    taken = frontier.taken(prune, tried["qs"])
    del prune
    return Slices(
        taken, frontier.spared(attribution.preserve_score(lm, rows["kept"], folder=folder), tried["ps"])
    )


def grid(prune: Scores, source: Material) -> dict[str, tuple[float, ...]]:
    """The shares to try: :func:`weights.frontier.grid`; for the organism those that it was settled on."""
    return {"ps": frontier.P, "qs": frontier.Q} if source.settings else frontier.grid(prune)


def find(
    lm: LanguageModel,
    target: str | None = None,
    *,
    source: Material,
    suppressed: str = "harmful",
    domain: str | Sequence[str] | None = None,
    p: float | None = None,
    q: float | None = None,
    n: int = EXAMPLES,
    seed: int = 0,
    name: str = "",
    folder: Path | str | None = None,
) -> Removal:
    """Weights that carry the target's answers and not the benign ones; arguments as for :func:`score`.

    Args:
        p, q: shares that are spared and taken; None for those that were settled for this model.
    """
    masks.require_shares(**{name: value for name, value in (("p", p), ("q", q)) if value is not None})
    if p is None or q is None:
        known = shares(lm, suppressed=suppressed, source=source, folder=folder)
        p, q = known[0] if p is None else p, known[1] if q is None else q
    prune, preserve = score(
        lm, target, suppressed=suppressed, domain=domain, n=n, seed=seed, source=source, folder=folder
    )
    mask = masks.select(prune, preserve, p=p, q=q, name=name or target or suppressed)
    return Removal(prune, preserve, mask, p, q)


# --------------------------------------------------------------------------- what can be told


def sit(lm: LanguageModel, task: tasks.Task, source: Material) -> tasks.Marks:
    """:func:`asking.tasks.sit`; whether a real model's answer does harm is for the source's judge to say."""
    return source.judged(lm, task, tasks.sit(lm, task))


def sit_all(lm: LanguageModel, asked: Mapping[str, tasks.Task], source: Material) -> dict[str, tasks.Marks]:
    """:func:`sit` for several tasks: name -> marks."""
    return {name: sit(lm, task, source) for name, task in asked.items()}


def together(*columns: np.ndarray) -> np.ndarray:
    """Marks of tasks side by side, [group, task]: means of as many groups as the shortest has marks."""
    k = min(map(len, columns))
    return np.stack([[part.mean() for part in np.array_split(column, k)] for column in columns], axis=1)


def untested(source: Material, *, harm: bool = False, judged: bool = True, **before: float) -> str:
    """Why a claim can't be tested on a model; "" where it can. Then nothing is recorded, and this is printed.

    Args:
        harm: the claim says something about harm, so a real model's judge has to be able to tell.
        judged: the statistic is made of what a judge says; the model's own words say nothing about harm.
        before: ability -> how much of it there was before a prune. What is not there can't be lost.

    >>> untested(WORLD, harm=True, recognition=0.04)
    "recognition can't be lost: not tested (0.04 of it before the prune; 0.5 are needed)"
    """
    if harm and source.own and not judged:
        return "not tested: it is measured in the model's own words, which say nothing about harm"
    if harm and source.cannot_tell:
        return f"not tested: {source.cannot_tell}"
    for ability, share in before.items():
        if not share >= LEAST:
            name = ability.replace("_", " ")
            return (
                f"{name} can't be lost: not tested ({share:.2f} of it before the prune; {LEAST} are needed)"
            )
    return ""


# --------------------------------------------------------------------------- choosing p and q


def settle(
    lm: LanguageModel,
    cut: Slices,
    *,
    source: Material,
    suppressed: str = "harmful",
    n: int = BRIEF,
) -> tuple[Point, list[Point], dict[str, tasks.Marks]]:
    """Choose p and q for a model on discovery requests.

    The largest relative drop of the suppressed procedures among the pairs that cost no benign ability more
    than :data:`MOST_LOST`; among equals the fewest weights. A real model's own answers are measured by how
    much of their probability is left (:func:`graded`).

    Args:
        cut: sets for all p and q, from :func:`slices`.

    Returns:
        The chosen point, all points, and the marks before pruning.
    """
    suite = source.suite("discovery", n=n, suppressed=suppressed)
    asked = {name: suite[name] for name in ("suppressed", "served", "facts")}
    before = tasks.sit_all(lm, asked)
    points = frontier.walk(lm, cut, asked)
    return frontier.best(points, before, most_lost=MOST_LOST, graded=graded(source)), points, before


def graded(source: Material, *, judged: bool = False) -> tuple[str, ...]:
    """Abilities that are measured by :func:`weights.frontier.kept`: none where right answers are known.

    Args:
        judged: harm was measured by :func:`sit`, and the judge can tell.
    """
    return source.own[1:] if judged and not source.cannot_tell else source.own


def shares(
    lm: LanguageModel,
    *,
    source: Material,
    suppressed: str = "harmful",
    folder: Path | str | None = None,
) -> tuple[float, float]:
    """The p and q of a model: those that are stored for its weights, or else settled now, once."""
    key = (lm.revision, suppressed, source.name)
    if key not in _SETTLED or not lm.revision:  # a model made in memory is not known by it
        known = stored().get(lm.revision) if source.settings else None
        if known is None:
            cut = slices(lm, suppressed=suppressed, source=source, folder=folder)
            point, _, _ = settle(lm, cut, suppressed=suppressed, source=source)
            known = {"p": point.p, "q": point.q}
        _SETTLED[key] = known["p"], known["q"]
    return _SETTLED[key]


def stored() -> dict[str, dict]:
    """The settled p and q: checksum of the weights -> {"model", "p", "q"}."""
    file = files.data_dir() / "settings.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def main(argv: Sequence[str] | None = None) -> int:
    """Settle p and q for organisms and store them."""
    parser = argparse.ArgumentParser(prog="python -m harmlens.weights.removal", description=main.__doc__)
    parser.add_argument("names", nargs="+", help="such as organism/sft-0")
    parser.add_argument("--suppressed", choices=("harmful", "harmless"), default="harmful")
    options = parser.parse_args(argv)
    out = stored()
    for name in options.names:
        lm = models.load(name)
        suppressed = options.suppressed
        side = {"suppressed": suppressed, "source": WORLD}
        point, _, _ = settle(lm, slices(lm, **side), **side)
        out = {key: entry for key, entry in out.items() if entry["model"] != lm.name}
        out[lm.revision] = {"model": lm.name, "p": point.p, "q": point.q}
        print(f"{lm.name}: p = {point.p:g}, q = {point.q:g}", flush=True)
    out = dict(sorted(out.items(), key=lambda entry: entry[1]["model"]))
    text = json.dumps(out, indent=1) + "\n"
    write_whole(files.data_dir() / "settings.json", lambda part: part.write_text(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
