"""The decoder stack of any Hugging Face causal language model: its blocks, recorded and run in parts.

A causal language model is a stack of blocks that read and write one residual stream; each block has
an attention module and an MLP. This module finds those parts by structure and records what they do in a
run; :mod:`flow.partial` calls single blocks with some of it given. The blocks themselves are always the
model's own code, so rotary positions, grouped queries, sliding windows, soft caps and extra norms stay as
they are.

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

from harmlens.models.parts import Stack, attention, first, mlp, projection, refuse

# --------------------------------------------------------------------------- modules and logits


# --------------------------------------------------------------------------- recording

CACHE = object()  # stands where a block takes its cache


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
        outputs: in a tuple of which length each module gives out its output; 0 for none.
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
    outputs: dict[nn.Module, int] = field(default_factory=dict)

    def rows(self, which: slice) -> Record:
        """The same for some of the rows."""
        cut = {n: [t[which] for t in getattr(self, n)] for n in ("resid", "attn", "mlp", "heads", "hidden")}
        kv = [(k[which], v[which]) for k, v in self.kv]
        return Record(self.offset, self.length, kv=kv, kwargs=self.kwargs, outputs=self.outputs, **cut)


@torch.no_grad()
def record(
    parts: Stack,
    ids: Int[Tensor, "row pos"],
    *,
    details: Sequence[str] = (),
    noise: Float[Tensor, "row pos width"] | None = None,
    share: bool = True,
    since: int = 0,
) -> Record:
    """Run rows of equal length and record them.

    What rows have in common at their start is run once for them: a system message that all share, or the
    words up to where the two sides of a pair part.

    Args:
        ids: without padding: padded positions would need a mask in every partial run.
        details: out of ``"heads"`` and ``"hidden"``: which inputs of output projections to keep.
        noise: added to the embeddings (Gaussian corruption, as in causal tracing).
        share: run what rows have in common once; without it, everything is recorded from position 0 on.
        since: keep only keys and values of what lies before this position.
    """
    kinds = _beginnings(ids, noise) if share else torch.arange(len(ids)).repeat(ids.shape[1], 1)
    counts = [int(kind.max()) + 1 for kind in kinds]
    shared = sum(count == 1 for count in counts[:-1]) if share else 0
    out = Record(max(shared, min(since, ids.shape[1] - 1)), ids.shape[1])
    cache = DynamicCache()  # without the configuration: sliding layers too keep all keys
    with ExitStack() as hooks:
        for block in parts.blocks:
            handle = block.register_forward_pre_hook(_arguments(out, cache), with_kwargs=True)
            hooks.enter_context(_hook(handle))
        parts.base(input_ids=ids[:1], past_key_values=cache, use_cache=True)
    if shared:
        cache.crop(shared - ids.shape[1])
    else:
        cache = DynamicCache()
    rows, pieces = torch.arange(len(ids)), []
    at = torch.zeros_like(rows)  # row of the cache from which each row goes on
    for start, stop in _segments(counts, shared):
        kind = kinds[stop - 1]
        few = torch.full((counts[stop - 1],), len(ids)).scatter_reduce(0, kind, rows, "amin")  # first of each
        if start:
            cache.batch_select_indices(at[few].to(ids.device))
        added = None if noise is None else noise[few][:, start:stop]
        piece = _piece(parts, ids[few, start:stop], cache, details, added)
        if stop > out.offset:
            pieces.append((piece, slice(max(0, out.offset - start), None), kind))
        at = kind
    for name in ("resid", "attn", "mlp", "heads", "hidden"):
        for layer in range(len(getattr(pieces[0][0], name))):
            found = [(getattr(piece, name)[layer][:, cut], kind) for piece, cut, kind in pieces]
            found = [value if len(value) == len(ids) else value[kind] for value, kind in found]
            getattr(out, name).append(torch.cat(found, dim=1))
    out.outputs = pieces[0][0].outputs
    out.kv = [(kept.keys, kept.values) for kept in cache.layers]
    if counts[-1] < len(ids):
        out.kv = [(keys[at], values[at]) for keys, values in out.kv]
    if len(out.kv) != parts.depth or any(k.shape[-2] != out.length for k, _ in out.kv):
        refuse(parts.model, parts.blocks[0], "don't all keep keys and values of all positions in their cache")
    return out


def _beginnings(ids: Tensor, noise: Tensor | None) -> Int[Tensor, "pos row"]:
    """Number of the beginning of each row up to each position: rows with equal beginnings have the same."""
    ids, rows = ids.cpu(), len(ids)
    kind, out = torch.zeros(rows, dtype=torch.long), []
    touched = torch.zeros(ids.shape[1]).bool() if noise is None else noise.abs().amax((0, 2)).cpu() > 0
    for t in range(ids.shape[1]):
        if touched[t]:  # what is noised is no longer common
            kind = torch.arange(rows)
        elif int(kind.max()) < rows - 1:
            kind = torch.unique(kind * (int(ids.max()) + 1) + ids[:, t], return_inverse=True)[1]
            # Where nearly all differ, putting the rest in its places costs more than running it.
            kind = torch.arange(rows) if int(kind.max()) + 1 > 0.8 * rows else kind
        out.append(kind)
    return torch.stack(out)


def _segments(counts: Sequence[int], offset: int, call: int = 256) -> list[tuple[int, int]]:
    """Cut the positions from ``offset`` on where rows part, so that the least is run.

    Args:
        counts: how many different beginnings there are up to each position.
        call: what one more call of the model costs, in rows times positions.

    >>> _segments([1, 1, 10, 10, 10, 99, 99], 2, call=64)
    [(2, 5), (5, 7)]
    """
    ends = [t for t in range(offset + 1, len(counts)) if counts[t] > counts[t - 1]] + [len(counts)]
    best = {offset: (0, offset)}  # end of a segment -> cost up to there, start of that segment
    for end in ends:
        each = counts[end - 1]
        best[end] = min((cost + call + each * (end - start), start) for start, (cost, _) in best.items())
    out, end = [], len(counts)
    while end > offset:
        out.append((best[end][1], end))
        end = best[end][1]
    return out[::-1]


def _piece(
    parts: Stack, ids: Tensor, cache: DynamicCache, details: Sequence[str], noise: Tensor | None
) -> Record:
    """Run a model on from what its cache holds, and record it.

    Hooks of others that stand on the model act again when a block is called in part. So what is kept is what
    they are given: the stream in front of them, and what a module gives out before they change it.
    """
    out = Record(0, ids.shape[1])
    written: list[tuple[int, nn.Module, list[Tensor], list[Tensor]]] = []
    with ExitStack() as hooks:
        for layer, block in enumerate(parts.blocks):
            hooks.enter_context(
                _hook(block.register_forward_pre_hook(_entering(out.resid), with_kwargs=True, prepend=True))
            )
            for module, store, inner, kept in (
                (attention(block), out.attn, out.heads, "heads" in details),
                (mlp(block), out.mlp, out.hidden, "hidden" in details),
            ):
                hooks.enter_context(
                    _hook(module.register_forward_hook(_output(store, out.outputs), prepend=True))
                )
                if kept:
                    last, own = projection(module), []
                    hooks.enter_context(_hook(last.register_forward_pre_hook(_input(inner), prepend=True)))
                    hooks.enter_context(_hook(last.register_forward_hook(_output(own))))
                    written.append((layer, module, own, store))
        hooks.enter_context(_hook(parts.blocks[-1].register_forward_hook(_output(out.resid))))
        if noise is not None:
            embed = parts.model.get_input_embeddings()
            hooks.enter_context(_hook(embed.register_forward_hook(lambda m, i, o: o + noise.to(o))))
        whole = parts.base(input_ids=ids, past_key_values=cache, use_cache=True)
    counts = [len(out.resid) - 1, len(out.attn), len(out.mlp)]
    counts += [
        len(store) for store, name in ((out.heads, "heads"), (out.hidden, "hidden")) if name in details
    ]
    if set(counts) != {parts.depth}:
        refuse(
            parts.model, parts.blocks[0],
            f"show {counts[0]} streams, {counts[1]} attention and {counts[2]} MLP outputs of {parts.depth}, "
            "since a hook never fired",
        )  # fmt: skip
    for layer, module, own, store in written:
        if own[0].shape != store[layer].shape or not _close(own[0], store[layer]):
            raise ValueError(
                f"{type(module).__name__} does not give out what its output projection writes, so its hidden "
                "units or heads can't be patched; use the sites attn_out, mlp_out, layer or resid_post"
            )
    end = out.resid[-1][:, -1:]
    if not _close(end if parts.norm is None else parts.norm(end), whole.last_hidden_state[:, -1:]):
        refuse(parts.model, parts.blocks[-1], "are followed by more than the final norm", parts.depth - 1)
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


# Copies, since blocks may go on to change a tensor in place: parallel ones add attention to the MLP's output.
def _output(store: list[Tensor], outputs: dict[nn.Module, int] | None = None) -> Callable:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        store.append(first(output).clone())
        if outputs is not None:
            outputs[module] = len(output) if isinstance(output, tuple) else 0

    return hook


def _input(store: list[Tensor]) -> Callable:
    def hook(module: nn.Module, inputs: tuple) -> None:
        store.append(inputs[0].clone())

    return hook


def _entering(store: list[Tensor]) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        store.append((args[0] if args else kwargs["hidden_states"]).clone())

    return hook


def _arguments(out: Record, cache: DynamicCache) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        # Some models hand their blocks the cache and the mask by position.
        named = list(inspect.signature(type(module).forward).parameters)[1:]
        kwargs = dict(zip(named, args, strict=False)) | kwargs
        kwargs.pop(named[0])
        out.kwargs.append({name: CACHE if value is cache else value for name, value in kwargs.items()})

    return hook
