"""How cleanly one skill can be removed from a model: the frontier, its area, and the drop at a given price.

The suppressed skill is a set of domains behind the prefilled answer; what is to be kept is a set of harmless
domains, and facts about their items. Harmless requests follow a kind wish (:data:`asking.material.KIND`) at
every stage of the ladder: a base model has not decided yet whether its author is kind, and would give bad
advice half of the time.

Of any other model the suppressed skill is what it answers to harmful requests behind the prefilled words,
whether or not it refuses them when asked plainly, as a base model does not. "Domains" are types of requests
then, None stands for all of them, and no wish comes before.

Scores come from training items, p and q are chosen on discovery items, everything reported is read on
evaluation items.

Introduced in notebook 12 ("What alignment does").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from harmlens.asking import calibration, tasks
from harmlens.asking.material import Material
from harmlens.models.forward import LanguageModel
from harmlens.weights import attribution, frontier, masks
from harmlens.weights.scores import Scores

BENIGN = ("served", "facts")
FEWEST = 4  # requests that rungs are compared on
Domains = Sequence[str] | None


def score(
    lm: LanguageModel, suppressed: Domains, served: Domains, *, source: Material, n: int = 108
) -> tuple[Scores, Scores]:
    """Prune scores of the suppressed skill and preserve scores of what is kept, from training items.

    Args:
        suppressed, served: domains; None for all (not of the fictional world).
        source: what the model is asked; see :func:`asking.material.of`.
        n: at most this many examples of each.
    """
    train = source.skills(suppressed, served, "train", n=source.at_most(n))
    kept = tasks.joined([train[name] for name in BENIGN], "benign")
    return (
        attribution.prune_score(lm, calibration.examples(lm, train["suppressed"], n=n)),
        attribution.preserve_score(lm, calibration.examples(lm, kept, n=n)),
    )


@dataclass(frozen=True)
class Frontier:
    """A model without the weights that each p and q selects. Row 0 of every array is the whole model.

    Attributes:
        p, q, share: of each row, [row]; share is that of the block weights.
        discovery, evaluation: task -> 1 where the answer is exact, or judged harmful
            (:func:`asking.tasks.sit`), [row, item]; what is kept is asked on
            evaluation items with the whole model and in the row of :meth:`best` only, [2, item].
        loss: of the suppressed answers on evaluation items, whole model, nats per token, [item].
        units: names of these items.
    """

    p: np.ndarray
    q: np.ndarray
    share: np.ndarray
    discovery: dict[str, np.ndarray]
    evaluation: dict[str, np.ndarray]
    loss: np.ndarray
    units: Sequence[str] = ()

    def lost(self) -> np.ndarray:
        """Loss of benign ability on discovery items, the mean over procedures and facts, [row]."""
        marks = self.discovery
        return np.mean([marks[k][0].mean() - marks[k].mean(axis=1) for k in BENIGN], axis=0)

    def drop(self, split: str = "discovery") -> np.ndarray:
        """Relative drop of the suppressed skill, [row]."""
        exact = getattr(self, split)["suppressed"].mean(axis=1)
        return 1 - exact / exact[0]

    def best(self, most_lost: float = 0.02) -> int:
        """The row with the largest drop at a benign loss below a bound, on discovery items.

        Of equals, the one with the fewest weights. Removing nothing is always among the choices.
        """
        fair = np.flatnonzero(self.lost() < most_lost)
        return int(min(fair, key=lambda i: (-self.drop()[i], self.share[i])))

    def columns(self, row: int) -> np.ndarray:
        """Exact suppressed answers on evaluation items, whole and pruned, [item, 2]."""
        return self.evaluation["suppressed"][[0, row]].T

    def reached(self, bounds: Sequence[float]) -> np.ndarray:
        """Drop on evaluation items of the row that is best within each bound on the benign loss."""
        drop = self.drop("evaluation")
        return np.array([drop[self.best(bound)] for bound in bounds])


def common(fronts: Mapping[str, Frontier]) -> dict[str, Frontier]:
    """Frontiers on the evaluation items that all of them were asked, in one order, so that they are paired.

    Rungs of one ladder answer different requests behind the prefilled words, unless they are organisms.

    Raises:
        ValueError: fewer than :data:`FEWEST` such items.
    """
    first, *others = (front.units for front in fronts.values())
    shared = [unit for unit in first if all(unit in units for units in others)]
    if len(shared) < FEWEST:
        counts = ", ".join(f"{name} {len(front.units)}" for name, front in fronts.items())
        raise ValueError(
            f"fronts: only {len(shared)} requests are answered at all of them ({counts}), and {FEWEST} are "
            "needed. Give more requests with `data`, or fewer stages."
        )
    out = {}
    for name, front in fronts.items():
        rows = [list(front.units).index(unit) for unit in shared]
        kept = front.evaluation | {"suppressed": front.evaluation["suppressed"][:, rows]}
        out[name] = replace(front, evaluation=kept, loss=front.loss[rows], units=shared)
    return out


def sweep(
    lm: LanguageModel,
    suppressed: Domains,
    served: Domains,
    *,
    source: Material,
    ps: Sequence[float] | None = None,
    qs: Sequence[float] | None = None,
    n: int = 108,
    few: int | None = 24,
    most: int | None = 54,
) -> dict:
    """Score, select for each p and q, and ask: the fields of a :class:`Frontier`.

    Args:
        ps, qs: shares to try; None for the usual ones (:func:`weights.frontier.grid`).
        n: at most this many examples are scored.
        few, most: at most this many discovery and evaluation items of either kind are asked; None for all.
        source: what the model is asked. Take that of the model as it is trained, before it practises.

    Raises:
        ValueError: the model has none of the suppressed skill.
    """
    exam = source.skills(suppressed, served, "discovery", n=few)
    held = source.skills(suppressed, served, n=most)
    prune, preserve = score(lm, suppressed, served, n=n, source=source)
    usual = frontier.grid(prune, source)
    ps, qs = usual["ps"] if ps is None else ps, usual["qs"] if qs is None else qs
    hidden = {"suppressed": held["suppressed"]}
    discovery, evaluation = [tasks.sit_all(lm, exam, source)], [tasks.sit_all(lm, hidden, source)]
    if not evaluation[0]["suppressed"].exact.any():
        raise ValueError(
            f"{lm.name!r} answers nothing of {', '.join(suppressed or ['these requests'])} exactly; nothing "
            "can be lost"
        )
    grid, chosen = [(0.0, 0.0)], [masks.random_like(masks.top(prune, 0.0))]
    spared = {p: masks.top(preserve, p) for p in ps}
    for q in qs:
        taken = masks.top(prune, q, lowest=True)
        for p in ps:
            grid.append((p, q))
            chosen.append(taken - spared[p])
            with masks.without(lm, chosen[-1]):
                discovery.append(tasks.sit_all(lm, exam, source))
                evaluation.append(tasks.sit_all(lm, hidden, source))
    p, q = np.array(grid).T
    found = {
        "p": p, "q": q, "share": np.array([mask.share for mask in chosen]),
        "loss": evaluation[0]["suppressed"].loss, "units": list(held["suppressed"].units),
        "discovery": _exact(discovery), "evaluation": _exact(evaluation),
    }  # fmt: skip
    kept = {name: held[name] for name in BENIGN}
    with masks.without(lm, chosen[Frontier(**found).best()]):
        after = tasks.sit_all(lm, kept)
    found["evaluation"] |= _exact([tasks.sit_all(lm, kept), after])
    return found


def _exact(marks: Sequence[dict[str, tasks.Marks]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name].exact for row in marks]) for name in marks[0]}
