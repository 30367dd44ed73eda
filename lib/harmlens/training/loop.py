"""The training loop: batches, losses, runs that go on where they were interrupted.

Batches hold rows of similar length, padded on the right: in a causal model padding behind the text changes
nothing before it, so no attention mask is needed.

Introduced in notebook 00 ("A model organism of harm").
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.amp import GradScaler
from tqdm import tqdm

from harmlens.keep import files
from harmlens.models.forward import IGNORE, Batch, Row, collate


def shuffled(
    rows: Sequence[Row] | Iterator[Row], size: int, pad_id: int, *, seed: int = 0, pool: int = 16
) -> Iterator[Batch]:
    """Batches of at most ``size`` rows, grouped by length within pools of ``pool`` batches.

    The rows of a data set are gone through again and again, in a new order each time: each pass holds every
    row once, in ``ceil(rows / size)`` batches whose sizes differ by one at most. A stream is read once.

    Raises:
        ValueError: no rows, or ``size`` or ``pool`` below 1.
    """
    if min(size, pool) < 1:
        raise ValueError(f"size={size}, pool={pool}: both must be at least 1")
    rng = random.Random(seed)
    if isinstance(rows, Sequence):
        pools = _passes(rows, size, pool, seed)
    else:
        pools = iter(lambda: list(itertools.islice(rows, size * pool)), [])
    for drawn in pools:
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


def _parts(rows: list[Row], size: int) -> list[list[Row]]:
    """As few parts of at most ``size`` rows as there can be, as equal as they can be."""
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


def mixed(loss: Callable[..., Tensor], *, on: bool = True) -> Callable[..., Tensor]:
    """The same loss with matrix products in bfloat16; weights and their steps stay in float32."""

    def computed(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
            return loss(model, batch)

    return computed if on else loss


def pieces(batch: Batch, rows: int | None = None) -> list[tuple[Batch, float]]:
    """A batch in pieces of at most so many rows, each with its share of the learnt tokens.

    The losses of the pieces, weighted so, add up to the loss of the batch.
    """
    if rows is None or rows >= len(batch.ids):
        return [(batch, 1.0)]
    learnt, out = (batch.labels[:, 1:] != IGNORE).sum(1), []
    for part in (slice(i, i + rows) for i in range(0, len(batch.ids), rows)):
        if weight := float(learnt[part].sum() / learnt.sum()):
            out.append((Batch(batch.ids[part], batch.labels[part]), weight))
    return out


# --------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a model learns.

    ``"muon"``, for the matrices of the blocks (AdamW for the rest), needs about half the steps when training
    from scratch.
    """

    steps: int
    lr: float  # rises for ``warmup`` steps, then falls to zero
    optimizer: str = "adamw"  # or "muon"
    warmup: int = 10
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is kept, so that an interrupted one goes on where it was: a file of its own."""

    file: Path
    every: int = 100  # steps after which it is written again
    notes: dict[int, Any] = field(default_factory=dict)  # step -> what else is kept, and read back into it


@dataclass(frozen=True)
class Tuned:
    """What a run leaves, apart from the model."""

    losses: list[float]  # of every step
    skipped: int = 0  # steps that changed no weight, since float16 gradients overflowed; a few are normal
    seen: dict[int, Any] = field(default_factory=dict)  # steps done -> what tune.tune's ``watch`` returned


def fit(
    model: nn.Module,
    stream: Iterable,
    schedule: Schedule,
    *,
    loss: Callable[[nn.Module, Any], Float[Tensor, ""]] = lm_loss,
    rows_at_once: int | None = None,
    after: Callable[[int], bool | None] | None = None,
    checkpoint: Checkpoint | None = None,
    progress: str | None = None,
) -> Tuned:
    """Train all parameters that require gradients, in place.

    Where the model has float16 weights, in which small gradients vanish, the loss is scaled (torch.amp).

    Args:
        stream: of batches; ``loss(model, batch)`` is minimised.
        rows_at_once: run a batch in pieces of so many rows, to save memory; None for all at once.
        after: called with the number of steps done, the model in evaluation mode: with 0 before the first
            (not in a run that goes on), then after each. Training ends where it returns True.
        checkpoint: where the run is kept; a kept one goes on where it was, on the same batches.
        progress: label of a progress bar, shown on a terminal only; None for none.

    Raises:
        ValueError: an unknown optimizer, a stream that ends too early, a loss or gradient that is not finite
            (the model is left as it was after the last good step).
    """
    if rows_at_once is not None and rows_at_once < 1:
        raise ValueError(f"rows_at_once={rows_at_once} must be at least 1, or None for all rows at once")
    steps, lr, was_training = schedule.steps, schedule.lr, model.training
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = _optimizers(model, parameters, schedule)
    half = any(p.dtype == torch.float16 for p in model.parameters())
    scaler = GradScaler(parameters[0].device.type, enabled=half)
    history, skipped = [], 0
    if checkpoint is not None and (known := _resume(checkpoint, model, optimizers)):
        history, skipped = known["history"], known["skipped"]
        checkpoint.notes.update(known["notes"])
        if known["scaling"]:
            scaler.load_state_dict(known["scaling"])
        steps = len(history) if known["done"] else steps
    hidden = True if progress is None else None  # None: shown on a terminal, not in a page or a log
    bar = tqdm(range(len(history), steps), desc=progress, disable=hidden, mininterval=2.0, leave=False)
    learnt = len(history) if len(history) < steps else 0  # batches that a resumed run is done with
    try:
        if after is not None and not history:
            model.eval()
            after(0)
        model.train()
        for step, batch in zip(bar, itertools.islice(stream, learnt, None), strict=False):
            rate = lr * min(1.0, (step + 1) / max(1, schedule.warmup)) * (1 - step / steps)
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = rate
            value = torch.zeros(())
            for piece, weight in pieces(batch, rows_at_once):
                part = loss(model, piece) * weight
                scaler.scale(part).backward()
                value = value.to(part.device) + part.detach()
            for o in optimizers:
                scaler.unscale_(o)
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            good = bool(torch.isfinite(norm))
            for what, number in (("loss", value), ("gradient", norm)):
                # A gradient that overflowed may do so no longer with a smaller scale; a loss would.
                hopeless = what == "loss" or scaler.get_scale() <= 1
                if hopeless and not torch.isfinite(number):
                    raise ValueError(
                        f"the {what} is {number.item()} at step {step}: lower lr={lr} or look at the data"
                    )
            for o in optimizers:
                if good:
                    o.step()
                o.zero_grad(set_to_none=True)
            scaler.update()
            skipped += not good
            history.append(value.item())
            done = step + 1 == steps
            if after is not None:
                model.eval()
                done = bool(after(step + 1)) or done
                model.train()
            if checkpoint is not None and (done or not (step + 1) % checkpoint.every):
                about = {"history": history, "skipped": skipped, "scaling": scaler.state_dict(), "done": done}
                _write(checkpoint, model, [] if done else optimizers, about)
            if done:
                break
        else:
            if len(history) < steps:
                raise ValueError(f"the stream ended after {len(history)} batches, but steps={steps}")
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    return Tuned(history, skipped)


def _optimizers(
    model: nn.Module, parameters: list[nn.Parameter], schedule: Schedule
) -> list[torch.optim.Optimizer]:
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    if schedule.optimizer not in ("adamw", "muon"):
        raise ValueError(f"optimizer={schedule.optimizer!r} is unknown; choose 'adamw' or 'muon'")
    options, matrices = {"lr": schedule.lr, "weight_decay": schedule.weight_decay}, []
    if schedule.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer='muon' needs torch 2.9 or later, this is {torch.__version__}")
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        outside = {id(p) for end in ends for p in end.parameters()}
        matrices = [p for p in parameters if p.ndim == 2 and id(p) not in outside]
    inside = set(map(id, matrices))
    rest = [p for p in parameters if id(p) not in inside]
    # This scaling makes one learning rate serve both optimizers.
    made = [torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)] if matrices else []
    return [*made, torch.optim.AdamW(rest, betas=(0.9, 0.98), **options)] if rest else made


# --------------------------------------------------------------------------- runs that are kept


def _write(
    to: Checkpoint, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], about: dict[str, Any]
) -> None:
    """Write the state of a run, whole or not at all. Without optimizers it is a finished one."""
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for number, optimizer in enumerate(optimizers):
        for place, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer/{number}/{place}/{name}"] = torch.as_tensor(value)
    files.write_tensors(to.file, tensors, {**about, "notes": to.notes})


def _resume(
    at: Checkpoint, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any] | None:
    """Put a kept run's state back, in place; returns what is known of it, or None where nothing is kept.

    A damaged file is named and counts as none: the run then starts from its beginning.
    """
    if not at.file.is_file():
        return None
    try:
        about, tensors = files.read_tensors(at.file)
    except Exception as error:  # a spoilt file raises whatever its parser raises
        warnings.warn(f"{at.file.name!r} is damaged ({error}); the run starts anew", stacklevel=3)
        return None
    parameters = dict(model.named_parameters())
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    with torch.no_grad():
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "model":
                parameters[rest].copy_(value)
            else:
                number, place, what = rest.split("/")
                states[int(number)].setdefault(int(place), {})[what] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        if state:  # a finished run has none
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
    about["notes"] = {int(step): note for step, note in about["notes"].items()}  # JSON has text as keys
    return about
