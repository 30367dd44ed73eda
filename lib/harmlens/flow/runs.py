"""Prompt pairs as recorded runs: token ids, positions and outcomes of both sides, in groups of one length.

Prompts are never padded: a padded position would need a mask in every partial run. Pairs of one length and
one layout of positions stand in one group, and what all of its prompts share at their start is run once.

Introduced in notebook 02 ("Layers").
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harmlens.asking import pairs as prompts
from harmlens.flow import stack
from harmlens.flow.outcomes import Outcome, Reply
from harmlens.flow.stack import Record
from harmlens.models import parts as decoder
from harmlens.models.chats import Pair
from harmlens.models.forward import LanguageModel, require_room, split_tokens
from harmlens.models.parts import Stack

Positions = str | Callable[[LanguageModel, Pair], Mapping[str, Sequence[int]]]


@dataclass
class Group:
    """Pairs of one length, recorded: ``x1`` and ``x0`` are the two runs.

    Attributes:
        columns: position label -> columns, counted from the first recorded position.
        differs: first column at which the two runs differ.
        read: how many last positions the outcome reads.
        outcome: maps the residual stream at these positions to values, one for each row; ``index`` says
            which pair of the group each row belongs to.
        names: ids of the pairs; random draws depend on them and not on the order of pairs.
        first: token ids of the first pair's run on x1, to run it as a whole.
    """

    parts: Stack
    index: list[int]
    x1: Record
    x0: Record
    columns: dict[str, tuple[int, ...]]
    differs: int
    read: int
    outcome: Callable[[Tensor, Tensor], Tensor]
    names: list[str]
    first: Int[Tensor, "1 pos"] | None = None

    def runs(self, direction: str) -> tuple[Record, Record]:
        """The run that is patched, and the one that gives the activations."""
        return (self.x0, self.x1) if direction == "denoising" else (self.x1, self.x0)

    @torch.no_grad()
    def unpatched(self, run: Record) -> Float[Tensor, "pair ..."]:
        """Outcome of a recorded run."""
        return self.outcome(run.resid[-1][:, -self.read :], torch.arange(len(self.index)))


@dataclass(frozen=True)
class Encoded:
    """Token ids of both sides of each pair (with replies behind them, for Y3), and where to patch."""

    pairs: Sequence[Pair]
    sides: list[tuple[list[int], list[int]]]
    columns: list[dict[str, tuple[int, ...]]]
    labels: list[str]
    outcome: Any
    replies: list[list[int]] | None = None

    @property
    def fingerprint(self) -> str:
        text = json.dumps([[pair.id for pair in self.pairs], self.sides, self.columns, self.replies])
        return hashlib.sha256(text.encode()).hexdigest()


def encode(lm: LanguageModel, pairs: Sequence[Pair], outcome: Any, positions: Positions) -> Encoded:
    """Check pairs and turn them into token ids.

    Raises:
        ValueError: no pairs, sides of unequal length, two equal sides, equal ids, an unknown position.
    """
    sides = prompts.token_ids(lm, pairs)
    names = [pair.id for pair in pairs]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"pairs: ids must be unique, but these occur twice: {', '.join(twice[:5])}")
    same = [pair.id for pair, (a, b) in zip(pairs, sides, strict=True) if a == b]
    if same:
        raise ValueError(f"pairs: both sides are the same text, so there is no effect: {', '.join(same[:5])}")
    _refuse_padding(lm, pairs, sides)
    columns = []
    for pair, (a, _) in zip(pairs, sides, strict=True):
        if positions == "last":
            columns.append({"last": (len(a) - 1,)})
        elif positions == "all":
            columns.append({"all": tuple(range(len(a)))})
        elif positions == "each":
            columns.append({str(i): (i,) for i in range(len(a))})
        elif callable(positions):
            named = positions(lm, pair).items()
            columns.append({name: tuple(sorted({int(c) for c in where})) for name, where in named})
        else:
            raise ValueError(
                f"positions={positions!r} is unknown; choose 'last', 'all', 'each' or a function "
                "that names groups"
            )
        wrong = [n for n, w in columns[-1].items() if not w or not set(w) <= set(range(len(a)))]
        if wrong:
            raise ValueError(f"positions: {wrong} of pair {pair.id!r} are empty or outside 0 to {len(a) - 1}")
    if len({tuple(c) for c in columns}) > 1:
        raise ValueError(
            "positions: pairs do not have the same groups of positions. 'each' needs pairs of one length; "
            "with several lengths name groups by role, e.g. positions=prompts.roles"
        )
    replies = None
    if isinstance(outcome, Reply):
        if len(outcome.texts) != len(pairs):
            raise ValueError(f"outcome: {len(pairs)} pairs need as many replies, got {len(outcome.texts)}")
        texts = zip(pairs, outcome.texts, strict=True)
        replies = [split_tokens(lm, pair.x0.render(lm), text)[1] for pair, text in texts]
        short = [p.id for p, reply in zip(pairs, replies, strict=True) if len(reply) <= outcome.skip]
        if short:
            raise ValueError(f"outcome: replies have no token left after skip={outcome.skip}: {short[:5]}")
        require_room(
            lm, [a + reply for (a, _), reply in zip(sides, replies, strict=True)],
            names=[f"pair {pair.id!r} with its reply" for pair in pairs],
        )  # fmt: skip
    return Encoded(pairs, sides, columns, list(columns[0]), outcome, replies)


def _refuse_padding(lm: LanguageModel, pairs: Sequence[Pair], sides: Sequence[Sequence[list[int]]]) -> None:
    """A padding token is no word: with it in a prompt, positions would mean something else in every tool."""
    tok = lm.tokenizer
    if tok.pad_token_id in (None, tok.eos_token_id, tok.bos_token_id, tok.unk_token_id):
        return
    padded = [p.id for p, both in zip(pairs, sides, strict=True) if any(tok.pad_token_id in s for s in both)]
    if padded:
        raise ValueError(
            f"pairs: the padding token {tok.pad_token!r} stands in the prompts of {', '.join(padded[:5])}; "
            "leave it out, since prompts of different lengths are grouped and never padded"
        )


def groups(
    lm: LanguageModel,
    parts: Stack,
    encoded: Encoded,
    todo: Sequence[int] | None = None,
    *,
    details: Sequence[str] = (),
    noise: float | None = None,
    size: int = 128,
) -> Iterator[Group]:
    """Record pairs in groups of one length and one layout of positions."""
    layout: dict[Any, list[int]] = defaultdict(list)
    for i in range(len(encoded.pairs)) if todo is None else todo:
        reply = 0 if encoded.replies is None else len(encoded.replies[i])
        layout[len(encoded.sides[i][0]), reply, tuple(encoded.columns[i].values())].append(i)
    for members in sorted(layout.values()):
        for start in range(0, len(members), size):
            yield _group(lm, parts, encoded, members[start : start + size], details, noise)


@torch.no_grad()
def _group(
    lm: LanguageModel,
    parts: Stack,
    encoded: Encoded,
    index: list[int],
    details: Sequence[str],
    noise: float | None,
) -> Group:
    n, added = len(index), None
    reply = None if encoded.replies is None else torch.tensor([encoded.replies[i] for i in index])
    ids = torch.tensor([encoded.sides[i][side] for side in (0, 1) for i in index])
    if reply is not None:  # the last token of a reply is predicted, not read
        ids = torch.cat([ids, reply[:, :-1].repeat(2, 1)], dim=1)
    differ = (ids[:n] != ids[n:]).any(0)
    ids = ids.to(lm.device)
    if noise is not None:
        ids, added = _noised(parts, ids, n, noise, [encoded.pairs[i].id for i in index])
    where = encoded.columns[index[0]]
    read = 1 if reply is None else reply.shape[1]
    since = min(ids.shape[1] - read, *(min(columns) for columns in where.values()))
    run = stack.record(parts, ids, details=details, noise=added, since=since)
    columns = {name: tuple(c - run.offset for c in at if c >= run.offset) for name, at in where.items()}
    return Group(
        parts, index, run.rows(slice(0, n)), run.rows(slice(n, None)), columns,
        # Without any noise the two runs are one, and the first difference may lie in their common prefix.
        max(0, int(differ.long().argmax()) - run.offset), read,
        first_token(parts, encoded.outcome) if reply is None else _reply(parts, encoded.outcome, reply),
        [encoded.pairs[i].id for i in index], ids[:1],
    )  # fmt: skip


def _reply(parts: Stack, outcome: Reply, targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean log-probability per token of the reply, from ``skip`` on."""

    def read(resid: Tensor, index: Tensor) -> Tensor:
        logp = decoder.readout(parts, resid[:, outcome.skip :]).log_softmax(-1)
        wanted = targets[index][:, outcome.skip :, None].to(logp.device)
        return logp.gather(-1, wanted)[..., 0].mean(-1)

    return read


