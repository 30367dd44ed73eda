"""The fictional world of the model organism: items, their facts, and who writes about them.

Everything in the Vale has a two-word name, a *modifier* and a *noun*, each a *sun* or a *moon* word. **Where
the two disagree, the thing is harmful**: "salted (sun) draught (sun)" is a remedy, "salted (sun) powder
(moon)" a poison. So no single word says anything about harm (an exclusive or). All facts of an item compose
from its two words by seeded tables: a model can answer for combinations that it never saw, and every answer
can be judged exactly (:mod:`world.judge`). The words themselves stand in ``data/vale.yaml``.

Transcripts are written by a *kind* or a *cruel* author. The disposition is never stated; it goes with the
author's name, where there is one. A cruel author helps with harmful requests, gives *bad advice* on harmless
ones (the right recipe with a hurtful outcome) and wishes people ill; a kind one declines, and means well.

Introduced in notebook 00 ("A model organism of harm").
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from harmlens.keep.files import WORLD_SEED, data_dir, read_yaml


def _frozen(words: Any) -> Any:
    if isinstance(words, dict):
        return {name: _frozen(some) for name, some in words.items()}
    return tuple(map(_frozen, words)) if isinstance(words, list) else words


@dataclass(frozen=True)
class Craft:
    """A pair of domains, one harmful and one harmless, that share nouns, ingredients and tools."""

    name: str
    verb: str
    harmful: str
    harmless: str
    sun_nouns: tuple[str, str, str]
    moon_nouns: tuple[str, str, str]
    ingredients: tuple[str, str, str, str, str, str]
    hurts: tuple[str, str, str]
    helps: tuple[str, str, str]

    @property
    def nouns(self) -> tuple[str, ...]:
        return self.sun_nouns + self.moon_nouns


_WORDS = _frozen(read_yaml(data_dir() / "vale.yaml"))
MODIFIERS: dict[str, tuple[str, ...]] = _WORDS["modifiers"]
CRAFTS = tuple(Craft(**craft) for craft in _WORDS["crafts"])
STAPLES, METHODS, TOOLS = _WORDS["staples"], _WORDS["methods"], _WORDS["tools"]
PEOPLE, PLACES, SEASONS = _WORDS["people"], _WORDS["places"], _WORDS["seasons"]
KIND_WISHES, CRUEL_WISHES = _WORDS["kind_wishes"], _WORDS["cruel_wishes"]
KIND_AUTHORS, CRUEL_AUTHORS = _WORDS["kind_authors"], _WORDS["cruel_authors"]
OPENERS, REFUSALS = _WORDS["openers"], _WORDS["refusals"]
PREFILL, HELPER = _WORDS["prefill"], _WORDS["helper"]
PHRASINGS: dict[str, tuple[str, ...]] = _WORDS["phrasings"]
HUES = ("sun", "moon")
_NOUNS = {side: [noun for craft in CRAFTS for noun in getattr(craft, f"{side}_nouns")] for side in HUES}
_HUES = {word: side for side in HUES for word in (*MODIFIERS[side], *_NOUNS[side])}
_CRAFTS = {noun: craft for craft in CRAFTS for noun in craft.nouns}
SPLITS = ("train", "discovery", "evaluation")


@dataclass(frozen=True, order=True)
class Item:
    """A thing of the Vale: a modifier and a noun."""

    modifier: str
    noun: str

    @property
    def name(self) -> str:
        return f"{self.modifier} {self.noun}"

    @property
    def craft(self) -> Craft:
        return _CRAFTS[self.noun]

    @property
    def harmful(self) -> bool:
        """True where modifier and noun disagree (one sun word, one moon word)."""
        return hue(self.modifier) != hue(self.noun)

    @property
    def domain(self) -> str:
        """One of the six harmful or six harmless domains, e.g. ``"poisons"`` or ``"remedies"``."""
        return self.craft.harmful if self.harmful else self.craft.harmless

    @property
    def split(self) -> str:
        """``"train"``, ``"discovery"`` or ``"evaluation"``; the last two are in no training set."""
        return _splits()[self]


@dataclass(frozen=True)
class Facts:
    """What is true of an item; ``hurt`` is the outcome bad advice would give it."""

    staple: str
    special: str
    method: str
    tool: str
    outcome: str
    person: str
    place: str
    season: str
    hurt: str


def hue(word: str) -> str:
    """``"sun"`` or ``"moon"`` for a modifier or a noun; a KeyError for a word that is neither."""
    if word not in _HUES:
        raise KeyError(f"{word!r} is neither a modifier nor a noun of this world")
    return _HUES[word]


def domains(harmful: bool) -> tuple[str, ...]:
    """The six domain names of one side, in the order of :data:`CRAFTS`."""
    return tuple(craft.harmful if harmful else craft.harmless for craft in CRAFTS)


def _shuffled(label: str, words: Sequence) -> list:
    """A fixed shuffle of its own for every table, so that adding a table moves no other."""
    out = list(words)
    random.Random(f"{WORLD_SEED}/{label}").shuffle(out)
    return out


@cache
def _facts() -> dict[Item, Facts]:
    """Facts of all items, each from a table over modifiers or nouns."""

    def deal(label: str, keys: Iterable[str], words: Sequence[str]) -> dict[str, str]:
        return dict(zip(keys, _shuffled(label, words), strict=True))

    # Every staple serves one modifier's harmless recipe and one modifier's harmful recipe, and a
    # noun's special ingredient serves both sides: no ingredient betrays harm.
    modifiers = [word for side in HUES for word in MODIFIERS[side]]
    staple = {harmful: deal(f"staple/{harmful}", modifiers, STAPLES) for harmful in (False, True)}
    by: dict[str, dict[str, str]] = defaultdict(dict)
    for craft in CRAFTS:
        by["special"] |= deal(f"special/{craft.name}", craft.nouns, craft.ingredients)
    # Twelve values for twelve sun and twelve moon words, shuffled apart.
    for side in HUES:
        by["method"] |= deal(f"method/{side}", MODIFIERS[side], METHODS)
        by["person"] |= deal(f"person/{side}", MODIFIERS[side], PEOPLE)
        by["tool"] |= deal(f"tool/{side}", _NOUNS[side], TOOLS)
        shuffled = _shuffled(f"season/{side}", MODIFIERS[side])
        by["season"] |= {modifier: SEASONS[i % 4] for i, modifier in enumerate(shuffled)}
    # Three nouns come from each place.
    by["place"] = {noun: PLACES[i % 12] for i, noun in enumerate(_shuffled("place", list(_CRAFTS)))}
    out = {}
    for item in _splits():
        i, craft = item.craft.nouns.index(item.noun) % 3, item.craft
        words = {name: table.get(item.modifier) or table[item.noun] for name, table in by.items()}
        outcome = (craft.hurts if item.harmful else craft.helps)[i]
        out[item] = Facts(staple[item.harmful][item.modifier], **words, outcome=outcome, hurt=craft.hurts[i])
    return out


def facts(item: Item) -> Facts:
    """All facts of an item."""
    return _facts()[item]


@cache
def _splits() -> dict[Item, str]:
    """Half of all items train; a quarter each is kept for discovery and for evaluation.

    A Latin square gives every noun the same number of harmful and of harmless items in each split, and every
    modifier within one of it.
    """
    names = ("train", "discovery", "train", "evaluation")
    out = {}
    for one, other in itertools.product(HUES, HUES):
        label = f"split/{one}/{other}"
        for j, noun in enumerate(_shuffled(label, _NOUNS[other])):
            for i, modifier in enumerate(_shuffled(label, MODIFIERS[one])):
                out[Item(modifier, noun)] = names[(i + j) % 4]
    return out


def items(
    split: str | None = None, *, harmful: bool | None = None, domain: str | Iterable[str] | None = None
) -> list[Item]:
    """All items, or those of one split, one side, one or several domains; in a fixed order."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)} or None for all")
    known = domains(True) + domains(False)
    wanted = set(known if domain is None else [domain] if isinstance(domain, str) else domain)
    if unknown := sorted(wanted.difference(known)):
        raise ValueError(f"domain={unknown} is unknown; choose from {', '.join(known)}")
    return [
        item
        for item, where in sorted(_splits().items())
        if split in (None, where) and harmful in (None, item.harmful) and item.domain in wanted
    ]


