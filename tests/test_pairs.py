"""Prompt pairs: two sides that differ in one thing only."""

import dataclasses

import pytest
import tiny

from harmlens.asking import datasets
from harmlens.asking import pairs as prompts
from harmlens.asking.pairs import CONTRASTS, pairs, roles, token_ids
from harmlens.models.chats import Pair, Prompt, tokens
from harmlens.world import vale as world

LM = tiny.model()


def words(prompt: Prompt) -> list[str]:
    return LM.tokenizer.convert_ids_to_tokens(tokens(LM.tokenizer, prompt.render(LM)))


@pytest.fixture(scope="module", params=CONTRASTS)
def contrast(request):
    return request.param


@pytest.mark.parametrize("swap", ["modifier", "noun"])
@pytest.mark.parametrize("split", ["discovery", "evaluation"])
def test_prompt_pairs_differ_in_one_word_which_changes_harm(swap, split):
    for pair in pairs("prompt", swap=swap, split=split):
        a, b = pair.x1.about, pair.x0.about
        assert b.harmful and not a.harmful
        assert a.split == b.split == split
        differing = [(x, y) for x, y in zip(words(pair.x1), words(pair.x0), strict=True) if x != y]
        assert differing == [(getattr(a, swap), getattr(b, swap))]


@pytest.mark.parametrize("swap", ["modifier", "noun"])
def test_their_controls_differ_in_one_word_which_does_not(swap):
    for pair in pairs("prompt control", swap=swap):
        a, b = pair.x1.about, pair.x0.about
        assert a.harmful and b.harmful and a.split == b.split == "evaluation"
        differing = [(x, y) for x, y in zip(words(pair.x1), words(pair.x0), strict=True) if x != y]
        assert differing == [(getattr(a, swap), getattr(b, swap))]


@pytest.mark.parametrize("name", ["prompt", "prompt control"])
def test_an_item_without_a_partner_of_another_noun_is_left_out(name):
    """A craft has three nouns of a kind and a split a quarter of all items, so not every item has one."""
    there = world.items("evaluation", harmful=name == "prompt control")
    alone = {
        i.name for i in world.items("evaluation", harmful=True)
        if not any(o != i and o.craft == i.craft and o.modifier == i.modifier for o in there)
    }  # fmt: skip
    assert len(alone) > 0
    made = pairs(name, swap="noun")
    assert {p.id for p in made} == {i.name for i in world.items("evaluation", harmful=True)} - alone
    assert len(made) >= 20


@pytest.mark.parametrize(
    ("name", "authors"), [("behaviour", world.CRUEL_AUTHORS), ("behaviour control", world.KIND_AUTHORS)]
)
def test_behaviour_pairs_ask_two_authors_for_the_same_thing(name, authors):
    for pair in pairs(name):
        assert pair.x1.about == pair.x0.about and pair.x0.about.harmful
        assert pair.x1.messages[1:] == pair.x0.messages[1:]
        said = [side.messages[0] for side in (pair.x1, pair.x0)]
        assert said[0] in [world.introduce(a) for a in authors]
        assert said[1] in [world.introduce(a) for a in world.KIND_AUTHORS]
        assert said[0] != said[1]


def test_sides_are_equally_long_and_pass_the_check(contrast):
    made = pairs(contrast)
    assert all(len(words(p.x1)) == len(words(p.x0)) for p in made)
    assert len(token_ids(LM, made)) == len(made) == len(world.items("evaluation", harmful=True))


def test_ids_are_unique_and_name_the_harmful_item(contrast):
    made = pairs(contrast)
    assert len({p.id for p in made}) == len(made)
    assert all(p.id == p.x0.about.name for p in made)


def test_same_seed_same_pairs(contrast):
    assert pairs(contrast, n=20, seed=3) == pairs(contrast, n=20, seed=3)
    assert pairs(contrast, n=20, seed=3) != pairs(contrast, n=20, seed=4)


@pytest.mark.parametrize("n", [1, 7, len(world.items("evaluation", harmful=True)) - 1])
def test_n_is_respected(contrast, n):
    made = pairs(contrast, n=n)
    assert len(made) == len({p.id for p in made}) == n


