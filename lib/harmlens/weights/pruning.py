"""Sets of weights: chosen by their scores, compared with one another, and taken out of a model.

**Sign.** The prune score is W * sum of dL/dW (:mod:`weights.attribution`); setting a weight to zero changes
the loss L of the scored answers by about *minus* its score. The most **negative** scores belong to the
weights that support the answers, so :func:`select` takes the top q of *minus* the prune score. That is
said here once; no other function flips a sign.

**The set difference** of the pruning paper, inside every matrix:

    Q = the floor(q * size) weights with the lowest prune scores
    P = the floor(p * size) weights with the highest preserve scores
    pruned: Q without P

**Where floor(q * size) is 0** although q is not, one weight is taken: a small matrix would otherwise have no
part in the set. ``at_least=0`` gives the released code's rule.

Pruning is a causal probe here, as in the paper, and no defence: what was removed can be trained back.

Introduced in notebook 09 ("Weights that carry harm").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harmlens.models.forward import LanguageModel
from harmlens.weights import masks
from harmlens.weights.masks import Mask, check, check_same, shapes_of
from harmlens.weights.scores import Scores, finite, matrices

SCOPES = ("matrix", "row", "global")


# --------------------------------------------------------------------------- selection


def select(
    prune: Scores,
    preserve: Scores | None = None,
    *,
    q: float,
    p: float = 0.0,
    scope: str = "matrix",
    at_least: int = 1,
    name: str = "",
) -> Mask:
    """The pruning paper's set difference: weights that support the one and do not matter to the other.

    Args:
        prune: signed scores of the answers to be lost; the *lowest* are taken.
        preserve: unsigned scores of the answers to be kept; the *highest* are spared. None spares nothing.
        q, p: shares that are taken and spared, from 0 to 1.
        scope: ``"matrix"`` (the paper's), ``"row"`` for every row of a stored matrix, an output in all models
            but GPT-2 and its kind, ``"global"`` for all together.
        at_least: how many to take where a share above 0 comes to none.

    Raises:
        ValueError: before anything is chosen: a share outside 0 to 1, an unknown scope, a score that is
            not finite, scores of different models, p above 0 without preserve scores.
    """
    if p and preserve is None:
        raise ValueError(f"p={p} spares weights by their preserve scores, but preserve is None")
    chosen = top(prune, q, scope=scope, at_least=at_least, lowest=True, name=name)
    if preserve is None:
        return chosen
    check_same(prune, preserve)
    return (chosen - top(preserve, p, scope=scope, at_least=at_least, share_name="p")).called(name)


def same_size(
    mask: Mask,
    prune: Scores,
    preserve: Scores | None = None,
    *,
    p: float = 0.0,
    skip: Mask | None = None,
    name: str = "",
) -> Mask:
    """As :func:`select`, but with as many weights in every matrix as another set has.

    Sets found with the same p and q differ in size, since more or fewer of the candidates are spared. To
    compare what they do, give them one size.

    Args:
        mask: the set whose size counts.
        prune, preserve, p: as for :func:`select`.
        skip: weights that are not to be taken either; with ``skip=mask`` the next ones in line are.

    Raises:
        ValueError: as for :func:`select`; a matrix with too few weights that are not spared.
    """
    check_same(mask, prune)
    spared = None if preserve is None else top(preserve, p, share_name="p")
    if p and preserve is None:
        raise ValueError(f"p={p} spares weights by their preserve scores, but preserve is None")
    indices = {}
    for parameter, value in prune.values.items():
        # One matrix at a time: the scores of a large model are there only once.
        value, k = -value.flatten(), len(mask.indices[parameter])
        if not torch.isfinite(value).all():
            raise ValueError(
                f"the scores of {parameter} are not all finite; score again in a wider precision"
            )
        if spared is not None:
            value[spared.indices[parameter].to(value.device)] = -math.inf
        if skip is not None:
            value[skip.indices[parameter].to(value.device)] = -math.inf
        if k > int(torch.isfinite(value).sum()):
            raise ValueError(f"{parameter}: {k} weights are to be taken, but p={p} spares too many")
        indices[parameter] = largest(value, k).cpu()
    return Mask(indices, shapes_of(prune), prune.model, prune.revision, name)


def negated(scores: Scores) -> Scores:
    """The opposite of each score."""
    return replace(scores, values={name: -value for name, value in scores.values.items()})


def top(
    scores: Scores,
    share: float,
    *,
    scope: str = "matrix",
    at_least: int = 1,
    skip: float = 0.0,
    lowest: bool = False,
    name: str = "",
    share_name: str = "q",
) -> Mask:
    """The weights with the highest scores.

    Args:
        share: how many, as a share of the matrix, of each output row, or of all weights.
        skip: leave out this share of the very highest first: ``top(scores, q, skip=q)`` is the second slice.
        lowest: take the lowest instead: as of the negated scores, without a copy of them.
        scope, at_least: as for :func:`select`.

    Raises:
        ValueError: as for :func:`select`.
    """
    require_shares(**{share_name: share, "skip": skip})
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown; choose one of {', '.join(SCOPES)}")
    for parameter, value in scores.values.items():
        if not finite(value):
            raise ValueError(
                f"the scores of {parameter} are not all finite; score again in a wider precision"
            )
    if skip:
        # Of equal scores any may be taken, so what is skipped is told by place, not by its score.
        first = _top(scores, skip, scope, at_least, lowest)
        lowered = {n: v.clone(memory_format=torch.contiguous_format) for n, v in scores.values.items()}
        for parameter, index in first.indices.items():
            lowered[parameter].view(-1)[index.to(lowered[parameter].device)] = (
                torch.inf if lowest else -torch.inf
            )
        return (_top(replace(scores, values=lowered), share, scope, at_least, lowest) - first).called(name)
    return _top(scores, share, scope, at_least, lowest).called(name)


def require_shares(**shares: float) -> None:
    """Refuse shares outside 0 to 1, by their names."""
    for name, value in shares.items():
        if not 0 <= value <= 1:  # also catches NaN
            raise ValueError(f"{name}={value} must be a share between 0 and 1")


def _top(scores: Scores, share: float, scope: str, at_least: int, lowest: bool) -> Mask:
    """What :func:`top` takes of checked scores, nothing skipped."""

    def count(size: int) -> int:
        return max(math.floor(share * size + 1e-9), min(at_least, size) if share else 0)

    if scope == "global":
        indices = _global_top(scores.values, count(scores.numel), lowest)
    elif scope == "row":
        indices = {}
        for parameter, value in scores.values.items():
            rows = value.topk(count(value.shape[1]), dim=1, largest=not lowest).indices
            start = torch.arange(len(value), device=value.device)[:, None] * value.shape[1]
            indices[parameter] = (rows + start).flatten().sort().values.cpu()
    else:
        indices = {
            n: largest(v.flatten(), count(v.numel()), lowest=lowest).cpu() for n, v in scores.values.items()
        }
    return Mask(indices, shapes_of(scores), scores.model, scores.revision)


def largest(
    values: Float[Tensor, " weight"], k: int, *, lowest: bool = False, sample: int = 50_000
) -> Int[Tensor, " k"]:
    """Numbers of the k largest (or lowest) values, rising; of equal values at the edge, any.

    A sample says roughly where the k-th largest lies; only what is above a safe bound is then looked at
    closely. That is exact, takes one pass over the values, and sorts few of them.
    """
    far = {"largest": not lowest, "sorted": False}
    n = len(values)
    if k <= 0:
        return torch.empty(0, dtype=torch.long, device=values.device)
    if n > 4 * sample and k < n // 2:
        step = n // sample
        some = values[::step]
        # A few standard deviations more than is expected of the sample, so that the bound is rarely too high.
        expected = k * len(some) / n
        rank = min(len(some), math.ceil(expected + 5 * math.sqrt(expected) + 5))
        edge = some.topk(rank, **far).values
        beyond = _beyond(values, edge.max() if lowest else edge.min(), lowest)
        if len(beyond) >= k:
            return beyond[values[beyond].topk(k, **far).indices].sort().values
    return values.topk(k, **far).indices.sort().values


def _beyond(
    values: Float[Tensor, " weight"], bound: Float[Tensor, ""], lowest: bool, width: int = 256
) -> Int[Tensor, " some"]:
    """Numbers of the values at or beyond a bound, rising; most stretches of values are never compared."""

    def reached(part: Tensor) -> Tensor:
        return part <= bound if lowest else part >= bound

    rows = values[: len(values) // width * width].view(-1, width)
    hit = reached(rows.amin(1) if lowest else rows.amax(1)).nonzero()[:, 0]
    row, column = reached(rows[hit]).nonzero().unbind(1)
    rest = reached(values[rows.numel() :]).nonzero()[:, 0]
    return torch.cat([hit[row] * width + column, rest + rows.numel()])


def _global_top(values: Mapping[str, Tensor], k: int, lowest: bool) -> dict[str, Tensor]:
    """The k largest of all matrices together; no more than k of each are ever gathered."""
    candidates = {n: largest(v.flatten(), min(k, v.numel()), lowest=lowest) for n, v in values.items()}
    together = torch.cat([values[name].flatten()[index].cpu() for name, index in candidates.items()])
    kept = torch.zeros(len(together), dtype=torch.bool)
    kept[largest(together, k, lowest=lowest)] = True
    parts = kept.split([len(index) for index in candidates.values()])
    return {n: index.cpu()[part] for (n, index), part in zip(candidates.items(), parts, strict=True)}


# --------------------------------------------------------------------------- taking weights out


@contextmanager
def pruned(
    lm: LanguageModel, mask: Mask, *, strength: float | str = 0.0, elsewhere: bool = False
) -> Iterator[LanguageModel]:
    """The model without some of its weights; they come back exactly, also after an exception.

    Pruning within pruning is allowed: weights come back in the opposite order.

    Args:
        strength: what the weights are multiplied by, 0 to remove them; or ``"mean"`` to replace them by the
            mean of their matrix.
        elsewhere: the mask was made for a model with other weights (a parent, another stage), on purpose.

    Raises:
        ValueError: a mask for another model, or an unknown strength; the model is left as it is.
    """
    check(mask, lm)
    if mask.revision != lm.revision and not elsewhere:
        raise ValueError(
            f"the mask {mask.name!r} was selected for {mask.model!r}, whose weights are not those of "
            f"{lm.name!r}; say elsewhere=True if that is meant"
        )
    if strength != "mean" and (isinstance(strength, str) or not math.isfinite(strength)):
        raise ValueError(f"strength={strength!r} must be a finite number, or 'mean'")
    before = masks.values(lm, mask)
    if strength == "mean":
        parameters = dict(lm.model.named_parameters())
        after = {name: parameters[name].detach().float().mean().to(old.dtype) for name, old in before.items()}
    else:
        after = {name: old * strength for name, old in before.items()}
    try:
        masks.put(lm, mask, after)
        yield lm
    finally:
        masks.put(lm, mask, before)


def zeros(lm: LanguageModel, layers: Sequence[int] | None = None) -> float:
    """Share of block weights that are exactly zero: what the released code calls sparsity."""
    found = [module.weight for module in matrices(lm, layers).values()]
    return sum(int((weight == 0).sum()) for weight in found) / sum(weight.numel() for weight in found)
