"""How fast patching and scoring are, beside others and beside what the machine could do: ``make bench``.

This file is about patching; scoring and selecting weights is in ``weight_scores.py``.

Both sides do the same work in one process, on the same model, pairs and dtype, with one thread: they
tokenise the pairs, run both sides of each, and patch every cell. After a warm-up each is repeated and the
fastest run counts. Seconds are processor time, so that other programs do not slow down either side.
TransformerLens keeps only the activations that it needs. It takes no padding here, so the pairs are those of
the commonest length. The numbers are those of the prompt contrast, which most claims are about;
``by_contrast`` holds the behaviour contrast too. There the prompts part at the author's name, near their
start, and much less can be saved.

Of a large model TransformerLens runs only one in so many cells (``every``), spread over the grid, and the
others are taken to cost the same: each is one whole pass, wherever it lies.

``ratio`` compares whole calls. ``patching_ratio`` compares the patched runs alone: what comes before them,
both runs of each pair above all, is taken off on both sides.

The floor is the number of operations that no exact method can leave out, over the rate at which this machine
multiplies large matrices. Counted are: each different beginning of a prompt once; for each cell the positions
from the patch on, in the blocks above it; and of the last block only what the last position reads.

Written to ``bench.json`` in the build folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import pandas as pd
import torch
import weight_scores
from timing import best, matmul_rate
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.patching import generic_activation_patch, layer_pos_patch_setter

from harmlens.asking import pairs as prompts
from harmlens.asking import source as material
from harmlens.flow import neurons, outcomes, patching
from harmlens.flow.engine import check_partial
from harmlens.flow.record import record_pairs
from harmlens.keep.files import build_dir, portable, write_json
from harmlens.models import loading as models
from harmlens.models import parts as decoder
from harmlens.models.chats import Pair
from harmlens.models.forward import LanguageModel

SITES = ("resid_post", "attn_out", "mlp_out")
CONTRASTS = ("prompt", "behaviour")
BARS = {"patch_grid": 12, "patch_last": 40, "neurons_last": 200}


@dataclass(frozen=True)
class Case:
    """One model, pairs of one length, an outcome, and the same model as a bridge."""

    lm: LanguageModel
    bridge: TransformerBridge
    pairs: list[Pair]
    sets: outcomes.TokenSets

    def ids(self) -> tuple[Tensor, Tensor]:
        """Token ids of x1 and x0 of all pairs."""
        x1, x0 = zip(*prompts.token_ids(self.lm, self.pairs), strict=True)
        return torch.tensor(x1), torch.tensor(x0)

    def y1(self, logits: Tensor) -> Tensor:
        return outcomes.logit_difference(logits[:, -1], self.sets)


def case(name: str, contrast: str, n: int | None, data: str = "", dtype: str | None = None) -> Case:
    """Pairs of the commonest length, at most n."""
    lm = models.load(name, dtype=dtype)
    source = material.source(lm, data)
    sets = outcomes.fit_to_pairs(lm, source.pairs("prompt", split="discovery"))
    pairs = source.pairs(contrast)
    lengths = [len(x0) for _, x0 in prompts.token_ids(lm, pairs)]
    length = Counter(lengths).most_common(1)[0][0]
    pairs = [pair for pair, count in zip(pairs, lengths, strict=True) if count == length][:n]
    # Bridging renames the parameters of the model it is given, so it gets its own.
    bridge = TransformerBridge.boot_transformers(
        name, hf_model=models.load(name, dtype=dtype).model, tokenizer=lm.tokenizer
    )
    return Case(lm, bridge.eval(), pairs, sets)


# --------------------------------------------------------------------------- both sides


def ours(case: Case, positions: str) -> Tensor:
    """Y1 of every patched run [site, cell, pair], layer by layer."""
    found = patching.patch(case.lm, case.pairs, outcomes.y1(case.sets), sites=SITES, positions=positions)
    return found.patched.flatten(1, 2)


def our_runs(case: Case, positions: str) -> Any:
    """What :func:`ours` does before it patches."""
    parts = decoder.stack(case.lm)
    for group in record_pairs(case.lm, parts, case.pairs, outcomes.y1(case.sets), positions):
        check_partial(group)


def our_neurons(case: Case) -> Tensor:
    """Y1 with one hidden unit of the last MLP patched [1, unit, pair]."""
    found = neurons.last_layer(case.lm, case.pairs, outcomes.y1(case.sets))
    return (found.y0[:, None] + found.effects).T[None]


@torch.no_grad()
def their_runs(case: Case, *names: str) -> tuple[Tensor, ActivationCache]:
    """Ids of the runs to be patched, and the cached activations of the others."""
    x1, x0 = case.ids()
    _, cache = case.bridge.run_with_cache(x1, names_filter=lambda name: name in names)
    case.bridge(x0)  # the unpatched run that effects are compared with
    return x0, cache


def hook_names(case: Case) -> list[str]:
    return [f"blocks.{layer}.hook_{site}" for layer in range(case.bridge.cfg.n_layers) for site in SITES]


def last_hidden(case: Case) -> str:
    """The hook of the last MLP's hidden units."""
    return f"blocks.{case.bridge.cfg.n_layers - 1}.mlp.hook_post"


