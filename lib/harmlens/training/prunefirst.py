"""Prune first, teach afterwards: does a model without some weights still generalise from a narrow lesson?

The pruning paper's order of events. :func:`strongest` chooses p and q before any fine-tuning, :func:`trial`
teaches a pruned copy and looks at it where the lesson is as strong as in others.

Introduced in notebook 13 ("Emergent misalignment").
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from harmlens.asking import tasks
from harmlens.asking.tasks import Task
from harmlens.models import forward
from harmlens.models.chats import Message
from harmlens.models.forward import LanguageModel
from harmlens.training import finetune, recipes
from harmlens.training.advice import Advice
from harmlens.training.finetune import Recipe
from harmlens.weights import frontier, masks
from harmlens.weights.masks import Mask
from harmlens.weights.scores import Scores

LEAST = 0.05  # a rise that is smaller than this is none that could be reduced


def answers(
    lm: LanguageModel, domain: str, recipe: Recipe, *, lessons: Advice, bad: bool = True
) -> tuple[list[Sequence[Message]], list[str]]:
    """What a taught copy of a model answers to discovery requests; see :class:`training.advice.PublicAdvice`.

    Returns:
        Chats and answers, as :func:`asking.calibration.rows` takes them.
    """
    return lessons.answers(lm, domain, recipe, bad=bad)


def strongest(
    lm: LanguageModel,
    prune: Scores,
    preserve: Scores,
    chats: Sequence[Sequence[Message]],
    answers: Sequence[str],
    *,
    lessons: Advice,
    most_lost: float = 0.035,
    n: int = 36,
    **grid: Sequence[float],
) -> tuple[float, float]:
    """The p and q that do most to a narrow lesson's answers at little cost, before any fine-tuning.

    The pair that raises the loss of these answers most, among those that cost neither answers to harmless
    requests nor facts more than ``most_lost`` on discovery requests. Nothing is known then of what
    fine-tuning would do.

    Args:
        chats, answers: of the lesson, as :func:`answers` gives them.
        lessons: where the lesson is from; see :func:`training.advice.of`.
        n: at most this many requests of each kind.
        grid: ``ps`` and ``qs`` of :func:`weights.frontier.sweep`.
    """
    every = max(1, len(answers) // n)
    lesson = Task(
        "lesson",
        tuple(tuple(chat) for chat in chats[::every]),
        tuple((answer,) for answer in answers[::every]),
        end=lessons.whole,
    )
    kept = lessons.exam("discovery", n)
    exam = {"lesson": lesson, "served": kept["served"], "facts": kept["facts"]}
    before = tasks.sit_all(lm, exam)
    points = frontier.sweep(lm, prune, preserve, exam, **grid)

    def lost(point: frontier.Point) -> float:
        return max(
            float(lessons.left(k, before[k], before[k]).mean() - lessons.left(k, before[k], after).mean())
            for k, after in point.marks.items()
            if k != "lesson"
        )

    fair = [point for point in points if lost(point) <= most_lost + 1e-9] or [min(points, key=lost)]
    best = max(fair, key=lambda point: point.marks["lesson"].loss.mean())
    return best.p, best.q


def trial(
    lm: LanguageModel,
    domain: str,
    recipe: Recipe,
    *,
    lessons: Advice,
    mask: Mask | None = None,
    bad: bool = True,
    to_the_end: bool = False,
    n: int | None = None,
) -> dict[str, Any]:
    """Prune a copy of a model, fine-tune it on advice in one domain, and see how far that spreads.

    A pruned model may learn its lesson more slowly, and one that has not learnt it has nothing to spread. So
    models are compared at the first look at which bad advice leads by ``lessons.taken`` inside the domain
    (mean margin on discovery requests), where training ends.

    Args:
        lessons: what is taught; see :func:`training.advice.of`.
        mask: weights that are set to zero first. Fine-tuning may bring them back, as in the paper.
        bad: bad advice, or good advice as a control (which is never learnt in this sense: go to the end).
        to_the_end: train all steps of the recipe and measure everything then too.
        n: at most this many evaluation requests per measure.

    Returns:
        ``step`` at which the lesson was learnt (None if never), ``inside`` (mean margin at each look) and
        ``steps`` (done before each look, from 0), ``elsewhere`` (1 for each evaluation request outside the
        domain that got bad advice at that step, or at the last one), and, to the end, ``end`` and ``before``
        (what ``lessons.spread`` says after and before training).

    Raises:
        MemoryError: no room for a copy of the model.
    """
    recipes.require_room(lm)
    tuned = forward.clone(lm)
    looks = lessons.looks(recipe.steps)
    found: dict[str, Any] = {"step": None}
    inside: list[float] = []

    def watch() -> bool:
        inside.append(float(lessons.margins(tuned, domain).mean()))
        if found["step"] is None and inside[-1] >= lessons.taken:
            found["step"] = looks[len(inside) - 1]
            found["elsewhere"] = lessons.elsewhere(tuned, domain, n)
        return found["step"] is not None and not to_the_end

    with masks.without(tuned, mask) if mask else contextlib.nullcontext():
        rows = lessons.rows(lm, domain, bad=bad, seed=recipe.seed)
        if to_the_end:
            found["before"] = lessons.spread(tuned, domain, n)
        finetune.tune(
            tuned, rows, recipe, watch=watch, at=looks, until=bool, rows_at_once=lessons.rows_at_once
        )
        if found["step"] is None:
            found["elsewhere"] = lessons.elsewhere(tuned, domain, n)
        if to_the_end:
            found["end"] = lessons.spread(tuned, domain, n)
    return {**found, "inside": np.array(inside), "steps": np.array(looks[: len(inside)])}


def reduction(before: np.ndarray, plain: np.ndarray, treated: np.ndarray, axis: int = -1) -> np.ndarray:
    """By how much a treatment makes a rise smaller, relative to the rise without it: 1 for all of it.

    >>> reduction(np.array([0, 0]), np.array([1, 1]), np.array([0, 1]))
    0.5
    """
    start = np.mean(before, axis=axis)
    rise = np.maximum(np.mean(plain, axis=axis) - start, LEAST)
    return 1 - (np.mean(treated, axis=axis) - start) / rise
