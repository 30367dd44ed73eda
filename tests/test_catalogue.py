"""Counts and memory follow from the shapes, and the page shows what the list says."""

import re
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from harmlens.models import catalogue, forward
from harmlens.models.catalogue import GB, MODELS, Model
from harmlens.models.shapes import RANK, TASKS, Shape, need
from harmlens.training import lora
from harmlens.weights import scores, scoring

PAGE = Path(__file__).parents[1] / "book" / "models.md"

# What an architecture adds to the matrices, as its published models have it.
EXTRAS = {
    "llama": {}, "mistral": {}, "phi3": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": "head"},
    "olmo2": {"qk_norm": "all"}, "gemma2": {"norms": 4}, "gemma3": {"norms": 4, "qk_norm": "head"},
}  # fmt: skip


def shape_of(config, architecture):
    head_dim = getattr(config, "head_dim", None) or 0
    return Shape(
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
        config.intermediate_size, config.vocab_size, head_dim, config.tie_word_embeddings,
        **EXTRAS[architecture],
    )  # fmt: skip


@pytest.mark.parametrize("architecture", EXTRAS)
def test_parameters_are_counted_as_transformers_counts_them(architecture):
    model = tiny.model(architecture).model
    assert shape_of(model.config, architecture).parameters == model.num_parameters()


@pytest.mark.parametrize("architecture", EXTRAS)
def test_they_are_counted_so_at_full_size_too(architecture):
    """A model of the list is built without memory and counted."""
    like = next(m.shape for m in MODELS if {k: getattr(m.shape, k) for k in ("qkv_bias", "norms", "qk_norm")}
                == {"qkv_bias": False, "norms": 2, "qk_norm": "", **EXTRAS[architecture]})  # fmt: skip
    made, _ = tiny.CONFIGS[architecture]
    config = made(
        num_hidden_layers=like.layers, hidden_size=like.width, num_attention_heads=like.heads,
        num_key_value_heads=like.kv_heads, intermediate_size=like.ffn, vocab_size=like.vocab,
        tie_word_embeddings=like.tied, **({"head_dim": like.head_dim} if like.head_dim else {}),
        pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).num_parameters() == like.parameters


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
    assert catalogue.find(name).shape.parameters == published


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
    shape = shape_of(lm.model.config, "llama")
    rows = [forward.Row(list(range(9)), [False] * 5 + [True] * 4)]
    plan = scoring.make_plan(lm, rows, layers=[0])
    assert plan.accumulators == 8 * sum(out * into for out, into in shape.linears)
    found = scores.matrices(lm)
    assert sorted(tuple(module.weight.shape) for module in found.values()) == sorted(
        shape.linears * shape.layers
    )
    # The plan's bytes per token, at four bytes each here and two in the catalogue.
    inner = sum(map(sum, shape.linears)) * shape.layers
    assert scoring._bytes_per_token(lm, found) == 4 * inner + 12 * shape.vocab


def test_the_parts_of_lora_are_those_that_are_trained():
    lm = tiny.model("llama")
    shape = shape_of(lm.model.config, "llama")
    with lora.adapters(lm, rank=RANK):
        trained = sum(p.numel() for p in lm.model.parameters() if p.requires_grad)
    assert trained == RANK * shape.layers * sum(map(sum, shape.linears))


def test_an_unknown_task_or_tier():
    with pytest.raises(ValueError, match=r"task='fly' is unknown; choose one of run, score, lora"):
        need(SMALL, "fly")
    with pytest.raises(ValueError, match=r"tier='B12' is unknown; choose one of T4, L4"):
        catalogue.fits("B12")


@pytest.mark.parametrize("tier", catalogue.TIERS)
def test_a_tier_lists_what_leaves_room_for_everything(tier):
    found = catalogue.fits(tier)
    assert any(not m.gated for m in found)
    sizes = [m.shape.parameters for m in found]
    assert sizes == sorted(sizes, reverse=True)
    for model in MODELS:
        room = all(need(model.shape, task) <= catalogue.usable(tier) for task in TASKS)
        assert (model in found) == room
        assert not room or 2 * model.shape.parameters < catalogue.TIERS[tier]


