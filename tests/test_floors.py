"""Floors are lower bounds: worked out by hand, and held against operations that were really done."""

from __future__ import annotations

import re

import floors
import pytest
import torch
from floors import MACHINES, Machine, Sizes, Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, LlamaConfig

from harmlens.asking import pairs as prompts
from harmlens.flow import neurons, outcomes, patching
from harmlens.models import forward, hub
from harmlens.models.forward import LanguageModel
from harmlens.training import loop as training
from harmlens.training import organism, tune
from harmlens.weights import attribution
from tables import Shape, shape_of

# One block: q and o 8x8, k and v 4x8, gate, up and down 16x8.
HAND = Shape(layers=3, width=8, heads=4, kv_heads=2, ffn=16, vocab=100)
M, KV, HEAD = 2 * 64 + 2 * 32 + 3 * 128, 64, 800


def test_a_pass_by_hand():
    """Two texts of three tokens: two whole blocks, and the last for the last token only."""
    looks = [4 * 8 * (t + 1) for t in range(3)]
    whole = 2 * M * 3 + sum(looks)
    last = 2 * KV * 3 + 2 * (M - KV) + looks[2]
    found = floors.forward(HAND, 2, 3)
    assert found.flops == 2 * (2 * whole + last + 2 * HEAD)
    # Blocks with two norms each, the last norm, and the head; the input embedding is looked up.
    assert found.bytes == 2 * (3 * (M + 16) + 8 + HEAD) == floors.weight_bytes(HAND)
    everything = floors.forward(HAND, 2, 3, read=3)
    assert everything.flops == 2 * (3 * whole + 3 * 2 * HEAD)


def test_a_tied_embedding_is_read_as_the_head():
    tied = Shape(3, 8, 4, 2, 16, 100, tied=True)
    assert floors.weight_bytes(tied) == 2 * tied.parameters == floors.weight_bytes(HAND)


def test_one_more_token_by_hand():
    found = floors.token(HAND, 2, 5)
    assert found.flops == 2 * (3 * (2 * M + 4 * 8 * 6) + 2 * HEAD)
    assert found.bytes == floors.weight_bytes(HAND) + 2 * 5 * 3 * 2 * 2 * 4  # keys and values, two bytes each


def test_a_pass_is_its_tokens():
    """With logits of every position read, a pass is the sum of single tokens."""
    one_by_one = sum(floors.token(HAND, 2, before).flops for before in range(7))
    assert floors.forward(HAND, 2, 7, read=7).flops == one_by_one


def test_a_sweep_by_hand():
    """One pair of three tokens that differs at the last one; two blocks, so that only block 0 is run on."""
    shape = Shape(layers=2, width=8, heads=4, kv_heads=2, ffn=16, vocab=100)
    sizes = Sizes(texts=1, tokens=3, shared=2, ids=5)
    looks = [4 * 8 * (t + 1) for t in range(3)]
    rows = [1, 1, 2]  # the beginning is run once for both sides
    runs = sum(n * (2 * M + at) for n, at in zip(rows, looks, strict=True))
    runs += 2 * KV * 2 + 2 * (2 * M + looks[2])
    assert sum(floors.both_runs(shape, sizes)) == runs
    above = 2 * M + looks[2]  # a patch in block 0 goes through block 1
    reacts = 2 * 2 * 3 * 16 * 8  # the MLP, in each of both blocks
    read = 2 * 8 * 5 * (3 * 2 + 2)  # six cells and two unpatched runs
    assert floors.patch(shape, sizes).flops == runs + 3 * above + reacts + read
    assert floors.neurons(shape, sizes).flops == runs + 2 * 16 * 8 * (5 + 1 + 1)


