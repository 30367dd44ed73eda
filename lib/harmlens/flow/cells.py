"""Patched runs: the exact and cheap recomputation behind :mod:`flow.patching`.

A *cell* is one patch: a site in one block, at some positions, for every pair of a group. In a causal model
it changes nothing before its first position and nothing below its block, so keys and values before it and
the residual stream below it are those of the unpatched run. What is computed is the suffix of the prompt in
the blocks above. All cells that start at one position share a batch, which grows as deeper blocks come to
be patched.

Introduced in notebook 02 ("Layers").
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from harmlens.flow import partial
from harmlens.flow.runs import Group
from harmlens.flow.stack import Record
from harmlens.models import parts as decoder
from harmlens.models.parts import Stack

SITES = ("resid_post", "layer", "attn_out", "mlp_out", "head", "neurons")


@dataclass(frozen=True)
class Cell:
    """One patch: a site in a layer (for windows: up to ``until``) at some columns of the recorded runs."""

    site: str
    layer: int
    columns: tuple[int, ...]
    units: tuple[int, ...] = ()
    until: int | None = None

    @property
    def last(self) -> int:
        return self.layer if self.until is None else self.until


def windowed(
    site: str, layer: int, depth: int, window: int, columns: tuple[int, ...], units: tuple[int, ...] = ()
) -> Cell:
    """A cell of ``window`` neighbouring layers around ``layer``, cut off at the ends of the stack."""
    low, high = max(0, layer - window // 2), min(depth - 1, layer + window // 2)
    return Cell(site, low, columns, units, high if window > 1 else None)


@dataclass(frozen=True)
class Freeze:
    """Modules that keep the unpatched run's output downstream of a patch, which severs paths through them.

    Attributes:
        site: ``"attn_out"``, ``"mlp_out"`` or ``"neurons"``.
        layers: which layers; None for all downstream of the patch.
        units: hidden units of the MLP, for ``"neurons"``.
        null: a seed: instead of being frozen, the module's output is moved by as much as freezing would
            move it, in a random direction. The control of a severed path.
    """

    site: str
    layers: Sequence[int] | None = None
    units: Sequence[int] = ()
    null: int | None = None

    def __post_init__(self) -> None:
        if self.site not in ("attn_out", "mlp_out", "neurons"):
            raise ValueError(f"freeze.site={self.site!r}: choose 'attn_out', 'mlp_out' or 'neurons'")
        for name in ("layers", "units"):  # whatever they were given as: they are part of names and keys
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(int(i) for i in getattr(self, name)))
        if (self.site == "neurons") != bool(self.units):
            raise ValueError("freeze.units: give hidden units with site='neurons', and only with it")

    def holds(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers


@torch.no_grad()
def run_cells(
    group: Group,
    cells: Sequence[Cell],
    *,
    direction: str = "denoising",
    freeze: Freeze | None = None,
    null: int | None = None,
    max_tokens: int = 3072,
) -> tuple[Float[Tensor, "cell pair ..."], Float[Tensor, "cell pair"]]:
    """Outcome of each patch for each pair of a group, and the norm of what was patched; on the CPU.

    An outcome may give several values for each row.
    """
    base, source = group.runs(direction)
    n, recorded = len(group.index), base.length - base.offset
    unpatched = group.unpatched(base).cpu()
    values = unpatched[None].repeat(len(cells), *[1] * unpatched.ndim)
    sizes = torch.zeros(len(cells), n)
    # Before the first position that differs both runs are the same, so there is nothing to patch.
    touched = [tuple(c for c in cell.columns if c >= group.differs) for cell in cells]
    wanted: dict[tuple, set[int]] = defaultdict(set)
    starts: dict[int, list[int]] = defaultdict(list)
    for i, (cell, columns) in enumerate(zip(cells, touched, strict=True)):
        if columns and (cell.units or cell.site not in ("head", "neurons")):
            wanted[cell.site, cell.layer, cell.units].update(columns)
            if cell.layer < group.parts.depth - 1 or columns[-1] >= recorded - group.read:
                starts[columns[0]].append(i)  # else nothing looks there
    patches = {
        key: _patch(group, base, source, key, sorted(columns), freeze, null)
        for key, columns in wanted.items()
    }
    for start, members in sorted(starts.items()):
        members.sort(key=lambda i: cells[i].layer)
        for rows in _slices(n, max(1, max_tokens // (recorded - start))):
            part = base.rows(rows)
            few = max(1, max_tokens // ((rows.stop - rows.start) * (recorded - start)))
            for tile in (members[k : k + few] for k in range(0, len(members), few)):
                some = [
                    (cells[i], touched[i], patches[cells[i].site, cells[i].layer, cells[i].units])
                    for i in tile
                ]
                resid = _suffix(group, part, source.rows(rows), some, rows, start, freeze, null)
                index = torch.arange(rows.start, rows.stop).repeat(len(tile))
                out = group.outcome(resid[:, -group.read :], index).cpu()
                values[tile, rows] = out.view(len(tile), -1, *out.shape[1:])
    for i, cell in enumerate(cells):
        if touched[i] and (cell.site, cell.layer, cell.units) in patches:
            sizes[i] = patches[cell.site, cell.layer, cell.units].norm(touched[i])
            for layer in range(cell.layer + 1, cell.last + 1):
                apart = _apart(base, source, cell.site, layer, touched[i])
                sizes[i] = sizes[i].hypot(apart.flatten(1).norm(dim=-1).cpu())
    return values, sizes


@dataclass(frozen=True)
class _Patch:
    """The patched residual stream behind a block, at some columns, and how far the site was moved there."""

    columns: tuple[int, ...]
    resid: Float[Tensor, "pair column width"]
    moved: Float[Tensor, "pair column"]

    def at(self, columns: Sequence[int]) -> Float[Tensor, "pair column width"]:
        return self.resid[:, [self.columns.index(c) for c in columns]]

    def norm(self, columns: Sequence[int]) -> Float[Tensor, " pair"]:
        return self.moved[:, [self.columns.index(c) for c in columns]].norm(dim=-1).cpu()


def _patch(
    group: Group,
    base: Record,
    source: Record,
    key: tuple,
    columns: list[int],
    freeze: Freeze | None,
    null: int | None,
) -> _Patch:
    """What the residual stream behind the block becomes when a site takes the source run's value."""
    site, layer, units = key
    parts, block = group.parts, group.parts.blocks[layer]

    run = slice(columns[0], columns[-1] + 1)
    where = run if len(columns) == run.stop - run.start else columns  # without copying, where possible

    def cut(tensors: list[Tensor], at: int = layer) -> Tensor:
        return tensors[at][:, where]

    before, after = cut(base.resid), cut(base.resid, layer + 1)
    if site in ("resid_post", "layer"):
        moved = cut(source.resid, layer + 1).float() - after.float()
        if site == "layer":
            moved = moved - (cut(source.resid).float() - before.float())
        exact = site == "resid_post" and null is None
        moved = _or_random(moved, null, group, key, columns)
        new = cut(source.resid, layer + 1) if exact else (after.float() + moved).to(after.dtype)
        return _Patch(tuple(columns), new, moved.norm(dim=-1))
    if site in ("attn_out", "head"):
        old, new = cut(base.attn), cut(source.attn) if site == "attn_out" else None
        inner, outer, recorded = (
            cut(base.heads) if new is None else None,
            decoder.attention(block),
            source.heads,
        )
    else:
        old, new = cut(base.mlp), cut(source.mlp) if site == "mlp_out" else None
        inner, outer, recorded = cut(base.hidden) if new is None else None, decoder.mlp(block), source.hidden
    if new is None:
        inner = inner.clone()
        inner[..., list(units)] = cut(recorded)[..., list(units)]
        new = decoder.projection(outer)(inner)
    moved = _or_random(new.float() - old.float(), null, group, key, columns)
    new = new if null is None else (old.float() + moved).to(old.dtype)
    if site in ("mlp_out", "neurons"):
        resid = partial.compose(parts, base, layer, before, attn=cut(base.attn), mlp_out=new)
    else:  # the MLP of the same block reacts
        with _frozen(parts, base, layer, columns, freeze, 1, group, only=("mlp_out", "neurons")):
            resid = partial.compose(parts, base, layer, before, attn=new)
    return _Patch(tuple(columns), resid, moved.norm(dim=-1))


