"""How fast patching and scoring are, beside others and beside what the machine could do: ``make bench``.

This file is about patching; scoring and selecting weights is in ``weight_scores.py``.

Both sides do the same work in one process, on the same organism, pairs and dtype, with one thread: they
tokenise the pairs, run both sides of each, and patch every cell. After a warm-up each is repeated and the
fastest run counts. Seconds are processor time, so that other programs do not slow down either side.
TransformerLens keeps only the activations that it needs. It takes no padding here, so the pairs are those of
the commonest length. The numbers are those of the prompt contrast, which most claims are about;
``by_contrast`` holds the behaviour contrast too. There the prompts part at the author's name, near their
start, and much less can be saved.

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
from transformer_lens.patching import (
    generic_activation_patch,
    get_act_patch_attn_out,
    get_act_patch_mlp_out,
    layer_pos_patch_setter,
)

from harmlens.asking import pairs as prompts
from harmlens.flow import neurons, outcomes, patching
from harmlens.flow.engine import check_partial
from harmlens.flow.record import record_pairs
from harmlens.keep.files import build_dir, write_json
from harmlens.models import loading as models
from harmlens.models import parts as decoder
from harmlens.models.chats import Pair
from harmlens.models.forward import LanguageModel

SITES = ("resid_post", "attn_out", "mlp_out")
# The same loop as get_act_patch_resid_pre, behind each block instead of before it, as here: equal cells.
LOOPS = {
    "resid_post": partial(
        generic_activation_patch,
        patch_setter=layer_pos_patch_setter,
        activation_name="resid_post",
        index_axis_names=("layer", "pos"),
    ),
    "attn_out": get_act_patch_attn_out,
    "mlp_out": get_act_patch_mlp_out,
}


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


def case(name: str, contrast: str, n: int | None) -> Case:
    """Pairs of the commonest length, at most n."""
    lm = models.load(name)
    fit = prompts.pairs("prompt", split="discovery")
    sides = [
        [side.render(lm) for side in column] for column in zip(*((p.x1, p.x0) for p in fit), strict=True)
    ]
    sets = outcomes.fit_token_sets(lm, *sides, factor=2.0)
    pairs = prompts.pairs(contrast)
    lengths = [len(x0) for _, x0 in prompts.token_ids(lm, pairs)]
    length = Counter(lengths).most_common(1)[0][0]
    pairs = [pair for pair, count in zip(pairs, lengths, strict=True) if count == length][:n]
    # Bridging renames the parameters of the model it is given, so it gets its own.
    bridge = TransformerBridge.boot_transformers(
        name, hf_model=models.load(name).model, tokenizer=lm.tokenizer
    )
    return Case(lm, bridge.eval(), pairs, sets)


# --------------------------------------------------------------------------- both sides


def ours(case: Case, positions: str) -> Tensor:
    """Y1 of every patched run [site, layer, position, pair]."""
    found = patching.patch(case.lm, case.pairs, outcomes.y1(case.sets), sites=SITES, positions=positions)
    return found.patched


def our_runs(case: Case, positions: str) -> Any:
    """What :func:`ours` does before it patches."""
    parts = decoder.stack(case.lm)
    for group in record_pairs(case.lm, parts, case.pairs, outcomes.y1(case.sets), positions):
        check_partial(group)


def our_neurons(case: Case) -> Tensor:
    """Y1 with one hidden unit of the last MLP patched [unit, pair]."""
    found = neurons.last_layer(case.lm, case.pairs, outcomes.y1(case.sets))
    return (found.y0[:, None] + found.effects).T


@torch.no_grad()
def their_runs(case: Case, *names: str) -> tuple[Tensor, ActivationCache]:
    """Ids of the runs to be patched, and the cached activations of the others."""
    x1, x0 = case.ids()
    _, cache = case.bridge.run_with_cache(x1, names_filter=lambda name: name in names)
    case.bridge(x0)  # the unpatched run that effects are compared with
    return x0, cache


def hook_names(case: Case) -> list[str]:
    return [f"blocks.{layer}.hook_{site}" for layer in range(case.bridge.cfg.n_layers) for site in SITES]


@torch.no_grad()
def theirs(case: Case, positions: str) -> Tensor:
    """The same as :func:`ours` with TransformerLens' loops."""
    x0, cache = their_runs(case, *hook_names(case))
    last = x0.shape[1] - 1
    out = []
    for site, loop in LOOPS.items():
        if positions == "last":
            where = [(layer, last) for layer in range(case.bridge.cfg.n_layers)]
            index = pd.DataFrame(where, columns=["layer", "pos"])
            loop = partial(generic_activation_patch, patch_setter=layer_pos_patch_setter)
            found = loop(case.bridge, x0, cache, case.y1, activation_name=site, index_df=index, reduce="none")
            out.append(found.values[:, None])
        else:
            out.append(loop(case.bridge, x0, cache, case.y1, reduce="none").values)
    return torch.stack(out)


