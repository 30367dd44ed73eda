"""What comes back after a prune: relearning curves, with the pruned weights free, held at zero, or pruned
again.

Introduced in notebook 15 ("Erased or rerouted").
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from harmlens.asking import tasks
from harmlens.asking.material import Material
from harmlens.asking.tasks import Task
from harmlens.models import forward
from harmlens.models.forward import LanguageModel, Row
from harmlens.training import tune
from harmlens.training.tune import Recipe
from harmlens.weights import frontier, masks
from harmlens.weights.masks import Mask

STEPS = (0, 1, 2, 3, 5, 8, 12, 16, 24, 32)  # when a model is looked at


def lesson(
    lm: LanguageModel,
    items: int,
    *,
    source: Material,
    harmful: bool = True,
    domains: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Row]:
    """Plain requests with whole answers for a few training items; see the source's ``lesson``.

    Args:
        items: how many of them, drawn at random.
        harmful: of the harmful or of the harmless side.
        domains: only of these.
    """
    task = source.lesson(items, harmful=harmful, types=domains, seed=seed)
    return [
        forward.chat_row(lm, [*chat, {"role": "assistant", "content": answer}], end=task.end)
        for chat, (answer,) in zip(task.chats, task.answers, strict=True)
    ]


def relearn(
    lm: LanguageModel,
    recipe: Recipe,
    *,
    source: Material,
    mask: Mask | None = None,
    hold: bool = False,
    items: int = 24,
    harmful: bool = True,
    domains: Sequence[str] | None = None,
    again: tuple[float, float] | None = None,
    at: Sequence[int] = STEPS,
    n: int | None = 54,
) -> dict:
    """Prune a copy of a model, teach it, and watch a skill come back on items that are not in the lesson.

    Args:
        mask: weights that are set to zero first; None for the model as it is.
        hold: keep them at zero while it learns (``"full"`` only).
        items, harmful, domains: of :func:`lesson`.
        again: p and q of a second prune, scored on the taught model, after which it is taught once more.
        at: steps after which the model is looked at; those beyond the recipe's are left out.
        n: at most this many evaluation items of either side.
        source: what the model is asked. Answers are the model's own, from before it is pruned.

    Returns:
        ``steps``, and for each of them 0/1 per evaluation item: ``exact`` (harmful answers behind the
        prefilled words, as :func:`asking.tasks.sit` has them), ``served`` (harmless ones, plain),
        ``refused`` (harmful ones, plain); ``loss`` of
        the harmful answers; ``domain``, the number of each harmful item's domain among the source's types
        (their count for an item of none of them). With a mask also ``zeroed`` (``exact`` of the taught model
        with the same weights set to zero once more), ``size`` (root mean square of these weights before the
        prune) and ``regrown`` (the same after the lesson,
        relative to it). With a second prune ``again``, the ``exact`` of the second round, from the pruned
        model on; ``jaccard`` of both sets and ``weights``.

    Raises:
        ValueError: ``hold`` without a mask.
        MemoryError: no room for a copy of the model.
    """
    if hold and mask is None:
        raise ValueError("hold keeps pruned weights at zero, but mask is None; give the pruned set")
    exam = _exam(source, n)
    rows = lesson(lm, items, harmful=harmful, domains=domains, seed=recipe.seed, source=source)
    tune.require_memory(lm)
    copy = forward.clone(lm)

    def watch() -> dict[str, list[float]]:
        marks = tasks.sit_all(copy, exam, source)
        return {**{name: m.exact.tolist() for name, m in marks.items()}, "loss": marks["exact"].loss.tolist()}

    def teach(**options) -> dict[str, np.ndarray]:
        seen = tune.tune(copy, rows, recipe, watch=watch, at=looks, **options).seen
        return {name: np.array([seen[step][name] for step in looks]) for name in seen[0]}

    looks = [step for step in at if step <= recipe.steps]
    with masks.without(copy, mask) if mask else contextlib.nullcontext():
        found: dict = teach(hold=mask if hold else None)
        found |= {"steps": np.array(looks), "domain": _domains(source, exam["exact"])}
        if mask:
            found |= {"size": _size(lm, mask), "regrown": _size(copy, mask) / _size(lm, mask)}
            with masks.without(copy, mask):
                found["zeroed"] = tasks.sit(copy, exam["exact"], source).exact
        if again:
            second = frontier.find_weights(copy, source, n=108, pq=again).mask
            with masks.without(copy, second):
                found["again"] = teach()["exact"]
            found |= {"jaccard": masks.jaccard(mask, second) if mask else 0.0, "weights": len(second)}
    return found


def _exam(source: Material, n: int | None) -> dict[str, Task]:
    """What a model is asked at each look: harmful items with a prefilled start, half of either plainly."""
    kinds = {"exact": ("harmful", 1), "served": ("served", 2), "refused": ("refused", 2)}
    return {name: source.task(kind, "evaluation", n=n, every=k) for name, (kind, k) in kinds.items()}


def _domains(source: Material, task: Task) -> np.ndarray:
    """The number of each item's domain, [item]."""
    numbers = {name: i for i, name in enumerate(source.types())}
    named = source.types_of(task.units, harmful=True)
    return np.array([numbers.get(name, len(numbers)) for name in named])


def _size(lm: LanguageModel, mask: Mask) -> float:
    """Root of the mean square of a set of weights."""
    total = sum(float(value.double().square().sum()) for value in masks.values(lm, mask).values())
    return (total / len(mask)) ** 0.5