def test_seven_billion_do_not_fit_a_t4_and_do_an_l4():
    qwen = catalogue.find("Qwen/Qwen2.5-7B-Instruct")
    assert qwen not in catalogue.fits("T4") and qwen in catalogue.fits("L4")
    assert catalogue.smallest_tier(qwen) == "L4"
    assert catalogue.smallest_tier(catalogue.find(catalogue.SMALL)) == "T4"
    huge = Model("x/y", Shape(80, 8192, 64, 8, 29568, 152064), "", "")
    assert catalogue.smallest_tier(huge) == "several GPUs"


# --------------------------------------------------------------------------- partners


def test_a_ladder_is_found_from_each_of_its_rungs():
    olmo = catalogue.ladder("allenai/Olmo-3-7B-Instruct")
    assert list(olmo) == ["base", "mid", "long", "sft", "dpo", "rl"]
    for rung in olmo.values():
        assert catalogue.ladder(rung) == olmo
        assert catalogue.find(rung).id == olmo["rl"]
    assert catalogue.ladder("ALLENAI/olmo-3-7b-instruct") == olmo
    assert catalogue.ladder("nobody/nothing") == {} == catalogue.partners("nobody/nothing")
    assert catalogue.ladder("microsoft/phi-4") == {} == catalogue.partners("microsoft/phi-4")


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.id)
def test_partners_know_each_other(model):
    if model.base:
        both = {"base": model.base, "aligned": model.id}
        assert catalogue.partners(model.id) == catalogue.partners(model.base) == both
        rungs = catalogue.ladder(model.id)
        assert list(rungs.values())[-1] == model.id
        assert model.base in {rung.split("@")[0] for rung in rungs.values()}
    assert catalogue.find(f"{model.id}@main") is model


def test_ids_are_unique_and_spelt_as_ids():
    names = [m.id for m in MODELS] + [m.base for m in MODELS if m.base]
    assert len({n.lower() for n in names}) == len(names)
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", n) for n in names)


def test_what_is_proposed_is_never_gated():
    gated = {m.id for m in MODELS if m.gated}
    assert gated
    assert catalogue.ungated("meta-llama/Llama-3.2-1B-Instruct") == "allenai/OLMo-2-0425-1B-Instruct"
    for name in [*gated, "nobody/nothing"]:
        assert catalogue.ungated(name) not in gated
    proposed = catalogue.smaller(6 * GB)
    assert proposed and not gated & set(proposed)
    assert [catalogue.find(n).shape.parameters for n in proposed] == sorted(
        (catalogue.find(n).shape.parameters for n in proposed), reverse=True
    )
    assert all(need(catalogue.find(n).shape) <= 6 * GB for n in proposed)
    assert catalogue.smaller(1000) == []


# --------------------------------------------------------------------------- the page


def test_the_page_shows_the_list():
    block = re.search(r"(?s)<!-- catalogue:start -->\n(.*?)<!-- catalogue:end -->", PAGE.read_text())
    assert block and block[1] == catalogue.markdown(), (
        "python -m harmlens.models.catalogue book/models.md brings the page in step"
    )


def test_the_page_says_what_is_known_of_refusals_and_from_where():
    """The proposed model is one whose first token tells refusal; each number has its source on the page."""
    page = catalogue.markdown()
    row = next(line for line in page.splitlines() if f"[{catalogue.SMALL}]" in line)
    assert "0.97" in row and "[1] " in page.splitlines()[-1]
    assert {note for _, _, note in catalogue.REFUSALS} <= set(catalogue.NOTES)
    assert all(f"[{note}] " in page for note in catalogue.NOTES)
    assert {name for name, _, _ in catalogue.REFUSALS} <= {m.id for m in MODELS}
    silent = [m for m in MODELS if not m.refuses]
    assert silent and page.count("| not known |") == len(silent)
    assert f"**{catalogue.SMALL}**" in PAGE.read_text()


def test_the_table_is_put_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- catalogue:start -->\nold\n<!-- catalogue:end -->\nbelow\n")
    catalogue.write(page)
    once = page.read_text()
    catalogue.write(page)
    assert page.read_text() == once
    assert once.startswith("above\n<!-- catalogue:start -->\n### T4") and once.endswith("end -->\nbelow\n")
    assert "old" not in once and all(m.id in once for m in MODELS)
    page.write_text("no marks")
    with pytest.raises(ValueError, match=r"page='page.md' has no marks <!-- catalogue:start -->"):
        catalogue.write(page)
