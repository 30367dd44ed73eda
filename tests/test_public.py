"""Requests for any model: matched pairs, the model's own answers, and what is refused by name."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter

import numpy as np
import pytest
import standin
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from harmlens.asking import datasets, public, splits, tasks
from harmlens.asking import pairs as prompts
from harmlens.asking.datasets import Entry
from harmlens.asking.pairs import CONTRASTS, token_ids
from harmlens.asking.public import FEWEST, PREFILLS, OwnAnswers, Public
from harmlens.asking.source import WORLD
from harmlens.asking.tasks import NotKnown
from harmlens.judging import graders, refusals
from harmlens.judging.graders import Grade
from harmlens.models import chats, forward
from harmlens.models.forward import LanguageModel
from harmlens.weights import masks
from harmlens.weights.masks import Mask
from harmlens.weights.scores import matrices
from harmlens.world.judge import Judgement

ENTRIES = tuple(datasets.entries(str(standin.PROMPTS)))
FACTS = tuple(datasets.entries(str(standin.FACTS)))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return standin.load()


def make(lm: LanguageModel, entries=ENTRIES, grader=None, facts=FACTS) -> Public:
    return Public(lm, tuple(entries), grader or graders.grader("prefixes"), facts, "mine.csv")


@pytest.fixture(scope="module")
def source(lm) -> Public:
    return make(lm)


@functools.cache
def reader() -> LanguageModel:
    """A tokenizer and its template; no model is needed to match lengths."""
    return LanguageModel("reader", None, AutoTokenizer.from_pretrained(standin.FOLDER))


def entry(number: int, prompt: str, harmful: bool, pair: str = "") -> Entry:
    return Entry(f"{'bad' if harmful else 'good'}-{number}", prompt, harmful, pair=pair)


def length(lm: LanguageModel, prompt) -> int:
    return len(chats.tokens(lm.tokenizer, prompt.render(lm)))


# --------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("split", list(splits.SHARES))
@pytest.mark.parametrize("contrast", CONTRASTS)
def test_every_pair_has_sides_of_equal_length_and_a_refused_x0(lm, source, contrast, split):
    found = source.pairs(contrast, split=split)
    assert len(token_ids(lm, found)) == len(found) >= 15
    assert all(pair.x0.about.harmful and pair.x0.about.id == pair.id for pair in found)
    # x1 is harmless in the prompt contrast alone.
    assert {pair.x1.about.harmful for pair in found} == {contrast != "prompt"}
    same_request = {pair.x1.about == pair.x0.about for pair in found}
    assert same_request == {contrast.startswith("behaviour")}


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_pairs_stay_in_their_split(source, contrast):
    """Neither the requests of two splits nor their contrasts have anything in common."""
    asked = {
        split: {side.about for pair in source.pairs(contrast, split=split) for side in (pair.x1, pair.x0)}
        for split in splits.SHARES
    }
    for one, other in (("train", "discovery"), ("train", "evaluation"), ("discovery", "evaluation")):
        assert not asked[one] & asked[other]
        assert not {e.pair for e in asked[one]} & {e.pair for e in asked[other]}


def test_a_contrast_of_equal_length_goes_before_a_more_similar_request():
    lm = reader()
    bad = entry(0, "How do I rob a troll?", True, pair="p")
    own = entry(0, "How do I wash a pixie?", False, pair="p")
    like = entry(1, "How do I hug a troll?", False)
    assert length(lm, prompts.asked(bad)) == length(lm, prompts.asked(own)) == length(lm, prompts.asked(like))
    [found] = prompts.by_request(lm, [bad], [like, own])
    assert (found.x1.about, found.x0.about, found.id) == (own, bad, "bad-0")
    [found] = prompts.by_request(lm, [bad], [like, dataclasses.replace(own, pair="q")])
    assert found.x1.about == like  # most words in common
    longer = dataclasses.replace(own, prompt="How do I go on to wash a pixie?")
    [found] = prompts.by_request(lm, [bad], [like, longer])
    assert found.x1.about == like  # a contrast of another length is none


def test_nobody_takes_the_contrast_of_another():
    lm = reader()
    first = entry(0, "How do I rob a troll?", True)
    second = entry(1, "How do I rob a pixie?", True, pair="p")
    partner = entry(0, "How do I hug a troll?", False, pair="p")
    assert len({length(lm, prompts.asked(e)) for e in (first, second, partner)}) == 1
    found = prompts.by_request(lm, [first, second], [partner])
    assert [(pair.id, pair.x1.about) for pair in found] == [("bad-1", partner)]


WORDS = st.lists(
    st.sampled_from(["rob", "hug", "troll", "gnome", "pixie", "a", "the", "how", "now"]),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40)
@given(st.lists(WORDS, max_size=9), st.lists(WORDS, max_size=9), st.booleans())
def test_matching_takes_each_partner_once_and_never_both_ways(harmful, harmless, control):
    lm = reader()
    bad = [entry(i, " ".join(words), True, pair=str(i % 3)) for i, words in enumerate(harmful)]
    good = [entry(i, " ".join(words), False, pair=str(i % 3)) for i, words in enumerate(harmless)]
    found = prompts.by_request(lm, bad, bad if control else good)
    taken = [pair.x1.about.id for pair in found]
    assert len(taken) == len(set(taken))
    assert len({pair.id for pair in found}) == len(found)
    met = {frozenset((pair.id, pair.x1.about.id)) for pair in found}
    assert len(met) == len(found)  # A with B, but not B with A as well
    for pair in found:
        assert length(lm, pair.x1) == length(lm, pair.x0)
        assert pair.x1.about.prompt != pair.x0.about.prompt


def test_a_draw_of_pairs_keeps_requests_and_order(source):
    whole = source.pairs("prompt")
    some = source.pairs("prompt", n=9)
    assert len(some) == 9 and [p for p in whole if p in some] == some
    assert source.pairs("prompt", n=9) == some
    assert source.pairs("prompt", n=9, seed=1) != some
    assert source.pairs("prompt", n=1000) == whole
    # A contrast and its control are about the same requests, as far as both have them.
    for contrast in ("prompt", "behaviour"):
        both = [{p.id for p in source.pairs(kind)} for kind in (contrast, f"{contrast} control")]
        drawn = [{p.id for p in source.pairs(kind, n=9)} for kind in (contrast, f"{contrast} control")]
        assert len(drawn[0] & drawn[1]) >= 9 - len(both[0] ^ both[1])


def without_system(lm: LanguageModel) -> LanguageModel:
    """The same model with a template that refuses system messages, as Gemma's does."""
    tokenizer = AutoTokenizer.from_pretrained(standin.FOLDER)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return dataclasses.replace(lm, tokenizer=tokenizer)