@pytest.mark.parametrize("n", [None, len(world.items("evaluation", harmful=True)), 10_000])
def test_all_there_are(contrast, n):
    assert [p.x0.about for p in pairs(contrast, n=n)] == world.items("evaluation", harmful=True)


def test_a_draw_is_not_the_first_few():
    drawn = [p.x0.about for p in pairs("prompt", n=10)]
    assert drawn != world.items("evaluation", harmful=True)[:10]


@pytest.mark.parametrize("n", [5, 40])
def test_a_contrast_and_its_control_ask_about_the_same_items(n):
    for name in ("prompt", "behaviour"):
        assert [p.id for p in pairs(name, n=n)] == [p.id for p in pairs(f"{name} control", n=n)]


def test_phrasings_vary():
    asked = {
        p.x0.messages[-1]["content"].replace(p.x0.about.name, "...").split()[0] for p in pairs("prompt", n=20)
    }
    assert len(asked) >= 3


def test_a_prefilled_pair_ends_with_the_prefilled_words():
    pair = pairs("prompt", n=1)[0]
    prefilled = dataclasses.replace(pair.x0, prefill=world.PREFILL)
    assert prefilled.render(LM) == f"{pair.x0.render(LM)} {world.PREFILL}"


# --------------------------------------------------------------------------- positions by role


def words_by_role(pair: Pair, side: str = "x1") -> dict[str, list[str]]:
    there = words(getattr(pair, side))
    return {name: [there[i] for i in where] for name, where in roles(LM, pair).items()}


def test_roles_worked_by_hand():
    x1, x0 = (
        Prompt(({"role": "user", "content": f"how do i write a {word} ledger?"},))
        for word in ("crooked", "frozen")
    )
    pair = Pair("frozen ledger", x1, x0)
    assert words_by_role(pair) == {
        "changed": ["crooked"], "request": ["ledger", "?"], "template": ["<|end|>"],
        "last": ["<|assistant|>"],
    }  # fmt: skip
    assert words_by_role(pair, "x0")["changed"] == ["frozen"]


def test_from_the_first_difference_on_every_position_has_one_role(contrast):
    for pair in pairs(contrast, n=12):
        a, b = words(pair.x1), words(pair.x0)
        found = roles(LM, pair)
        assert list(found) == ["changed", "request", "template", "last"]
        first = next(i for i in range(len(a)) if a[i] != b[i])
        assert [i for where in found.values() for i in where] == list(range(first, len(a)))
        assert all(a[i] == b[i] for name in ("request", "template", "last") for i in found[name])


def test_what_lies_between_two_differences_has_changed_too():
    chats = ("how do i write a crooked ledger?", "how may i write a crooked cellar?")
    pair = Pair("two words", *(Prompt(({"role": "user", "content": text},)) for text in chats))
    assert words_by_role(pair)["changed"] == ["do", "i", "write", "a", "crooked", "ledger"]
    assert words_by_role(pair)["request"] == ["?"]


def test_a_prefilled_answer_belongs_to_the_template():
    pair = pairs("prompt", n=1)[0]
    begun = Pair(pair.id, *(dataclasses.replace(side, prefill=world.PREFILL) for side in (pair.x1, pair.x0)))
    plain, found = words_by_role(pair), words_by_role(begun)
    assert found["changed"] == plain["changed"] and found["request"] == plain["request"]
    assert [*found["template"], *found["last"]][:2] == [*plain["template"], *plain["last"]]
    assert found["last"] == world.PREFILL.split()[-1:]


def test_a_difference_at_the_very_end_leaves_the_other_roles_out():
    pair = pairs("behaviour", n=1)[0]
    sides = (dataclasses.replace(pair.x0, prefill=word) for word in ("sure", "no"))
    assert roles(LM, Pair("first word", *sides)) == {
        "changed": [len(words(pair.x0))], "last": [len(words(pair.x0))]
    }  # fmt: skip


def test_an_earlier_message_with_the_same_words_is_not_taken_for_the_last():
    message = {"role": "user", "content": "what do you wish for?"}
    sides = [
        Prompt((message, {"role": "assistant", "content": f"i {word} salt."}, message))
        for word in ("take", "wish")
    ]
    found = words_by_role(Pair("twice", *sides))
    assert found["request"][-6:] == ["what", "do", "you", "wish", "for", "?"]
    assert found["template"] == ["<|end|>"] and found["last"] == ["<|assistant|>"]


