"""Notebook 12: choosing on discovery and reading on evaluation questions, and what a sweep really does."""

from functools import partial

import lecture
import numpy as np
import pandas as pd
import pytest
import standin
import torch

from harmlens.asking import source as material
from harmlens.asking import tasks
from harmlens.asking.public import Public
from harmlens.asking.source import WORLD
from harmlens.keep import remember
from harmlens.models import loading as models
from harmlens.training import refusing
from harmlens.training.tune import Recipe
from harmlens.weights import attribution, masks
from harmlens.world import vale as world

TYPES = world.domains(True), world.domains(False)


def page(n, **given):
    """What the notebook defines, with two sets in place of twenty."""
    found = lecture.defined("12", source=WORLD, n=n, **given)
    found.best.__globals__.update(TAKEN=np.array([10, 100]), SPARED=np.array([300]))
    return found


PAGE = page(12)
ANY = page(12, skip={"world-only"})  # as on a model that does not know the world


# --------------------------------------------------------------------------- by hand


def rows(*points):
    """The table of a sweep, from what each set costs and does."""
    table = [{"p": 0.0, "q": 0.0, "share": 0.0, "cost": 0.0, "gone": 0.0}]
    table += [
        {"p": 0.1, "q": i, "share": i / 100, "cost": c, "gone": g} for i, (c, g) in enumerate(points, 1)
    ]
    return pd.DataFrame(table)


def front(left, units=None):
    """A frontier of ten questions, of which ``left`` are right within each bound."""
    ones = [(np.arange(10) < round(10 * mean)).astype(float) for mean in left]
    units = units or [f"u{i}" for i in range(10)]
    return {"whole": np.ones(10), "left": np.stack(ones), "units": units}


def test_within_a_bound_the_set_that_does_most_and_of_equals_the_smallest():
    found = rows((0.0, 0.5), (0.05, 0.9), (0.05, 0.9), (0.2, 1.0))
    assert [PAGE.best(found, bound) for bound in (0.0, 0.04, 0.05, 0.3)] == [1, 1, 2, 4]


def test_removing_nothing_is_always_a_choice():
    assert PAGE.best(rows((0.5, 1.0), (-0.1, 0.0)), 0.1) == 0


def test_the_area_is_the_mean_drop_over_bounds():
    assert PAGE.area(front([1.0, 0.5, 0.0])).value == pytest.approx(0.5)
    assert PAGE.area(front([0.8] * 10 + [0.2] * 10)).value == pytest.approx(0.5)
    assert len(PAGE.BOUNDS) == 20 and PAGE.BOUNDS.mean() == pytest.approx(PAGE.LIMIT / 2)


def test_several_questions_about_one_item_are_one_unit():
    found = PAGE.pairs(front([0.5], units=[f"u{i // 2}" for i in range(10)]))
    assert found.tolist() == [[1, 1], [1, 1], [1, 0.5], [1, 0], [1, 0]]


def test_rungs_are_paired_on_the_items_that_all_were_asked():
    one, other = (front([0.5], units=[f"u{i}" for i in range(k, k + 10)]) for k in (0, 4))
    assert PAGE.pairs(one, other).tolist() == [[1, 1, 1, 1], *[[1, 0, 1, 1]] * 4, [1, 0, 1, 0]]
    with pytest.raises(ValueError, match="3 shared requests: more `data`"):
        PAGE.pairs(one, front([0.5], units=[f"u{i}" for i in range(7, 17)]))


def test_the_three_numbers_of_a_ladder():
    left = {"base": 0.8, "mid": 0.7, "sft": 0.6, "dpo": 0.2}  # areas of 0.2, 0.3, 0.4, 0.8
    columns = PAGE.pairs(*(front([one]) for one in left.values())).T
    assert PAGE.gain(*columns) == pytest.approx(0.6)
    assert PAGE.slope(*columns) == pytest.approx(0.19)
    assert PAGE.late_step(*columns) == pytest.approx(0.3)


def test_settings_count_what_is_cheap_at_both_ends():
    base, last = rows((0, 0.5), (0, 0.5), (0.2, 0.5), (0, 0.5)), rows((0, 0.8), (0, 0.2), (0, 0.8), (0, 0.8))
    found = PAGE.settings({"rows": base.to_dict("list")}, {"rows": last.to_dict("list")})
    assert found.n == 3 and found.value == pytest.approx(2 / 3)
    assert PAGE.settings({"rows": rows((0, 1))}, {"rows": rows((0.2, 1))}) is None


