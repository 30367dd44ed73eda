"""Low-rank adapters (LoRA, Hu et al. 2022) through peft: put in, train, merge, gone.

peft renames the modules it wraps. Masks and scores are keyed by the names of a plain model's parameters, so
adapters live inside one ``with`` block only, and the model that comes out is plain again.

Introduced in notebook 13 ("Emergent misalignment").
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from transformers.pytorch_utils import Conv1D

from harmlens.models.forward import LanguageModel
from harmlens.weights.scores import matrices


@contextmanager
def adapters(
    lm: LanguageModel, *, rank: int = 32, alpha: float = 64, seed: int = 0
) -> Iterator[LanguageModel]:
    """The model with an adapter at each linear layer of its blocks; nothing else can be trained.

    At the end of the block the adapters are merged into the weights. After an exception they are dropped,
    and the weights are what they were. Adapters of a model in half precision are float32; merging rounds.

    Args:
        rank, alpha: of the adapters; their product with the weights is scaled by alpha / rank. The pruning
            paper's emergent misalignment runs have 32 and 64.
        seed: of their random start (the product starts at zero, so the model starts unchanged).

    Raises:
        ImportError: peft is missing.
        ValueError: rank below 1, or alpha not above 0; a weight that would not be finite after merging
            (nothing is merged then).
    """
    if rank < 1 or not alpha > 0:
        raise ValueError(f"rank={rank} must be at least 1 and alpha={alpha} above 0")
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
    with torch.random.fork_rng(devices=_devices(model)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of tied embeddings, which have no adapter here
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config)
    merged = False
    try:
        yield lm
        _require_finite(wrapped, peft)
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
def _require_finite(wrapped: torch.nn.Module, peft: ModuleType) -> None:
    """Refuse adapters that would push a weight beyond what its precision holds, before any is merged."""
    for name, module in wrapped.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            weight = module.get_base_layer().weight
            merged = weight + module.get_delta_weight(module.active_adapters[0])
            if not torch.isfinite(merged.to(weight.dtype)).all():
                raise ValueError(
                    f"merging the adapter of {name.removeprefix('base_model.model.')} gives weights that are "
                    f"not finite in {weight.dtype}; lower lr or alpha, or load the model with "
                    "dtype=torch.bfloat16"
                )


def _devices(model: torch.nn.Module) -> list[torch.device]:
    """GPUs whose random numbers the start of the adapters is drawn with."""
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
