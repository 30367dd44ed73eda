"""How much memory there is, and files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch


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


def write_whole(file: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``file``, then put it in its place.

    An interruption leaves the old file as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    write(part)
    part.chmod(0o644)
    os.replace(part, file)