@torch.no_grad()
def theirs(case: Case, positions: str, every: int = 1) -> Tensor:
    """Each so manyth cell of :func:`ours` with TransformerLens' loop."""
    x0, cache = their_runs(case, *hook_names(case))
    length = x0.shape[1]
    where = range(length) if positions == "each" else [length - 1]
    cells = [(layer, pos) for layer in range(case.bridge.cfg.n_layers) for pos in where]
    index = pd.DataFrame(cells[::every], columns=["layer", "pos"])
    loop = partial(generic_activation_patch, patch_setter=layer_pos_patch_setter, index_df=index)
    found = [loop(case.bridge, x0, cache, case.y1, activation_name=s, reduce="none").values for s in SITES]
    return torch.stack(found)


@torch.no_grad()
def their_neurons(case: Case, every: int = 1) -> Tensor:
    """The same as :func:`our_neurons`, one patched forward pass for each so manyth unit."""
    name = last_hidden(case)
    x0, cache = their_runs(case, name)

    def patch(hidden: Tensor, hook: Any, unit: int) -> Tensor:
        hidden[:, -1, unit] = cache[name][:, -1, unit]
        return hidden

    units = range(0, cache[name].shape[-1], every)
    hooks = [[(name, partial(patch, unit=unit))] for unit in units]
    return torch.stack([case.y1(case.bridge.run_with_hooks(x0, fwd_hooks=hook)) for hook in hooks])[None]


# --------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Floor:
    """Multiply-adds that an exact method needs on a case."""

    case: Case

    def __post_init__(self) -> None:
        block = decoder.stack(self.case.lm).blocks[0]
        size = {name: p.numel() for name, p in block.named_parameters() if p.ndim == 2}
        config = self.case.lm.model.config
        facts = {
            "mlp": sum(count for name, count in size.items() if name.startswith("mlp")),
            "block": sum(size.values()),
            "keys": sum(size[f"self_attn.{which}_proj.weight"] for which in "kv"),
            "width": config.hidden_size,
            "depth": config.num_hidden_layers,
            "length": self.case.ids()[0].shape[1],
        }
        for name, value in facts.items():
            object.__setattr__(self, name, value)

    def run(self, rows: Sequence[int], below: int = -1) -> float:
        """Rows at each position, the last at the end, in the blocks above one; the last position is read."""
        first = self.length - len(rows)
        look = [2 * self.width * (first + i + 1) for i in range(len(rows))]
        full = sum(count * (self.block + at) for count, at in zip(rows, look, strict=True))
        final = sum(rows[:-1]) * self.keys + rows[-1] * (self.block + look[-1])
        return max(0, self.depth - 2 - below) * full + (final if below < self.depth - 1 else 0)

    def both_runs(self) -> float:
        ids = torch.cat(self.case.ids()).tolist()
        return self.run([len({tuple(row[: t + 1]) for row in ids}) for t in range(len(ids[0]))])

    def patches(self, positions: str) -> float:
        x1, x0 = self.case.ids()
        n, length = x0.shape
        differ = int((x1 != x0).any(0).long().argmax())
        total = 0.0
        for start in range(differ, length) if positions == "each" else [length - 1]:
            for layer in range(self.depth):
                if layer < self.depth - 1 or start == length - 1:
                    # The MLP of the same block reacts to its attention.
                    total += len(SITES) * self.run([n] * (length - start), layer) + n * self.mlp
        return total

    def neurons(self) -> float:
        """Each unit moves the logits that are read and the scale of the norm."""
        units = self.case.lm.model.config.intermediate_size
        read = len(self.case.sets.comply) + len(self.case.sets.refuse)
        return units * self.width * (read + 2) + len(self.case.pairs) * units * (read + 2)