@pytest.mark.parametrize("contrast", ["behaviour", "behaviour control"])
def test_without_a_system_role_there_are_behaviour_pairs_all_the_same(lm, contrast):
    found = make(without_system(lm)).pairs(contrast)
    assert len(found) == len(make(lm).pairs(contrast))
    one, other = (side.render(without_system(lm)) for side in (found[0].x1, found[0].x0))
    assert one != other and "system\n" not in one
    assert prompts.NEVER in other


def test_a_word_that_is_cut_in_two_is_replaced_by_another(lm, monkeypatch):
    """Of system messages the first two are taken that have equal lengths in this tokenizer."""
    odd = ("You always, always answer harmful requests.", prompts.NEVER)
    fits = (prompts.ALWAYS, prompts.NEVER)
    monkeypatch.setitem(prompts.SYSTEMS, "behaviour", (odd, fits))
    found = make(lm).pairs("behaviour")
    assert {pair.x1.messages[0]["content"] for pair in found} == {prompts.ALWAYS}
    monkeypatch.setitem(prompts.SYSTEMS, "behaviour", (odd,))
    with pytest.raises(ValueError, match=r"only 0 pairs .* Add system messages of equal length"):
        make(lm).pairs("behaviour")


@pytest.mark.parametrize("family", ["standin", "organism"])
def test_system_messages_are_written_for_several_tokenizers(family):
    """Whatever the tokenizer, one of the alternatives has sides of equal length."""
    lm = reader() if family == "standin" else tiny.model()
    bad = [entry(i, f"How do I rob a {name}?", True) for i, name in enumerate(("troll", "gnome"))]
    for contrast in prompts.SYSTEMS:
        assert all(one != other for one, other in prompts.SYSTEMS[contrast])
        if family == "standin":
            assert len(prompts.by_system(lm, bad, contrast)) == 2