def _drawn(
    group: Group, key: Any, columns: Sequence[int], rows: slice, width: int
) -> Float[Tensor, "pair column width"]:
    """Random unit vectors, which depend on the pair, the position and the key: never on the batch."""
    prompt = group.x1.length - group.read + 1  # both replies of Y3 get the same draws
    at, draws = [c + group.x1.offset for c in columns], []
    for name in group.names[rows]:
        seed = int.from_bytes(hashlib.sha256(repr((name, key)).encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
        table = [torch.randn(count, width, generator=generator) for count in (prompt, group.read - 1)]
        draws.append(torch.cat(table)[at])
    drawn = torch.stack(draws)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def _added(resid: list[Tensor], layer: int, columns: Sequence[int]) -> Float[Tensor, "pair column width"]:
    """What a block adds to the residual stream."""
    return resid[layer + 1][:, list(columns)].float() - resid[layer][:, list(columns)].float()


def _apart(
    base: Record, source: Record, site: str, layer: int, columns: Sequence[int]
) -> Float[Tensor, "pair column width"]:
    """How far a module's or a layer's output is from the source run's."""

    def output(run: Record) -> Tensor:
        if site == "layer":
            return _added(run.resid, layer, columns)
        return {"attn_out": run.attn, "mlp_out": run.mlp}[site][layer][:, list(columns)].float()

    return output(source) - output(base)


def _or_random(
    moved: Float[Tensor, "pair column width"], null: int | None, group: Group, key: Any,
    columns: Sequence[int], rows: slice = slice(None),
) -> Float[Tensor, "pair column width"]:  # fmt: skip
    """The same, or a random direction of the same norm."""
    if null is None:
        return moved
    drawn = _drawn(group, (null, *key), columns, rows, moved.shape[-1]).to(moved)
    return drawn * moved.norm(dim=-1, keepdim=True)


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def _suffix(
    group: Group, base: Record, source: Record, some: list[tuple[Cell, tuple[int, ...], _Patch]], rows: slice,
    start: int, freeze: Freeze | None, null: int | None,
) -> Float[Tensor, "cellpair suffix width"]:  # fmt: skip
    """Residual stream behind the last block of every cell's patched run, from column ``start`` on.

    A cell's rows join the batch behind the block that it patches.
    """
    parts, n = group.parts, rows.stop - rows.start
    resid: Tensor | None = None
    joined: list[tuple[Cell, tuple[int, ...], _Patch]] = []
    for layer in range(some[0][0].layer, parts.depth):
        # Of the last block only what the outcome reads is needed, unless something is to be changed in it.
        hooked = freeze is not None or any(layer <= cell.last for cell, *_ in joined)
        read = group.read if layer == parts.depth - 1 and not hooked else None
        if resid is not None:
            columns = list(range(start, base.length - base.offset))
            resid = resid.to(base.resid[layer].device)
            with (
                _frozen(parts, base, layer, columns, freeze, len(joined), group, rows=rows),
                _windows(parts, base, source, layer, joined, n, start, null, group, rows),
            ):
                out = partial.run_block(
                    parts, base, layer, resid, start + base.offset, plain=hooked, read=read
                )
            for i, (cell, where, _) in enumerate(joined):
                if cell.site == "layer" and layer <= cell.last:
                    at, mine = [c - start for c in where], slice(i * n, (i + 1) * n)
                    own = _moved(source.resid, base.resid, layer, where, null, group, rows, cell)
                    out[mine][:, at] = (resid[mine][:, at].float() + own).to(out.dtype)
            resid = out
        here = [entry for entry in some if entry[0].layer == layer]
        if here:
            after = base.resid[layer + 1][:, start:]
            fresh = after[None].repeat(len(here), 1, 1, 1)
            for i, (_, where, patch) in enumerate(here):
                fresh[i][:, [c - start for c in where]] = patch.at(where)[rows].to(fresh.device)
            fresh = fresh.flatten(0, 1) if read is None else fresh.flatten(0, 1)[:, -read:]
            resid = fresh if resid is None else torch.cat([resid.to(fresh.device), fresh])
            joined += here
    return resid


def _moved(
    theirs: list[Tensor], ours: list[Tensor], layer: int, where: Sequence[int], null: int | None,
    group: Group, rows: slice, cell: Cell,
) -> Tensor:  # fmt: skip
    """A block's contribution in the source run (for the null: as far from ours in a random direction)."""
    source = _added(theirs, layer, where)
    if null is None:
        return source
    own = _added(ours, layer, where)
    return own + _or_random(source - own, null, group, (cell.site, layer, cell.units), where, rows)


@contextmanager
def _frozen(
    parts: Stack, base: Record, layer: int, columns: list[int], freeze: Freeze | None, copies: int,
    group: Group, only: Sequence[str] = ("attn_out", "mlp_out", "neurons"), rows: slice = slice(None),
) -> Iterator[None]:  # fmt: skip
    """Within, the frozen modules of a block give what they gave in the unpatched run."""
    if freeze is None or not freeze.holds(layer) or freeze.site not in only:
        yield
        return
    block = parts.blocks[layer]
    recorded = {"attn_out": base.attn, "mlp_out": base.mlp, "neurons": base.hidden}[freeze.site][layer]
    kept = recorded[:, columns].repeat(copies, 1, 1)
    module = decoder.attention(block) if freeze.site == "attn_out" else decoder.mlp(block)

    def units(_: Any, inputs: tuple) -> tuple:
        hidden = inputs[0].clone()
        hidden[..., list(freeze.units)] = kept[..., list(freeze.units)]
        return (hidden, *inputs[1:])

    def null(live_module: Any, inputs: tuple, output: Any) -> Any:
        live = decoder.first(output)
        frozen = live_module.forward(*units(None, inputs)) if freeze.site == "neurons" else kept
        far = (frozen.float() - live.float()).norm(dim=-1, keepdim=True)
        key = ("freeze", freeze.null, freeze.site, layer, freeze.units)
        drawn = _drawn(group, key, columns, rows, live.shape[-1]).repeat(copies, 1, 1)
        new = (live.float() + drawn.to(far) * far).to(live.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with ExitStack() as held:
        if freeze.null is not None:
            moved = decoder.projection(module) if freeze.site == "neurons" else module
            held.callback(moved.register_forward_hook(null, prepend=True).remove)
        elif freeze.site == "neurons":
            handle = decoder.projection(module).register_forward_pre_hook(units, prepend=True)
            held.callback(handle.remove)
        else:
            held.enter_context(decoder.stubbed(module, kept, base.outputs[module]))
        yield


@contextmanager
def _windows(
    parts: Stack, base: Record, source: Record, layer: int, joined: list, n: int, start: int,
    null: int | None, group: Group, rows: slice,
) -> Iterator[None]:  # fmt: skip
    """Within, modules of a block that lie in a cell's window give the source run's output to its rows."""
    with ExitStack() as held:
        for site, find, theirs, ours in (
            ("attn_out", decoder.attention, source.attn, base.attn),
            ("mlp_out", decoder.mlp, source.mlp, base.mlp),
        ):
            mine = [(i, c, w) for i, (c, w, _) in enumerate(joined) if c.site == site and layer <= c.last]
            if not mine:
                continue

            def hook(
                _: Any, __: Any, output: Any, mine: Any = mine, theirs: Any = theirs, ours: Any = ours
            ) -> Any:
                new = decoder.first(output).clone()
                for i, cell, where in mine:
                    value = theirs[layer][:, list(where)]
                    if null is not None:
                        old = ours[layer][:, list(where)].float()
                        key, moved = (cell.site, layer, ()), value.float() - old
                        value = (old + _or_random(moved, null, group, key, where, rows)).to(new)
                    new[i * n : (i + 1) * n][:, [c - start for c in where]] = value
                return (new, *output[1:]) if isinstance(output, tuple) else new

            held.callback(find(parts.blocks[layer]).register_forward_hook(hook, prepend=True).remove)
        yield


@torch.no_grad()
def check_partial(group: Group) -> None:
    """Blocks run in part must give what the model gives as a whole; else nothing here is worth a look.

    Raises:
        ValueError: they don't.
    """
    few, parts = group.x1.rows(slice(0, 1)), group.parts
    hooked = bool(decoder.hooks(parts.model))
    seen: list[Tensor] = []
    handle = parts.blocks[-1].register_forward_hook(lambda m, i, o: seen.append(decoder.first(o)))
    try:
        parts.base(input_ids=group.first, use_cache=False)
    finally:
        handle.remove()
    # Fewer positions than were recorded, but several if the prompt's end leaves room for them.
    start = min(group.differs + 1, few.length - few.offset - group.read)
    ends = [seen[0], few.resid[-1]]
    for plain in (False, True) if hooked else (False,):  # hooks may tell copies that stand beside each other
        resid = few.resid[0][:, start:].repeat(2, 1, 1)  # several copies, as in a sweep
        for layer in range(parts.depth):
            resid, read = resid.to(few.resid[layer].device), group.read if layer == parts.depth - 1 else None
            resid = partial.run_block(parts, few, layer, resid, start + few.offset, plain=plain, read=read)
        ends += resid.split(1)
    index = torch.zeros(1, dtype=torch.long)
    whole, *others = (group.outcome(end[:, -group.read :], index) for end in ends)
    if not whole.isfinite().all():
        return  # an overflow, which is reported with the pair's name
    gap = max((other - whole).abs().max().item() for other in others)
    loose = 1e-3 if resid.dtype == torch.float32 else 0.25
    if not gap <= loose * (1 + whole.abs().max().item()):
        decoder.refuse(parts.model, parts.blocks[0], f"run in part give an outcome that is off by {gap:.2g}")
