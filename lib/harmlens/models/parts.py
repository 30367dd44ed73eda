"""The parts of any Hugging Face decoder: its blocks, their attention and MLP, the head that reads them out.

They are found by structure: nothing here knows the name of a model. What a model does not have is reported by
name.

Introduced in notebook 02 ("Layers").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harmlens.models.forward import LanguageModel

_ATTENTION = ("self_attn", "attention", "attn", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_PROJECTION = (
    "o_proj", "out_proj", "dense", "c_proj", "wo", "down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2",
)  # fmt: skip


@dataclass(frozen=True)
class Stack:
    """The parts of a decoder."""

    model: nn.Module
    base: nn.Module  # holds the blocks
    blocks: tuple[nn.Module, ...]
    norm: nn.Module | None  # of the stream behind the last block
    head: nn.Module
    soft_cap: float | None  # of the logits
    plain_head: bool  # whether rows of the head give the logits of their words, nothing else done to them

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def width(self) -> int:
        return self.model.get_input_embeddings().weight.shape[1]


def stack(lm: LanguageModel) -> Stack:
    """The decoder stack of a model; a ValueError where it has no list of blocks, or takes no full mask."""
    kind = getattr(lm.model.config, "_attn_implementation", None)
    if kind not in (None, "sdpa", "eager"):
        raise ValueError(
            f"{lm.name!r} has attn_implementation={kind!r}, which takes no full mask, so blocks can't be run "
            "in part; call lm.model.set_attn_implementation('sdpa')"
        )
    (base, listed), width = body(lm), lm.model.get_input_embeddings().weight.shape[1]
    norms = [m for m in base.children() if "norm" in type(m).__name__.lower()]
    norms = [m for m in norms if all(p.shape == (width,) for p in m.parameters())]  # of the stream
    head = lm.model.get_output_embeddings()
    cap = getattr(lm.model.config.get_text_config(), "final_logit_softcapping", None)
    found = Stack(lm.model, base, tuple(listed), norms[-1] if norms else None, head, cap, True)
    # A few rows of the head are cheaper than all of it, where the head is all that there is.
    with torch.no_grad():
        probe = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
        probe = probe.to(head.weight.device, head.weight.dtype)
        few, whole = readout(found, probe, ids=(0, 1)), readout(found, probe)[:, :2]
    return replace(found, plain_head=torch.allclose(few, whole, atol=1e-3, rtol=1e-2))


def body(lm: LanguageModel) -> tuple[nn.Module, nn.ModuleList]:
    """The module that holds the list of blocks, and the list."""
    depth = lm.model.config.get_text_config().num_hidden_layers
    # What models call their decoder is mostly that, but for some it is their head, or they themselves.
    for home in (lm.model.get_decoder(), lm.model.base_model, getattr(lm.model, "model", lm.model)):
        for child in home.children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return home, child
    raise ValueError(
        f"{lm.name!r} ({type(lm.model).__name__}) has no list of {depth} decoder blocks, as a decoder-only "
        "language model has: patching, ablation and scores can't be done; probes, completions and tuning can"
    )


def blocks(lm: LanguageModel) -> tuple[nn.Module, ...]:
    """The decoder blocks of a model."""
    return tuple(body(lm)[1])


def hooks(model: nn.Module) -> list[str]:
    """Names of the modules on which hooks stand, such as those that steer a model."""
    found = model.named_modules()
    return [name or "the model" for name, m in found if m._forward_hooks or m._forward_pre_hooks]


class Unpatchable(ValueError):
    """Blocks of a model can't be patched; see :func:`refuse`."""


def refuse(model: nn.Module, block: nn.Module, why: str, at: int = 0) -> NoReturn:
    """Raise :class:`Unpatchable` for block ``at``: "blocks of this model" + what is in the way."""
    if standing := hooks(model):
        raise Unpatchable(
            f"the model carries hooks (steering?) on {', '.join(standing[:3])}"
            f"{', ...' if len(standing) > 3 else ''}, and with them its blocks {why}: take "
            "them off, or leave the context that put them there, before patching"
        )
    raise Unpatchable(
        f"blocks of this model ({type(model).__name__}) {why} (block {at}: {_names(block)}): patching and "
        "ablation can't be done; probes, completions and tuning can"
    )


def _names(block: nn.Module) -> str:
    return ", ".join(name for name, _ in block.named_children())


