"""Scores of weights as such: what holds them, which weights have one, and scores that need no gradient.

Those of the pruning paper are computed in :mod:`weights.attribution`; :mod:`weights.masks` chooses by them.

Introduced in notebook 09 ("Weights that carry harm").
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harmlens.models import parts as decoder
from harmlens.models.forward import LanguageModel


@dataclass(frozen=True)
class Scores:
    """One number for each weight of each scored matrix."""

    kind: str  # "signed", "unsigned", "wanda", "magnitude" or "random"
    values: dict[str, Tensor]  # parameter -> scores of its shape, float32
    model: str
    revision: str
    n: int = 0  # examples that were scored; 0 where none were needed

    @property
    def numel(self) -> int:
        """Number of scored weights."""
        return sum(value.numel() for value in self.values.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter -> shape."""
        return {name: tuple(value.shape) for name, value in self.values.items()}

    def __neg__(self) -> Scores:
        return replace(self, values={name: -value for name, value in self.values.items()})

    def abs(self) -> Scores:
        """Sizes of the scores: the absolute value taken *after* summing over examples."""
        values = {name: value.abs() for name, value in self.values.items()}
        return replace(self, kind=f"abs({self.kind})", values=values)


def plus(*parts: Scores) -> Scores:
    """Scores of several groups of examples together: signed and unsigned scores are sums over examples.

    What is no such sum, or of different models, raises a ``ValueError``.
    """
    if not parts:
        raise ValueError("parts is empty: there is nothing to add up")
    first = parts[0]
    if first.kind not in ("signed", "unsigned"):
        raise ValueError(f"scores of kind {first.kind!r} are no sums over examples; score all at once")
    same = (first.kind, first.revision, first.shapes)
    if any((part.kind, part.revision, part.shapes) != same for part in parts):
        raise ValueError("parts: these are scores of different kinds, models or matrices")
    values = {name: sum(part.values[name] for part in parts) for name in first.values}
    return replace(first, values=values, n=sum(part.n for part in parts))


# --------------------------------------------------------------------------- which weights


def matrices(lm: LanguageModel, layers: Sequence[int] | None = None) -> dict[str, nn.Module]:
    """The linear layers of the decoder blocks, by the name of their weight.

    Norms, biases, embeddings and depthwise convolutions are not among them. Of ``layers``, or of all.

    Raises:
        ValueError: no such layer; blocks without linear layers, or with weights of more than two axes (as
            experts stacked in one parameter), for which no example's gradient is known.
    """
    blocks = decoder.blocks(lm)
    chosen = decoder.some_layers(len(blocks), layers)
    names = {id(parameter): name for name, parameter in lm.model.named_parameters()}
    found: dict[str, nn.Module] = {}
    for module in (module for layer in chosen for module in blocks[layer].modules()):
        own = {names[id(parameter)]: parameter for parameter in module.parameters(recurse=False)}
        stacked = [name for name, parameter in own.items() if parameter.ndim > 2]
        if isinstance(module, (nn.Linear, Conv1D)):
            name = names[id(module.weight)]
            if name in found:
                raise ValueError(f"{name} belongs to several layers; shared weights can't be scored")
            found[name] = module
        # Convolutions of each channel with itself, beside linear attention, are left out as norms are.
        elif stacked and getattr(module, "groups", 1) == 1:
            raise ValueError(
                f"{lm.name!r} keeps weights of more than two axes, as mixtures of experts do: {stacked[0]} "
                f"({type(module).__name__}); only linear layers can be scored. Choose a dense model, or "
                "layers without such weights"
            )
    if not found:
        raise ValueError(
            f"{lm.name!r} has no linear layer in its decoder blocks ({type(blocks[0]).__name__}), so there "
            "is nothing to score"
        )
    return found


def owners(lm: LanguageModel, layer: int) -> dict[str, Tensor]:
    """The neuron that each weight of an MLP belongs to: parameter -> numbers of its shape.

    A neuron owns the weights that feed it, a row of each matrix in front of the nonlinearity, and those by
    which it writes, a column of the output projection. An MLP without hidden units of its own raises a
    ``ValueError``, as a layer that does not exist.
    """
    found = matrices(lm, [layer])
    mlp = decoder.mlp(decoder.blocks(lm)[layer])
    last, inside = decoder.projection(mlp), {id(module) for module in mlp.modules()}
    count, numbers = decoder.projection_weight(mlp).shape[1], {}
    for name, module in found.items():
        if id(module) not in inside:
            continue
        # Neurons lie on the first stored axis or on the second; fused matrices hold several rows of each.
        shape, first = module.weight.shape, (module is not last) == isinstance(module, nn.Linear)
        if shape[0 if first else 1] % count:
            raise ValueError(f"{name} has no axis of {count} hidden units, so they own no part of it")
        number = torch.arange(shape[0 if first else 1]) % count
        numbers[name] = (number[:, None] if first else number).expand(shape)
    return numbers


def layer_of(name: str) -> int:
    """Number of the block that a parameter belongs to.

    >>> layer_of("model.layers.3.mlp.up_proj.weight")
    3
    """
    numbers = [part for part in name.split(".") if part.isdigit()]
    if not numbers:
        raise ValueError(f"name={name!r} is no parameter of a decoder block")
    return int(numbers[0])


# --------------------------------------------------------------------------- scores without gradients


def magnitude(lm: LanguageModel) -> Scores:
    """|W|: what a score has to beat that looks at data."""
    values = {name: module.weight.detach().float().abs() for name, module in matrices(lm).items()}
    return Scores("magnitude", values, lm.name, lm.revision)


def random(lm: LanguageModel, *, seed: int = 0) -> Scores:
    """Uniform noise; a matrix's numbers depend on the seed and its name alone."""
    values = {
        name: torch.rand(module.weight.shape, generator=generator(seed, name)).to(module.weight.device)
        for name, module in matrices(lm).items()
    }
    return Scores("random", values, lm.name, lm.revision)


def generator(seed: int, name: str) -> torch.Generator:
    """One with a seed of its own for each matrix, so that leaving one out changes no other."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def finite(value: Tensor) -> bool:
    """Whether all numbers are finite; thirty times as fast as asking each, and without a copy."""
    return all(math.isfinite(edge) for edge in torch.stack(value.aminmax()).tolist())  # NaN wins both