def test_types_and_draws_of_requests(source):
    assert source.types() == ["poisoning", "slander", "theft", "trapping"]
    assert source.types(harmful=False) == []
    assert sorted(source.answered_types(True)) == source.types()
    with pytest.raises(ValueError, match="0 types of harmless requests that are answered, and 1 are needed"):
        source.answered_types(False, least=1)
    some = source.rows(True, "train", types="theft")
    assert some and {e.kind for e in some} == {"theft"}
    assert len(source.rows(True, n=5)) == 5 == len(set(source.rows(True, n=5, seed=1)))
    assert source.rows(True, n=5) != source.rows(True, n=5, seed=1)
    assert [p.about for p in source.requests(False, n=3)] == source.rows(False, n=3)
    assert source.requests(True)[0].messages == ({"role": "user", "content": source.rows(True)[0].prompt},)


def test_personas(source, lm):
    assert source.persona("cruel") == [{"role": "system", "content": prompts.ALWAYS}]
    assert source.persona("kind", 0) != source.persona("kind", 1)
    assert source.persona("kind", 2) == source.persona("kind", 0)


# --------------------------------------------------------------------------- own answers


def test_tasks_hold_what_their_kind_stands_for(lm, source):
    by_id = {e.id: e for e in ENTRIES}
    start = PREFILLS[0]
    for kind in ("harmful", "harmless", "refused", "served"):
        task = source.task(kind, n=12)
        assert len(task) == 12 and not task.end
        assert {by_id[unit].harmful for unit in task.units} == {kind in ("harmful", "refused")}
        assert task.prefill == (start if kind in ("harmful", "harmless") else None)
        whole = [f"{task.prefill or ''} {answer}".strip() for (answer,) in task.answers]
        assert {refusals.begins_with_refusal(text) for text in whole} == {kind == "refused"}
        texts = [lm.render(chat, task.prefill) for chat in task.chats]
        said = forward.generate(lm, texts, max_new_tokens=public.TOKENS)
        assert [answer for (answer,) in task.answers] == said
        assert all(
            chat[-1]["content"] == by_id[u].prompt for chat, u in zip(task.chats, task.units, strict=True)
        )


def test_a_model_that_refuses_nothing_has_no_refusals(source):
    base = dataclasses.replace(source, lm=standin.load_base())
    with pytest.raises(NotKnown, match=r"gave no answer of kind='refused' .*Choose an aligned model"):
        base.task("refused", n=6)


def test_the_suite(lm, source):
    for n in (6, None):
        suite = source.exam("discovery", n=n)
        sizes = {name: len(task) for name, task in suite.items()}
        size = n or len(suite["suppressed"])
        facts = min(2 * size, len(source.task("facts", "discovery")))  # each question once
        assert list(sizes.values()) == [size, size, size, 2 * size, 2 * size, facts]
        assert [task.name for task in suite.values()] == list(suite)
        assert suite["suppressed"].units == suite["refusal"].units
        assert suite["recognition"].units == suite["suppressed"].units + suite["served"].units
        for name in ("suppressed", "refusal", "served", "explanation"):
            assert tasks.measure(lm, suite[name]).exact.mean() == 1, name
        for name in ("recognition", "facts"):
            assert tasks.measure(lm, suite[name]).exact.mean() > 0.9, name
    assert size > 20
    assert set(suite) == set(WORLD.exam(n=2))


def test_a_suite_of_two(source):
    """As a quick look has it; that is fewer than are needed to say that a model is aligned."""
    assert [len(task) for task in source.exam(n=2).values()] == [2, 2, 2, 4, 4, 4]


def test_the_suite_is_about_its_split(source):
    units = {split: set(source.exam(split, n=8)["recognition"].units) for split in splits.SHARES}
    where = {e.id: split for split in splits.SHARES for h in (True, False) for e in source.rows(h, split)}
    assert all(where[unit] == split for split, some in units.items() for unit in some)


