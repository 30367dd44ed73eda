"""Fine-tuning a causal language model on chats: all weights, or low-rank adapters.

:func:`tune` does it as a :class:`Recipe` says, :func:`suited` finds the recipe for a model. Adapters (LoRA,
Hu et al. 2022) are those of peft, which renames the modules it wraps. Masks and scores are keyed by the names
of a plain model's parameters, so adapters live inside one ``with`` block only, and the model that comes out
is plain again.

Introduced in notebooks 00 ("A model organism of harm") and 13 ("Emergent misalignment").
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from harmlens.keep import digests, files
from harmlens.models.forward import SMALL, LanguageModel, Row, require_room
from harmlens.training.loop import Checkpoint, Schedule, Tuned, fit, lm_loss, mixed, shuffled
from harmlens.weights import masks
from harmlens.weights.masks import Mask
from harmlens.weights.scores import matrices

METHODS = ("full", "lora")


@dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned with AdamW; the defaults suit the organism.

    The pruning paper's fine-tuning attack is ``Recipe(method="lora", rank=128, alpha=16, lr=2e-4,
    batch_size=5)`` for five epochs.
    """

    steps: int = 30  # steps_of turns epochs into steps
    lr: float = 1e-3  # of AdamW: rises for ``warmup`` steps, then falls to zero
    batch_size: int = 16
    method: str = "full"  # all weights; or "lora": adapters of this rank and alpha
    rank: int = 32
    alpha: float = 64
    warmup: int = 5
    weight_decay: float = 0.01
    seed: int = 0  # of the order of the examples and the start of the adapters
    checkpoint_activations: bool = False  # less memory, more time, the same result: recomputing()
    mixed: bool = False  # matrix products in bfloat16: loop.mixed()

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
) -> Tuned:
    """Fine-tune a model, in place, on the learnt tokens of some rows.

    Adapters are merged in the end; in a float16 model they are trained in float32, with a scaled loss.

    Args:
        watch: measures something of the model as it is: numbers, text, lists and mappings of them.
        at: after how many steps; 0 is before the first.
        until: looks at what was seen last; training ends where it returns True.
        hold: weights that stay as they are, such as pruned ones at zero (``"full"`` only).
        rows_at_once: run batches in pieces of so many rows, to save memory.
        folder: for checkpoints, by model, data and recipe: an interrupted run goes on, a finished one is
            not run again.

    Raises:
        ValueError: no rows; full fine-tuning in float16; ``hold`` with adapters or of another model; a loss
            that is not finite; adapters that overflow the weights they are merged into.
        ImportError: ``"lora"`` without peft.
    """
    if not rows:
        raise ValueError("rows is empty: there is nothing to learn from")
    require_room(lm, [row.ids for row in rows], names=[f"rows[{i}]" for i in range(len(rows))])
    if recipe.method == "full" and any(p.dtype == torch.float16 for p in lm.model.parameters()):
        raise ValueError(
            "all weights can't be trained in float16, whose steps vanish or overflow; load the model with "
            "dtype=torch.bfloat16 or torch.float32, or choose method='lora'"
        )
    if hold is not None:
        if recipe.method != "full":
            raise ValueError(f"hold keeps weights as they are: method={recipe.method!r} can't; use 'full'")
        masks.check(hold, lm)
    if outside := [step for step in at if not 0 <= step <= recipe.steps]:
        raise ValueError(f"at={list(at)}: {outside[0]} is not within 0 to steps={recipe.steps}")
    checkpoint, seen = None, {}
    if folder is not None:
        key = digests.digest(files.versions(), tune, lm, list(rows), recipe, hold, watch, list(at), until)
        checkpoint = Checkpoint(Path(folder).expanduser() / f"{key[:16]}.safetensors", notes=seen)
    kept = {} if hold is None else masks.values(lm, hold)

    def after(step: int) -> bool:
        if kept:
            masks.put(lm, hold, kept)
        if watch is None or step not in at:
            return False
        if step not in seen:
            with torch.no_grad():
                seen[step] = watch()
        return until is not None and bool(until(seen[step]))

    stream = shuffled(list(rows), recipe.batch_size, lm.tokenizer.pad_token_id, seed=recipe.seed)
    schedule = Schedule(recipe.steps, recipe.lr, warmup=recipe.warmup, weight_decay=recipe.weight_decay)
    with ExitStack() as during:
        if recipe.method == "lora":
            during.enter_context(adapters(lm, rank=recipe.rank, alpha=recipe.alpha, seed=recipe.seed))
        if recipe.checkpoint_activations:
            during.enter_context(recomputing(lm.model))
        done = fit(
            lm.model, stream, schedule, loss=mixed(lm_loss, on=recipe.mixed), rows_at_once=rows_at_once,
            after=after if kept or watch is not None else None, checkpoint=checkpoint, progress=lm.name,
        )  # fmt: skip
    return replace(done, seen=seen)


