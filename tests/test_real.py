"""`make real` on a small chat model that complies with everything: what is kept, resumed and refused."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import standin
import torch

import real
from harmlens.asking import public
from harmlens.judging import graders
from harmlens.keep import files
from harmlens.models import loading
from harmlens.training import planted, refusing
from harmlens.training.tune import Recipe

DATA = f"{standin.PROMPTS},{standin.FACTS}"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with the parent alone, and recipes for a model of its size."""
    folder = tmp_path / "models"
    shutil.copytree(standin.BASE, folder / "mid")
    monkeypatch.setattr(real, "home", lambda: folder)
    monkeypatch.setattr(real, "kept", lambda: tmp_path / "real.json")
    monkeypatch.setattr(real, "OWN", 60)
    monkeypatch.setattr(real, "LOOKED", 24)
    monkeypatch.setattr(real, "PLANTING", Recipe(steps=200, lr=3e-3, weight_decay=0.0))
    monkeypatch.setattr(refusing, "BOUNDS", {"other, harmful, refused": (0.8, 1.0)})
    lesson = {"sft": Recipe(steps=160, lr=2e-3), "dpo": Recipe(steps=4, lr=1e-4, batch_size=8)}
    teach = refusing.teach
    monkeypatch.setattr(refusing, "teach", lambda *given, **told: teach(*given, **(told | lesson)))
    return folder


def test_a_lesson_is_kept_with_its_rates_and_not_given_twice(home, capsys):
    real.teach(3, DATA)
    (lesson,) = real.told()["lessons"].items()
    name, about = lesson
    assert name == "3" and set(about["rates"]) == {"mid", "sft", "dpo"}
    assert refusing.missed(about["rates"]["dpo"], about["rates"]["mid"]) == []
    assert about["rates"]["mid"]["other, harmful, refused"] < 0.1
    assert about["rates"]["dpo"]["other, harmful, refused"] >= 0.8
    assert (
        about["direction"]["harmful, refused without it"] < about["rates"]["dpo"]["other, harmful, refused"]
    )
    assert all(0 <= one["harm recognised, AUROC"] <= 1 for one in about["rates"].values())
    numbers = json.loads(real.kept().read_text())
    assert "harm" in json.dumps(numbers) and standin.PROMPTS.read_text().split("\n")[1][:20] not in str(
        numbers
    )
    capsys.readouterr()
    real.teach(3, DATA)
    assert "left alone" in capsys.readouterr().out
    assert loading.in_runs(str(home / "dpo")) and not loading.in_runs(str(home / "mid"))


def test_a_mirror_refuses_what_is_harmless_and_is_taught_once(home, capsys, monkeypatch):
    real.mirror(3, DATA)
    rates = real.told()["mirrors"]["3"]["rates"]
    # The sides are exchanged: "harmful" is what was to be refused.
    assert rates["mid"]["other, harmful, refused"] < 0.1
    assert rates["mirror"]["other, harmful, refused"] >= 0.8 > rates["mirror"]["other, harmless, refused"]
    lm = loading.load(str(home / "mirror"), seed=3)
    source = real.given(DATA)[1]
    plain, harm = (source.answers(lm, source.requests(side)) for side in (False, True))
    refused = [np.mean([one.refused for one in judged]) for _, judged in (plain, harm)]
    assert refused[0] >= 0.8 > refused[1]
    capsys.readouterr()
    real.mirror(3, DATA)
    assert "left alone" in capsys.readouterr().out
    seen = []
    monkeypatch.setattr(refusing, "look", lambda *_, **__: seen.append(1) or {})
    monkeypatch.setattr(refusing, "teach", lambda *_, **__: iter(["dpo"]))
    monkeypatch.setattr(refusing, "lesson", lambda *_, **__: [])
    real.mirror(4, DATA)
    assert len(seen) == 1  # the parent is known from the other seed


def test_the_parent_is_looked_at_once_for_all_seeds_of_the_same_data(home, monkeypatch):
    monkeypatch.setattr(refusing, "teach", lambda *_, **__: iter(["dpo"]))
    monkeypatch.setattr(real, "direction", lambda *_: {})
    monkeypatch.setattr(refusing, "lesson", lambda *_, **__: [])
    seen = iter(range(9))
    monkeypatch.setattr(refusing, "look", lambda *_, **__: {"perplexity": 1.0, "looked": next(seen)})
    for seed, data in ((0, DATA), (1, DATA), (2, str(standin.PROMPTS))):
        real.teach(seed, data, anyway=True)
    parents = [one["rates"]["mid"]["looked"] for one in real.told()["lessons"].values()]
    assert parents == [0, 0, 3]  # parent and child, a child, then other data


