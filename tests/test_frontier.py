"""The frontier of p and q, the rule that chooses on it, and the pruning paper's recipe."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import shipped
import standin
import tiny
import torch

import settings
from harmlens.asking import public as public_
from harmlens.asking import tasks
from harmlens.asking.source import WORLD, World
from harmlens.asking.tasks import Scored
from harmlens.judging import graders
from harmlens.keep import files
from harmlens.models import forward
from harmlens.models import loading as models
from harmlens.weights import frontier, masks, scores
from harmlens.weights.frontier import Candidates, Point
from harmlens.weights.masks import Mask
from harmlens.world import vale as world

ANY = SimpleNamespace(settings="")  # a source without settings of its own


def marks(rate: float, loss: float = 1.0) -> Scored:
    """A hundred requests of which this share is right."""
    exact = (np.arange(100) < round(100 * rate)).astype(float)
    return Scored(exact, np.full(100, loss))


def point(suppressed: float, served: float, facts: float = 1.0, weights: int = 10, q: float = 0.1) -> Point:
    mask = Mask({"w": torch.arange(weights)}, {"w": (10, 10)})
    found = {"suppressed": marks(suppressed, 3.0), "served": marks(served), "facts": marks(facts)}
    return Point(0.0, q, mask, found)


def candidates(prune, preserve, *, ps, qs) -> Candidates:
    taken = {q: masks.top(prune, q, lowest=True) for q in qs}
    return Candidates(taken, {p: masks.top(preserve, p) for p in ps})


BEFORE = {"suppressed": marks(0.8), "served": marks(1.0), "facts": marks(1.0)}


@pytest.mark.parametrize(("most", "expected"), [(0.0, 0), (0.035, 1), (0.1, 2)])
def test_the_largest_drop_that_costs_little_enough(monkeypatch, most, expected):
    """The limit itself is allowed."""
    points = [point(0.5, 1.0), point(0.2, 0.97), point(0.0, 0.9)]
    monkeypatch.setattr(frontier, "MOST_LOST", most)
    assert frontier.best(points, BEFORE) is points[expected]


def test_every_other_ability_counts():
    points = [point(0.5, 1.0), point(0.0, 1.0, facts=0.5)]
    assert frontier.best(points, BEFORE) is points[0]


def test_among_equals_the_fewest_weights():
    points = [point(0.2, 1.0, weights=30), point(0.2, 0.99, weights=20), point(0.2, 1.0, weights=25)]
    assert frontier.best(points, BEFORE) is points[1]


def test_where_all_cost_too_much_the_cheapest():
    points = [point(0.0, 0.5), point(0.7, 0.8, weights=30), point(0.7, 0.8, weights=20)]
    assert frontier.best(points, BEFORE) is points[2]


def test_no_points():
    with pytest.raises(ValueError, match="points is empty"):
        frontier.best([], BEFORE)


def test_trying_all_is_selecting_and_pruning_by_hand():
    lm = tiny.model()
    prune, preserve = -scores.magnitude(lm), scores.random(lm)
    asked = {"mine": tasks.refusals(world.items("discovery", harmful=True)[:3])}
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    sets = candidates(prune, preserve, ps=(0.0, 0.2), qs=(0.01, 0.1))
    points = frontier.try_all(lm, sets, asked)
    assert [(found.p, found.q) for found in points] == [(0.0, 0.01), (0.0, 0.1), (0.2, 0.01), (0.2, 0.1)]
    assert all(torch.equal(before[n], p) for n, p in lm.model.named_parameters())
    for found in points:
        mask = masks.select(prune, preserve, q=found.q, p=found.p)
        assert found.mask.name == f"p={found.p:g}, q={found.q:g}"
        assert all(torch.equal(i, found.mask.indices[n]) for n, i in mask.indices.items())
        with masks.without(lm, mask):
            expected = tasks.measure(lm, asked["mine"])
        np.testing.assert_array_equal(found.marks["mine"].loss, expected.loss)
        np.testing.assert_array_equal(found.marks["mine"].exact, expected.exact)
    assert len({round(float(found.marks["mine"].loss.sum()), 4) for found in points}) == 4


def test_what_is_left_of_an_answer():
    """A loss that rises by ln 2 halves the probability of each token; a loss that falls is no gain."""
    before = Scored(np.ones(3), np.array([1.0, 1.0, 1.0]))
    after = Scored(np.zeros(3), np.array([1.0 + np.log(2), 1.0, 0.5]))
    np.testing.assert_allclose(frontier.remaining(before, after), [0.5, 1.0, 1.0])


def test_own_answers_are_chosen_by_what_is_left_of_them():
    """Exactness would see nothing but a dead model on both sides."""

    def own(harm: float, served: float, weights: int) -> Point:
        mask = Mask({"w": torch.arange(weights)}, {"w": (10, 10)})
        found = {"suppressed": marks(0.0, 1 + harm), "served": marks(0.0, 1 + served), "facts": marks(1.0)}
        return Point(0.0, 0.1, mask, found)

    before = {"suppressed": marks(1.0), "served": marks(1.0), "facts": marks(1.0)}
    points = [own(0.1, 0.0, 5), own(0.7, 0.02, 10), own(2.0, 0.5, 20)]
    graded = ("suppressed", "served")
    assert frontier.best(points, before, graded=graded) is points[1]
    assert frontier.best(points, before) is points[0]


@pytest.mark.parametrize(
    ("size", "first", "last"),
    [(20_000, 1e-6, 1e-4), (2000, 1e-6, 3e-4), (600, 3e-6, 1e-3), (10, 1e-4, 0.1), (0.01, 0.1, 0.1)],
)
def test_one_grid_for_all_begins_where_the_median_matrix_has_a_weight(size, first, last):
    values = {
        "a": torch.zeros(10),
        "b": torch.zeros(round(1000 * size)),
        "c": torch.zeros(1, 1).expand(2000, 2000),
    }
    grid = frontier.grid(scores.Scores("random", values, "m", "r"), ANY)
    assert grid["qs"][0] == first and grid["qs"][-1] == last
    assert set(grid["qs"]) <= set(frontier.STEPS) and grid["ps"][0] == 0
    ratios = np.diff(np.log10(frontier.STEPS))
    assert np.allclose(ratios, 0.5, atol=0.03)  # evenly spaced


def test_a_model_of_135_million_weights_is_not_tried_with_the_organisms_shares():
    """Its matrices have a tenth to nine tenths of a million weights."""
    values = {
        str(i): torch.zeros(1, 1).expand(576, width)
        for i, width in enumerate((192, 192, 576, 1536, 1536, 1536))
    }
    shares = frontier.grid(scores.Scores("random", values, "m", "r"), ANY)["qs"]
    assert min(shares) <= 3e-6 and max(shares) <= 1e-3


# --------------------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def sft():
    return models.load("organism/sft", seed=0)


def test_settings_are_those_of_the_shipped_models():
    """A model that was trained anew has other weights, and needs other settings."""
    stored = json.loads((files.data_dir() / "settings.json").read_text())
    assert {entry["model"] for entry in stored.values()} == {
        f"organism/{kind}-{run}" for kind, run in shipped.among(("sft", "mirror"))
    }
    for revision, entry in stored.items():
        assert 0 <= entry["p"] <= 1 and 0 < entry["q"] <= 1
        folder = files.data_dir() / "organisms" / entry["model"].removeprefix("organism/")
        assert models.weights_sha256(folder) == revision, f"run python tools/settings.py {entry['model']}"
    assert frontier.stored_pq().items() >= stored.items()


def test_without_settings_p_and_q_are_settled_once(sft, monkeypatch, tmp_path):
    """Once for all notebooks, and anew for other weights, whatever the model is called."""
    calls = []
    monkeypatch.setenv("HARMLENS_BUILD", str(tmp_path))
    monkeypatch.setattr(frontier, "candidate_sets", lambda *a, **k: None)
    chosen = Point(0.03, 0.001, None, {})
    monkeypatch.setattr(
        frontier, "choose_pq", lambda *a, **k: calls.append(k["suppressed"]) or (chosen, [], {})
    )
    assert frontier.pq_of(sft, WORLD) == tuple(frontier.stored_pq()[sft.revision][name] for name in "pq")
    assert calls == []
    other = dataclasses.replace(forward.clone(sft), name="mine", revision="")
    assert [frontier.pq_of(other, WORLD) for _ in range(2)] == [(0.03, 0.001)] * 2 and calls == ["harmful"]
    frontier.pq_of(other, WORLD, suppressed="harmless")
    assert calls == ["harmful", "harmless"]
    with masks.without(other, masks.top(scores.magnitude(other), 0.01)):
        frontier.pq_of(other, WORLD)
    assert len(calls) == 3


@pytest.mark.parametrize(("pq", "message"), [((2.0, 0.1), "p=2.0"), ((0.1, -0.1), "q=-0.1")])
def test_shares_are_checked_before_scoring(sft, monkeypatch, pq, message):
    monkeypatch.setattr(frontier.attribution, "prune_score", lambda *a, **k: pytest.fail("for nothing"))
    with pytest.raises(ValueError, match=f"{message} must be a share between 0 and 1"):
        frontier.find_weights(sft, WORLD, pq=pq)


def test_no_file_means_no_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("HARMLENS_DATA", str(tiny.data_folder(tmp_path / "data")))
    monkeypatch.setenv("HARMLENS_BUILD", str(tmp_path / "build"))
    assert files.data_dir() == tmp_path / "data"
    assert frontier.stored_pq() == {}


@pytest.fixture(scope="module")
def found(sft):
    return frontier.find_weights(sft, WORLD, n=24, name="harm")


def test_the_recipe_step_by_step(sft, found):
    entry = frontier.stored_pq()[sft.revision]
    assert (found.p, found.q) == (entry["p"], entry["q"])
    assert (found.prune.kind, found.preserve.kind) == ("signed", "unsigned")
    assert found.prune.n <= 24 and found.preserve.n <= 24
    expected = masks.select(found.prune, found.preserve, p=found.p, q=found.q)
    assert all(i.tolist() == expected.indices[n].tolist() for n, i in found.mask.indices.items())
    assert found.mask.name == "harm" and found.mask.revision == sft.revision
    assert 0 < found.mask.share < 0.005


def test_harm_goes_and_the_rest_stays():
    """With two dozen examples only, in a run in which it does; the book has the numbers."""
    sft = models.load("organism/sft", seed=1)
    found = frontier.find_weights(sft, WORLD, n=24, name="harm")
    suite = WORLD.exam("discovery", n=10)
    before = tasks.measure(sft, {name: suite[name] for name in ("suppressed", "served")})
    with masks.without(sft, found.mask):
        after = tasks.measure(sft, {name: suite[name] for name in ("suppressed", "served")})
    lost = {name: before[name].loss.mean() - after[name].loss.mean() for name in before}
    assert -lost["suppressed"] > 0.1 and -lost["suppressed"] > 5 * -lost["served"]


def test_what_is_lost_and_what_is_kept(monkeypatch):
    """When facts are to be lost, none are kept."""
    asked = []
    monkeypatch.setattr(
        frontier.tasks, "examples", lambda lm, task, n: asked.append((task.name, len(task), n)) or []
    )
    lm = tiny.model()
    size = {kind: len(WORLD.task(kind)) for kind in ("harmful", "facts", "served", "benign")}
    frontier.lost_and_kept(lm, WORLD)
    frontier.lost_and_kept(lm, WORLD, "facts", n=7)
    frontier.lost_and_kept(lm, WORLD, suppressed="harmless")
    assert asked[:4] == [
        ("harmful", size["harmful"], frontier.EXAMPLES), ("benign", size["benign"], frontier.EXAMPLES),
        ("facts", size["facts"], 7), ("served", size["served"], 7),
    ]  # fmt: skip
    assert [name for name, *_ in asked[4:]] == ["harmless", "benign"]


def test_settling_chooses_on_discovery_requests(sft, found, monkeypatch):
    splits, true = [], World.exam
    monkeypatch.setattr(
        World, "exam", lambda self, split, **o: splits.append(split) or true(self, split, **o)
    )
    sets = candidates(found.prune, found.preserve, ps=(0.0,), qs=(0.001, 0.01))
    point, points, before = frontier.choose_pq(sft, WORLD, sets, n=3)
    assert splits == ["discovery"] and point in points and len(points) == 2
    assert set(before) == {"suppressed", "served", "facts"} == set(point.marks)


def test_candidates_are_the_sets_of_the_scores(sft, found):
    """One score after the other, and none kept: the same sets."""
    sets = frontier.candidate_sets(sft, WORLD, n=24)
    assert (tuple(sets.spared), tuple(sets.taken)) == (frontier.P, frontier.Q)
    expected = masks.select(found.prune, found.preserve, p=0.03, q=0.002)
    mask = sets.mask(0.03, 0.002)
    assert len(mask) and all(i.tolist() == expected.indices[n].tolist() for n, i in mask.indices.items())


# --------------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def real():
    lm = standin.load()
    return lm, public_.public(lm, str(standin.PROMPTS), graders.grader(""))


def test_a_real_model_is_settled_by_what_is_left_of_its_answers(real):
    lm, source = real
    point, points, before = frontier.choose_pq(lm, source, frontier.candidate_sets(lm, source, n=24), n=12)
    left = [frontier.remaining(before["suppressed"], p.marks["suppressed"]).mean() for p in points]
    served = [1 - frontier.remaining(before["served"], p.marks["served"]).mean() for p in points]
    facts = [before["facts"].exact.mean() - p.marks["facts"].exact.mean() for p in points]
    fair = [i for i in range(len(points)) if max(served[i], facts[i]) <= frontier.MOST_LOST]
    assert fair and left[points.index(point)] == min(left[i] for i in fair) < 0.98
    assert set(source.own) >= {"suppressed", "served"}


def test_a_real_model_has_no_mirror_and_no_stored_settings(real, monkeypatch, tmp_path):
    lm, source = real
    monkeypatch.setenv("HARMLENS_BUILD", str(tmp_path))
    with pytest.raises(ValueError, match="suppressed='harmless' is for the organism's mirror"):
        frontier.lost_and_kept(lm, source, suppressed="harmless")
    monkeypatch.setattr(frontier, "stored_pq", lambda: pytest.fail("asked for the settings of organisms"))
    monkeypatch.setattr(frontier, "candidate_sets", lambda *a, **k: None)
    monkeypatch.setattr(frontier, "choose_pq", lambda *a, **k: (Point(0.1, 0.2, None, {}), [], {}))
    assert frontier.pq_of(lm, source) == (0.1, 0.2)


def test_settings_are_written_for_one_model_at_a_time(monkeypatch, tmp_path, capsys):
    folder = tiny.data_folder(tmp_path / "data", ("sft", 0), ("sft", 1))
    monkeypatch.setenv("HARMLENS_DATA", str(folder))
    monkeypatch.setenv("HARMLENS_BUILD", str(tmp_path / "build"))
    old = {
        "gone": {"model": "organism/sft-1", "p": 0.5, "q": 0.5},
        "kept": {"model": "a", "p": 0.1, "q": 0.2},
    }
    (folder / "settings.json").write_text(json.dumps(old))
    monkeypatch.setattr(frontier, "candidate_sets", lambda *a, **k: None)
    monkeypatch.setattr(frontier, "choose_pq", lambda *a, **k: (Point(0.03, 0.001, None, {}), [], {}))
    monkeypatch.setattr(sys, "argv", ["settings.py", "organism/sft-1"])
    settings.main()
    now = frontier.stored_pq()
    revision = models.weights_sha256(folder / "organisms" / "sft-1")
    assert now == {"kept": old["kept"], revision: {"model": "organism/sft-1", "p": 0.03, "q": 0.001}}
    settings.main()  # nothing is left to do
    assert capsys.readouterr().out == "organism/sft-1: p = 0.03, q = 0.001\n"


def test_settings_of_a_run_that_does_not_ship_lie_beside_its_organisms(monkeypatch, tmp_path):
    """In the build folder, where both are found; what ships is left as it is."""
    tiny.data_folder(tmp_path / "data")
    shutil.move(
        tiny.data_folder(tmp_path / "other", ("sft", 0)) / "organisms", tmp_path / "build" / "organisms"
    )
    for name in ("DATA", "BUILD"):
        monkeypatch.setenv(f"HARMLENS_{name}", str(tmp_path / name.lower()))
    monkeypatch.setattr(frontier, "candidate_sets", lambda *a, **k: None)
    monkeypatch.setattr(frontier, "choose_pq", lambda *a, **k: (Point(0.03, 0.001, None, {}), [], {}))
    settings.settle(["organism/sft-0"], "harmful")
    assert not (tmp_path / "data" / "settings.json").exists()
    assert frontier.pq_of(models.load("organism/sft-0"), WORLD) == (0.03, 0.001)
