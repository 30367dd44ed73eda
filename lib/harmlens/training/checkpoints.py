"""Training runs that are kept as they go, so that an interrupted one goes on where it was.

A checkpoint is one safetensors file: the parameters that are trained, the state of their optimizers, and
what is known of the run as JSON. It belongs to one run: to one model, data and settings, whose digest is its
key.

Introduced in notebook 13 ("Emergent misalignment").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harmlens.keep import files


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is kept.

    Attributes:
        file: in which it is kept.
        key: digest of all that decides the run; a file with another key is not touched.
        every: steps after which it is written again.
    """

    file: Path
    key: str
    every: int = 100


def write(
    to: Checkpoint, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], about: dict[str, Any]
) -> None:
    """Write the state of a run, whole or not at all. Without optimizers it is a finished one."""
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for number, optimizer in enumerate(optimizers):
        for at, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer/{number}/{at}/{name}"] = torch.as_tensor(value)
    files.write_tensors(to.file, tensors, "run", {**about, "key": to.key})


def resume(
    at: Checkpoint, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any] | None:
    """Put a kept run's state back, in place; returns what is known of it, or None where nothing is kept.

    A damaged file counts as none: the run then starts from its beginning.

    Raises:
        ValueError: the file holds another run.
    """
    if not at.file.is_file():
        return None
    try:
        about, tensors = files.read_tensors(at.file, "run")
    except Exception:  # a spoilt file raises whatever its parser raises
        return None
    if about.pop("key", None) != at.key:
        raise ValueError(
            f"checkpoint {at.file.name} holds another run (other model, data or settings); delete it, or "
            "give another folder"
        )
    states: dict[int, dict[int, dict[str, Tensor]]] = {}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "model":
                parameters[rest].copy_(value)
            else:
                number, place, what = rest.split("/")
                states.setdefault(int(number), {}).setdefault(int(place), {})[what] = value
    for number, optimizer in enumerate(optimizers):
        if number in states:
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": states[number], "param_groups": groups})
    return about
