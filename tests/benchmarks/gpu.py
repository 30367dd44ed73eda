"""Scoring the weights of a large model on a GPU: seconds, peak memory, share of peak arithmetic.

    python tests/benchmarks/gpu.py                          # 8-billion-parameter Llama, bfloat16, 412 + 412
    python tests/benchmarks/gpu.py --shape tiny --device cpu

Weights are random and made on the device, so nothing is downloaded. Sums go where they fit: on the device, or
with ``--accumulate-on cpu`` to host memory. The rate of a large matrix product, measured on the same device,
stands for its peak. Operations are counted as in ``weight_scores.py``. The figure in the released code's
description, about 20 minutes for this shape on one L40, is of a procedure that makes one pass for each layer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from weight_scores import Case, operations, random_model, random_rows

from harmlens.keep import files
from harmlens.weights import attribution

SHAPES = {
    "8b": {
        "layers": 32, "width": 4096, "hidden": 14336, "heads": 32, "num_key_value_heads": 8,
        "vocabulary": 128256,
    },
    "tiny": {"layers": 2, "width": 32, "hidden": 64, "heads": 4, "num_key_value_heads": 2, "vocabulary": 64},
}  # fmt: skip


def rate(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 10) -> float:
    """Operations per second of a square matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    finish(device)
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    finish(device)
    return 2 * size**3 * repeats / (time.perf_counter() - start)


def finish(device: torch.device) -> None:
    """Wait for what was started; on a CPU everything is done when it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    shape: str, device: str, *, dtype: str, examples: int, length: int, accumulate_on: str | None
) -> dict[str, Any]:
    place, kind = torch.device(device), getattr(torch, dtype)
    torch.set_default_dtype(kind)
    try:
        with place:
            lm = random_model(**SHAPES[shape])
    finally:
        torch.set_default_dtype(torch.float32)
    rows = random_rows(2 * examples, SHAPES[shape]["vocabulary"], length=length, answer=length // 2)
    case = Case(lm, rows[:examples], rows[examples:])
    options = {"accumulate_on": accumulate_on}
    attribution.prune_score(lm, rows[:2], **options)  # libraries choose and load their kernels
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    print(f"signed:   {attribution.make_plan(lm, case.harmful, kinds=('signed',), **options)}", flush=True)
    out: dict[str, Any] = {"shape": shape, "dtype": dtype, "examples": [examples, examples], "length": length}
    sides = (("signed", attribution.prune_score, case.harmful),
             ("unsigned", attribution.preserve_score, case.benign))  # fmt: skip
    for name, score, chosen in sides:
        finish(place)
        start = time.perf_counter()
        score(lm, chosen, **options)
        finish(place)
        out[f"{name}_seconds"] = time.perf_counter() - start
    seconds = out["signed_seconds"] + out["unsigned_seconds"]
    peak = rate(place, kind, 8192 if place.type == "cuda" else 256)
    out |= {
        "seconds": seconds,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "peak_memory": torch.cuda.max_memory_allocated(place) if place.type == "cuda" else None,
        "matmul_tflops": peak / 1e12,
        "share_of_peak": 3 * operations(case) / seconds / peak,
        "torch": torch.__version__,
    }
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time the scoring of a large random model's weights.")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--examples", type=int, default=412, help="of each of the two scores")
    parser.add_argument("--length", type=int, default=128, help="tokens of an example, half of them answer")
    parser.add_argument("--accumulate-on", help="cpu for sums in host memory (default: the model's device)")
    options = vars(parser.parse_args(arguments))
    if options["device"] != "cpu" and not torch.cuda.is_available():
        print("error: no GPU is to be seen; --shape tiny --device cpu shows that the command runs")
        return 1
    found = measure(options.pop("shape"), options.pop("device"), **options)
    print(json.dumps(found, indent=1))
    if found["peak_memory"] is not None:
        print(f"peak memory {files.size_text(found['peak_memory'])}, {found['share_of_peak']:.0%} of peak")
    return 0


if __name__ == "__main__":
    sys.exit(main())
