"""What lasts: what was computed before, digests of models, files written whole, where a result comes from.

In: paths, values, models. Out: folders, digests, kept values, provenance. :func:`remember` is the one way to
keep what took long.

Introduced in notebook 12 ("What alignment does").
"""

from __future__ import annotations

import functools
import inspect
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harmlens.keep import files
from harmlens.keep.digests import digest, is_model

if TYPE_CHECKING:  # pages and tables are made without torch
    import torch

_BESIDE = 10_000  # numbers; larger arrays lie in a file of tensors beside the JSON


def remember(key: Any, compute: Callable[[], Any], folder: Path | str | None = None) -> Any:
    """``compute()``, or what it gave the last time.

    >>> remember(["rates", lm, n], lambda: rates(lm, n))  # doctest: +SKIP
    >>> remember("rates", functools.partial(rates, lm, n))  # the same: what it is given counts

    A value is one JSON file with its provenance, written when it is finished: of an interrupted series the
    finished ones are still there. Two processes may share a folder; the second waits for the first.

    Args:
        key: names what the value depends on: settings, data, models, in lists and mappings of whatever
            :func:`digest` knows. A model counts as it is now (:func:`model_digest`), not by its name.
        compute: returns numbers, text, arrays, tensors, and lists and mappings of them; tuples come back as
            lists. Its code counts (see :func:`digest`), and so do the packages' versions.
        folder: default: ``runs`` in the build folder.

    Raises:
        TypeError: part of the key without a digest, or a value that can't be kept; names its type.
        PermissionError: the value is not there, and nothing can be written.
    """
    file, whole = _place(key, compute, folder, ".json")
    beside = file.with_suffix(".safetensors")
    with files.locked(file):
        if file.is_file():
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                about, large = files.read_tensors(beside, "key") if content["large"] else (content, {})
                if not content["key"] == about["key"] == whole:
                    raise ValueError("it belongs to another key")
                return _unpacked(content["value"], large)
            except Exception as error:  # the parser of tensors has errors of its own
                _say_unused(file, error)
        began, large = time.time(), {}
        value = _packed(compute(), large)
        if large:
            files.write_tensors(beside, large, "key", {"key": whole})
        about = _about(key, compute, wall_s=round(time.time() - began, 2))
        content = {"key": whole, "value": value, "large": bool(large), "provenance": about}
        files.write_json(file, content, allow_nan=True)
        return _unpacked(value, large)


class Growing(Sequence):
    """Values of a long measurement, kept as they come. See :func:`growing`."""

    def __init__(self, file: Path, values: list[Any]) -> None:
        self._file, self._values = file, values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, i: Any) -> Any:
        return self._values[i]

    def append(self, value: Any) -> None:
        """Add a value, and see it onto the disk."""
        packed = _packed(value, None)
        files.append_lines(self._file, [{"value": packed}])
        self._values.append(_unpacked(packed, {}))


@contextmanager
def growing(key: Any, compute: Callable, folder: Path | str | None = None) -> Iterator[Growing]:
    """Values that are kept one by one, so that a measurement that was stopped goes on where it was.

    >>> with growing(["sweep", lm, pairs], measured) as done:  # doctest: +SKIP
    ...     for pair in pairs[len(done) :]:
    ...         done.append(measured(lm, pair))

    Args:
        key, folder: as in :func:`remember`.
        compute: makes the values; its code counts.

    Yields:
        A sequence of what is there already, with ``append``. Within, other processes wait.
    """
    file, whole = _place(key, compute, folder, ".jsonl")
    with files.locked(file):
        values: list[Any] = []
        try:
            first, *rows = files.read_lines(file) or [{}]
            if file.is_file() and first["key"] != whole:
                raise ValueError("it belongs to another key")
            values = [_unpacked(row["value"], {}) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            _say_unused(file, error)
            first = {}
        if not first:
            files.write_lines(file, [{"key": whole, "provenance": _about(key, compute)}])
        yield Growing(file, values)


def _place(key: Any, compute: Callable, folder: Path | str | None, ending: str) -> tuple[Path, str]:
    """The file of a key, in a folder that is named after the function or the first text of the key."""
    name = getattr(getattr(compute, "func", compute), "__name__", "<")
    if "<" in name:
        name = next((part for part in _parts(key).values() if isinstance(part, str)), "values")
    whole = digest(files.versions(), compute, key)
    home = Path(folder).expanduser() if folder else files.build_dir() / "runs"
    return home / files.slug(name) / f"{whole[:24]}{ending}", whole


def _say_unused(file: Path, why: Exception) -> None:
    kind = f"{type(why).__name__}: {why}"
    warnings.warn(f"{file.name!r} is damaged or foreign ({kind}); it is made anew", stacklevel=4)


def _parts(key: Any) -> dict[Any, Any]:
    return dict(key) if isinstance(key, Mapping) else dict(enumerate(key if _is_list(key) else [key]))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _about(key: Any, compute: Callable, **options: Any) -> dict[str, Any]:
    """Provenance of a kept value: its first model and what else it depends on, as short text."""
    parts = _parts(key)
    if isinstance(compute, functools.partial):
        parts |= inspect.signature(compute.func).bind(*compute.args, **compute.keywords).arguments
    params = {str(name): getattr(part, "name", None) or repr(part)[:200] for name, part in parts.items()}
    lm = next((part for part in parts.values() if is_model(part)), None)
    if lm is None:
        return files.provenance("", params=params, **options)
    return files.provenance(lm.name, revision=lm.revision, device=str(lm.device), params=params, **options)


def _packed(value: Any, large: dict[str, torch.Tensor] | None) -> Any:
    """A value as JSON; large arrays go into ``large``, if it is given."""
    import torch

    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(name): _packed(item, large) for name, item in value.items()}
    if _is_list(value):
        return [_packed(item, large) for item in value]
    if not isinstance(value, np.ndarray | torch.Tensor):
        kind = type(value).__name__
        raise TypeError(f"a result of type {kind} can't be kept; return numbers, text, arrays")
    array = isinstance(value, np.ndarray)
    if value.dtype.kind not in "fiub" if array else value.is_complex():
        raise TypeError(f"an array of {value.dtype} can't be kept; return numbers")
    about = {"kept as": "array" if array else "tensor", "dtype": str(value.dtype).removeprefix("torch.")}
    if large is None or np.prod(value.shape) <= _BESIDE:
        return {**about, "shape": list(value.shape), "numbers": value.tolist()}
    name = str(len(large))
    large[name] = torch.from_numpy(np.ascontiguousarray(value)) if array else value.detach()
    return {**about, "entry": name}


def _unpacked(value: Any, large: Mapping[str, torch.Tensor]) -> Any:
    import torch

    if isinstance(value, list):
        return [_unpacked(item, large) for item in value]
    if not isinstance(value, dict):
        return value
    if "kept as" not in value:
        return {name: _unpacked(item, large) for name, item in value.items()}
    array, shape = value["kept as"] == "array", value.get("shape")
    if "entry" in value:
        found = large[value["entry"]].cpu()
        return found.numpy() if array else found
    if array:
        return np.array(value["numbers"], dtype=value["dtype"]).reshape(shape)
    return torch.tensor(value["numbers"], dtype=getattr(torch, value["dtype"])).reshape(shape)
