"""Finished runs are kept, and a change of anything that decides them is noticed."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmlens.keep import cache, digests, paths
from harmlens.models.forward import Row
from harmlens.training.finetune import Recipe
from harmlens.weights import masks, scores

CALLS = []


def measure(lm, *, n=1, mask=None):
    """A run that counts how often it is made."""
    CALLS.append(n)
    return {
        "rates": np.arange(n) / 3,
        "flags": np.array([True, False]),
        "step": None,
        "name": "run",
        "list": [1, 2.5],
    }


def other(lm, *, n=1, mask=None):
    return measure(lm, n=n)


@pytest.fixture(autouse=True)
def fresh():
    CALLS.clear()


@pytest.fixture
def kept(tmp_path):
    return lambda *args, function=measure, **options: cache.kept(function, *args, folder=tmp_path, **options)


def test_the_same_run_is_made_once_and_comes_back_exactly(kept):
    first, second = kept(tiny.model(), n=3), kept(tiny.model(), n=3)
    assert CALLS == [3]
    for found in (first, second):
        assert found["rates"].tolist() == [0, 1 / 3, 2 / 3] and found["rates"].dtype == np.float64
        assert found["flags"].tolist() == [True, False] and found["flags"].dtype == bool
        assert (found["step"], found["name"], found["list"]) == (None, "run", [1, 2.5])


def test_whatever_decides_a_run_makes_another_one(kept, monkeypatch):
    lm = tiny.model()
    kept(lm)
    every = scores.magnitude(lm)
    mask = masks.top(every, 0.01)
    kept(lm, n=2)  # a setting
    kept(lm, mask=mask)  # a set of weights
    kept(lm, mask=masks.random_like(mask))
    kept(lm, function=other)  # another function
    with masks.without(lm, mask):
        kept(lm)  # the same model with other weights, under the same name and revision
    assert len(CALLS) == 6
    kept(lm)
    assert len(CALLS) == 6
    monkeypatch.setattr(digests, "code", lambda: "changed")
    kept(lm)
    assert len(CALLS) == 7
    monkeypatch.setattr(digests, "versions", lambda: {"torch": "0.0"})
    kept(lm)
    assert len(CALLS) == 8
    lm.tokenizer.chat_template = "changed"
    kept(lm)
    assert len(CALLS) == 9


def test_a_changed_source_is_another_function(tmp_path, kept):
    def run(text):
        scope = {}
        file = tmp_path / f"{len(text)}.py"
        file.write_text(text)
        exec(compile(text, str(file), "exec"), scope)
        return scope["f"]

    one, two = run("def f(n):\n    return n\n"), run("def f(n):\n    return n + 1\n")
    assert kept(3, function=one) == 3
    assert kept(3, function=two) == 4
    with pytest.raises(TypeError, match=r"source of .* can't be read"):
        kept(3, function=max)


def test_the_code_of_the_library_is_in_the_digest(tmp_path, monkeypatch):
    digests.code.cache_clear()
    before = digests.code()
    monkeypatch.setattr(digests, "__file__", str(tmp_path / "digests.py"))
    digests.code.cache_clear()
    (tmp_path / "world.py").write_text("x = 1\n")
    first = digests.code()
    digests.code.cache_clear()
    (tmp_path / "world.py").write_text("x = 2\n")
    assert len({before, first, digests.code()}) == 3
    digests.code.cache_clear()


def test_a_damaged_file_is_run_again(kept, tmp_path):
    kept(tiny.model())
    (file,) = tmp_path.rglob("*.json")
    for text in ("", "{", "[]", "null", json.dumps({"key": "other", "result": 1})):
        file.write_text(text)
        assert kept(tiny.model())["name"] == "run"
    assert len(CALLS) == 6


def test_an_interrupted_series_keeps_what_was_finished(kept):
    def series(upto):
        for n in range(upto):
            kept(tiny.model(), n=n)
            if n == 2 and upto == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        series(5)
    series(4)
    assert CALLS == [0, 1, 2, 3]


def test_a_run_says_where_it_comes_from(kept, tmp_path):
    kept(dataclasses.replace(tiny.model(), revision="abc"), n=2)
    content = json.loads(next(tmp_path.rglob("*.json")).read_text())
    about = content["provenance"]
    assert content["function"] == "measure" and about["model"]["revision"] == "abc"
    assert (
        about["params"] == {"lm": "tiny/llama", "n": "2"}
        and about["packages"]["torch"]
        and about["wall_s"] is not None
    )
    assert str(tmp_path) not in json.dumps(content)


def test_runs_go_to_the_build_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HARMLENS_BUILD", str(tmp_path))
    cache.kept(measure, tiny.model())
    assert paths.build_dir() == tmp_path and list((tmp_path / "runs" / "measure").glob("*.json"))


def test_what_cannot_be_kept_is_named(kept):
    def lost(value):
        return {"value": object()}

    def words(value):
        return np.array(["a"])

    with pytest.raises(TypeError, match="type object can't be kept"):
        kept(1, function=lost)
    with pytest.raises(TypeError, match="an array of <U1 can't be kept"):
        kept(1, function=words)
    with pytest.raises(TypeError, match="object has no digest; give numbers"):
        kept(object())


# --------------------------------------------------------------------------- digests

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(plain, plain)
def test_equal_things_and_only_they_have_equal_digests(a, b):
    assert (digests.digest(a) == digests.digest(b)) == (repr(a) == repr(b))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (("ab", "c"), ("a", "bc")),
        (([1, 2], 3), ([1], [2, 3])),
        ((1,), ("1",)),
        ((1,), (True,)),
        ((Recipe(),), (Recipe(seed=1),)),
        ((Row([1], [True]),), (Row([1], [False]),)),
        ((np.zeros(2),), (np.zeros((2, 1)),)),
        ((np.zeros(1),), (np.zeros(2, np.float32),)),
        ((torch.zeros(2),), (torch.tensor([0.0, -0.0]),)),
        ((torch.zeros(2, dtype=torch.float32),), (torch.zeros(2, dtype=torch.int32),)),
        (({"a": 1},), ({"a": 2},)),
    ],
)
def test_things_that_are_easily_mixed_up(a, b):
    assert digests.digest(*a) != digests.digest(*b)
    assert digests.digest(*a) == digests.digest(*a)


def test_bfloat16_weights_have_a_digest():
    lm = tiny.model()
    half = dataclasses.replace(lm, model=tiny.model().model.to(torch.bfloat16))
    assert digests.digest(half) != digests.digest(lm)


def test_the_same_weights_under_another_configuration_are_another_model():
    lm, other = tiny.model(), tiny.model()
    other.model.config.rms_norm_eps = 1.0
    assert digests.digest(other) != digests.digest(lm)
    moved = tiny.model()
    moved.model.config._name_or_path = "elsewhere"
    assert digests.digest(moved) == digests.digest(lm)
