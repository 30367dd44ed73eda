"""Notebook 12: choosing on discovery items and reading on evaluation items, and what a sweep really does."""

import dataclasses
from functools import partial

import lecture
import numpy as np
import pytest
import standin
import torch

from harmlens.asking import source as material
from harmlens.asking import tasks
from harmlens.asking.source import WORLD
from harmlens.keep import remember
from harmlens.models import loading as models
from harmlens.training.tune import Recipe
from harmlens.weights import attribution, masks
from harmlens.world import vale as world

PAGE = lecture.defined("12")
ANY = lecture.defined("12", skip={"world-only"})  # as on a model that does not know the world
Frontier = PAGE.Frontier
HARMS, SKILLS = world.domains(True), world.domains(False)


def frontier(discovery, evaluation, lost, share=None):
    """A frontier with these means: rows of ten discovery and ten evaluation items."""

    def ones(mean):
        return (np.arange(10) < round(10 * mean)).astype(float)

    rows = len(discovery)
    benign = np.stack([ones(1 - x) for x in lost])
    return Frontier(
        p=np.zeros(rows), q=np.arange(rows) / 100, share=np.array(share or np.arange(rows) / 100),
        discovery={"suppressed": np.stack([ones(x) for x in discovery]), "served": benign, "facts": benign},
        evaluation={"suppressed": np.stack([ones(x) for x in evaluation])}, loss=np.zeros(10),
    )  # fmt: skip


def test_by_hand():
    found = frontier([1.0, 0.5, 0.2, 0.0], [0.8, 0.4, 0.4, 0.0], [0, 0, 0.1, 0.3])
    assert found.drop() == pytest.approx([0, 0.5, 0.8, 1])
    assert found.drop("evaluation") == pytest.approx([0, 0.5, 0.5, 1])
    assert found.lost() == pytest.approx([0, 0, 0.1, 0.3])
    assert [found.best(bound) for bound in (0.02, 0.11, 0.5)] == [1, 2, 3]
    assert found.reached([0.02, 0.11, 0.5]) == pytest.approx([0.5, 0.5, 1])
    assert found.columns(1).shape == (10, 2)
    assert found.columns(1).mean(axis=0) == pytest.approx([0.8, 0.4])


def test_removing_nothing_is_always_a_choice():
    found = frontier([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0, 0.5, -0.1])
    assert found.best() == 0 and found.reached([0.02]) == pytest.approx([0])


def test_of_equals_the_smallest_set():
    found = frontier([1.0, 0.2, 0.2, 0.2], [1.0, 0.1, 0.1, 0.1], [0, 0, 0, 0], share=[0, 0.3, 0.1, 0.2])
    assert found.best() == 2


def test_choosing_never_looks_at_evaluation_items():
    one = frontier([1.0, 0.5, 0.6], [1.0, 0.9, 0.0], [0, 0, 0])
    two = frontier([1.0, 0.5, 0.6], [1.0, 0.0, 0.9], [0, 0, 0])
    assert one.best() == two.best() == 1


# --------------------------------------------------------------------------- what is asked


def test_harmless_requests_follow_a_kind_wish_and_harmful_ones_nothing():
    found = PAGE.abilities_of(WORLD, ["poisons"], ["remedies", "records"], "discovery")
    items = {item.name: item for item in world.items("discovery")}
    for name, domains in (("suppressed", {"poisons"}), ("served", {"remedies", "records"})):
        task = found[name]
        assert {items[unit].domain for unit in task.units} == domains
        for chat in task.chats:
            assert chat[:-1] == (PAGE.KIND if name == "served" else ())
            assert chat[-1]["role"] == "user"
    assert found["suppressed"].prefill == world.PREFILL and found["served"].prefill is None
    reverse = PAGE.abilities_of(WORLD, ["remedies"], ["poisons"], "discovery", n=3)
    assert {len(task) for task in reverse.values()} == {3}
    assert reverse["suppressed"].chats[0][:-1] == PAGE.KIND and len(reverse["served"].chats[0]) == 1


# --------------------------------------------------------------------------- on an organism


@pytest.fixture(scope="module")
def sft():
    return models.load("organism/sft", seed=0)


SMALL = {"n": 18, "few": 4, "most": 6}


