"""Sets of weights: chosen by their scores, compared, matched by control sets, and taken out of a model.

Setting a weight to zero changes the loss of the scored answers by about *minus* its prune score: the most
**negative** scores belong to the weights that support the answers, and :func:`select` takes these.

Introduced in notebook 09 ("Weights that carry harm"); overlap in notebook 10.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harmlens.models.forward import LanguageModel
from harmlens.weights.scores import Scores, finite, generator, matrices

SCOPES = ("matrix", "row", "global")
NEAR = 20  # how far in the order of sizes a match may lie, on either side


@dataclass(frozen=True)
class Mask:
    """A set of weights of one model, under a name for tables.

    Attributes:
        indices: parameter -> numbers of its chosen weights in the flattened matrix, rising, int64. Every
            matrix that could have been chosen from has an entry, which may be empty.
    """

    indices: dict[str, Int[Tensor, " _chosen"]]
    shapes: dict[str, tuple[int, ...]]  # of the matrices
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

    @property
    def empty(self) -> Mask:
        """No weight of the same matrices: to take it out must change nothing."""
        return replace(self, indices={k: index[:0] for k, index in self.indices.items()}, name="empty")

    def called(self, name: str) -> Mask:
        """The same set under another name."""
        return replace(self, name=name)


def check_same(first: Mask | Scores, other: Mask | Scores) -> None:
    """Refuse to compare sets or scores of different models."""
    if first.shapes != other.shapes:
        raise ValueError(
            f"{first.model or 'one'!r} and {other.model or 'the other'!r}: these are of different matrices, "
            "so they can't be put together; use scores of one architecture and the same layers"
        )


# --------------------------------------------------------------------------- selection


def select(
    prune: Scores, preserve: Scores | None = None, *, q: float, p: float = 0.0, name: str = ""
) -> Mask:
    """The pruning paper's set difference: weights that support the one and do not matter to the other.

    Inside every matrix, the floor(q * size) weights with the lowest prune scores, without the floor(p * size)
    with the highest preserve scores. A share above 0 takes at least one weight, or a small matrix would have
    no part in the set; the released code takes none.

    Args:
        prune: signed scores of the answers to be lost.
        preserve: unsigned scores of the answers to be kept; None spares nothing.
        q, p: shares that are taken and spared, from 0 to 1.

    Raises:
        ValueError: a share outside 0 to 1, a score that is not finite, scores of different models, p above 0
            without preserve scores.
    """
    require_shares(q=q)
    spared = _spared(prune, preserve, p)
    chosen = top(prune, q, lowest=True)
    return (chosen - spared if spared else chosen).called(name)


def same_size(
    mask: Mask,
    prune: Scores,
    preserve: Scores | None = None,
    *,
    p: float = 0.0,
    skip: Mask | None = None,
    name: str = "",
) -> Mask:
    """As :func:`select`, but with as many weights in every matrix as ``mask`` has.

    Sets found with the same p and q differ in size, since more or fewer of the candidates are spared. To
    compare what they do, give them one size.

    Args:
        skip: weights that are not to be taken either; with ``skip=mask`` the next ones in line are.

    Raises:
        ValueError: as for :func:`select`; a matrix with too few weights that are not spared.
    """
    check_same(mask, prune)
    left_out = [other.indices for other in (_spared(prune, preserve, p), skip) if other]
    indices = {}
    for parameter, value in _finite_values(prune):
        value, k = value.flatten().clone(), len(mask.indices[parameter])
        for other in left_out:
            value[other[parameter]] = math.inf
        if k > int(torch.isfinite(value).sum()):
            raise ValueError(f"{parameter}: {k} weights are to be taken, but p={p} spares too many")
        indices[parameter] = largest(value, k, lowest=True).cpu()
    return Mask(indices, prune.shapes, prune.model, prune.revision, name)


def top(scores: Scores, share: float, *, scope: str = "matrix", lowest: bool = False) -> Mask:
    """The weights with the highest scores, or with the lowest; errors as for :func:`select`.

    Args:
        share: how many, as a share of what ``scope`` says; where a share above 0 comes to none, one.
        scope: ``"matrix"`` (the paper's), ``"row"`` for every row of a stored matrix, an output in all models
            but GPT-2 and its kind, ``"global"`` for all together.
    """
    require_shares(share=share)
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown; choose one of {', '.join(SCOPES)}")

    def count(size: int) -> int:
        return max(math.floor(share * size + 1e-9), min(1, size) if share else 0)

    indices, reached = {}, []
    for parameter, value in _finite_values(scores):
        if scope == "row":
            start = torch.arange(len(value), device=value.device)[:, None] * value.shape[1]
            rows = value.topk(count(value.shape[1]), dim=1, largest=not lowest).indices
            index = (rows + start).flatten().sort().values
        else:
            k = count(scores.numel if scope == "global" else value.numel())
            index = largest(value.flatten(), min(k, value.numel()), lowest=lowest)
            reached.append(value.flatten()[index].cpu())
        indices[parameter] = index.cpu()
    if scope == "global":  # what is among the first of all is among the first of its matrix
        kept = torch.zeros(sum(map(len, reached)), dtype=torch.bool)
        kept[largest(torch.cat(reached), count(scores.numel), lowest=lowest)] = True
        parts = kept.split([len(index) for index in indices.values()])
        indices = {name: index[part] for (name, index), part in zip(indices.items(), parts, strict=True)}
    return Mask(indices, scores.shapes, scores.model, scores.revision)


def require_shares(**shares: float) -> None:
    """Refuse shares outside 0 to 1, by their names."""
    for name, value in shares.items():
        if not 0 <= value <= 1:  # also catches NaN
            raise ValueError(f"{name}={value} must be a share between 0 and 1")


def _spared(prune: Scores, preserve: Scores | None, p: float) -> Mask | None:
    require_shares(p=p)
    if preserve is not None:
        check_same(prune, preserve)
        return top(preserve, p)
    if p:
        raise ValueError(f"p={p} spares weights by their preserve scores, but preserve is None")
    return None


def _finite_values(scores: Scores) -> Iterator[tuple[str, Float[Tensor, "out into"]]]:
    for parameter, value in scores.values.items():
        if not finite(value):
            raise ValueError(
                f"the scores of {parameter} are not all finite; score again in a wider precision"
            )
        yield parameter, value


def largest(
    values: Float[Tensor, " weight"], k: int, *, lowest: bool = False, sample: int = 50_000
) -> Int[Tensor, " k"]:
    """Numbers of the k largest (or lowest) values, rising; of equal values at the edge, any.

    A sample says roughly where the k-th largest lies; only what is above a safe bound is then looked at
    closely. That is exact, takes one pass over the values, and sorts few of them.
    """
    far, n, width = {"largest": not lowest, "sorted": False}, len(values), 256
    reached, extreme = (torch.le, torch.amin) if lowest else (torch.ge, torch.amax)
    if k <= 0:
        return torch.empty(0, dtype=torch.long, device=values.device)
    if n > 4 * sample and k < n // 2:
        some = values[:: n // sample]
        # A few standard deviations more than is expected of the sample, so that the bound is rarely too high.
        expected = k * len(some) / n
        rank = min(len(some), math.ceil(expected + 5 * math.sqrt(expected) + 5))
        edge = some.topk(rank, **far).values
        bound = edge.max() if lowest else edge.min()
        # Most stretches of values have nothing beyond the bound: of these only the extreme is compared.
        rows = values[: n // width * width].view(-1, width)
        hit = reached(extreme(rows, 1), bound).nonzero()[:, 0]
        row, column = reached(rows[hit], bound).nonzero().unbind(1)
        rest = reached(values[rows.numel() :], bound).nonzero()[:, 0]
        beyond = torch.cat([hit[row] * width + column, rest + rows.numel()])
        if len(beyond) >= k:
            return beyond[values[beyond].topk(k, **far).indices].sort().values
    return values.topk(k, **far).indices.sort().values


# --------------------------------------------------------------------------- taking weights out


def check(mask: Mask, lm: LanguageModel) -> None:
    """Refuse a mask of a model with other parameters or other shapes."""
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


def values(lm: LanguageModel, mask: Mask) -> dict[str, Float[Tensor, " _chosen"]]:
    """The chosen weights as they are now, a copy: parameter -> values, where the parameter lies."""
    return {
        name: lm.model.get_parameter(name).detach().view(-1)[index] for name, index in mask.indices.items()
    }


@torch.no_grad()
def put(lm: LanguageModel, mask: Mask, new: Mapping[str, Tensor]) -> None:
    """Set the chosen weights in place: parameter -> one value for each of them, or one for all."""
    for name, value in new.items():
        lm.model.get_parameter(name).detach().view(-1)[mask.indices[name]] = value


@contextmanager
def without(
    lm: LanguageModel, mask: Mask, *, strength: float = 0.0, elsewhere: bool = False
) -> Iterator[LanguageModel]:
    """The model without some of its weights; they come back exactly, also after an exception.

    A causal probe, as in the paper, and no defence: what was removed can be trained back. May be nested.

    Args:
        strength: what the weights are multiplied by, 0 to remove them.
        elsewhere: the mask was made for a model with other weights (a parent, another stage), on purpose.

    Raises:
        ValueError: a mask for another model, or a strength that is no number; the model is left as it is.
    """
    check(mask, lm)
    if mask.revision != lm.revision and not elsewhere:
        raise ValueError(
            f"the mask {mask.name!r} was selected for {mask.model!r}, whose weights are not those of "
            f"{lm.name!r}; say elsewhere=True if that is meant"
        )
    if not math.isfinite(strength):
        raise ValueError(f"strength={strength!r} must be a finite number")
    before = values(lm, mask)
    try:
        put(lm, mask, {name: old * strength for name, old in before.items()})
        yield lm
    finally:
        put(lm, mask, before)


# --------------------------------------------------------------------------- controls


def random_like(mask: Mask, *, seed: int = 0, within: Mask | None = None) -> Mask:
    """Equally many random weights in every matrix, drawn from those of ``within`` or from all."""
    if within is not None:
        check_same(mask, within)
    indices = {}
    for name, index in mask.indices.items():
        pool = torch.arange(math.prod(mask.shapes[name])) if within is None else within.indices[name]
        if len(pool) < len(index):
            raise ValueError(f"{name}: {len(index)} weights are to be drawn from {len(pool)}")
        order = torch.randperm(len(pool), generator=generator(seed, name))
        indices[name] = pool[order[: len(index)]].sort().values
    return replace(mask, indices=indices, name=f"random {seed}")


def magnitude_like(mask: Mask, lm: LanguageModel, *, seed: int = 0) -> Mask:
    """Random weights of matched size: for each chosen weight another of the same matrix and nearly its size.

    A matrix with more weights in the set than outside it raises a ``ValueError``.
    """
    check(mask, lm)
    found, indices = matrices(lm), {}
    for name, index in mask.indices.items():
        sizes = found[name].weight.detach().float().abs().flatten().cpu()
        order = sizes.argsort()
        taken = torch.zeros(len(order), dtype=torch.bool)
        taken[index] = True
        free = order[~taken[order]]
        if len(free) < len(index):
            raise ValueError(f"{name}: {len(index)} weights are to be matched by {len(free)} others")
        place = torch.searchsorted(sizes[free], sizes[index].contiguous())
        place = place + torch.randint(-NEAR, NEAR + 1, (len(index),), generator=generator(seed, name))
        unused, matched = list(range(len(free))), []
        for at in place.clamp(0, len(free) - 1).tolist():
            nearest = bisect.bisect_left(unused, at)
            if nearest == len(unused) or (nearest and at - unused[nearest - 1] < unused[nearest] - at):
                nearest -= 1
            matched.append(unused.pop(nearest))
        indices[name] = free[matched].sort().values
    return replace(mask, indices=indices, name=f"same sizes {seed}")


# --------------------------------------------------------------------------- overlap


def jaccard(first: Mask, other: Mask) -> float:
    """Jaccard index: shared weights over weights in either; 0 where both are empty."""
    return _index(len(first & other), first, other)


def chance_jaccard(first: Mask, other: Mask) -> float:
    """The Jaccard index to be expected of two random sets with as many weights in every matrix."""
    check_same(first, other)
    both = sum(
        len(index) * len(other.indices[name]) / math.prod(first.shapes[name])
        for name, index in first.indices.items()
    )
    return _index(both, first, other)


def _index(both: int | float, first: Mask, other: Mask) -> float:
    either = len(first) + len(other) - both
    return both / either if either else 0.0
