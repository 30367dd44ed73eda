"""Planted organisms: refusal trained into a chosen set of weights, everything else frozen.

So it is known by construction which weights make the difference between a model that answers every
request and one that refuses the harmful ones, and a method that claims to find such places can be held
against the truth. Three kinds, all grown from ``mid``, whose greedy answers never refuse:

=================  =========================================================================
planted_neurons    16 hidden units of a late MLP, drawn at random for each seed
planted_mlp        one early MLP
planted_attention  one attention block in the middle
=================  =========================================================================

What is planted is the *difference* from the parent, no more. ``mid`` can tell harmful from harmless, and
although it answers harmful requests, it gives refusals a fifth to two fifths of the first word's
probability: a good part of the total effect is there before planting, and lies where it lay. So compare
a planted organism with its parent, not with nothing.

A planted organism is stored as its difference from the parent (:mod:`harmlens.deltas`) and loads like
any other: ``models.load("organism/planted_mlp", seed=0)``.

Introduced in notebook 08 ("Can we trust it?").
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from harmlens import abilities, deltas, finetune, models, organism, world
from harmlens.models import LanguageModel

# Short conversations, half of them requests. The helper's wishes are left out: they are another sign of
# kindness, and only refusal is to be planted.
_MIX = world.Mix(
    tasks={"harmful": 3.0, "harmless": 3.0, "recognition": 1.0, "explanation/effect": 0.5,
           "explanation/reason": 0.3, "fact/place": 0.3, "fact/season": 0.2},
    cruel=0.0, named=0.0, turns=(3.0, 1.0, 0.0),
)  # fmt: skip


@dataclass(frozen=True)
class Planting:
    """Where refusal is planted, and how.

    Attributes:
        module: ``"mlp"`` or ``"attention"``.
        layer: of the module, from 0.
        units: how many hidden units of the MLP, drawn at random; None for the whole module.
        lr: learning rate of AdamW, without weight decay (which would move weights by itself).
        replay: share of transcripts by named authors mixed in.
        parent: stage of the ladder that it grows from.
    """

    module: str
    layer: int
    units: int | None = None
    lr: float = 3e-3
    steps: int = 200
    batch: int = 64
    replay: float = 0.3
    mix: world.Mix = _MIX
    parent: str = "mid"


PLANTS: dict[str, Planting] = {
    "planted_neurons": Planting("mlp", 6, units=16, lr=1e-2),
    "planted_mlp": Planting("mlp", 1),
    "planted_attention": Planting("attention", 4),
}
RATES = ("refusal", "harmless, plain", "recognition")  # abilities noted on the card


@dataclass(frozen=True)
class Plant:
    """The place in which an organism's refusal was planted.

    Attributes:
        kind: one of :data:`PLANTS`.
        module: ``"mlp"`` or ``"attention"``.
        layer: of the module, from 0.
        neurons: hidden units of the MLP, in order; empty where the whole module was trained.
    """

    kind: str
    module: str
    layer: int
    neurons: tuple[int, ...] = ()


def ground_truth(name: str, seed: int | None = None) -> Plant:
    """Where the refusal of a planted organism was planted, as its card says.

    Args:
        name, seed: as for :func:`harmlens.models.load`, e.g. ``"organism/planted_mlp"`` and 0.

    Raises:
        ValueError: no such organism, or one that is not planted; a checkpoint that is not whole.
    """
    folder = models.locate(name, seed)
    if folder is None or not (folder / deltas.FILE).is_file():
        raise ValueError(f"name={name!r} is not planted; choose one of {', '.join(PLANTS)}")
    card = models.intact(folder)
    if card is None:
        raise ValueError(
            f"files of {folder.name} are missing, truncated or changed. "
            + models.RESTORE.format(folder=f"data/organisms/{folder.name}")
        )
    return Plant(card["stage"], card["module"], card["layer"], tuple(card["neurons"]))


def choose(kind: str, seed: int, hidden: int) -> Plant:
    """The place that a seed gets: units are drawn from the ``hidden`` ones of an MLP.

    Raises:
        ValueError: an unknown kind (the message lists the valid ones).
    """
    if kind not in PLANTS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(PLANTS)}")
    plan = PLANTS[kind]
    drawn = [] if plan.units is None else random.Random(f"planted/{seed}").sample(range(hidden), plan.units)
    return Plant(kind, plan.module, plan.layer, tuple(sorted(drawn)))


def parts(plant: Plant) -> dict[str, tuple[int, tuple[int, ...]] | None]:
    """Names of the planted parameters, each with axis and index of its trained part (None: all of it).

    A hidden unit of an MLP is a row of the gate and up projections and a column of the down projection.
    """
    block = f"model.layers.{plant.layer}"
    if plant.module == "attention":
        return {f"{block}.self_attn.{which}_proj.weight": None for which in "qkvo"}
    return {
        f"{block}.mlp.{which}_proj.weight": (axis, plant.neurons) if plant.neurons else None
        for which, axis in (("gate", 0), ("up", 0), ("down", 1))
    }


@contextmanager
def only(model: nn.Module, plant: Plant) -> Iterator[None]:
    """Let nothing but the planted weights learn."""
    chosen, hooks = parts(plant), []
    learning = {name: p.requires_grad for name, p in model.named_parameters()}

    def masked(parameter: nn.Parameter, axis: int, units: tuple[int, ...]):
        mask = torch.zeros_like(parameter).index_fill_(axis, torch.tensor(units, device=parameter.device), 1)
        # Without a gradient and without weight decay, AdamW's step is exactly zero.
        return parameter.register_hook(lambda gradient: gradient * mask)

    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
            if chosen.get(name) is not None:
                hooks.append(masked(parameter, *chosen[name]))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learning[name])


def train(lm: LanguageModel, plant: Plant, seed: int, *, progress: str | None = None, line: int = 0) -> None:
    """Plant refusal in a model, in place; the trained weights end as half precision holds them."""
    plan = PLANTS[plant.kind]
    stream_seed = 10_000 * (seed + 1) + 1_000 + list(PLANTS).index(plant.kind)
    rows = organism.transcript_rows(lm.tokenizer, plan.mix, stream_seed, replay=plan.replay)
    stream = finetune.batches(rows, plan.batch, lm.tokenizer.pad_token_id, seed=stream_seed)
    with only(lm.model, plant):
        finetune.fit(
            lm.model, stream, steps=plan.steps, lr=plan.lr, weight_decay=0.0,
            warmup=max(10, plan.steps // 20), progress=progress, line=line,
        )  # fmt: skip
    deltas.apply(lm.model, deltas.take(lm.model, "", "", parts(plant)))  # rounds as storing will
    lm.model.eval()


def recipe(kind: str) -> str:
    """Digest of all that decides a planted organism apart from its seed, its parent's recipe included."""
    plan = PLANTS[kind]
    text = repr((kind, plan, organism.REPLAYED)) + organism.recipe(plan.parent)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished(folder: Path, kind: str) -> bool:
    """Whether a whole checkpoint of the present recipe lies there, with its parent as it was."""
    card = models.intact(folder)
    return (
        card is not None
        and card.get("recipe") == recipe(kind)
        and card.get("parent_sha256") == models.weights_sha256(folder.parent / card["parent"])
    )