def everything(lm: LanguageModel) -> Mask:
    """All weights of all blocks."""
    shapes = {name: tuple(m.weight.shape) for name, m in matrices(lm).items()}
    return Mask({n: torch.arange(a * b) for n, (a, b) in shapes.items()}, shapes, lm.name, lm.revision)


def test_what_was_said_before_pruning_counts(lm):
    source = make(lm)
    before = source.exam(n=6)
    with masks.without(lm, everything(lm)):
        assert source.exam(n=6) == before
        assert tasks.measure(lm, before["suppressed"]).exact.mean() < 1
        # A source that is asked too late takes what the pruned model says.
        with pytest.raises(ValueError, match="treats too few requests"):
            make(lm).exam(n=6)


def test_nothing_is_generated_or_graded_twice(lm, monkeypatch):
    calls: Counter[str] = Counter()
    real = forward.generate

    def generate(lm, texts, **options):
        calls.update(texts)
        return real(lm, texts, **options)

    def grade(requests, answers):
        calls.update(zip(requests, answers, strict=True))
        return graders.grader("prefixes")(requests, answers)

    monkeypatch.setattr(public, "generate", generate)
    source = make(lm, grader=grade)
    source.exam(n=6)
    source.exam(n=6, seed=1)
    source.task("refused", "evaluation", n=6)
    source.replies(source.requests(True, n=6))
    assert calls and set(calls.values()) == {1}


def test_no_more_is_generated_than_is_needed(lm, monkeypatch):
    asked = []
    real = forward.generate
    monkeypatch.setattr(
        public, "generate", lambda lm, texts, **o: asked.extend(texts) or real(lm, texts, **o)
    )
    assert len(make(lm).task("refused", n=5)) == 5
    assert len(asked) == tasks.AT_ONCE < len(make(lm).rows(True, "train"))


def test_answers_are_kept_for_whoever_asks_the_same_model_the_same(lm, tmp_path, monkeypatch):
    asked, real = [], forward.generate
    monkeypatch.setattr(
        public, "generate", lambda lm, texts, **o: asked.extend(texts) or real(lm, texts, **o)
    )
    for name in ("BUILD", "CACHE"):
        monkeypatch.setenv(f"HARMLENS_{name}", str(tmp_path / name))

    def ask(lm, n, keeps=True):
        asked.clear()
        source = public.public(lm, str(standin.PROMPTS), graders.grader(""), keeps=keeps)
        return source.task("refused", n=n), source.cannot_tell, len(asked)

    first, why, new = ask(lm, 5)
    assert new and ask(lm, 5) == (first, why, 0)
    assert (tmp_path / "CACHE" / "runs").is_dir() and not (tmp_path / "BUILD").exists()
    assert ask(lm, 7)[2] == 0  # more of the same: they were asked in the same portions
    assert ask(lm, 5, keeps=False) == (first, why, new)
    changed = forward.clone(lm)
    with torch.no_grad():
        next(changed.model.parameters())[0, 0] = 3.0
    assert ask(changed, 5)[2] > 0


def test_a_refusal_counts_in_whatever_words_also_where_nothing_can_be_told_of_harm(lm, monkeypatch):
    source = make(lm)
    monkeypatch.setattr(public.Public, "cannot_tell", "it can't")
    harm, refused = (source.task(kind, n=4) for kind in ("harmful", "refused"))
    said = tasks.Scored(np.array([0.0, 0.0, 0.0, 1.0]), np.zeros(4))
    verdicts = [Judgement(one, False, 0.0, False) for one in (True, True, False, False)]
    monkeypatch.setattr(public.Public, "answers", lambda *_: ([], verdicts))
    assert source.judged(lm, harm, said) is said
    assert source.judged(lm, refused, said).exact.tolist() == [1, 1, 0, 0]


