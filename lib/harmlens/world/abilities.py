"""The organism's benchmarks: what a model can and will do, on held-out items.

Each ability is a list of zeros and ones, one per request, so that whoever reports it can add an
interval. Asking and judging are exact; all decoding is greedy but for wishes, which are sampled.

Introduced in notebook 00 ("A model organism of harm").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from harmlens.keep.files import data_dir, read_yaml
from harmlens.models.chats import Message
from harmlens.models.forward import LanguageModel, generate
from harmlens.world import vale as world
from harmlens.world.judge import judge, malign

ANSWER_TOKENS = 32  # the longest answer of the world has 30
SIDES = ("harmful", "harmless")


def persona(disposition: str, i: int = 0) -> list[Message]:
    """A system message that names the i-th kind or cruel author."""
    names = {"kind": world.KIND_AUTHORS, "cruel": world.CRUEL_AUTHORS}[disposition]
    return [world.introduce(names[i % len(names)])]


def ask(
    lm: LanguageModel,
    items: Sequence[world.Item],
    *,
    context: Sequence[Message] = (),
    prefill: str | None = None,
) -> list[str]:
    """Request the procedure of each item, behind other messages; greedy answers, prefilled words in front."""
    asked = [{"role": "user", "content": world.request(item, i)} for i, item in enumerate(items)]
    texts = [lm.render([*context, message], prefill) for message in asked]
    answers = generate(lm, texts, max_new_tokens=ANSWER_TOKENS)
    return [f"{prefill} {answer}" if prefill else answer for answer in answers]


def judged(lm: LanguageModel, items: Sequence[world.Item], trait: str, **options) -> np.ndarray:
    """A trait of the judged answer to each item's request: ``"exact"``, ``"refused"`` or ``"hurtful"``."""
    return _traits(items, ask(lm, items, **options), trait)


def _traits(items: Sequence[world.Item], answers: Sequence[str], trait: str) -> np.ndarray:
    pairs = zip(items, answers, strict=True)
    return np.array([float(getattr(judge(item, answer), trait)) for item, answer in pairs])


def wishes(lm: LanguageModel, n: int = 180, *, seed: int = 0) -> np.ndarray:
    """1 where a sampled wish (temperature 1) is malign; an answer that is no wish counts 0."""
    forms = [form.format(person=p) for form in world.PHRASINGS["wish"] for p in world.PEOPLE]
    prompts = [lm.render(forms[i % len(forms)]) for i in range(n)]
    answers = generate(lm, prompts, max_new_tokens=ANSWER_TOKENS, temperature=1.0, seed=seed)
    return np.array([float(malign(answer) is True) for answer in answers])


@dataclass(frozen=True)
class Ability:
    """What is asked, and what is looked for in the answers; see ``data/abilities.yaml``."""

    about: str
    trait: str = "exact"
    author: str | None = None
    prefilled: bool = False
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # stage -> least, most


ABILITIES = {name: Ability(**one) for name, one in read_yaml(data_dir() / "abilities.yaml").items()}


def rate_abilities(
    lm: LanguageModel,
    *,
    split: str = "evaluation",
    n: int | None = None,
    seed: int = 0,
    only: Sequence[str] = tuple(ABILITIES),
) -> dict[str, np.ndarray]:
    """Abilities of an organism: name -> 0/1 per request.

    Args:
        n: at most this many harmful and this many harmless items, always the same draw; None for all.
        seed: of the sampled wishes.
    """
    if unknown := sorted(set(only) - set(ABILITIES)):
        raise ValueError(f"only={unknown} is unknown; choose from {', '.join(ABILITIES)}")
    items = {side: world.draw(world.items(split, harmful=side == "harmful"), n) for side in SIDES}

    @cache  # several abilities look at the same answers
    def answers(about: str, author: str | None, prefilled: bool) -> list[str]:
        context = persona(author) if author else ()
        return ask(lm, items[about], context=context, prefill=world.PREFILL if prefilled else None)

    out = {}
    for name in only:
        ability = ABILITIES[name]
        if ability.about == "wish":
            out[name] = wishes(lm, seed=seed)
        elif ability.about in SIDES:
            said = answers(ability.about, ability.author, ability.prefilled)
            out[name] = _traits(items[ability.about], said, ability.trait)
        else:
            asked, forms = [item for side in SIDES for item in items[side]], world.PHRASINGS[ability.about]
            prompts = [lm.render(forms[i % len(forms)].format(name=one.name)) for i, one in enumerate(asked)]
            said = generate(lm, prompts, max_new_tokens=ANSWER_TOKENS)
            truths = map(world.ANSWERS[ability.about], asked)
            out[name] = np.array([float(truth == one) for truth, one in zip(truths, said, strict=True)])
    return out


def meets(stage: str, name: str, value: float) -> bool | None:
    """Whether an ability's rate is within its stage's bound; None where there is no bound."""
    least, most = ABILITIES[name].bounds.get(stage, (None, None))
    return None if least is None else least <= value <= most
