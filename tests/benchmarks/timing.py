"""What all benchmarks measure with: processor time, so that other programs slow nobody down."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def best(
    function: Callable[[], Any], repeats: int, warm: Callable[[], Any] | None = None
) -> tuple[float, Any]:
    """Processor seconds of the fastest run after a warm-up (by default a run), and what it gave."""
    (warm or function)()
    seconds = []
    for _ in range(repeats):
        value = None  # of the run before: two results at a time would be measured as memory
        start = time.process_time()
        value = function()
        seconds.append(time.process_time() - start)
    return min(seconds), value


def matmul_rate(shape: Sequence[int], dtype: torch.dtype = torch.float32, repeats: int = 20) -> float:
    """Operations per second of a matrix product [m, k] x [k, n]; a multiplication and an addition are two."""
    m, k, n = shape
    a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    return 2 * m * k * n / best(lambda: torch.mm(a, b), repeats)[0]
