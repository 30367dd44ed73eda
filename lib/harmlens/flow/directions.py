"""The refusal direction: found as a difference of means, projected out, and added.

After Arditi et al. (2024). Mean residual streams of refused and of answered requests differ along one
direction at every depth and position of the template's end. Each of these is a candidate; on requests that
were not used to find them :func:`trials` asks what each does, and :func:`choose` takes one.

**Sign.** A direction points from answered to refused requests: adding it makes a model refuse, removing it
makes it answer.

**Depth** d is the residual stream in front of block d (0 is the embedding), as in the paper.

Introduced in notebook 17 ("Do the papers agree?").
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from harmlens.flow import partial
from harmlens.flow.outcomes import Outcome
from harmlens.models import parts as decoder
from harmlens.models.chats import tokens
from harmlens.models.forward import LanguageModel, last_logits, padded

MOST_SHIFT = 0.1  # Kullback-Leibler divergence on answered requests, as in the paper
DEEPEST = 0.8  # of the depth: directions of the last layers are close to the words themselves


@dataclass(frozen=True)
class Direction:
    """A difference of means.

    Attributes:
        vector: as it is, not scaled; its length is what :func:`added` adds.
        depth: where it was read.
        position: at which token, counted from the end of the prompt (-1 is the last one).
    """

    vector: Float[Tensor, " width"]
    depth: int
    position: int = -1

    @property
    def unit(self) -> Float[Tensor, " width"]:
        """The same direction, of length 1."""
        return self.vector / self.vector.norm()


@dataclass(frozen=True)
class Trial:
    """What a direction does to requests that it was not found on.

    Attributes:
        removed: mean outcome on refused requests without it; the higher, the more are answered.
        added: mean outcome on answered requests with it; below 0 most are refused (for Y1).
        shift: mean Kullback-Leibler divergence of the next word on answered requests without it, in nats.
    """

    direction: Direction
    removed: float
    added: float
    shift: float


# --------------------------------------------------------------------------- finding


@torch.no_grad()
def streams(
    lm: LanguageModel, texts: Sequence[str], *, positions: Sequence[int] = (-1,), batch_size: int = 128
) -> Float[Tensor, "text depth position width"]:
    """Residual stream in front of every block and behind the last one, before the final norm.

    Args:
        positions: counted from the end of each rendered text.

    Returns:
        float32, on the CPU; blocks + 1 depths.

    Raises:
        ValueError: no texts, or positions that lie outside one of them.
    """
    if not texts:
        raise ValueError("texts is empty: there is nothing to run")
    rows = [tokens(lm.tokenizer, text) for text in texts]
    shortest = min(map(len, rows))
    if not positions or not all(-shortest <= p < 0 for p in positions):
        raise ValueError(f"positions={list(positions)} must lie between -{shortest} and -1")
    kept = []
    where = list(positions)

    def keep(value: Tensor) -> None:
        decoder.require_one_stream(lm.model, value)
        kept.append(value[:, where].float().cpu())

    out: list[Any] = [None] * len(rows)
    with _stream_hooks(decoder.blocks(lm), keep):
        for index, inputs in padded(lm, rows, batch_size):
            kept.clear()
            lm.model(**inputs, logits_to_keep=1)
            for i, row in zip(index, torch.stack(kept, dim=1), strict=True):
                out[i] = row
    return torch.stack(out)


def shared_end(lm: LanguageModel, texts: Sequence[str], *, most: int = 5) -> list[int]:
    """Positions of the last tokens that all rendered texts share: what the template writes behind a message.

    >>> shared_end(lm, ["one two <end>", "three <end>"])  # doctest: +SKIP
    [-1]

    Raises:
        ValueError: no texts, or texts that end in different tokens.
    """
    if not texts:
        raise ValueError("texts is empty: there is nothing to compare")
    rows = [tokens(lm.tokenizer, text) for text in texts]
    count = 0
    while count < min(most, *map(len, rows)) and len({row[-count - 1] for row in rows}) == 1:
        count += 1
    if not count:
        raise ValueError("texts end in different tokens; render them with the chat template, without prefill")
    return list(range(-count, 0))


def behaving(
    lm: LanguageModel, texts: Sequence[str], outcome: Outcome, *, refused: bool, least: int = 2
) -> list[str]:
    """Those texts to which the model does what they stand for, as its first word tells.

    A direction is a difference between what *is* refused and what *is* answered; a model may refuse a
    harmless request or answer a harmful one.

    Args:
        outcome: of the first word, below 0 for a refusal, such as Y1.
        refused: whether the texts stand for refusals.
        least: how many are needed.

    Raises:
        ValueError: fewer are left.
    """
    values = _read(outcome, last_logits(lm, texts)).tolist()
    kept = [text for text, value in zip(texts, values, strict=True) if (value < 0) == refused]
    if len(kept) < least:
        what = "refused" if refused else "answered"
        raise ValueError(
            f"texts: {len(kept)} of {len(texts)} are {what}, {least} are needed; give more requests, or a "
            "model that tells the sides apart"
        )
    return kept


def candidates(
    lm: LanguageModel, refused: Sequence[str], answered: Sequence[str], *, positions: Sequence[int] = (-1,)
) -> list[Direction]:
    """Differences of mean streams, refused minus answered, for every depth and position.

    The stream behind the last block is left out: nothing but the head reads it. So are places where the sides
    do not differ, as in front of the first block, where all texts have the same token.

    Raises:
        ValueError: as :func:`streams`.
    """
    means = [streams(lm, texts, positions=positions).mean(0) for texts in (refused, answered)]
    difference = means[0] - means[1]
    return [
        Direction(difference[depth, i], depth, position)
        for depth in range(len(difference) - 1)
        for i, position in enumerate(positions)
        if difference[depth, i].norm() > 1e-4 * means[0][depth, i].norm()  # more than rounding
    ]


def shuffled(
    lm: LanguageModel,
    refused: Sequence[str],
    answered: Sequence[str],
    like: Direction,
    *,
    draws: int = 1,
    seed: int = 0,
) -> list[Direction]:
    """Control directions: differences of means of groups that do not differ in refusal.

    Each side is cut into random halves, and one half of both is set against the other. So they are found at
    the same place, from the same requests, by the same rule, and point where requests differ anyway.

    Raises:
        ValueError: a side with fewer than two texts.
    """
    if min(len(refused), len(answered)) < 2:
        raise ValueError("refused and answered must hold at least two texts each, to be cut into halves")
    sides = [streams(lm, texts, positions=[like.position])[:, like.depth, 0] for texts in (refused, answered)]
    out = []
    for draw in range(draws):
        rng, halves = random.Random(f"{seed}/{draw}"), ([], [])
        for side in sides:
            order = rng.sample(range(len(side)), len(side))
            halves[0].append(side[order[: len(side) // 2]].mean(0))
            halves[1].append(side[order[len(side) // 2 :]].mean(0))
        vector = sum(halves[0]) - sum(halves[1])
        out.append(Direction(vector, like.depth, like.position))
    return out


def isotropic(like: Direction, *, draws: int = 1, seed: int = 0) -> list[Direction]:
    """Directions drawn at random from all directions alike, as long as another one."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(draws, len(like.vector), generator=generator)
    drawn = drawn / drawn.norm(dim=1, keepdim=True) * like.vector.norm().cpu()
    return [Direction(vector, like.depth, like.position) for vector in drawn]


