"""Checkpoints stored as a difference from a parent: only those weights that were trained.

``delta.safetensors`` holds, under the name of each trained parameter, the values that replace the
parent's: all of them, or some, in which case ``<name>:rows``, ``<name>:columns`` or ``<name>:flat``
(positions in the flattened parameter, row after row) says which. Its metadata hold
``parent: <folder>@<sha256>``, the name of a folder beside this one and the checksum of its weights, so that
the values are never put into another model than the one they were trained in.

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
_AXES = (":rows", ":columns", ":flat")
FLAT = 2  # in the place of an axis: single weights, by their position in the flattened parameter


@dataclass(frozen=True)
class Delta:
    """What replaces a parent's weights.

    Attributes:
        parent: name of the parent's folder, beside the delta's.
        parent_sha256: checksum of the parent's weights, as :func:`models.loading.weights_sha256` has it.
        values: parameter -> new values.
        index: parameter -> axis (0 for rows, 1 for columns, :data:`FLAT` for single weights) and which
            of them are replaced; no entry where all values are.
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
        where: parameter -> axis (0, 1 or :data:`FLAT`) and index of what is trained in it, or None for
            the whole of it.
    """
    parameters = dict(model.named_parameters())
    values, index = {}, {}
    for name, part in where.items():
        new = parameters[name].detach().cpu()
        if part is not None:
            axis, units = part[0], torch.as_tensor(part[1])
            new = new.flatten()[units] if axis == FLAT else new.index_select(axis, units)
            # Single weights are many, and their positions would take more room than their values.
            index[name] = (axis, units.int() if axis == FLAT else units)
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
        ValueError: a parameter that the model does not have, or that has another shape; an index that
            cannot be one of it. The model is left as it was.
    """
    parameters = dict(model.named_parameters())
    for name in sorted(delta.values.keys() | delta.index.keys()):
        _check(delta, name, parameters.get(name))
    for name, new in delta.values.items():
        old = parameters[name]
        if name not in delta.index:
            old.copy_(new)
            continue
        axis, units = delta.index[name]
        target, axis = (old.view(-1), 0) if axis == FLAT else (old, axis)
        target.index_copy_(axis, units.long().to(old.device), new.to(old))


def _check(delta: Delta, name: str, old: Tensor | None) -> None:
    """Refuse values or an index that do not fit the parameter that they are for."""
    fit = f"do not fit its parent {delta.parent}: "
    if name not in delta.values:
        raise ValueError(f"the delta's index for {name!r} has no values; is the file damaged?")
    shape = tuple(delta.values[name].shape)
    if old is None:
        raise ValueError(f"the delta's values for {name!r}, of shape {shape}, {fit}it has no such parameter")
    expected = list(old.shape)
    if name in delta.index:
        axis, units = delta.index[name]
        if axis != FLAT and axis >= old.ndim:
            raise ValueError(f"the delta's columns of {name!r} {fit}it has no columns")
        limit = old.numel() if axis == FLAT else old.shape[axis]
        whole = not (units.is_floating_point() or units.is_complex() or units.dtype == torch.bool)
        if not whole or units.ndim != 1 or len(units.unique()) != len(units):
            raise ValueError(
                f"the delta's index for {name!r} should be a list of different whole numbers; is it damaged?"
            )
        if len(units) and (units.min() < 0 or units.max() >= limit):
            raise ValueError(
                f"the delta's index for {name!r} runs from {units.min()} to {units.max()}, but its parent "
                f"{delta.parent} has 0 to {limit - 1}; is it damaged?"
            )
        expected = [len(units)] if axis == FLAT else expected
        expected[0 if axis == FLAT else axis] = len(units)
    if expected != list(shape):
        raise ValueError(
            f"the delta's values for {name!r}, of shape {shape}, {fit}they should be of shape "
            f"{tuple(expected)}"
        )