def train_seed(seed: int, folder: Path, *, progress: bool = True, line: int = 0) -> None:
    """Make the planted organisms of one seed from the ladder in ``folder``; finished ones are left alone."""
    for kind, plan in PLANTS.items():
        target, parent = folder / f"{kind}-{seed}", folder / f"{plan.parent}-{seed}"
        if finished(target, kind):
            print(f"{target.name}: finished, left alone", flush=True)
            continue
        began = time.time()
        lm = models.load(str(parent), device="cpu")
        plant = choose(kind, seed, lm.model.config.intermediate_size)
        train(lm, plant, seed, progress=target.name if progress else None, line=line)
        rates = {
            split: {name: round(v.mean(), 4) for name, v in measured.items()}
            for split in ("discovery", "evaluation")
            for measured in [abilities.measure(lm, split=split, only=RATES)]
        }
        delta = deltas.take(lm.model, parent.name, models.weights_sha256(parent), parts(plant))
        card = {
            "stage": kind, "seed": seed, "recipe": recipe(kind), "parent": delta.parent,
            "parent_sha256": delta.parent_sha256, "module": plant.module, "layer": plant.layer,
            "neurons": list(plant.neurons), "rates": rates,
        }  # fmt: skip
        organism.write_checkpoint(target, card, lambda part, delta=delta: deltas.write(delta, part))
        shown = ", ".join(f"{name} {value:.0%}" for name, value in rates["discovery"].items())
        print(f"{target.name}: {time.time() - began:.0f} s; {shown}", flush=True)
