"""Runs of a model, recorded: what every block did on both sides of prompt pairs, in groups of one length.

Prompts are never padded: a padded position would need a mask in every partial run. Pairs of one length and
one layout of positions stand in one group, and what prompts share at their start is run once. The blocks are
always the model's own code; :mod:`flow.engine` calls them again with some of what was recorded here.

Introduced in notebook 02 ("Layers").
"""

from __future__ import annotations

import hashlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from harmlens.flow.outcomes import Reply
from harmlens.models import parts as decoder
from harmlens.models.chats import Pair
from harmlens.models.forward import LanguageModel, require_room, split_tokens, token_ids
from harmlens.models.parts import Stack, attention, first, mlp, projection, refuse

BATCH = 128  # most pairs recorded at once
CACHE = object()  # stands where a block takes its cache
Positions = str | Callable[[LanguageModel, Pair], Mapping[str, Sequence[int]]]


@contextmanager
def shown(
    change: Callable[[Tensor], Tensor | None],
    *,
    entering: Sequence[nn.Module] = (),
    leaving: Sequence[nn.Module] = (),
    before_others: bool = False,
) -> Iterator[None]:
    """Within, show what enters or leaves modules to a function; what it gives back stands in its place."""

    def pre(module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        new = change(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    def post(module: nn.Module, inputs: Any, output: Any) -> Any:
        new = change(first(output))
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with ExitStack() as held:
        for module in entering:
            handle = module.register_forward_pre_hook(pre, with_kwargs=True, prepend=before_others)
            held.callback(handle.remove)
        for module in leaving:
            held.callback(module.register_forward_hook(post, prepend=before_others).remove)
        yield


# --------------------------------------------------------------------------- what a stack of blocks did


@dataclass
class Record:
    """What a stack did on some rows of ids, from position ``offset`` on.

    Attributes:
        length: number of positions, those before ``offset`` included.
        resid: stream before each block and after the last one [row, pos - offset, width].
        attn, mlp: what the modules gave out (before any norm behind them), one tensor per block.
        heads, hidden: inputs of their output projections, if recorded.
        kv: keys and values of each block at *all* positions.
        kwargs: the other arguments each block was called with.
        outputs: in a tuple of which length each module gives out its output; 0 for none.
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
        stores = ("resid", "attn", "mlp", "heads", "hidden")
        cut = {name: [t[which] for t in getattr(self, name)] for name in stores}
        return replace(self, kv=[(k[which], v[which]) for k, v in self.kv], **cut)


# What writes into the stream, and where a record keeps its output and the input of its projection.
WRITERS = ((attention, "attn", "heads"), (mlp, "mlp", "hidden"))


@torch.no_grad()
def record_run(
    parts: Stack,
    ids: Int[Tensor, "row pos"],
    *,
    details: Sequence[str] = (),
    noise: Float[Tensor, "row pos width"] | None = None,
    share: bool = True,
    since: int = 0,
) -> Record:
    """Run rows of equal length, without padding, and record them.

    Hooks of others act again when a block is called in part, so what is kept is what they are given: the
    stream in front of them, and what a module gives out before they change it.

    Args:
        details: out of ``"heads"`` and ``"hidden"``: which inputs of output projections to keep.
        noise: added to the embeddings (Gaussian corruption, as in causal tracing).
        share: run once what rows have in common at their start; else all is recorded from position 0 on.
        since: keep only keys and values of what lies before this position.
    """
    kinds = _beginnings(ids, noise) if share else torch.arange(len(ids)).repeat(ids.shape[1], 1)
    counts = [int(kind.max()) + 1 for kind in kinds]
    shared = sum(count == 1 for count in counts[:-1]) if share else 0
    out = Record(max(shared, min(since, ids.shape[1] - 1)), ids.shape[1])
    cache = DynamicCache()  # without the configuration: sliding layers too keep all keys

    def arguments(block: nn.Module, args: tuple, kwargs: dict) -> None:
        # Some models hand their blocks the cache and the mask by position.
        named = list(inspect.signature(type(block).forward).parameters)[1:]
        kwargs = dict(zip(named, args, strict=False)) | kwargs
        decoder.require_one_stream(parts.model, kwargs.pop(named[0]))
        out.kwargs.append({name: CACHE if value is cache else value for name, value in kwargs.items()})

    with ExitStack() as held:
        for block in parts.blocks:
            held.callback(block.register_forward_pre_hook(arguments, with_kwargs=True).remove)
        parts.base(input_ids=ids[:1], past_key_values=cache, use_cache=True)
    if shared:
        cache.crop(shared - ids.shape[1])
    else:
        cache = DynamicCache()
    found: dict[str, list[Tensor]] = {name: [] for name in ("resid", "attn", "mlp", *details)}

    def keep(name: str) -> Callable[[Tensor], None]:
        def copied(value: Tensor) -> None:  # since blocks may go on to change a tensor in place
            value = value[:, max(0, out.offset - start) :]
            found[name].append(value.clone() if len(value) == len(ids) else value[kind])

        return copied

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        out.outputs[module] = len(output) if isinstance(output, tuple) else 0

    modules = [(find(block), *names) for block in parts.blocks for find, *names in WRITERS]
    rows, segments = torch.arange(len(ids)), _segments(counts, shared)
    at = torch.zeros_like(rows)  # row of the cache from which each row goes on
    with ExitStack() as held:
        held.enter_context(shown(keep("resid"), entering=parts.blocks, before_others=True))
        for module, given, inner in modules:
            held.callback(module.register_forward_hook(count).remove)
            held.enter_context(shown(keep(given), leaving=[module], before_others=True))
            if inner in details:
                held.enter_context(shown(keep(inner), entering=[projection(module)], before_others=True))
        held.enter_context(shown(keep("resid"), leaving=parts.blocks[-1:]))
        if noise is not None:
            embed = parts.model.get_input_embeddings()
            held.enter_context(shown(lambda x: x + noise[few][:, start:stop].to(x), leaving=[embed]))
        for start, stop in segments:
            kind = kinds[stop - 1]
            few = torch.full((counts[stop - 1],), len(ids)).scatter_reduce(0, kind, rows, "amin")  # first
            if start:
                cache.batch_select_indices(at[few].to(ids.device))
            whole = parts.base(input_ids=ids[few, start:stop], past_key_values=cache, use_cache=True)
            at = kind
    fired = {name: len(tensors) // len(segments) - (name == "resid") for name, tensors in found.items()}
    if set(fired.values()) != {parts.depth}:
        refuse(
            parts.model, parts.blocks[0],
            f"show {fired['resid']} streams, {fired['attn']} attention and {fired['mlp']} MLP outputs of "
            f"{parts.depth}, since a hook never fired",
        )  # fmt: skip
    for name, tensors in found.items():
        each = len(tensors) // len(segments)
        setattr(out, name, [torch.cat(tensors[layer::each], dim=1) for layer in range(each)])
    out.kv = [(kept.keys, kept.values) for kept in cache.layers]
    if counts[-1] < len(ids):
        out.kv = [(keys[at], values[at]) for keys, values in out.kv]
    if len(out.kv) != parts.depth or any(k.shape[-2] != out.length for k, _ in out.kv):
        refuse(parts.model, parts.blocks[0], "don't all keep keys and values of all positions in their cache")
    for i, (module, given, inner) in enumerate(modules):
        if inner in details:
            one, wrote = (getattr(out, name)[i // 2][:1] for name in (inner, given))
            if not _close(projection(module)(one), wrote):
                raise ValueError(
                    f"{type(module).__name__} does not give out what its output projection writes, so its "
                    "hidden units or heads can't be patched; use the sites attn_out, mlp_out, layer or "
                    "resid_post"
                )
    end = out.resid[-1][:, -1:]
    if not _close(end if parts.norm is None else parts.norm(end), whole.last_hidden_state[at, -1:]):
        refuse(parts.model, parts.blocks[-1], "are followed by more than the final norm", parts.depth - 1)
    return out


def _beginnings(ids: Tensor, noise: Tensor | None) -> Int[Tensor, "pos row"]:
    """Number of the beginning of each row up to each position: rows with equal beginnings have the same."""
    ids, rows = ids.cpu(), torch.arange(len(ids))
    touched = torch.zeros(ids.shape[1]) if noise is None else noise.abs().amax((0, 2)).cpu()
    kind, out = torch.zeros_like(rows), []
    for noised, column in zip(touched > 0, ids.T, strict=True):
        kind = torch.unique(kind * (int(ids.max()) + 1) + column, return_inverse=True)[1]
        # What is noised is no longer common. And where nearly all differ, putting the rest in its places
        # costs more than running it.
        kind = rows if noised or int(kind.max()) + 1 > 0.8 * len(rows) else kind
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
    best: dict[int, tuple[int, list]] = {offset: (0, [])}  # position -> least cost up to there, segments
    for end in range(offset + 1, len(counts) + 1):
        if end == len(counts) or counts[end] > counts[end - 1]:
            each = counts[end - 1]
            cost, start = min((before + call + each * (end - at), at) for at, (before, _) in best.items())
            best[end] = cost, [*best[start][1], (start, end)]
    return best[len(counts)][1]


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding, where infinities and NaN (an overflow, reported later) count as equal."""
    one, other = one.float(), other.to(one.device).float()
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.02, atol=1e-3, equal_nan=True)


# --------------------------------------------------------------------------- pairs


@dataclass
class Group:
    """Pairs of one length, recorded: ``x1`` and ``x0`` are the two runs.

    Attributes:
        index: the pairs' places in the list that was given.
        names: their ids; random draws depend on them and not on the order of pairs.
        ids: of the runs on x1, and behind them of those on x0 [2 pairs, pos].
        columns: position label -> columns, counted from the first recorded position.
        differs: first column at which the two runs differ.
        read: how many last positions the outcome reads.
        outcome: stream at these positions, places in the group of the rows' pairs -> a value for each row.
    """

    parts: Stack
    index: list[int]
    names: list[str]
    ids: Int[Tensor, "row pos"]
    x1: Record
    x0: Record
    columns: dict[str, tuple[int, ...]]
    differs: int
    read: int
    outcome: Callable[[Tensor, Tensor], Tensor]

    def runs(self, direction: str) -> tuple[Record, Record]:
        """The run that is patched, and the one that gives the activations."""
        return (self.x0, self.x1) if direction == "denoising" else (self.x1, self.x0)

    def part(self, rows: slice) -> Group:
        def outcome(resid: Tensor, index: Tensor) -> Tensor:
            return self.outcome(resid, index + rows.start)

        return replace(
            self, index=self.index[rows], names=self.names[rows], x1=self.x1.rows(rows),
            x0=self.x0.rows(rows), outcome=outcome,
        )  # fmt: skip

    @torch.no_grad()
    def unpatched(self, run: Record) -> Float[Tensor, "pair ..."]:
        """Outcome of a recorded run."""
        return self.outcome(run.resid[-1][:, -self.read :], torch.arange(len(self.index)))


@torch.no_grad()
def record_pairs(
    lm: LanguageModel,
    parts: Stack,
    pairs: Sequence[Pair],
    outcome: Any,
    positions: Positions = "last",
    *,
    details: Sequence[str] = (),
    noise: float | None = None,
) -> Iterator[Group]:
    """Check pairs, and record them in groups of one length and one layout of positions.

    Args:
        outcome: one, or a tuple of several that are read off the same runs.
        positions, noise: as for :func:`flow.patching.patch`.

    Raises:
        ValueError: no pairs, sides of unequal length, two equal sides, equal ids, an unknown position.
    """
    sides = token_ids(lm, pairs)
    names = [pair.id for pair in pairs]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"pairs: ids must be unique, but these occur twice: {', '.join(twice[:5])}")
    same = [name for name, (a, b) in zip(names, sides, strict=True) if a == b]
    if same:
        raise ValueError(f"pairs: both sides are the same text, so there is no effect: {', '.join(same[:5])}")
    where = [_columns(lm, pair, len(a), positions) for pair, (a, _) in zip(pairs, sides, strict=True)]
    if len({tuple(columns) for columns in where}) > 1:
        raise ValueError(
            "positions: pairs do not have the same groups of positions. 'each' needs pairs of one length; "
            "with several lengths name groups by role, e.g. positions=prompts.roles"
        )
    replies = _replies(lm, pairs, sides, outcome if isinstance(outcome, tuple) else (outcome,))
    layout: dict[Any, list[int]] = defaultdict(list)
    for i, ((ids, _), columns) in enumerate(zip(sides, where, strict=True)):
        layout[len(ids), len(replies[i]), tuple(columns.values())].append(i)
    for members in sorted(layout.values()):
        for index in (members[k : k + BATCH] for k in range(0, len(members), BATCH)):
            n, added, read = len(index), None, max(1, len(replies[index[0]]))
            # The last token of a reply is predicted, not read.
            ids = torch.tensor([sides[i][side] + replies[i][:-1] for side in (0, 1) for i in index])
            differ = (ids[:n] != ids[n:]).any(0)
            ids, some = ids.to(lm.device), [names[i] for i in index]
            if noise is not None:
                ids, added = _noised(parts, ids, n, noise, some)
            at = where[index[0]]
            since = min(ids.shape[1] - read, *(min(columns) for columns in at.values()))
            run = record_run(parts, ids, details=details, noise=added, since=since)
            columns = {name: tuple(c - run.offset for c in cs if c >= run.offset) for name, cs in at.items()}
            # Without any noise the two runs are one, and the first difference may lie in their common prefix.
            differs = max(0, int(differ.long().argmax()) - run.offset)
            targets = torch.tensor([replies[i] for i in index])
            yield Group(
                parts, index, some, ids, run.rows(slice(0, n)), run.rows(slice(n, None)), columns, differs,
                read, reader(parts, outcome, targets),
            )  # fmt: skip