# --------------------------------------------------------------------------- choosing


def trials(
    lm: LanguageModel,
    found: Sequence[Direction],
    refused: Sequence[str],
    answered: Sequence[str],
    outcome: Outcome,
    *,
    deepest: float = DEEPEST,
) -> list[Trial]:
    """Try directions on other requests than those they were found on.

    Args:
        outcome: of the first word, up meaning compliance, such as Y1.
        deepest: leave out depths from this share of the model on.

    Raises:
        ValueError: nothing left to try.
    """
    depth = len(decoder.blocks(lm))
    some = [d for d in found if d.depth < deepest * depth]
    if not some:
        raise ValueError(f"found: none of {len(found)} directions lies before deepest={deepest} of the depth")
    plain = last_logits(lm, answered).log_softmax(-1)
    out = []
    for direction in some:
        with ablated(lm, direction.vector):
            without = last_logits(lm, [*refused, *answered])
        with added(lm, direction):
            pushed = last_logits(lm, answered)
        changed = without[len(refused) :].log_softmax(-1)
        shift = (plain.exp() * (plain - changed)).sum(-1).mean()
        values = [_read(outcome, logits).mean() for logits in (without[: len(refused)], pushed)]
        out.append(Trial(direction, float(values[0]), float(values[1]), float(shift)))
    return out


def choose(tried: Sequence[Trial], *, most_shift: float = MOST_SHIFT) -> Trial:
    """The direction without which most is answered, among those that add refusal and shift little else.

    As in the paper: adding it must take the mean outcome below 0, and removing it may shift answered requests
    by ``most_shift`` at most. Where no direction meets both, the second is given up first; where none meets
    the first, the second is kept if it can be.

    Raises:
        ValueError: nothing was tried.
    """
    if not tried:
        raise ValueError("tried is empty: give what trials() found")
    induces = [t for t in tried if t.added < 0]
    pools = [[t for t in some if t.shift <= most_shift] or list(some) for some in (induces, tried)]
    return max(pools[0] or pools[1], key=lambda t: t.removed)


