"""The training loop: rows, batches, losses, and what a run needs besides.

A *row* is a list of token ids with a list that says which of them are learnt (answer tokens, as a
rule). Batches hold rows of similar length, padded on the right: in a causal model padding behind
the text changes nothing before it, so no attention mask is needed.

Introduced in notebook 00 ("A model organism of harm").
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm import tqdm

from harmlens.models.forward import IGNORE, Batch, Row, collate
from harmlens.training import checkpoints
from harmlens.training.checkpoints import Checkpoint
from harmlens.training.lowmemory import LossScale, has_float16

_END = object()


def batches(
    rows: Sequence[Row] | Iterator[Row], size: int, pad_id: int, *, seed: int = 0, pool: int = 16
) -> Iterator[Batch]:
    """Batches of at most ``size`` rows, grouped by length within pools of ``pool`` batches.

    Args:
        rows: of a data set, which are gone through again and again, in a new order each time: each pass holds
            every row once, in ``ceil(rows / size)`` batches whose sizes differ by one at most. Or a stream,
            which is read once.

    Raises:
        ValueError: no rows, or ``size`` or ``pool`` below 1.
    """
    if min(size, pool) < 1:
        raise ValueError(f"size={size}, pool={pool}: both must be at least 1")
    rng = random.Random(seed)
    for drawn in _passes(rows, size, pool, seed) if isinstance(rows, Sequence) else _pools(rows, size * pool):
        groups = _parts(sorted(drawn, key=lambda row: len(row.ids)), size)
        rng.shuffle(groups)
        for group in groups:
            yield collate(group, pad_id)


def _passes(rows: Sequence[Row], size: int, pool: int, seed: int) -> Iterator[list[Row]]:
    """Pools of an endless number of passes; none reaches over the end of its pass."""
    if not rows:
        raise ValueError("rows is empty: there is nothing to learn from")
    rng, order = random.Random(seed), list(rows)
    while True:
        rng.shuffle(order)
        parts = _parts(order, size)
        for i in range(0, len(parts), pool):
            yield [row for part in parts[i : i + pool] for row in part]


def _pools(rows: Iterator[Row], most: int) -> Iterator[list[Row]]:
    while drawn := list(itertools.islice(rows, most)):
        yield drawn


def _parts(rows: list[Row], size: int) -> list[list[Row]]:
    """Rows in as few parts of at most ``size`` as there can be, as equal as they can be."""
    n = -(-len(rows) // size)
    return [rows[i * len(rows) // n : (i + 1) * len(rows) // n] for i in range(n)]


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
    require_rows(rows)
    if rows is None or rows >= len(batch.ids):
        return [(batch, 1.0)]
    learnt = (batch.labels[:, 1:] != IGNORE).sum(1)
    parts = [slice(i, i + rows) for i in range(0, len(batch.ids), rows)]
    weights = [float(learnt[part].sum() / learnt.sum()) for part in parts]
    return [
        (Batch(batch.ids[part], batch.labels[part]), weight)
        for part, weight in zip(parts, weights, strict=True)
        if weight
    ]


def require_rows(rows_at_once: int | None) -> None:
    """Refuse a number of rows below 1; None stands for all."""
    if rows_at_once is not None and rows_at_once < 1:
        raise ValueError(f"rows_at_once={rows_at_once} must be at least 1, or None for all rows at once")


# --------------------------------------------------------------------------- the loop


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
    before: Callable[[], None] | None = None,
    after: Callable[[int], bool | None] | None = None,
    scaling: LossScale | None = None,
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
        before: called before the first step, the model in evaluation mode; not in a run that goes on.
        after: called after each step with the number of steps done, the model in evaluation mode; training
            ends where it returns True.
        scaling: of the loss; it is changed in place, and says how many steps were skipped. Default: a new one
            where the model has float16 weights, none elsewhere.
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
    require_rows(rows_at_once)
    optimizers = _optimizers(model, optimizer, lr, weight_decay)
    parameters = [p for p in model.parameters() if p.requires_grad]
    history, stream, was_training = [], iter(stream), model.training
    notes = {} if notes is None else notes
    if scaling is None and has_float16(model):
        scaling = LossScale()
    if checkpoint is not None and (known := checkpoints.resume(checkpoint, model, optimizers)):
        history = known["history"]
        notes.update(known["notes"])
        if scaling is not None and known.get("scaling"):
            vars(scaling).update(known["scaling"])
        steps = len(history) if known["done"] else steps
    hidden = True if progress is None else None  # None: shown on a terminal, not in a page or a log
    bar = tqdm(
        range(len(history), steps), desc=progress, disable=hidden, mininterval=2.0, position=line, leave=False
    )
    for _ in history if len(history) < steps else ():  # what a resumed run has learnt already
        next(stream, _END)
    try:
        if before is not None and not history:
            model.eval()
            before()
        model.train()
        for step in bar:
            rate = lr * min(1.0, (step + 1) / max(1, warmup)) * (1 - step / steps)
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = rate
            batch = next(stream, _END)
            if batch is _END:
                raise ValueError(f"the stream ended after {step} batches, but steps={steps}")
            value = torch.zeros(())
            factor = 1.0 if scaling is None else scaling.value
            for piece, weight in [(batch, 1.0)] if rows_at_once is None else pieces(batch, rows_at_once):
                part = loss(model, piece) * weight
                (part if scaling is None else part * factor).backward()
                value = value.to(part.device) + part.detach()
            if scaling is not None:
                for p in parameters:
                    if p.grad is not None:
                        p.grad.div_(factor)
            norm = nn.utils.clip_grad_norm_(parameters, clip)
            good = bool(torch.isfinite(norm))
            for what, number in (("loss", value), ("gradient", norm)):
                # A gradient that overflowed may do so no longer with a smaller scale; a loss would.
                hopeless = what == "loss" or scaling is None or scaling.value <= 1
                if hopeless and not torch.isfinite(number):
                    raise ValueError(
                        f"the {what} is {number.item()} at step {step}: lower lr={lr} or look at the data"
                    )
            for o in optimizers:
                if good:
                    o.step()
                o.zero_grad(set_to_none=True)
            if scaling is not None:
                scaling.after_step(good)
            history.append(value.item())
            done = step + 1 == steps
            if after is not None:
                model.eval()
                done = bool(after(step + 1)) or done
                model.train()
            if checkpoint is not None and (done or not (step + 1) % checkpoint.every):
                about = {"history": history, "notes": notes}
                about |= {"scaling": asdict(scaling)} if scaling is not None else {}
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