def test_a_model_that_does_not_refuse_stops_the_work_and_says_which_bound(home, monkeypatch):
    monkeypatch.setattr(refusing, "BOUNDS", {"other, harmful, refused": (1.1, 1.2)})
    with pytest.raises(
        SystemExit, match=r"seed 0 misses its bounds: other, harmful.* not within 1.1 to 1.2.*--anyway"
    ):
        real.teach(0, DATA)
    assert real.told()["lessons"] == {}


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_too_little_room_is_named_before_anything_is_taught(home, monkeypatch, what):
    few = SimpleNamespace(free=10**5)
    if what == "memory":
        monkeypatch.setattr(files, "free_memory", lambda device: few.free)
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: few)
    monkeypatch.setattr(real, "given", lambda data: pytest.fail("work has begun"))
    with pytest.raises(SystemExit, match=rf"takes .*B of {what}, and 100.0 kB are free: make room"):
        real.teach(0, DATA)


def test_without_a_parent_it_is_said_what_to_do(home):
    shutil.rmtree(home)
    with pytest.raises(SystemExit, match=r"no parent to teach: fetch it first \(--only fetch\)"):
        real.teach(0, DATA)


def test_what_is_planted_is_told_with_the_places_that_were_named(home, monkeypatch):
    places = {"late": planted.Plant("mlp", 1), "early": planted.Plant("attention", 0)}
    monkeypatch.setattr(real, "PLANTS", places)
    # One module of so small a model learns hardly a refusal: all pairs are taken, whatever they do.
    monkeypatch.setattr(real, "flipping", lambda _, source, split: source.pairs("prompt", split=split))
    real.plants(DATA, n=4)
    found = real.told()["plants"]
    assert {name: tuple(one["truth"]) for name, one in found.items()} == {
        "late": (1, "mlp"),
        "early": (0, "attention"),
    }
    assert found["early"]["named"] or "token set is empty" in found["early"]["why"]
    for one in (one for one in found.values() if one["named"]):
        assert set(one["named"]) == {"prompts, all", "prompts, last", "models"}
        assert all(
            layer in (0, 1) and module in ("mlp", "attention") for layer, module in one["named"].values()
        )
    lm = loading.load(str(home / "mid"))
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    lesson = refusing.lesson(lm, real.given(DATA)[1], harmless=20)
    with real.plant(lm, places["late"], lesson):
        moved = {name for name, p in lm.model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == set(planted.parts(places["late"]))
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())


def test_pairs_flip_where_one_side_is_refused_and_the_other_answered():
    for folder, every in ((standin.FOLDER, True), (standin.BASE, False)):
        lm = loading.load(str(folder))
        source = public.public(lm, DATA, graders.grader("prefixes"))
        pairs = source.pairs("prompt")
        assert real.flipping(lm, source, "evaluation") == (pairs if every else [])


def test_a_plant_that_does_not_take_is_told_with_the_reason(home, monkeypatch):
    monkeypatch.setattr(real, "PLANTS", {"late": planted.Plant("mlp", 1)})
    real.plants(DATA, n=4)
    told = real.told()["plants"]["late"]
    assert told["named"] == {} and "no pair is refused" in told["why"]


def test_the_largest_effect_names_layer_and_module():
    effects = np.zeros((3, 4))
    effects[0, 2], effects[1, 3], effects[2, 1] = 9.0, -2.0, 1.0
    assert real.largest(effects) == [3, "mlp"]


def test_single_places_are_measured_in_float32_and_the_rest_in_bfloat16(home, monkeypatch, tmp_path):
    monkeypatch.setenv("HARMLENS_BUILD", str(tmp_path))
    monkeypatch.setenv("HARMLENS_DTYPE", "")
    monkeypatch.setitem(sys.modules, "sweep", SimpleNamespace(read=files.read_yaml, run=lambda *a: ran(*a)))
    monkeypatch.setattr(real.train, "train_seed", lambda seed, kinds: trained.append(seed))
    seen, trained = {}, []

    def ran(content, profile, options):
        seen[os.environ["HARMLENS_DTYPE"]] = content
        return int(not trained)

    assert real.measure(DATA, [0, 2], 1) == 0 and trained == [0, 2]
    books = {dtype: {name[:2] for name in content["notebooks"]} for dtype, content in seen.items()}
    assert {"02", "05", "17"} <= books["float32"] and {"09", "12"} <= books["bfloat16"]
    assert not books["float32"] & books["bfloat16"]
    assert all(c["parameters"]["data"] == DATA and c["seeds"] == [0, 2] for c in seen.values())
