"""Training a causal language model: one loop for pre-training, fine-tuning and narrow fine-tuning.

:func:`tune` fine-tunes any model on chats, all weights or low-rank adapters, as a :class:`Recipe` says;
:func:`fit` is the loop under it, which also trains the organism.

A *row* is a list of token ids with a list that says which of them are learnt (answer tokens, as a
rule). Batches hold rows of similar length, padded on the right: in a causal model padding behind
the text changes nothing before it, so no attention mask is needed.

Introduced in notebook 00 ("A model organism of harm"); :func:`tune` in notebook 13 ("Emergent misalignment").
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from harmlens import checkpoints, digests, lora, masks
from harmlens.checkpoints import Checkpoint
from harmlens.masks import Mask
from harmlens.models import LanguageModel, Message, render
from harmlens.outcomes import split_tokens

IGNORE = -100
_END = object()


@dataclass(frozen=True)
class Row:
    """Token ids and which of them count in the loss."""

    ids: list[int]
    learn: list[bool]


@dataclass(frozen=True)
class Batch:
    """Rows as one tensor, padded on the right; ``labels`` is IGNORE where nothing is learnt."""

    ids: Int[Tensor, "row pos"]
    labels: Int[Tensor, "row pos"]


def chat_row(
    lm: LanguageModel, messages: Sequence[Message], *, prefill: str | None = None, end: bool = True
) -> Row:
    """One chat as a row: only the last message, the assistant's, is learnt.

    Args:
        prefill: the start of the answer that is given, not learnt.
        end: learn the end-of-answer token too.

    Raises:
        ValueError: the chat does not end with an answer of at least one token.
    """
    *context, last = messages
    if last["role"] != "assistant" or not last["content"].strip():
        raise ValueError("messages must end with a non-empty assistant message")
    answer = last["content"]
    if prefill is not None:
        if not answer.startswith(prefill):
            raise ValueError(f"the answer must begin with prefill={prefill!r}")
        answer = answer[len(prefill) :]
    head, tail = split_tokens(lm, render(lm.tokenizer, context, prefill), answer)
    if end:
        tail = [*tail, lm.tokenizer.eos_token_id]
    elif not answer.strip():
        raise ValueError(f"nothing is left to learn of the answer behind prefill={prefill!r}")
    return Row(head + tail, [False] * len(head) + [True] * len(tail))


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Rows as one batch, padded on the right."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORE)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        labels[i, : len(row.ids)] = torch.where(torch.tensor(row.learn), ids[i, : len(row.ids)], IGNORE)
    return Batch(ids, labels)


def batches(rows: Iterator[Row], size: int, pad_id: int, *, seed: int = 0, pool: int = 16) -> Iterator[Batch]:
    """Batches from an endless stream of rows, grouped by length within pools of ``pool`` batches."""
    rng = random.Random(seed)
    while True:
        drawn = sorted((next(rows) for _ in range(size * pool)), key=lambda row: len(row.ids))
        groups = [drawn[i : i + size] for i in range(0, len(drawn), size)]
        rng.shuffle(groups)
        for group in groups:
            yield collate(group, pad_id)


def epochs(rows: Sequence[Row], seed: int = 0) -> Iterator[Row]:
    """The rows of a data set again and again, in a new order each time."""
    if not rows:
        raise ValueError("rows is empty: there is nothing to learn from")
    rng, order = random.Random(seed), list(rows)
    while True:
        rng.shuffle(order)
        yield from order


def token_losses(
    model: nn.Module, batch: Batch
) -> tuple[Float[Tensor, "row pos1"], Bool[Tensor, "row pos1"]]:
    """Cross-entropy of each next token (0 where not learnt), and where it is learnt."""
    device = model.get_input_embeddings().weight.device
    labels = batch.labels[:, 1:].to(device)
    logits = model(input_ids=batch.ids.to(device), use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses.view_as(labels), labels != IGNORE


def lm_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Mean cross-entropy over the learnt tokens of a batch."""
    losses, learnt = token_losses(model, batch)
    return losses.sum() / learnt.sum()


