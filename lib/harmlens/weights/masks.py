"""Sets of weights as objects: counted, compared, saved, and matched by control sets.

A :class:`Mask` holds the chosen weights as sorted numbers inside each (flattened) matrix. That is lean for
the sets at hand, a few in a hundred thousand, and makes overlap and difference cheap. How sets are chosen and
taken out of a model is in :mod:`weights.pruning`.

Introduced in notebook 09 ("Weights that carry harm"); overlap in notebook 10.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harmlens.keep import memory
from harmlens.models.forward import LanguageModel
from harmlens.weights.scores import Scores, draw_seed, layer_of, matrices


@dataclass(frozen=True)
class Mask:
    """A set of weights.

    Attributes:
        indices: parameter -> numbers of its chosen weights in the flattened matrix, rising, int64. Every
            matrix that could have been chosen from has an entry, which may be empty.
        shapes: parameter -> shape.
        model, revision: whose weights they are.
        name: what the set is called in tables.
    """

    indices: dict[str, Int[Tensor, " chosen"]]
    shapes: dict[str, tuple[int, ...]]
    model: str = ""
    revision: str = ""
    name: str = ""

    def __len__(self) -> int:
        return sum(len(index) for index in self.indices.values())

    @property
    def numel(self) -> int:
        """Number of weights there are to choose from."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def share(self) -> float:
        """Share of these that is chosen."""
        return len(self) / self.numel

    def __and__(self, other: Mask) -> Mask:
        return self._combined(other, lambda a, b: a[torch.isin(a, b, assume_unique=True)], "&")

    def __sub__(self, other: Mask) -> Mask:
        return self._combined(other, lambda a, b: a[~torch.isin(a, b, assume_unique=True)], "-")

    def __or__(self, other: Mask) -> Mask:
        return self._combined(other, lambda a, b: torch.cat([a, b]).unique(), "|")

    def _combined(self, other: Mask, rule: Callable[[Tensor, Tensor], Tensor], sign: str) -> Mask:
        check_same(self, other)
        indices = {name: rule(index, other.indices[name]) for name, index in self.indices.items()}
        return replace(self, indices=indices, name=f"{self.name} {sign} {other.name}".strip())

    def called(self, name: str) -> Mask:
        """The same set under another name."""
        return replace(self, name=name)

    def shares(self, by: Callable[[str], object] = layer_of) -> dict:
        """Share of the weights that is chosen, for each layer, or grouped otherwise.

        Args:
            by: maps a parameter's name to its group: :func:`~weights.scores.layer_of`,
                :func:`~weights.scores.module_of`, or ``str`` for every matrix by itself.
        """
        chosen: dict = {}
        total: dict = {}
        for name, index in self.indices.items():
            group = by(name)
            chosen[group] = chosen.get(group, 0) + len(index)
            total[group] = total.get(group, 0) + math.prod(self.shapes[name])
        return {group: chosen[group] / total[group] for group in chosen}

    def save(self, file: Path | str) -> None:
        """Write as safetensors."""
        about = {"model": self.model, "revision": self.revision, "name": self.name, "shapes": self.shapes}
        memory.write_tensors(Path(file), self.indices, "mask", about)


def load(file: Path | str) -> Mask:
    """A mask that was saved.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    try:
        about, found = memory.read_tensors(file, "mask")
        shapes = {name: tuple(shape) for name, shape in about.pop("shapes").items()}
        indices = {name: found[name] for name in shapes}
    except Exception as error:  # a spoilt file raises whatever its parser raises
        raise ValueError(
            f"file={str(file)!r} holds no mask; save one with Mask.save ({type(error).__name__})"
        ) from error
    return Mask(indices, shapes, **about)


def check_same(first: Mask | Scores, other: Mask | Scores) -> None:
    """Refuse to compare sets or scores of different models."""
    if shapes_of(first) != shapes_of(other):
        raise ValueError(
            f"{first.model or 'one'!r} and {other.model or 'the other'!r}: these are of different matrices, "
            "so they can't be put together; use scores of one architecture and the same layers"
        )


def shapes_of(of: Mask | Scores) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices that a set or scores are about."""
    return of.shapes if isinstance(of, Mask) else {n: tuple(v.shape) for n, v in of.values.items()}


# --------------------------------------------------------------------------- which model


def check(mask: Mask, lm: LanguageModel) -> None:
    """Refuse a mask that was made for another model.

    Raises:
        ValueError: other parameters or other shapes than those that were scored.
    """
    parameters = dict(lm.model.named_parameters())
    for name, shape in mask.shapes.items():
        if name not in parameters or tuple(parameters[name].shape) != tuple(shape):
            raise ValueError(
                f"the mask {mask.name!r} was made for {mask.model!r} and does not fit {lm.name!r}, which has "
                f"no {name} of shape {tuple(shape)}; select a mask from scores of this model"
            )
        index = mask.indices[name]
        if len(index) and not (int(index.min()) >= 0 and int(index.max()) < math.prod(shape)):
            raise ValueError(f"the mask {mask.name!r} names weights that {name} does not have; it is damaged")


