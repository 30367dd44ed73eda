"""The decoder stack of any Hugging Face causal language model: its blocks, recorded and run in parts.

A causal language model is a stack of blocks that read and write one residual stream; each block has
an attention module and an MLP. This module finds those parts by structure, records what they do in a
run, and calls single blocks with some of it given. The blocks themselves are always the model's own
code, so rotary positions, grouped queries, sliding windows, soft caps and extra norms stay as they are.

Nothing here knows the name of a model. What a model does not have is reported by name.

Introduced in notebook 02 ("Layers").
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from harmlens.models import LanguageModel

_ATTENTION = ("self_attn", "attention", "attn", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_PROJECTION = (
    "o_proj", "out_proj", "dense", "c_proj", "wo", "down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2",
)  # fmt: skip


@dataclass(frozen=True)
class Stack:
    """The parts of a decoder: see :func:`stack`."""

    model: nn.Module
    base: nn.Module
    blocks: tuple[nn.Module, ...]
    norm: nn.Module | None
    head: nn.Module
    soft_cap: float | None
    plain_head: bool

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def width(self) -> int:
        return self.model.get_input_embeddings().weight.shape[1]


def stack(lm: LanguageModel) -> Stack:
    """Find the decoder stack of a model.

    Raises:
        ValueError: the model has no list of blocks, as an encoder or a recurrent model has not; or an
            attention implementation that takes no full mask.
    """
    kind = getattr(lm.model.config, "_attn_implementation", None)
    if kind not in (None, "sdpa", "eager"):
        raise ValueError(
            f"{lm.name!r} was loaded with attn_implementation={kind!r}, which takes no full mask, so blocks "
            "can't be run in part; load it with attn_implementation='sdpa' or 'eager'"
        )
    base = lm.model.get_decoder()
    depth = lm.model.config.get_text_config().num_hidden_layers
    lists = [m for m in base.children() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ValueError(
            f"{lm.name!r} ({type(lm.model).__name__}) has no list of {depth} decoder blocks; patching needs "
            "a decoder-only causal language model"
        )
    norms = [m for m in base.children() if "norm" in type(m).__name__.lower()]
    head = lm.model.get_output_embeddings()
    cap = getattr(lm.model.config.get_text_config(), "final_logit_softcapping", None)
    found = Stack(lm.model, base, tuple(lists[0]), norms[-1] if norms else None, head, cap, True)
    # A few rows of the head are cheaper than all of it, where the head is all that there is.
    with torch.no_grad():
        probe = torch.randn(1, found.width, generator=torch.Generator().manual_seed(0))
        probe = probe.to(head.weight.device, head.weight.dtype)
        few, whole = readout(found, probe, ids=(0, 1)), readout(found, probe)[:, :2]
    plain = torch.allclose(few, whole, atol=1e-3, rtol=1e-2)
    return found if plain else Stack(*[getattr(found, f) for f in Stack.__dataclass_fields__][:-1], False)


def _child(block: nn.Module, names: Sequence[str], what: str) -> nn.Module:
    for name in names:
        if isinstance(getattr(block, name, None), nn.Module):
            return getattr(block, name)
    listing = ", ".join(name for name, _ in block.named_children())
    raise ValueError(f"{type(block).__name__} has no {what} module; its parts are: {listing}")


def attention(block: nn.Module) -> nn.Module:
    """The attention module of a block."""
    return _child(block, _ATTENTION, "attention")


def mlp(block: nn.Module) -> nn.Module:
    """The MLP of a block."""
    return _child(block, _MLP, "MLP")


def projection(module: nn.Module) -> nn.Module:
    """The last linear map of an attention module or an MLP, the one that writes its output.

    Its input is the heads' outputs side by side, or the MLP's hidden units.

    Raises:
        ValueError: there is none, as in a mixture of experts.
    """
    named = [
        getattr(module, name) for name in _PROJECTION if isinstance(getattr(module, name, None), nn.Module)
    ]
    # An unusual name: the last one declared. `record` checks that it does write the module's output.
    linear = named[:1] or [m for m in module.children() if isinstance(m, (nn.Linear, Conv1D))]
    if not linear:
        raise ValueError(
            f"{type(module).__name__} has no single output projection, so it has no hidden units or heads "
            "that could be patched; use the sites attn_out, mlp_out, layer or resid_post"
        )
    return linear[-1]


def projection_weight(module: nn.Module) -> Float[Tensor, "width unit"]:
    """Weight of :func:`projection`: column i is what hidden unit i writes."""
    linear = projection(module)
    return (
        linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
    )  # GPT-2's are stored transposed


# --------------------------------------------------------------------------- recording


@dataclass
class Record:
    """What a stack did on some rows of ids, from position ``offset`` on.

    Attributes:
        resid: residual stream before block l, and after the last one: depth + 1 tensors
            [row, pos - offset, width].
        attn, mlp: what the modules gave out (before any norm behind them), one tensor per block.
        heads, hidden: inputs of their output projections, if recorded.
        kv: keys and values of each block at *all* positions.
        kwargs: the other arguments each block was called with.
        length: number of positions.
    """

    offset: int
    length: int
    resid: list[Tensor] = field(default_factory=list)
    attn: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    kv: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    kwargs: list[dict[str, Any]] = field(default_factory=list)

    def rows(self, which: slice) -> Record:
        """The same for some of the rows."""
        cut = {n: [t[which] for t in getattr(self, n)] for n in ("resid", "attn", "mlp", "heads", "hidden")}
        kv = [(k[which], v[which]) for k, v in self.kv]
        return Record(self.offset, self.length, kv=kv, kwargs=self.kwargs, **cut)


def common_prefix(ids: Int[Tensor, "row pos"]) -> int:
    """How many first positions are the same in all rows; the last position is never counted."""
    same = (ids == ids[:1]).all(0)[:-1]
    return int(same.long().cumprod(0).sum())


@torch.no_grad()
def record(
    parts: Stack,
    ids: Int[Tensor, "row pos"],
    *,
    details: Sequence[str] = (),
    noise: Float[Tensor, "row pos width"] | None = None,
    share: bool = True,
) -> Record:
    """Run rows of equal length and record them.

    What all rows have in common at their start (a system message, say) is run once for all of them.

    Args:
        ids: without padding: padded positions would need a mask in every partial run.
        details: out of ``"heads"`` and ``"hidden"``: which inputs of output projections to keep.
        noise: added to the embeddings (Gaussian corruption, as in causal tracing).
        share: run what rows have in common once; without it, everything is recorded from position 0 on.
    """
    offset = common_prefix(ids) if share else 0
    if noise is not None:  # what is noised is no longer common
        touched = noise.abs().amax((0, 2)) > 0
        offset = min(offset, int(touched.long().argmax()) if touched.any() else offset)
    cache = DynamicCache()  # without the configuration: sliding layers too keep all keys
    if offset:
        parts.base(input_ids=ids[:1, :offset], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(ids))
    out = Record(offset, ids.shape[1])
    written: list[tuple[int, nn.Module, list[Tensor], list[Tensor]]] = []
    with ExitStack() as hooks:
        for layer, block in enumerate(parts.blocks):
            hooks.enter_context(
                _hook(block.register_forward_pre_hook(_arguments(out, cache), with_kwargs=True))
            )
            for module, store, inner, kept in (
                (attention(block), out.attn, out.heads, "heads" in details),
                (mlp(block), out.mlp, out.hidden, "hidden" in details),
            ):
                hooks.enter_context(_hook(module.register_forward_hook(_output(store))))
                if kept:
                    last, own = projection(module), []
                    hooks.enter_context(_hook(last.register_forward_pre_hook(_input(inner))))
                    hooks.enter_context(_hook(last.register_forward_hook(_output(own))))
                    written.append((layer, module, own, store))
        hooks.enter_context(_hook(parts.blocks[-1].register_forward_hook(_output(out.resid))))
        if noise is not None:
            added = noise[:, offset:]
            embed = parts.model.get_input_embeddings()
            hooks.enter_context(_hook(embed.register_forward_hook(lambda m, i, o: o + added.to(o))))
        whole = parts.base(input_ids=ids[:, offset:], past_key_values=cache, use_cache=True)
    out.kv = [(kept.keys, kept.values) for kept in cache.layers]
    counts = [len(out.resid) - 1, len(out.attn), len(out.mlp), len(out.kv)]
    counts += [
        len(store) for store, name in ((out.heads, "heads"), (out.hidden, "hidden")) if name in details
    ]
    if set(counts) != {parts.depth} or any(k.shape[-2] != out.length for k, _ in out.kv):
        raise RuntimeError(
            f"recorded {counts[0]} residual streams, {counts[1]} attention and {counts[2]} MLP outputs and "
            f"the keys of {counts[3]} blocks out of {parts.depth}: a hook never fired, so this architecture "
            "can't be patched here"
        )
    for layer, module, own, store in written:
        if own[0].shape != store[layer].shape or not _close(own[0], store[layer]):
            raise ValueError(
                f"{type(module).__name__} does not give out what its output projection writes, so its hidden "
                "units or heads can't be patched; use the sites attn_out, mlp_out, layer or resid_post"
            )
    end = out.resid[-1][:, -1:]
    if not _close(end if parts.norm is None else parts.norm(end), whole.last_hidden_state[:, -1:]):
        raise RuntimeError(
            f"{type(parts.base).__name__} does more to the residual stream behind its last block than its "
            "final norm, so this architecture can't be patched here"
        )
    return out


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding, where infinities and NaN (an overflow, reported later) count as equal."""
    return torch.allclose(one.float(), other.to(one.device).float(), rtol=0.02, atol=1e-3, equal_nan=True)


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def first(value: Any) -> Tensor:
    """The tensor of a module's output, which some modules return in a tuple."""
    return value[0] if isinstance(value, tuple) else value


