"""From a pruned checkpoint back to its mask: which weights of the original are zero in it.

Introduced in notebook 16 ("Where the weights are").
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from harmlens.keep.files import weights_sha256
from harmlens.models import hub
from harmlens.weights.masks import Mask


def between(original: str | Path, pruned: str | Path, *, name: str = "") -> Mask:
    """The weights that a pruned checkpoint lost, of all matrices in the blocks of its original.

    Both are folders or Hugging Face ids. They are read matrix by matrix, never whole. What is zero in both
    was not pruned.

    Args:
        name: of the mask; default that of the pruned checkpoint.

    Raises:
        ValueError: a folder without weights, another architecture, or weights that changed and are not zero:
            the checkpoint was trained as well, and what was pruned can't be told.
    """
    (first, revision), (other, _) = (_files(str(source)) for source in (original, pruned))
    label, indices, shapes = name or Path(str(pruned)).name, {}, {}
    if missing := [parameter for parameter in first if parameter not in other]:
        raise ValueError(f"pruned={str(pruned)!r} has no {missing[0]}; it is of another architecture")
    for parameter, before in _matrices(first):
        after = _read(other[parameter], parameter)
        if before.shape != after.shape:
            raise ValueError(
                f"{parameter}: shapes {[*before.shape]} and {[*after.shape]}; another architecture"
            )
        changed = before.to(after.dtype) != after  # rounding in another precision is no change
        if bool((after[changed] != 0).any()):
            raise ValueError(
                f"{parameter}: {int((after[changed] != 0).sum())} weights of {str(pruned)!r} differ from the "
                "original and are not zero. It was trained too, so a mask can't be told from it"
            )
        indices[parameter] = changed.flatten().nonzero()[:, 0]
        shapes[parameter] = tuple(before.shape)
    return Mask(indices, shapes, str(original), revision, label)


def _files(source: str) -> tuple[dict[str, Path], str]:
    """Parameter -> the file that holds it; and what the weights are known by."""
    folder, revision = Path(source).expanduser(), ""
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        repository, commit = hub.split(source)
        folder = Path(snapshot_download(repository, revision=commit, allow_patterns=["*.safetensors"]))
        revision = folder.name
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ValueError(f"{source!r} holds no weights (*.safetensors)")
    held = {}
    for file in found:
        with safe_open(file, "pt") as stored:
            held |= dict.fromkeys(stored.keys(), file)
    return held, revision or weights_sha256(folder)


def _matrices(held: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """The matrices of the blocks, in the order of their names, one at a time."""
    for parameter in sorted(held):
        if any(part.isdigit() for part in parameter.split(".")):
            value = _read(held[parameter], parameter)
            if value.ndim == 2:
                yield parameter, value


def _read(file: Path, parameter: str) -> Tensor:
    with safe_open(file, "pt") as stored:
        return stored.get_tensor(parameter)
