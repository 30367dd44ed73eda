"""Where organisms are, whether they are whole, and how one is stored as a difference from its parent.

``delta.safetensors`` holds, under the name of each trained parameter, the values that replace the parent's:
all of them, or some, in which case ``<name>:rows``, ``<name>:columns`` or ``<name>:flat`` (positions in the
flattened parameter, row after row) says which. Its metadata hold ``parent: <folder>@<sha256>``, the name of a
folder beside this one and the checksum of its weights.

Introduced in notebooks 00 ("A model organism of harm") and, for differences, 08 ("Can we trust it?").
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from harmlens.keep.files import organism_homes, weights_sha256

STAGES = ("base", "mid", "sft", "dpo")
SEEDS = (0, 1, 2)
FILE = "delta.safetensors"
FLAT = 2  # in the place of an axis: single weights, by their position in the flattened parameter
_AXES = (":rows", ":columns", ":flat")


def place(checkpoint: str) -> Path:
    """The folder of a checkpoint such as "sft-0", or the one that it would be trained into."""
    shipped, own = (home / checkpoint for home in organism_homes())
    return shipped if shipped.is_dir() else own


def organism_folder(name: str, seed: int | None = None) -> Path:
    """The folder of ``"organism/<stage>[-<seed>]"``; a ValueError for what is not there lists what is."""
    match = re.fullmatch(r"organism/([a-z_]+)(?:-(\d+))?", name)
    there = sorted({p.name for home in organism_homes() for p in home.glob("*-*/") if not p.suffix})
    listing = ", ".join(there) or "none yet: run `make organism`"
    if match is None:
        raise ValueError(f"name={name!r} is not organism/<stage>[-<seed>]; available: {listing}")
    stage, named = match.groups()
    if named is not None and seed is not None and int(named) != seed:
        raise ValueError(f"name={name!r} and seed={seed} disagree; give the seed once")
    run = int(named) if named is not None else seed or 0
    folder = place(f"{stage}-{run}")
    if not folder.is_dir():
        made = f'of a known stage it is trained by `make organism ARGS="--seeds {run}"`'
        raise ValueError(f"there is no organism {folder.name} ({made}); available: {listing}")
    return folder


def contents_sha256(folder: Path) -> str:
    """sha256 over names and contents of all files of a checkpoint but its card."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != "card.json" and not file.name.startswith("."):
            # Text may come back from git with other line ends.
            content = file.read_bytes()
            content = content if file.suffix == ".safetensors" else content.replace(b"\r\n", b"\n")
            digest.update(f"{file.name}/{len(content)}/".encode() + content)
    return digest.hexdigest()


def intact(folder: Path) -> dict | None:
    """The card of an organism's checkpoint whose files are all as they were saved, else None."""
    try:
        card = json.loads((folder / "card.json").read_text())
        return card if card["sha256"] == contents_sha256(folder) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def require_intact(folder: Path) -> dict:
    """The card of an organism; a ValueError where its files are not those that were saved."""
    card = intact(folder)
    if card is None:
        raise ValueError(
            f"files of organism {folder.name} are missing, truncated or changed. {_restore(folder)}"
        )
    return card


def _restore(folder: Path) -> str:
    return f"Restore it with `git checkout -- data/organisms/{folder.name}`, or run `make organism`."


@dataclass(frozen=True)
class Delta:
    """What replaces a parent's weights."""

    parent: str  # name of its folder, beside the delta's
    parent_sha256: str  # of its weights (keep.files.weights_sha256)
    values: dict[str, Tensor]  # of each parameter
    # Axis (0 for rows, 1 for columns, FLAT) and which of them are replaced; no entry where all values are.
    index: dict[str, tuple[int, Tensor]]


def take_delta(
    model: nn.Module, parent: str, parent_sha256: str, where: Mapping[str, tuple[int, Sequence[int]] | None]
) -> Delta:
    """The delta of a trained model, in half precision.

    ``where`` maps a parameter to the axis (as in :class:`Delta`) and index of what is trained; None for all.
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


def write_delta(delta: Delta, folder: Path) -> None:
    """Store a delta in a folder."""
    tensors = delta.values | {name + _AXES[axis]: units for name, (axis, units) in delta.index.items()}
    # One entry: several would be written in an order that changes from run to run.
    save_file(tensors, folder / FILE, {"parent": f"{delta.parent}@{delta.parent_sha256}"})


def read_delta(folder: Path) -> Delta | None:
    """The delta in a folder, or None where there is none; a ValueError where the file is damaged."""
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
    index = {
        name: (axis, tensors.pop(name + suffix))
        for name in sorted(tensors)
        for axis, suffix in enumerate(_AXES)
        if name + suffix in tensors
    }
    return Delta(parent, checksum, tensors, index)


def opened(folder: Path, organism: bool) -> tuple[str, Delta | None]:
    """The folder with a local model's weights, and what replaces some of them, for one stored as a delta.

    A ValueError where files of an organism, or the weights of a parent, are not those that were saved.
    """
    if organism:
        require_intact(folder)
    delta = read_delta(folder)
    if delta is None:
        return str(folder), None
    home = place(delta.parent) if organism else folder.parent / delta.parent
    if organism:
        require_intact(home)
    if weights_sha256(home) != delta.parent_sha256:
        raise ValueError(
            f"{folder.name} is stored as its difference from {home.name}, whose weights are no longer "
            f"those it was trained in. {_restore(home)}"
        )
    return str(home), delta


@torch.no_grad()
def apply_delta(model: nn.Module, delta: Delta) -> None:
    """Put the values of a delta into its parent, in place; a ValueError where it does not fit."""
    parameters = dict(model.named_parameters())
    for name in sorted(delta.values.keys() | delta.index.keys()):
        try:
            old, new = parameters[name], delta.values[name]
            axis, units = delta.index.get(name, (0, torch.arange(len(old))))
            if units.is_floating_point() or len(units.unique()) != len(units):
                raise IndexError("the index should be a list of different whole numbers")
            target, axis = (old.view(-1), 0) if axis == FLAT else (old, axis)
            target.index_copy_(axis, units.long().to(old.device), new.to(old))
        except (KeyError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"the delta's {name!r} does not fit its parent {delta.parent}; is the file damaged? ({error})"
            ) from error
