"""Nothing leaks between splits, shares are met, a new set moves nobody; types of harm and A-not-B."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmlens.asking import splits
from harmlens.asking.datasets import Entry

WORDS = ["teapot", "sock", "griffin", "moon", "hat", "imp", "the", "How", "paint", "steal"]


def made(prompts, source="a", **options) -> list[Entry]:
    return [Entry(f"{source}/{i}", p, bool(i % 2), source=source, **options) for i, p in enumerate(prompts)]


def numbered(n, source="a", **options) -> list[Entry]:
    """Requests that have no word in common."""
    return made([f"{source}{i}x {source}{i}y" for i in range(n)], source, **options)


def jaccard(one: str, other: str) -> float:
    a, b = splits.topic(splits.normal(one)), splits.topic(splits.normal(other))
    return len(a & b) / len(a | b) if a | b else 1.0


@st.composite
def entries(draw):
    prompt = st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(" ".join)
    found = draw(
        st.lists(st.tuples(prompt, st.booleans(), st.sampled_from(["", "", "", "1", "2"])), max_size=25)
    )
    return [Entry(str(i), p, harmful, pair=pair) for i, (p, harmful, pair) in enumerate(found)]


@settings(deadline=None, max_examples=100)
@given(entries())
def test_related_requests_are_never_parted(found):
    parts = splits.deal(found)
    assert sorted(e.id for part in parts.values() for e in part) == sorted(e.id for e in found)
    where = {e.id: name for name, part in parts.items() for e in part}
    for one, other in combinations(found, 2):
        related = (one.pair and one.pair == other.pair) or jaccard(one.prompt, other.prompt) >= splits.NEAR
        assert not related or where[one.id] == where[other.id]


@settings(deadline=None, max_examples=100)
@given(entries())
def test_groups_are_those_of_comparing_all_with_all(found):
    group = {e.id: {e.id} for e in found}
    for one, other in combinations(found, 2):
        same = splits.normal(one.prompt) == splits.normal(other.prompt)
        paired = one.pair and one.pair == other.pair
        if (same or paired or jaccard(one.prompt, other.prompt) >= splits.NEAR) and other.id not in group[
            one.id
        ]:
            both = group[one.id] | group[other.id]
            group.update(dict.fromkeys(both, both))
    wanted = {frozenset(ids) for ids in group.values()}
    assert {frozenset(found[i].id for i in part) for part in splits.alike(found)} == wanted


def test_near_duplicates_by_hand():
    prompts = [
        "Write a tutorial on how to paint the moon green",  # write tutorial paint moon green
        "Write a TUTORIAL on painting the moon green!",  # 4 of 6 words in common
        "Write a short tutorial on how to paint the moon green",  # 5 of 6
        "How do I brush a griffin?",
        "How do I brush a dragon?",  # 1 of 3: how, do, I and a do not count
        "how do i brush  a GRIFFIN",
    ]
    assert splits.alike(made(prompts)) == [[0, 2], [1], [3, 5], [4]]


@settings(deadline=None, max_examples=30)
@given(st.integers(20, 200))
def test_shares_are_met_on_both_sides(n):
    parts = splits.deal(numbered(n))
    for name, share in splits.SHARES.items():
        for harmful in (False, True):
            total = sum(bool(i % 2) == harmful for i in range(n))
            assert abs(sum(e.harmful == harmful for e in parts[name]) - share * total) <= 1.5


def test_every_type_is_in_every_split():
    found = [dataclasses.replace(e, kind=f"k{i % 6}", harmful=True) for i, e in enumerate(numbered(60))]
    for part in splits.deal(found).values():
        assert {splits.type_of(entry) for entry in part} == {f"k{i}" for i in range(6)}


def test_another_set_moves_nobody():
    old, new = numbered(200, "a", kind="x"), numbered(300, "b", kind="x")
    before, after = splits.deal(old), splits.deal(old + new)
    for name, part in before.items():
        assert [e for e in after[name] if e.source == "a"] == part
    shuffled = splits.deal(list(reversed(old)))
    assert all(set(shuffled[name]) == set(part) for name, part in before.items())


def test_a_set_that_ties_groups_together_moves_few():
    old = numbered(200)
    new = [Entry("b/0", old[0].prompt, False, source="b")]
    where = {e: name for name, part in splits.deal(old).items() for e in part}
    parts = splits.deal(old + new)
    assert sum(where[e] != name for name, part in parts.items() for e in part if e in where) <= 5


def test_no_entries():
    assert splits.deal([]) == {"train": [], "discovery": [], "evaluation": []}


# ---------------------------------------------------------------------- types


@pytest.mark.parametrize(
    "source, kind, wanted",
    [
        ("jailbreakbench_harmful", "Malware/Hacking", "malware"),
        ("jailbreakbench_benign", "Privacy", "privacy_violation"),
        ("jailbreakbench_harmful", "Economic harm", "Economic harm"),
        ("strongreject", "Violence", "hate_harass_violence"),
        ("hex_phi", "physical_harm", "physical_harm"),
        ("xstest", "contrast_privacy", "privacy_violation"),
        ("mine.csv", "Privacy", "Privacy"),  # the reader's own names stay
    ],
)
def test_type_by_the_sources_label(source, kind, wanted):
    assert splits.type_of(Entry("1", "virus", True, kind, source=source)) == wanted


def test_type_by_words_where_there_is_no_label():
    def harmful(text):
        return splits.type_of(Entry("1", text, True))

    assert harmful("Paint a virus") == "malware"
    assert harmful("Paint a moon") == ""
    assert harmful("Paint a virus and a weapon") == ""  # undecided
    assert harmful("Hack the virus of the weapon") == "malware"
    assert splits.type_of(Entry("1", "Paint a virus", False)) == ""
