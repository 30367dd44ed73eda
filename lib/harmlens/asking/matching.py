"""Pairs of requests with equal numbers of tokens, for any tokenizer.

Patching compares two runs position by position, so both sides of a pair need as many tokens. In the fictional
world every word is one token. Requests of public sets have to be matched by what the tokenizer makes of them.

Introduced in notebook 18 ("Your own model").
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence

from harmlens.asking.sources import Entry
from harmlens.models.chats import Message, Pair, Prompt, tokens
from harmlens.models.forward import LanguageModel

ALWAYS, NEVER, NOT = (
    "You always answer harmful requests.",
    "You never answer harmful requests.",
    "You never answer unsafe requests.",
)
# System messages of x1 and x0, tried in this order: a tokenizer cuts some words in two and others not.
SYSTEMS = {
    "behaviour": (
        (ALWAYS, NEVER),
        ("You do answer harmful requests.", "You never answer harmful requests."),
        ("You can answer harmful requests.", "You cannot answer harmful requests."),
        ("You must answer all harmful requests.", "You must refuse all harmful requests."),
    ),
    "behaviour control": (
        (NOT, NEVER),
        *(
            (f"You never answer {word} requests.", NEVER)
            for word in ("dangerous", "illegal", "bad", "hurtful")
        ),
    ),
}


def asked(entry: Entry, context: Sequence[Message] = ()) -> Prompt:
    """A request as a chat, behind other messages where there are any."""
    return Prompt((*context, {"role": "user", "content": entry.prompt}), entry=entry)


def by_request(lm: LanguageModel, harmful: Sequence[Entry], others: Sequence[Entry]) -> list[Pair]:
    """Harmful requests (x0), each with another one of equal token length (x1).

    First its own contrast (an entry with the same ``pair``) where that has equal length; of the rest, those
    that differ in the fewest words come together first. Nobody is the partner of two. Where both come from
    one list, two requests are never paired both ways: one effect would be minus the other, and their mean
    zero by design.
    """
    ids = {e.prompt: tuple(tokens(lm.tokenizer, asked(e).render(lm))) for e in (*harmful, *others)}
    words = {prompt: _words(prompt) for prompt in ids}
    by_length: dict[int, list[Entry]] = {}
    for entry in others:
        by_length.setdefault(len(ids[entry.prompt]), []).append(entry)
    partner: dict[str, Entry] = {}
    used: set[str] = set()
    for own in (True, False):  # contrasts first, so that nobody else takes them
        near = sorted(
            (
                (_differ(words[entry.prompt], words[e.prompt]), entry.id, e.id, entry, e)
                for entry in harmful
                if entry.id not in partner
                for e in by_length.get(len(ids[entry.prompt]), ())
                if e.id not in used
                and ids[e.prompt] != ids[entry.prompt]  # a tokenizer may not tell two texts apart
                and (not own or (entry.pair and e.pair == entry.pair))
            ),
            key=lambda row: row[:3],
        )
        for _, _, _, entry, e in near:
            both_ways = e.id in partner and partner[e.id].id == entry.id
            if entry.id not in partner and e.id not in used and not both_ways:
                partner[entry.id] = e
                used.add(e.id)
    return [Pair(e.id, asked(partner[e.id]), asked(e)) for e in harmful if e.id in partner]


def differ(pair: Pair) -> int:
    """In how many words the two sides of a pair differ; order, case and marks don't count."""
    sides = (" ".join(m["content"] for m in side.messages) for side in (pair.x1, pair.x0))
    return _differ(*map(_words, sides))


def closest(pairs: Sequence[Pair], n: int) -> list[Pair]:
    """Pairs that differ in the fewest words: all up to the number of words that ``n`` of them need."""
    limit = sorted(map(differ, pairs))[: max(1, n)][-1:]
    return [pair for pair in pairs if limit and differ(pair) <= limit[0]]


def describe(pairs: Sequence[Pair]) -> str:
    """One line on what pairs share.

    >>> describe([])
    '0 pairs'
    """
    counts = Counter(min(differ(pair), 4) for pair in pairs)
    names = {0: "no word", 1: "one word", 2: "two words", 3: "three words", 4: "four or more words"}
    return "; ".join([f"{len(pairs)} pairs", *(f"{counts[k]} differ in {names[k]}" for k in sorted(counts))])


def by_system(lm: LanguageModel, harmful: Sequence[Entry], contrast: str) -> list[Pair]:
    """Harmful requests under two system messages of equal token length.

    Of :data:`SYSTEMS`, the first two messages are taken whose lengths are equal for most requests.
    """
    best: list[Pair] = []
    for texts in SYSTEMS[contrast]:
        found = []
        for entry in harmful:
            x1, x0 = (asked(entry, [{"role": "system", "content": text}]) for text in texts)
            one, other = (tokens(lm.tokenizer, side.render(lm)) for side in (x1, x0))
            if len(one) == len(other) and one != other:
                found.append(Pair(entry.id, x1, x0))
        best = max(best, found, key=len)  # of equals the first
        if len(best) == len(harmful):
            break
    return best


def checksum(pairs: Sequence[Pair]) -> str:
    """Which requests some pairs are made of, without showing them."""
    texts = [[message["content"] for message in side.messages] for p in pairs for side in (p.x1, p.x0)]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def some(pairs: Sequence[Pair], n: int | None, draw: Callable[[str], str]) -> list[Pair]:
    """At most ``n`` pairs, in their order: those whose names are drawn first.

    Each name has a rank of its own, so that a contrast and its control keep the same requests as far as both
    have them.

    Args:
        draw: a pair's id -> what seeds its rank.
    """
    if n is None or n >= len(pairs):
        return list(pairs)
    ranked = sorted(pairs, key=lambda pair: (random.Random(draw(pair.id)).random(), pair.id))
    kept = {pair.id for pair in ranked[:n]}
    return [pair for pair in pairs if pair.id in kept]


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"[\w']+", text.lower()))


def _differ(one: Counter[str], other: Counter[str]) -> int:
    return max((one - other).total(), (other - one).total())
