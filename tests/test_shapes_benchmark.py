"""The command that times the notebooks' steps on random models of real shapes, without a GPU."""

from __future__ import annotations

import json
import sys

import floors
import pytest
import torch
from floors import Machine, Sizes
from transformers import AutoModelForCausalLM

from harmlens.asking import pairs as prompts
from harmlens.keep import files
from harmlens.models import chats
from tables import Shape, listed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(root):
    """The command as a module."""
    sys.path.insert(0, str(root / "tests" / "benchmarks"))
    import shapes

    yield shapes
    sys.path.remove(str(root / "tests" / "benchmarks"))


@pytest.fixture(scope="module")
def lm(bench):
    return bench.random_model(bench.TINY, CPU, torch.bfloat16)


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setenv("HARMLENS_BUILD", str(tmp_path))
    return tmp_path


def test_every_step_is_measured_and_written(bench, build, capsys):
    assert bench.main(["--tiny", "--device", "cpu"]) == 0
    written = json.loads((build / "shapes.json").read_text(encoding="utf-8"))
    assert written["provenance"]["dtype"] == "bfloat16" and "torch" in written["provenance"]["packages"]
    (found,) = written["models"]
    assert tuple(found["steps"]) == bench.STEPS == tuple(floors.steps(bench.TINY))
    assert found["parameters"] == bench.TINY.parameters
    for row in found["steps"].values():
        assert "error" not in row and row["peak"] is None  # no GPU, no peak
        assert row["seconds"] > 0 and row["ratio"] == pytest.approx(row["seconds"] / row["floor"])
    assert found["steps"]["neurons"]["note"] == "closed form"
    assert found["sizes"]["common"] <= found["sizes"]["shared"] < found["sizes"]["tokens"] == 24
    shown = capsys.readouterr().out
    assert all(f"\n{step} " in shown for step in bench.STEPS) and "shapes.json" in shown


def test_a_step_that_fails_stops_no_other(bench, build, capsys):
    assert bench.main(["--tiny", "--device", "cpu", "--steps", "select", "forward", "--texts", "3"]) == 0
    (found,) = json.loads((build / "shapes.json").read_text(encoding="utf-8"))["models"]
    assert "add prune_score and preserve_score" in found["steps"]["select"]["error"]
    assert found["steps"]["forward"]["seconds"] > 0 and found["sizes"]["texts"] == 3
    assert "failed: steps: select needs both scores" in capsys.readouterr().out


@pytest.mark.parametrize("model", listed()[0], ids=lambda m: m.id)
def test_the_model_has_the_shape_of_the_list(bench, model):
    """Counted without memory; with queries, keys and MLP of the right sizes."""
    shape = model.shape
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(bench.config(shape))
    assert net.num_parameters() == shape.parameters == model.parameters
    block = net.model.layers[0]
    assert tuple(block.self_attn.k_proj.weight.shape) == (shape.keys, shape.width)
    assert tuple(block.mlp.up_proj.weight.shape) == (shape.ffn, shape.width)


@pytest.mark.parametrize("extra", [{"qk_norm": "head", "head_dim": 16}, {"norms": 4, "head_dim": 16}, {}])
def test_other_architectures_run_too(bench, extra):
    shape = Shape(2, 32, 4, 2, 64, 1000, **extra)
    steps = ("forward", "generate", "patch", "neurons", "lora")
    found = bench.measure("x", shape, bench.TINY_SIZES, steps, CPU, torch.bfloat16)
    assert not [row for row in found["steps"].values() if "error" in row]


def test_the_model_is_random_half_and_leaves_the_default_alone(bench, lm):
    assert lm.model.dtype == torch.bfloat16 and torch.get_default_dtype() == torch.float32
    assert not any(p.requires_grad for p in lm.model.parameters())
    with pytest.raises(ValueError, match=r"shape: its vocabulary of 10 is smaller than the tokenizer's"):
        bench.random_model(Shape(2, 32, 4, 2, 64, 10), CPU, torch.bfloat16)


def test_pairs_have_the_wanted_length_and_part_where_it_is_said(bench, lm):
    pairs, sizes = bench.make_pairs(lm, Sizes(texts=5, tokens=40, shared=0))
    ids = prompts.token_ids(lm, pairs)
    assert {len(side) for both in ids for side in both} == {40}
    assert min(next(t for t in range(40) if a[t] != b[t]) for a, b in ids) == sizes.shared
    assert len({tuple(side[: sizes.common]) for both in ids for side in both}) == 1
    assert len({tuple(side[: sizes.common + 1]) for both in ids for side in both}) > 1
    with pytest.raises(ValueError, match=r"tokens=3 is too short: choose at least"):
        bench.make_pairs(lm, Sizes(texts=1, tokens=3, shared=0))


def test_answers_have_exactly_the_length_that_the_floor_counts(bench, lm):
    """A random model must not end its answers early."""
    pairs, sizes = bench.make_pairs(lm, Sizes(texts=3, tokens=24, shared=0, answer=6))
    new = []
    plain = lm.model.generate

    def generate(**options):
        out = plain(**options)
        new.append(out.shape[1] - options["input_ids"].shape[1])
        return out

    lm.model.generate = generate
    try:
        bench.Bench(lm, pairs, sizes).generate()
    finally:
        del lm.model.generate
    assert new == [6]
    assert lm.model.generation_config.eos_token_id is None


def test_an_unknown_device_is_measured_and_a_known_gpu_is_looked_up(bench, monkeypatch):
    name, machine = bench.machine(CPU, torch.float32)
    assert name == "cpu (measured)" and machine.flops > 0 and machine.bandwidth > 0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    name, machine = bench.machine(torch.device("cuda"), torch.float16)
    assert name == "T4 (data sheet)" and machine == floors.MACHINES["T4"] and isinstance(machine, Machine)


def test_what_is_wrong_is_said(bench, build, capsys, monkeypatch):
    if not torch.cuda.is_available():
        assert bench.main([]) == 1
        assert "no GPU is to be seen; --tiny --device cpu" in capsys.readouterr().out
    assert bench.main(["--device", "cpu", "--model", "nobody/nothing"]) == 2
    assert "name='nobody/nothing' is not on the list" in capsys.readouterr().out
    assert bench.main(["--device", "cpu", "--tiny", "--texts", "0"]) == 2
    assert "texts=0 must be at least 1" in capsys.readouterr().out
    monkeypatch.setattr(files, "free_memory", lambda device: 1000)
    assert bench.main(["--device", "cpu", "--tiny"]) == 1
    shown = capsys.readouterr().out
    assert "tiny is left out: its weights take 165.4 kB, but 1.0 kB are to be had" in shown
    assert "no model fits" in shown and not (build / "shapes.json").exists()


def test_the_prompts_are_those_of_a_chat(bench, lm):
    pairs, _ = bench.make_pairs(lm, Sizes(texts=1, tokens=24, shared=0))
    text = pairs[0].x1.render(lm)
    assert len(chats.tokens(lm.tokenizer, text)) == 24 and "user" in text