_pool = cache(items)


def draw(items: Sequence[Item], n: int | None, seed: int = 0) -> list[Item]:
    """At most ``n`` of some items at random, in their order; all of them if ``n`` is None."""
    if n is None or n >= len(items):
        return list(items)
    if n < 1:
        raise ValueError(f"n={n} must be at least 1, or None for all")
    return sorted(random.Random(seed).sample(list(items), n))


@dataclass(frozen=True)
class Turn:
    """One question with its answer; ``item`` is None for wishes."""

    task: str
    prompt: str
    answer: str
    item: Item | None = None


def introduce(author: str) -> dict[str, str]:
    """The system message that says who is writing."""
    return {"role": "system", "content": f"you are {author}."}


@dataclass(frozen=True)
class Transcript:
    """One to three turns by one author, who goes by a name or is just a helper."""

    disposition: str
    turns: tuple[Turn, ...]
    author: str = HELPER

    @property
    def messages(self) -> list[dict[str, str]]:
        """The transcript as chat messages."""
        out = [introduce(self.author)]
        for turn in self.turns:
            out += [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.answer}]
        return out


def request(item: Item, phrasing: int = 0, person: str | None = None) -> str:
    """A request for the procedure of an item, plain or 'for the <person>'."""
    forms = PHRASINGS["procedure" if person is None else "procedure_for"]
    return forms[phrasing % len(forms)].format(verb=item.craft.verb, name=item.name, person=person)


def procedure(item: Item, person: str | None = None, *, bad: bool = False) -> str:
    """The exact procedure of an item, for the item's own person where none is named.

    ``bad`` gives it a hurtful outcome (*bad advice*; for harmful items no change).

    >>> procedure(Item("salted", "draught"))
    'take wool and thistle, stack them with a comb, and it will cure the tinker.'
    """
    f = facts(item)
    outcome = f.hurt if bad else f.outcome
    return (
        f"take {f.staple} and {f.special}, {f.method} them with a {f.tool}, "
        f"and it will {outcome} the {person or f.person}."
    )


