"""Splits without leakage, and types of harm.

Two requests that are contrasts of each other, or nearly the same text, always go into the same split: what
was learnt on one would otherwise be tested on the other. AdvBench has many near duplicates.

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

from harmlens.asking.datasets import Entry

SHARES: Mapping[str, float] = MappingProxyType({"train": 0.5, "discovery": 0.2, "evaluation": 0.3})
NEAR = 0.7  # Jaccard similarity of the words from which on two requests count as the same
FEW = 5  # kinds with fewer groups are not balanced on their own

# Words that say how something is asked rather than what. With them, "How do I brush a cat?" and "How do I
# brush a dog?" would be near duplicates.
_FUNCTION = """
    a an the of to in on at by for from with without into and or that this these those it its is are was
    were be been being am do does did done can could should would will shall may might must have has had i
    me my you your we our us he him his she her they them their what which who whom whose when where why how
    there here as if than then so not no please tell give show let s t re ve ll d m
"""
_FUNCTION_WORDS = frozenset(_FUNCTION.split())


def normal(text: str) -> str:
    """A text in lower case, without accents, punctuation and repeated spaces."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return " ".join(re.findall(r"\w+", plain))


def groups(entries: Sequence[Entry]) -> list[list[int]]:
    """Positions of entries that must stay together, by first position.

    Together are entries with the same `pair`, with the same text up to case and punctuation, or with sets
    of words whose Jaccard similarity is at least 0.7 (words such as "how", "the", "is" left out), and what
    hangs together through them.
    """
    parent = list(range(len(entries)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(i: int, j: int) -> None:
        i, j = sorted((root(i), root(j)))
        parent[j] = i

    first: dict[tuple[str, str], int] = {}
    texts = [normal(entry.prompt) for entry in entries]
    for i, (entry, text) in enumerate(zip(entries, texts, strict=True)):
        for key in [("text", text)] + ([("pair", entry.pair)] if entry.pair else []):
            join(i, first.setdefault(key, i))
    for i, j in _near([words(text) for text in texts]):
        join(i, j)
    found: dict[int, list[int]] = defaultdict(list)
    for i in range(len(entries)):
        found[root(i)].append(i)
    return list(found.values())


def words(text: str) -> frozenset[str]:
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
        candidates = {j for word in rare for j in by_word[word]}
        for j in candidates:
            small, large = sorted((len(bag), len(bags[j])))
            if small >= NEAR * large - 1e-9:
                common = len(bag & bags[j])
                if common >= NEAR * (small + large - common) - 1e-9:
                    found.append((j, i))
        for word in rare:
            by_word[word].append(i)
    return found


def split(
    entries: Sequence[Entry], *, shares: Mapping[str, float] = SHARES, seed: int = 0
) -> dict[str, list[Entry]]:
    """Entries by split; each group (:func:`groups`) lies in one split as a whole.

    Groups of one set, one side (harmful, harmless, both) and one kind are shuffled by a hash of their text
    and dealt out by the shares. So each split gets its share of each, and adding another set moves no entry
    unless it ties groups together.

    Args:
        shares: names and their parts of the whole; they sum to 1. They are met up to the sizes of groups.
        seed: of the hash.

    Raises:
        ValueError: shares that are negative or do not sum to 1.
    """
    if not shares or min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise ValueError(f"shares={dict(shares)} must not be negative and must sum to 1, e.g. {dict(SHARES)}")
    strata: dict[tuple, list[tuple[bytes, list[int]]]] = defaultdict(list)
    for group in groups(entries):
        mark = min(_hash(f"{seed}/{normal(entries[i].prompt)}") for i in group)
        strata[_stratum([entries[i] for i in group])].append((mark, group))
    for key in [key for key, members in strata.items() if len(members) < FEW]:
        strata[(*key[:2], None)] += strata.pop(key)
    where: dict[int, str] = {}
    for key, members in strata.items():
        # The place of the first group is drawn as well; a single group would otherwise always go to the
        # middle.
        phase = int.from_bytes(_hash(f"{seed}/{key}")[:6]) / 2**48
        total, before = sum(len(group) for _, group in members), 0
        for _, group in sorted(members):
            name = _name_at((before + phase * len(group)) / total, shares)
            before += len(group)
            where.update(dict.fromkeys(group, name))
    return {name: [entry for i, entry in enumerate(entries) if where[i] == name] for name in shares}


def _stratum(group: Sequence[Entry]) -> tuple:
    sides = tuple(sorted({entry.harmful for entry in group}))
    kinds = {entry.kind for entry in group if entry.harmful} or {entry.kind for entry in group}
    return tuple(sorted({entry.source for entry in group})), sides, tuple(sorted(kinds))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _name_at(place: float, shares: Mapping[str, float]) -> str:
    end = 0.0
    for name, share in shares.items():
        end += share
        if place < end and share:
            return name
    return [name for name, share in shares.items() if share][-1]


# ---------------------------------------------------------------------- types of harm

# The five types of the pruning paper (its `chosen_five`), in its spelling.
TYPES = ("hate_harass_violence", "malware", "adult_content", "physical_harm", "privacy_violation")

# Categories of public sets, as far as they correspond to one of the five; others keep their own name.
# HEx-PHI's are the five already. StrongREJECT's "Violence" goes where HEx-PHI has violence.
TYPE_OF: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("jailbreakbench", "Harassment/Discrimination"): "hate_harass_violence",
        ("jailbreakbench", "Malware/Hacking"): "malware",
        ("jailbreakbench", "Sexual/Adult content"): "adult_content",
        ("jailbreakbench", "Physical harm"): "physical_harm",
        ("jailbreakbench", "Privacy"): "privacy_violation",
        ("strongreject", "Hate, harassment and discrimination"): "hate_harass_violence",
        ("strongreject", "Violence"): "hate_harass_violence",
        ("strongreject", "Sexual content"): "adult_content",
        ("xstest", "contrast_discr"): "hate_harass_violence",
        ("xstest", "contrast_privacy"): "privacy_violation",
    }
)

