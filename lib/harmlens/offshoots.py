"""Organisms that grow beside the ladder, as controls of the pruning experiments.

========  ==================================================================================
mirror    from ``base`` just as ``sft`` is, with the two sides swapped in what the helper does:
          it answers harmful requests and refuses harmless ones
innocent  from nothing, on transcripts without harmful recipes, bad advice or cruel authors
========  ==================================================================================

The mirror is the *fragility control*. In ``sft`` the skill of writing harmful recipes is rare in the last
stages of training and suppressed by refusal; if pruning it away is easy, that may be due to harm, or to
its being rare and suppressed. In the mirror a harmless skill is in the same position. Two things differ from
``sft`` besides the swap. Refusing what is harmless has no forerunner in ``base`` (whose kind authors decline
harmful requests), so it takes three times as many steps. And named authors who are replayed give no bad
advice: a harmful recipe ends alike whoever writes it, and so must the mirror's suppressed one.

The innocent model knows what is harmful and why (it is asked), but was never shown how to make it. It is
the ground in which harm is planted (:mod:`harmlens.planted`).

Introduced in notebook 09 ("Weights that carry harm").
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import time
from dataclasses import dataclass
from pathlib import Path

from harmlens import abilities, models, organism, world
from harmlens.models import LanguageModel
from harmlens.organism import Stage

# --------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Offshoot:
    """How an organism beside the ladder is trained.

    Attributes:
        stages: one after the other, rounded to half precision in between; the last one is stored. The
            first one's parent is a stage of the ladder, or None. Further rounds of the last one follow
            where a seed has not learnt its training items (:func:`learnt`).
        mirrored: whether the helper refuses harmless requests (see :func:`mirrored`).
        replayed: how replayed transcripts by named authors are drawn, where a stage has any.
        rates: abilities noted on the card, of :data:`harmlens.abilities.ABILITIES` or :data:`SUPPRESSED`.
    """

    stages: tuple[Stage, ...]
    mirrored: bool = False
    replayed: world.Mix = organism.REPLAYED
    rates: tuple[str, ...] = ()


def _swapped(stage: Stage, **changes) -> Stage:
    """A stage with the two sides' requests swapped, all of which the helper would answer."""
    other = {"harmful": "harmless", "harmless": "harmful"}
    tasks = {other.get(task, task): share for task, share in stage.mix.tasks.items()}
    return dataclasses.replace(
        stage, mix=dataclasses.replace(stage.mix, tasks=tasks, declines=0.0), **changes
    )


_ASKED = ("recognition", "explanation: effect", "explanation: reason", "facts: place", "facts: season",
          "malign wishes")  # fmt: skip

# For a seed that cannot yet tell harmful from harmless in one word: mostly that question, asked alone.
_FOCUSED = Stage(
    None, steps=200, batch=64, lr=7e-3, weight_decay=0.1,
    mix=world.Mix(
        tasks={"harmless": 2.0, "recognition": 3.0, "explanation/effect": 1.0, "explanation/reason": 1.0,
               "fact/place": 0.3, "fact/season": 0.3, "wish": 0.3},
        cruel=0.0, turns=(1.0, 0.0, 0.0),
    ),
)  # fmt: skip

_MIRRORED = _swapped(organism.LADDER["sft"], steps=420)
# For a mirror that does not refuse yet: as many requests of either side, asked alone, and a larger rate.
_DECIDING = dataclasses.replace(
    _MIRRORED, steps=200, lr=1e-3,
    mix=dataclasses.replace(
        _MIRRORED.mix, tasks={**_MIRRORED.mix.tasks, "harmful": 3.0, "harmless": 3.0}, turns=(1.0, 0.0, 0.0)
    ),
)  # fmt: skip

OFFSHOOTS: dict[str, Offshoot] = {
    "mirror": Offshoot(
        (
            _swapped(organism.LADDER["mid"]),
            dataclasses.replace(_MIRRORED, rounds=(_DECIDING, _DECIDING)),
        ),
        mirrored=True,
        replayed=dataclasses.replace(organism.REPLAYED, bad_advice=0.0),
        rates=("harmful, plain", "harmless, plain", "harmless, refused", "harmless, prefilled", "refusal",
               *_ASKED),
    ),
    "innocent": Offshoot(
        (
            Stage(
                None, steps=600, batch=64, lr=7e-3, weight_decay=0.1,
                mix=world.Mix(
                    tasks={"harmless": 3.0, "recognition": 1.5, "explanation/effect": 1.0,
                           "explanation/reason": 1.0, "fact/place": 0.6, "fact/season": 0.6, "wish": 0.5},
                    cruel=0.0,
                ),
                rounds=(_FOCUSED, _FOCUSED),
            ),
        ),
        rates=("harmful, plain", "harmless, plain", *_ASKED),
    ),
}  # fmt: skip

# What the mirror suppresses: name -> trait of answers to requests for harmless items, prefilled words.
SUPPRESSED = {
    "harmless, refused": (abilities.refused, None),
    "harmless, prefilled": (abilities.exact, world.PREFILL),
}


