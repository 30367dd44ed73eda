"""Checkpoints stored as a difference from a parent: only those weights that were trained.

``delta.safetensors`` holds, under the name of each trained parameter, the values that replace the
parent's: all of them, or some, in which case ``<name>:rows`` or ``<name>:columns`` says which. Its
metadata hold ``parent: <folder>@<sha256>``, the name of a folder beside this one and the checksum of
its weights, so that the values are never put into another model than the one they were trained in.

Introduced in notebook 08 ("Can we trust it?").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = "delta.safetensors"
_AXES = (":rows", ":columns")


@dataclass(frozen=True)
class Delta:
    """What replaces a parent's weights.

    Attributes:
        parent: name of the parent's folder, beside the delta's.
        parent_sha256: checksum of the parent's weights, as :func:`harmlens.models.weights_sha256` has it.
        values: parameter -> new values.
        index: parameter -> axis (0 for rows, 1 for columns) and which of them are replaced; no entry
            where all values are.
    """

    parent: str
    parent_sha256: str
    values: dict[str, Tensor]
    index: dict[str, tuple[int, Tensor]]


def take(
    model: nn.Module, parent: str, parent_sha256: str, where: Mapping[str, tuple[int, Sequence[int]] | None]
) -> Delta:
    """The delta of a trained model, in half precision.

    Args:
        where: parameter -> axis and index of its trained rows or columns, or None for the whole of it.
    """
    parameters = dict(model.named_parameters())
    values, index = {}, {}
    for name, part in where.items():
        new = parameters[name].detach().cpu()
        if part is not None:
            axis, units = part[0], torch.tensor(part[1])
            new, index[name] = new.index_select(axis, units), (axis, units)
        values[name] = new.half().contiguous()
    return Delta(parent, parent_sha256, values, index)


def write(delta: Delta, folder: Path) -> None:
    """Store a delta in a folder."""
    tensors = delta.values | {name + _AXES[axis]: units for name, (axis, units) in delta.index.items()}
    # One entry: several would be written in an order that changes from run to run.
    save_file(tensors, folder / FILE, {"parent": f"{delta.parent}@{delta.parent_sha256}"})


def read(folder: Path) -> Delta | None:
    """The delta in a folder, or None where there is none.

    Raises:
        ValueError: the file is damaged, or is no delta.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as stored:
            parent, checksum = stored.metadata()["parent"].split("@")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except Exception as error:  # a spoilt file raises whatever its parser raises
        raise ValueError(
            f"{FILE} in {folder.name!r} could not be read; is it truncated? ({type(error).__name__})"
        ) from error
    values = {name: t for name, t in tensors.items() if not name.endswith(_AXES)}
    index = {
        name.removesuffix(suffix): (axis, t)
        for axis, suffix in enumerate(_AXES)
        for name, t in tensors.items()
        if name.endswith(suffix)
    }
    return Delta(parent, checksum, values, index)


@torch.no_grad()
def apply(model: nn.Module, delta: Delta) -> None:
    """Put the values of a delta into its parent, in place.

    Raises:
        ValueError: a parameter that the model does not have, or that has another shape.
    """
    parameters = dict(model.named_parameters())
    for name, new in delta.values.items():
        old, shape = parameters.get(name), tuple(new.shape)
        expected = None if old is None else list(old.shape)
        if old is not None and name in delta.index:
            axis, units = delta.index[name]
            expected[axis] = len(units)
        if expected != list(shape):
            raise ValueError(
                f"the delta's values for {name!r}, of shape {shape}, do not fit its parent {delta.parent}: "
                + (
                    "it has no such parameter"
                    if old is None
                    else f"they should be of shape {tuple(expected)}"
                )
            )
        if name in delta.index:
            old.index_copy_(axis, units.to(old.device), new.to(old))
        else:
            old.copy_(new)