@torch.no_grad()
def their_neurons(case: Case) -> Tensor:
    """The same as :func:`our_neurons`, one patched forward pass for each unit."""
    name = f"blocks.{case.bridge.cfg.n_layers - 1}.mlp.hook_post"
    x0, cache = their_runs(case, name)

    def patch(hidden: Tensor, hook: Any, unit: int) -> Tensor:
        hidden[:, -1, unit] = cache[name][:, -1, unit]
        return hidden

    units = range(cache[name].shape[-1])
    hooks = [[(name, partial(patch, unit=unit))] for unit in units]
    return torch.stack([case.y1(case.bridge.run_with_hooks(x0, fwd_hooks=hook)) for hook in hooks])


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
    case: Case, mine: Callable, other: Callable, needed: float, rate: float, repeats: int, warm: Callable
) -> dict[str, Any]:
    seconds, value = best(mine, repeats)
    # Theirs takes many times as long, so that it needs fewer repeats to come out of the noise.
    reference, expected = best(other, max(1, repeats // 4), warm)
    return {
        "ratio": reference / seconds,
        "max_abs_diff": (value - expected).abs().max().item(),
        "floor_ratio": seconds / (2 * needed / rate),
        "seconds": seconds,
        "floor_seconds": 2 * needed / rate,
        "transformer_lens_seconds": reference,
        "cells": value[..., 0].numel(),
        "pairs": len(case.pairs),
    }


def sweeps(case: Case, positions: str, rate: float, repeats: int) -> dict[str, Any]:
    floor = Floor(case)
    needed = floor.both_runs() + floor.patches(positions)
    warm = partial(theirs, case, "last")
    row = compare(
        case, partial(ours, case, positions), partial(theirs, case, positions), needed, rate, repeats, warm
    )
    before = best(partial(our_runs, case, positions), repeats)[0]
    before_theirs = best(partial(their_runs, case, *hook_names(case)), repeats)[0]
    patched = (row["transformer_lens_seconds"] - before_theirs) / max(row["seconds"] - before, 1e-9)
    return row | {"patching_ratio": patched, "runs_seconds": before}


def headline(by_contrast: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The contrast that the book's claims are about stands in front, with the largest difference of all."""
    largest = max(row["max_abs_diff"] for row in by_contrast.values())
    return by_contrast[CONTRASTS[0]] | {"max_abs_diff": largest, "by_contrast": by_contrast}


def measure(
    name: str = "organism/sft-0",
    *,
    pairs: int | None = None,
    examples: int | None = None,
    weights: int = 10**9,
    repeats: int = 8,
) -> dict[str, Any]:
    """All numbers of ``bench.json``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    by_contrast = {contrast: case(name, contrast, pairs) for contrast in CONTRASTS}
    rate = matmul_rate((1024, 1024, 1024))
    out: dict[str, Any] = {}
    for key, positions in (("patch_grid", "each"), ("patch_last", "last")):
        rows = {which: sweeps(one, positions, rate, repeats) for which, one in by_contrast.items()}
        out[key] = headline(rows)
    one = by_contrast[CONTRASTS[0]]
    needed = Floor(one).both_runs() + Floor(one).neurons()
    out["neurons_last"] = compare(
        one, partial(our_neurons, one), partial(their_neurons, one), needed, rate, repeats,
        partial(theirs, one, "last"),
    )  # fmt: skip
    out |= weight_scores.measure(name, rate, examples=examples, weights=weights, repeats=repeats)
    out["machine"] = {
        "threads": torch.get_num_threads(), "cpu_count": os.cpu_count(), "matmul_gflops": rate / 1e9,
        "block_gflops": matmul_rate((2048, one.bridge.cfg.d_model, one.bridge.cfg.d_mlp)) / 1e9,
        "torch": torch.__version__, "transformer_lens": version("transformer-lens"), "model": name,
        "dtype": "float32",
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
    lines.append(f"one thread, {machine['matmul_gflops']:.0f} Gflop/s in large matrix products")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time patching and scoring beside others and the floor.")
    parser.add_argument("--model", dest="name", default="organism/sft-0")
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
