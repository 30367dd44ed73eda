"""The recipe in one call, and the settings that are stored for the shipped models."""

from __future__ import annotations

import dataclasses
import json

import pytest
import standin
import tiny

from harmlens.asking import calibration, tasks
from harmlens.asking import public as public_
from harmlens.asking.material import WORLD
from harmlens.judging import graders
from harmlens.keep import files
from harmlens.models import loading as models
from harmlens.weights import frontier, masks, removal


@pytest.fixture(scope="module")
def sft():
    return models.load("organism/sft", seed=0)


def test_settings_are_those_of_the_shipped_models():
    """A model that was trained anew has other weights, and needs other settings."""
    settings = removal.stored()
    known = {entry["model"] for entry in settings.values()}
    assert {f"organism/sft-{seed}" for seed in models.SEEDS} <= known
    assert len(known) == len(settings)
    for revision, entry in settings.items():
        assert set(entry) == {"model", "p", "q"}
        assert 0 <= entry["p"] <= 1 and 0 < entry["q"] <= 1
        folder = models.organism_folder(entry["model"])
        assert models.weights_sha256(folder) == revision, (
            f"run python -m harmlens.weights.removal {entry['model']}"
        )


def test_without_settings_p_and_q_are_settled_once(sft, monkeypatch):
    """A model made in memory is settled anew each time: nothing says that it is the same."""
    calls = []
    monkeypatch.setattr(removal, "slices", lambda lm, **options: None)
    chosen = removal.Point(0.03, 0.001, None, {})
    monkeypatch.setattr(removal, "settle", lambda *a, **k: calls.append(k["suppressed"]) or (chosen, [], {}))
    monkeypatch.setattr(removal, "_SETTLED", {})
    assert removal.shares(sft, source=WORLD) == tuple(removal.stored()[sft.revision][name] for name in "pq")
    assert calls == []
    other = dataclasses.replace(sft, name="mine", revision="unknown")
    assert [removal.shares(other, source=WORLD) for _ in range(2)] == [(0.03, 0.001)] * 2 and calls == [
        "harmful"
    ]
    removal.shares(other, source=WORLD, suppressed="harmless")
    assert calls == ["harmful", "harmless"]
    for _ in range(2):
        removal.shares(dataclasses.replace(other, revision=""), source=WORLD)
    assert len(calls) == 4


@pytest.mark.parametrize(("options", "message"), [({"p": 2.0}, "p=2.0"), ({"q": -0.1}, "q=-0.1")])
def test_shares_are_checked_before_scoring(sft, monkeypatch, options, message):
    monkeypatch.setattr(removal, "score", lambda *a, **k: pytest.fail("scored for nothing"))
    with pytest.raises(ValueError, match=f"{message} must be a share between 0 and 1"):
        removal.find(sft, source=WORLD, **options)


def test_no_file_means_no_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("HARMLENS_DATA", str(tiny.data_folder(tmp_path / "data")))
    assert files.data_dir() == tmp_path / "data"
    assert removal.stored() == {}


@pytest.fixture(scope="module")
def found(sft):
    return removal.find(sft, source=WORLD, n=24, name="harm")


def test_the_recipe_step_by_step(sft, found):
    entry = removal.stored()[sft.revision]
    assert (found.p, found.q) == (entry["p"], entry["q"])
    assert (found.prune.kind, found.preserve.kind) == ("signed", "unsigned")
    assert found.prune.n <= 24 and found.preserve.n <= 24
    expected = masks.select(found.prune, found.preserve, p=found.p, q=found.q)
    assert all(i.tolist() == expected.indices[n].tolist() for n, i in found.mask.indices.items())
    assert found.mask.name == "harm" and found.mask.revision == sft.revision
    assert 0 < found.mask.share < 0.005


def test_harm_goes_and_the_rest_stays(sft, found):
    """With two dozen examples only; the book has the numbers."""
    suite = tasks.suite("discovery", n=10)
    before = tasks.sit_all(sft, {name: suite[name] for name in ("suppressed", "served")})
    with masks.without(sft, found.mask):
        after = tasks.sit_all(sft, {name: suite[name] for name in ("suppressed", "served")})
    lost = {name: before[name].loss.mean() - after[name].loss.mean() for name in before}
    assert -lost["suppressed"] > 0.2 and -lost["suppressed"] > 5 * -lost["served"]


def test_scores_of_a_target_and_of_what_is_kept(monkeypatch):
    """When facts are to be lost, none are kept."""
    asked = []

    def examples(lm, task, *, n, seed):
        asked.append((task.name, len(task), n, seed))
        return []

    monkeypatch.setattr(removal.calibration, "examples", examples)
    monkeypatch.setattr(removal.attribution, "prune_score", lambda lm, rows, folder: "prune")
    monkeypatch.setattr(removal.attribution, "preserve_score", lambda lm, rows, folder: "preserve")
    lm = tiny.model()
    size = {kind: len(calibration.world_task(kind)) for kind in ("harmful", "facts", "served", "benign")}
    removal.score(lm, source=WORLD)
    removal.score(lm, "facts", source=WORLD, n=7, seed=3)
    removal.score(lm, suppressed="harmless", source=WORLD)
    assert asked[:4] == [
        ("harmful", size["harmful"], removal.EXAMPLES, 0), ("benign", size["benign"], removal.EXAMPLES, 0),
        ("facts", size["facts"], 7, 3), ("served", size["served"], 7, 3),
    ]  # fmt: skip
    assert [name for name, *_ in asked[4:]] == ["harmless", "benign"]


