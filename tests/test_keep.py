"""Where things are, files written whole, values that are kept until what decides them changes."""

import dataclasses
import functools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmlens.flow.patching import Effects
from harmlens.keep import digests, files, remember
from harmlens.models.forward import Row
from harmlens.training.tune import Recipe
from harmlens.weights import masks, scores

# --------------------------------------------------------------------------- where things are


@pytest.fixture
def no_variables(monkeypatch):
    monkeypatch.delenv("HARMLENS_DATA", raising=False)
    monkeypatch.delenv("HARMLENS_BUILD", raising=False)


def package_in(folder: Path, monkeypatch) -> Path:
    package = folder / "lib" / "harmlens"
    package.mkdir(parents=True)
    monkeypatch.setattr(files, "_PACKAGE", package)
    return package


def data_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "claims.yaml").write_text("claims: []")
    return folder


def test_clone(tmp_path, monkeypatch, no_variables):
    package_in(tmp_path, monkeypatch)
    data = data_in(tmp_path / "data")
    assert files.repo_root() == tmp_path
    assert files.data_dir() == data
    assert files.build_dir() == tmp_path / "build"


def test_installed_package_carries_its_data(tmp_path, monkeypatch, no_variables):
    data = data_in(package_in(tmp_path, monkeypatch) / "data")
    monkeypatch.chdir(tmp_path)
    assert files.repo_root() is None
    assert files.data_dir() == data
    assert files.build_dir() == tmp_path / "harmlens-build"


def test_variables_win_over_the_clone(tmp_path, monkeypatch):
    package_in(tmp_path / "clone", monkeypatch)
    data_in(tmp_path / "clone" / "data")
    other = data_in(tmp_path / "other")
    monkeypatch.setenv("HARMLENS_DATA", str(other))
    monkeypatch.setenv("HARMLENS_BUILD", str(tmp_path / "made"))
    assert files.data_dir() == other
    assert files.build_dir() == tmp_path / "made"


def test_without_data_the_message_names_both_remedies(tmp_path, monkeypatch, no_variables):
    package_in(tmp_path, monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"Reinstall.*HARMLENS_DATA"):
        files.data_dir()


def test_variable_that_points_nowhere_is_not_passed_over(tmp_path, monkeypatch):
    package_in(tmp_path, monkeypatch)
    data_in(tmp_path / "data")
    monkeypatch.setenv("HARMLENS_DATA", str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="HARMLENS_DATA is set to"):
        files.data_dir()


def test_the_real_data_folder_is_found():
    assert (files.data_dir() / "claims.yaml").is_file()


def test_free_memory_is_that_of_the_machine():
    found = files.free_memory("cpu")
    assert 10_000_000 < found < 1e14


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_000_000, "2.0 MB"), (3_250_000_000, "3.2 GB")],
)
def test_sizes_for_people(size, text):
    assert files.size_text(size) == text


