"""Patched runs by exact recomputation of what a patch can reach: the engine behind :mod:`flow.patching`.

In a causal model a patch changes nothing before its first position and nothing below its block. So a patched
run *starts at the patched block* (:meth:`_Patching.patch`), *reuses the prefix* as it was recorded, keys and
values before the first patched position (:func:`run_block`), and *reads the last positions*, where the
outcome looks (:meth:`_Patching.suffix`). A *cell* is one patch, for every pair of a group. All cells that
start at one position share a batch, which grows as deeper blocks come to be patched; where that makes
attention cheaper, copies of a suffix stand side by side in one row, with a mask between them.

Introduced in notebook 02 ("Layers").
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn

from harmlens.flow.record import CACHE, Group, Record, record_run, seeded, shown
from harmlens.models import parts as decoder
from harmlens.models.forward import LanguageModel
from harmlens.models.parts import Stack, attention, first, mlp, refuse, stubbed

SITES = ("resid_post", "layer", "attn_out", "mlp_out", "head")  # and sets of hidden units: "neurons"
MODULES = ("attn_out", "mlp_out")
STORES = {  # site -> how to find its module, where a record keeps it
    "attn_out": (attention, "attn"), "head": (attention, "heads"),
    "mlp_out": (mlp, "mlp"), "neurons": (mlp, "hidden"),
}  # fmt: skip
MAX_TOKENS = 3072  # most rows times positions that go through a block at once; bounds memory
MAX_LOGITS = 1 << 27  # most logits that are read at once
_TRIED: WeakSet[nn.Module] = WeakSet()

# --------------------------------------------------------------------------- patches


@dataclass(frozen=True)
class Freeze:
    """Modules that keep the unpatched run's output downstream of a patch, which severs paths through them.

    Attributes:
        site: ``"attn_out"``, ``"mlp_out"``, ``"modules"`` (both) or ``"neurons"`` (hidden ``units`` of MLPs).
        layers: None for all downstream of the patch.
        null: a seed: instead of being frozen, the module's output is moved in a random direction, by as
            much as freezing would move it. The control of a severed path.
        here: at the patched positions only, as in causal tracing; elsewhere modules react.
    """

    site: str
    layers: Sequence[int] | None = None
    units: Sequence[int] = ()
    null: int | None = None
    here: bool = False

    def __post_init__(self) -> None:
        if self.site not in (*MODULES, "modules", "neurons"):
            raise ValueError(f"freeze.site={self.site!r}: choose attn_out, mlp_out, modules or neurons")
        for name in ("layers", "units"):  # whatever they were given as: they are part of names and keys
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(int(i) for i in getattr(self, name)))
        if (self.site == "neurons") != bool(self.units):
            raise ValueError("freeze.units: give hidden units with site='neurons', and only with it")

    def holds(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers


@dataclass(frozen=True)
class Cell:
    """One patch: a site in a layer, or in several up to ``last``, at some columns of the recorded runs."""

    site: str
    layer: int
    last: int
    columns: tuple[int, ...]
    units: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[str, int, tuple[int, ...]]:
        return self.site, self.layer, self.units


@torch.no_grad()
def run_cells(
    group: Group,
    cells: Sequence[Cell],
    *,
    direction: str = "denoising",
    freeze: Freeze | None = None,
    null: int | None = None,
) -> tuple[Float[Tensor, "cell pair ..."], Float[Tensor, "cell pair"]]:
    """Outcome (or several) of each patch for each pair, and the norm of what was patched; on the CPU."""
    # Before the first position that differs both runs are the same, so there is nothing to patch.
    cells = [replace(cell, columns=tuple(c for c in cell.columns if c >= group.differs)) for cell in cells]
    n, recorded = len(group.index), group.x1.length - group.x1.offset
    fit = max(1, MAX_TOKENS // (recorded - min((c for cell in cells for c in cell.columns), default=0)))
    if n > fit:
        some = [group.part(slice(k, min(n, k + fit))) for k in range(0, n, fit)]
        found = [run_cells(part, cells, direction=direction, freeze=freeze, null=null) for part in some]
        return tuple(torch.cat(tensors, dim=1) for tensors in zip(*found, strict=True))
    this = _Patching(group, *group.runs(direction), freeze, null)
    unpatched = group.unpatched(this.base).cpu()
    values = unpatched[None].repeat(len(cells), *[1] * unpatched.ndim)
    sizes = torch.zeros(len(cells), n)
    wanted: dict[tuple, set[int]] = defaultdict(set)
    starts: dict[int, list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        if cell.columns and (cell.units or cell.site not in ("head", "neurons")):
            wanted[cell.key].update(cell.columns)
            if cell.layer < group.parts.depth - 1 or cell.columns[-1] >= recorded - group.read:
                starts[cell.columns[0]].append(i)  # else nothing looks there
    step = max(1, MAX_LOGITS // (group.read * len(group.parts.head.weight)))
    patches = {key: this.patch(*key, sorted(columns)) for key, columns in wanted.items()}
    for start, members in sorted(starts.items()):
        members.sort(key=lambda i: cells[i].layer)
        few = max(1, MAX_TOKENS // (n * (recorded - start)))
        for tile in (members[k : k + few] for k in range(0, len(members), few)):
            resid = this.suffix([(cells[i], patches[cells[i].key]) for i in tile], start)
            ends, index = resid[:, -group.read :].split(step), torch.arange(n).repeat(len(tile)).split(step)
            out = torch.cat([group.outcome(*some) for some in zip(ends, index, strict=True)]).cpu()
            values[tile] = out.view(len(tile), n, *out.shape[1:])
    for i, cell in enumerate(cells):
        if cell.columns and cell.key in patches:
            sizes[i] = patches[cell.key].at(cell.columns)[1].norm(dim=-1).cpu()
            for layer in range(cell.layer + 1, cell.last + 1):
                apart = this.output(this.source, cell, layer) - this.output(this.base, cell, layer)
                sizes[i] = sizes[i].hypot(apart.flatten(1).norm(dim=-1).cpu())
    return values, sizes


@dataclass(frozen=True)
class _Patch:
    """The patched residual stream behind a block, at some columns, and how far the site was moved there."""

    columns: list[int]
    resid: Float[Tensor, "pair column width"]
    moved: Float[Tensor, "pair column"]

    def at(self, columns: Sequence[int]) -> tuple[Tensor, Tensor]:
        where = [self.columns.index(c) for c in columns]
        return self.resid[:, where], self.moved[:, where]


@dataclass(frozen=True)
class _Patching:
    """What all cells of a group share: the run that is patched, and where activations come from."""

    group: Group
    base: Record
    source: Record
    freeze: Freeze | None
    null: int | None

    def drawn(self, key: Any, columns: Sequence[int], width: int) -> Float[Tensor, "pair column width"]:
        """Random unit vectors, which depend on the pair, the position and the key: never on the batch."""
        x1, read = self.group.x1, self.group.read
        prompt = x1.length - read + 1  # both replies of Y3 get the same draws
        at, draws = [c + x1.offset for c in columns], []
        for name in self.group.names:
            generator = seeded(repr((name, key)))
            table = [torch.randn(count, width, generator=generator) for count in (prompt, read - 1)]
            draws.append(torch.cat(table)[at])
        drawn = torch.stack(draws)
        return drawn / drawn.norm(dim=-1, keepdim=True)

    def or_random(self, moved: Tensor, key: Any, columns: Sequence[int]) -> Tensor:
        if self.null is None:
            return moved
        drawn = self.drawn((self.null, *key), columns, moved.shape[-1]).to(moved)
        return drawn * moved.norm(dim=-1, keepdim=True)

    def output(self, run: Record, cell: Cell, layer: int) -> Float[Tensor, "pair column width"]:
        """What a module writes, or a whole block adds to the residual stream, at a cell's columns."""
        where = list(cell.columns)
        if cell.site == "layer":
            return run.resid[layer + 1][:, where].float() - run.resid[layer][:, where].float()
        return getattr(run, STORES[cell.site][1])[layer][:, where].float()

    def patched_output(self, cell: Cell, layer: int) -> Float[Tensor, "pair column width"]:
        """The same of the source run; for a null, as far from the base run's in a random direction."""
        theirs = self.output(self.source, cell, layer)
        if self.null is None:
            return theirs
        ours = self.output(self.base, cell, layer)
        return ours + self.or_random(theirs - ours, (cell.site, layer, cell.units), cell.columns)

    def patch(self, site: str, layer: int, units: tuple[int, ...], columns: list[int]) -> _Patch:
        """What the residual stream behind the block becomes when a site takes the source run's value."""
        base, source, block = self.base, self.source, self.group.parts.blocks[layer]

        run = slice(columns[0], columns[-1] + 1)
        where = run if len(columns) == run.stop - run.start else columns  # without copying, where possible

        def cut(tensors: list[Tensor], at: int = layer) -> Tensor:
            return tensors[at][:, where]

        before, old, new = cut(base.resid), cut(base.resid, layer + 1), cut(source.resid, layer + 1)
        find, store = STORES.get(site, (None, None))
        if find:
            old = cut(base.attn if find is attention else base.mlp)
            new = cut(getattr(source, store))
        if units:
            inner = cut(getattr(base, store)).clone()
            inner[..., list(units)] = new[..., list(units)]
            new = decoder.projection(find(block))(inner)
        moved = new.float() - old.float()
        if site == "layer":
            moved = moved - (cut(source.resid).float() - before.float())
        moved = self.or_random(moved, (site, layer, units), columns)
        if self.null is not None or site == "layer":
            new = (old.float() + moved).to(old.dtype)
        if find is mlp:
            new = compose(self.group.parts, base, layer, before, attn=cut(base.attn), mlp_out=new)
        elif find:  # the MLP of the same block reacts
            with self.frozen(layer, columns, only=("mlp_out", "neurons")):
                new = compose(self.group.parts, base, layer, before, attn=new)
        return _Patch(columns, new, moved.norm(dim=-1))

    def suffix(self, some: list[tuple[Cell, _Patch]], start: int) -> Float[Tensor, "cellpair suffix width"]:
        """Stream behind the last block of every patched run, from column ``start`` on.

        A cell's rows join the batch behind the block that it patches.
        """
        parts, base = self.group.parts, self.base
        n, resid, joined = len(base.resid[0]), None, []
        for layer in range(some[0][0].layer, parts.depth):
            windows = [(i, cell) for i, cell in enumerate(joined) if layer <= cell.last]
            # Of the last block only what the outcome reads is needed, unless something in it is changed.
            hooked = self.freeze is not None or bool(windows)
            read = self.group.read if layer == parts.depth - 1 and not hooked else None
            if resid is not None:
                before = resid.to(base.resid[layer].device)
                with (
                    self.frozen(layer, list(range(start, base.length - base.offset)), joined),
                    self.windows(layer, windows, start),
                ):
                    at = start + base.offset
                    resid = run_block(parts, base, layer, before, at, plain=hooked, read=read)
                for i, cell in windows:
                    if cell.site == "layer":
                        where, mine = [c - start for c in cell.columns], slice(i * n, (i + 1) * n)
                        own = self.patched_output(cell, layer)
                        resid[mine][:, where] = (before[mine][:, where].float() + own).to(resid.dtype)
            here = [entry for entry in some if entry[0].layer == layer]
            if here:
                fresh = base.resid[layer + 1][:, start:][None].repeat(len(here), 1, 1, 1)
                for i, (cell, patch) in enumerate(here):
                    new = patch.at(cell.columns)[0]
                    fresh[i][:, [c - start for c in cell.columns]] = new.to(fresh.device)
                fresh = fresh.flatten(0, 1) if read is None else fresh.flatten(0, 1)[:, -read:]
                resid = fresh if resid is None else torch.cat([resid.to(fresh.device), fresh])
                joined += [cell for cell, _ in here]
        return resid

    @contextmanager
    def windows(self, layer: int, windows: list[tuple[int, Cell]], start: int) -> Iterator[None]:
        """Within, modules of a block that lie in a cell's window give the source run's output to its rows."""
        n = len(self.base.resid[0])

        def give(site: str, output: Tensor) -> Tensor:
            new = output.clone()
            for i, cell in windows:
                if cell.site == site:
                    value = self.patched_output(cell, layer).to(new)
                    new[i * n : (i + 1) * n][:, [c - start for c in cell.columns]] = value
            return new

        with ExitStack() as held:
            for site in {cell.site for _, cell in windows} & set(MODULES):
                module = STORES[site][0](self.group.parts.blocks[layer])
                held.enter_context(shown(partial(give, site), leaving=[module], before_others=True))
            yield

    @contextmanager
    def frozen(
        self, layer: int, columns: list[int], cells: Sequence[Cell] = (), only: Sequence[str] = tuple(STORES)
    ) -> Iterator[None]:
        """Within, the frozen modules of a block give what they gave in the unpatched run."""
        freeze, block = self.freeze, self.group.parts.blocks[layer]
        with ExitStack() as held:
            if freeze is not None and freeze.site == "modules":
                for site in MODULES:
                    one = replace(self, freeze=replace(freeze, site=site))
                    held.enter_context(one.frozen(layer, columns, cells, only))
            elif freeze is not None and freeze.holds(layer) and freeze.site in only:
                self.hold(held, layer, STORES[freeze.site][0](block), columns, cells)
            yield

    def hold(self, held: ExitStack, layer: int, module: nn.Module, columns: list[int], cells: Sequence[Cell]):
        """Keep one module as it was, or move it for the null, until ``held`` is left."""
        freeze, units, copies = self.freeze, list(self.freeze.units), len(cells) or 1
        kept = getattr(self.base, STORES[freeze.site][1])[layer][:, columns].repeat(copies, 1, 1)
        at = torch.tensor([[c in cell.columns for c in columns] for cell in cells])

        def move(moved: Any, inputs: tuple, output: Any) -> Any:
            live, new = first(output), kept
            if units:
                hidden = inputs[0].clone()
                hidden[..., units] = kept[..., units]
                new = moved.forward(hidden)
            if freeze.null is not None:
                far = (new.float() - live.float()).norm(dim=-1, keepdim=True)
                key = ("freeze", freeze.null, freeze.site, layer, freeze.units)
                drawn = self.drawn(key, columns, live.shape[-1]).repeat(copies, 1, 1)
                new = (live.float() + drawn.to(far) * far).to(live.dtype)
            if freeze.here and cells:
                where = at.repeat_interleave(len(live) // copies, 0)[..., None].to(live.device)
                new = torch.where(where, new, live)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        if freeze.null is not None or freeze.here or units:
            moved = decoder.projection(module) if units else module
            held.callback(moved.register_forward_hook(move, prepend=True).remove)
        else:
            held.enter_context(stubbed(module, kept, self.base.outputs[module]))


# --------------------------------------------------------------------------- single blocks, in part


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

    Works position by position, since attention alone looks elsewhere. Norms behind them are the block's own.
    """
    block = parts.blocks[layer]
    # Copies, since blocks may write into what they are handed.
    resid, attn = (t.clone(memory_format=torch.contiguous_format) for t in (resid, attn))
    kwargs = {k: None if v is CACHE or k == "attention_mask" else v for k, v in run.kwargs[layer].items()}
    with ExitStack() as held:
        held.enter_context(stubbed(attention(block), attn, run.outputs[attention(block)]))
        if mlp_out is not None:
            held.enter_context(stubbed(mlp(block), mlp_out.clone(), run.outputs[mlp(block)]))
        return first(block(resid, **kwargs))


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
        read: return these last positions only; of the others only keys and values are computed.
    """
    rows, width = len(run.kv[layer][0]), resid.shape[-1]
    suffix, copies = run.length - start, len(resid) // rows
    # As many copies side by side as do not make the rows longer than they once were.
    fit = 1 if plain else max(1, run.length // suffix)
    beside = max(c for c in range(1, min(copies, fit) + 1) if copies % c == 0)
    call = _Call(parts.blocks[layer], run, layer, start, beside)
    known = [tuple(t[:, :, :start] for t in run.kv[layer])]
    out = resid.unflatten(0, (-1, beside, rows)).transpose(1, 2)  # [pile, row, beside, position, width]
    if read is None or read >= suffix or plain:
        out = call(out, known, [suffix])[..., -(read or suffix) :, :]
    else:
        lengths = [suffix - read, read]
        try:
            call(out[..., :-read, :], None, lengths[:1])
        except _Keys as new:
            known.append(new.args)
        out = call(out[..., -read:, :], known, lengths)
    return out.transpose(1, 2).reshape(copies * rows, -1, width)


class _Keys(Exception):
    """New keys and values: the rest of a block is not needed."""


@dataclass(frozen=True)
class _Prefix:
    """Stands in for the cache of one block: known keys and values come before the new ones, in all piles."""

    known: list[tuple[Tensor, Tensor]] | None
    piles: int

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.known is None:
            raise _Keys(keys, values)
        return self._join(0, keys), self._join(1, values)

    def get_seq_length(self, *_: Any) -> int:
        return sum(keys.shape[-2] for keys, _ in self.known or [])

    def _join(self, which: int, new: Tensor) -> Tensor:
        # Recorded rows are repeated for each pile while they are copied, not before.
        old = [pair[which].unflatten(0, (-1, len(new) // self.piles)) for pair in self.known]
        old = [t.expand(self.piles, *t.shape[1:]) for t in old]
        return torch.cat([*old, new.view(self.piles, -1, *new.shape[1:])], dim=-2).flatten(0, 1)


@dataclass(frozen=True)
class _Call:
    """One block on copies of a suffix, which stand in piles and ``beside`` each other."""

    block: nn.Module
    run: Record
    layer: int
    start: int
    beside: int

    def __call__(
        self,
        resid: Float[Tensor, "pile row beside pos width"],
        known: list[tuple[Tensor, Tensor]] | None,
        lengths: list[int],
    ) -> Float[Tensor, "pile row beside pos width"]:
        """The last of the parts that the suffix is given in; for no known keys :class:`_Keys` is raised."""
        cache, count, kwargs = _Prefix(known, len(resid)), lengths[-1], {}
        at = self.start + sum(lengths) - count
        for name, value in self.run.kwargs[self.layer].items():
            if value is CACHE:
                kwargs[name] = cache
            elif name == "attention_mask":
                kwargs[name] = self._mask(value, at, count, lengths)
            else:
                kwargs[name] = self._sliced(value, at, count)
        # In one piece: experts look at all positions as one row.
        flat = resid.flatten(2, 3).flatten(0, 1).contiguous()
        return first(self.block(flat, **kwargs)).reshape(resid.shape)

    def _sliced(self, value: Any, at: int, count: int) -> Any:
        recorded = self.run.length
        if isinstance(value, tuple) and all(isinstance(v, Tensor) for v in value):  # rotary embeddings
            return tuple(self._sliced(v, at, count) for v in value)
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == recorded:
            return value[:1, at : at + count].repeat(1, self.beside, *[1] * (value.ndim - 2))
        if isinstance(value, Tensor) and value.ndim == 1 and len(value) == recorded:
            return value[at : at + count].repeat(self.beside)
        return value

    def _mask(self, mask: Any, at: int, count: int, lengths: list[int]) -> Tensor | None:
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
                "call lm.model.set_attn_implementation('sdpa')"
            )
        else:
            mask = mask[:1, :, at : at + count]  # no padding: all rows have the same
        if self.beside == 1:
            return mask[..., : at + count]
        off = torch.tensor(False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
        own = torch.eye(self.beside, dtype=torch.bool, device=mask.device)[:, None, :, None]
        columns = [mask[..., : self.start].repeat(1, 1, self.beside, 1)]
        for part in mask[..., self.start : at + count].split(lengths, dim=-1):
            blocks = torch.where(own, part[:, :, None, :, None], off.to(part))
            columns.append(blocks.flatten(4, 5).flatten(2, 3))
        return torch.cat(columns, dim=-1)


# --------------------------------------------------------------------------- whether blocks can be patched


def patchable(lm: LanguageModel, *, in_part: bool = True) -> Stack:
    """The parts of a model, once it is known that its blocks can be patched and ablated.

    Every block has to give in part, and put together from an attention module and an MLP, what it gives as a
    whole. This is tried on a few tokens, once for a model, and again while hooks stand on it.

    Args:
        in_part: blocks will be run in part. If not, hooks that stand on the model don't matter.

    Raises:
        ValueError: says what is in the way (:func:`models.parts.refuse`); as :func:`models.parts.stack`.
    """
    blocks = decoder.blocks(lm)
    for at, block in enumerate(blocks):
        for find, what in ((attention, "attention"), (mlp, "MLP")):
            try:
                find(block)
            except ValueError:
                refuse(lm.model, block, f"have no {what} module", at)
    standing = bool(decoder.hooks(lm.model))
    if not in_part if standing else lm.model in _TRIED:
        return decoder.stack(lm)
    seeded = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(lm.model.get_input_embeddings().weight), generator=seeded)
    ids, at = drawn[torch.tensor([[0, 1, 2, 3], [0, 4, 5, 6]])].to(lm.device), 0
    try:
        parts = decoder.stack(lm)
        run, other = record_run(parts, ids), record_run(parts, ids.flip(0))
        for at, block in enumerate(blocks):
            if why := _obstacle(parts, run, other, at):
                refuse(lm.model, block, why, at)
    except (decoder.Unpatchable, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        refuse(lm.model, blocks[at], f"can't be run in part ({str(error).splitlines()[0]})", at)
    if not standing:
        _TRIED.add(lm.model)
    return parts


@torch.no_grad()
def _obstacle(parts: Stack, run: Record, other: Record, layer: int) -> str | None:
    """What keeps a block from being patched, if anything; ``other`` is of the rows the other way round."""
    for name, value in run.kwargs[layer].items():
        if isinstance(value, Tensor) and not torch.equal(value, other.kwargs[layer][name]):
            return f"read more of a prompt than the stream ({name})"
    before, after, at = run.resid[layer], run.resid[layer + 1], run.length - 2
    loose = 1e-3 if after.dtype == torch.float32 else 0.1

    def off(one: Tensor, other: Tensor) -> float:
        return ((one.float() - other.float()).norm() / (1e-6 + other.float().norm())).item()

    # With attention and MLP giving nothing, the stream goes through, scaled and shifted at most.
    nothing, flipped = torch.zeros_like(run.attn[layer]), before.flip(0)
    bare, turned, between = (
        compose(parts, run, layer, resid, attn=nothing, mlp_out=nothing)
        for resid in (before, flipped, (before + flipped) / 2)
    )
    if torch.equal(bare, turned):
        return "have modules that give out the stream with what they write"
    if off((bare + turned) / 2, between) > loose:
        return "do more to the stream than attention and one MLP write"
    for what, again in (
        ("their modules", compose(parts, run, layer, before, attn=run.attn[layer], mlp_out=run.mlp[layer])),
        ("attention and the rest", compose(parts, run, layer, before, attn=run.attn[layer])),
        ("some positions", run_block(parts, run, layer, before[:, at - run.offset :], at)),
    ):
        gap = off(again, after[:, -again.shape[1] :])
        if gap > loose:
            return f"put together from {what} give something else ({gap:.2g} off)"
    return None


@torch.no_grad()
def check_partial(group: Group) -> None:
    """Refuse blocks that, run in part, give another outcome than the model as a whole."""
    few, parts = group.x1.rows(slice(0, 1)), group.parts
    hooked, seen = bool(decoder.hooks(parts.model)), []
    with shown(seen.append, leaving=parts.blocks[-1:]):
        parts.base(input_ids=group.ids[:1], use_cache=False)
    # Fewer positions than were recorded, but several if the prompt's end leaves room for them.
    start = min(group.differs + 1, few.length - few.offset - group.read)
    ends = [seen[0], few.resid[-1]]
    for plain in (False, True) if hooked else (False,):  # hooks may tell copies that stand beside each other
        resid = few.resid[0][:, start:].repeat(2, 1, 1)  # several copies, as in a sweep
        for layer in range(parts.depth):
            resid, read = resid.to(few.resid[layer].device), group.read if layer == parts.depth - 1 else None
            resid = run_block(parts, few, layer, resid, start + few.offset, plain=plain, read=read)
        ends += resid.split(1)
    index = torch.zeros(1, dtype=torch.long)
    whole, *others = (group.outcome(end[:, -group.read :], index) for end in ends)
    if not whole.isfinite().all():
        return  # an overflow, which is reported with the pair's name
    gap = max((other - whole).abs().max().item() for other in others)
    loose = 1e-3 if resid.dtype == torch.float32 else 0.25
    if not gap <= loose * (1 + whole.abs().max().item()):
        refuse(parts.model, parts.blocks[0], f"run in part give an outcome that is off by {gap:.2g}")


def check_units(parts: Stack, name: str, layer: int, units: Sequence[int] = (), of: Any = mlp) -> None:
    """Refuse, by the argument's name, a layer or units of its MLP that the model does not have."""
    if not 0 <= layer < parts.depth:
        raise ValueError(f"{name}: there is no layer {layer}; choose out of 0 to {parts.depth - 1}")
    count = decoder.projection_weight(of(parts.blocks[layer])).shape[1] if len(units) else 0
    wrong = [int(unit) for unit in units if not 0 <= unit < count]
    if wrong:
        raise ValueError(f"{name}: layer {layer} has the hidden units 0 to {count - 1}, not {wrong[:5]}")
