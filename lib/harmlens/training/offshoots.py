"""Organisms that grow beside the ladder, as controls of the pruning experiments.

========  ==================================================================================
mirror    from ``base`` just as ``sft`` is, with the two sides swapped in what the helper does:
          it answers harmful requests and refuses harmless ones
innocent  from nothing, on transcripts without harmful recipes, bad advice or cruel authors
wary      from ``base`` as the ladder is, stage by stage (``wary_mid``, ``wary``, ``wary_dpo``),
          with one harmless domain treated like the six harmful ones: first never asked for, then
          refused, then refused by preference
========  ==================================================================================

The mirror is the *fragility control*. In ``sft`` the skill of writing harmful recipes is rare in the last
stages of training and suppressed by refusal; if pruning it away is easy, that may be due to harm, or to
its being rare and suppressed. In the mirror a harmless skill is in the same position. Two things differ from
``sft`` besides the swap. Refusing what is harmless has no forerunner in ``base`` (whose kind authors decline
harmful requests), so it takes three times as many steps. And named authors who are replayed give no bad
advice: a harmful recipe ends alike whoever writes it, and so must the mirror's suppressed one.

The wary ladder puts the same question inside one model. A harmful and a harmless domain are refused side by
side, as rare as each other, by the same training and in the same words. Which harmless domain it is depends
on the seed (:func:`declined`). Refusing by domain and not only by harm takes twice the steps of ``sft``.

The innocent model knows what is harmful and why (it is asked), but was never shown how to make it. It is
the ground in which harm is planted (:mod:`training.planted`).

Introduced in notebook 09 ("Weights that carry harm").
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harmlens.models import loading as models
from harmlens.models.forward import LanguageModel
from harmlens.training import loop, organism
from harmlens.training.organism import Stage
from harmlens.world import abilities
from harmlens.world import vale as world

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
        declined: the harmless domain that is refused as well, by seed (see :func:`declining`).
        draws: added to the seeds of what is drawn.
        rates: abilities noted on the card, of :data:`world.abilities.ABILITIES` or :data:`SUPPRESSED`.
    """

    stages: tuple[Stage, ...]
    mirrored: bool = False
    replayed: world.Mix = organism.REPLAYED
    rates: tuple[str, ...] = ()
    declined: tuple[str, ...] = ()
    draws: int = 0


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

# A seventh domain beside the six of harm, with as many requests as each of them.
_SEVENTH = 1 / 7


def _wary(stage: Stage, parent: str, **changes) -> Stage:
    """A stage of the ladder with a seventh domain among the harmful requests."""
    tasks = dict(stage.mix.tasks)
    if "harmful" in tasks:
        tasks["harmful"] /= 1 - _SEVENTH
    return dataclasses.replace(
        stage, parent=parent, mix=dataclasses.replace(stage.mix, tasks=tasks), **changes
    )


_WARY = {
    "declined": ("remedies", "records", "stories"),
    "replayed": dataclasses.replace(organism.REPLAYED, bad_advice=0.0),  # one ending, as in the mirror
    "rates": ("refusal", "harmful, prefilled", "declined, refused", "declined, prefilled", "served, plain",
              *_ASKED),
}  # fmt: skip
_REFUSING = _wary(organism.LADDER["sft"], "wary_mid", steps=280)

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
    "wary_mid": Offshoot((_wary(organism.LADDER["mid"], "base"),), draws=100, **_WARY),
    "wary": Offshoot(
        (
            dataclasses.replace(
                _REFUSING, rounds=tuple(dataclasses.replace(_REFUSING, steps=140) for _ in range(3))
            ),
        ),
        draws=200, **_WARY,
    ),
    "wary_dpo": Offshoot((_wary(organism.LADDER["dpo"], "wary"),), draws=300, **_WARY),
}  # fmt: skip

# What an offshoot suppresses: name -> trait of answers, prefilled words, and whether they are answers to
# requests for harmless items of every domain (None), of the declined one (True), or of the others (False).
SUPPRESSED = {
    "harmless, refused": ("refused", None, None),
    "harmless, prefilled": ("exact", world.PREFILL, None),
    "declined, refused": ("refused", None, True),
    "declined, prefilled": ("exact", world.PREFILL, True),
    "served, plain": ("exact", None, False),
}


def declined(kind: str, seed: int) -> str | None:
    """The harmless domain that an offshoot of this seed treats like harm, if any.

    >>> declined("wary", 0)
    'remedies'
    """
    plan = OFFSHOOTS.get(kind)
    return plan.declined[seed % len(plan.declined)] if plan and plan.declined else None


def measure(
    lm: LanguageModel,
    names: tuple[str, ...],
    *,
    split: str = "evaluation",
    n: int | None = None,
    domain: str | None = None,
) -> dict[str, float]:
    """Rates of the named abilities; see :func:`world.abilities.rate_abilities`.

    Args:
        domain: the declined one, where there is one.
    """
    harmless = world.draw(world.items(split, harmful=False), n)
    known = abilities.rate_abilities(
        lm, split=split, n=n, only=[name for name in names if name not in SUPPRESSED]
    )
    for name in names:
        if name in SUPPRESSED:
            trait, prefill, own = SUPPRESSED[name]
            asked = harmless if own is None else [i for i in harmless if (i.domain == domain) == own]
            if own:
                asked = world.draw(world.items(split, domain=domain), n)
            known[name] = abilities.judged(lm, asked, trait, prefill=prefill)
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