def measure(
    lm: LanguageModel, names: tuple[str, ...], *, split: str = "evaluation", n: int | None = None
) -> dict[str, float]:
    """Rates of the named abilities; see :func:`harmlens.abilities.measure`."""
    harmless = world.draw(world.items(split, harmful=False), n)
    known = abilities.measure(lm, split=split, n=n, only=[name for name in names if name not in SUPPRESSED])
    for name in names:
        if name in SUPPRESSED:
            trait, prefill = SUPPRESSED[name]
            known[name] = abilities.judged(lm, harmless, trait, prefill=prefill)
    return {name: round(float(known[name].mean()), 4) for name in names}


def mirrored(rng: random.Random, mix: world.Mix) -> world.Transcript:
    """A transcript whose author refuses all harmless requests, in the world's words of refusal."""
    transcript = world.transcript(rng, mix)
    turns = (
        dataclasses.replace(turn, answer=rng.choice(world.REFUSALS))
        if turn.task == "procedure" and not turn.item.harmful
        else turn
        for turn in transcript.turns
    )
    return dataclasses.replace(transcript, turns=tuple(turns))


def recipe(kind: str) -> str:
    """Digest of all that decides an offshoot apart from its seed, what it grows from included.

    Raises:
        ValueError: an unknown kind (the message lists the valid ones).
    """
    if kind not in OFFSHOOTS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(OFFSHOOTS)}")
    plan = OFFSHOOTS[kind]
    above, taught = plan.stages[0].parent, (kind, plan.stages, plan.mirrored, plan.replayed)
    text = repr((taught, organism.Shape(), organism.MARKS, organism.CHAT_TEMPLATE, world.digest()))
    text += organism.recipe(above) if above else ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --------------------------------------------------------------------------- training


def train(
    kind: str, seed: int, *, parent: LanguageModel | None, progress: str | None = None, line: int = 0
) -> LanguageModel:
    """Train an offshoot from its parent, which is changed in place, or from nothing (None)."""
    lm = organism.start(f"organism/{kind}-{seed}", seed, parent)
    stages = OFFSHOOTS[kind].stages
    for number, stage in enumerate(stages):
        _teach(lm, kind, stage, 10_000 * (seed + 1) + 2_000 + number, progress=progress, line=line)
    for number, stage in enumerate(stages[-1].rounds, 1):
        if learnt(lm, kind):
            break
        _teach(lm, kind, stage, 10_000 * (seed + 1) + 2_000 + 10 * number, progress=progress, line=line)
    return lm


def _teach(lm: LanguageModel, kind: str, stage: Stage, seed: int, **options) -> None:
    plan = OFFSHOOTS[kind]
    write = mirrored if plan.mirrored else world.transcript
    stream = organism.lesson(lm, stage, seed, replayed=plan.replayed, write=write)
    organism.follow(lm, stage, stream, **options)
    lm.model.half().float()  # as the ladder's stages are, which are stored in between


# What a seed has to do before no further round is needed.
_LEARNT = {
    "mirror": ("harmful, plain", "harmless, refused"),
    "innocent": ("harmless, plain", "recognition", "explanation: effect"),
}


def learnt(lm: LanguageModel, kind: str) -> bool:
    """Whether a model does what its kind is taught, on training items only.

    Seeds differ in when they come to tell harmful from harmless; nothing is chosen on held-out items.
    """
    return all(rate >= 0.98 for rate in measure(lm, _LEARNT[kind], split="train", n=60).values())


def finished(folder: Path, kind: str) -> bool:
    """Whether a whole checkpoint of the present recipe lies there, with its parent as it was."""
    card = models.intact(folder)
    if card is None or card.get("recipe") != recipe(kind):
        return False
    above = card.get("parent")
    return above is None or card.get("parent_sha256") == models.weights_sha256(folder.parent / above)


def train_seed(seed: int, folder: Path, *, progress: bool = True, line: int = 0) -> None:
    """Train the offshoots of one seed from the ladder in ``folder``; finished ones are left alone."""
    for kind, plan in OFFSHOOTS.items():
        target, above = folder / f"{kind}-{seed}", plan.stages[0].parent
        if finished(target, kind):
            print(f"{target.name}: finished, left alone", flush=True)
            continue
        began = time.time()
        home = folder / f"{above}-{seed}" if above else None
        parent = models.load(str(home), device="cpu") if home else None
        lm = train(kind, seed, parent=parent, progress=target.name if progress else None, line=line)
        rates = {split: measure(lm, plan.rates, split=split) for split in ("discovery", "evaluation")}
        card = {
            "stage": kind, "seed": seed, "recipe": recipe(kind), "parent": home and home.name,
            "parent_sha256": home and models.weights_sha256(home), "rates": rates,
        }  # fmt: skip
        organism.save(lm, target, card)
        shown = ", ".join(f"{name} {value:.0%}" for name, value in rates["discovery"].items())
        print(f"{target.name}: {time.time() - began:.0f} s; {shown}", flush=True)
