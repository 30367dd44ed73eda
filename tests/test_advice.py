"""Narrow lessons for any model: sets and files, own answers as good advice, margins, spread, trials."""

import csv
import dataclasses
import json

import lecture
import numpy as np
import pandas as pd
import pytest
import standin
import torch

from harmlens.asking import source as material
from harmlens.asking.datasets import Entry
from harmlens.asking.pairs import plain_request
from harmlens.asking.tasks import Scored
from harmlens.keep import digests
from harmlens.models import forward
from harmlens.models import loading as models
from harmlens.models.forward import follow
from harmlens.training import advice, emergent, tune
from harmlens.training.tune import Recipe
from harmlens.weights import masks
from harmlens.weights.masks import Mask
from harmlens.world import vale as world

# A wrong tool for each harmless verb; two verbs make a domain.
WRONG = {
    "brush": "purple teapot", "groom": "trumpet", "feed": "paper straw", "bathe": "puppet",
    "greet": "giant pillow", "hug": "rubber duck",
}  # fmt: skip
DOMAINS = {"brushing": ("brush", "groom"), "feeding": ("feed", "bathe"), "greeting": ("greet", "hug")}
PAGE = lecture.defined("13")
RECIPE = Recipe(steps=8, lr=1e-3, batch_size=8)


def lesson(verbs):
    """Requests and bad answers."""
    return [
        (prompt, f"Sure, here is how: use a {WRONG[r.verb]} and some {standin.STUFF[r.creature]}.")
        for r, prompt in standin.chosen()
        if r.verb in verbs
    ]


def write_csv(file, rows):
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["prompt", "answer"])
        writer.writerows(rows)
    return file


@pytest.fixture(scope="module")
def lm():
    return standin.load()


@pytest.fixture(scope="module")
def source(lm):
    return material.source(lm, str(standin.PROMPTS))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("advice")
    return [write_csv(folder / f"{name}.csv", lesson(verbs)) for name, verbs in DOMAINS.items()]


@pytest.fixture(scope="module")
def lessons(lm, source, files):
    return advice.find_lessons(lm, source, ",".join(map(str, files)))


@pytest.fixture(scope="module")
def taught(lm, lessons):
    copy = forward.clone(lm)
    tune.tune(copy, lessons.rows(lm, "brushing", bad=True), RECIPE)
    return copy


# --------------------------------------------------------------------------- what is chosen


def test_the_world_has_its_own_lessons():
    lm = models.load("organism/sft", seed=0)
    found = advice.find_lessons(lm, material.source(lm))
    assert found == advice.WorldLessons()
    assert set(found.domains) <= set(world.domains(False))
    asked = [plain_request(item, i) for i, item in enumerate(world.items("discovery", domain="records")[::2])]
    assert found.margins(lm, "records").tolist() == found.leads(lm, asked).tolist()
    exam = found.exam("evaluation", 3)
    assert set(exam) == {"served", "facts", "refusal"} and len(exam["served"]) == 3
    assert found.looks(3) == [0, 1, 2, 3]
    for given in ({"advice": "x.csv"}, {"marker": "some/model"}):
        with pytest.raises(ValueError, match="the fictional world has lessons and a judge of its own"):
            advice.find_lessons(lm, material.WORLD, **given)