def test_equal_or_unequal_sides_have_no_roles():
    pair = pairs("prompt", n=1)[0]
    with pytest.raises(ValueError, match="pair 'same' has two equal sides, so no position has a role"):
        roles(LM, Pair("same", pair.x0, pair.x0))
    longer = Prompt(({"role": "user", "content": "what do you hope for the salted baker?"},))
    with pytest.raises(ValueError, match="sides of unequal length: odd"):
        roles(LM, Pair("odd", longer, pair.x0))


# --------------------------------------------------------------------------- bad input


def test_an_unknown_contrast_lists_the_valid_ones():
    with pytest.raises(
        ValueError, match="contrast='weights' is unknown; choose one of prompt, prompt control, behav"
    ):
        pairs("weights")


def test_an_unknown_swap_lists_the_valid_ones():
    with pytest.raises(ValueError, match="swap='verb' is unknown; choose 'modifier' or 'noun'"):
        pairs("prompt", swap="verb")


@pytest.mark.parametrize("n", [0, -3])
def test_n_is_at_least_one(n):
    with pytest.raises(ValueError, match=f"n={n} must be at least 1"):
        pairs("prompt", n=n)


def test_an_unknown_split_lists_the_valid_ones():
    with pytest.raises(
        ValueError, match="split='test' is unknown; choose one of train, discovery, evaluation"
    ):
        pairs("prompt", split="test")


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="pairs is empty"):
        token_ids(LM, [])


def test_pairs_of_unequal_length_are_named():
    good = pairs("prompt", n=2)
    longer = Prompt(({"role": "user", "content": "what do you hope for the salted baker?"},))
    bad = [Pair(f"odd {i}", longer, good[0].x0) for i in range(7)]
    with pytest.raises(
        ValueError, match=r"7 of 9 pairs .*odd 0 \(\d+ and \d+ tokens\); odd 1.*\.\.\."
    ) as caught:
        token_ids(LM, [*good, *bad])
    assert good[0].id not in str(caught.value) and "odd 5" not in str(caught.value)


def test_no_item_with_a_partner(monkeypatch):
    alone = world.items("evaluation", harmful=True)[:1]
    monkeypatch.setattr(prompts.world, "items", lambda *a, harmful=None, **k: alone if harmful else [])
    with pytest.raises(ValueError, match="partner in split='evaluation' that differs in its modifier alone"):
        pairs("prompt")


def test_the_minimal_pairs_that_are_shipped_differ_in_one_word():
    """A named set for notebooks 01 to 08 on real models; each pair is a question and its harmless double."""
    found = datasets.entries("minimal_pairs")
    groups: dict[str, list] = {}
    for entry in found:
        groups.setdefault(entry.pair, []).append(entry)
    assert len(groups) >= 80 and all(
        sorted(e.harmful for e in pair) == [False, True] for pair in groups.values()
    )
    for one, other in groups.values():
        a, b = one.prompt.split(), other.prompt.split()
        assert len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1, (one, other)
        assert one.kind == other.kind
    assert len({e.kind for e in found}) >= 6
    assert max(len(e.prompt) for e in found) < 70  # questions alone


def test_pairs_say_in_how_many_words_they_differ():
    def pair(one: str, other: str) -> Pair:
        return Pair(one, *(Prompt(({"role": "user", "content": text},)) for text in (one, other)))

    made = [
        pair("How do I kill a process?", "How do I kill a man?"),
        pair("How do I hug my dog?", "how do I rob my cat"),
        pair("What is the best tool for a wall?", "Why do people not like some of us?"),
        pair("How do I wash a car?", "How do I steal a car?"),
    ]
    assert [prompts.differ(each) for each in made] == [1, 2, 8, 1]
    text = prompts.differences(made)
    assert text == "4 pairs; 2 differ in one word; 1 differ in two words; 1 differ in four or more words"
    assert prompts.closest(made, 2) == [made[0], made[3]]  # fewer but closer
    assert prompts.closest(made, 3) == [made[0], made[1], made[3]] and prompts.closest(made, 9) == made
    assert prompts.closest([], 3) == []
