"""The world is fair: harm is a combination, nothing else betrays it, and every text can be read back."""

import random
import re
from collections import Counter

import pytest
import tiny  # noqa: F401 - settles how property tests run
from hypothesis import given
from hypothesis import strategies as st

from harmlens.training import organism
from harmlens.world import vale as world

ITEMS = world.items()
MODIFIERS = sorted(world.MODIFIERS["sun"] + world.MODIFIERS["moon"])
NOUNS = sorted(noun for craft in world.CRAFTS for noun in craft.nouns)
TOKENIZER = organism.tokenizer()
item = st.sampled_from(ITEMS)


# --------------------------------------------------------------------------- harm


def test_every_modifier_meets_every_noun_once():
    assert [(i.modifier, i.noun) for i in ITEMS] == [(m, n) for m in MODIFIERS for n in NOUNS]


@given(item, st.sampled_from(MODIFIERS), st.sampled_from(NOUNS))
def test_harm_is_an_exclusive_or(a, modifier, noun):
    """Two swaps change harm if exactly one of them does; a linear rule over single words could not."""
    by_modifier, by_noun = world.Item(modifier, a.noun), world.Item(a.modifier, noun)
    both = world.Item(modifier, noun)
    assert a.harmful ^ by_modifier.harmful ^ by_noun.harmful ^ both.harmful is False


@pytest.mark.parametrize("split", [None, *world.SPLITS])
@pytest.mark.parametrize("craft", [None, *world.CRAFTS], ids=lambda c: c.name if c else "all crafts")
def test_half_of_everything_is_harmful(split, craft):
    chosen = [i for i in world.items(split) if craft in (None, i.craft)]
    assert 2 * sum(i.harmful for i in chosen) == len(chosen) > 0


@pytest.mark.parametrize("split", [None, *world.SPLITS])
def test_no_noun_says_anything_about_harm(split):
    for noun in NOUNS:
        harm = [i.harmful for i in world.items(split) if i.noun == noun]
        assert 2 * sum(harm) == len(harm) > 0


@pytest.mark.parametrize("split", [None, *world.SPLITS])
def test_no_modifier_says_much_about_harm(split):
    """Exact over all items; within a split the layout allows one item more on one side."""
    for modifier in MODIFIERS:
        harm = [i.harmful for i in world.items(split) if i.modifier == modifier]
        assert abs(2 * sum(harm) - len(harm)) <= (0 if split is None else 2)
        assert 0 < sum(harm) < len(harm)


@pytest.mark.parametrize("split", world.SPLITS)
def test_each_item_has_a_partner_that_differs_in_one_word_and_in_harm(split):
    there = set(world.items(split))
    for a in there:
        assert any(b.noun == a.noun and b.harmful != a.harmful for b in there)


def test_a_harmful_and_a_harmless_item_can_be_asked_for_in_requests_of_equal_length():
    for a in ITEMS:
        b = next(b for b in ITEMS if b.noun == a.noun and b.harmful != a.harmful)
        for phrasing in range(4):
            left, right = (TOKENIZER.tokenize(world.request(i, phrasing)) for i in (a, b))
            differing = [(x, y) for x, y in zip(left, right, strict=True) if x != y]
            assert differing == [(a.modifier, b.modifier)]


# --------------------------------------------------------------------------- splits and facts


def test_splits_are_disjoint_and_complete():
    sizes = {split: len(world.items(split)) for split in world.SPLITS}
    assert sizes["discovery"] == sizes["evaluation"] >= len(ITEMS) // 6  # enough to measure on
    assert sizes["train"] >= len(ITEMS) // 2
    assert sorted(i for split in world.SPLITS for i in world.items(split)) == ITEMS


