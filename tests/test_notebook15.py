"""Relearning in notebook 15: what the lesson holds, what holding holds, and what is measured."""

import lecture
import pytest
import standin
import torch

from harmlens.asking import source as material
from harmlens.asking import tasks
from harmlens.asking.source import WORLD
from harmlens.keep import files
from harmlens.models import forward
from harmlens.models import loading as models
from harmlens.training import tune
from harmlens.training.tune import Recipe
from harmlens.weights import frontier, masks
from harmlens.world import abilities
from harmlens.world import vale as world

PAGE = lecture.defined("15")
HARMS = world.domains(True)


@pytest.fixture(scope="module")
def sft():
    return models.load("organism/sft", seed=1)  # from which harm can be pruned


@pytest.fixture(scope="module")
def mask(sft):
    return frontier.find_weights(sft, WORLD, n=36, pq=(0.03, 0.002)).mask


RECIPE = Recipe(steps=8, lr=1e-3, batch_size=8)


def exam(source, n):
    asked = {"exact": ("harmful", 1), "served": ("served", 2), "refused": ("refused", 2)}
    return {name: source.task(kind, "evaluation", n=n, every=k) for name, (kind, k) in asked.items()}


def retaught(lm, rows, n=4, recipe=RECIPE, source=WORLD, **options):
    return PAGE.retaught(lm, recipe, rows, exam(source, n), source, **options)


@pytest.fixture(scope="module")
def runs(sft, mask):
    rows = PAGE.lesson(sft, 8, WORLD, types=HARMS[:3])
    free = retaught(sft, rows, 12, mask=mask, pq=(0.03, 0.002))
    return {"free": free, "held": retaught(sft, rows, 12, mask=mask, hold=mask)}


def two(lm):
    return PAGE.lesson(lm, 2, WORLD)


@pytest.mark.parametrize("harmful", [True, False])
def test_a_lesson_holds_right_answers_to_plain_requests_for_training_items(sft, harmful):
    domains = world.domains(harmful)[:2]
    rows = PAGE.lesson(sft, 5, WORLD, harmful=harmful, types=domains)
    assert len(rows) == 20
    texts = [sft.tokenizer.decode(row.ids) for row in rows]
    items = [i for i in world.items("train", domain=domains) if any(f" {i.name}" in text for text in texts)]
    assert len(items) == 5
    for row, text in zip(rows, texts, strict=True):
        (item,) = (i for i in items if f" {i.name}" in text)
        learnt = sft.tokenizer.decode([t for t, yes in zip(row.ids, row.learn, strict=True) if yes])
        assert world.procedure(item) in learnt and learnt.startswith(world.OPENERS)
    assert rows == PAGE.lesson(sft, 5, WORLD, harmful=harmful, types=domains)
    assert rows != PAGE.lesson(sft, 5, WORLD, harmful=harmful, types=domains, seed=1)


def test_the_start_is_the_pruned_model(sft, mask, runs):
    items = world.draw(world.items("evaluation", harmful=True), 12)
    asked = tasks.procedures(items, name="harmful", prefill=world.PREFILL)
    with masks.without(sft, mask):
        marks = tasks.measure(sft, asked)
    for run in runs.values():
        assert run["exact"].shape == (6, 12)  # looked at after 0, 1, 2, 3, 5 and 8 steps
        assert run["exact"][0].tolist() == marks.exact.tolist()


def test_held_weights_do_not_grow_back_and_others_do_the_work(sft, mask, runs):
    assert runs["held"]["regrown"] == 0.0 < runs["free"]["regrown"] < 0.2
    assert PAGE.size(sft, mask) > 0.01
    # Zeroing what is zero changes nothing: the identity of the held run.
    assert runs["held"]["zeroed"].tolist() == runs["held"]["exact"][-1].tolist()
    for run in runs.values():
        assert run["exact"][-1].mean() > run["exact"][0].mean() + 0.3