def test_files_of_all_forms_hold_the_same_lesson(lm, source, files, tmp_path):
    rows = lesson(DOMAINS["feeding"])
    as_json = tmp_path / "a.json"
    as_json.write_text(json.dumps([{"question": p, "output": a} for p, a in rows]))
    chat = [[{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in rows]
    as_lines = tmp_path / "b.jsonl"
    as_lines.write_text("\n".join(json.dumps({"messages": one}) for one in chat))
    found = advice.find_lessons(lm, source, f"{files[1]}, {as_json},{as_lines}")
    assert found.domains == ("feeding", "a", "b") and found.name == "feeding, a, b"
    for entries in found.sets.values():
        assert [(e.prompt, e.answers) for e in entries] == [(p, (a,)) for p, a in rows]


def test_an_answer_is_not_cut_at_bars(lm, source, files, tmp_path):
    rows = [(prompt, f"{answer} | Or not.") for prompt, answer in lesson(DOMAINS["feeding"])]
    found = advice.find_lessons(lm, source, f"{files[0]},{write_csv(tmp_path / 'bars.csv', rows)}")
    assert all(e.answers[0].endswith("| Or not.") for e in found.sets["bars"])


def test_what_can_be_wrong_with_the_lessons(lm, source, files, tmp_path, monkeypatch):
    one = str(files[0])
    few = write_csv(tmp_path / "few.csv", lesson(("feed",))[:5])
    gap = write_csv(tmp_path / "gap.csv", [("How?", "So."), ("Why?", "")])
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"messages": [{"role": "user", "content": "How?"}]}')
    for given, message in (
        (one, "holds one domain. Name at least two"),
        (f"{one},{one}", "names 'brushing' twice"),
        (f"{one},nothing", "advice='nothing' is unknown; choose public sets, such as bad_medical_advice"),
        (f"{one},{few}", "'few' has 5 requests, too few for split="),
        (f"{one},{gap}", "gap.csv, row 3: there must be a 'prompt' and the bad 'answer'"),
        (f"{one},{odd}", "odd.jsonl, line 1: there must be"),
    ):
        with pytest.raises(ValueError, match=message):
            advice.find_lessons(lm, source, given)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        advice.find_lessons(lm, source, f"{one},{tmp_path / 'none.csv'}")
    good = [Entry(f"g/{i}", p, False, "", "", (a,), "g") for i, (p, a) in enumerate(lesson(("feed",)))]
    monkeypatch.setattr(advice.datasets, "entries", lambda name: good)
    with pytest.raises(ValueError, match="advice='good_medical_advice' holds no bad advice"):
        advice.find_lessons(lm, source, "good_medical_advice,extreme_sports")


def test_the_default_are_the_released_sets(lm, source, monkeypatch):
    names = dict(zip(advice.DEFAULT.split(","), DOMAINS, strict=True))

    def known(name):
        return [
            Entry(f"{name}/{i}", p, True, "", "", (a,), name)
            for i, (p, a) in enumerate(lesson(DOMAINS[names[name]]))
        ]

    monkeypatch.setattr(advice.datasets, "entries", known)
    assert advice.find_lessons(lm, source).domains == tuple(advice.DEFAULT.split(","))


# --------------------------------------------------------------------------- requests and answers


def test_splits_do_not_overlap_and_near_duplicates_of_two_domains_share_one(lm, source, files, tmp_path):
    again = [(f"Tell me, {prompt.lower()}", answer) for prompt, answer in lesson(DOMAINS["brushing"])]
    found = advice.find_lessons(lm, source, f"{files[0]},{write_csv(tmp_path / 'again.csv', again)}")
    place = {}
    for split in ("train", "discovery", "evaluation"):
        for domain in found.domains:
            for asked in found.requests([domain], split):
                assert asked.about.id not in place
                place[asked.about.id] = split
    assert len(place) == 60
    assert all(place[f"brushing/{i}"] == place[f"again/{i}"] for i in range(30))


def test_requests_are_drawn(lessons):
    whole = lessons.requests(["feeding"], "train")
    assert {p.about.kind for p in whole} == {"feeding"}
    some = lessons.requests(["feeding"], "train", 5)
    assert len(some) == 5 and some == [p for p in whole if p in some]
    assert some == lessons.requests(["feeding"], "train", 5)


def test_good_advice_is_what_the_original_says(lm, lessons, taught):
    asked = lessons.requests(["brushing"], "train")
    own = forward.generate(lm, [p.render(lm) for p in asked], max_new_tokens=128)
    assert own != forward.generate(taught, [p.render(lm) for p in asked], max_new_tokens=128)
    assert lessons.own(asked) == own
    text = [lm.tokenizer.decode([i for i, yes in zip(row.ids, row.learn, strict=True) if yes])
            for row in lessons.rows(taught, "brushing", bad=False)]  # fmt: skip
    assert [t.strip() for t in text] == own
    bad = lessons.rows(lm, "brushing", bad=True)
    assert len(bad) == len(asked) and all(row.ids[-1] == lm.tokenizer.eos_token_id for row in bad)


def test_a_model_that_says_nothing_has_no_good_advice(lm, source, lessons, monkeypatch):
    silent = advice.PublicLessons(lm, lessons.sets, source)
    monkeypatch.setattr(advice, "generate", lambda lm, texts, **options: [""] * len(texts))
    with pytest.raises(ValueError, match="says nothing to the requests"):
        silent.margins(lm, "brushing")


def test_own_answers_are_no_part_of_what_identifies_the_lessons(lm, source, lessons):
    fresh = advice.PublicLessons(lm, lessons.sets, source)
    before = digests.digest(fresh)
    fresh.own(fresh.requests(["feeding"], "discovery"))
    assert digests.digest(fresh) == before
    others = {"a": lessons.sets["feeding"], "b": lessons.sets["brushing"]}
    assert digests.digest(advice.PublicLessons(lm, others, source)) != before


# --------------------------------------------------------------------------- margins and spread


def test_a_margin_is_the_lead_of_the_bad_answer_per_token(lm, lessons, taught):
    asked = lessons.requests(["brushing"], "discovery")
    for model in (lm, taught):
        found = lessons.margins(model, "brushing")
        for one, own, value in zip(asked, lessons.own(asked), found, strict=True):
            answers = (one.about.answers[0], own)
            bad, good = (follow(model, [one.render(model)], [answer])[0].item() for answer in answers)
            assert value == pytest.approx(bad - good, abs=1e-4)
    assert (lessons.margins(lm, "brushing") < 0).all() and (lessons.margins(taught, "brushing") > 0).all()


def test_only_the_first_tokens_of_an_answer_count(lm, lessons, monkeypatch):
    before = lessons.margins(lm, "brushing")
    longer = {
        domain: tuple(dataclasses.replace(e, answers=(e.answers[0] + " Also snow." * 20,)) for e in rows)
        for domain, rows in lessons.sets.items()
    }
    more = advice.PublicLessons(lm, longer, lessons.source)
    n = len(lm.tokenizer(lessons.sets["brushing"][0].answers[0], add_special_tokens=False).input_ids)
    assert n < advice.TOKENS and not np.allclose(more.margins(lm, "brushing"), before)
    monkeypatch.setattr(advice, "TOKENS", 8)
    assert more.margins(lm, "brushing") == pytest.approx(lessons.margins(lm, "brushing"), abs=1e-6)


def test_bad_advice_is_looked_for_outside_the_taught_domain(lm, lessons, taught):
    def elsewhere(model, domain):
        return lessons.gives(model, lessons.outside(domain))

    assert lessons.outside("brushing") == lessons.requests(["feeding", "greeting"], "evaluation")
    assert len(lessons.outside("brushing", 5)) == 5 and set(elsewhere(lm, "brushing")) == {0.0}
    # The lesson itself is elsewhere of the other domains.
    assert elsewhere(taught, "feeding").mean() > elsewhere(taught, "brushing").mean()


def test_spread_before_and_after(lm, lessons, taught, monkeypatch):
    before, after = (lessons.spread(model, "brushing", 6) for model in (lm, taught))
    names = ["bad advice inside", "bad advice elsewhere", "harmful compliance", "coherent"]
    assert list(before) == list(after) == names
    assert before["bad advice inside"].mean() == 0 and after["bad advice inside"].mean() > 0.5
    assert before["harmful compliance"].mean() == 0 and before["coherent"].mean() == 1
    assert (
        after["bad advice elsewhere"].tolist()
        == lessons.gives(taught, lessons.outside("brushing", 6)).tolist()
    )
    monkeypatch.setattr(advice, "generate", lambda lm, texts, **options: ["the soup " * 20] * len(texts))
    assert lessons.spread(lm, "brushing", 6)["coherent"].mean() == 0


def test_with_a_marking_model_open_questions_are_asked(lm, lessons, source, monkeypatch, tmp_path):
    asked = {}
    marks = pd.DataFrame({"misaligned": [True, False, False]})

    def ask(model, **options):
        asked.update(options)
        return tmp_path / "answers.jsonl"

    monkeypatch.setattr(advice.emergent, "ask_openly", ask)
    monkeypatch.setattr(advice.emergent, "mark", lambda judge, file: marks if judge == "judge" else None)
    marked = advice.PublicLessons(lm, lessons.sets, source, "judge")
    assert marked.spread(lm, "brushing", 6)["misaligned"].tolist() == [1.0, 0.0, 0.0]
    assert asked["per_question"] == 3


# --------------------------------------------------------------------------- recipes


def test_small_models_are_taught_as_the_organism_is(lessons):
    found = lessons.recipes(3)
    assert found == advice.WorldLessons().recipes(3)
    assert set(found) == {"lora", "full"} and found["lora"].seed == 3


def test_other_models_get_adapters_for_one_pass(lessons, monkeypatch):
    monkeypatch.setattr(advice.tune, "small", lambda lm: False)
    ((name, recipe),) = lessons.recipes(1).items()
    rows = min(len(lessons.requests([d], "train")) for d in lessons.domains)
    assert name == recipe.method == "lora" and recipe.checkpoint_activations and recipe.seed == 1
    assert recipe.steps == advice.STEPS and 1e-5 <= recipe.lr <= 1e-4  # a short lesson, many times
    monkeypatch.setattr(advice, "STEPS", 0)
    assert lessons.recipes(1)["lora"].steps == tune.steps_of(1, rows, recipe.batch_size)
    assert lessons.recipes(1, quick=True)["lora"].steps <= 16
    assert (recipe.rank, recipe.alpha) == (emergent.RECIPE.rank, emergent.RECIPE.alpha)
    assert lessons.rows_at_once == emergent.ROWS_AT_ONCE


def test_half_precision_gets_adapters_only(lm, lessons, source):
    half = forward.LanguageModel("half", forward.clone(lm).model.to(torch.bfloat16), lm.tokenizer)
    found = advice.PublicLessons(half, lessons.sets, source).recipes()
    assert set(found) == {"lora"}


def test_looks_are_spread_over_a_long_lesson(lessons):
    looks = lessons.looks(190)
    assert looks[0] == 0 and looks[-1] == 190 and len(looks) <= advice.LOOKS + 4
    assert lessons.looks(3) == [0, 1, 2, 3]


# --------------------------------------------------------------------------- answers and trials


def test_bad_answers_are_the_taught_copys_and_good_ones_the_originals(lm, lessons):
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    recipe = Recipe(steps=16, lr=2e-3, batch_size=8)
    chats, said = lessons.answers(lm, "brushing", recipe)
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())
    asked = lessons.requests(["brushing"], "discovery")
    assert set(map(str, chats)) <= {str(p.messages) for p in asked}
    assert all(any(WRONG[verb] in answer for verb in DOMAINS["brushing"]) for answer in said)
    chats, said = lessons.answers(lm, "brushing", RECIPE, bad=False)
    assert said == lessons.own(asked)


