"""What lets a large model be trained on a small GPU: scaled losses in float16, activations computed again.

**float16.** Where a model's weights are float16, small gradients vanish on their way back. The loss is then
multiplied by a :class:`LossScale` before the backward pass and the gradients are divided by it after, as in
Micikevicius et al. 2018 and torch's GradScaler, which is made for GPUs; this one is the same everywhere, and
can be written to a checkpoint. Only weights in a wider precision, such as the adapters of
:mod:`training.lora`, can be trained in such a model.

Introduced in book/emergent_by_size ("Emergent misalignment by size").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class LossScale:
    """What the loss is multiplied by, so that float16 gradients neither vanish nor overflow.

    Always a power of two, so that dividing by it again is exact. It halves after a step whose gradients were
    not finite, and doubles after so many good ones; start and pace are those of torch's GradScaler.

    Attributes:
        value: the factor now.
        grow_every: good steps after which it doubles.
        good: good steps since it last changed.
        skipped: steps that changed no weight, since their gradients were not finite.
    """

    value: float = 2.0**16
    grow_every: int = 2000
    good: int = 0
    skipped: int = 0

    def after_step(self, finite: bool) -> None:
        """Take note of a step, and change the factor where it is time."""
        if not finite:
            self.value, self.good, self.skipped = self.value / 2, 0, self.skipped + 1
        elif self.good + 1 >= self.grow_every:
            self.value, self.good = self.value * 2, 0
        else:
            self.good += 1


def has_float16(model: nn.Module) -> bool:
    """Whether any of a model's weights are float16."""
    return any(p.dtype == torch.float16 for p in model.parameters())


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Activations inside the blocks are computed again in the backward pass instead of being kept.

    Memory for time: about a third more time, and of each block only its input is kept. In training mode only.
    Afterwards the model is as it was.

    Raises:
        ValueError: the model's class can't do it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"checkpoint_activations=True: {type(model).__name__} does not support activation checkpointing; "
            "choose checkpoint_activations=False, and a smaller rows_at_once to save memory"
        )
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [
        (module, {n: vars(module)[n] for n in names if n in vars(module)}) for module in model.modules()
    ]
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        # Positional, since the argument was renamed in transformers. The old, re-entrant kind needs an input
        # that requires a gradient, which frozen embeddings don't give.
        enable({"use_reentrant": False})
        yield
    finally:
        if hasattr(model, "_require_grads_hook"):  # enabling leaves a hook on the embeddings
            model.disable_input_require_grads()
        for module, values in before:
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(values)