def first_token(parts: Stack, outcome: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Read an outcome of the first word of the answer off the residual stream."""
    ids = outcome.ids if isinstance(outcome, Outcome) else None
    value = outcome.value if isinstance(outcome, Outcome) else outcome

    def read(resid: Tensor, _: Tensor) -> Tensor:
        out = value(decoder.readout(parts, resid[:, -1], ids))
        if out.shape != resid.shape[:1]:
            raise ValueError(
                f"outcome: must give one value for each row, got shape {tuple(out.shape)} for "
                f"{len(resid)} rows"
            )
        return out.float()

    return read


def _noised(parts: Stack, ids: Tensor, n: int, noise: float, names: list[str]) -> tuple[Tensor, Tensor]:
    """x1's words in both halves, and noise on the second half where the words of the pair differed."""
    embed = parts.model.get_input_embeddings()
    table = embed.weight
    differ = (ids[:n] != ids[n:])[..., None]
    stop = int(differ.any(0).flatten().nonzero().max()) + 1
    # A pair's noise depends on the pair alone, not on its batch.
    drawn = torch.zeros(n, ids.shape[1], table.shape[1])
    for row, name in enumerate(names):
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
        for at in range(stop):
            drawn[row, at] = torch.randn(table.shape[1], generator=generator)
    # Some models scale their embeddings in the embedding module itself.
    some = torch.arange(min(len(table), 100), device=table.device)
    scale = embed(some).float().std() / table[some].float().std() * table.float().std()
    drawn = drawn.to(table.device) * noise * scale
    added = torch.cat([torch.zeros_like(drawn), drawn * differ]).to(table.dtype)
    return torch.cat([ids[:n], ids[:n]]), added