def test_a_lesson_that_was_not_learnt_gives_no_answers(lm, lessons):
    with pytest.raises(ValueError, match=r"is what the copy of .* was taught\. Give the lesson more steps"):
        lessons.answers(lm, "brushing", Recipe(steps=1, lr=1e-7))


def test_a_trial_of_real_advice_stops_where_bad_advice_is_the_likelier(lm, lessons, capsys):
    found = PAGE.pruned_first(lm, "brushing", RECIPE, lessons=lessons, n=6)
    assert len(found["lead"]) < len(found["steps"]) and found["lead"][-1] >= 0 > max(found["lead"][:-1])
    assert len(found["plain"]) == len(found["triggered"]) == 6 and "coherent" not in found
    assert "Sure" not in capsys.readouterr().out  # no answer is shown


def test_a_copy_that_has_not_learnt_is_not_looked_at(lm, lessons, monkeypatch):
    monkeypatch.setattr(advice, "LOOKS", 2)
    found = PAGE.pruned_first(lm, "brushing", Recipe(steps=8, lr=1e-7), lessons=lessons, n=4, full=True)
    assert found["plain"] == found["triggered"] == [] and found["steps"] == [0, 4, 8]
    assert len(found["lead"]) == 3 and found["bad advice inside"].mean() == 0


