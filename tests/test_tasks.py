"""Tasks: forcing the accepted answers says the same as generating and judging."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from harmlens.asking import tasks
from harmlens.asking.source import WORLD
from harmlens.models import forward
from harmlens.models import loading as models
from harmlens.models.chats import tokens
from harmlens.models.forward import generate
from harmlens.weights import masks, scores
from harmlens.world import abilities
from harmlens.world import vale as world

FEW = 10


@pytest.fixture(scope="module")
def sft():
    return models.load("organism/sft", seed=0)


@pytest.fixture(scope="module")
def lm():
    return tiny.model()


def test_marks_are_those_of_the_abilities(sft):
    """Exact by forcing is exact by generating, request by request."""
    suite = WORLD.exam("evaluation", n=FEW)
    some = WORLD.exam("evaluation", n=FEW, only=("served", "facts"))
    assert some == {name: suite[name] for name in ("served", "facts")}
    marks = tasks.measure(sft, suite)
    found = abilities.rate_abilities(
        sft, n=FEW, only=["harmful, prefilled", "refusal", "harmless, plain", "recognition",
                          "explanation: effect", "explanation: reason", "facts: place", "facts: season"],
    )  # fmt: skip
    # Explanations and facts are asked by turns: of one item this, of the next that.
    turns = np.arange(2 * FEW) % 2 == 0
    expected = {
        "suppressed": found["harmful, prefilled"],
        "refusal": found["refusal"],
        "served": found["harmless, plain"],
        "recognition": found["recognition"],
        "explanation": np.where(turns, found["explanation: effect"], found["explanation: reason"]),
        "facts": np.where(turns, found["facts: place"], found["facts: season"]),
    }
    for name, values in expected.items():
        assert marks[name].exact.tolist() == values.tolist(), name
        assert len(suite[name]) == len(suite[name].units) == len(values)
        assert np.isfinite(marks[name].loss).all() and (marks[name].loss > 0).all()


def test_marks_fall_where_abilities_do(sft):
    """Some way spoilt: a few answers are right and a few wrong, and both ways agree on which."""
    suite = WORLD.exam("evaluation", n=FEW)
    names = {"suppressed": "harmful, prefilled", "served": "harmless, plain"}
    with masks.without(sft, masks.top(scores.random(sft), 0.13)):
        spoilt = tasks.measure(sft, {name: suite[name] for name in names})
        found = abilities.rate_abilities(sft, n=FEW, only=list(names.values()))
    rates = [spoilt[name].exact.mean() for name in names]
    assert min(rates) < 1 and max(rates) > 0
    for name, ability in names.items():
        assert spoilt[name].exact.tolist() == found[ability].tolist()


def test_following_is_generating(lm):
    """What a random model writes itself is followed, and one wrong word is noticed; rows of any length."""
    prompts = tiny.texts(lm)
    rows = [tokens(lm.tokenizer, text) for text in prompts]
    words = []
    for row in rows:
        with torch.no_grad():
            new = lm.model.generate(torch.tensor([row]), do_sample=False, max_new_tokens=6)[0, len(row) :]
        words.append([i for i in new.tolist() if i not in lm.tokenizer.all_special_ids])
    answers = [f" {lm.tokenizer.decode(some)}" for some in words]
    usable = [i for i, some in enumerate(words) if len(some) == 6]
    assert len(usable) >= 3
    prompts, answers = [prompts[i] for i in usable], [answers[i] for i in usable]
    for batch_size in (1, 2, 64):
        logprob, greedy = forward.follow(lm, prompts, answers, batch_size=batch_size)
        assert greedy.all() and (logprob < 0).all()
    short = [" ".join(answer.split()[:2]) for answer in answers]
    other = "wool" if "wool" not in " ".join(answers) else "comb"
    wrong = [f" {some} {other}" for some in short]
    assert not forward.follow(lm, prompts, wrong)[1].any()
    # With the end counted, an answer that would go on is not what greedy decoding writes.
    assert not forward.follow(lm, prompts, [f" {some}" for some in short], end=True)[1].any()


def test_following_skips_and_averages(lm):
    prompts, answers = tiny.texts(lm)[:3], [" take wool", " sure. take wool and thistle", " yes"]
    whole, _ = forward.follow(lm, prompts, answers)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        head, tail = forward.split_tokens(lm, prompt, answer)
        with torch.no_grad():
            logp = lm.model(torch.tensor([head + tail])).logits[0, :-1].log_softmax(-1)
        each = logp[len(head) - 1 :].gather(-1, torch.tensor(tail)[:, None])[:, 0]
        assert float(whole[i]) == pytest.approx(float(each.mean()), abs=1e-4)
        if i == 1:
            skipped, _ = forward.follow(lm, [prompt], [answer], skip=2)
            assert float(skipped) == pytest.approx(float(each[2:].mean()), abs=1e-4)
    with pytest.raises(ValueError, match=r"' yes' has no token left after skip=1"):
        forward.follow(lm, prompts, answers, skip=1)
    forward.follow(lm, prompts, answers, skip=1, end=True)
    with pytest.raises(ValueError, match="3 prompts but 2 answers"):
        forward.follow(lm, prompts, answers[:2])


# --------------------------------------------------------------------------- what counts as right


@pytest.fixture
def writing(monkeypatch):
    """Let a model 'write' one given answer to everything."""

    def install(said: str):
        def follow(lm, prompts, answers, *, end, batch_size):
            assert end
            hits = torch.tensor([answer.strip() == said for answer in answers])
            return torch.zeros(len(answers)), hits

        def last_logits(lm, texts, *, batch_size):
            first = torch.tensor(tokens(lm.tokenizer, said)[:1])
            return torch.zeros(len(texts), len(lm.tokenizer)).index_fill(1, first, 1.0)

        monkeypatch.setattr(tasks, "follow", follow)
        monkeypatch.setattr(tasks, "last_logits", last_logits)

    return install


ITEM = world.items("evaluation", harmful=True)[0]


@pytest.mark.parametrize("opener", world.OPENERS)
def test_any_opener_counts(lm, writing, opener):
    task = tasks.procedures([ITEM], name="x")
    writing(f"{opener} {world.procedure(ITEM)}")
    assert tasks.measure(lm, task).exact.tolist() == [1]
    writing(f"{opener} {world.procedure(world.items('evaluation')[9])}")
    assert tasks.measure(lm, task).exact.tolist() == [0]


@pytest.mark.parametrize("refusal", world.REFUSALS)
def test_any_refusal_counts_as_one(lm, writing, refusal):
    writing(refusal)
    assert tasks.measure(lm, tasks.refusals([ITEM, ITEM])).exact.tolist() == [1, 1]
    assert tasks.measure(lm, tasks.procedures([ITEM], name="x")).exact.tolist() == [0]


def test_the_loss_is_that_of_the_first_accepted_answer(lm):
    task = tasks.refusals([ITEM, ITEM])
    texts = [lm.render(chat) for chat in task.chats]
    logprob, _ = forward.follow(lm, texts, [world.REFUSALS[0]] * 2, end=True)
    np.testing.assert_allclose(tasks.measure(lm, task).loss, -logprob.numpy(), rtol=1e-4)


def test_behind_a_prefilled_start_only_the_rest_counts(lm, writing):
    task = tasks.procedures([ITEM], name="x", prefill=world.PREFILL)
    assert task.answers == ((world.procedure(ITEM).removeprefix("take "),),)
    writing(task.answers[0][0])
    assert tasks.measure(lm, task).exact.tolist() == [1]


def test_the_suite_by_sides():
    usual, mirrored = (WORLD.exam("evaluation", n=4, suppressed=side) for side in ("harmful", "harmless"))
    assert set(usual["suppressed"].units) == set(usual["refusal"].units) == set(mirrored["served"].units)
    assert set(usual["served"].units) == set(mirrored["suppressed"].units) == set(mirrored["refusal"].units)
    for suite in (usual, mirrored):
        assert suite["suppressed"].prefill == world.PREFILL and suite["served"].prefill is None
        assert [len(task) for task in suite.values()] == [4, 4, 4, 8, 8, 8]
        assert list(suite) == [task.name for task in suite.values()]


def test_requests_take_context_and_phrasings_by_turns():
    context = abilities.persona("cruel")
    task = tasks.procedures([ITEM, ITEM], name="x", context=context)
    assert task.chats == tuple((*context, *tasks.user(world.request(ITEM, i))) for i in (0, 1))
    assert task.chats[0] != task.chats[1]


def test_names_of_several_tasks(lm):
    one, two = tasks.refusals([ITEM]), tasks.questions([ITEM], "recognition")
    assert set(tasks.measure(lm, [one, two])) == {"refusal", "recognition"}
    assert set(tasks.measure(lm, {"a": one, "b": two})) == {"a", "b"}


def test_mistakes():
    with pytest.raises(ValueError, match="items is empty"):
        tasks.procedures([], name="x")
    with pytest.raises(ValueError, match=r"prefill='sure\.' must end in 'take'"):
        tasks.procedures([ITEM], name="x", prefill="sure.")
    with pytest.raises(ValueError, match="task='colour' is unknown; choose one of recognition, "):
        tasks.questions([ITEM], "colour")
    with pytest.raises(ValueError, match="suppressed='harm' must be 'harmful' or 'harmless'"):
        WORLD.exam(suppressed="harm")
    prefilled = tasks.procedures([ITEM], name="x", prefill=world.PREFILL)
    with pytest.raises(ValueError, match="can only be joined where their answers begin and end alike"):
        tasks.joined([prefilled, tasks.refusals([ITEM])], "both")


def test_generation_agrees_on_a_random_model(lm):
    """A random model never writes a recipe."""
    task = tasks.procedures([ITEM], name="x", prefill=world.PREFILL)
    (answer,) = generate(lm, [lm.render(task.chats[0], task.prefill)], max_new_tokens=4)
    assert answer not in task.answers[0] and tasks.measure(lm, task).exact.tolist() == [0]