def _output(store: list[Tensor]) -> Callable:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        store.append(first(output))

    return hook


def _input(store: list[Tensor]) -> Callable:
    def hook(module: nn.Module, inputs: tuple) -> None:
        store.append(inputs[0])

    return hook


def _arguments(out: Record, cache: DynamicCache) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        # Some models hand their blocks the cache and the mask by position.
        named = list(inspect.signature(type(module).forward).parameters)[1:]
        kwargs = dict(zip(named, args, strict=False)) | kwargs
        out.resid.append(kwargs.pop(named[0]))
        cached = [name for name, value in kwargs.items() if value is cache]
        out.kwargs.append(
            {k: v for k, v in kwargs.items() if k not in cached} | dict.fromkeys(cached, _CACHE)
        )

    return hook


_CACHE = object()  # stands where a block takes its cache


# --------------------------------------------------------------------------- partial runs


class _Prefix:
    """Stands in for the cache of one block: recorded keys and values before the suffix, then the new ones."""

    def __init__(self, keys: Tensor, values: Tensor, copies: int) -> None:
        self.keys, self.values, self.copies = keys, values, copies

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._join(self.keys, keys), self._join(self.values, values)

    def get_seq_length(self, *_: Any) -> int:
        return self.keys.shape[-2]

    def _join(self, old: Tensor, new: Tensor) -> Tensor:
        rows, heads, stop, size = old.shape
        old = old[None].expand(self.copies, rows, heads, stop, size).flatten(0, 1)
        return torch.cat([old, new], dim=-2)


