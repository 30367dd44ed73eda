"""Counts and memory of models follow from their shapes, and the page shows what the list says."""

import json
import re
from pathlib import Path

import pytest
import tiny

import tables
from harmlens.keep.files import data_dir
from harmlens.models import forward, hub
from harmlens.training import tune
from harmlens.weights import attribution, scores
from tables import (
    RANK,
    TASKS,
    TIERS,
    Shape,
    listed,
    models_table,
    need,
    put,
    shape_of,
    smallest_tier,
    usable,
)

PAGE = Path(__file__).parents[1] / "book" / "models.md"

# What an architecture adds to the matrices, as its published models have it.
EXTRAS = {
    "llama": {}, "mistral": {}, "phi3": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": "head"},
    "olmo2": {"qk_norm": "all"}, "gemma2": {"norms": 4}, "gemma3": {"norms": 4, "qk_norm": "head"},
}  # fmt: skip


def shape_like(config, architecture):
    head_dim = getattr(config, "head_dim", None) or 0
    return Shape(
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
        config.intermediate_size, config.vocab_size, head_dim, config.tie_word_embeddings,
        **EXTRAS[architecture],
    )  # fmt: skip


@pytest.mark.parametrize("architecture", EXTRAS)
def test_parameters_are_counted_as_transformers_counts_them(architecture):
    model = tiny.model(architecture).model
    assert shape_like(model.config, architecture).parameters == model.num_parameters()


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552),
        ("google/gemma-2-2b-it", 2_614_341_888),
        ("google/gemma-2-9b-it", 9_241_705_984),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("google/gemma-3-1b-it", 999_885_952),
        ("microsoft/Phi-3.5-mini-instruct", 3_821_079_552),
        ("microsoft/phi-4", 14_659_507_200),
        ("allenai/OLMo-2-0425-1B-Instruct", 1_484_916_736),
        ("allenai/Olmo-3-7B-Instruct", 7_298_011_136),
    ],
)
def test_the_list_has_the_published_counts(name, published):
    assert shape_of(name).parameters == published


# --------------------------------------------------------------------------- memory

SMALL = Shape(layers=3, width=8, heads=4, kv_heads=2, ffn=16, vocab=100)


def test_memory_by_hand():
    # One block: q and o 8x8, k and v 4x8, gate, up and down 8x16, two norms.
    assert SMALL.block == 2 * 64 + 2 * 32 + 3 * 128 + 16 == 592
    assert SMALL.parameters == 2 * 800 + 3 * 592 + 8 == 3384
    inner = 2 * 16 + 2 * 12 + 3 * 24
    assert (
        need(SMALL, "run", texts=2, length=5)
        == 2 * 3384 + 10 * (4 * 4 * 3 + 2 * 8 * 3 + 2 * (4 * 8 + 3 * 16)) + 8 * 100 * 2
    )
    assert need(SMALL, "score", length=5) == 2 * 3384 + 8 * 576 + (2 << 30) + 5 * (2 * inner * 3 + 1000)
    assert need(SMALL, "lora", texts=2, length=5) == 2 * 3384 + 16 * 32 * inner * 3 + 10 * (
        2 * 8 * 3 + 2 * inner + 1000
    )


def test_the_parts_of_scoring_are_those_that_scoring_plans():
    lm = tiny.model("llama")
    shape = shape_like(lm.model.config, "llama")
    rows = [forward.Row(list(range(9)), [False] * 5 + [True] * 4)]
    plan = attribution.make_plan(lm, rows)
    assert plan.accumulators == 8 * shape.layers * sum(out * into for out, into in shape.linears)
    found = scores.matrices(lm)
    assert sorted(tuple(module.weight.shape) for module in found.values()) == sorted(
        shape.linears * shape.layers
    )
    # The plan's bytes per token, at four bytes each here and two in the table.
    inner = sum(map(sum, shape.linears)) * shape.layers
    assert plan.activations == plan.max_tokens * (4 * inner + 12 * shape.vocab) + plan.buffer


def test_the_parts_of_lora_are_those_that_are_trained():
    lm = tiny.model("llama")
    shape = shape_like(lm.model.config, "llama")
    with tune.adapters(lm, rank=RANK):
        trained = sum(p.numel() for p in lm.model.parameters() if p.requires_grad)
    assert trained == RANK * shape.layers * sum(map(sum, shape.linears))