def require_one_stream(model: nn.Module, stream: Tensor) -> None:
    """Refuse, as :class:`Unpatchable`, what is not one residual stream [row, pos, width] but several."""
    if stream.ndim != 3:
        raise Unpatchable(
            f"blocks of this model ({type(model).__name__}) carry several streams side by side (shape "
            f"{tuple(stream.shape)}): patching, ablation, directions and probes can't be done; completions "
            "and tuning can"
        )


def some_layers(depth: int, layers: Sequence[int] | None) -> list[int]:
    """Layers that were asked for, each once, of a model with so many; all of them for None."""
    chosen = list(dict.fromkeys(range(depth) if layers is None else layers))
    if not chosen or not set(chosen) <= set(range(depth)):
        raise ValueError(f"layers={layers} must be a non-empty list out of 0 to {depth - 1}")
    return chosen


def _named(module: nn.Module, names: Sequence[str]) -> nn.Module | None:
    found = (getattr(module, name, None) for name in names)
    return next((part for part in found if isinstance(part, nn.Module)), None)


def attention(block: nn.Module) -> nn.Module:
    """The attention module of a block."""
    return _child(block, _ATTENTION, "attention")


def mlp(block: nn.Module) -> nn.Module:
    """The MLP of a block."""
    return _child(block, _MLP, "MLP")


def _child(block: nn.Module, names: Sequence[str], what: str) -> nn.Module:
    if (found := _named(block, names)) is None:
        raise ValueError(f"{type(block).__name__} has no {what} module; its parts are: {_names(block)}")
    return found


def projection(module: nn.Module) -> nn.Module:
    """The last linear map of an attention module or an MLP, the one that writes its output.

    Its input is the heads' outputs side by side, or the MLP's hidden units. A ValueError for a mixture of
    experts, which has none.
    """
    if (named := _named(module, _PROJECTION)) is not None:
        return named
    # An unusual name: the last one declared. `record` checks that it does write the module's output. Beside
    # experts it would be their router.
    linear = [m for m in module.children() if isinstance(m, (nn.Linear, Conv1D))]
    listed = any(isinstance(m, nn.ModuleList) for m in module.children())
    if not linear or listed or any(p.ndim > 2 for p in module.parameters()):
        raise ValueError(
            f"{type(module).__name__} has no single output projection, so it has no hidden units or heads "
            "that could be patched; use the sites attn_out, mlp_out, layer or resid_post"
        )
    return linear[-1]


def projection_weight(module: nn.Module) -> Float[Tensor, "width unit"]:
    """Weight of :func:`projection`: column i is what hidden unit i writes."""
    linear = projection(module)
    return linear.weight if isinstance(linear, nn.Linear) else linear.weight.T  # GPT-2's are transposed


def first(value: Any) -> Tensor:
    """The tensor of a module's output, which some modules return in a tuple or a record."""
    return value if isinstance(value, Tensor) else value[0]


@contextmanager
def stubbed(module: nn.Module, value: Any, outputs: int = 0) -> Iterator[None]:
    """Let a module give out ``value`` without computing anything, first in a tuple of so many ``outputs``."""
    before = module.__dict__.get("forward")  # a stub in a stub
    given = (value, *[None] * (outputs - 1)) if outputs else value
    module.forward = lambda *a, **k: given
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class _Hidden:
    """Stands for the output of a decoder: its last hidden state, and nothing of what some others add."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, which: int | slice) -> Any:
        return (self.last_hidden_state,)[which]


def readout(
    parts: Stack, resid: Float[Tensor, "*batch width"], ids: Sequence[int] | None = None
) -> Float[Tensor, "*batch vocab"]:
    """Logits from the residual stream after the last block, float32; of these ids only, in this order."""
    if parts.norm is not None:
        own = next(parts.norm.parameters(), None)  # some norms have no gain
        resid = parts.norm(resid if own is None else resid.to(own.device))
    if ids is not None and parts.plain_head:
        weight, bias = parts.head.weight[list(ids)], getattr(parts.head, "bias", None)
        logits = nn.functional.linear(
            resid.to(weight.device), weight, None if bias is None else bias[list(ids)]
        ).float()
        return logits if parts.soft_cap is None else parts.soft_cap * (logits / parts.soft_cap).tanh()
    shape, flat = resid.shape[:-1], resid.reshape(-1, 1, resid.shape[-1])
    dummy = torch.zeros(len(flat), 1, dtype=torch.long, device=flat.device)
    with stubbed(parts.base, _Hidden(flat)):
        logits = parts.model(input_ids=dummy, use_cache=False).logits[:, -1].float()
    logits = logits.reshape(*shape, -1)
    return logits if ids is None else logits[..., list(ids)]