# --------------------------------------------------------------------------- what is asked


def test_harmless_requests_follow_a_kind_wish_and_harmful_ones_nothing():
    found = PAGE.exam_of(WORLD, (["poisons"], ["remedies", "records"]), "discovery", 20)
    items = {item.name: item for item in world.items("discovery")}
    for name, domains in (("suppressed", {"poisons"}), ("served", {"remedies", "records"})):
        task = found[name]
        assert {items[unit].domain for unit in task.units} == domains and task.prefill == world.PREFILL
        for chat in task.chats:
            assert chat[:-1] == (PAGE.KIND if name == "served" else ())
            assert chat[-1]["role"] == "user"
    assert [len(task) for task in found.values()] == [20, 10, 10]
    reverse = PAGE.exam_of(WORLD, (["remedies"], ["poisons"]), "discovery", 4)
    assert reverse["suppressed"].chats[0][:-1] == PAGE.KIND and len(reverse["served"].chats[0]) == 1


def test_one_domain_comes_to_a_hundred_different_questions():
    task = PAGE.exam_of(WORLD, (["poisons"], TYPES[1]), "discovery", 108)["suppressed"]
    texts = {chat[-1]["content"] for chat in task.chats}
    assert len(texts) == 108 and len(set(task.units)) == 18
    kept = {item.name: world.procedure(item) for item in world.items("discovery", domain="poisons")}
    assert all(f"take {a}" == kept[unit] for (a,), unit in zip(task.answers, task.units, strict=True))


# --------------------------------------------------------------------------- on an organism


@pytest.fixture(scope="module")
def sft():
    return models.load("organism/sft", seed=0)


@pytest.fixture(scope="module")
def swept(sft):
    return PAGE.sweep(sft, WORLD, TYPES)


def test_a_sweep_is_what_pruning_by_hand_gives(sft, swept):
    train = PAGE.examples(sft, WORLD, TYPES)
    prune = attribution.prune_score(sft, train["suppressed"])
    preserve = attribution.preserve_score(sft, train["served"] + train["facts"])
    found = pd.DataFrame(swept["rows"]).iloc[-1]
    mask = masks.select(prune, preserve, p=found["p"], q=found["q"])
    assert found["share"] == mask.share
    asked = PAGE.exam_of(WORLD, TYPES, "discovery", 12)
    whole = tasks.measure(sft, asked)
    with masks.without(sft, mask):
        left = tasks.measure(sft, asked)
        read = tasks.measure(sft, PAGE.exam_of(WORLD, TYPES, "evaluation", 12)["suppressed"])
    lost = {name: whole[name].exact.mean() - left[name].exact.mean() for name in asked}
    assert found["gone"] == pytest.approx(lost["suppressed"] / whole["suppressed"].exact.mean())
    assert found["cost"] == pytest.approx((lost["served"] + lost["facts"]) / 2)
    chosen = [PAGE.best(pd.DataFrame(swept["rows"]), bound) for bound in PAGE.BOUNDS]
    for bound, row in enumerate(chosen):
        if row == found.name:
            assert swept["left"][bound].tolist() == read.exact.tolist()


def test_a_walk_ends_where_nothing_can_be_won(sft):
    class Sets:
        spared, taken = [0.1, 0.2], [0.1, 0.2, 0.3]

        def mask(self, p, q):  # the whole of one matrix, which costs everything
            name = "model.layers.0.mlp.down_proj.weight"
            shape = tuple(sft.model.get_parameter(name).shape)
            return masks.Mask(
                {name: torch.arange(shape[0] * shape[1])}, {name: shape}, sft.name, sft.revision
            )

    found = PAGE.tried(sft, Sets(), PAGE.exam_of(WORLD, TYPES, "discovery", 6), WORLD)
    assert found["p"].tolist() == [0, 0.1, 0.2]  # one of each, and the whole model


def test_the_model_stays_whole(sft, swept):
    before = {name: p.clone() for name, p in sft.model.named_parameters()}
    held = tasks.measure(sft, PAGE.exam_of(WORLD, TYPES, "evaluation", 12)["suppressed"])
    assert swept["whole"].tolist() == held.exact.tolist() and swept["loss"] == pytest.approx(held.loss)
    PAGE.sweep(sft, WORLD, TYPES)
    assert all(torch.equal(p, before[name]) for name, p in sft.model.named_parameters())
    assert swept["left"].shape == (20, 12) and swept["asked"] == 12


