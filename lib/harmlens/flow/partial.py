"""Single blocks of a recorded run, called on the positions behind a patch only.

Copies of a suffix, one for each patch, go through a block at once. They share the keys and values before the
suffix. Where that makes attention cheaper they stand side by side, as further positions of one row with a
mask between them, so that what they share is not copied for each of them.

Introduced in notebook 02 ("Layers").
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from harmlens.flow import stack
from harmlens.flow.stack import CACHE, Record
from harmlens.models import parts as decoder
from harmlens.models.forward import LanguageModel
from harmlens.models.parts import Stack, attention, first, mlp, refuse, stubbed

_TRIED: WeakSet[nn.Module] = WeakSet()


def patchable(lm: LanguageModel, *, in_part: bool = True) -> Stack:
    """The parts of a model, once it is known that its blocks can be patched and ablated.

    Every block needs an attention module and an MLP that write into the stream, and has to give in part, and
    put together from its modules, what it gives as a whole. This is tried on a few tokens, once for a model,
    and again while hooks stand on it.

    Args:
        in_part: blocks will be run in part. If not, hooks that stand on the model don't matter.

    Raises:
        ValueError: says what is in the way (:func:`models.parts.refuse`); as :func:`models.parts.stack`.
    """
    for at, block in enumerate(decoder.blocks(lm)):
        for find, what in ((attention, "attention"), (mlp, "MLP")):
            try:
                find(block)
            except ValueError:
                refuse(lm.model, block, f"have no {what} module", at)
    standing = bool(decoder.hooks(lm.model))
    if not in_part if standing else lm.model in _TRIED:
        return decoder.stack(lm)
    drawn = torch.randperm(
        len(lm.model.get_input_embeddings().weight), generator=torch.Generator().manual_seed(0)
    )
    ids = drawn[torch.tensor([[0, 1, 2, 3], [0, 4, 5, 6]])].to(lm.device)
    at = 0
    try:
        _refuse_other_inputs(lm, ids)
        parts = decoder.stack(lm)
        run = stack.record(parts, ids)
        for at in range(parts.depth):
            _try(parts, run, at)
    except (decoder.Unpatchable, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        try:
            refuse(
                lm.model, decoder.blocks(lm)[at], f"can't be run in part ({str(error).splitlines()[0]})", at
            )
        except decoder.Unpatchable as told:
            raise told from error
    if not standing:
        _TRIED.add(lm.model)
    return parts


@torch.no_grad()
def _refuse_other_inputs(lm: LanguageModel, ids: Int[Tensor, "2 pos"]) -> None:
    """Refuse blocks that read more of a prompt than the stream, such as embeddings for each layer."""
    found: list[tuple[int, str]] = []

    def hook(at: int) -> Callable:
        def look(block: nn.Module, args: tuple, kwargs: dict) -> None:
            given = dict(enumerate(args)) | kwargs
            decoder.require_one_stream(lm.model, given.pop(0 if args else "hidden_states"))
            for name, value in given.items():
                if isinstance(value, Tensor) and len(value) == 2 and not torch.equal(value[0], value[1]):
                    named = list(inspect.signature(type(block).forward).parameters)[1:]
                    found.append((at, named[name] if isinstance(name, int) else name))

        return look

    with ExitStack() as held:
        for at, block in enumerate(decoder.blocks(lm)):
            held.callback(block.register_forward_pre_hook(hook(at), with_kwargs=True).remove)
        lm.model(input_ids=ids, use_cache=False)
    for at, name in found[:1]:
        refuse(lm.model, decoder.blocks(lm)[at], f"read more of a prompt than the stream ({name})", at)


@torch.no_grad()
def _try(parts: Stack, run: Record, layer: int) -> None:
    """Refuse a block that is not the sum of its parts."""
    block, before, after = parts.blocks[layer], run.resid[layer], run.resid[layer + 1]
    loose = 1e-3 if after.dtype == torch.float32 else 0.1

    def off(one: Tensor, other: Tensor) -> float:
        return ((one.float() - other.float()).norm() / (1e-6 + other.float().norm())).item()

    # With attention and MLP giving nothing, the stream goes through, scaled and shifted at most.
    nothing, flipped = torch.zeros_like(run.attn[layer]), before.flip(0)
    bare, other, between = (
        compose(parts, run, layer, resid, attn=nothing, mlp_out=nothing)
        for resid in (before, flipped, (before + flipped) / 2)
    )
    if torch.equal(bare, other):
        refuse(parts.model, block, "have modules that give out the stream with what they write", layer)
    if off((bare + other) / 2, between) > loose:
        refuse(parts.model, block, "do more to the stream than attention and one MLP write", layer)
    at = run.length - 2
    for what, again in (
        ("their modules", compose(parts, run, layer, before, attn=run.attn[layer], mlp_out=run.mlp[layer])),
        ("attention and the rest", compose(parts, run, layer, before, attn=run.attn[layer])),
        ("some positions", run_block(parts, run, layer, before[:, at - run.offset :], at)),
    ):
        gap = off(again, after[:, -again.shape[1] :])
        if gap > loose:
            refuse(parts.model, block, f"put together from {what} give something else ({gap:.2g} off)", layer)


def run_block(
    parts: Stack,
    run: Record,
    layer: int,
    resid: Float[Tensor, "copyrow suffix width"],
    start: int,
    *,
    plain: bool = False,
    read: int | None = None,
) -> Float[Tensor, "copyrow some width"]:
    """Call block ``layer`` on positions from ``start`` on; what lies before is as recorded.

    Args:
        resid: residual stream before the block: whole copies of the recorded rows, one below the other.
        plain: the modules of the block see the rows as they are in ``resid``; for hooks on them.
        read: return these last positions only, as the last block may: of the others only keys and values
            are computed.
    """
    rows, width = len(run.kv[layer][0]), resid.shape[-1]
    suffix, copies = run.length - start, len(resid) // rows
    beside = 1 if plain else _beside(copies, suffix, run.length)
    call = _Call(parts, run, layer, start, beside, copies // beside)
    resid = resid.unflatten(0, (-1, beside, rows)).transpose(1, 2)  # [pile, row, beside, position, width]
    out = None
    if read is not None and read < suffix and not plain:
        out = call.last(resid, read)
    if out is None:
        out = call(resid, suffix)
        out = out if read is None else out[..., -read:, :]
    return out.transpose(1, 2).reshape(len(resid) * rows * beside, -1, width)


def _beside(copies: int, suffix: int, length: int) -> int:
    """How many copies stand side by side: as many as do not make the rows longer than they once were."""
    fit = max(1, length // suffix)
    return max(c for c in range(1, min(copies, fit) + 1) if copies % c == 0)


class _Stop(Exception):
    """The keys are known: the rest of a block is not needed."""


class _Prefix:
    """Stands in for the cache of one block: known keys and values come before the new ones."""

    def __init__(self, known: list[tuple[Tensor, Tensor]], piles: int, stop: bool = False) -> None:
        self.known, self.piles, self.stop = known, piles, stop
        self.new: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.stop:
            self.new = keys, values
            raise _Stop
        return self._join(0, keys), self._join(1, values)

    def get_seq_length(self, *_: Any) -> int:
        return sum(keys.shape[-2] for keys, _ in self.known)

    def _join(self, which: int, new: Tensor) -> Tensor:
        """Recorded rows are repeated for each pile while they are copied, not before."""
        shape = (self.piles, -1, *new.shape[1:])
        old = [pair[which] for pair in self.known]
        old = [t.unflatten(0, (-1, len(new) // self.piles)) for t in old]
        old = [t.expand(self.piles, *t.shape[1:]) for t in old]
        return torch.cat([*old, new.view(shape)], dim=-2).flatten(0, 1)


@dataclass(frozen=True)
class _Call:
    """One block, the copies of its suffix ``beside`` each other and in ``piles``."""

    parts: Stack
    run: Record
    layer: int
    start: int
    beside: int
    piles: int

    def __call__(self, resid: Tensor, count: int) -> Tensor:
        keys, values = self.run.kv[self.layer]
        known = [(keys[:, :, : self.start], values[:, :, : self.start])]
        return self._block(resid, self.start, count, _Prefix(known, self.piles), [count])

    def last(self, resid: Tensor, read: int) -> Tensor | None:
        """For the last ``read`` positions; None where the block does not ask its cache."""
        keys, values = self.run.kv[self.layer]
        before = self.run.length - self.start - read
        stop = _Prefix([], self.piles, stop=True)
        try:
            self._block(resid[..., :before, :], self.start, before, stop, [before])
        except _Stop:
            known = [(keys[:, :, : self.start], values[:, :, : self.start]), stop.new]
            cache = _Prefix(known, self.piles)
            return self._block(resid[..., -read:, :], self.run.length - read, read, cache, [before, read])
        return None

    def _block(self, resid: Tensor, at: int, count: int, cache: _Prefix, suffix: list[int]) -> Tensor:
        """The block on ``count`` positions from ``at`` on; keys of the suffix come in parts."""
        kwargs = {}
        for name, value in self.run.kwargs[self.layer].items():
            if value is CACHE:
                kwargs[name] = cache
            elif name == "attention_mask":
                kwargs[name] = self._mask(value, at, count, suffix)
            else:
                kwargs[name] = self._sliced(value, at, count)
        shape = resid.shape
        # In one piece: experts look at all positions as one row.
        flat = resid.reshape(shape[0] * shape[1], shape[2] * shape[3], shape[4]).contiguous()
        return first(self.parts.blocks[self.layer](flat, **kwargs)).reshape(shape)

    def _sliced(self, value: Any, at: int, count: int) -> Any:
        """An argument of the block for some of the positions it was recorded with."""
        recorded = self.run.length
        if isinstance(value, tuple) and all(isinstance(v, Tensor) for v in value):  # rotary embeddings
            return tuple(self._sliced(v, at, count) for v in value)
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == recorded:
            return value[:1, at : at + count].repeat(1, self.beside, *[1] * (value.ndim - 2))
        if isinstance(value, Tensor) and value.ndim == 1 and len(value) == recorded:
            return value[at : at + count].repeat(self.beside)
        return value

    def _mask(self, mask: Any, at: int, count: int, suffix: list[int]) -> Tensor | None:
        """What each position may look at: what lies before the suffix, and its own copy of the suffix."""
        run, device = self.run, self.run.resid[0].device
        if mask is None:
            # Plain causal attention. A single last position sees everything; several need it spelt out,
            # because the shortcut for causal attention counts from the first key.
            if self.beside == count == 1 and at == run.length - 1:
                return None
            mask = torch.ones(count, run.length, dtype=torch.bool, device=device).tril(at)[None, None]
        elif not isinstance(mask, Tensor) or mask.ndim != 4:
            raise ValueError(
                "this attention implementation takes no full mask, so blocks can't be run in part; "
                "load the model with attn_implementation='sdpa' or 'eager'"
            )
        else:
            mask = mask[:1, :, at : at + count]  # no padding: all rows have the same
        if self.beside == 1:
            return mask[..., : self.start + sum(suffix)]
        off = torch.tensor(False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
        own = torch.eye(self.beside, dtype=torch.bool, device=mask.device)[:, None, :, None]
        columns = [mask[..., : self.start].repeat(1, 1, self.beside, 1)]
        for part in mask[..., self.start : self.start + sum(suffix)].split(suffix, dim=-1):
            blocks = torch.where(own, part[:, :, None, :, None], off.to(part))
            columns.append(blocks.flatten(4, 5).flatten(2, 3))
        return torch.cat(columns, dim=-1)


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
    the block's own. Nothing that is given is changed, though blocks may write into what they are handed.
    """
    block = parts.blocks[layer]
    resid, attn = (t.clone(memory_format=torch.contiguous_format) for t in (resid, attn))
    kwargs = {k: None if v is CACHE or k == "attention_mask" else v for k, v in run.kwargs[layer].items()}
    with ExitStack() as held:
        held.enter_context(stubbed(attention(block), attn, run.outputs[attention(block)]))
        if mlp_out is not None:
            held.enter_context(stubbed(mlp(block), mlp_out.clone(), run.outputs[mlp(block)]))
        return first(block(resid, **kwargs))
