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
    parts = dict(key) if isinstance(key, Mapping) else dict(enumerate(key if _is_list(key) else [key]))
    name = getattr(getattr(compute, "func", compute), "__name__", "<")
    if "<" in name:
        name = next((part for part in parts.values() if isinstance(part, str)), "values")
    whole = digest(files.versions(), compute, key)
    home = Path(folder).expanduser() if folder else files.build_dir() / "runs"
    file = home / files.slug(name) / f"{whole[:24]}.json"
    beside = file.with_suffix(".safetensors")
    with files.locked(file):
        if file.is_file():
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                about, tensors = files.read_tensors(beside, "key") if content["beside"] else (content, {})
                if not content["key"] == about["key"] == whole:
                    raise ValueError("it belongs to another key")
                return _unpacked(content["value"], tensors)
            except Exception as error:  # the parser of tensors has errors of its own
                kind = f"{type(error).__name__}: {error}"
                said = f"{file.name!r} is damaged or foreign ({kind}); it is made anew"
                warnings.warn(said, stacklevel=2)
        began, tensors = time.time(), {}
        value = _packed(compute(), tensors)
        if tensors:
            files.write_tensors(beside, tensors, "key", {"key": whole})
        if isinstance(compute, functools.partial):
            parts |= inspect.signature(compute.func).bind(*compute.args, **compute.keywords).arguments
        about = _provenance(parts, round(time.time() - began, 2))
        content = {"key": whole, "value": value, "beside": bool(tensors), "provenance": about}
        files.write_json(file, content, allow_nan=True)
        return _unpacked(value, tensors)


def _provenance(parts: Mapping[Any, Any], wall_s: float) -> dict[str, Any]:
    """Of a kept value: its first model, and what else it depends on as short text."""
    params = {str(name): getattr(part, "name", None) or repr(part)[:200] for name, part in parts.items()}
    lm = next((part for part in parts.values() if is_model(part)), None)
    made = {} if lm is None else {"revision": lm.revision, "device": str(lm.device)}
    return files.provenance("" if lm is None else lm.name, params=params, wall_s=wall_s, **made)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _packed(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A value as JSON; arrays and tensors go into ``tensors``."""
    import torch

    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(name): _packed(item, tensors) for name, item in value.items()}
    if _is_list(value):
        return [_packed(item, tensors) for item in value]
    if isinstance(value, range):
        return {"kept as": "range", "of": [value.start, value.stop, value.step]}
    if dataclasses.is_dataclass(value) and type(value).__module__.startswith("harmlens."):
        entries = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        tuples = [name for name, item in entries.items() if isinstance(item, tuple)]
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"kept as": kind, "fields": _packed(entries, tensors), "tuples": tuples}
    if not isinstance(value, np.ndarray | torch.Tensor):
        kind = type(value).__name__
        raise TypeError(f"a result of type {kind} can't be kept; return numbers, text, arrays")
    array, name = isinstance(value, np.ndarray), str(len(tensors))
    if value.dtype.kind not in "fiub" if array else value.is_complex():
        raise TypeError(f"an array of {value.dtype} can't be kept; return numbers")
    tensors[name] = torch.from_numpy(value.copy()) if array else value.detach().cpu().clone()
    return {"kept as": "array" if array else "tensor", "entry": name}


def _unpacked(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "kept as" not in value:
        return {name: _unpacked(item, tensors) for name, item in value.items()}
    if value["kept as"] == "range":
        return range(*value["of"])
    if "fields" in value:
        module, _, kind = value["kept as"].partition(":")
        if not module.startswith("harmlens."):
            raise ValueError(f"it holds a {kind} of {module}")
        entries = _unpacked(value["fields"], tensors)
        entries |= {name: tuple(entries[name]) for name in value["tuples"]}
        return getattr(import_module(module), kind)(**entries)
    found = tensors[value["entry"]]
    return found.numpy() if value["kept as"] == "array" else found
