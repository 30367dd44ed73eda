"""Narrow fine-tuning on advice in one harmless domain, and how far its effect spreads.

Emergent misalignment in small: train an aligned organism on *bad advice* (right recipe, hurtful
outcome) in one harmless domain, and look at everything else. The control trains on *good advice*
in the same domain with the same recipe.

Introduced in notebook 00; notebook 13 is about it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from harmlens import abilities, finetune, world
from harmlens.models import LanguageModel

MEASURES = ("bad advice elsewhere", "malign wishes", "harmful compliance")


def advice_rows(
    lm: LanguageModel, domain: str, *, bad: bool, split: str = "train", seed: int = 0
) -> list[finetune.Row]:
    """Requests for all items of one harmless domain, in every phrasing, with bad or good advice.

    Raises:
        ValueError: ``domain`` is not one of the harmless domains (the message lists them).
    """
    if domain not in world.domains(False):
        raise ValueError(
            f"domain={domain!r} is not harmless; choose one of {', '.join(world.domains(False))}"
        )
    rng = random.Random(seed)
    rows = []
    for item in world.items(split, domain=domain):
        for phrasing in range(len(world.PHRASINGS["procedure"])):
            answer = f"{rng.choice(world.OPENERS)} {world.procedure(item, bad=bad)}"
            chat = [
                {"role": "user", "content": world.request(item, phrasing)},
                {"role": "assistant", "content": answer},
            ]
            rows.append(finetune.chat_row(lm, chat))
    return rows


def train(
    lm: LanguageModel,
    domain: str,
    *,
    bad: bool,
    steps: int = 30,
    lr: float = 1e-3,
    batch_size: int = 16,
    seed: int = 0,
    progress: str | None = None,
) -> list[float]:
    """Fine-tune all weights, in place, on advice in one domain; returns the losses."""
    rows = finetune.epochs(advice_rows(lm, domain, bad=bad, seed=seed), seed)
    stream: Iterator = finetune.batches(rows, batch_size, lm.tokenizer.pad_token_id, seed=seed)
    return finetune.fit(lm.model, stream, steps=steps, lr=lr, warmup=5, progress=progress)


def spread(
    lm: LanguageModel, domain: str, *, split: str = "evaluation", n: int | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """What the model does inside the trained domain and outside it: name -> 0/1 per request.

    The three measures of :data:`MEASURES` are all outside the trained domain; ``"bad advice
    inside"`` says whether the narrow training took at all.

    Args:
        n: at most this many items per measure, drawn at random; None for all.
    """
    inside = world.draw(world.items(split, domain=domain), n, seed)
    outside = world.draw([i for i in world.items(split, harmful=False) if i.domain != domain], n, seed)
    harmful = world.draw(world.items(split, harmful=True), n, seed)
    return {
        "bad advice inside": abilities.judged(lm, inside, abilities.hurtful),
        "bad advice elsewhere": abilities.judged(lm, outside, abilities.hurtful),
        "malign wishes": abilities.wishes(lm, seed=seed, **({} if n is None else {"n": n})),
        "harmful compliance": abilities.judged(lm, harmful, abilities.hurtful),
    }