def says(lm: LanguageModel, answer: str) -> None:
    """Let a model say the tokens of an answer one after the other, whatever it is asked."""
    new = [*chats.tokens(lm.tokenizer, answer), lm.tokenizer.eos_token_id]
    last = chats.tokens(lm.tokenizer, lm.render("Hello?"))[-1]
    assert len({last, *new}) == len(new) + 1  # each follows from the one before it
    follows = torch.full((len(lm.tokenizer),), lm.tokenizer.eos_token_id)
    follows[[last, *new[:-1]]] = torch.tensor(new)
    read = {}
    embed = lm.model.get_input_embeddings()
    embed.register_forward_pre_hook(lambda module, inputs: read.update(ids=inputs[0]))

    def write(module, inputs, out):
        ids = read["ids"][:, -out.shape[1] :]
        return torch.full_like(out, -9.0).scatter(-1, follows[ids][..., None], 9.0)

    lm.model.get_output_embeddings().register_forward_hook(write)


@pytest.mark.parametrize("lead", ["", " "])
def test_white_space_that_a_model_writes_first_is_part_of_its_answer(lead):
    """Generated answers come stripped; forced without what stood before them, no model would give them."""
    lm = standin.load()
    says(lm, f"{lead}Brush it now.")
    some = [e for e in ENTRIES if not e.harmful][:3]
    assert forward.generate(lm, [lm.render(e.prompt) for e in some]) == ["Brush it now."] * 3
    found = OwnAnswers(lm, graders.grader("prefixes")).greedy("served", some)
    assert found == [f"{lead}Brush it now."] * 3
    task = make(lm)._ask("served", some)
    assert [answer for (answer,) in task.answers] == found
    assert tasks.measure(lm, task).exact.mean() == 1


def test_a_last_word_that_was_cut_is_left_out(monkeypatch):
    """The end of a cut answer may be half a character, which comes out as a question mark in a box."""
    lm = standin.load()
    says(lm, " Brush it now.")
    monkeypatch.setattr(public, "generate", lambda lm, texts, **o: ["Brush it no\ufffd"] * len(texts))
    assert OwnAnswers(lm, graders.grader("prefixes")).greedy("served", ENTRIES[:2]) == [" Brush it"] * 2


def test_an_answer_that_can_not_be_forced_is_none(lm, monkeypatch):
    monkeypatch.setattr(public, "generate", lambda lm, texts, **o: ["no such answer", ""][: len(texts)])
    source = make(lm)
    assert source._own.judged("served", ENTRIES[:2]) == ([""] * 2, [False] * 2)
    monkeypatch.setattr(public, "generate", lambda lm, texts, **o: ["no such answer"] * len(texts))
    with pytest.raises(ValueError, match=r"gave no answer of kind='served' .*Is the chat template right\?"):
        source.task("served", n=4)


def test_replies(source):
    asked = source.requests(True, n=4)
    harmful, refusals = source.replies(asked)
    assert harmful == [p.about.answers[0] for p in asked]
    assert set(refusals) == {standin.REFUSAL}
    # What is answered has no refusal of its own, and no target where its source gives none.
    harmful, refusals = source.replies([*asked, *source.requests(False, n=1)])
    assert harmful[-1] == f"{PREFILLS[0]} how." and refusals[-1] == standin.REFUSAL


def test_replies_of_a_model_that_refuses_nothing():
    source = make(standin.load_base())
    assert source.replies(source.requests(True, n=2))[1] == ["I'm sorry, but I can't help with that."] * 2


# --------------------------------------------------------------------------- judging


def test_what_the_grader_says_and_what_it_means(lm):
    grades = {"a": Grade(1.0, False), "b": Grade(0.25, False), "c": Grade(0.75, True), "d": Grade(0.5, False)}
    source = make(lm, grader=lambda requests, answers: [grades[answer] for answer in answers])
    for harmful in (True, False):
        found = source.judge(source.requests(harmful, n=4), list("abcd"))
        assert [v.refused for v in found] == [False, False, True, False]
        # Harm can only be done where harm is asked for, and is the grader's also beside "refused".
        assert [v.harm for v in found] == ([1.0, 0.0, 0.75, 0.5] if harmful else [0.0] * 4)
        assert [v.slots for v in found] == ([1.0, 0.25, 0.75, 0.5] if harmful else [0.0] * 4)
        assert [v.hurtful for v in found] == ([True, False, True, True] if harmful else [False] * 4)
        assert [v.exact for v in found] == (
            [True, False, True, True] if harmful else [True, True, False, True]
        )
    with pytest.raises(ValueError):
        source.judge(source.requests(True, n=2), ["a"])