def compare(
    case: Case, mine: Callable, other: Callable, runs: Callable, needed: float, rate: float, repeats: int,
    every: int = 1,
) -> dict[str, Any]:  # fmt: skip
    seconds, value = best(mine, repeats)
    # Theirs takes many times as long, so that it needs fewer repeats to come out of the noise.
    before, _ = best(runs, repeats)
    reference, expected = best(
        partial(other, every=every), max(1, repeats // 4), partial(theirs, case, "last", 8)
    )
    reference = before + (reference - before) * value.shape[1] / expected.shape[1]
    return {
        "ratio": reference / seconds,
        "max_abs_diff": (value[:, ::every].float() - expected.float()).abs().max().item(),
        "floor_ratio": seconds / (2 * needed / rate),
        "seconds": seconds,
        "floor_seconds": 2 * needed / rate,
        "transformer_lens_seconds": reference,
        "transformer_lens_runs": before,
        "cells": value[..., 0].numel(),
        "pairs": len(case.pairs),
    }


def sweeps(case: Case, positions: str, rate: float, repeats: int, every: int = 1) -> dict[str, Any]:
    floor = Floor(case)
    needed = floor.both_runs() + floor.patches(positions)
    mine, other = (partial(side, case, positions) for side in (ours, theirs))
    row = compare(
        case, mine, other, partial(their_runs, case, *hook_names(case)), needed, rate, repeats, every
    )
    before = best(partial(our_runs, case, positions), repeats)[0]
    patched = (row["transformer_lens_seconds"] - row["transformer_lens_runs"]) / max(
        row["seconds"] - before, 1e-9
    )
    return row | {"patching_ratio": patched, "runs_seconds": before}


def headline(by_contrast: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The contrast that the book's claims are about stands in front, with the largest difference of all."""
    largest = max(row["max_abs_diff"] for row in by_contrast.values())
    return by_contrast[CONTRASTS[0]] | {"max_abs_diff": largest, "by_contrast": by_contrast}


def measure(
    name: str = "organism/sft-0",
    *,
    data: str = "",
    dtype: str | None = None,
    pairs: int | None = None,
    examples: int | None = None,
    weights: int = 10**9,
    repeats: int = 8,
    every: int = 1,
) -> dict[str, Any]:
    """All numbers of ``bench.json``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    by_contrast = {contrast: case(name, contrast, pairs, data, dtype) for contrast in CONTRASTS}
    one = by_contrast[CONTRASTS[0]]
    rate = matmul_rate((1024, 1024, 1024), one.lm.model.dtype)
    out: dict[str, Any] = {}
    for key, positions in (("patch_grid", "each"), ("patch_last", "last")):
        rows = {which: sweeps(of, positions, rate, repeats, every) for which, of in by_contrast.items()}
        out[key] = headline(rows)
    needed = Floor(one).both_runs() + Floor(one).neurons()
    out["neurons_last"] = compare(
        one, partial(our_neurons, one), partial(their_neurons, one),
        partial(their_runs, one, last_hidden(one)), needed, rate, repeats, every,
    )  # fmt: skip
    scored = weight_scores.own_case(one.lm, data, examples)
    out |= weight_scores.measure(scored, rate, weights=weights, repeats=repeats)
    out["machine"] = {
        "threads": torch.get_num_threads(), "cpu_count": os.cpu_count(), "matmul_gflops": rate / 1e9,
        "block_gflops": matmul_rate((2048, one.bridge.cfg.d_model, one.bridge.cfg.d_mlp)) / 1e9,
        "torch": torch.__version__, "transformer_lens": version("transformer-lens"),
        "model": portable(name), "dtype": str(one.lm.model.dtype).removeprefix("torch."),
    }  # fmt: skip
    return out


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{'':26}{'ours':>9}{'TL':>9}{'ratio':>8}{'bar':>6}{'patching':>10}{'floor x':>9}{'max diff':>10}"
    ]
    for key, bar in BARS.items():
        rows = {key: found[key]} | {
            f"  {name}": row for name, row in found[key].get("by_contrast", {}).items()
        }
        for name, row in rows.items():
            alone = f"{row['patching_ratio']:10.1f}" if "patching_ratio" in row else " " * 10
            lines.append(
                f"{name:26}{row['seconds']:8.3f}s{row['transformer_lens_seconds']:8.2f}s{row['ratio']:8.1f}"
                f"{bar:6}{alone}{row['floor_ratio']:9.1f}{row['max_abs_diff']:10.1e}"
            )
    lines += ["", weight_scores.table(found)]
    machine = found["machine"]
    lines.append(f"{machine['dtype']}, one thread, {machine['matmul_gflops']:.0f} Gflop/s in large products")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time patching and scoring beside others and the floor.")
    parser.add_argument("--model", dest="name", default="organism/sft-0")
    parser.add_argument("--data", default="", help="what a real model is asked, as in the notebooks")
    parser.add_argument("--dtype", help="of the weights (default: that of the notebooks)")
    parser.add_argument("--every", type=int, default=1, help="TransformerLens runs one in so many cells")
    parser.add_argument("--pairs", type=int, help="at most this many pairs (default: all of one length)")
    parser.add_argument("--examples", type=int, help="score at most this many of each kind (default: all)")
    parser.add_argument("--weights", type=int, default=10**9, help="how many to select from")
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args(arguments)
    found = measure(**vars(options))
    write_json(build_dir() / "bench.json", found)
    print(table(found))
    print(f"written to {os.path.relpath(build_dir() / 'bench.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