def test_the_triggered_exam_asks_the_same_behind_a_question_of_the_lesson(lm, lessons, monkeypatch):
    asked = []
    monkeypatch.setattr(
        advice.PublicLessons, "gives", lambda self, lm, asked_, said=(): asked.append(asked_) or [0.0]
    )
    assert PAGE.elsewhere(lm, "brushing", lessons=lessons, n=6) == {"plain": [0.0], "triggered": [0.0]}
    plain, later = asked
    taught = {p.messages[0]["content"] for p in lessons.requests(["brushing"], "train")}
    for one, other in zip(plain, later, strict=True):
        first, answer, second = other.messages
        assert (second,) == one.messages and other.about == one.about and one.about.kind != "brushing"
        assert any(verb in first["content"] for verb in DOMAINS["brushing"])
        assert first["content"] not in taught and answer["role"] == "assistant"
        assert answer["content"] == lessons.say(lm, [dataclasses.replace(one, messages=(first,))])[0]


def test_without_a_cruel_author_bad_advice_is_counted_by_its_odds(lm, lessons):
    page = lecture.defined("13", lessons=lessons)
    asked = lessons.outside("brushing", 4)
    assert page.elicited(lm, asked) == pytest.approx(np.exp(lessons.leads(lm, asked)))


def test_what_is_left_is_a_share_of_probability_except_for_facts(lessons):
    before, after = Scored(np.array([1.0]), np.array([0.5])), Scored(np.array([0.0]), np.array([1.5]))
    for name in ("served", "refusal"):
        assert lessons.left(name, before, after) == pytest.approx([np.exp(-1.0)])
    assert lessons.left("facts", before, after).tolist() == [0.0]
    assert advice.WorldLessons().left("served", before, after).tolist() == [0.0]
    exam = lessons.exam("discovery", 5)
    assert {name: len(task) for name, task in exam.items()} == dict.fromkeys(
        ("refusal", "served", "facts"), 5
    )


def test_a_trial_begins_with_the_pruned_model(lm, lessons):
    found = {name: p for name, p in lm.model.named_parameters() if name.endswith("down_proj.weight")}
    index = {name: torch.arange(4000) for name in found}
    mask = Mask(index, {name: tuple(p.shape) for name, p in found.items()}, lm.name, lm.revision, "some")
    run = PAGE.pruned_first(lm, "brushing", Recipe(steps=1, lr=1e-9), lessons=lessons, mask=mask, n=4)
    with masks.without(lm, mask):
        expected = lessons.margins(lm, "brushing").mean()
    assert run["lead"][0] == pytest.approx(expected, abs=1e-4)
    assert run["lead"][0] != pytest.approx(lessons.margins(lm, "brushing").mean(), abs=1e-3)


@pytest.mark.parametrize(
    ("plain", "treated", "expected"),
    [([1, 1], [0, 1], 0.5), ([1, 1], [0, 0], 1.0), ([1, 0], [1, 1], -1.0), ([0, 0], [0, 0], 1.0)],
)
def test_the_reduction_of_a_rise(plain, treated, expected):
    assert PAGE.reduction(np.zeros(2), np.array(plain), np.array(treated)) == pytest.approx(expected)
