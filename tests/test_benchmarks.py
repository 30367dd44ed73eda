"""The benchmark compares like with like; what it measures depends on the machine and is not tested."""

import json
import sys

import pytest
import torch

SMALL = {"layers": 2, "width": 32, "hidden": 64, "heads": 4, "vocabulary": 50}


@pytest.fixture(scope="module")
def folder(root):
    """The benchmarks can be imported while this lasts."""
    sys.path.insert(0, str(root / "tests" / "benchmarks"))
    yield
    sys.path.remove(str(root / "tests" / "benchmarks"))


@pytest.fixture(scope="module")
def bench(folder):
    """The benchmark as a module."""
    import run

    return run


@pytest.fixture(scope="module")
def found(bench, tmp_path_factory):
    """A run on two pairs of one contrast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "CONTRASTS", ("prompt",))
        patch.setattr(bench.weight_scores, "DEEP", SMALL)
        patch.setattr(bench.weight_scores, "DEEP_ROWS", 2)
        patch.setattr(bench.weight_scores, "FEW", 2)
        patch.setenv("HARMLENS_BUILD", str(tmp_path_factory.mktemp("build")))
        small = ["--pairs", "2", "--repeats", "1", "--examples", "2", "--weights", "300000"]
        assert bench.main(small) == 0
        return json.loads((bench.build_dir() / "bench.json").read_text())


@pytest.mark.slow
def test_every_cell_equals_transformer_lens(bench, found):
    assert set(found) == {*bench.BARS, *bench.weight_scores.BARS, "select", "machine"}
    for key in bench.BARS:
        assert found[key]["pairs"] == 2 and found[key]["cells"] > 20
        assert 0 <= found[key]["max_abs_diff"] <= 1e-4
        assert found[key]["ratio"] > 0 and found[key]["floor_ratio"] > 0
    assert found["patch_grid"]["cells"] == 20 * found["patch_last"]["cells"] == 20 * 3 * 8
    assert found["machine"]["threads"] == 1


@pytest.mark.slow
def test_scores_equal_the_released_procedure(bench, found):
    """The bars of speed and memory are for the full benchmark; these are what holds for any machine."""
    for key, bars in bench.weight_scores.BARS.items():
        row = found[key]
        assert 0 < row["max_rel_diff"] <= bars["max_rel_diff"]
        assert row["ratio"] > 0 and row["floor_ratio"] > 0
        assert (row["harmful"], row["benign"]) == (2, 2)
    assert (found["attribution"]["layers"], found["attribution_24l"]["layers"]) == (8, 2)
    off = found["attribution"]["against_float64"]
    assert 0 < off["ours"] < 3e-5 and set(off) == {"ours", "released", "released_own_loss"}
    memory = found["attribution_24l"]["memory"]
    # Embeddings and head, four square and three oblong matrices, two norms in each block, one behind.
    block = 4 * 32 * 32 + 3 * 32 * 64
    assert memory["signed"]["weights"] == 4 * (2 * 50 * 32 + 2 * (block + 2 * 32) + 32)
    assert memory["signed"]["accumulators"] == memory["unsigned"]["accumulators"] == 4 * 2 * block
    assert memory["signed+unsigned"]["accumulators"] == 2 * memory["signed"]["accumulators"]
    assert found["attribution_24l"]["peak_over_floor"] > 0
    assert found["select"]["weights"] == 300_000 and 1 <= found["select"]["selected"] <= 3
    assert found["select"]["ns_per_weight"] > 0


def test_the_released_procedure_by_hand(bench):
    """One example: the signed score is W times its gradient, the unsigned one the size of that."""
    scores = bench.weight_scores
    lm = scores.random_model(**SMALL)
    rows = scores.random_rows(2, SMALL["vocabulary"], length=9, answer=4)
    weight = lm.model.model.layers[1].mlp.up_proj.weight
    gradients = []
    for row in rows:
        logits = lm.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        loss = -sum(logits[i - 1, row.ids[i]] for i in range(len(row.ids)) if row.learn[i]) / 4
        gradients += torch.autograd.grad(loss, weight.requires_grad_())
    weight.requires_grad_(False)
    name = "model.layers.1.mlp.up_proj.weight"
    signed, unsigned = (scores.released(lm, rows, kind)[name] for kind in ("signed", "unsigned"))
    torch.testing.assert_close(signed, weight * sum(gradients), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(unsigned, weight.abs() * sum(g.abs() for g in gradients), rtol=1e-3, atol=1e-7)
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())


def test_the_floor_of_scoring_by_hand(bench):
    """Every token passes the blocks, every answer's token the head."""
    scores = bench.weight_scores
    rows = scores.random_rows(4, SMALL["vocabulary"], length=9, answer=4)
    assert [len(row.ids) for row in rows] == [9, 8, 7, 9]
    case = scores.Case(scores.random_model(**SMALL), rows[:1], rows[1:])
    blocks = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert scores.operations(case) == 2 * ((9 + 8 + 7 + 9) * blocks + 4 * 4 * 32 * 50)


def test_the_command_for_a_gpu_runs_without_one(folder, capsys):
    import gpu

    tiny = ["--shape", "tiny", "--device", "cpu", "--examples", "2", "--length", "12"]
    assert gpu.main(tiny) == 0
    shown = capsys.readouterr().out
    found = json.loads(shown[shown.index("{") :])
    assert found["dtype"] == "bfloat16" and found["examples"] == [2, 2]
    assert found["seconds"] > 0 and found["share_of_peak"] > 0 and found["peak_memory"] is None


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