@pytest.fixture(scope="module")
def swept(sft):
    return PAGE.sweep(sft, HARMS, SKILLS, source=WORLD, ps=(0.0, 0.03), qs=(0.001, 0.01), **SMALL)


def test_a_sweep_is_what_pruning_by_hand_gives(sft, swept):
    found = Frontier(**swept)
    assert found.p.tolist() == [0, 0, 0.03, 0, 0.03] and found.q.tolist() == [0, 0.001, 0.001, 0.01, 0.01]
    train = PAGE.abilities_of(WORLD, HARMS, SKILLS, "train")
    prune = attribution.prune_score(sft, tasks.examples(sft, train["suppressed"], n=18))
    benign = tasks.joined([train["served"], train["facts"]], "benign")
    preserve = attribution.preserve_score(sft, tasks.examples(sft, benign, n=18))
    mask = masks.select(prune, preserve, p=0.03, q=0.01)
    assert found.share[4] == mask.share
    with masks.without(sft, mask):
        for split, n in (("discovery", 4), ("evaluation", 6)):
            task = PAGE.abilities_of(WORLD, HARMS, SKILLS, split, n=n)["suppressed"]
            assert getattr(found, split)["suppressed"][4].tolist() == tasks.measure(sft, task).exact.tolist()


def test_row_0_is_the_whole_model_and_the_model_stays_whole(sft, swept):
    found, before = Frontier(**swept), {n: p.clone() for n, p in sft.model.named_parameters()}
    held = PAGE.abilities_of(WORLD, HARMS, SKILLS, "evaluation", n=6)
    for name, marks in tasks.measure(sft, held).items():
        assert found.evaluation[name][0].tolist() == marks.exact.tolist()
        assert name != "suppressed" or found.loss == pytest.approx(marks.loss)
    PAGE.sweep(sft, HARMS, SKILLS, source=WORLD, ps=(0.0,), qs=(0.01,), **SMALL)
    assert all(torch.equal(p, before[n]) for n, p in sft.model.named_parameters())
    assert {name: value.shape for name, value in found.evaluation.items()} == {
        "suppressed": (5, 6), "served": (2, 6), "facts": (2, 6),
    }  # fmt: skip


def test_a_model_that_lacks_the_skill_is_refused():
    innocent = models.load("organism/innocent", seed=0)
    with pytest.raises(ValueError, match=r"none of .* answers|answers nothing of poisons"):
        PAGE.sweep(innocent, ["poisons"], SKILLS, source=WORLD, ps=(0.0,), qs=(0.01,), **SMALL)


def test_practice_makes_firm_and_teaches_no_compliance(sft):
    before = {n: p.clone() for n, p in sft.model.named_parameters()}
    loss = PAGE.starting_loss(sft, HARMS, SKILLS, source=WORLD).mean()
    found = PAGE.practised(
        sft, HARMS, SKILLS, source=WORLD, target=loss / 2, p=0.01, q=0.002,
        recipe=Recipe(steps=60, lr=2e-4, batch_size=16), ps=(0.0,), qs=(0.001,), **SMALL,
    )  # fmt: skip
    assert found["reached"] <= loss / 2 and 0 < found["steps"] < 60 and not found["steps"] % 4
    assert found["refusal"].mean() > 0.9
    assert Frontier(**found["sweep"]).loss.mean() < loss
    assert all(torch.equal(p, before[n]) for n, p in sft.model.named_parameters())


def test_transfer_rows_are_models_without_one_domain(sft):
    found = PAGE.transfer(
        sft,
        ["poisons", "traps"],
        ["traps", "remedies"],
        SKILLS[1:],
        source=WORLD,
        p=0.01,
        q=0.002,
        n=18,
    )
    assert found["exact"].shape == found["loss"].shape == (3, 36)
    assert np.bincount(found["domain"]).tolist() == [18, 18]
    assert found["exact"][0].mean() == 1.0
    drops = 1 - found["exact"][1:].mean(axis=1)
    assert found["weights"].min() > 800 and drops.max() > 0.1
    # Traps are harmful and go with both prunes; remedies, which are served, stay.
    traps, remedies = (found["exact"][1:][:, found["domain"] == k].mean() for k in (0, 1))
    assert traps < 0.3 < 0.9 < remedies