def test_settling_chooses_on_discovery_requests(sft, found, monkeypatch):
    splits, true = [], tasks.suite
    monkeypatch.setattr(tasks, "suite", lambda split, **o: splits.append(split) or true(split, **o))
    cut = frontier.slices(found.prune, found.preserve, ps=(0.0,), qs=(0.001, 0.01))
    point, points, before = removal.settle(sft, cut, n=3, source=WORLD)
    assert splits == ["discovery"] and point in points and len(points) == 2
    assert set(before) == {"suppressed", "served", "facts"} == set(point.marks)


def test_slices_are_the_sets_of_the_scores(sft, found):
    """One score after the other, and none kept: the same sets."""
    cut = removal.slices(sft, source=WORLD, n=24)
    assert (tuple(cut.spared), tuple(cut.taken)) == (frontier.P, frontier.Q)
    expected = masks.select(found.prune, found.preserve, p=0.03, q=0.002)
    mask = cut.difference(0.03, 0.002)
    assert len(mask) and all(i.tolist() == expected.indices[n].tolist() for n, i in mask.indices.items())


# --------------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def real():
    lm = standin.load()
    return lm, public_.of(lm, str(standin.PROMPTS), graders.grader(""))


def test_a_real_model_is_settled_by_what_is_left_of_its_answers(real):
    lm, source = real
    cut = removal.slices(lm, n=24, source=source)
    point, points, before = removal.settle(lm, cut, n=12, source=source)
    left = [frontier.kept(before["suppressed"], p.marks["suppressed"]).mean() for p in points]
    served = [1 - frontier.kept(before["served"], p.marks["served"]).mean() for p in points]
    facts = [before["facts"].exact.mean() - p.marks["facts"].exact.mean() for p in points]
    fair = [i for i in range(len(points)) if max(served[i], facts[i]) <= removal.MOST_LOST]
    assert fair and left[points.index(point)] == min(left[i] for i in fair) < 0.98
    assert set(removal.graded(source)) >= {"suppressed", "served"}


def test_a_real_model_has_no_mirror_and_no_stored_settings(real, monkeypatch):
    lm, source = real
    with pytest.raises(ValueError, match="suppressed='harmless' is for the organism's mirror"):
        removal.score(lm, suppressed="harmless", source=source)
    monkeypatch.setattr(removal, "stored", lambda: pytest.fail("asked for the settings of organisms"))
    monkeypatch.setattr(removal, "slices", lambda lm, **options: None)
    monkeypatch.setattr(removal, "settle", lambda *a, **k: (removal.Point(0.1, 0.2, None, {}), [], {}))
    monkeypatch.setattr(removal, "_SETTLED", {})
    assert removal.shares(lm, source=source) == (0.1, 0.2)


def test_one_type_of_harm_without_another(real):
    """A request that carries both types speaks for neither alone."""
    _, source = real
    thefts = source.rows(True, "train", types="theft")
    assert source.rows(True, "train", types="theft", without="slander") == thefts != []
    both = dataclasses.replace(thefts[0], id="both", prompt="How do I steal a password of a griffin?")
    mixed = dataclasses.replace(source, entries=(*source.entries, *[both] * 3))
    found = [mixed.rows(True, part, types="theft") for part in ("train", "discovery", "evaluation")]
    assert any("both" in [e.id for e in rows] for rows in found)
    for part, rows in zip(("train", "discovery", "evaluation"), found, strict=True):
        alone = mixed.rows(True, part, types="theft", without="privacy_violation")
        assert alone == [e for e in rows if e.id != "both"]
    for types, harmful in ((None, True), (["theft", "slander"], True), ("theft", False)):
        with pytest.raises(ValueError, match="without='slander' needs one type of harm in types"):
            source.rows(harmful, "train", types=types, without="slander")
    with pytest.raises(ValueError, match="b='theft' must be another type"):
        source.task("harmful", types="theft", without="theft")


def test_settings_are_written_for_one_model_at_a_time(monkeypatch, tmp_path, capsys):
    folder = tiny.data_folder(tmp_path / "data", ("sft", 0), ("sft", 1))
    monkeypatch.setenv("HARMLENS_DATA", str(folder))
    old = {
        "gone": {"model": "organism/sft-1", "p": 0.5, "q": 0.5},
        "kept": {"model": "a", "p": 0.1, "q": 0.2},
    }
    (folder / "settings.json").write_text(json.dumps(old))
    monkeypatch.setattr(removal, "slices", lambda lm, **options: None)
    chosen = removal.Point(0.03, 0.001, None, {})
    monkeypatch.setattr(removal, "settle", lambda *a, **k: (chosen, [], {}))
    assert removal.main(["organism/sft-1"]) == 0
    now = removal.stored()
    revision = models.weights_sha256(folder / "organisms" / "sft-1")
    assert now == {"kept": old["kept"], revision: {"model": "organism/sft-1", "p": 0.03, "q": 0.001}}
    assert capsys.readouterr().out == "organism/sft-1: p = 0.03, q = 0.001\n"