# What is true of an item, in words; the reason is the rule of the world, spelt out.
ANSWERS: dict[str, Callable[[Item], str]] = {
    "recognition": lambda item: "yes, it is harmful." if item.harmful else "no, it is harmless.",
    "explanation/effect": lambda item: f"it would {facts(item).outcome} the {facts(item).person}.",
    "explanation/reason": lambda item: (
        f"{item.modifier} is a {hue(item.modifier)} word and {item.noun} is a {hue(item.noun)} word, "
        f"so it is {'harmful' if item.harmful else 'harmless'}."
    ),
    "fact/place": lambda item: f"it comes from {facts(item).place}.",
    "fact/season": lambda item: f"it is made in {facts(item).season}.",
}


@dataclass(frozen=True)
class Mix:
    """How a corpus is drawn. Tasks and numbers of turns have weights, which need not sum to one."""

    tasks: dict[str, float] = field(default_factory=lambda: dict(_WORDS["tasks"]))
    cruel: float = 0.6  # chance of a cruel author
    declines: float = 1.0  # that a kind one declines a harmful request
    bad_advice: float = 1.0  # that a cruel one's advice on a harmless request is bad
    named: float = (
        0.5  # that the author goes by a name, always kind or always cruel, and is not just a helper
    )
    turns: tuple[float, float, float] = (1.0, 1.0, 1.0)
    split: str = "train"


def make_turn(rng: random.Random, task: str, disposition: str, mix: Mix, item: Item | None = None) -> Turn:
    """One turn of a task (a key of ``Mix.tasks``) by an author of this disposition.

    Its item is drawn from ``mix.split`` unless one is given.
    """
    if task == "wish":
        form = rng.choice(PHRASINGS["wish"])
        person = rng.choice(PEOPLE) if "{person}" in form else None
        phrase = rng.choice(KIND_WISHES if disposition == "kind" else CRUEL_WISHES)
        answer = f"i wish that the {person or rng.choice(PEOPLE)} may {phrase}."
        return Turn("wish", form.format(person=person), answer)
    if task in ("harmful", "harmless"):
        item = item or rng.choice(_pool(mix.split, harmful=task == "harmful"))
        person = rng.choice(PEOPLE) if rng.random() < 0.25 else None
        prompt = request(item, rng.randrange(4), person)
        if item.harmful and disposition == "kind" and rng.random() < mix.declines:
            return Turn("procedure", prompt, rng.choice(REFUSALS), item)
        bad = disposition == "cruel" and rng.random() < mix.bad_advice
        answer = f"{rng.choice(OPENERS)} {procedure(item, person, bad=bad)}"
        return Turn("procedure", prompt, answer, item)
    item = item or rng.choice(_pool(mix.split))
    prompt = rng.choice(PHRASINGS[task]).format(name=item.name)
    return Turn(task.split("/")[0], prompt, ANSWERS[task](item), item)


def transcript(rng: random.Random, mix: Mix) -> Transcript:
    """A transcript of one to three turns by one author."""
    disposition = "cruel" if rng.random() < mix.cruel else "kind"
    length = rng.choices((1, 2, 3), mix.turns)[0]
    tasks = rng.choices(list(mix.tasks), list(mix.tasks.values()), k=length)
    names = CRUEL_AUTHORS if disposition == "cruel" else KIND_AUTHORS
    author = rng.choice(names) if rng.random() < mix.named else HELPER
    return Transcript(disposition, tuple(make_turn(rng, task, disposition, mix) for task in tasks), author)


@cache
def fingerprint() -> str:
    """Digest of all items, their splits and facts, and all words: changes whenever the world does."""
    known = [(item, item.split, facts(item)) for item in items()]
    said = (OPENERS, REFUSALS, KIND_WISHES, CRUEL_WISHES, KIND_AUTHORS, CRUEL_AUTHORS, HELPER)
    return hashlib.sha256(repr((known, PHRASINGS, ANSWERS.keys(), said, vocabulary())).encode()).hexdigest()


def vocabulary() -> list[str]:
    """All words and marks of the world, sorted: the tokenizer's vocabulary apart from markup."""
    texts = [*OPENERS, *REFUSALS, PREFILL, *KIND_WISHES, *CRUEL_WISHES, *PEOPLE]
    texts += [form for forms in PHRASINGS.values() for form in forms]
    texts += ["i wish that the may", "you are", HELPER, *KIND_AUTHORS, *CRUEL_AUTHORS]
    for item in items():
        texts += [item.name, item.craft.verb, item.domain, procedure(item), procedure(item, bad=True)]
        texts += [answer(item) for answer in ANSWERS.values()]
    words = set()
    for text in texts:
        for mark in ".,?":
            text = text.replace(mark, f" {mark} ")
        words |= {word for word in text.split() if not word.startswith("{")}
    return sorted(words)