def _columns(lm: LanguageModel, pair: Pair, length: int, positions: Positions) -> dict[str, tuple[int, ...]]:
    every = tuple(range(length))
    if callable(positions):
        found = {name: tuple(sorted({int(c) for c in at})) for name, at in positions(lm, pair).items()}
    elif positions == "each":
        found = {str(i): (i,) for i in every}
    elif positions in ("last", "all"):
        found = {positions: every[-1:] if positions == "last" else every}
    else:
        raise ValueError(
            f"positions={positions!r} is unknown; choose 'last', 'all', 'each' or a function "
            "that names groups"
        )
    wrong = [name for name, at in found.items() if not at or not set(at) <= set(every)]
    if wrong:
        raise ValueError(f"positions: {wrong} of pair {pair.id!r} are empty or outside 0 to {length - 1}")
    return found


def _replies(
    lm: LanguageModel, pairs: Sequence[Pair], sides: Sequence[Any], read: Sequence[Any]
) -> list[list[int]]:
    """Tokens of each pair's reply, if any of the outcomes looks at one."""
    spoken = [one for one in read if isinstance(one, Reply)]
    if not spoken:
        return [[]] * len(pairs)
    texts, skip = list(spoken[0].texts), max(reply.skip for reply in spoken)
    if any(list(reply.texts) != texts for reply in spoken):
        raise ValueError("outcome: replies that are read off the same runs must have the same texts")
    if len(texts) != len(pairs):
        raise ValueError(f"outcome: {len(pairs)} pairs need as many replies, got {len(texts)}")
    replies = [split_tokens(lm, p.x0.render(lm), text)[1] for p, text in zip(pairs, texts, strict=True)]
    short = [p.id for p, reply in zip(pairs, replies, strict=True) if len(reply) <= skip]
    if short:
        raise ValueError(f"outcome: replies have no token left after skip={skip}: {short[:5]}")
    require_room(
        lm, [a + reply for (a, _), reply in zip(sides, replies, strict=True)],
        names=[f"pair {pair.id!r} with its reply" for pair in pairs],
    )  # fmt: skip
    return replies