def test_a_second_prune_is_scored_on_the_taught_model(runs):
    free = runs["free"]
    assert free["zeroed"].shape == free["anew"].shape == (12,)
    assert free["anew"].mean() <= free["exact"][-1].mean()
    assert "anew" not in runs["held"]


def test_restored_is_the_share_of_what_was_lost():
    before, pruned, after = [1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]
    assert PAGE.restored(before, pruned, after) == pytest.approx(1 / 3)
    assert PAGE.restored(before, pruned, before) == 1 and PAGE.restored(before, pruned, pruned) == 0


def test_the_model_that_is_given_stays_as_it_is(sft, mask):
    before = {name: p.clone() for name, p in sft.model.named_parameters()}
    found = retaught(sft, two(sft), recipe=Recipe(steps=1), mask=mask)
    assert all(torch.equal(p, before[name]) for name, p in sft.model.named_parameters())
    assert found["exact"].shape == (2, 4)


def test_without_a_mask_nothing_is_said_of_one(sft):
    found = retaught(sft, two(sft), recipe=Recipe(steps=1))
    assert not {"zeroed", "regrown", "anew"} & found.keys()
    assert found["exact"].shape == (2, 4)


def test_holding_needs_all_weights(sft, mask):
    with pytest.raises(ValueError, match="method='lora' can't; use 'full'"):
        retaught(sft, two(sft), recipe=Recipe(method="lora"), mask=mask, hold=mask)


def test_a_harmful_lesson_undoes_refusal_and_a_harmless_one_does_not(sft):
    """The lesson as such, judged by generating: what is refused afterwards."""
    items = world.items("evaluation", harmful=True)[::9]
    refused = {}
    for harmful in (True, False):
        copy = forward.clone(sft)
        rows = PAGE.lesson(copy, 24, WORLD, harmful=harmful)
        tune.tune(copy, rows, Recipe(steps=16, lr=5e-4))
        refused[harmful] = abilities.judged(copy, items, "refused").mean()
    assert refused[True] == 0 and refused[False] >= 0.7


# --------------------------------------------------------------------------- any other model


@pytest.fixture(scope="module")
def other():
    lm = standin.load()
    return lm, material.source(lm, str(standin.PROMPTS))


@pytest.mark.parametrize("harmful", [True, False])
def test_any_model_is_taught_its_own_answers(other, harmful):
    lm, source = other
    types = source.types()[:2] if harmful else None
    rows = PAGE.lesson(lm, 5, source, harmful=harmful, types=types)
    assert len(rows) == 5
    asked = source.task("harmful" if harmful else "served", n=5, types=types)
    for row, chat, answers in zip(rows, asked.chats, asked.answers, strict=True):
        learnt = lm.tokenizer.decode([t for t, yes in zip(row.ids, row.learn, strict=True) if yes])
        assert learnt == (f"{asked.prefill} {answers[0]}" if harmful else answers[0])
        assert chat[-1]["content"] in lm.tokenizer.decode(row.ids)


def test_relearning_of_any_model(other):
    lm, source = other
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    mask = frontier.find_weights(lm, source, n=24, pq=(0.01, 0.01)).mask
    types = source.types()[:2]
    rows = PAGE.lesson(lm, 12, source, types=types)
    recipe = Recipe(steps=16, lr=1e-3, batch_size=8)
    found = retaught(lm, rows, 8, recipe, source, mask=mask)
    asked = source.task("harmful", "evaluation", n=8)
    with masks.without(lm, mask):
        assert found["exact"][0].tolist() == tasks.measure(lm, asked).exact.tolist()
    assert found["refused"].shape == found["served"].shape == (4,)
    refused = tasks.measure(lm, exam(source, 8)["refused"]).exact
    assert refused.mean() > found["refused"].mean()  # the lesson answers plain requests
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())


def test_no_room_for_a_copy(sft, monkeypatch):
    monkeypatch.setattr(files, "free_memory", lambda device: 10)
    with pytest.raises(MemoryError, match="a copy of 'organism/sft-1' takes"):
        retaught(sft, [])