def pieces(batch: Batch, rows: int | None = None) -> list[tuple[Batch, float]]:
    """A batch in pieces of at most so many rows, each with its share of the learnt tokens.

    The weighted losses of the pieces add up to the loss of the batch, and so do their gradients: memory for
    time.
    """
    if rows is None or rows >= len(batch.ids):
        return [(batch, 1.0)]
    if rows < 1:
        raise ValueError(f"rows_at_once={rows} must be at least 1")
    learnt = (batch.labels[:, 1:] != IGNORE).sum(1)
    parts = [slice(i, i + rows) for i in range(0, len(batch.ids), rows)]
    weights = [float(learnt[part].sum() / learnt.sum()) for part in parts]
    return [
        (Batch(batch.ids[part], batch.labels[part]), weight)
        for part, weight in zip(parts, weights, strict=True)
        if weight
    ]


def fit(
    model: nn.Module,
    stream: Iterable,
    *,
    steps: int,
    lr: float,
    optimizer: str = "adamw",
    loss: Callable[[nn.Module, object], Float[Tensor, ""]] = lm_loss,
    warmup: int = 10,
    clip: float = 1.0,
    weight_decay: float = 0.01,
    rows_at_once: int | None = None,
    after: Callable[[int], bool | None] | None = None,
    checkpoint: Checkpoint | None = None,
    notes: dict[str, Any] | None = None,
    progress: str | None = None,
    line: int = 0,
) -> list[float]:
    """Train all parameters that require gradients, in place; the rate rises, then falls to zero.

    Args:
        stream: of batches; ``loss(model, batch)`` is minimised.
        optimizer: ``"adamw"``, or ``"muon"`` for the matrices of the blocks (AdamW for the rest),
            which needs about half the steps when training from scratch.
        rows_at_once: run a batch of rows in pieces of this size, to save memory; None for all at once.
        after: called after each step with the number of steps done, the model in evaluation mode; training
            ends where it returns True.
        checkpoint: where the run is kept as it goes. A kept one goes on where it was, on the same batches.
        notes: kept with the checkpoint, and read back from it: what ``after`` collects.
        progress: label of a progress bar, shown on a terminal only; None for none.
        line: of the bar, for several that run side by side.

    Returns:
        The loss of every step.

    Raises:
        ValueError: an unknown optimizer, a stream that ends too early, or a loss or gradient that
            is not finite (the model is left as it was after the last good step).
    """
    optimizers = _optimizers(model, optimizer, lr, weight_decay)
    parameters = [p for p in model.parameters() if p.requires_grad]
    history, stream, was_training = [], iter(stream), model.training
    notes = {} if notes is None else notes
    if checkpoint is not None and (known := checkpoints.resume(checkpoint, model, optimizers)):
        history = known["history"]
        notes.update(known["notes"])
        steps = len(history) if known["done"] else steps
    hidden = True if progress is None else None  # None: shown on a terminal, not in a page or a log
    bar = tqdm(
        range(len(history), steps), desc=progress, disable=hidden, mininterval=2.0, position=line, leave=False
    )
    for _ in history if len(history) < steps else ():  # what a resumed run has learnt already
        next(stream, _END)
    model.train()
    try:
        for step in bar:
            factor = min(1.0, (step + 1) / max(1, warmup)) * (1 - step / steps)
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = lr * factor
            batch = next(stream, _END)
            if batch is _END:
                raise ValueError(f"the stream ended after {step} batches, but steps={steps}")
            value = torch.zeros(())
            for piece, weight in pieces(batch, rows_at_once) if rows_at_once else [(batch, 1.0)]:
                part = loss(model, piece) * weight
                part.backward()
                value = value.to(part.device) + part.detach()
            norm = nn.utils.clip_grad_norm_(parameters, clip)
            for what, number in (("loss", value), ("gradient", norm)):
                if not torch.isfinite(number):
                    raise ValueError(
                        f"the {what} is {number.item()} at step {step}: lower lr={lr} or look at the data"
                    )
            for o in optimizers:
                o.step()
                o.zero_grad(set_to_none=True)
            history.append(value.item())
            done = step + 1 == steps
            if after is not None:
                model.eval()
                done = bool(after(step + 1)) or done
                model.train()
            if checkpoint is not None and (done or not (step + 1) % checkpoint.every):
                about = {"history": history, "notes": notes}
                checkpoints.write(checkpoint, model, [] if done else optimizers, {**about, "done": done})
            if done:
                break
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    return history