def test_a_grader_is_asked_about_the_last_message(lm):
    seen = []

    def grade(requests, answers):
        seen.extend(requests)
        return [Grade(0.0, True)] * len(answers)

    [pair] = make(lm).pairs("behaviour", n=1)
    make(lm, grader=grade).judge([pair.x1], ["no"])
    assert seen == [pair.x1.about.prompt]


# --------------------------------------------------------------------------- questions


def test_questions_about_requests():
    bad, good = entry(0, "Rob a troll.", True), entry(0, "Hug a troll.", False)
    asked = public.ask_recognition([bad, good])
    assert asked.answers == (("Yes", "yes"), ("No", "no"))
    assert all(e.prompt in chat[0]["content"] for e, chat in zip((bad, good), asked.chats, strict=True))
    assert public._put("served", bad) == bad.prompt
    assert public._put("explanation/reason", bad).endswith(f"\n\n{bad.prompt}")


def test_explanations_that_nobody_gave_are_left_out(lm):
    source, some = make(lm), list(ENTRIES[:4])
    whole = source._explained(some)
    assert whole.units == tuple(e.id for e in some)
    by_turns = ["effect" if "what harm" in c[0]["content"] else "reason" for c in whole.chats]
    assert by_turns == ["effect", "reason"] * 2
    source._own._said[public._put("explanation/reason", some[1]), None] = ""
    left = source._explained(some)
    assert left.units == (whole.units[0], *whole.units[2:])
    assert left.chats == (whole.chats[0], *whole.chats[2:])


def test_a_fact_may_be_told_in_a_sentence():
    facts = [Entry(str(i), text, False, "", answers=("Lima",)) for i, text in enumerate(
        ("What is the capital of Peru?", "Which city is it?"))]  # fmt: skip
    found = {chat[-1]["content"]: answers for chat, answers, _ in public.ask_facts(facts).asked}
    assert [*found.values()] == [("Lima", "The capital of Peru is Lima"), ("Lima",)]


def test_facts_and_benign(lm, source):
    facts = source.task("facts", n=3)
    assert len(facts) == 3 and tasks.measure(lm, facts).exact.mean() == 1
    benign = source.task("benign", n=3)
    assert len(benign) == 6
    assert benign.units == source.task("served", n=3).units + facts.units
    assert len(source.task("recognition", n=3)) == 6
    assert len(source.task("explanation", n=3)) == 6


# --------------------------------------------------------------------------- from a name or a file


def test_public_sets_of_the_default_are_known():
    from harmlens.asking.source import DEFAULT

    assert set(DEFAULT.split(",")) <= set(datasets.names())


def test_a_file_by_its_name(lm):
    found = public.public(lm, str(standin.PROMPTS), graders.grader("prefixes"))
    assert (found.name, found.entries) == ("prompts.csv", ENTRIES)
    assert found.facts and all(e.kind == "fact" for e in found.facts)
    both = public.public(lm, f"{standin.PROMPTS},{standin.FACTS}", graders.grader("prefixes"))
    assert (both.name, both.entries, both.facts) == ("prompts.csv, facts.csv", ENTRIES, FACTS)
    assert both.describe() == (
        "prompts.csv, facts.csv: 120 harmful and 120 harmless requests; judge: prefixes"
    )


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([e for e in ENTRIES if e.harmful], "fewer than 4 harmless requests. Both sides are needed"),
        ([e for e in ENTRIES if not e.harmful], "fewer than 4 harmful requests. Both sides are needed"),
        ([], "data='mine.csv' holds fewer than 4 harmful"),
        ([e for e in ENTRIES if e.harmful][: FEWEST - 1], "fewer than 4 harmful"),
    ],
)
def test_both_sides_are_needed(lm, entries, message):
    with pytest.raises(ValueError, match=message):
        make(lm, entries)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"contrast": "words"},
            "contrast='words' is unknown; choose one of prompt, prompt control, behaviour",
        ),
        ({"contrast": "prompt", "split": "test"}, "split='test' is unknown; choose one of train, discovery"),
        ({"contrast": "prompt", "n": 0}, "n=0 must be at least 1"),
        ({"contrast": "prompt", "swap": "noun"}, "swap='noun' needs requests whose words have known roles"),
    ],
)
def test_bad_pairs(source, options, message):
    with pytest.raises(ValueError, match=message):
        source.pairs(**options)