def test_an_interruption_leaves_the_old_file(tmp_path):
    file = tmp_path / "new" / "file"
    files.write_whole(file, lambda part: part.write_text("first"))

    def fail(part):
        part.write_text("half of the sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_whole(file, fail)
    assert file.read_text() == "first"
    files.write_whole(file, lambda part: part.write_text("second"))
    assert [f.name for f in file.parent.iterdir()] == ["file"]
    assert file.read_text() == "second" and file.stat().st_mode & 0o777 == 0o644


# --------------------------------------------------------------------------- values that are kept

CALLS = []


def measure(lm, n=1, mask=None):
    """A run that counts how often it is made."""
    CALLS.append(n)
    return {
        "rates": np.arange(n) / 3,
        "flags": np.array([True, False]),
        "scores": {"w": torch.arange(3, dtype=torch.bfloat16), "large": torch.arange(40_000).view(2, -1)},
        "step": None,
        "nan": float("nan"),
        "list": [1, 2.5, "run"],
    }


def other(lm, n=1, mask=None):
    return measure(lm, n=n)


@pytest.fixture(autouse=True)
def fresh():
    CALLS.clear()


@pytest.fixture
def kept(tmp_path):
    def kept(*args, function=measure, **options):
        return remember("run", functools.partial(function, *args, **options), tmp_path)

    return kept


def test_the_same_run_is_made_once_and_comes_back_exactly(kept):
    first, second = kept(tiny.model(), n=3), kept(tiny.model(), n=3)
    assert CALLS == [3]
    for found in (first, second):
        assert found["rates"].tolist() == [0, 1 / 3, 2 / 3] and found["rates"].dtype == np.float64
        assert found["flags"].tolist() == [True, False] and found["flags"].dtype == bool
        assert found["step"] is None and found["list"] == [1, 2.5, "run"] and found["nan"] != found["nan"]
        assert torch.equal(found["scores"]["w"], torch.arange(3, dtype=torch.bfloat16))
        assert torch.equal(found["scores"]["large"], torch.arange(40_000).view(2, -1))


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
    monkeypatch.setattr("harmlens.keep.files.versions", lambda: {"torch": "0.0"})
    kept(lm)
    assert len(CALLS) == 7
    lm.tokenizer.chat_template = "changed"
    kept(lm)
    assert len(CALLS) == 8


def test_records_of_the_package_come_back_as_they_were(tmp_path):
    def made():
        outcome = torch.tensor([1.5])
        return Effects(
            ("layer",), (0, range(1, 3)), ("all",), ("a",), "noising", outcome, -outcome,
            torch.arange(2.0).view(1, 2, 1, 1), torch.ones(1, 2, 1, 1),
        )  # fmt: skip

    first, second = (remember("sweep", made, tmp_path) for _ in range(2))
    for found in (first, second):
        assert isinstance(found, Effects) and (found.layers, found.pairs) == (made().layers, ("a",))
        assert torch.equal(found.effects, made().effects)


def test_a_record_of_elsewhere_is_not_made(tmp_path):
    remember("one", lambda: {"record": [1]}, tmp_path)
    (file,) = tmp_path.rglob("*.json")
    content = json.loads(file.read_text())
    content["value"] = {"kept as": "subprocess:Popen", "fields": {"args": ["true"]}, "tuples": []}
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="holds a Popen of subprocess"):
        assert remember("one", lambda: {"record": [1]}, tmp_path) == {"record": [1]}


def test_a_key_in_words_does_for_a_function_without_arguments(tmp_path):
    lm, dose = tiny.model(), 2
    for n in (1, 2, 1):
        assert remember({"what": "doses", "model": lm, "n": n}, lambda n=n: [dose, n], tmp_path) == [2, n]
    assert len(list((tmp_path / "doses").glob("*.json"))) == 2
    remember({"what": "doses", "model": tiny.model(seed=1), "n": 1}, lambda n=1: [dose, n], tmp_path)
    assert len(list((tmp_path / "doses").glob("*.json"))) == 3


def test_a_damaged_or_foreign_file_is_named_and_made_anew(kept, tmp_path):
    kept(tiny.model())
    (file,) = tmp_path.rglob("*.json")
    good = json.loads(file.read_text())
    for text in ("", "{", "[]", "null", json.dumps(good | {"key": "other"})):
        file.write_text(text)
        with pytest.warns(UserWarning, match=f"{file.name}.* is damaged or foreign .*; it is made anew"):
            assert kept(tiny.model())["list"] == [1, 2.5, "run"]
    file.with_suffix(".safetensors").write_bytes(b"none")
    with pytest.warns(UserWarning, match="made anew"):
        kept(tiny.model())
    kept(tiny.model())
    assert len(CALLS) == 7


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


def test_of_two_processes_one_computes_and_the_other_waits(tmp_path):
    code = f"""if True:
        import pathlib, time, warnings
        from harmlens.keep import remember
        warnings.simplefilter("ignore")
        def slow():
            time.sleep(1)
            with open({str(tmp_path / "made")!r}, "a") as out:
                out.write("x")
            return 42
        assert remember("slow", slow, {str(tmp_path)!r}) == 42"""
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [one.wait(120) for one in running] == [0, 0]
    assert (tmp_path / "made").read_text() == "x"