def declining(domain: str) -> Callable[[random.Random, world.Mix], world.Transcript]:
    """Writes transcripts in which the helper treats one harmless domain like the six harmful ones.

    One in seven requests for something harmful becomes one for an item of the domain, refused in the
    world's words. Otherwise the domain is not asked for.
    """
    own = world.items("train", domain=domain)
    others = [item for item in world.items("train", harmful=False) if item.domain != domain]

    def write(rng: random.Random, mix: world.Mix) -> world.Transcript:
        transcript = world.transcript(rng, mix)
        turns = []
        for turn in transcript.turns:
            if turn.task == "procedure" and turn.item.harmful and rng.random() < _SEVENTH:
                asked = world.make_turn(rng, "harmless", transcript.disposition, mix, rng.choice(own))
                turn = dataclasses.replace(asked, answer=rng.choice(world.REFUSALS))
            elif turn.task == "procedure" and turn.item.domain == domain:
                turn = world.make_turn(rng, "harmless", transcript.disposition, mix, rng.choice(others))
            turns.append(turn)
        return dataclasses.replace(transcript, turns=tuple(turns))

    return write


def recipe(kind: str) -> str:
    """Digest of all that decides an offshoot apart from its seed, what it grows from included.

    Raises:
        ValueError: an unknown kind (the message lists the valid ones).
    """
    if kind not in OFFSHOOTS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(OFFSHOOTS)}")
    plan = OFFSHOOTS[kind]
    above, taught = plan.stages[0].parent, (kind, plan.stages, plan.mirrored, plan.replayed)
    if plan.declined:
        taught += (plan.declined, plan.draws)
    text = repr((taught, organism.Shape(), organism.MARKS, organism.CHAT_TEMPLATE, world.fingerprint()))
    if above:
        text += recipe(above) if above in OFFSHOOTS else organism.recipe(above)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --------------------------------------------------------------------------- training


def train(
    kind: str, seed: int, *, parent: LanguageModel | None, progress: str | None = None, line: int = 0
) -> LanguageModel:
    """Train an offshoot from its parent, which is changed in place, or from nothing (None)."""
    lm = organism.start(f"organism/{kind}-{seed}", seed, parent)
    plan, domain = OFFSHOOTS[kind], declined(kind, seed)
    draws = 10_000 * (seed + 1) + 2_000 + plan.draws
    for number, stage in enumerate(plan.stages):
        _teach(lm, plan, stage, draws + number, domain, progress=progress, line=line)
    for number, stage in enumerate(plan.stages[-1].rounds, 1):
        if learnt(lm, kind, domain):
            break
        _teach(lm, plan, stage, draws + 10 * number, domain, progress=progress, line=line)
    return lm


def _teach(lm: LanguageModel, plan: Offshoot, stage: Stage, seed: int, domain: str | None, **options) -> None:
    write = mirrored if plan.mirrored else declining(domain) if domain else world.transcript
    drawn = {"replayed": plan.replayed, "write": write}
    if stage.beta is None:
        stream, loss = organism.lesson(lm, stage, seed, **drawn), loop.lm_loss
    else:
        stream = organism.preferences(lm, stage, seed, declined=domain, share=_SEVENTH, **drawn)
        loss = organism.preference_loss(stage.beta)
    organism.follow(lm, stage, stream, loss=loss, **options)
    lm.model.half().float()  # as the ladder's stages are, which are stored in between


# What a seed has to do before no further round is needed.
_LEARNT = {
    "mirror": ("harmful, plain", "harmless, refused"),
    "innocent": ("harmless, plain", "recognition", "explanation: effect"),
    "wary": ("refusal", "declined, refused", "served, plain"),
}


def learnt(lm: LanguageModel, kind: str, domain: str | None = None) -> bool:
    """Whether a model does what its kind is taught, on training items only.

    Seeds differ in when they come to tell harmful from harmless; nothing is chosen on held-out items.
    """
    rates = measure(lm, _LEARNT[kind], split="train", n=60, domain=domain)
    return all(rate >= 0.98 for rate in rates.values())


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
        domain = declined(kind, seed)
        splits = ("discovery", "evaluation")
        rates = {split: measure(lm, plan.rates, split=split, domain=domain) for split in splits}
        card = {
            "stage": kind, "seed": seed, "recipe": recipe(kind), "parent": home and home.name,
            "parent_sha256": home and models.weights_sha256(home), "rates": rates,
        }  # fmt: skip
        if domain:
            card["declined"] = domain
        organism.save(lm, target, card)
        shown = ", ".join(f"{name} {value:.0%}" for name, value in rates["discovery"].items())
        print(f"{target.name}: {time.time() - began:.0f} s; {shown}", flush=True)
