"""Where an organism's behaviour is planted: a chosen set of weights learns, everything else is frozen.

So it is known by construction which weights make the difference between a model with the behaviour and one
without it, and a method that claims to find such places can be held against the truth. Refusal is planted in
one module, harm in single weights drawn from all matrices of all blocks; ``data/organisms.yaml`` says where
and how. What is planted is the *difference* from the parent, as which it is stored
(:mod:`models.organisms`), no more.

Introduced in notebooks 08 ("Can we trust it?") and, for planted harm, 16 ("Where the weights are").
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor, nn

from harmlens.models import loading as models
from harmlens.models import organisms
from harmlens.training.organism import COURSES, course

# Parameter -> axis and index of what is trained in it, or None for the whole of it (organisms.take_delta).
Parts = Mapping[str, tuple[int, Sequence[int]] | None]


@dataclass(frozen=True)
class Plant:
    """Where an organism's refusal was planted; ``neurons`` is empty where the whole module was trained."""

    module: str
    layer: int
    neurons: tuple[int, ...] = ()


def ground_truth(name: str, seed: int | None = None) -> Plant:
    """Where the refusal of an organism such as ``"organism/planted_mlp"`` was planted, as its card says.

    One in which none was planted, or a checkpoint that is not whole, is a ValueError.
    """
    folder = models.locate(name, seed)
    card = {} if folder is None else organisms.require_intact(folder)
    if "module" not in card:
        kinds = ", ".join(kind for kind, taught in COURSES.items() if taught.place)
        raise ValueError(f"name={name!r} is not planted; choose one of {kinds}")
    return Plant(card["module"], card["layer"], tuple(card["neurons"]))


def draw_plant(kind: str, seed: int, hidden: int) -> Plant:
    """The place that a seed gets: units are drawn from the ``hidden`` ones of an MLP."""
    place = course(kind).place
    drawn = random.Random(f"{kind}/{seed}").sample(range(hidden), place.units or 0)
    return Plant(place.module, place.layer, tuple(sorted(drawn)))


def parts(plant: Plant) -> Parts:
    """What is trained of which parameter. A hidden unit is a row of gate and up and a column of down."""
    block = f"model.layers.{plant.layer}"
    if plant.module == "attention":
        return {f"{block}.self_attn.{which}_proj.weight": None for which in "qkvo"}
    return {
        f"{block}.mlp.{which}_proj.weight": (axis, plant.neurons) if plant.neurons else None
        for which, axis in (("gate", 0), ("up", 0), ("down", 1))
    }


def scatter(model: nn.Module, share: float, seed: int) -> dict[str, Int[Tensor, " _weight"]]:
    """The same share of every linear matrix of every block, drawn at random.

    Parameter -> positions in the flattened parameter, in rising order. A ValueError where that is less than
    one weight of some matrix.
    """
    drawn = {}
    for name, parameter in model.named_parameters():
        if ".layers." not in name or parameter.ndim != 2:
            continue
        n = round(share * parameter.numel())
        if n == 0:
            raise ValueError(f"share={share} is less than one weight of {name}; choose a larger one")
        rng = random.Random(f"planted_harm/{seed}/{name}")  # of its own for each matrix
        drawn[name] = torch.tensor(sorted(rng.sample(range(parameter.numel()), n)))
    return drawn


def where(kind: str, seed: int, model: nn.Module) -> Parts | None:
    """What is trained of which parameter of a planted organism; None for one that is not planted."""
    taught = course(kind)
    if taught.share is not None:
        drawn = scatter(model, taught.share, seed).items()
        return {name: (organisms.FLAT, units) for name, units in drawn}
    return parts(draw_plant(kind, seed, model.config.intermediate_size)) if taught.place else None


@contextmanager
def only(model: nn.Module, chosen: Parts | None) -> Iterator[None]:
    """Let nothing but the chosen weights learn; everything, with None."""
    if chosen is None:
        yield
        return
    learning, hooks = [(p, p.requires_grad) for p in model.parameters()], []
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
            if chosen.get(name) is None:
                continue
            mask, (axis, units) = torch.zeros_like(parameter), chosen[name]
            target, axis = (mask.view(-1), 0) if axis == organisms.FLAT else (mask, axis)
            target.index_fill_(axis, torch.as_tensor(units, device=mask.device), 1)
            # Without a gradient and without weight decay, AdamW's step is exactly zero.
            hooks.append(parameter.register_hook(partial(torch.mul, mask)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, learns in learning:
            parameter.requires_grad_(learns)