def test_an_unknown_task():
    with pytest.raises(ValueError, match=r"task='fly' is unknown; choose one of run, score, lora"):
        need(SMALL, "fly")


def test_a_tier_has_room_for_everything():
    for model in listed()[0]:
        tier = smallest_tier(model.shape)
        assert tier not in TIERS or max(need(model.shape, task) for task in TASKS) <= usable(TIERS[tier])
    assert smallest_tier(shape_of("Qwen/Qwen2.5-7B-Instruct")) == "L4"
    assert smallest_tier(shape_of(hub.SMALL)) == "T4"
    assert smallest_tier(Shape(80, 8192, 64, 8, 29568, 152064)) == "Several GPUs"


# --------------------------------------------------------------------------- the pages


def test_the_page_shows_the_list():
    block = re.search(r"(?s)<!-- catalogue:start -->\n(.*?)<!-- catalogue:end -->", PAGE.read_text())
    assert block and block[1] == models_table(), "python tools/tables.py models brings the page in step"


def test_the_page_says_what_is_known_of_refusals_and_from_where():
    """The proposed model is one whose first token tells refusal; each number has its source on the page."""
    page, (models, read) = models_table(), listed()
    row = next(line for line in page.splitlines() if f"[{hub.SMALL}]" in line)
    assert "0.97" in row and "[1] " in page.splitlines()[-1]
    assert {note for _, _, note in read["refusals"]} == set(read["notes"])
    known = {name for name, _, _ in read["refusals"]}
    assert known <= {m.id for m in models} and page.count("| not known |") == len(models) - len(known) > 0
    assert f"**{hub.SMALL}**" in PAGE.read_text()


def test_a_table_is_put_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- x:start -->\nold\n<!-- x:end -->\nbelow\n")
    for _ in range(2):
        put(page, "x", "new\n")
        assert page.read_text() == "above\n<!-- x:start -->\nnew\n<!-- x:end -->\nbelow\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match=r"page='page.md' has no marks <!-- x:start -->"):
        put(page, "x", "new")


def test_the_page_shows_what_was_timed():
    known = json.loads((data_dir() / "bench.json").read_text())
    block = re.search(
        r"(?s)<!-- bench:start -->\n(.*?)<!-- bench:end -->", (PAGE.parent / "performance.md").read_text()
    )
    assert block and block[1] == tables.bench_table(known), "python tools/tables.py bench brings it in step"


def test_timings_of_one_model_are_kept_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "data_dir", lambda: tmp_path)
    row = {"ratio": 8.0, "seconds": 0.5, "floor_ratio": 3.0}
    patched = {"transformer_lens_seconds": 4.0, "max_abs_diff": 2e-6, "cells": 3, "pairs": 5} | row
    patched["by_contrast"] = {"behaviour": {"ratio": 2.0}}
    scored = {"released_seconds": 4.0, "max_rel_diff": 1e-5, "peak_over_floor": 1.1, "harmful": 7} | row
    found = dict.fromkeys(tables.TIMED, patched) | {"attribution": scored, "select": {}}

    def timed(model, dtype):
        return tables.remember_bench(
            found | {"machine": {"model": model, "dtype": dtype, "matmul_gflops": 99.6}}
        )

    timed("one", "float32")
    both = timed("one", "bfloat16")
    assert list(both) == ["float32", "bfloat16"] and "cells" not in both["float32"]["patch_grid"]
    lines = tables.bench_table(both).splitlines()
    assert len(lines) == 4 + 2 * len(tables.TIMED) and "| 8 (2) |" in lines[2]
    cells = "0.50 s", "the released procedure", "4 s", "8", "3.0", "1.10", "1e-05"
    rates = "large products ran at 100 Gflop/s in float32 and 100 Gflop/s in bfloat16."
    assert lines[-1] == f"5 pairs of one length, 7 harmful examples; {rates}"
    assert lines[-3] == f"| prune and preserve score | bfloat16 | {' | '.join(cells)} |"
    assert list(timed("other", "float32")) == ["float32"]  # of one model at a time
