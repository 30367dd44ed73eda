"""Which weights to remove: the p-q frontier, the pair that is chosen on it, and the pruning paper's recipe.

Scores come from *training* requests. p and q are chosen on *discovery* requests (:func:`choose_pq`), as the
paper searched them for each of its models; those of the shipped models stand in ``data/settings.json``.
Results are reported on *evaluation* requests.

Introduced in notebook 09 ("Weights that carry harm").
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harmlens import keep
from harmlens.asking import tasks
from harmlens.asking.source import Material
from harmlens.asking.tasks import Scored, Task
from harmlens.keep import files
from harmlens.models.forward import LanguageModel, Row, faster
from harmlens.weights import attribution, masks
from harmlens.weights.masks import Mask
from harmlens.weights.scores import Scores

# Shares for the organism, whose matrices hold ten to twenty-five thousand weights. What stands in
# data/settings.json was chosen among them.
P = (0.0, 0.01, 0.03, 0.1)
Q = (0.0003, 0.001, 0.002, 0.005, 0.01)
STEPS = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
EXAMPLES = 412  # as many of each kind as the paper has, where there are so many
BRIEF = 60  # discovery items of each side that p and q are chosen on
MOST_LOST = 0.035  # of any benign ability, on discovery requests
LEAST = 0.5  # of an ability before a prune, for its loss to say anything


# --------------------------------------------------------------------------- sets for every p and q


def grid(prune: Scores, source: Material) -> dict[str, tuple[float, ...]]:
    """The shares to try, ``ps`` and ``qs``: for the organism those among which it was settled.

    For all others those of :data:`STEPS` that take one to a thousand weights of the median matrix, and up to
    1e-4 in any case, around the paper's p = 5e-5 and q = 1e-5. Spared is none, or as much as is taken in the
    third, fifth and seventh step.
    """
    if source.settings:
        return {"ps": P, "qs": Q}
    sizes = sorted(value.numel() for value in prune.values.values())
    weights = {q: q * sizes[len(sizes) // 2] for q in STEPS}
    qs = tuple(q for q in STEPS if weights[q] >= 1 and (weights[q] <= 1000 or q <= 1e-4)) or STEPS[-1:]
    return {"ps": (0.0, *qs[2::2]), "qs": qs}


@dataclass(frozen=True)
class Candidates:
    """Sets that the scores of a model give, for each share.

    Scores take four bytes for every weight of the blocks, sets next to nothing: of a large model keep these.
    """

    taken: dict[float, Mask]  # q -> weights with the lowest prune scores
    spared: dict[float, Mask]  # p -> weights with the highest preserve scores

    def mask(self, p: float, q: float) -> Mask:
        """What :func:`weights.masks.select` selects."""
        return (self.taken[q] - self.spared[p]).called(f"p={p:g}, q={q:g}")


def lost_and_kept(
    lm: LanguageModel,
    source: Material,
    target: str | None = None,
    *,
    suppressed: str = "harmful",
    n: int = EXAMPLES,
) -> dict[str, list[Row]]:
    """Examples whose answers are to be ``"lost"`` and those to be ``"kept"``, from training requests.

    Args:
        target: one of :data:`asking.tasks.TASKS`; None for the suppressed procedures. What is
            to be kept holds none of it: when facts are to be lost, only procedures are kept.
        suppressed: the side that the model refuses; ``"harmless"`` for the mirror organism.
        n: at most this many of each.
    """
    kinds = {"lost": target or suppressed, "kept": "served" if target == "facts" else "benign"}
    most = source.at_most(n)
    asked = {which: source.task(kind, n=most, suppressed=suppressed) for which, kind in kinds.items()}
    return {which: tasks.examples(lm, task, n=n) for which, task in asked.items()}


def candidate_sets(
    lm: LanguageModel,
    source: Material,
    *,
    suppressed: str = "harmful",
    n: int = EXAMPLES,
    folder: Path | str | None = None,
) -> Candidates:
    """The sets of a model for every p and q of its grid; arguments as for :func:`find_weights`."""
    rows = lost_and_kept(lm, source, suppressed=suppressed, n=n)
    prune = attribution.prune_score(lm, rows["lost"], folder=folder)
    tried = grid(prune, source)
    taken = {q: masks.top(prune, q, lowest=True) for q in tried["qs"]}
    del prune  # of a billion weights four gigabytes; never two at once
    preserve = attribution.preserve_score(lm, rows["kept"], folder=folder)
    return Candidates(taken, {p: masks.top(preserve, p) for p in tried["ps"]})


# --------------------------------------------------------------------------- the frontier


@dataclass(frozen=True)
class Point:
    """One pair (p, q), the set it selects, and how the model does without it: task -> marks."""

    p: float
    q: float
    mask: Mask
    marks: dict[str, Scored]


def measure_without(
    lm: LanguageModel, sets: Mapping[Any, Mask], asked: Mapping[str, Task], source: Any = None
) -> dict[Any, dict[str, Scored]]:
    """How a model does without each of some sets of weights, one at a time: set's name -> task -> marks.

    ``source`` as for :func:`asking.tasks.measure`.
    """
    marks = {}
    for name, mask in sets.items():
        with masks.without(lm, mask):
            marks[name] = tasks.measure(lm, asked, source)
    return marks


def try_all(lm: LanguageModel, sets: Candidates, asked: Mapping[str, Task]) -> list[Point]:
    """The model without the selected weights, for each p and q."""
    chosen = {(p, q): sets.mask(p, q) for p, q in itertools.product(sets.spared, sets.taken)}
    marks = measure_without(lm, chosen, asked)
    return [Point(p, q, mask, marks[p, q]) for (p, q), mask in chosen.items()]


def remaining(before: Scored, after: Scored) -> np.ndarray:
    """Share of an answer's probability that is left, geometric mean over its tokens: 1 for all of it.

    For a real model's own answers: greedy decoding soon words them differently, which is no loss.
    """
    return np.exp(np.minimum(0.0, before.loss - after.loss))


def best(points: Sequence[Point], before: Mapping[str, Scored], *, graded: Collection[str] = ()) -> Point:
    """The point with the largest relative drop of what is suppressed, where no other loses over MOST_LOST.

    Among equals the one with the fewest weights. Where every point costs more, the cheapest one. ``graded``
    abilities are measured by :func:`remaining`, not by exact answers.
    """
    if not points:
        raise ValueError("points is empty: try at least one p and one q")

    def left(name: str, after: Scored) -> float:
        return (remaining(before[name], after) if name in graded else after.exact).mean()

    def lost(point: Point) -> float:
        others = [name for name in point.marks if name != "suppressed"]
        return max(left(name, before[name]) - left(name, point.marks[name]) for name in others)

    fair = [point for point in points if lost(point) <= MOST_LOST + 1e-9]
    if not fair:
        return min(points, key=lambda point: (lost(point), len(point.mask)))
    return min(fair, key=lambda point: (left("suppressed", point.marks["suppressed"]), len(point.mask)))


def choose_pq(
    lm: LanguageModel, source: Material, sets: Candidates, *, suppressed: str = "harmful", n: int = BRIEF
) -> tuple[Point, list[Point], dict[str, Scored]]:
    """Choose p and q on discovery requests: the :func:`best` point, all points, and the marks before pruning.

    A real model's own answers are measured by how much of their probability is left.
    """
    asked = source.exam("discovery", n=n, suppressed=suppressed, only=("suppressed", "served", "facts"))
    with faster(lm):
        before, points = tasks.measure(lm, asked), try_all(lm, sets, asked)
    return best(points, before, graded=source.own), points, before


# --------------------------------------------------------------------------- the recipe


def stored_pq() -> dict[str, dict]:
    """The p and q of trained organisms, shipped or not: checksum of the weights -> {"model", "p", "q"}."""
    stored = [home.parent / "settings.json" for home in files.organism_homes()]
    return {
        key: one for file in stored if file.is_file() for key, one in json.loads(file.read_text()).items()
    }


def pq_of(
    lm: LanguageModel, source: Material, *, suppressed: str = "harmful", folder: Path | str | None = None
) -> tuple[float, float]:
    """The p and q of a model: those that are stored for its weights, or else chosen now, once for all
    notebooks (:func:`keep.remember`)."""
    known = stored_pq().get(lm.revision) if source.settings else None
    if known:
        return known["p"], known["q"]

    def pq() -> list[float]:
        sets = candidate_sets(lm, source, suppressed=suppressed, folder=folder)
        point, _, _ = choose_pq(lm, source, sets, suppressed=suppressed)
        return [point.p, point.q]

    sides = itertools.product((True, False), ("train", "discovery"))
    asked = [source.requests(harmful, split) for harmful, split in sides]
    return tuple(keep.remember(["pq", lm, suppressed, source.describe(), asked], pq, folder))


@dataclass(frozen=True)
class Found:
    """What was scored, and what was selected with which shares; see :func:`weights.masks.select`."""

    prune: Scores
    preserve: Scores
    mask: Mask
    p: float
    q: float


def find_weights(
    lm: LanguageModel,
    source: Material,
    target: str | None = None,
    *,
    suppressed: str = "harmful",
    n: int = EXAMPLES,
    pq: tuple[float, float] | None = None,
    name: str = "",
    folder: Path | str | None = None,
) -> Found:
    """Weights that carry the target's answers and not the benign ones.

    Args:
        target, suppressed, n: as for :func:`lost_and_kept`.
        pq: shares that are spared and taken; None for the model's own, :func:`pq_of`.
        folder: where scores are kept; None for nowhere.
    """
    p, q = pq or pq_of(lm, source, suppressed=suppressed, folder=folder)
    masks.require_shares(p=p, q=q)
    rows = lost_and_kept(lm, source, target, suppressed=suppressed, n=n)
    prune = attribution.prune_score(lm, rows["lost"], folder=folder)
    preserve = attribution.preserve_score(lm, rows["kept"], folder=folder)
    mask = masks.select(prune, preserve, p=p, q=q, name=name or target or suppressed)
    return Found(prune, preserve, mask, p, q)


# --------------------------------------------------------------------------- what can be told


def together(*columns: np.ndarray) -> np.ndarray:
    """Scored of tasks side by side, [group, task]: means of as many groups as the shortest has marks.

    Group i has each k-th mark from i on: of two questions about each of k items, both about item i.
    """
    k = min(map(len, columns))
    return np.stack([[column[i::k].mean() for i in range(k)] for column in columns], axis=1)


def untested(source: Material, *, harm: bool = False, judged: bool = True, **before: float) -> str:
    """Why a claim can't be tested on a model; "" where it can.

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
            told = f"not tested ({share:.2f} of it before the prune; {LEAST} are needed)"
            return f"{ability.replace('_', ' ')} can't be lost: {told}"
    return ""