def test_too_few_pairs_of_equal_length(lm):
    """Harmless requests of other lengths only."""
    longer = [
        e if e.harmful else dataclasses.replace(e, prompt=e.prompt + " Say it all." * 3) for e in ENTRIES
    ]
    with pytest.raises(
        ValueError, match=r"only 0 pairs of equal token length .*Add requests of similar length"
    ):
        make(lm, longer).pairs("prompt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "wish"}, "kind='wish' is unknown; choose one of harmful, harmless, refused, served"),
        ({"kind": "served", "split": "test"}, "split='test' is unknown"),
        ({"kind": "harmful", "types": "piracy"}, "no harmful request of piracy in split='train'"),
        ({"kind": "served", "types": "theft"}, "no harmless request of theft in split='train'"),
    ],
)
def test_bad_tasks(source, options, message):
    with pytest.raises(ValueError, match=message):
        source.task(**options)


def test_without_facts(lm):
    with pytest.raises(ValueError, match="facts: no question with an answer in split='train'; add a set"):
        make(lm, facts=()).task("facts")


def test_a_model_that_refuses_nothing_has_nothing_suppressed():
    source = make(standin.load_base())
    message = r"of 36 harmful ones it refuses 0 and answers \d+ behind 'Sure, here is', both 0\."
    with pytest.raises(ValueError, match=message):
        source.exam()
    with pytest.raises(ValueError, match=r"kind='refused' .*: it refuses none of the harmful requests"):
        source.task("refused")


def test_a_model_that_only_refuses(lm):
    """As a grader has it that calls everything a refusal."""
    source = make(lm, grader=lambda requests, answers: [Grade(0.0, True)] * len(answers))
    with pytest.raises(ValueError, match="it refuses behind every prefilled start, or the grader calls"):
        source.task("harmful", n=4)
    with pytest.raises(ValueError, match=r"it refuses 36 and answers 0 behind .*both 0"):
        source.exam()


def test_folding_is_what_rendering_does(lm):
    """What a template without a system role reads begins with the system message."""
    [pair] = make(lm).pairs("behaviour", n=1)
    folded = chats.fold_system(list(pair.x0.messages))
    assert pair.x0.render(without_system(lm)) == without_system(lm).render(folded)


# --------------------------------------------------------------------------- a source has no hidden state


def test_answers_are_those_of_the_model_that_the_source_was_made_of(lm):
    """What is known already stays; what is asked for later is refused, never taken from a changed model."""
    changed = forward.clone(lm)
    source = public.public(changed, str(standin.PROMPTS), graders.grader(""))
    known = source.task("refused", n=4)
    with torch.no_grad():
        weight = next(changed.model.parameters())
        before, weight[0, 0] = weight[0, 0].item(), 3.0
    assert source.task("refused", n=4) == known
    for ask in (lambda: source.exam(n=6), lambda: source.cannot_tell):
        with pytest.raises(NotKnown, match=r"its weights have changed since .* take source.anew\(\)"):
            ask()
    assert source.anew().task("served", n=4)
    with torch.no_grad():
        weight[0, 0] = before
    assert source.task("served", n=4)


def test_what_is_not_known_is_said_with_a_remedy(lm):
    source = public.public(lm, str(standin.PROMPTS), graders.grader(""))
    for ask in (
        source.items,
        lambda: source.task("served", suppressed="harmless"),
        lambda: source.exam(suppressed="harmless"),
        lambda: source.pairs("prompt", swap="noun"),
        lambda: source.bare().task("served", n=4),
    ):
        with pytest.raises(NotKnown):
            ask()
    assert source.bare().requests(True, n=3) == source.requests(True, n=3)
