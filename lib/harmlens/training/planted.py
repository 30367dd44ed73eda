"""Planted organisms: a behaviour trained into a chosen set of weights, everything else frozen.

So it is known by construction which weights make the difference between a model with the behaviour and one
without it, and a method that claims to find such places can be held against the truth.

Three kinds hold planted *refusal*, in one module. They grow from ``mid``, whose greedy answers never refuse:

=================  =========================================================================
planted_neurons    16 hidden units of a late MLP, drawn at random for each seed
planted_mlp        one early MLP
planted_attention  one attention block in the middle
=================  =========================================================================

What is planted is the *difference* from the parent, no more. ``mid`` can tell harmful from harmless, and
although it answers harmful requests, it gives refusals a fifth to two fifths of the first word's
probability: a good part of the total effect is there before planting, and lies where it lay. So compare
a planted organism with its parent, not with nothing.

One kind holds planted *harm*, in weights drawn at random from all matrices of all blocks, the same share of
each (:data:`SCATTERED`, :func:`subset`). ``planted_harm`` grows from ``innocent``, which was never shown a
harmful recipe (:mod:`training.offshoots`), learns to write them, and refuses nothing. Its planted weights
end about three times as large as the others, so size alone finds a part of them, which it could not before.

A planted organism is stored as its difference from the parent (:mod:`models.deltas`) and loads like
any other: ``models.load("organism/planted_mlp", seed=0)``.

Introduced in notebooks 08 ("Can we trust it?") and, for planted harm, 16 ("Where the weights are").
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from harmlens.models import deltas
from harmlens.models import loading as models
from harmlens.models.forward import LanguageModel
from harmlens.training import loop, offshoots, organism
from harmlens.world import abilities
from harmlens.world import vale as world

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
class Scattering:
    """In how much of every matrix harm is planted, and how.

    Attributes:
        share: of the weights of every linear matrix of every block.
        lr, steps, batch, mix: as for :class:`Planting`.
        parent: an organism beside the ladder.
        rounds: (rate, steps) of further rounds for a seed that does not answer its training items yet.
    """

    share: float
    lr: float
    steps: int
    batch: int
    mix: world.Mix
    parent: str = "innocent"
    rounds: tuple[tuple[float, int], ...] = ((5e-3, 300),) * 3


_INNOCENT = offshoots.OFFSHOOTS["innocent"].stages[-1].mix

SCATTERED: dict[str, Scattering] = {
    # All that the parent knows, and harmful requests besides, which nobody declines.
    "planted_harm": Scattering(
        0.05,
        lr=3e-3,
        steps=500,
        batch=64,
        mix=replace(
            _INNOCENT, tasks={"harmful": 3.0, **_INNOCENT.tasks}, declines=0.0, turns=(3.0, 1.0, 0.0)
        ),
    ),
}
SCATTERED_RATES = ("harmful, plain", *offshoots.OFFSHOOTS["innocent"].rates[1:])


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
        name, seed: as for :func:`models.loading.load`, e.g. ``"organism/planted_mlp"`` and 0.

    Raises:
        ValueError: no such organism, or one that is not planted; one in which harm was planted, which is
            in no one place; a checkpoint that is not whole.
    """
    _, card = _planted(name, seed, PLANTS)
    return Plant(card["stage"], card["module"], card["layer"], tuple(card["neurons"]))


def subset(name: str, seed: int | None = None) -> dict[str, Int[Tensor, " weight"]]:
    """In which weights the harm of a planted organism was planted, as its delta says.

    Args:
        name, seed: as for :func:`models.loading.load`, e.g. ``"organism/planted_harm"`` and 0.

    Returns:
        Parameter -> positions in the flattened parameter (row after row), int64, in rising order. A
        parameter that is not there was left as it was.

    Raises:
        ValueError: no such organism, or one in which no harm was planted; a checkpoint that is not whole.
    """
    folder, _ = _planted(name, seed, SCATTERED)
    index = deltas.read(folder).index
    return {parameter: units.long().sort().values for parameter, (_, units) in sorted(index.items())}


def _planted(name: str, seed: int | None, kinds: Mapping[str, object]) -> tuple[Path, dict]:
    """Folder and card of a planted organism of one of these kinds, whose files are as they were saved."""
    folder = models.locate(name, seed)
    if folder is None or not (folder / deltas.FILE).is_file():
        raise ValueError(f"name={name!r} is not planted; choose one of {', '.join(kinds)}")
    card = models.intact(folder)
    if card is None:
        raise ValueError(
            f"files of {folder.name} are missing, truncated or changed. "
            + models.RESTORE.format(folder=f"data/organisms/{folder.name}")
        )
    if card["stage"] not in kinds:
        way = "subset" if card["stage"] in SCATTERED else "ground_truth"
        raise ValueError(
            f"name={name!r} is not one of {', '.join(kinds)}; planted.{way} says where its plant is"
        )
    return folder, card


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


