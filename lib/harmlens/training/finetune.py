"""Fine-tuning a causal language model: all weights, or low-rank adapters.

:func:`tune` fine-tunes any model on chats, as a :class:`Recipe` says. The loop under it,
:func:`training.loop.fit`, also trains the organism; its names can be had from here too.

Introduced in notebook 00 ("A model organism of harm"); :func:`tune` in notebook 13 ("Emergent misalignment").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from harmlens.keep import digests, files
from harmlens.models.forward import (
    LanguageModel,
    Row,
    require_room,
)
from harmlens.training import loop as training
from harmlens.training import lora, lowmemory
from harmlens.training.checkpoints import Checkpoint
from harmlens.training.loop import batches, fit
from harmlens.training.lowmemory import LossScale
from harmlens.weights import masks
from harmlens.weights.masks import Mask

METHODS = ("full", "lora")


@dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned; the defaults suit the organism.

    The pruning paper's emergent misalignment runs, on models of 8 to 32 billion parameters:
    ``Recipe(method="lora", rank=32, alpha=64, lr=1e-5, batch_size=16, warmup=5)`` for one epoch
    (:mod:`training.emergent`); its
    fine-tuning attack: ``Recipe(method="lora", rank=128, alpha=16, lr=2e-4, batch_size=5)`` for five.

    Attributes:
        steps, lr, batch_size, warmup, weight_decay: of AdamW; the rate rises for ``warmup`` steps, then falls
            to zero. :func:`steps_of` turns epochs into steps.
        method: ``"full"`` trains all weights, ``"lora"`` low-rank adapters in all linear layers of the
            blocks.
        rank, alpha: of the adapters.
        seed: of the order of the examples and the start of the adapters.
        checkpoint_activations: keep of each block only its input, and compute the rest again in the backward
            pass: less memory, about a third more time, the same result.
    """

    steps: int = 30
    lr: float = 1e-3
    batch_size: int = 16
    method: str = "full"
    rank: int = 32
    alpha: float = 64
    warmup: int = 5
    weight_decay: float = 0.01
    seed: int = 0
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown; choose 'full' or 'lora'")
        for name in ("steps", "batch_size", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number above 0")


def steps_of(epochs: float, rows: int, batch_size: int) -> int:
    """Steps that go through so many rows so many times, each row once in each.

    >>> steps_of(1, 6000, 16), steps_of(3, 10, 4)
    (375, 9)
    """
    return max(1, math.ceil(epochs * math.ceil(rows / batch_size)))


@dataclass(frozen=True)
class Tuned:
    """What a fine-tuning run leaves, apart from the model.

    Attributes:
        losses: of every step.
        seen: steps done -> what ``watch`` returned then.
        skipped: steps that changed no weight, since float16 gradients overflowed
            (:class:`training.lowmemory.LossScale`). A few at the start are normal.
    """

    losses: list[float]
    seen: dict[int, Any] = field(default_factory=dict)
    skipped: int = 0


def tune(
    lm: LanguageModel,
    rows: Sequence[Row],
    recipe: Recipe = Recipe(),
    *,
    watch: Callable[[], Any] | None = None,
    at: Sequence[int] = (),
    until: Callable[[Any], bool] | None = None,
    hold: Mask | None = None,
    rows_at_once: int | None = None,
    folder: Path | str | None = None,
    every: int = 100,
    progress: str | None = None,
) -> Tuned:
    """Fine-tune a model, in place, on the learnt tokens of some rows.

    Afterwards the model is a plain one again: adapters are merged into its weights. Its ``revision`` is still
    that of the model that was loaded.

    A float16 model keeps its weights as they are; its adapters are trained in float32, with a scaled loss.

    Args:
        rows: such as :func:`chat_row` makes, where only the answer is learnt. They are gone through again and
            again, each row once in each pass, in batches of similar length (:func:`batches`).
        watch: measures something of the model as it is; must return what JSON can hold.
        at: after how many steps; 0 is before the first.
        until: looks at what was seen last; training ends where it returns True.
        hold: weights that stay as they are, such as pruned ones at zero (``"full"`` only).
        rows_at_once: run batches in pieces of so many rows, to save memory; the result is the same.
        folder: where checkpoints go, one file for each model, data and recipe; None for none. An
            interrupted run goes on where it was, a finished one is not run again.
        every: steps between two checkpoints.
        progress: label of a progress bar.

    Raises:
        ValueError: no rows; ``rows_at_once`` below 1; full fine-tuning in float16; ``hold`` with adapters or
            of another model; a loss that is not finite; adapters that overflow the weights they are merged
            into; a model that can't compute activations again. A run that stops leaves its last checkpoint.
        ImportError: ``"lora"`` without peft.
    """
    if not rows:
        raise ValueError("rows is empty: there is nothing to learn from")
    require_room(lm, [row.ids for row in rows], names=[f"rows[{i}]" for i in range(len(rows))])
    training.require_rows(rows_at_once)
    half = lowmemory.has_float16(lm.model)
    if recipe.method == "full" and half:
        raise ValueError(
            "all weights can't be trained in float16, whose steps vanish or overflow; load the model with "
            "dtype=torch.bfloat16 or torch.float32, or choose method='lora'"
        )
    if hold is not None and recipe.method != "full":
        raise ValueError(f"hold keeps weights as they are, which method={recipe.method!r} can't; use 'full'")
    if hold is not None:
        masks.check(hold, lm)
    for step in at:
        if not 0 <= step <= recipe.steps:
            raise ValueError(f"at={list(at)}: {step} is not within 0 to steps={recipe.steps}")
    checkpoint = None
    if folder is not None:
        key = digests.digest(
            files.versions(), digests.code(tune), lm, list(rows), recipe, hold, watch, list(at), until
        )
        checkpoint = Checkpoint(Path(folder).expanduser() / f"{key[:16]}.safetensors", key, every)
    seen: dict[str, Any] = {}
    kept = {} if hold is None else masks.values(lm, hold)

    def look(step: int) -> bool:
        if watch is None or step not in at:
            return False
        if str(step) not in seen:
            with torch.no_grad():
                seen[str(step)] = watch()
        return until is not None and bool(until(seen[str(step)]))

    def start() -> None:
        look(0)

    def after(step: int) -> bool:
        if kept:
            masks.put(lm, hold, kept)
        return look(step)

    stream = batches(list(rows), recipe.batch_size, lm.tokenizer.pad_token_id, seed=recipe.seed)
    scaling = LossScale() if half else None
    with ExitStack() as during:
        if recipe.method == "lora":
            options = {"rank": recipe.rank, "alpha": recipe.alpha, "seed": recipe.seed}
            during.enter_context(lora.adapters(lm, **options))
        if recipe.checkpoint_activations:
            during.enter_context(lowmemory.recomputing(lm.model))
        losses = fit(
            lm.model, stream,
            steps=recipe.steps, lr=recipe.lr, warmup=recipe.warmup, weight_decay=recipe.weight_decay,
            rows_at_once=rows_at_once, before=None if watch is None else start,
            after=after if kept or watch is not None else None, scaling=scaling,
            checkpoint=checkpoint, notes=seen, progress=progress,
        )  # fmt: skip
    skipped = 0 if scaling is None else scaling.skipped
    return Tuned(losses, {int(step): value for step, value in seen.items()}, skipped)
