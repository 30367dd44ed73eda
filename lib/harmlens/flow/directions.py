"""The refusal direction: found as a difference of means, projected out, and added (Arditi et al. 2024).

**Sign.** A direction points from answered to refused requests: adding it makes a model refuse, removing it
makes it answer. **Depth** d is the residual stream in front of block d (0 is the embedding), as in the paper.

Introduced in notebook 17 ("Do the papers agree?"), which chooses one of the candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from harmlens.flow.engine import patchable
from harmlens.flow.interventions import states
from harmlens.flow.record import shown
from harmlens.models import parts as decoder
from harmlens.models.chats import tokens
from harmlens.models.forward import LanguageModel


@dataclass(frozen=True)
class Direction:
    """A difference of means, not scaled, and where it was read (position -1 is the prompt's last token)."""

    vector: Float[Tensor, " width"]
    depth: int
    position: int = -1

    @property
    def unit(self) -> Float[Tensor, " width"]:
        return self.vector / self.vector.norm()


def mean_differences(
    lm: LanguageModel, refused: Sequence[str], answered: Sequence[str], *, positions: Sequence[int] = (-1,)
) -> list[Direction]:
    """Differences of mean streams, refused minus answered, for every depth and position.

    The stream behind the last block is left out, and places where the sides do not differ, as in front of the
    first block, where all texts have the same token.
    """
    means = [states(lm, texts, positions=positions).mean(0) for texts in (refused, answered)]
    difference = means[0] - means[1]
    return [
        Direction(difference[depth, i], depth, position)
        for depth in range(len(difference) - 1)
        for i, position in enumerate(positions)
        if difference[depth, i].norm() > 1e-4 * means[0][depth, i].norm()  # more than rounding
    ]


def shared_end(lm: LanguageModel, texts: Sequence[str], most: int = 5) -> list[int]:
    """Positions of the last tokens that all texts share, what the template writes behind a message.

    Texts that end in different tokens raise a ``ValueError``.
    """
    rows = [tokens(lm.tokenizer, text)[::-1][:most] for text in texts]
    alike = [len(set(column)) == 1 for column in zip(*rows, strict=False)]
    shared = [*alike, False].index(False)
    if not shared:
        raise ValueError("texts end in different tokens; render them with the chat template, without prefill")
    return list(range(-shared, 0))


@contextmanager
def ablated(lm: LanguageModel, vector: Float[Tensor, " width"]) -> Iterator[LanguageModel]:
    """Within, nothing of a direction is in the residual stream, at any depth and position.

    It is projected out of what the first block reads and of all that attention and MLPs (and norms behind
    them) write: the same as making their weights orthogonal to it.

    Raises:
        ValueError: a vector of another width, or of no length.
    """
    unit = _checked(lm, vector)
    unit = unit / unit.norm()
    blocks = patchable(lm, in_part=False).blocks
    written: list[Tensor] = []  # by a module, last: a norm that reads this very tensor stands behind it

    def project(value: Tensor) -> Tensor:
        d = unit.to(value.device)
        wide = value.float()
        return (wide - (wide @ d)[..., None] * d).to(value.dtype)

    def write(value: Tensor) -> Tensor:
        written[:] = [project(value)]
        return written[0]

    def behind(norm: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        return project(output) if written and inputs[0] is written[0] else None

    write.depends_on, behind.depends_on = ("write", project), ("behind", project)  # not on what was written
    with ExitStack() as held:
        held.enter_context(shown(project, entering=blocks, leaving=blocks[-1:]))
        for block in blocks:
            held.enter_context(shown(write, leaving=[decoder.attention(block), decoder.mlp(block)]))
            for norm in (m for m in block.children() if "norm" in type(m).__name__.lower()):
                held.callback(norm.register_forward_hook(behind).remove)
        yield lm


@contextmanager
def added(lm: LanguageModel, direction: Direction, *, dose: float = 1.0) -> Iterator[LanguageModel]:
    """Within, ``dose`` times a direction is added in front of the block at its depth, at all positions.

    Raises:
        ValueError: as :func:`ablated`, or a depth that the model does not have.
    """
    vector, blocks = _checked(lm, direction.vector), decoder.blocks(lm)
    if not 0 <= direction.depth < len(blocks):
        raise ValueError(f"direction: there is no block at depth {direction.depth} of {len(blocks)}")

    def add(value: Tensor) -> Tensor:
        decoder.require_one_stream(lm.model, value)
        return value + dose * vector.to(value.device, value.dtype)

    with shown(add, entering=[blocks[direction.depth]]):
        yield lm


def _checked(lm: LanguageModel, vector: Tensor) -> Float[Tensor, " width"]:
    width = lm.model.get_input_embeddings().weight.shape[1]
    if tuple(vector.shape) != (width,):
        raise ValueError(f"vector: must have the model's width, {width}, not the shape {tuple(vector.shape)}")
    if not torch.isfinite(vector).all() or not vector.norm() > 0:
        raise ValueError("vector: must be finite and longer than 0, or it has no direction")
    return vector.to(lm.device).float()
