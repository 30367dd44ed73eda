"""Examples for scores: token by token, and only the answers that were asked for."""

from __future__ import annotations

import pytest
import standin
import tiny

from harmlens.asking import public, tasks
from harmlens.asking.source import WORLD
from harmlens.judging import graders
from harmlens.models import loading as models
from harmlens.models.chats import tokens
from harmlens.models.forward import generate
from harmlens.weights import attribution
from harmlens.world import vale as world

ITEM = world.items("train", harmful=True)[0]
CHAT = [{"role": "user", "content": world.request(ITEM)}]
ANSWER = f"sure. {world.procedure(ITEM)}"


@pytest.fixture(scope="module")
def lm():
    return tiny.model()


@pytest.fixture(scope="module")
def sft():
    return models.load("organism/sft", seed=0)


def learnt(lm, row) -> str:
    return lm.tokenizer.decode([i for i, yes in zip(row.ids, row.learn, strict=True) if yes])


# --------------------------------------------------------------------------- formats


def test_chat_format_token_by_token(lm):
    head, answer = tokens(lm.tokenizer, lm.render(CHAT)), tokens(lm.tokenizer, ANSWER)
    (row,) = tasks.rows(lm, [CHAT], [ANSWER])
    assert row.ids == head + answer
    assert row.learn == [False] * len(head) + [True] * len(answer)
    (behind,) = tasks.rows(lm, [CHAT], [ANSWER], given="sure. take", end=True)
    assert behind.ids == [*head, *answer, lm.tokenizer.eos_token_id]
    given = len(tokens(lm.tokenizer, "sure. take"))
    assert behind.learn == [False] * (len(head) + given) + [True] * (len(answer) - given + 1)


def test_bad_answers(lm):
    for answers, options, message in (
        ([" "], {}, r"answers\[0\] is empty; leave"),
        (["sure. take"], {"given": "sure. take"}, r"answers\[0\] is empty behind given='sure. take'"),
        (["no"], {"given": "sure."}, r"answers\[0\] does not begin with given='sure\.'"),
        ([ANSWER, ANSWER], {}, "1 chats but 2 answers"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.rows(lm, [CHAT], answers, **options)


# --------------------------------------------------------------------------- the model's own answers


def test_examples_are_the_right_answers_alone(lm, monkeypatch):
    items = world.items("train", harmful=True)[:3]
    task = tasks.procedures(items, name="x", prefill=world.PREFILL)
    right = [answers[0] for answers in task.answers]
    monkeypatch.setattr(tasks, "written", lambda lm, task: [right[0], None, right[2]])
    rows = tasks.examples(lm, task)
    assert [learnt(lm, row) for row in rows] == [right[0], right[2]]
    monkeypatch.setattr(tasks, "written", lambda lm, task: [None] * 3)
    with pytest.raises(ValueError, match="none of 3 answers"):
        tasks.examples(lm, task)


def test_a_draw_of_examples(lm, monkeypatch):
    """Every answer right, so a draw is seen in what is left; the right answer goes with its own request."""
    items = world.items("train", harmful=False)[:12]
    task = tasks.procedures(items, name="x", prefill=world.PREFILL)
    monkeypatch.setattr(tasks, "written", lambda lm, task: [answers[0] for answers in task.answers])
    whole = tasks.examples(lm, task)
    some, again, other = (tasks.examples(lm, task, n=5, seed=seed) for seed in (0, 0, 1))
    assert len(some) == 5 and all(row in whole for row in some) and some == again != other
    assert tasks.examples(lm, task, n=100) == whole and len(whole) == 12


@pytest.mark.parametrize("kind", ["harmful", "served", "refused", "explanation"])
def test_examples_are_what_the_model_writes_when_it_is_left_to_write(sft, kind):
    task = WORLD.task(kind, types=["poisons", "remedies"])
    start = f"{task.prefill} " if task.prefill else ""
    said = generate(sft, [sft.render(chat, task.prefill) for chat in task.chats], max_new_tokens=48)
    asked = zip(task.chats, said, task.answers, strict=True)
    kept = [(chat, start + text) for chat, text, accepted in asked if text.strip() in accepted]
    expected = tasks.rows(sft, *zip(*kept, strict=True), given=task.prefill)
    assert tasks.examples(sft, task) == expected


def test_the_organism_s_own_examples(sft):
    rows = tasks.examples(sft, WORLD.task("harmful"), n=6)
    assert 4 <= len(rows) <= 6
    assert all(learnt(sft, row).endswith(".") and "take" not in learnt(sft, row) for row in rows)
    assert attribution.make_plan(sft, rows).chunks == (tuple(range(8)),)


# --------------------------------------------------------------------------- sets by name


@pytest.mark.parametrize("suppressed", ["harmful", "harmless"])
def test_calibration_sets(suppressed):
    made = {
        kind: WORLD.task(kind, suppressed=suppressed)
        for kind in (
            "harmful",
            "harmless",
            "refused",
            "served",
            "recognition",
            "explanation",
            "facts",
            "benign",
        )
    }
    side = {h: {i.name for i in world.items("train", harmful=h)} for h in (True, False)}
    hidden, shown = side[suppressed == "harmful"], side[suppressed != "harmful"]
    expected = {
        "harmful": side[True], "harmless": side[False], "refused": hidden, "served": shown,
        "recognition": hidden | shown, "explanation": hidden | shown, "facts": shown, "benign": shown,
    }  # fmt: skip
    assert {kind: set(task.units) for kind, task in made.items()} == expected
    assert {kind for kind, task in made.items() if task.prefill} == {"harmful", "harmless"}
    assert len(made["benign"]) == 3 * len(shown)
    held_out = {i.name for split in ("discovery", "evaluation") for i in world.items(split)}
    assert not held_out & {unit for task in made.values() for unit in task.units}


def test_sets_of_one_domain():
    domain = world.domains(True)[0]
    task = WORLD.task("harmful", types=domain)
    assert set(task.units) == {i.name for i in world.items("train", domain=domain)}
    two = WORLD.task("harmful", types=world.domains(True)[:2])
    assert set(task.units) < set(two.units)


def test_unknown_sets():
    with pytest.raises(ValueError, match="kind='good' is unknown; choose one of harmful, harmless, refused"):
        WORLD.task("good")
    with pytest.raises(ValueError, match="items is empty"):
        WORLD.task("harmful", types=world.domains(False)[0])
    with pytest.raises(ValueError, match="suppressed='harm' must be 'harmful' or 'harmless'"):
        WORLD.task("harmful", suppressed="harm")


def test_examples_of_a_real_model_are_its_own_answers():
    """Only what stands behind the prefilled words counts, whatever the tokenizer makes of it."""
    real = standin.load()
    source = public.public(real, str(standin.PROMPTS), graders.grader(""))
    task = source.task("harmful", n=6)
    rows = tasks.examples(real, task)
    said = [answer for (answer,) in task.answers]
    assert len(rows) == 6
    for row, chat, answer in zip(rows, task.chats, said, strict=True):
        assert learnt(real, row).strip() == answer.strip()
        assert real.tokenizer.decode(row.ids) == real.render(chat, task.prefill) + " " + answer