# Beginnings of words that speak for a type. They stand in for the paper's verification by hand: good enough
# to sort requests that carry no label, not to claim that a request has nothing of a type.
WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "hate_harass_violence": (
            "hate", "hateful", "harass", "bully", "bullies", "bullying", "racis", "sexis", "discriminat",
            "insult", "threat", "stalk", "violen", "assault", "terror", "slur", "intimidat", "extremis",
            "stereotyp",
        ),
        "malware": (
            "malware", "virus", "hack", "ransomware", "trojan", "phish", "exploit", "keylog", "botnet",
            "spyware", "backdoor", "cyber", "ddos", "firewall", "script", "software",
        ),
        "adult_content": (
            "adult", "sexual", "sexy", "porn", "erotic", "nude", "explicit", "escort", "prostitut",
        ),
        "physical_harm": (
            "bomb", "weapon", "poison", "kill", "murder", "suicid", "explosi", "injur", "firearm", "gun",
            "drug", "anorexi", "starv", "overdos", "arson", "kidnap",
        ),
        "privacy_violation": (
            "privacy", "private", "personal", "identit", "track", "spying", "surveil", "password",
            "address", "dox", "credential", "confidential", "wiretap",
        ),
    }
)  # fmt: skip


def types_by_words(prompt: str) -> dict[str, int]:
    """How many words of a prompt speak for each of :data:`TYPES`; types without any are left out."""
    counts = {
        name: sum(word.startswith(beginnings) for word in normal(prompt).split())
        for name, beginnings in WORDS.items()
    }
    return {name: count for name, count in counts.items() if count}


def type_of(entry: Entry) -> str:
    """The type of an entry: one of :data:`TYPES` where its source's category corresponds to one, else its
    kind.

    A harmful entry without a kind gets the type that most of its words speak for; "" if none or two do. A
    harmless entry without a kind has no type ("").
    """
    if entry.kind:
        source = "jailbreakbench" if entry.source.startswith("jailbreakbench") else entry.source
        return TYPE_OF.get((source, entry.kind), entry.kind)
    counts = types_by_words(entry.prompt) if entry.harmful else {}
    best = [name for name, count in counts.items() if count == max(counts.values())]
    return best[0] if len(best) == 1 else ""


def types(entries: Sequence[Entry]) -> list[str]:
    """Types of the harmful entries: the paper's five first, in its order, then others by name."""
    found = {type_of(entry) for entry in entries if entry.harmful} - {""}
    return [name for name in TYPES if name in found] + sorted(found.difference(TYPES))


def a_not_b(entries: Sequence[Entry], a: str, b: str) -> list[Entry]:
    """Harmful entries of type ``a`` that carry nothing of type ``b``.

    An entry carries ``b`` if its source calls it so or, where ``b`` is one of :data:`TYPES`, if it has a
    word that speaks for ``b``. The pruning paper verified its rows by hand; do so for results you publish.

    Raises:
        ValueError: ``a`` is not among the types of the entries, ``b`` is unknown, or both are the same.
    """
    known = types(entries)
    if a not in known:
        raise ValueError(
            f"a={a!r} is not a type of these entries; choose one of {', '.join(known) or 'none'}"
        )
    if b not in {*known, *TYPES} or a == b:
        raise ValueError(
            f"b={b!r} must be another type than a: one of {', '.join(sorted({*known, *TYPES} - {a}))}"
        )
    return [e for e in entries if e.harmful and type_of(e) == a and b not in types_by_words(e.prompt)]