def reader(parts: Stack, outcome: Any, targets: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """Reader of one outcome, or of several side by side, off the residual stream at the last positions.

    Args:
        targets: token ids of the reply to each pair of a group [pair, token], for outcomes of replies.
    """
    if isinstance(outcome, tuple):
        several = [reader(parts, one, targets) for one in outcome]
        return lambda resid, index: torch.stack([read(resid, index) for read in several], dim=-1)
    if isinstance(outcome, Reply):

        def reply(resid: Tensor, index: Tensor) -> Tensor:
            logp = decoder.readout(parts, resid[:, outcome.skip :]).log_softmax(-1)
            wanted = targets[index][:, outcome.skip :, None].to(logp.device)
            return logp.gather(-1, wanted)[..., 0].mean(-1)

        return reply
    ids, value = getattr(outcome, "ids", None), getattr(outcome, "value", outcome)

    def first_word(resid: Tensor, _: Tensor) -> Tensor:
        out = value(decoder.readout(parts, resid[:, 0], ids))
        if out.shape != resid.shape[:1]:
            raise ValueError(
                f"outcome: must give one value for each row, got shape {tuple(out.shape)} for "
                f"{len(resid)} rows"
            )
        return out.float()

    return first_word


def _noised(parts: Stack, ids: Tensor, n: int, noise: float, names: list[str]) -> tuple[Tensor, Tensor]:
    """x1's words in both halves, and noise on the second half where the words of the pair differed."""
    embed = parts.model.get_input_embeddings()
    table = embed.weight
    differ = (ids[:n] != ids[n:])[..., None]
    stop = int(differ.any(0).flatten().nonzero().max()) + 1
    # A pair's noise depends on the pair alone, not on its batch.
    drawn = torch.zeros(n, ids.shape[1], table.shape[1])
    for row, name in enumerate(names):
        generator = seeded(name)
        for at in range(stop):
            drawn[row, at] = torch.randn(table.shape[1], generator=generator)
    # Some models scale their embeddings in the embedding module itself.
    some = torch.arange(min(len(table), 100), device=table.device)
    scale = embed(some).float().std() / table[some].float().std() * table.float().std()
    drawn = drawn.to(table.device) * noise * scale
    added = torch.cat([torch.zeros_like(drawn), drawn * differ]).to(table.dtype)
    return torch.cat([ids[:n], ids[:n]]), added


def seeded(name: str) -> torch.Generator:
    """A source of random numbers that depends on a name alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(seed)
