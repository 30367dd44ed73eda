"""Seconds and peak memory of each step of the notebooks on a random model of a real one's shape.

    python tests/benchmarks/shapes.py                               # 1.5 and 8 billion parameters, on a GPU
    python tests/benchmarks/shapes.py --model Qwen/Qwen2.5-7B-Instruct --steps forward patch
    python tests/benchmarks/shapes.py --tiny --device cpu           # shows that the command runs

Weights are random and made on the device in half precision, so nothing is downloaded. Prompts are made of
the words of the tests' stand-in tokenizer, whose ids all lie within the shape's vocabulary. Every step is run
once for warming up and then timed. Beside it stands its floor (``floors.py``): with the data sheet's
speed on a GPU that is known there, elsewhere with that of a large matrix product and a large copy on the same
device. Steps that fail, for lack of memory say, are reported, and the others are run.

Written to ``shapes.json`` in the build folder after every step.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import floors
import torch
from floors import MACHINES, Machine, Sizes
from gpu import finish, rate
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Olmo2Config,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)  # fmt: skip

from harmlens.asking import pairs as prompts
from harmlens.flow import neurons, outcomes, patching
from harmlens.keep import files
from harmlens.keep.files import build_dir, size_text, write_json
from harmlens.models import chats, forward, hub
from harmlens.models.chats import Pair, Prompt
from harmlens.models.forward import LanguageModel
from harmlens.training import loop as training
from harmlens.training import tune
from harmlens.weights import attribution, masks
from tables import Shape, shape_of

TOKENIZER = Path(__file__).parent.parent / "data" / "standin"
STEPS = ("forward", "generate", "patch", "neurons", "prune_score", "preserve_score", "select", "lora")
TINY = Shape(layers=2, width=32, heads=4, kv_heads=2, ffn=64, vocab=1000, qkv_bias=True)
TINY_SIZES = Sizes(texts=2, tokens=24, shared=12, answer=4, examples=2, batch=2)
SWEPT = {"sites": ("layer", "mlp_out", "attn_out"), "positions": "all"}
TIMED_STEPS = 4  # of training


def config(shape: Shape) -> PretrainedConfig:
    """The configuration of a model of this shape, of an architecture that has its biases and norms."""
    made = {
        (False, 2, ""): LlamaConfig, (True, 2, ""): Qwen2Config, (False, 2, "head"): Qwen3Config,
        (False, 2, "all"): Olmo2Config, (False, 4, ""): Gemma2Config, (False, 4, "head"): Gemma3TextConfig,
    }[shape.qkv_bias, shape.norms, shape.qk_norm]  # fmt: skip
    return made(
        num_hidden_layers=shape.layers, hidden_size=shape.width, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, intermediate_size=shape.ffn, vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied, max_position_embeddings=4096, pad_token_id=0, bos_token_id=None,
        eos_token_id=None,  # so that answers have the length that was asked for
        **({"head_dim": shape.head_dim} if shape.head_dim else {}),
    )  # fmt: skip


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """A model of a shape with random weights, allocated once, where it is used."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    if len(tokenizer) > shape.vocab:
        raise ValueError(f"shape: its vocabulary of {shape.vocab} is smaller than the tokenizer's")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            net = AutoModelForCausalLM.from_config(config(shape)).eval()
    finally:
        torch.set_default_dtype(before)
    return LanguageModel("random", net.requires_grad_(False), tokenizer, "random")


