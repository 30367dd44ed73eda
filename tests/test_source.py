"""What a model is asked is chosen by its tokenizer; the fictional world answers as its own functions do."""

from __future__ import annotations

import pytest
import standin
import tiny

from harmlens.asking import source as material
from harmlens.asking import tasks
from harmlens.asking.public import Public
from harmlens.asking.source import WORLD, World
from harmlens.models.forward import generate
from harmlens.world import abilities
from harmlens.world import judge as judges
from harmlens.world import vale as world


@pytest.fixture(scope="module")
def lm():
    return standin.load()


# --------------------------------------------------------------------------- choosing


def test_the_tokenizer_decides(lm):
    assert material.source(tiny.model()) is WORLD
    assert material.knows_the_world(tiny.untrained())
    assert not material.knows_the_world(lm)
    found = material.source(lm, str(standin.PROMPTS))
    assert isinstance(found, Public) and found.lm is lm
    assert (found.name, found.knows_world) == ("prompts.csv", False)
    assert found.grader.name in ("prefixes", "refusals")  # as the reader's cache has it


def test_a_large_vocabulary_that_holds_the_words_too_is_another_one():
    """The world's words are ordinary English: a quarter of a million tokens may well hold them all."""
    lm = tiny.model()
    lm.tokenizer.add_tokens([f"word{i}" for i in range(len(world.vocabulary()))])
    assert set(world.vocabulary()) <= set(lm.tokenizer.get_vocab())
    assert not material.knows_the_world(lm)


def test_data_that_is_given_is_what_is_asked(lm):
    found = material.source(tiny.model(), str(standin.PROMPTS))
    assert isinstance(found, Public) and len(found.entries) == 240


def test_a_judge(lm):
    assert material.source(lm, str(standin.PROMPTS), "prefixes").grader.name == "prefixes"
    with pytest.raises(
        ValueError, match="judge='guard': answers about the fictional world are judged exactly"
    ):
        material.source(tiny.model(), judge="guard")
    with pytest.raises(ValueError, match="judge='my aunt' is unknown; choose one of"):
        material.source(lm, str(standin.PROMPTS), "my aunt")
    with pytest.raises(ValueError, match="data='no_such_set' is unknown"):
        material.source(lm, "no_such_set")


def test_default_sets_are_asked_for_where_nothing_is_given(lm, monkeypatch, tmp_path):
    monkeypatch.setenv("HARMLENS_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr(material, "public", lambda lm, data, grader, keeps: asked.append((data, grader.name)))
    material.source(lm)
    assert asked == [(material.DEFAULT, "prefixes")]


def test_both_answer_to_the_same_names():
    """A notebook has one path for all models."""
    for name in (name for name in vars(World) if not name.startswith("_")):
        assert callable(getattr(World, name)) == callable(getattr(Public, name))
    assert World.knows_world and not Public.knows_world


# --------------------------------------------------------------------------- the fictional world


def test_requests_replies_and_judgements_of_the_world():
    asked = WORLD.requests(True, n=6, seed=2)
    items = world.draw(world.items("evaluation", harmful=True), 6, 2)
    assert [p.about for p in asked] == items
    assert [p.messages[0]["content"] for p in asked] == [
        world.request(item, i) for i, item in enumerate(items)
    ]
    harmful, refusals = WORLD.replies(asked)
    verdicts = WORLD.judge(asked, harmful)
    assert verdicts == [judges.judge(item, text) for item, text in zip(items, harmful, strict=True)]
    assert [v.harm for v in verdicts] == [1.0] * 6
    assert all(v.refused for v in WORLD.judge(asked, refusals))
    served = WORLD.requests(False, n=6)
    assert {v.harm for v in WORLD.judge(served, WORLD.replies(served)[0])} == {0.0}


def test_tasks_of_the_world():
    items = world.draw(world.items("evaluation", harmful=True), 5, 1)
    found = WORLD.task("harmful", "evaluation", n=5, seed=1)
    assert found == tasks.procedures(items, name="harmful", prefill=WORLD.prefills[0])
    assert WORLD.persona("cruel", 1) == abilities.persona("cruel", 1)
    harmless = world.draw(world.items("evaluation", harmful=False), 5, 1)
    found = WORLD.task("served", "evaluation", n=5, seed=1, every=2)
    assert found == tasks.procedures(harmless[::2], name="served")
    assert WORLD.task("refused", "evaluation", n=5, seed=1) == tasks.refusals(items, name="refused")
    for kind in ("explanation/effect", "explanation/reason"):
        assert WORLD.task(kind, "evaluation", n=5, seed=1) == tasks.questions(items, kind)
    assert WORLD.types() == world.domains(True) and WORLD.types(False) == world.domains(False)
    assert WORLD.answered_types(True) == list(WORLD.types()) and len(WORLD.answered_types(False, most=2)) == 2


# --------------------------------------------------------------------------- the first look


def test_looking_prints_a_prompt_and_how_often_it_is_refused(lm, capsys):
    source = material.source(lm, str(standin.PROMPTS))
    rates = material.first_look(lm, source, n=10)
    assert rates == {"harmful": 1.0, "harmless": 0.0}
    first, prompt, six, refused = capsys.readouterr().out.splitlines()
    assert first == "prompts.csv: 120 harmful and 120 harmless requests; judge: prefixes"
    assert prompt == repr(source.requests(False, n=10)[0].render(lm))
    assert "<|im_start|>" in prompt
    assert six == "refused: 6 of the first 6 harmful requests"
    assert refused == "refused: 100% of 10 harmful, 0% of 10 harmless requests"


def test_a_model_without_refusal_has_nothing_to_explain(capsys):
    base = standin.load_base()
    source = material.source(base, str(standin.PROMPTS))
    with pytest.raises(ValueError, match=r"refuses none of the first 6 harmful .*aligned \(instruct\)"):
        material.first_look(base, source, n=6)
    assert "refused: 0 of the first 6" in capsys.readouterr().out  # said before it is refused
    assert material.first_look(base, source, n=6, must_refuse=False) == {"harmful": 0.0, "harmless": 0.0}


def test_so_does_one_that_refuses_everything(lm):
    """As one does that was asked in a format that it does not know."""
    from harmlens.judging.graders import Grade

    def grade(requests, answers):
        return [Grade(0.0, True)] * len(answers)

    grade.name = "no to all"
    entries = material.source(lm, str(standin.PROMPTS)).entries
    with pytest.raises(ValueError, match="refuses 100% of the harmful and 100% of the harmless requests"):
        material.first_look(lm, Public(lm, entries, grade, name="mine"), n=6)


# --------------------------------------------------------------------------- answers


def test_answers_come_with_their_prefilled_words_and_are_judged(lm):
    model, asked = tiny.model(), WORLD.requests(True, n=3)
    told = [*WORLD.persona("cruel"), *tasks.user("hello"), {"role": "assistant", "content": "sure."}]
    said, verdicts = WORLD.answers(model, asked, "sure. take", told)
    texts = [model.render((*told, *prompt.messages), "sure. take") for prompt in asked]
    assert said == [f"sure. take {a}" for a in generate(model, texts, max_new_tokens=WORLD.answer_tokens)]
    assert verdicts == WORLD.judge(asked, said)
    found = material.source(lm, str(standin.PROMPTS))
    said, verdicts = found.answers(lm, found.requests(True, n=3))
    assert len(said) == len(verdicts) == 3
