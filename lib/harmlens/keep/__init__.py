"""What lasts: what was computed before, digests of models, files written whole, where a result comes from.

In: paths, values, models. Out: folders, digests, kept values, provenance. :func:`remember` is the one way to
keep what took long.

Introduced in notebook 12 ("What alignment does").
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import time
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harmlens.keep import files
from harmlens.keep.digests import digest, is_model

if TYPE_CHECKING:  # pages and tables are made without torch
    import torch


def remember(key: Any, compute: Callable[[], Any], folder: Path | str | None = None) -> Any:
    """``compute()``, or what it gave the last time.

    >>> remember(["rates", lm, n], lambda: rates(lm, n))  # doctest: +SKIP
    >>> remember("rates", functools.partial(rates, lm, n))  # the same: what it is given counts

    A value is one JSON file with its provenance, arrays and tensors in one beside it, written when it is
    finished: of an interrupted series the finished ones are still there. Two processes may share a folder;
    the second waits for the first.

    Args:
        key: names what the value depends on: settings, data, models, in lists and mappings of whatever
            :func:`digest` knows. A model counts as it is now (:func:`model_digest`), not by its name.
        compute: returns numbers, text, arrays, tensors, records of the package such as
            :class:`flow.patching.Effects`, and lists and mappings of them; tuples come back as lists. Its
            code counts (see :func:`digest`), and so do the packages' versions.
        folder: default: ``runs`` in the build folder; in it, one named after the function or the first text
            of the key.

    Raises:
        TypeError: part of the key without a digest, or a value that can't be kept; names its type.
        PermissionError: the value is not there, and nothing can be written.
    """
    entries = key if isinstance(key, list | tuple) else [key]
    parts = dict(key) if isinstance(key, Mapping) else dict(enumerate(entries))
    name = getattr(getattr(compute, "func", compute), "__name__", "<")
    if "<" in name:
        name = next((part for part in parts.values() if isinstance(part, str)), "values")
    whole = digest(files.versions(), compute, key)
    home = Path(folder).expanduser() if folder else files.build_dir() / "runs"
    file = home / files.slug(name) / f"{whole[:24]}.json"
    with files.locked(file):
        if file.is_file():
            try:
                return _read(file, whole)
            except Exception as error:  # the parser of tensors has errors of its own
                kind = f"{type(error).__name__}: {error}"
                said = f"{file.name!r} is damaged or foreign ({kind}); it is made anew"
                warnings.warn(said, stacklevel=2)
        began, value = time.time(), compute()
        if isinstance(compute, functools.partial):
            parts |= inspect.signature(compute.func).bind(*compute.args, **compute.keywords).arguments
        params = {str(name): getattr(part, "name", None) or repr(part)[:200] for name, part in parts.items()}
        lm = next((part for part in parts.values() if is_model(part)), None)
        made = {} if lm is None else {"revision": lm.revision, "device": str(lm.device)}
        seconds = round(time.time() - began, 2)
        about = files.provenance("" if lm is None else lm.name, params=params, wall_s=seconds, **made)
        _write(file, {"key": whole, "value": value, "provenance": about})
        return _read(file, whole)


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Write a value as JSON, after what JSON doesn't know: arrays and tensors, in a file beside it."""
    tensors: dict[str, torch.Tensor] = {}

    def known(value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, range):
            return {"kept as": "range", "of": [value.start, value.stop, value.step]}
        if dataclasses.is_dataclass(value) and type(value).__module__.startswith("harmlens."):
            entries = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            tuples = [name for name, item in entries.items() if isinstance(item, tuple)]
            kind = f"{type(value).__module__}:{type(value).__qualname__}"
            return {"kept as": kind, "fields": entries, "tuples": tuples}
        import torch

        array, name = isinstance(value, np.ndarray), str(len(tensors))
        if not isinstance(value, np.ndarray | torch.Tensor):
            kind = type(value).__name__
            raise TypeError(f"a result of type {kind} can't be kept; return numbers, text, arrays")
        if value.dtype.kind not in "fiub" if array else value.is_complex():
            raise TypeError(f"an array of {value.dtype} can't be kept; return numbers")
        tensors[name] = torch.from_numpy(value.copy()) if array else value.detach().cpu().clone()
        return {"kept as": "array" if array else "tensor", "entry": name}

    text = json.dumps(content, default=known, ensure_ascii=False, indent=1)
    if tensors:
        files.write_tensors(file.with_suffix(".safetensors"), tensors, {"key": content["key"]})
    files.write_whole(file, lambda part: part.write_text(text + "\n", encoding="utf-8"))


def _read(file: Path, key: str) -> Any:
    """The value that :func:`_write` wrote; an error for another or a damaged file."""
    beside = file.with_suffix(".safetensors")
    about, tensors = files.read_tensors(beside) if beside.is_file() else ({"key": key}, {})

    def made(entry: dict[str, Any]) -> Any:
        kind = entry.get("kept as", "")
        if kind == "range":
            return range(*entry["of"])
        if "entry" in entry and kind:
            found = tensors[entry["entry"]]
            return found.numpy() if kind == "array" else found
        if not kind:
            return entry
        module, _, kind = kind.partition(":")
        if not module.startswith("harmlens."):
            raise ValueError(f"it holds a {kind} of {module}")
        tuples = {name: tuple(entry["fields"][name]) for name in entry["tuples"]}
        return getattr(import_module(module), kind)(**entry["fields"] | tuples)

    content = json.loads(file.read_text(encoding="utf-8"), object_hook=made)
    if not content["key"] == about["key"] == key:
        raise ValueError("it belongs to another key")
    return content["value"]