def words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words that are one token each behind a space."""
    found = {tokenizer.decode([i]).strip() for i in range(len(tokenizer))}
    return sorted(w for w in found if w.isalpha() and len(tokenizer.tokenize(f" {w}")) == 1)


def make_pairs(lm: LanguageModel, sizes: Sizes) -> tuple[list[Pair], Sizes]:
    """Pairs of exactly the wanted length that part half-way, and the sizes with where they part.

    Raises:
        ValueError: prompts that are too short for the chat's markup.
    """
    known, draw = words(lm.tokenizer), random.Random(0)
    plain = len(chats.tokens(lm.tokenizer, Prompt(({"role": "user", "content": "a"},)).render(lm)))
    count = sizes.tokens - plain
    if count < 2:
        raise ValueError(f"tokens={sizes.tokens} is too short: choose at least {plain + 2}")
    pairs = []
    for i in range(sizes.texts):
        text = draw.choices(known, k=count)
        other = [
            w if k != count // 2 else draw.choice([v for v in known if v != w]) for k, w in enumerate(text)
        ]
        sides = (Prompt(({"role": "user", "content": " ".join(["a", *side])},)) for side in (text, other))
        pairs.append(Pair(str(i), *sides))
    ids = prompts.token_ids(lm, pairs)
    wrong = {len(side) for both in ids for side in both} - {sizes.tokens}
    if wrong:
        raise ValueError(f"tokens={sizes.tokens}: the tokenizer made prompts of {sorted(wrong)} instead")
    every = [side for both in ids for side in both]
    shared = min(next(t for t in range(sizes.tokens) if a[t] != b[t]) for a, b in ids)
    common = next(t for t in range(sizes.tokens) if len({side[t] for side in every}) > 1)
    return pairs, replace(sizes, shared=shared, common=min(common, shared))


# --------------------------------------------------------------------------- the steps


@dataclass
class Bench:
    """A model with all that its steps need.

    Attributes:
        scores: what the two scoring steps found, for the selection.
        notes: what a step has to say about itself.
    """

    lm: LanguageModel
    pairs: list[Pair]
    sizes: Sizes
    scores: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        return [pair.x1.render(self.lm) for pair in self.pairs]

    @property
    def outcome(self) -> Any:
        half = self.sizes.ids // 2
        ids = range(5, 5 + self.sizes.ids)
        return outcomes.y1(outcomes.TokenSets(tuple(ids[:half]), tuple(ids[half:])))

    def rows(self, n: int) -> list[forward.Row]:
        """Examples: a prompt's length, and an answer that is learnt."""
        draw, size = random.Random(1), len(self.lm.tokenizer)
        long = self.sizes.tokens + self.sizes.answer
        learn = [False] * self.sizes.tokens + [True] * self.sizes.answer
        return [forward.Row(draw.choices(range(5, size), k=long), learn) for _ in range(n)]

    def forward(self) -> None:
        forward.last_logits(self.lm, self.texts)

    def generate(self) -> None:
        forward.generate(self.lm, self.texts, max_new_tokens=self.sizes.answer)

    def patch(self) -> None:
        patching.patch(self.lm, self.pairs, self.outcome, **SWEPT)

    def neurons(self) -> None:
        self.notes["neurons"] = neurons.last_layer(self.lm, self.pairs, self.outcome).method

    def _score(self, kind: str, score: Callable) -> None:
        self.scores.pop(kind, None)  # two at a time would be measured as memory
        found = score(self.lm, self.rows(self.sizes.examples))
        self.scores[kind] = found
        self.notes[f"{kind}_score"] = "scores on " + next(iter(found.values.values())).device.type

    def prune_score(self) -> None:
        self._score("prune", attribution.prune_score)

    def preserve_score(self) -> None:
        self._score("preserve", attribution.preserve_score)

    def select(self) -> None:
        if set(self.scores) != {"prune", "preserve"}:
            raise ValueError("steps: select needs both scores; add prune_score and preserve_score")
        mask = masks.select(self.scores["prune"], self.scores["preserve"], q=0.005, p=0.01)
        self.notes["select"] = f"{len(mask):,} weights"


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, int | None]:
    """Seconds of a call, and the most bytes that lay on the GPU during it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    finish(device)
    start = time.perf_counter()
    function()
    finish(device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def timed_training(bench: Bench, device: torch.device) -> tuple[float, int | None]:
    """Seconds of one step of training, without putting adapters in and merging them; peak memory.

    As in the computed need, four texts go through at once, and activations are computed again.
    """
    rows, net = bench.rows(bench.sizes.batch), bench.lm.model

    def train(steps: int) -> None:
        stream = training.shuffled(rows, bench.sizes.batch, 0, seed=0)
        training.fit(net, stream, training.Schedule(steps, 1e-4), rows_at_once=min(4, bench.sizes.batch))

    with tune.adapters(bench.lm, rank=bench.sizes.rank), tune.recomputing(net):
        train(1)
        seconds, peak = timed(lambda: train(TIMED_STEPS), device)
    return seconds / TIMED_STEPS, peak


# --------------------------------------------------------------------------- measuring


def machine(device: torch.device, dtype: torch.dtype) -> tuple[str, Machine]:
    """What floors are computed with: the data sheet of a known GPU, or what the device is seen to do."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else "cpu"
    if (known := floors.known(name)) is not None:
        return f"{known} (data sheet)", MACHINES[known]
    flops = rate(device, dtype, 8192 if cuda else 256)
    source = torch.zeros(1 << 28 if cuda else 1 << 22, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = timed(lambda: [target.copy_(source) for _ in range(10)], device)[0]
    size = torch.cuda.get_device_properties(device).total_memory if cuda else 0
    return f"{name} (measured)", Machine(flops, 20 * source.numel() / seconds, size)


def measure(
    name: str, shape: Shape, sizes: Sizes, steps: Sequence[str], device: torch.device, dtype: torch.dtype,
    report: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:  # fmt: skip
    """Seconds, floor, peak and computed memory of each step; ``report`` is called after every step."""
    called, speeds = machine(device, dtype)
    found: dict[str, Any] = {
        "shape_of": name, "shape": asdict(shape), "parameters": shape.parameters, "floors_of": called,
        "machine": {"flops": speeds.flops, "bandwidth": speeds.bandwidth}, "steps": {},
    }  # fmt: skip
    lm = random_model(shape, device, dtype)
    pairs, sizes = make_pairs(lm, sizes)
    bench, floor = Bench(lm, pairs, sizes), floors.steps(shape, sizes)
    found["sizes"] = asdict(sizes)
    for step in [s for s in STEPS if s in steps]:
        row: dict[str, Any] = {"floor": floor[step].seconds(speeds), "need": floor[step].need}
        try:
            if step == "lora":
                bench.scores.clear()  # the memory is training's now
                seconds, peak = timed_training(bench, device)
            else:
                getattr(bench, step)()
                seconds, peak = timed(getattr(bench, step), device)
            row |= {"seconds": seconds, "ratio": seconds / row["floor"], "peak": peak}
        except (RuntimeError, ValueError, ImportError) as error:  # out of memory is a RuntimeError
            row["error"] = str(error).splitlines()[0]
        if step in bench.notes:
            row["note"] = bench.notes[step]
        found["steps"][step] = row
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        report(found)
    return found


def table(found: dict[str, Any]) -> str:
    """One model's numbers for people."""
    lines = [
        f"{found['shape_of']}: {found['parameters']:,} parameters; floors of {found['floors_of']}",
        f"{'step':16}{'seconds':>10}{'floor':>10}{'ratio':>8}{'peak':>10}{'need':>10}",
    ]
    for step, row in found["steps"].items():
        if "error" in row:
            lines.append(f"{step:16}{'-':>10}{floors.brief(row['floor']):>10}  failed: {row['error']}")
            continue
        peak = "-" if row["peak"] is None else size_text(row["peak"])
        lines.append(
            f"{step:16}{floors.brief(row['seconds']):>10}{floors.brief(row['floor']):>10}{row['ratio']:8.1f}"
            f"{peak:>10}{size_text(row['need']):>10}  {row.get('note', '')}".rstrip()
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time the notebooks' steps on random models of real shapes.")
    parser.add_argument("--model", nargs="+", default=list(floors.SHOWN), help="ids of book/models.md")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--texts", type=int, help="prompts, and pairs (default: 40)")
    parser.add_argument("--tokens", type=int, help="tokens of a prompt (default: 64)")
    parser.add_argument("--examples", type=int, help="answers that weights are scored on (default: 128)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: as when loading"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny shape instead, to see that all works")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: no GPU is to be seen; --tiny --device cpu shows that the command runs")
        return 1
    sizes = TINY_SIZES if options.tiny else Sizes()
    asked = {
        k: getattr(options, k) for k in ("texts", "tokens", "examples") if getattr(options, k) is not None
    }
    try:
        # Where the sides part is found out when the prompts are made.
        sizes = replace(sizes, **asked, shared=0)
        shapes = {"tiny": TINY} if options.tiny else {n: shape_of(n) for n in options.model}
    except ValueError as error:
        print(f"error: {error}")
        return 2
    usual = hub.precision(None, "cuda") if device.type == "cuda" else torch.bfloat16
    dtype = getattr(torch, options.dtype) if options.dtype else usual
    file = build_dir() / "shapes.json"
    done: list[dict[str, Any]] = []

    def report(found: dict[str, Any]) -> None:
        about = files.provenance("random", device=options.device, dtype=str(dtype), params=vars(options))
        write_json(file, {"provenance": about, "models": [*done, found]})

    for name, shape in shapes.items():
        gc.collect()  # the model before
        weights, room = shape.parameters * torch.finfo(dtype).bits // 8, files.free_memory(device)
        if weights > room:
            print(
                f"{name} is left out: its weights take {size_text(weights)}, but "
                f"{size_text(room)} are to be had"
            )
            continue
        done.append(measure(name, shape, sizes, options.steps, device, dtype, report))
        print(table(done[-1]), flush=True)
    if not done:
        print("error: no model fits; choose a smaller one with --model")
        return 1
    print(f"written to {os.path.relpath(file)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