def test_a_run_says_where_it_comes_from(kept, tmp_path):
    kept(dataclasses.replace(tiny.model(), revision="abc"), n=2)
    content = json.loads(next(tmp_path.rglob("*.json")).read_text())
    about = content["provenance"]
    assert about["model"]["revision"] == "abc" and about["wall_s"] is not None
    assert about["params"] == {"0": "'run'", "lm": "tiny/llama", "n": "2"} and about["packages"]["torch"]
    assert str(tmp_path) not in json.dumps(content)


def test_runs_go_to_the_build_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HARMLENS_BUILD", str(tmp_path))
    remember(tiny.model(), functools.partial(other, 1))
    assert files.build_dir() == tmp_path and list((tmp_path / "runs" / "other").glob("*.json"))


def test_what_cannot_be_kept_is_named(kept):
    with pytest.raises(TypeError, match="type object can't be kept"):
        kept(1, function=lambda value: {"value": object()})
    with pytest.raises(TypeError, match="an array of <U1 can't be kept"):
        kept(1, function=lambda value: np.array(["a"]))
    with pytest.raises(TypeError, match="object has no digest; give numbers"):
        kept(object())


# --------------------------------------------------------------------------- code that counts


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in a folder of its own, and the sum of the code of ``low.f`` as it is written now."""
    monkeypatch.setattr(digests, "_PACKAGE", tmp_path)

    def write(**modules):
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        digests._written.cache_clear()
        digests._reach.cache_clear()
        return digests._reach("harmlens." + "top")

    yield write
    digests._written.cache_clear()
    digests._reach.cache_clear()


def test_code_counts_as_far_as_it_is_imported_and_without_words(package):
    top = "from harmlens.low import f\n\ndef g(x):\n    'Words.'\n    return f(x)  # words\n"
    before = package(top=top, low="def f(x): return 1", plots="x = 1")
    assert package(plots="x = 2") == before, "it is not imported"
    assert package(top=top.replace("Words", "Other words").replace("# words", "")) == before
    assert package(low="\n\ndef f(x):\n    return 1") == before
    assert package(low="def f(x): return 2") != before, "what is imported counts"
    assert package(top=top.replace("f(x)", "f(x + 1)"), low="def f(x): return 1") != before
    inside = "def g(x):\n    from harmlens import low\n    return low.f(x)"
    assert package(top=inside) != package(low="def f(x): return 3"), "within a function too"


def test_plots_throw_away_no_scores():
    for module in ("harmlens.weights.scores", "harmlens.flow.patching"):
        digests._reach(module)
        seen, waiting = set(), [module]
        while waiting:
            if (name := waiting.pop()) not in seen:
                seen.add(name)
                waiting += digests._written(name)[1]
        assert "harmlens.models.forward" in seen and "harmlens.evidence.plots" not in seen


def test_a_function_of_a_notebook_counts_with_what_it_calls():
    def cell(text, names="measured"):
        scope = {"__name__": "__main__"}
        exec(textwrap.dedent(text), scope)
        return digests.digest(scope[names])

    one = "dose = 2\ndef inner(x): return x * dose\ndef measured(x): return inner(x)\n"
    assert cell(one) == cell(one + "# words\nother = 3\n")
    found = {cell(one), cell(one.replace("= 2", "= 3")), cell(one.replace("x * dose", "x + dose"))}
    assert len(found | {cell(one.replace("return inner", "return 1 + inner"))}) == 4
    notes = "notes = [{0}]\ndef measured(x): notes.append(x)\n"
    assert cell(notes.format(1)) == cell(notes.format(2)), "data are named by the key"
    assert cell("from harmlens.weights import scores\ndef measured(x): return scores.magnitude(x)") != cell(
        "from harmlens.weights import masks as scores\ndef measured(x): return scores.magnitude(x)"
    )
    with pytest.raises(TypeError, match=r"source of .* can't be read"):
        digests.digest(max)


def test_pages_need_no_torch():
    code = "import sys; import harmlens.keep, harmlens.evidence.results; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


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
