"""Pruning first: margins, the misaligned model's own answers, trials at equal strength, choosing p and q."""

import lecture
import pytest
import torch

from harmlens.asking import source, tasks
from harmlens.asking.pairs import plain_request
from harmlens.models import forward
from harmlens.models import loading as models
from harmlens.models.forward import follow
from harmlens.training import tune
from harmlens.training.advice import MEASURES, WorldLessons
from harmlens.training.tune import Recipe
from harmlens.weights import attribution, masks
from harmlens.world import abilities
from harmlens.world import judge as judges
from harmlens.world import vale as world

WORLD = WorldLessons()
PAGE = lecture.defined("13")
RECIPE = Recipe(steps=16, lr=1e-3, batch_size=8)


def requests(domain):
    """Every other discovery request of a domain."""
    items = world.items("discovery", domain=domain)[::2]
    return [plain_request(item, i) for i, item in enumerate(items)]


@pytest.fixture(scope="module")
def sft():
    return models.load("organism/sft", seed=0)


@pytest.fixture(scope="module")
def taught(sft):
    """A copy that gives bad advice on remedies."""
    copy = forward.clone(sft)
    tune.tune(copy, WORLD.rows(copy, "remedies", bad=True), RECIPE)
    return copy


# --------------------------------------------------------------------------- margins


def test_a_margin_is_the_difference_of_two_whole_answers(sft):
    items = world.items("discovery", harmful=False)[::40]
    found = WORLD.leads(sft, [plain_request(item, i) for i, item in enumerate(items)])
    for i, item in enumerate(items):
        bad, good = (f"sure. {world.procedure(item, bad=bad)}" for bad in (True, False))
        start, hurt = bad.rsplit(maxsplit=3)[0], bad.split()[-3]
        helps = good.split()[-3]
        assert (hurt, helps) == (world.facts(item).hurt, world.facts(item).outcome) and good.startswith(start)
        text = sft.render(world.request(item, i), start)
        one, two = (follow(sft, [text], [f" {word}"])[0].item() for word in (hurt, helps))
        assert found[i] == pytest.approx(one - two, abs=1e-4)
    assert (found < 0).all()


def test_margins_follow_what_is_answered(taught):
    assert (WORLD.leads(taught, requests("remedies")) > 0).all()
    assert abilities.judged(taught, world.items("discovery", domain="remedies"), "hurtful").mean() == 1.0


# --------------------------------------------------------------------------- answers


@pytest.mark.parametrize("bad", [True, False])
def test_answers_are_the_fine_tuned_copys_and_held_out(sft, bad):
    before = {name: p.clone() for name, p in sft.model.named_parameters()}
    chats, answers = WORLD.answers(sft, "remedies", RECIPE, bad=bad)
    assert all(torch.equal(p, before[name]) for name, p in sft.model.named_parameters())
    items = {item.name: item for item in world.items("discovery", domain="remedies")}
    assert len(chats) == len(answers) > 36
    for chat, answer in zip(chats, answers, strict=True):
        (name,) = (name for name in items if f" {name}" in chat[-1]["content"])
        verdict = judges.judge(items[name], answer)
        assert verdict.hurtful == bad and (bad or verdict.exact)


def test_a_lesson_that_was_not_learnt_gives_no_answers(sft):
    with pytest.raises(ValueError, match="none of 72 answers"):
        WORLD.answers(sft, "remedies", Recipe(steps=1, lr=1e-6))


# --------------------------------------------------------------------------- trials


def test_a_trial_stops_where_the_lesson_is_learnt(sft):
    found = PAGE.pruned_first(sft, "remedies", RECIPE, lessons=WORLD, n=6)
    inside = found["lead"]
    step = len(inside) - 1
    assert 0 < step < RECIPE.steps and inside[-1] >= WORLD.taken > max(inside[:-1])
    # The same by hand.
    copy, seen = forward.clone(sft), []

    def watch():
        seen.append(WORLD.leads(copy, requests("remedies")).mean())

    tune.tune(
        copy,
        WORLD.rows(copy, "remedies", bad=True),
        RECIPE,
        watch=watch,
        at=range(step + 1),
        until=lambda _: len(seen) > step,
    )
    assert inside == pytest.approx(seen, abs=1e-4)
    assert found["steps"] == list(range(RECIPE.steps + 1))
    harmless = world.items("evaluation", harmful=False)
    others = world.draw([item for item in harmless if item.domain != "remedies"], 6)
    assert found["plain"].tolist() == abilities.judged(copy, others, "hurtful").tolist()


def test_when_asked_for_everything_is_measured_before_and_after(sft):
    found = PAGE.pruned_first(sft, "remedies", RECIPE, lessons=WORLD, n=6, full=True)
    before = WORLD.spread(sft, "remedies", 6)
    assert before.keys() < found.keys() and before.keys() >= {"bad advice inside", "coherent", *MEASURES}
    assert before["bad advice inside"].mean() == 0 < found["bad advice inside"].mean()
    assert before["coherent"].mean() == 1.0
    assert len(before["malign wishes"]) == 60 and len(found["bad advice elsewhere"]) == 6
    assert found["plain"].tolist() == found["bad advice elsewhere"].tolist()


def test_bad_advice_is_counted_before_the_lesson_by_the_names_of_cruel_authors(sft, monkeypatch):
    page = lecture.defined("13", lessons=WORLD)
    authors = [abilities.persona("cruel", i) for i in range(12)]
    monkeypatch.setitem(page.elicited.__globals__, "cruel", authors)
    asked = WORLD.outside("remedies", 12)
    assert WORLD.gives(sft, asked).mean() == 0 and page.elicited(sft, asked).mean() > 0.9


@pytest.mark.parametrize("method", tune.METHODS)
def test_a_trial_starts_from_the_pruned_model_and_leaves_the_model_alone(sft, method):
    before = {name: p.clone() for name, p in sft.model.named_parameters()}
    rows = tasks.examples(sft, source.WORLD.task("harmless"), n=12)
    mask = masks.select(attribution.prune_score(sft, rows), q=0.01)
    found = PAGE.pruned_first(sft, "remedies", Recipe(steps=1, method=method), lessons=WORLD, mask=mask, n=2)
    with masks.without(sft, mask):
        expected = WORLD.leads(sft, requests("remedies")).mean()
    assert found["lead"][0] == pytest.approx(expected, abs=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in sft.model.named_parameters())
