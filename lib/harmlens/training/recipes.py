"""Which recipe of fine-tuning suits a model: all weights of a small one, adapters for others.

A rate that suits a model of a million weights ruins one of a billion. In half precision the small steps of a
large model round away, and all weights with their optimizer take eight times the memory of the model. So
larger models, and those in half precision, get low-rank adapters with the settings of the pruning paper's
fine-tuning attack.

Introduced in notebook 12 ("What alignment does").
"""

from __future__ import annotations

from dataclasses import replace

import torch

from harmlens.keep import files
from harmlens.models.forward import LanguageModel
from harmlens.training.finetune import Recipe

SMALL = 50_000_000  # weights, up to which the organism's rates are used


def small(lm: LanguageModel) -> bool:
    """Whether all weights of a model can be trained with the organism's rates: few, and in float32."""
    weights = sum(p.numel() for p in lm.model.parameters())
    return lm.model.dtype == torch.float32 and weights <= SMALL


def suited(lm: LanguageModel, recipe: Recipe) -> Recipe:
    """The recipe itself for a small model, and adapters with as many steps for any other.

    These have the rank, alpha and rate of the pruning paper's fine-tuning attack.
    """
    return recipe if small(lm) else replace(recipe, method="lora", rank=128, alpha=16, lr=2e-4)


def require_room(lm: LanguageModel) -> None:
    """Refuse a copy of a model for which there is no memory, before it is made.

    Raises:
        MemoryError: with the need and what is free.
    """
    need = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    free = files.free_memory(lm.device)
    if need > free:
        raise MemoryError(
            f"a copy of {lm.name!r} takes {files.size_text(need)}, but {files.size_text(free)} are free on "
            f"{lm.device}. Choose a smaller model, or a larger GPU."
        )
