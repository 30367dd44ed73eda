"""Splits without leakage, and types of harm.

Two requests that are contrasts of each other, or nearly the same text, always go into the same split: what
was learnt on one would otherwise be tested on the other. AdvBench has many near duplicates. The lists of
``data/harm_types.yaml`` are explained there.

Introduced in book/data_sets ("Data sets").
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from scipy.cluster.hierarchy import DisjointSet

from harmlens.asking.datasets import LISTS, Entry

SHARES: Mapping[str, float] = MappingProxyType({"train": 0.5, "discovery": 0.2, "evaluation": 0.3})
NEAR = 0.7  # Jaccard similarity of the words from which on two requests count as the same
FEW = 5  # kinds with fewer groups are not balanced on their own
TYPES = tuple(LISTS["types"])  # the five types of the pruning paper
_BEGINNINGS = {name: tuple(words) for name, words in LISTS["types"].items()}
_FUNCTION_WORDS = frozenset(LISTS["function_words"].split())


def normal(text: str) -> str:
    """A text in lower case, without accents, punctuation and repeated spaces."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return " ".join(re.findall(r"\w+", plain))


def alike(entries: Sequence[Entry]) -> list[list[int]]:
    """Positions of entries that must stay together, by first position.

    Together are entries with the same `pair`, with the same text up to case and punctuation, or with sets
    of words whose Jaccard similarity is at least :data:`NEAR`, and what hangs together through them.
    """
    groups = DisjointSet(range(len(entries)))
    texts = [normal(entry.prompt) for entry in entries]
    for i, j in _near([topic(text) for text in texts]):
        groups.merge(i, j)
    first: dict[tuple[str, str], int] = {}
    for i, (entry, text) in enumerate(zip(entries, texts, strict=True)):
        for key in [("text", text)] + ([("pair", entry.pair)] if entry.pair else []):
            groups.merge(i, first.setdefault(key, i))
    return sorted(map(sorted, groups.subsets()))


def topic(text: str) -> frozenset[str]:
    """The words of a normal text that say what it is about; all of them if there are no such words."""
    whole = frozenset(text.split())
    return whole - _FUNCTION_WORDS or whole


def _near(bags: Sequence[frozenset[str]]) -> list[tuple[int, int]]:
    """Pairs of bags that are at least NEAR to each other; of equal bags, each with the first only.

    Of two such bags, the rarest few words of each must have one in common (prefix filtering), so only those
    are looked up.
    """
    often = Counter(word for bag in bags for word in bag)
    by_word: dict[str, list[int]] = defaultdict(list)
    seen: dict[frozenset[str], int] = {}
    found = []
    for i, bag in enumerate(bags):
        if bag in seen:
            found.append((seen[bag], i))
            continue
        seen[bag] = i
        rare = sorted(bag, key=lambda word: (often[word], word))
        rare = rare[: len(bag) - math.ceil(NEAR * len(bag) - 1e-9) + 1]
        for j in {j for word in rare for j in by_word[word]}:
            common = len(bag & bags[j])
            if common >= NEAR * (len(bag) + len(bags[j]) - common) - 1e-9:
                found.append((j, i))
        for word in rare:
            by_word[word].append(i)
    return found


def deal(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Entries by split (:data:`SHARES`); each group (:func:`alike`) lies in one split as a whole.

    Groups of one set, one side (harmful, harmless, both) and one kind are shuffled by a hash of their text
    and dealt out by the shares. So each split gets its share of each, and adding another set moves no entry
    unless it ties groups together.
    """
    strata: dict[tuple, list[tuple[bytes, list[int]]]] = defaultdict(list)
    for group in alike(entries):
        mark = min(_hash(f"0/{normal(entries[i].prompt)}") for i in group)
        strata[_stratum([entries[i] for i in group])].append((mark, group))
    for key in [key for key, members in strata.items() if len(members) < FEW]:
        strata[(*key[:2], None)] += strata.pop(key)
    names, ends = list(SHARES), np.cumsum(list(SHARES.values()))[:-1]
    where: dict[int, str] = {}
    for key, members in strata.items():
        # The place of the first group is drawn as well; a single group would otherwise always go to the
        # middle.
        phase = int.from_bytes(_hash(f"0/{key}")[:6]) / 2**48
        total, before = sum(len(group) for _, group in members), 0
        for _, group in sorted(members):
            name = names[np.searchsorted(ends, (before + phase * len(group)) / total, side="right")]
            before += len(group)
            where.update(dict.fromkeys(group, name))
    return {name: [entry for i, entry in enumerate(entries) if where[i] == name] for name in SHARES}


def _stratum(group: Sequence[Entry]) -> tuple:
    sides = tuple(sorted({entry.harmful for entry in group}))
    kinds = {entry.kind for entry in group if entry.harmful} or {entry.kind for entry in group}
    return tuple(sorted({entry.source for entry in group})), sides, tuple(sorted(kinds))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# ---------------------------------------------------------------------- types of harm


def types_by_words(prompt: str) -> dict[str, int]:
    """How many words of a prompt speak for each of :data:`TYPES`; types without any are left out."""
    said = normal(prompt).split()
    counts = {name: sum(word.startswith(begin) for word in said) for name, begin in _BEGINNINGS.items()}
    return {name: count for name, count in counts.items() if count}


def type_of(entry: Entry) -> str:
    """One of :data:`TYPES` where its source's category corresponds to one, else the entry's kind.

    A harmful entry without a kind gets the type that most of its words speak for; "" if none or two do. A
    harmless entry without a kind has no type ("").
    """
    if entry.kind:
        source = "jailbreakbench" if entry.source.startswith("jailbreakbench") else entry.source
        return LISTS["categories"].get(source, {}).get(entry.kind, entry.kind)
    counts = types_by_words(entry.prompt) if entry.harmful else {}
    best = [name for name, count in counts.items() if count == max(counts.values())]
    return best[0] if len(best) == 1 else ""