def _optimizers(model: nn.Module, name: str, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    options = {"lr": lr, "weight_decay": weight_decay}
    if name == "adamw":
        return [torch.optim.AdamW([p for _, p in trained], betas=(0.9, 0.98), **options)]
    if name != "muon":
        raise ValueError(f"optimizer={name!r} is unknown; choose 'adamw' or 'muon'")
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer='muon' needs torch 2.9 or later, this is {torch.__version__}")
    outside = {
        id(p) for e in (model.get_input_embeddings(), model.get_output_embeddings()) for p in e.parameters()
    }
    matrices = [p for _, p in trained if p.ndim == 2 and id(p) not in outside]
    rest = [p for _, p in trained if p.ndim != 2 or id(p) in outside]
    made: list[torch.optim.Optimizer] = []
    if matrices:
        # This scaling makes one learning rate serve both optimizers.
        made.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options))
    if rest:
        made.append(torch.optim.AdamW(rest, betas=(0.9, 0.98), **options))
    return made


# --------------------------------------------------------------------------- fine-tuning

METHODS = ("full", "lora")


@dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned; the defaults suit the organism.

    The pruning paper's emergent misalignment runs, on models of 8 to 32 billion parameters:
    ``Recipe(method="lora", rank=32, alpha=64, lr=1e-5, batch_size=16, warmup=5)`` for one epoch; its
    fine-tuning attack: ``Recipe(method="lora", rank=128, alpha=16, lr=2e-4, batch_size=5)`` for five.

    Attributes:
        steps, lr, batch_size, warmup, weight_decay: of AdamW; the rate rises for ``warmup`` steps, then falls
            to zero. :func:`steps_of` turns epochs into steps.
        method: ``"full"`` trains all weights, ``"lora"`` low-rank adapters in all linear layers of the
            blocks.
        rank, alpha: of the adapters.
        seed: of the order of the examples and the start of the adapters.
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
    """Steps that go through so many rows so many times.

    >>> steps_of(1, 6000, 16)
    375
    """
    return max(1, math.ceil(epochs * rows / batch_size))


@dataclass(frozen=True)
class Tuned:
    """What a fine-tuning run leaves, apart from the model.

    Attributes:
        losses: of every step.
        seen: steps done -> what ``watch`` returned then.
    """

    losses: list[float]
    seen: dict[int, Any] = field(default_factory=dict)


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

    Args:
        rows: such as :func:`chat_row` makes, where only the answer is learnt. They are gone through in a new
            order each time, in batches of similar length.
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
        ValueError: no rows; full fine-tuning in float16; ``hold`` with adapters or of another model; a loss
            that is not finite. A run that stops leaves its last checkpoint.
        ImportError: ``"lora"`` without peft.
    """
    if not rows:
        raise ValueError("rows is empty: there is nothing to learn from")
    if recipe.method == "full" and any(p.dtype == torch.float16 for p in lm.model.parameters()):
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
        key = digests.digest(lm, list(rows), recipe, hold, watch, list(at), until)
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

    def after(step: int) -> bool:
        if kept:
            masks.put(lm, hold, kept)
        return look(step)

    adapted = contextlib.nullcontext()
    if recipe.method == "lora":
        adapted = lora.adapters(lm, rank=recipe.rank, alpha=recipe.alpha, seed=recipe.seed)
    look(0)
    order, pad = epochs(rows, recipe.seed), lm.tokenizer.pad_token_id
    stream = batches(order, recipe.batch_size, pad, seed=recipe.seed)
    with adapted:
        losses = fit(
            lm.model, stream,
            steps=recipe.steps, lr=recipe.lr, warmup=recipe.warmup, weight_decay=recipe.weight_decay,
            rows_at_once=rows_at_once, after=after if kept or watch is not None else None,
            checkpoint=checkpoint, notes=seen, progress=progress,
        )  # fmt: skip
    return Tuned(losses, {int(step): value for step, value in seen.items()})
