"""Where the two methods meet: neurons that mediate, and weights that were pruned.

A neuron owns the weights that feed it (a row of each matrix in front of the nonlinearity) and those by which
it writes (a column of the output projection), so that either finding is a set of weights.

**A common currency.** With a_i the value of unit i, the prune scores of its outgoing weights add up to

    sum_j W[j, i] dL/dW[j, i] = sum over positions of a_i dL/da_i,

the first-order effect of the unit on the answers' loss (:func:`unit_scores`). Attribution patching of the
same unit is (a_i' - a_i) dY/da_i at the last position of the prompt. The two differ in what the unit is set
to, in the outcome, and in the moment: words of the answer here, its beginning there.

Introduced in notebook 17 ("Do the papers agree?").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats as scipy_stats
from torch import Tensor, nn

from harmlens.models import parts as decoder
from harmlens.models.forward import LanguageModel
from harmlens.weights.masks import Mask, check
from harmlens.weights.scores import Scores, layer_of, matrices


@dataclass(frozen=True)
class Meeting:
    """How many of some chosen weights belong to some neurons, by the MLP's matrices.

    Columns: hits (chosen weights that belong to the neurons), chosen weights, members (all weights that
    belong to them), and size (all weights).
    """

    matrices: tuple[str, ...]
    columns: Float[np.ndarray, "matrix 4"]

    @property
    def enrichment(self) -> float:
        """See :func:`log2_enrichment`, all matrices together."""
        return float(log2_enrichment(*self.columns.T))

    @property
    def p_value(self) -> float:
        """Chance of as many hits or more, if every matrix drew its chosen weights at random.

        The numbers of hits of the matrices are hypergeometric; their sum has the convolution of them.
        """
        total, counts = np.ones(1), self.columns.astype(int)
        for _, chosen, members, size in counts:
            law = scipy_stats.hypergeom(size, members, chosen)
            total = np.convolve(total, law.pmf(np.arange(min(members, chosen) + 1)))
        return float(min(1.0, total[counts[:, 0].sum() :].sum()))


def log2_enrichment(
    hits: np.ndarray, chosen: np.ndarray, members: np.ndarray, size: np.ndarray, axis: int = -1
) -> np.ndarray:
    """log2 of (share of the chosen weights that belong to the neurons / share of all weights that do).

    Half a weight is added to the hits and to what chance would give, so that no hit at all has a value too.

    >>> round(float(log2_enrichment(*np.array([[10.0], [100.0], [5.0], [100.0]]))), 2)
    0.93
    """
    hits, chosen, members, size = (np.sum(x, axis=axis) for x in (hits, chosen, members, size))
    return np.log2((hits + 0.5) / (chosen * members / size + 0.5))


# --------------------------------------------------------------------------- whose weights they are


def _mlp(
    lm: LanguageModel, layer: int, units: Sequence[int] = ()
) -> Iterator[tuple[str, Float[Tensor, "part unit other"], Bool[Tensor, "out into"]]]:
    """Of each matrix of an MLP: its name, its weights neuron by neuron, and which belong to ``units``."""
    blocks = decoder.blocks(lm)
    if not 0 <= layer < len(blocks):
        raise ValueError(f"layer={layer} does not exist; choose 0 to {len(blocks) - 1}")
    mlp = decoder.mlp(blocks[layer])
    last, inside = decoder.projection(mlp), {id(module) for module in mlp.modules()}
    count = decoder.projection_weight(mlp).shape[1]
    if outside := [u for u in units if not 0 <= u < count]:
        raise ValueError(f"units: layer {layer} has units 0 to {count - 1}, not {outside[:5]}")
    for name, module in matrices(lm, [layer]).items():
        if id(module) not in inside:
            continue
        # Neurons lie on the first stored axis or on the second; fused matrices hold several rows of each.
        weight, first = module.weight.detach(), (module is not last) == isinstance(module, nn.Linear)
        if weight.shape[0 if first else 1] % count:
            raise ValueError(f"{name} has no axis of {count} hidden units, so they own no part of it")
        members = torch.zeros(weight.shape, dtype=torch.bool)
        each, own = ((x if first else x.T).unflatten(0, (-1, count)) for x in (weight, members))
        own[:, list(units)] = True
        yield name, each, members


def weights_of(lm: LanguageModel, units: Mapping[int, Sequence[int]], like: Mask) -> Mask:
    """All weights that belong to neurons (layer -> hidden units), as a mask with the matrices of ``like``.

    Without them the neurons write nothing.
    """
    check(like, lm)
    indices = {name: index[:0] for name, index in like.indices.items()}
    for layer, some in units.items():
        for name, _, members in _mlp(lm, layer, some):
            if name not in indices:
                raise ValueError(f"like: holds no {name}; select it from scores of layer {layer} too")
            indices[name] = members.flatten().nonzero()[:, 0]
    return replace(like, indices=indices, name="neurons")


def overlap_with_neurons(lm: LanguageModel, mask: Mask, units: Sequence[int], *, layer: int) -> Meeting:
    """Count the chosen weights of one MLP that belong to some of its neurons.

    A layer, a unit or a matrix that the model or the mask does not have, and an MLP without hidden units of
    its own (a mixture of experts), raise a ``ValueError``.
    """
    rows = {}
    for name, _, members in _mlp(lm, layer, units):
        shape, own = tuple(members.shape), members.flatten()
        if mask.shapes.get(name) != shape:
            raise ValueError(
                f"mask: holds no {name} of shape {shape}; select it from scores of layer {layer}"
            )
        chosen = mask.indices[name]
        rows[name] = [int(own[chosen].sum()), len(chosen), int(own.sum()), len(own)]
    return Meeting(tuple(rows), np.array(list(rows.values()), dtype=float))


def norms(lm: LanguageModel, layer: int) -> Float[Tensor, " unit"]:
    """Euclidean norm of all weights of each neuron of a layer."""
    every = (each.float().cpu().transpose(1, 2).flatten(0, 1) for _, each, _ in _mlp(lm, layer))
    return torch.stack([each.square().sum(0) for each in every]).sum(0).sqrt()


# --------------------------------------------------------------------------- scores and directions


def unit_scores(lm: LanguageModel, scores: Scores, layer: int) -> Float[Tensor, " unit"]:
    """Minus the sum of the signed prune scores of each neuron's outgoing weights.

    To first order the rise of the scored answers' loss without the neuron: up means that it supports them.
    Scores without a sign, or of other layers, raise a ``ValueError``.
    """
    if scores.kind != "signed":
        raise ValueError(f"scores of kind {scores.kind!r} do not add up to effects; give signed ones")
    module = decoder.projection(decoder.mlp(decoder.blocks(lm)[layer]))
    name = next(n for n, m in matrices(lm, [layer]).items() if m is module)
    if name not in scores.values:
        raise ValueError(f"scores: hold no {name}; score layer {layer} too")
    return -scores.values[name].sum(0 if isinstance(module, nn.Linear) else 1).float().cpu()


def along_direction(lm: LanguageModel, mask: Mask, vector: Float[Tensor, " width"]) -> float:
    """How much of what the chosen weights write or read lies along a direction of the residual stream.

    Taking weights out changes a matrix by minus their part D of it. Of all that D can write into the stream
    (or read from it) the share |v D|^2 / |D|^2 lies along the unit direction v. Matrices that do neither are
    left out. Returned is the share times the width: 1 where v is no more to the weights than any direction.
    """
    check(mask, lm)
    unit = (vector / vector.norm()).float().cpu()
    blocks, found = decoder.blocks(lm), matrices(lm)
    inside, whole = 0.0, 0.0
    for name, index in mask.indices.items():
        block, module = blocks[layer_of(name)], found[name]
        writes = any(module is decoder.projection(part(block)) for part in (decoder.attention, decoder.mlp))
        part = torch.zeros(mask.shapes[name])
        part.view(-1)[index] = module.weight.detach().flatten()[index].float().cpu()
        if writes != isinstance(module, nn.Linear):  # let the stream be the first axis
            part = part.T
        if len(index) and len(part) == len(unit):
            inside += float((unit @ part).square().sum()) * len(unit)
            whole += float(part.square().sum())
    return inside / whole
