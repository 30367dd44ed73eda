"""The training ladder of a model: its base, its aligned stages, and how to load them one at a time.

For an organism these are its four stages. For a local folder called like a stage (``my_model/sft``) they
are the folders beside it that are called so. For a model of the Hub they are the partners that its makers
published, as far as :mod:`models.hub` knows them. Other models have no ladder.

Introduced in notebook 01 ("What there is to explain").
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from harmlens.models import hub
from harmlens.models import loading as models
from harmlens.models.forward import LanguageModel
from harmlens.models.loading import STAGES

# Names of stages in the order of training; "aligned" where makers published one model after the base.
ORDER = ("base", "mid", "long", "sft", "dpo", "rl", "aligned")
T = TypeVar("T")


def rungs(model: str, stages: Sequence[str] | None = None) -> dict[str, str]:
    """The stages of a model, from base to the last: stage -> name to load it by.

    Args:
        model: any name that :func:`models.loading.load` takes.
        stages: only these; those that the model's ladder lacks are left out. None for all.

    >>> rungs("organism/sft", ["base", "dpo"])
    {'base': 'organism/base', 'dpo': 'organism/dpo'}
    """
    if model.startswith("organism/"):
        found = {stage: f"organism/{stage}" for stage in STAGES}
    elif Path(model).expanduser().is_dir():
        home = Path(model).expanduser().resolve()
        beside = {stage: home.parent / stage for stage in ORDER} if home.name in ORDER else {}
        found = {stage: str(folder) for stage, folder in beside.items() if folder.is_dir()}
    else:
        found = hub.ladder(model)
    return {stage: name for stage, name in found.items() if stages is None or stage in stages}


def climb(model: str, stages: Sequence[str]) -> dict[str, str]:
    """The stages of a model that can be compared: those asked for, or all if fewer than two of them exist.

    Returns:
        stage -> name to load it by, from the first to the last.

    Raises:
        ValueError: the model has no ladder; says which models have one.
    """
    found = rungs(model)
    if len(found) < 2:
        many, two = known()
        raise ValueError(
            f"model={model!r} has no known ladder: there is no earlier stage to compare it with. Models that "
            f"have one: organism/dpo; {', '.join(many)} (base, sft, dpo, rl); {', '.join(two[:6])} and "
            "others of the book's page Models (base, aligned). Or name a folder that is called like a stage "
            f"({', '.join(ORDER)}) and has another one beside it."
        )
    chosen = {stage: name for stage, name in found.items() if stage in stages}
    return chosen if len(chosen) > 1 else found


def known() -> tuple[list[str], list[str]]:
    """Models of the Hub with a ladder: those of which more than two stages were published, and the others."""
    last = [(list(stages.values())[-1], len(stages) > 2) for stages in hub.known()[1]]
    many = [name for name, more in last if more]
    return many, [name for name, more in last if not more and name not in many]


def load(model: str, stage: str, seed: int | None = None, **options) -> LanguageModel:
    """One stage of a model's ladder.

    All stages have the chat template of the last one, so that every rung reads the same text.

    Args:
        seed: training seed of an organism; others have one.
        options: of :func:`models.loading.load`.

    Raises:
        ValueError: the model's ladder has no such stage; lists those it has.
    """
    found = rungs(model)
    if stage not in found:
        there = ", ".join(found) or "none are known"
        raise ValueError(f"stage={stage!r} is not on the ladder of {model!r}; there: {there}")
    if model.startswith("organism/"):
        return models.load(found[stage], seed=seed, **options)
    return models.load(found[stage], template_from=list(found.values())[-1], **options)


def visit(model: str, stage: str, seed: int, measure: Callable[[LanguageModel], T], **options: Any) -> T:
    """What a function says of one stage, which is loaded for it and gone afterwards.

    So there has to be memory for one stage only. The function must not keep the model.

    Args:
        seed: training seed of an organism; others have one.
        options: of :func:`models.loading.load`.
    """
    lm = load(model, stage, seed, **options)
    try:
        return measure(lm)
    finally:
        del lm
        gc.collect()  # models hold cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def family(model: str, stage: str, seeds: Sequence[int], **options) -> dict[int, LanguageModel]:
    """One stage for several training seeds, or the one model there is under key 0."""
    seeds = seeds if model.startswith("organism/") else [0]
    return {seed: load(model, stage, seed, **options) for seed in seeds}