def test_scoring_and_selecting_by_hand():
    """One block, three tokens of which two are learnt: two positions are run and read."""
    shape = Shape(layers=1, width=8, heads=4, kv_heads=2, ffn=16, vocab=100)
    attention = 4 * 8 * (1 + 2)
    qkv = 2 * 2 * (64 + 2 * 32)
    scored = floors.score(shape, 1, 3, 2)
    assert scored.flops == 3 * 2 * 2 * M - qkv + 3 * attention + 2 * 2 * 2 * HEAD
    assert scored.bytes == 2 * floors.weight_bytes(shape) + 4 * M
    assert floors.select(shape) == Work(0.0, 8.0 * M)
    step = floors.lora_step(shape, 1, 3, 2, rank=2)
    inner = 2 * 16 + 2 * 12 + 3 * 24
    low = 3 * 2 * 2 * 2 * inner - 2 * 3 * 2 * 8 * 2
    assert step.flops == 2 * 2 * 2 * M - qkv + 3 * attention + low + 2 * 2 * 2 * HEAD
    assert step.bytes == 2 * floors.weight_bytes(shape) + 24 * 2 * inner


# --------------------------------------------------------------------------- against what is really done


@pytest.fixture(scope="module")
def lm():
    """A random Llama whose attention is written out, so that every product is counted."""
    config = LlamaConfig(
        vocab_size=len(organism.tokenizer()), hidden_size=64, intermediate_size=160, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return LanguageModel("random", net, organism.tokenizer(), "random")


@pytest.fixture(scope="module")
def shape(lm):
    c = lm.model.config
    found = Shape(c.num_hidden_layers, c.hidden_size, 4, 2, c.intermediate_size, c.vocab_size)
    assert found.parameters == lm.model.num_parameters()
    return found


class Counter(TorchDispatchMode):
    """torch's FlopCounterMode without its hooks on modules, which a scoring pass can't have."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet is torch.ops.aten.addmm_:  # in place, which torch's list leaves out
            packet = torch.ops.aten.addmm
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def counted(function):
    """Operations of matrix products during a call."""
    with Counter() as counter:
        function()
    return counter.total


def test_a_whole_pass_is_counted_exactly(lm, shape):
    ids = torch.arange(3 * 10).view(3, 10) + 5
    with torch.no_grad():
        done = counted(lambda: lm.model(input_ids=ids))
    masked = 4 * 64 * 4 * 3 * (10 * 9 // 2)  # what is written out computes the masked half of attention too
    assert done == floors.forward(shape, 3, 10, read=10).flops + masked


def close_above(done, floor, most):
    """Never below the floor, and not far above it."""
    assert floor <= done <= most * floor, done / floor


def pairs_of_one_length(lm):
    found = prompts.pairs("prompt", n=12)
    sides = prompts.token_ids(lm, found)
    length = len(sides[0][0])
    kept = [(p, s) for p, s in zip(found, sides, strict=True) if len(s[0]) == length]
    places = [next(t for t in range(length) if a[t] != b[t]) for _, (a, b) in kept]
    kept = [k for k, place in zip(kept, places, strict=True) if place == places[0]]
    every = [side for _, s in kept for side in s]
    common = next(t for t in range(length) if len({tuple(ids[: t + 1]) for ids in every}) > 1)
    texts = len(kept)
    sizes = Sizes(texts=texts, tokens=length, shared=places[0], common=min(common, places[0]), ids=8)
    return [p for p, _ in kept], sizes


def test_a_sweep_does_little_more_than_it_must(lm, shape):
    """Above the floor are checks, dear for so few pairs, and what is masked."""
    pairs, sizes = pairs_of_one_length(lm)
    assert sizes.texts >= 2
    y1 = outcomes.y1(outcomes.TokenSets((5, 6, 7, 8), (9, 10, 11, 12)))
    sites = {"sites": ("layer", "mlp_out", "attn_out"), "positions": "all"}
    patching.patch(lm, pairs[:1], y1, **sites)  # tries once whether its blocks can be patched
    close_above(
        counted(lambda: patching.patch(lm, pairs, y1, **sites)), floors.patch(shape, sizes).flops, 1.8
    )
    close_above(counted(lambda: neurons.last_layer(lm, pairs, y1)), floors.neurons(shape, sizes).flops, 1.8)


def test_one_score_does_little_more_than_it_must(lm, shape):
    rows = [forward.Row([5 + i + t for t in range(24)], [False] * 14 + [True] * 10) for i in range(6)]
    for score in (attribution.prune_score, attribution.preserve_score):
        close_above(counted(lambda score=score: score(lm, rows)), floors.score(shape, 6, 24, 10).flops, 1.3)


def test_a_step_of_training_does_little_more_than_it_must(lm, shape):
    rows = [forward.Row([5 + i + t for t in range(24)], [False] * 14 + [True] * 10) for i in range(4)]
    taught = forward.clone(lm)
    stream = training.shuffled(rows, 4, 0, seed=0)
    with tune.adapters(taught, rank=4):
        done = counted(lambda: training.fit(taught.model, stream, training.Schedule(1, 1e-4)))
    close_above(done, floors.lora_step(shape, 4, 24, 10, rank=4).flops, 1.5)


# --------------------------------------------------------------------------- time, steps, the page


def test_the_slower_of_arithmetic_and_memory_counts():
    machine = Machine(flops=100.0, bandwidth=10.0, memory=1)
    assert Work(200.0, 5.0).seconds(machine) == 2.0
    assert Work(200.0, 50.0).seconds(machine) == 5.0
    step = floors.Step("", (Work(200.0, 5.0), Work(0.0, 10.0)), 0)
    assert step.seconds(machine) == 3.0  # what follows waits


def test_answers_take_at_least_the_weights_for_every_token():
    shape = shape_of(hub.SMALL)
    few, many = (floors.steps(shape, Sizes(answer=n))["generate"] for n in (1, 64))
    machine = MACHINES["L4"]
    assert few.phases == (floors.forward(shape, 40, 64),)
    longer = many.seconds(machine) - few.seconds(machine)
    assert longer >= 63 * floors.weight_bytes(shape) / machine.bandwidth


@pytest.mark.parametrize("what", ["texts", "tokens", "answer", "examples", "batch"])
def test_more_never_takes_less(what):
    shape = shape_of(hub.SMALL)
    small, large = (floors.steps(shape, Sizes(**{what: n})) for n in (40, 50))
    times = [(small[k].seconds(MACHINES["T4"]), large[k].seconds(MACHINES["T4"])) for k in small]
    assert all(a <= b for a, b in times) and any(a < b for a, b in times)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA L40S", None),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
    ],
)
def test_a_gpu_is_known_by_its_name(device, name):
    assert floors.known(device) == name


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match=r"texts=0 must be at least 1"):
        Sizes(texts=0)
    with pytest.raises(ValueError, match=r"shared=64 must lie from common=0 .* tokens=64; choose a smaller"):
        Sizes(shared=64)
    with pytest.raises(ValueError, match=r"name='nobody/nothing' is not on the list; choose an id"):
        shape_of("nobody/nothing")


def test_times_for_people():
    shown = [floors.brief(s) for s in (123.0, 3.21, 0.0123, 0.0005, 0.00002, 0.9999)]
    assert shown == ["123 s", "3.2 s", "12 ms", "500 µs", "20 µs", "1.0 s"]


def test_the_page_has_the_table_of_the_code(root):
    page = (root / "book" / "performance.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- floors:start -->\n(.*)<!-- floors:end -->", page, re.S)
    assert block and block[1] == floors.markdown(), (
        "python tests/benchmarks/floors.py book/performance.md brings the page in step"
    )
    assert "Nothing on this page was measured on a GPU" in page


def test_what_is_too_big_has_no_time():
    rows = [line for line in floors.markdown().splitlines() if line.startswith("| `")]
    steps = floors.steps(shape_of(hub.SMALL))
    assert len(rows) == 2 * len(steps)
    small, large = rows[: len(steps)], rows[len(steps) :]
    assert not any("too big" in row for row in small)
    t4 = 5  # behind an empty one, the step, what it is, and its memory
    assert all(row.split(" | ")[t4 - 2] == "too big" for row in large)
    assert any("host memory" in row for row in large)
