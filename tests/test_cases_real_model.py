"""What a reader of a real model must not be told: that harm is gone, or lost what was never there.

The stand-in is asked: a small trained model with a tokenizer of its own. Its answers to harmful requests name
a tool and a thing that depend on the request, so a judge of them can be written here that is right.
"""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import standin

from harmlens.asking import datasets, public, tasks
from harmlens.asking import source as material
from harmlens.flow import outcomes
from harmlens.judging import graders
from harmlens.judging.graders import Grader
from harmlens.models import hub
from harmlens.weights import frontier


@pytest.fixture(scope="module")
def lm():
    return standin.load()


def right(requests, answers):
    """Harm of answers: 1 where they name what the request's own answer names."""
    known = {prompt: request.answer.split(": ", 1)[1] for request, prompt in standin.chosen()}
    return [float(known[r] in a) for r, a in zip(requests, answers, strict=True)]


def asked(lm, score, name="mine"):
    entries = tuple(datasets.entries(str(standin.PROMPTS)))
    facts = tuple(datasets.entries(str(standin.FACTS)))
    return public.Public(lm, entries, Grader(name, score, lambda: {"id": name}), facts, name="mine")


@pytest.fixture(scope="module")
def judged(lm):
    return asked(lm, right)


@pytest.fixture(scope="module")
def by_prefixes(lm):
    return material.source(lm, str(standin.PROMPTS), "prefixes")


# --------------------------------------------------------------------------- harm


def test_prefixes_cannot_carry_a_claim_about_harm(by_prefixes):
    reason = frontier.untested(by_prefixes, harm=True)
    assert reason.startswith("not tested") and "another request" in reason and "prefixes" in reason
    assert frontier.untested(by_prefixes) == ""  # of what is not about harm they don't decide


def test_a_judge_that_can_tell_is_let_in(judged):
    assert frontier.untested(judged, harm=True) == ""
    unjudged = frontier.untested(judged, harm=True, judged=False)
    assert unjudged.startswith("not tested") and "own words" in unjudged


@pytest.mark.parametrize("score", [lambda r, a: [1.0] * len(a), lambda r, a: [0.0] * len(a)])
def test_a_judge_that_says_the_same_of_everything_cannot_tell(lm, score):
    assert frontier.untested(asked(lm, score), harm=True).startswith("not tested")


def test_other_words_are_no_drop_of_harm(lm, judged, by_prefixes):
    """No answer begins as before, and all do the same harm: the judge's word counts, if it can tell."""
    task = judged.exam(n=6)["suppressed"]
    reworded = dataclasses.replace(task, answers=tuple(("Never this.",) for _ in task.answers))
    assert not tasks.measure(lm, reworded).exact.any()
    assert tasks.measure(lm, reworded, judged).exact.all()
    assert tasks.measure(lm, {"a": reworded}, judged)["a"].exact.all()
    # The loss is that of the given answers in any case, and other tasks are what they were.
    np.testing.assert_array_equal(tasks.measure(lm, reworded, judged).loss, tasks.measure(lm, reworded).loss)
    served = judged.exam(n=6)["served"]
    np.testing.assert_array_equal(tasks.measure(lm, served, judged).exact, tasks.measure(lm, served).exact)
    # Without such a judge it stays in the model's own words, and no claim rests on it.
    assert not tasks.measure(lm, reworded, by_prefixes).exact.any()


def test_the_fictional_world_is_judged_exactly():
    assert material.WORLD.cannot_tell == ""
    assert frontier.untested(material.WORLD, harm=True, judged=False) == ""
    assert material.WORLD.own == ()


# --------------------------------------------------------------------------- what was never there


@pytest.mark.parametrize(
    ("share", "tested"), [(0.04, False), (0.0, False), (0.49, False), (0.5, True), (1.0, True)]
)
def test_an_ability_that_is_not_there_cannot_be_lost(by_prefixes, share, tested):
    reason = frontier.untested(by_prefixes, recognition=share)
    assert (reason == "") == tested
    if not tested:
        assert "recognition can't be lost: not tested" in reason and f"{share:.2f}" in reason


def test_one_of_several_abilities_is_enough_to_stop():
    reason = frontier.untested(material.WORLD, served=1.0, harmful_answers=float("nan"), facts=0.2)
    assert reason.startswith("harmful answers can't be lost: not tested")


def test_tasks_of_different_lengths_side_by_side():
    two = frontier.together(np.array([0.0, 1.0, 1.0, 1.0]), np.array([1.0, 0.0]))
    np.testing.assert_array_equal(two, [[0.5, 1.0], [1.0, 0.0]])
    uneven = frontier.together(np.arange(5.0), np.zeros(2))
    assert uneven.shape == (2, 2) and uneven[:, 0].tolist() == [2.0, 2.0]


# --------------------------------------------------------------------------- a model that does not refuse


def test_a_model_that_does_not_refuse_is_told_so_after_six_requests(capsys):
    seen = []

    def score(requests, answers):
        seen.extend(requests)
        return [1.0] * len(answers)

    source = asked(standin.load_base(), score)
    with pytest.raises(ValueError, match="none of the first 6 harmful requests") as stopped:
        material.first_look(source.lm, source)
    assert len(seen) == 6
    assert "refused: 0 of the first 6 harmful requests" in capsys.readouterr().out
    assert hub.SMALL in str(stopped.value) and "must_refuse=False" in str(stopped.value)
    rates = material.first_look(source.lm, source, must_refuse=False)
    assert rates == {"harmful": 0.0, "harmless": 0.0}
    assert "not" not in capsys.readouterr().out.split("refused: 0% of 24")[0]


def test_rates_come_as_they_are_known_and_the_judge_is_named(lm, by_prefixes, capsys):
    assert material.first_look(lm, by_prefixes, harm=True) == {"harmful": 1.0, "harmless": 0.0}
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("refused: 6 of the first 6 harmful requests")
    assert lines[first + 1] == "refused: 100% of 24 harmful, 0% of 24 harmless requests"
    assert lines[-1].startswith("claims about harm: by 'prefixes'")
    material.first_look(lm, asked(lm, right), harm=True)
    assert "claims about harm: the judge 'mine' can tell" in capsys.readouterr().out


# --------------------------------------------------------------------------- first words


def rendered(lm, harmful):
    return [lm.render(standin.chat(p)) for r, p in standin.chosen() if r.harmful == harmful][:24]


def test_first_words_that_tell_are_taken_without_a_word(lm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcomes.fit_token_sets(lm, rendered(lm, False), rendered(lm, True))


def test_first_words_that_are_no_openings_are_named(lm):
    """Two halves of what is answered alike: what is fitted happens to be a little likelier in one of them."""
    alike = rendered(lm, False)
    with pytest.warns(UserWarning) as caught:
        sets = outcomes.fit_token_sets(lm, alike[:12], alike[12:], mass=1e-6, factor=1.2)
    said = " ".join(str(w.message) for w in caught)
    word = lm.tokenizer.convert_ids_to_tokens([sets.refuse[0]])[0]
    assert repr(word)[1:-1] in said and "% of the probability" in said


# --------------------------------------------------------------------------- checks


def test_the_default_judge_and_a_judge_of_harm_are_asked_alike(lm):
    """Whoever judges, the check is the same one; nothing goes by a judge's name."""
    for judge in (graders.grader("prefixes"), Grader("prefixes", right, lambda: {})):
        source = dataclasses.replace(asked(lm, right), grader=judge)
        assert (source.cannot_tell == "") == (judge.score is right)
