"""Notebook 12: choosing on discovery items and reading on evaluation items, and what a sweep really does."""

from functools import partial

import lecture
import numpy as np
import pytest
import standin
import torch

import harmlens
from harmlens.asking import source as material
from harmlens.asking import tasks
from harmlens.asking.source import WORLD
from harmlens.keep import remember
from harmlens.models import loading as models
from harmlens.training.tune import Recipe
from harmlens.weights import attribution, frontier, masks
from harmlens.world import vale as world

TYPES = world.domains(True), world.domains(False)
PAGE = lecture.defined("12", source=WORLD, n=18, few=4, most=6)
# As on a model that does not know the world.
ANY = lecture.defined("12", skip={"world-only"}, n=16, few=6, most=8)


@pytest.fixture(scope="module", autouse=True)
def small_grid():
    """Two shares of each kind for organisms, one for other models."""
    grids = {True: {"ps": (0.0, 0.03), "qs": (0.001, 0.01)}, False: {"ps": (0.0,), "qs": (0.01,)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontier, "grid", lambda prune, source: grids[source.knows_world])
        yield


def front(discovery, evaluation, lost, share=None):
    """A frontier with these means: rows of ten discovery and ten evaluation items."""

    def ones(mean):
        return (np.arange(10) < round(10 * mean)).astype(float)

    benign = np.stack([ones(1 - x) for x in lost])
    return {
        "share": np.array(share or np.arange(len(discovery)) / 100),
        "suppressed": np.stack([ones(x) for x in discovery]), "served": benign, "facts": benign,
        "evaluation": np.stack([ones(x) for x in evaluation]), "loss": np.zeros(10),
    }  # fmt: skip


def test_by_hand():
    found = front([1.0, 0.5, 0.2, 0.0], [0.8, 0.4, 0.4, 0.0], [0, 0, 0.1, 0.3])
    assert PAGE.drop(found["suppressed"]) == pytest.approx([0, 0.5, 0.8, 1])
    assert PAGE.lost(found) == pytest.approx([0, 0, 0.1, 0.3])
    assert [PAGE.best(found, bound) for bound in (0.02, 0.11, 0.5)] == [1, 2, 3]
    assert [PAGE.reached(found, bound) for bound in (0.02, 0.11, 0.5)] == pytest.approx([0.5, 0.5, 1])
    assert PAGE.pair(found).tolist() == PAGE.pair(found, 1).tolist()
    assert PAGE.pair(found, 1).mean(axis=0) == pytest.approx([0.8, 0.4])


def test_removing_nothing_is_always_a_choice():
    found = front([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0, 0.5, -0.1])
    assert PAGE.best(found) == 0 and PAGE.reached(found) == 0


def test_of_equals_the_smallest_set():
    found = front([1.0, 0.2, 0.2, 0.2], [1.0, 0.1, 0.1, 0.1], [0, 0, 0, 0], share=[0, 0.3, 0.1, 0.2])
    assert PAGE.best(found) == 2


def test_choosing_never_looks_at_evaluation_items():
    one = front([1.0, 0.5, 0.6], [1.0, 0.9, 0.0], [0, 0, 0])
    two = front([1.0, 0.5, 0.6], [1.0, 0.0, 0.9], [0, 0, 0])
    assert PAGE.best(one) == PAGE.best(two) == 1


def test_the_three_numbers_of_a_ladder_by_hand():
    after = {"base": 0.8, "mid": 0.7, "sft": 0.6, "dpo": 0.2}  # drops of 0.2, 0.3, 0.4, 0.8
    ladder = {stage: front([1, 0.5], [1, left], [0, 0]) for stage, left in after.items()}
    found = PAGE.along(ladder)
    assert {claim: round(one.value, 9) for claim, one in found.items()} == {
        "R4a": 0.6, "R4b": 0.19, "R4c": 0.3,
    }  # fmt: skip
    assert "R4c" not in PAGE.along({stage: ladder[stage] for stage in ("base", "dpo")})
    assert PAGE.beyond(PAGE.pair(ladder["dpo"]), PAGE.pair(ladder["base"])).value == found["R4a"].value


def test_settings_count_what_is_cheap_at_both_ends():
    page = lecture.defined("12", first="base", last="dpo")
    base = front([1, 1, 1, 1, 1], [1, 0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0.3, 0])
    last = front([1, 1, 1, 1, 1], [1, 0.2, 0.8, 0.2, 0.2], [0, 0, 0, 0, 0])
    found = page.settings({"base": base, "dpo": last})
    assert found.n == 3 and found.value == pytest.approx(2 / 3)


# --------------------------------------------------------------------------- what is asked


def test_harmless_requests_follow_a_kind_wish_and_harmful_ones_nothing():
    found = PAGE.exam_of(WORLD, (["poisons"], ["remedies", "records"]), "discovery")
    items = {item.name: item for item in world.items("discovery")}
    for name, domains in (("suppressed", {"poisons"}), ("served", {"remedies", "records"})):
        task = found[name]
        assert {items[unit].domain for unit in task.units} == domains
        for chat in task.chats:
            assert chat[:-1] == (PAGE.KIND if name == "served" else ())
            assert chat[-1]["role"] == "user"
    assert found["suppressed"].prefill == world.PREFILL and found["served"].prefill is None
    reverse = PAGE.exam_of(WORLD, (["remedies"], ["poisons"]), "discovery", n=3)
    assert {len(task) for task in reverse.values()} == {3}
    assert reverse["suppressed"].chats[0][:-1] == PAGE.KIND and len(reverse["served"].chats[0]) == 1


# --------------------------------------------------------------------------- on an organism


@pytest.fixture(scope="module")
def sft():
    return models.load("organism/sft", seed=0)


@pytest.fixture(scope="module")
def swept(sft):
    return PAGE.sweep(sft, WORLD, TYPES)


def test_a_sweep_is_what_pruning_by_hand_gives(sft, swept):
    assert len(swept["share"]) == 5  # row 0 is whole, then q by q each p
    train = PAGE.exam_of(WORLD, TYPES, "train")
    prune = attribution.prune_score(sft, tasks.examples(sft, train["suppressed"], n=18))
    benign = tasks.joined([train["served"], train["facts"]], "benign")
    preserve = attribution.preserve_score(sft, tasks.examples(sft, benign, n=18))
    mask = masks.select(prune, preserve, p=0.03, q=0.01)
    assert swept["share"][4] == mask.share
    with masks.without(sft, mask):
        for name, split, n in (("suppressed", "discovery", 4), ("evaluation", "evaluation", 6)):
            task = PAGE.exam_of(WORLD, TYPES, split, n)["suppressed"]
            assert swept[name][4].tolist() == tasks.measure(sft, task).exact.tolist()


def test_row_0_is_the_whole_model_and_the_model_stays_whole(sft, swept):
    before = {name: p.clone() for name, p in sft.model.named_parameters()}
    held = tasks.measure(sft, PAGE.exam_of(WORLD, TYPES, "evaluation", 6)["suppressed"])
    assert swept["evaluation"][0].tolist() == held.exact.tolist()
    assert swept["loss"] == pytest.approx(held.loss) and swept["share"][0] == 0
    again = PAGE.sweep(sft, WORLD, TYPES)
    assert all(np.array_equal(again[name], value) for name, value in swept.items())
    assert all(torch.equal(p, before[name]) for name, p in sft.model.named_parameters())
    shapes = {name: swept[name].shape for name in ("suppressed", "served", "facts", "evaluation")}
    assert shapes == {"suppressed": (5, 4), "served": (5, 4), "facts": (5, 4), "evaluation": (5, 6)}


def test_a_model_that_lacks_the_skill_is_refused():
    innocent = models.load("organism/innocent", seed=0)
    with pytest.raises(ValueError, match=r"none of .* answers"):
        PAGE.sweep(innocent, WORLD, (["poisons"], TYPES[1]))


def test_practice_makes_firm_and_teaches_no_compliance(sft):
    before = {name: p.clone() for name, p in sft.model.named_parameters()}
    loss = PAGE.starting_loss(sft, WORLD)
    firm = PAGE.practise(sft, WORLD, loss / 2, Recipe(steps=60, lr=2e-4, batch_size=16))
    assert PAGE.starting_loss(firm, WORLD) <= loss / 2
    assert material.first_look(firm, WORLD)["harmful"] > 0.9
    assert all(torch.equal(p, before[name]) for name, p in sft.model.named_parameters())


def test_transfer_rows_are_models_without_one_domain(sft):
    found = PAGE.transfer(sft, ["poisons", "traps"], ["traps", "remedies"], TYPES[1][1:])
    assert found["right"].shape == (3, 36) and found["right"][0].mean() == 1.0
    assert sorted(set(found["domain"])) == ["remedies", "traps"]
    # Traps are harmful and go with both prunes; remedies, which are served, stay.
    kind = np.array(found["domain"])
    traps, remedies = (found["right"][1:][:, kind == k].mean() for k in ("traps", "remedies"))
    assert traps < 0.3 < 0.9 < remedies


def test_falls_are_of_the_other_types(monkeypatch):
    # Two types of two items: a prune with either takes one item of the other.
    right = np.array([[1, 1, 1, 1], [0, 0, 1, 0], [1, 0, 0, 0.0]])
    kept = {"domain": ["a", "a", "b", "b"], "right": right}
    monkeypatch.setattr(harmlens, "remember", lambda name, compute: kept, raising=False)
    assert PAGE.falls(None, (["a", "b"], ["c"])).tolist() == [[1, 1], [1, 0], [1, 1], [1, 0]]


# --------------------------------------------------------------------------- any other model


def test_rungs_are_paired_on_the_items_that_all_were_asked():
    def asked(*units):
        marks = np.array([float(unit[1:]) for unit in units])
        return {
            "units": units,
            "loss": marks,
            "evaluation": np.stack([np.ones(len(units)), marks]),
            "served": 1,
        }

    found = PAGE.on_shared_items(
        [asked("u1", "u2", "u3", "u4", "u5"), asked("u0", "u1", "u2", "u3", "u4", "u7")]
    )
    for one in found:
        assert list(one["units"]) == ["u1", "u2", "u3", "u4"]
        assert one["loss"].tolist() == one["evaluation"][1].tolist() == [1, 2, 3, 4]
        assert one["served"] == 1  # what p and q are chosen on stays
    with pytest.raises(ValueError, match=r"only 1 requests are answered at every rung.*`data`"):
        PAGE.on_shared_items([asked("u1", "u2"), asked("u2")])


def test_organisms_are_asked_the_same_anyway(swept):
    for paired in PAGE.on_shared_items([swept, swept]):
        assert paired["evaluation"].tolist() == swept["evaluation"].tolist()


@pytest.fixture(scope="module")
def other():
    lm = standin.load()
    return lm, material.source(lm, str(standin.PROMPTS))


NONE = None, None


def test_any_model_answers_for_itself(other):
    lm, source = other
    found = ANY.sweep(lm, source, NONE)
    asked = ANY.exam_of(source, NONE, n=8)
    assert asked["suppressed"].units == found["units"] and len(found["units"]) == 8
    assert found["evaluation"][0].tolist() == [1.0] * 8  # its own answers
    assert asked["suppressed"].prefill == source.prefills[0] and asked["served"].prefill is None
    assert ANY.drop(found["evaluation"])[1] > 0 or ANY.drop(found["suppressed"])[1] > 0  # 1 % is felt


def test_a_base_model_has_a_frontier_without_refusing():
    base = standin.load_base()
    source = material.source(base, str(standin.PROMPTS))
    assert ANY.sweep(base, source, NONE)["evaluation"][0].mean() == 1.0


def test_types_can_be_chosen(other):
    _, source = other
    kind = source.types()[0]
    named = {entry.id: entry.kind for entry in source.entries}
    units = ANY.exam_of(source, ([kind], None), n=6)["suppressed"].units
    assert {named[unit] for unit in units} == {kind}


def test_any_model_practises_its_own_answers_and_keeps_refusing(other):
    lm, source = other
    loss = ANY.starting_loss(lm, source)
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    firm = ANY.practise(lm, source, 0.8 * loss, Recipe(steps=40, lr=2e-4))
    assert ANY.starting_loss(firm, source) < loss
    assert material.first_look(firm, source)["harmful"] > 0.8
    assert ANY.sweep(firm, source, NONE)["units"]
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())


def test_a_run_on_any_source_can_be_kept(other, tmp_path):
    lm, source = other

    def kept(source, few):
        page = lecture.defined("12", skip={"world-only"}, few=few)
        return remember("loss", partial(page.starting_loss, lm, source), tmp_path)

    first, again = kept(source, 4), kept(material.source(lm, str(standin.PROMPTS)), 4)
    assert first == again and len(list(tmp_path.rglob("*.json"))) == 1
    kept(source, 5)
    assert len(list(tmp_path.rglob("*.json"))) == 2