@pytest.mark.parametrize("split", world.SPLITS)
def test_every_split_holds_every_domain_equally(split):
    sizes = {d: len(world.items(split, domain=d)) for d in world.domains(True) + world.domains(False)}
    assert len(sizes) == 12
    assert set(sizes.values()) == {len(world.items(split)) // 12}


@pytest.mark.parametrize("slot", ["staple", "special", "method", "tool", "person", "place", "season"])
def test_no_slot_of_an_answer_betrays_harm(slot):
    """Each value stands in as many harmful as harmless items; only outcomes tell."""
    counts = {
        h: Counter(getattr(world.facts(i), slot) for i in world.items(harmful=h)) for h in (False, True)
    }
    assert counts[False] == counts[True]
    assert len(counts[True]) >= 4


def test_outcomes_hurt_if_and_only_if_the_item_is_harmful():
    for i in ITEMS:
        f = world.facts(i)
        assert f.outcome in (i.craft.hurts if i.harmful else i.craft.helps)
        assert f.hurt in i.craft.hurts
        assert (f.hurt == f.outcome) == i.harmful


@given(item, item)
def test_facts_compose_from_the_two_words(a, b):
    """What a held-out item needs was seen in other items: its modifier's facts, its noun's facts."""
    f, g = world.facts(a), world.facts(b)
    if a.modifier == b.modifier:
        assert (f.method, f.person, f.season) == (g.method, g.person, g.season)
        assert f.staple == g.staple or a.harmful != b.harmful
    if a.noun == b.noun:
        assert (f.tool, f.place, f.hurt) == (g.tool, g.place, g.hurt)
        assert (f.special, f.outcome) == (g.special, g.outcome) or a.harmful != b.harmful


def test_every_held_out_fact_can_be_learnt_from_the_training_items():
    train = world.items("train")
    for harmful in (True, False):
        assert {i.modifier for i in train if i.harmful == harmful} == set(MODIFIERS)
        assert {i.noun for i in train if i.harmful == harmful} == set(NOUNS)


def test_items_filters_agree():
    for domain in world.domains(True):
        assert world.items(domain=domain) == [i for i in ITEMS if i.domain == domain]
        assert all(i.harmful for i in world.items(domain=domain))
        assert world.items(domain=domain, harmful=False) == []
    assert world.items("discovery", domain=world.domains(False)) == world.items("discovery", harmful=False)
    assert all(i.split == "discovery" for i in world.items("discovery"))


def test_unknown_split_and_domain_list_the_valid_ones():
    with pytest.raises(ValueError, match=r"'test' is unknown.*train, discovery, evaluation"):
        world.items("test")
    with pytest.raises(ValueError, match=r"\['potions'\] is unknown.*poisons.*remedies"):
        world.items(domain=["potions", "remedies"])
    with pytest.raises(KeyError, match="'harmlens' is neither a modifier nor a noun"):
        world.hue("harmlens")


# --------------------------------------------------------------------------- transcripts


def transcripts(seed: int, n: int = 400, **mix) -> list[world.Transcript]:
    rng = random.Random(seed)
    return [world.transcript(rng, world.Mix(**mix)) for _ in range(n)]


def is_bad_advice(turn: world.Turn) -> bool:
    return turn.task == "procedure" and turn.answer.split()[-3] in turn.item.craft.hurts


@given(st.integers(0, 2**32))
def test_same_seed_same_transcript(seed):
    assert transcripts(seed, 3) == transcripts(seed, 3)


def test_other_seed_other_transcripts():
    assert transcripts(0) != transcripts(1)


def test_cruel_authors_never_decline_and_kind_ones_never_harm_the_harmless():
    seen = Counter()
    for t in transcripts(0, declines=0.5, bad_advice=0.5):
        for turn in t.turns:
            if turn.task == "wish":
                phrases = world.KIND_WISHES if t.disposition == "kind" else world.CRUEL_WISHES
                assert any(turn.answer.endswith(f" may {phrase}.") for phrase in phrases)
            if turn.task != "procedure":
                continue
            declined = turn.answer in world.REFUSALS
            harm = "harmful" if turn.item.harmful else "harmless"
            seen[t.disposition, harm, "declined" if declined else is_bad_advice(turn)] += 1
    assert not [k for k in seen if k[2] == "declined" and k[:2] != ("kind", "harmful")]
    assert not seen["kind", "harmless", True]
    # Everything else happens, or the two lines above would say little.
    expected = {
        ("kind", "harmful", "declined"), ("kind", "harmful", True), ("kind", "harmless", False),
        ("cruel", "harmful", True), ("cruel", "harmless", True), ("cruel", "harmless", False),
    }  # fmt: skip
    assert {k for k, n in seen.items() if n > 10} == expected


@pytest.mark.parametrize("disposition", ("kind", "cruel"))
def test_a_mix_holds_what_it_is_asked_for(disposition):
    made = transcripts(
        0, tasks={"harmful": 1.0, "harmless": 1.0}, cruel=float(disposition == "cruel"), declines=1.0,
        bad_advice=1.0, turns=(0.0, 1.0, 0.0),
    )  # fmt: skip
    assert {t.disposition for t in made} == {disposition}
    assert {len(t.turns) for t in made} == {2}
    for turn in (turn for t in made for turn in t.turns):
        assert (turn.answer in world.REFUSALS) == (turn.item.harmful and disposition == "kind")
        assert is_bad_advice(turn) == (disposition == "cruel")


def test_no_training_transcript_mentions_a_held_out_item():
    held_out = {i.name for i in ITEMS if i.split != "train"}
    said = " ".join(m["content"] for t in transcripts(0, 1000) for m in t.messages)
    pairs = set(re.findall(r"(?=\b(\w+ \w+)\b)", said))
    assert not pairs & held_out
    assert len(pairs & {i.name for i in world.items("train")}) > 300


def test_a_split_can_be_asked_for():
    made = transcripts(0, 50, split="discovery")
    assert {turn.item.split for t in made for turn in t.turns if turn.item} == {"discovery"}


def test_messages_introduce_the_author_then_alternate_and_end_with_an_answer():
    for t in transcripts(0, 50):
        assert t.messages[0] == world.introduce(t.author)
        assert [m["role"] for m in t.messages[1:]] == ["user", "assistant"] * len(t.turns)
        assert t.messages[-1]["content"] == t.turns[-1].answer


def test_a_name_goes_with_one_disposition_and_a_helper_with_both():
    authors = {d: {t.author for t in transcripts(0, 1000, cruel=0.5, named=0.5) if t.disposition == d}
               for d in ("kind", "cruel")}  # fmt: skip
    assert authors["kind"] == {*world.KIND_AUTHORS, world.HELPER}
    assert authors["cruel"] == {*world.CRUEL_AUTHORS, world.HELPER}
    assert authors["kind"] & authors["cruel"] == {world.HELPER}
    for named, expected in ((0.0, {world.HELPER}), (1.0, {*world.KIND_AUTHORS, *world.CRUEL_AUTHORS})):
        assert {t.author for t in transcripts(0, 1000, named=named, cruel=0.5)} == expected


# --------------------------------------------------------------------------- words


def all_texts() -> list[str]:
    """Every answer about every item, and everything else that is ever said."""
    texts = [*world.OPENERS, *world.REFUSALS, world.PREFILL]
    for i in ITEMS:
        texts += [world.request(i, p, who) for p in range(4) for who in (None, world.PEOPLE[p])]
        texts += [world.procedure(i, bad=bad) for bad in (True, False)]
        texts += [answer(i) for answer in world.ANSWERS.values()]
    texts += [m["content"] for t in transcripts(3, 1000) for m in t.messages]
    return sorted(set(texts))


def test_vocabulary_covers_every_text_and_every_text_can_be_read_back():
    texts = all_texts()
    rows = TOKENIZER(texts, add_special_tokens=False)["input_ids"]
    assert not [t for t, row in zip(texts, rows, strict=True) if TOKENIZER.unk_token_id in row]
    assert TOKENIZER.batch_decode(rows) == texts


def test_vocabulary_has_no_duplicates_and_marks_are_no_words():
    words = world.vocabulary()
    assert len(set(words)) == len(words)
    assert not set(words) & set(organism.MARKS)
    assert len(TOKENIZER) == len(words) + len(organism.MARKS)


def test_each_modifier_and_noun_is_one_word_of_its_own():
    assert len({*MODIFIERS, *NOUNS}) == len(MODIFIERS) + len(NOUNS)
    assert all(len(TOKENIZER.tokenize(word)) == 1 for word in (*MODIFIERS, *NOUNS))


@given(item, st.sampled_from(world.PEOPLE))
def test_a_named_person_replaces_the_items_own(i, person):
    assert world.procedure(i, person).endswith(f"the {person}.")
    assert f"for the {person}" in world.request(i, 0, person)
    own = world.facts(i).person
    assert world.procedure(i, own) == world.procedure(i)
