"""How much memory there is, and files of tensors that are written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from harmlens.keep.paths import write_whole


def free(device: torch.device | str) -> int:
    """Bytes that can be had on a device now, what torch holds in reserve included."""
    device = torch.device(device)
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):  # not Linux
        import psutil  # comes with Jupyter

        return psutil.virtual_memory().available


def shown(size: int) -> str:
    """A size for people.

    >>> shown(3_250_000_000)
    '3.2 GB'
    """
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def write_tensors(file: Path, tensors: Mapping[str, Tensor], key: str, about: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, with what is known of them as JSON under one entry of the metadata."""
    # One entry: several would be written in an order that changes from run to run.
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(file, lambda part: save_file(kept, part, {key: json.dumps(about)}))


def read_tensors(file: Path | str, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`write_tensors` wrote: what is known of the tensors, and the tensors.

    A file that is missing, damaged or of another kind raises whatever its parser raises.
    """
    with safe_open(file, "pt") as stored:
        about = json.loads(stored.metadata()[key])
        return about, {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