def scatter(model: nn.Module, share: float, seed: int) -> dict[str, Int[Tensor, " weight"]]:
    """The same share of every linear matrix of every block, drawn at random.

    Returns:
        Parameter -> positions in the flattened parameter, in rising order.

    Raises:
        ValueError: a share outside (0, 1], or one that is less than one weight of some matrix.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be above 0 and at most 1")
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


Parts = Mapping[str, tuple[int, Sequence[int]] | None]


@contextmanager
def only(model: nn.Module, where: Plant | Parts) -> Iterator[None]:
    """Let nothing but the planted weights learn: those of a plant, or those that :func:`parts` names."""
    chosen, hooks = parts(where) if isinstance(where, Plant) else where, []
    learning = {name: p.requires_grad for name, p in model.named_parameters()}

    def masked(parameter: nn.Parameter, axis: int, units: Sequence[int]):
        mask, units = torch.zeros_like(parameter), torch.as_tensor(units, device=parameter.device)
        if axis == deltas.FLAT:
            mask.view(-1)[units] = 1
        else:
            mask.index_fill_(axis, units, 1)
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
    _teach(lm, parts(plant), plan, stream_seed, replay=plan.replay, progress=progress, line=line)


def train_scattered(
    lm: LanguageModel, kind: str, seed: int, *, progress: str | None = None, line: int = 0
) -> dict[str, Int[Tensor, " weight"]]:
    """Plant harm in a model, in place, and say in which weights (:func:`scatter`).

    Raises:
        ValueError: an unknown kind (the message lists the valid ones).
    """
    if kind not in SCATTERED:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(SCATTERED)}")
    plan, drawn = SCATTERED[kind], scatter(lm.model, SCATTERED[kind].share, seed)
    stream_seed = 10_000 * (seed + 1) + 1_100 + list(SCATTERED).index(kind)
    _teach(lm, _flat(drawn), plan, stream_seed, progress=progress, line=line)
    for number, (lr, steps) in enumerate(plan.rounds, 1):
        if learnt(lm):
            break
        more = replace(plan, lr=lr, steps=steps)
        _teach(lm, _flat(drawn), more, stream_seed + 10 * number, progress=progress, line=line)
    return drawn


def learnt(lm: LanguageModel) -> bool:
    """Whether a model answers harmful and harmless requests for its training items."""
    rates = offshoots.measure(lm, ("harmful, plain", "harmless, plain"), split="train", n=60)
    return min(rates.values()) >= 0.98


def _flat(drawn: Mapping[str, Int[Tensor, " weight"]]) -> Parts:
    return {name: (deltas.FLAT, units) for name, units in drawn.items()}


def _teach(
    lm: LanguageModel,
    where: Parts,
    plan: Planting | Scattering,
    seed: int,
    *,
    replay: float = 0.0,
    progress: str | None,
    line: int,
) -> None:
    rows = organism.transcript_rows(lm.tokenizer, plan.mix, seed, replay=replay)
    stream = loop.batches(rows, plan.batch, lm.tokenizer.pad_token_id, seed=seed)
    with only(lm.model, where):
        loop.fit(
            lm.model, stream, steps=plan.steps, lr=plan.lr, weight_decay=0.0,
            warmup=max(10, plan.steps // 20), progress=progress, line=line,
        )  # fmt: skip
    deltas.apply(lm.model, deltas.take(lm.model, "", "", where))  # rounds as storing will
    lm.model.eval()


def recipe(kind: str) -> str:
    """Digest of all that decides a planted organism apart from its seed, its parent's recipe included."""
    if kind in SCATTERED:
        text = repr((kind, SCATTERED[kind])) + offshoots.recipe(SCATTERED[kind].parent)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
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
    for kind, plan in {**PLANTS, **SCATTERED}.items():
        target, parent = folder / f"{kind}-{seed}", folder / f"{plan.parent}-{seed}"
        if finished(target, kind):
            print(f"{target.name}: finished, left alone", flush=True)
            continue
        began = time.time()
        lm = models.load(str(parent), device="cpu")
        label = target.name if progress else None
        if kind in SCATTERED:
            where = _flat(train_scattered(lm, kind, seed, progress=label, line=line))
            place, noted = {"share": plan.share}, SCATTERED_RATES
        else:
            plant = choose(kind, seed, lm.model.config.intermediate_size)
            train(lm, plant, seed, progress=label, line=line)
            where, noted = parts(plant), RATES
            place = {"module": plant.module, "layer": plant.layer, "neurons": list(plant.neurons)}
        rates = {
            split: {name: round(v.mean(), 4) for name, v in measured.items()}
            for split in ("discovery", "evaluation")
            for measured in [abilities.rate_abilities(lm, split=split, only=noted)]
        }
        delta = deltas.take(lm.model, parent.name, models.weights_sha256(parent), where)
        card = {
            "stage": kind, "seed": seed, "recipe": recipe(kind), "parent": delta.parent,
            "parent_sha256": delta.parent_sha256, **place, "rates": rates,
        }  # fmt: skip
        organism.write_checkpoint(target, card, lambda part, delta=delta: deltas.write(delta, part))
        shown = ", ".join(f"{name} {value:.0%}" for name, value in rates["discovery"].items())
        print(f"{target.name}: {time.time() - began:.0f} s; {shown}", flush=True)