def _read(outcome: Outcome, logits: Float[Tensor, "text vocab"]) -> Float[Tensor, " text"]:
    return outcome.value(logits if outcome.ids is None else logits[:, list(outcome.ids)])


# --------------------------------------------------------------------------- removing and adding


@contextmanager
def ablated(lm: LanguageModel, vector: Float[Tensor, " width"]) -> Iterator[LanguageModel]:
    """Within, nothing of a direction is in the residual stream, at any depth and position.

    It is projected out of what the first block reads and of all that attention and MLPs write: the same as
    making their weights orthogonal to it. Where a norm stands behind a module, what the norm gives out is
    projected as well.

    Raises:
        ValueError: a vector of another width, or of no length.
    """
    unit = _checked(lm, vector)
    unit = unit / unit.norm()
    blocks = partial.patchable(lm, in_part=False).blocks

    def project(value: Tensor) -> Tensor:
        d = unit.to(value.device)
        wide = value.float()
        return (wide - (wide @ d)[..., None] * d).to(value.dtype)

    with ExitStack() as held:
        held.enter_context(_stream_hooks(blocks, project))
        for block in blocks:
            writers = [decoder.attention(block), decoder.mlp(block)]
            norms = [m for m in block.children() if "norm" in type(m).__name__.lower()]
            for hook in _written(writers, norms, project):
                held.callback(hook.remove)
        yield lm


@contextmanager
def added(lm: LanguageModel, direction: Direction, *, dose: float = 1.0) -> Iterator[LanguageModel]:
    """Within, a direction is added in front of the block at its depth, at all positions.

    Args:
        dose: how often; negative values subtract.

    Raises:
        ValueError: as :func:`ablated`, or a depth that the model does not have.
    """
    vector, blocks = _checked(lm, direction.vector), decoder.blocks(lm)
    if not 0 <= direction.depth < len(blocks):
        raise ValueError(f"direction: there is no block at depth {direction.depth} of {len(blocks)}")

    def add(value: Tensor) -> Tensor:
        decoder.require_one_stream(lm.model, value)
        return value + dose * vector.to(value.device, value.dtype)

    handle = blocks[direction.depth].register_forward_pre_hook(_entering(add), with_kwargs=True)
    try:
        yield lm
    finally:
        handle.remove()


def _checked(lm: LanguageModel, vector: Tensor) -> Float[Tensor, " width"]:
    width = lm.model.get_input_embeddings().weight.shape[1]
    if tuple(vector.shape) != (width,):
        raise ValueError(f"vector: must have the model's width, {width}, not the shape {tuple(vector.shape)}")
    if not torch.isfinite(vector).all() or not vector.norm() > 0:
        raise ValueError("vector: must be finite and longer than 0, or it has no direction")
    return vector.to(lm.device).float()


def _entering(change: Callable[[Tensor], Tensor | None]) -> Callable:
    """A pre-hook for a block, which may be called with its stream by position or by name."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        new = change(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    return hook


def _leaving(change: Callable[[Tensor], Tensor | None]) -> Callable:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        new = change(decoder.first(output))
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


@contextmanager
def _stream_hooks(blocks: Sequence[nn.Module], change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Show the stream in front of every block and behind the last one to a function, which may change it."""
    with ExitStack() as held:
        for block in blocks:
            handle = block.register_forward_pre_hook(_entering(change), with_kwargs=True)
            held.callback(handle.remove)
        held.callback(blocks[-1].register_forward_hook(_leaving(change)).remove)
        yield


def _written(
    writers: Sequence[nn.Module], norms: Sequence[nn.Module], change: Callable[[Tensor], Tensor]
) -> Iterator[Any]:
    """Hooks on modules that write into the stream, and on norms that stand behind one of them."""
    given: list[
        Tensor
    ] = []  # what a writer gave out last: a norm that reads this very tensor stands behind it

    def write(module: nn.Module, inputs: Any, output: Any) -> Any:
        new = change(decoder.first(output))
        given[:] = [new]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def behind(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        return change(output) if given and inputs[0] is given[0] else None

    write.depends_on, behind.depends_on = ("write", change), ("behind", change)  # not on what was given last
    for module in writers:
        yield module.register_forward_hook(write)
    for module in norms:
        yield module.register_forward_hook(behind)