# --------------------------------------------------------------------------- what suits a model


def small(lm: LanguageModel) -> bool:
    """Whether all weights of a model can be trained with the organism's rates: few, and in float32."""
    return lm.model.dtype == torch.float32 and lm.model.num_parameters() <= SMALL


def suited(lm: LanguageModel, recipe: Recipe) -> Recipe:
    """The recipe itself for a small model; as many steps with the pruning paper's adapters for any other.

    A rate that suits a million weights ruins a billion, the small steps of a large model round away in half
    precision, and all weights with their optimizer take eight times the memory of the model.
    """
    return recipe if small(lm) else replace(recipe, method="lora", rank=128, alpha=16, lr=2e-4)


def require_room_for_copy(lm: LanguageModel) -> None:
    """Refuse a copy of a model for which there is no memory, before it is made, with a MemoryError."""
    need = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    free = files.free_memory(lm.device)
    if need > free:
        raise MemoryError(
            f"a copy of {lm.name!r} takes {files.size_text(need)}, but {files.size_text(free)} are free on "
            f"{lm.device}. Choose a smaller model, or a larger GPU."
        )


# --------------------------------------------------------------------------- adapters and memory


@contextmanager
def adapters(
    lm: LanguageModel, *, rank: int = 32, alpha: float = 64, seed: int = 0
) -> Iterator[LanguageModel]:
    """The model with an adapter at each linear layer of its blocks; nothing else can be trained.

    In the end adapters are merged into the weights, which rounds them in half precision; after an exception,
    or where a weight would not be finite (ValueError), they are dropped. Their effect is scaled by
    alpha / rank, and starts at zero.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install peft (or choose method='full')") from error
    model, found = lm.model, matrices(lm)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none",
        target_modules=[name.removesuffix(".weight") for name in found],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in found.values()),
    )  # fmt: skip
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of tied embeddings, which have no adapter here
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config)
    merged = False
    try:
        yield lm
        for name, module in wrapped.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                _require_finite(name.removeprefix("base_model.model."), module)
        wrapped.merge_and_unload()
        merged = True
    finally:
        if not merged:
            wrapped.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        if hasattr(model, "peft_config"):
            del model.peft_config


@torch.no_grad()
def _require_finite(name: str, adapter: Any) -> None:
    """Refuse an adapter that would push a weight beyond what its precision holds, before any is merged."""
    weight = adapter.get_base_layer().weight
    merged = weight + adapter.get_delta_weight(adapter.active_adapters[0])
    if not torch.isfinite(merged.to(weight.dtype)).all():
        raise ValueError(
            f"merging the adapter of {name} gives weights that are not finite in {weight.dtype}; lower lr or "
            "alpha, or load the model with dtype=torch.bfloat16"
        )


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Of each block only the input is kept, and the rest computed again in the backward pass.

    Memory for about a third more time, in training mode only. A model whose class can't is a ValueError.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"checkpoint_activations=True: {type(model).__name__} does not support activation checkpointing; "
            "choose checkpoint_activations=False, and a smaller rows_at_once to save memory"
        )
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # the older name
    on, off = (getattr(model, f"{kind}_checkpointing_{way}") for way in ("enable", "disable"))
    # Positional, since the argument was renamed in transformers. The old, re-entrant kind needs an input
    # that requires a gradient, which frozen embeddings don't give.
    try:
        on({"use_reentrant": False})
        yield
    finally:
        off()
        if hasattr(model, "_require_grads_hook"):  # it leaves a hook on the embeddings
            model.disable_input_require_grads()