def test_a_model_that_lacks_the_skill_is_refused():
    innocent = models.load("organism/innocent", seed=1)
    with pytest.raises(ValueError, match=r"none of .* answers"):
        PAGE.sweep(innocent, WORLD, (["poisons"], TYPES[1]))


def test_practice_makes_firm_and_teaches_no_compliance_and_a_sham_does_not(sft):
    before = {name: p.clone() for name, p in sft.model.named_parameters()}
    big = page(36)
    loss, recipe = big.starting_loss(sft, WORLD), Recipe(steps=60, lr=2e-4, batch_size=16)
    every = range(0, 61, 4)
    firm, steps = big.practise(
        sft, WORLD, ("suppressed", "served"), every, lambda now: now <= loss / 2, recipe
    )
    assert big.starting_loss(firm, WORLD) <= loss / 2 and 0 < steps <= 60
    assert material.first_look(firm, WORLD)["harmful"] > 0.9
    sham, taken = big.practise(sft, WORLD, ("served", "facts"), [steps], lambda _: True, recipe)
    assert taken == steps and big.starting_loss(sham, WORLD) > loss / 2
    assert all(torch.equal(p, before[name]) for name, p in sft.model.named_parameters())


# --------------------------------------------------------------------------- any other model


@pytest.fixture(scope="module")
def other():
    lm = standin.load()
    return lm, material.source(lm, str(standin.PROMPTS))


NONE = None, None


def test_any_model_answers_for_itself(other):
    lm, source = other
    found = ANY.sweep(lm, source, NONE)
    asked = ANY.exam_of(source, NONE, "evaluation", 12)
    assert asked["suppressed"].units == tuple(found["units"]) and found["whole"].tolist() == [1.0] * 12
    assert asked["suppressed"].prefill == source.prefills[0] and asked["served"].prefill is None
    assert pd.DataFrame(found["rows"])["gone"].max() > 0


def test_a_base_model_has_a_frontier_without_refusing():
    base = standin.load_base()
    source = material.source(base, str(standin.PROMPTS))
    assert ANY.sweep(base, source, NONE)["whole"].mean() == 1.0


def test_a_mirror_is_asked_for_the_other_side_without_facts_if_its_answers_can_be_told(
    other, monkeypatch, tmp_path
):
    lm, source = other
    monkeypatch.setenv("HARMLENS_BUILD", str(tmp_path))
    asked = page(12, skip={"world-only"})
    asked.swapped_of.__globals__.update(data=str(standin.PROMPTS))
    with pytest.raises(ValueError, match="'prefixes', it can't tell own answers from"):
        asked.swapped_of(lm)
    monkeypatch.setattr(Public, "cannot_tell", "")  # as if the judge were a better one
    base = standin.load_base()  # as a mirror, it answers what is harmful
    found = asked.swapped_of(base)
    harmful = {entry.id: entry.harmful for entry in source.entries}
    assert not any(harmful[unit] for unit in found["units"]) and found["asked"] == 12
    swapped = refusing.swapped(material.source(base, str(standin.PROMPTS)))
    exam = asked.exam_of(swapped, NONE, "discovery", 12)
    assert set(exam) == {"suppressed", "served"} and all(harmful[unit] for unit in exam["served"].units)
    assert [len(task) for task in exam.values()] == [12, 12]


def test_types_can_be_chosen(other):
    _, source = other
    kind = source.types()[0]
    named = {entry.id: entry.kind for entry in source.entries}
    units = ANY.exam_of(source, ([kind], None), "evaluation", 6)["suppressed"].units
    assert {named[unit] for unit in units} == {kind}


def test_any_model_practises_its_own_answers_and_keeps_refusing(other):
    lm, source = other
    loss = ANY.starting_loss(lm, source)
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    firm, _ = ANY.practise(
        lm, source, ("suppressed", "served"), range(0, 41, 4), lambda now: now <= 0.8 * loss,
        Recipe(steps=40, lr=2e-4),
    )  # fmt: skip
    assert ANY.starting_loss(firm, source) < loss
    assert material.first_look(firm, source)["harmful"] > 0.8
    assert ANY.sweep(firm, source, NONE)["units"]
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())


def test_a_run_on_any_source_can_be_kept(other, tmp_path):
    lm, source = other

    def loss(source):
        return remember("loss", partial(ANY.starting_loss, lm, source), tmp_path)

    assert loss(source) == loss(material.source(lm, str(standin.PROMPTS)))
    assert len(list(tmp_path.rglob("*.json"))) == 1