def values(lm: LanguageModel, mask: Mask) -> dict[str, Float[Tensor, " chosen"]]:
    """The chosen weights as they are now, a copy: parameter -> values, where the parameter lies."""
    parameters = dict(lm.model.named_parameters())
    return {
        name: parameters[name].detach().view(-1)[index.to(parameters[name].device)].clone()
        for name, index in mask.indices.items()
    }


@torch.no_grad()
def put(lm: LanguageModel, mask: Mask, new: Mapping[str, Tensor]) -> None:
    """Set the chosen weights, in place.

    Args:
        new: parameter -> one value for each chosen weight, or one for all of them.
    """
    parameters = dict(lm.model.named_parameters())
    for name, value in new.items():
        flat = parameters[name].detach().view(-1)
        flat[mask.indices[name].to(flat.device)] = value


# --------------------------------------------------------------------------- controls


def random_like(mask: Mask, *, seed: int = 0, within: Mask | None = None, spare: Mask | None = None) -> Mask:
    """Equally many random weights in every matrix.

    Args:
        within: draw from these weights only.
        spare: draw none of these.

    Raises:
        ValueError: a matrix with too few weights to draw from.
    """
    for other in (within, spare):
        if other is not None:
            check_same(mask, other)
    indices = {}
    for name, index in mask.indices.items():
        pool = torch.arange(math.prod(mask.shapes[name])) if within is None else within.indices[name]
        if spare is not None:
            pool = pool[~torch.isin(pool, spare.indices[name], assume_unique=True)]
        if len(pool) < len(index):
            raise ValueError(f"{name}: {len(index)} weights are to be drawn from {len(pool)}")
        generator = torch.Generator().manual_seed(draw_seed(seed, name))
        indices[name] = pool[torch.randperm(len(pool), generator=generator)[: len(index)]].sort().values
    return replace(mask, indices=indices, name=f"random {seed}")


def magnitude_like(mask: Mask, lm: LanguageModel, *, seed: int = 0, near: int = 20) -> Mask:
    """Random weights of matched size: for each chosen weight another of the same matrix and nearly its size.

    Args:
        near: how far in the order of sizes a match may lie, on either side.
    """
    check(mask, lm)
    found, indices = matrices(lm), {}
    for name, index in mask.indices.items():
        order = found[name].weight.detach().float().abs().flatten().cpu().argsort()
        taken = torch.zeros(len(order), dtype=torch.bool)
        taken[index] = True
        free = order[~taken[order]]
        if len(free) < len(index):
            raise ValueError(f"{name}: {len(index)} weights are to be matched by {len(free)} others")
        sizes = found[name].weight.detach().float().abs().flatten().cpu()
        place = torch.searchsorted(sizes[free], sizes[index].contiguous())
        generator = torch.Generator().manual_seed(draw_seed(seed, name))
        place = place + torch.randint(-near, near + 1, (len(index),), generator=generator)
        used = _nearest_unused(place.clamp(0, len(free) - 1).tolist(), len(free))
        indices[name] = free[used].sort().values
    return replace(mask, indices=indices, name=f"same sizes {seed}")


def _nearest_unused(wanted: Sequence[int], n: int) -> list[int]:
    """For each wanted place, one after the other, the nearest of n places that nobody has yet."""
    # Where to look next, going up and going down, one further than the place; a free place leads to itself.
    up, down = list(range(n + 2)), list(range(n + 2))

    def follow(to: list[int], place: int) -> int:
        while to[place] != place:
            to[place] = to[to[place]]
            place = to[place]
        return place

    taken = []
    for at in wanted:
        above, below = follow(up, at + 1), follow(down, at + 1)
        place = above if above <= n and (below < 1 or above - at - 1 <= at + 1 - below) else below
        up[place], down[place] = place + 1, place - 1
        taken.append(place - 1)
    return taken


# --------------------------------------------------------------------------- overlap


def jaccard(first: Mask, other: Mask) -> float:
    """Jaccard index: shared weights over weights in either; 0 where both are empty."""
    both = len(first & other)
    either = len(first) + len(other) - both
    return both / either if either else 0.0


def chance_jaccard(first: Mask, other: Mask) -> float:
    """The Jaccard index to be expected of two random sets with as many weights in every matrix."""
    check_same(first, other)
    both = sum(
        len(index) * len(other.indices[name]) / math.prod(first.shapes[name])
        for name, index in first.indices.items()
    )
    either = len(first) + len(other) - both
    return both / either if either else 0.0


def intersection(masks: Sequence[Mask], *, at_least: int | None = None) -> Mask:
    """Weights that stand in all masks, or in at least so many of them."""
    if not masks:
        raise ValueError("masks is empty: there is nothing to intersect")
    needed = len(masks) if at_least is None else at_least
    indices = {}
    for mask in masks[1:]:
        check_same(masks[0], mask)
    for name in masks[0].indices:
        every = torch.cat([mask.indices[name] for mask in masks])
        numbers, counts = every.unique(return_counts=True)
        indices[name] = numbers[counts >= needed]
    return replace(masks[0], indices=indices, name=f"in {needed} of {len(masks)}")


def union(masks: Sequence[Mask]) -> Mask:
    """Weights that stand in any of the masks."""
    return intersection(masks, at_least=1).called("union")