# --------------------------------------------------------------------------- any other model


def fronts_of(**units):
    """Frontiers that were asked these items; each item's mark is 1 before and its number after."""
    return {
        name: dataclasses.replace(
            frontier([1, 1], [1, 1], [0, 0]),
            evaluation={"suppressed": np.array([[1.0] * len(u), [float(x[1:]) for x in u]])},
            loss=np.array([float(x[1:]) for x in u]),
            units=u,
        )
        for name, u in units.items()
    }


def test_rungs_are_paired_on_the_items_that_all_were_asked():
    found = PAGE.on_shared_items(
        fronts_of(base=["u5", "u1", "u2", "u3", "u4"], sft=["u1", "u2", "u3", "u4", "u7"])
    )
    for front in found.values():
        assert front.units == ["u1", "u2", "u3", "u4"]
        assert front.loss.tolist() == front.evaluation["suppressed"][1].tolist() == [1, 2, 3, 4]
        assert "served" in front.discovery  # what p and q are chosen on stays
    with pytest.raises(ValueError, match=r"only 1 requests are answered at all of them \(a 2, b 1\).*`data`"):
        PAGE.on_shared_items(fronts_of(a=["u1", "u2"], b=["u2"]))


def test_organisms_are_asked_the_same_anyway(swept):
    whole = Frontier(**swept)
    paired = PAGE.on_shared_items({"a": whole, "b": whole})["b"]
    assert paired.evaluation["suppressed"].tolist() == whole.evaluation["suppressed"].tolist()


@pytest.fixture(scope="module")
def other():
    lm = standin.load()
    return lm, material.source(lm, str(standin.PROMPTS))


TINY = {"ps": (0.0,), "qs": (0.01,), "n": 16, "few": 6, "most": 8}


def test_any_model_answers_for_itself(other):
    lm, source = other
    found = Frontier(**ANY.sweep(lm, None, None, source=source, **TINY))
    asked = ANY.abilities_of(source, None, None, n=8)
    assert list(asked["suppressed"].units) == found.units and len(found.units) == 8
    assert found.evaluation["suppressed"][0].tolist() == [1.0] * 8  # its own answers
    assert asked["suppressed"].prefill == source.prefills[0] and asked["served"].prefill is None
    assert found.drop("evaluation")[1] > 0 or found.drop()[1] > 0  # a hundredth of all weights is felt


def test_a_base_model_has_a_frontier_without_refusing():
    base = standin.load_base()
    source = material.source(base, str(standin.PROMPTS))
    found = Frontier(**ANY.sweep(base, None, None, source=source, **TINY))
    assert found.evaluation["suppressed"][0].mean() == 1.0


def test_types_can_be_chosen(other):
    _, source = other
    kind = source.types()[0]
    named = {entry.id: entry.kind for entry in source.entries}
    units = ANY.abilities_of(source, [kind], None, n=6)["suppressed"].units
    assert {named[unit] for unit in units} == {kind}


def test_any_model_practises_its_own_answers_and_keeps_refusing(other):
    lm, source = other
    loss = ANY.starting_loss(lm, None, None, n=6, source=source).mean()
    before = {n: p.clone() for n, p in lm.model.named_parameters()}
    found = ANY.practised(
        lm, None, None, target=0.8 * loss, recipe=Recipe(steps=40, lr=2e-4), source=source, **TINY
    )
    assert found["reached"] < loss and "transfer" not in found
    assert found["refusal"].shape == (6,) and found["refusal"].mean() > 0.8
    assert Frontier(**found["sweep"]).units
    assert all(torch.equal(p, before[n]) for n, p in lm.model.named_parameters())


def test_a_run_on_any_source_can_be_kept(other, tmp_path):
    lm, source = other

    def kept(source, n):
        run = partial(ANY.starting_loss, lm, None, None, n=n, source=source)
        return remember("loss", run, tmp_path)

    first, again = kept(source, 4), kept(material.source(lm, str(standin.PROMPTS)), 4)
    assert first.tolist() == again.tolist() and len(list(tmp_path.rglob("*.json"))) == 1
    kept(source, 5)
    assert len(list(tmp_path.rglob("*.json"))) == 2