def run_block(
    parts: Stack, run: Record, layer: int, resid: Float[Tensor, "copyrow suffix width"], start: int
) -> Float[Tensor, "copyrow suffix width"]:
    """Call block ``layer`` on positions from ``start`` on; what lies before is as recorded.

    Args:
        resid: residual stream before the block: whole copies of the recorded rows, one below the other.
    """
    keys, values = run.kv[layer]
    prefix = _Prefix(keys[:, :, :start], values[:, :, :start], len(resid) // len(keys))
    kwargs = _sliced(run, layer, start, resid.shape[1])
    kwargs = {k: prefix if v is _CACHE else v for k, v in kwargs.items()}
    return first(parts.blocks[layer](resid, **kwargs))


def _sliced(run: Record, layer: int, start: int, count: int) -> dict[str, Any]:
    """Arguments of a block for ``count`` positions from ``start`` on, out of those it was recorded with."""
    recorded, at = run.length - run.offset, start - run.offset
    out = {}
    for name, value in run.kwargs[layer].items():
        if name == "attention_mask":
            out[name] = _mask(run, value, start, count)
        elif isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == recorded:
            out[name] = value[:1, at : at + count]  # position ids
        elif isinstance(value, Tensor) and value.ndim == 1 and len(value) == recorded:
            out[name] = value[at : at + count]
        elif isinstance(value, tuple) and all(isinstance(v, Tensor) for v in value):
            out[name] = tuple(v[:1, at : at + count] for v in value)  # rotary cosines and sines
        else:
            out[name] = value
    return out


def _mask(run: Record, mask: Any, start: int, count: int) -> Tensor | None:
    if mask is None:
        # Plain causal attention. A single last position sees everything; several need it spelt out,
        # because the shortcut for causal attention counts from the first key.
        if count == 1 and start == run.length - 1:
            return None
        ones = torch.ones(count, run.length, dtype=torch.bool, device=run.resid[0].device)
        return ones.tril(start)[None, None]
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise ValueError(
            "this attention implementation takes no full mask, so blocks can't be run in part; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    at = start - run.offset
    return mask[:1, :, at : at + count]  # no padding: all rows have the same


@contextmanager
def stubbed(module: nn.Module, value: Tensor, *, as_tuple: bool) -> Iterator[None]:
    """Let a module give out ``value`` without computing anything.

    >>> with stubbed(attention(block), zeros, as_tuple=True):  # doctest: +SKIP
    ...     block(x)
    """
    had = "forward" in module.__dict__
    before = module.__dict__.get("forward")
    module.forward = lambda *a, **k: (value, None) if as_tuple else value
    try:
        yield
    finally:
        if had:
            module.forward = before
        else:
            del module.forward


def compose(
    parts: Stack,
    run: Record,
    layer: int,
    resid: Float[Tensor, "row pos width"],
    *,
    attn: Float[Tensor, "row pos width"],
    mlp_out: Float[Tensor, "row pos width"] | None = None,
) -> Float[Tensor, "row pos width"]:
    """Block ``layer`` with the attention's output given, and the MLP's too if ``mlp_out`` is.

    Works position by position, since attention alone looks elsewhere. Norms behind the modules are
    the block's own.
    """
    block = parts.blocks[layer]
    kwargs = {k: None if v is _CACHE or k == "attention_mask" else v for k, v in run.kwargs[layer].items()}
    with ExitStack() as held:
        held.enter_context(stubbed(attention(block), attn, as_tuple=True))
        if mlp_out is not None:
            held.enter_context(stubbed(mlp(block), mlp_out, as_tuple=False))
        return first(block(resid, **kwargs))


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
    """Logits from the residual stream after the last block, float32.

    Args:
        ids: only these rows of the head (in this order), for outcomes that read a few tokens.
    """
    if parts.norm is not None:
        resid = resid.to(next(parts.norm.parameters()).device)
        resid = parts.norm(resid)
    if ids is not None and parts.plain_head:
        weight, bias = parts.head.weight[list(ids)], getattr(parts.head, "bias", None)
        logits = nn.functional.linear(
            resid.to(weight.device), weight, None if bias is None else bias[list(ids)]
        ).float()
        return logits if parts.soft_cap is None else parts.soft_cap * (logits / parts.soft_cap).tanh()
    shape, flat = resid.shape[:-1], resid.reshape(-1, 1, resid.shape[-1])
    dummy = torch.zeros(len(flat), 1, dtype=torch.long, device=flat.device)
    had, before = "forward" in parts.base.__dict__, parts.base.__dict__.get("forward")
    parts.base.forward = lambda *a, **k: _Hidden(flat)
    try:
        logits = parts.model(input_ids=dummy, use_cache=False).logits[:, -1].float()
    finally:
        if had:
            parts.base.forward = before
        else:
            del parts.base.forward
    logits = logits.reshape(*shape, -1)
    return logits if ids is None else logits[..., list(ids)]
