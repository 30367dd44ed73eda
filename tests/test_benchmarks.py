"""The benchmark compares like with like; what it measures depends on the machine and is not tested."""

import json
import sys

import pytest


@pytest.fixture(scope="module")
def bench(root):
    """The benchmark as a module."""
    sys.path.insert(0, str(root / "tests" / "benchmarks"))
    try:
        import run
    finally:
        sys.path.pop(0)
    return run


@pytest.fixture(scope="module")
def found(bench, tmp_path_factory):
    """A run on two pairs of one contrast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "CONTRASTS", ("prompt",))
        patch.setenv("HARMLENS_BUILD", str(tmp_path_factory.mktemp("build")))
        assert bench.main(["--pairs", "2", "--repeats", "1"]) == 0
        return json.loads((bench.build_dir() / "bench.json").read_text())


@pytest.mark.slow
def test_every_cell_equals_transformer_lens(bench, found):
    assert set(found) == {*bench.BARS, "machine"}
    for key in bench.BARS:
        assert found[key]["pairs"] == 2 and found[key]["cells"] > 20
        assert 0 <= found[key]["max_abs_diff"] <= 1e-4
        assert found[key]["ratio"] > 0 and found[key]["floor_ratio"] > 0
    assert found["patch_grid"]["cells"] == 20 * found["patch_last"]["cells"] == 20 * 3 * 8
    assert found["machine"]["threads"] == 1


def test_the_books_contrast_stands_in_front_and_hides_no_difference(bench):
    rows = {
        "prompt": {"ratio": 30.0, "max_abs_diff": 1e-5, "floor_ratio": 4.0, "seconds": 1.0},
        "behaviour": {"ratio": 20.0, "max_abs_diff": 2e-5, "floor_ratio": 3.0, "seconds": 2.0},
    }
    assert bench.headline(rows) == {**rows["prompt"], "max_abs_diff": 2e-5, "by_contrast": rows}


def test_the_floor_of_a_run_by_hand(bench):
    """Two blocks of 10 multiply-adds per token, 4 of them for keys and values; width 1."""
    floor = object.__new__(bench.Floor)
    facts = {"mlp": 3, "block": 10, "keys": 4, "width": 1, "depth": 2, "length": 3}
    for name, value in facts.items():
        object.__setattr__(floor, name, value)
    # Attention: 2 for each position looked at. Last block: keys for two positions, all for the third.
    full, final = (10 + 2) + (10 + 4) + (10 + 6), 4 + 4 + (10 + 6)
    assert floor.run([1, 1, 1]) == full + final
    assert floor.run([5, 5, 5], below=0) == 5 * final
    assert floor.run([5, 5, 5], below=1) == 0
    assert floor.run([7], below=-1) == 7 * 2 * (10 + 6)
