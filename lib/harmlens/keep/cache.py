"""Finished runs that are kept and not run again.

:func:`kept` calls a function of the library, or gives back what it gave the last time. What decides the
outcome is in the key: the function and all of the library's code, the packages, the models *as they are
now*, data and settings. A change of any of them is a new run; the old one stays beside it.

Introduced in notebook 13 ("Emergent misalignment").
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harmlens.keep import digests, paths, provenance, records
from harmlens.keep.paths import write_json

_ARRAY = "array of numbers"


def kept(function: Callable[..., Any], *args: Any, folder: Path | str | None = None, **options: Any) -> Any:
    """``function(*args, **options)``, from the cache where the same was run before.

    A run is one JSON file with its provenance, ``<folder>/<function>/<key>.json``, written when it is
    finished: of an interrupted series the finished runs are still there. A damaged file is run again. A
    second process that asks for the same run waits for the first.

    Args:
        function: takes what :func:`keep.digests.digest` knows, and must not leave a model changed.
            Returns numbers, text, arrays, and lists and mappings of them.
        folder: default: ``runs`` in the build folder.

    Raises:
        TypeError: an argument that has no digest, or a result that can't be kept; names its type.
        PermissionError: the run is not there, and nothing can be written.
    """
    home = Path(folder).expanduser() if folder else paths.build_dir() / "runs"
    key = digests.digest(function, list(args), options)
    file = home / function.__name__ / f"{key[:24]}.json"
    with records.locked(file):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["key"] == key:
                return _read(content["result"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return _run(function, args, options, file, key)


def _run(function: Callable, args: tuple, options: dict[str, Any], file: Path, key: str) -> Any:
    began = time.time()
    result = _write(function(*args, **options))
    models = [arg for arg in (*args, *options.values()) if digests.speaks(arg)]
    about = provenance.collect(
        models[0].name if models else "", revision=models[0].revision if models else None,
        device=str(models[0].device) if models else "cpu", wall_s=round(time.time() - began, 2),
        params=_params(function, args, options),
    )  # fmt: skip
    write_json(file, {"key": key, "function": function.__qualname__, "result": result, "provenance": about})
    return _read(result)


def _params(function: Callable, args: tuple, options: dict[str, Any]) -> dict[str, str]:
    """What a function was given, by the names of its arguments, as short text."""
    given = inspect.signature(function).bind(*args, **options).arguments
    return {name: getattr(value, "name", None) or repr(value)[:200] for name, value in given.items()}


def _write(value: Any) -> Any:
    """A result as JSON."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub":
            raise TypeError(f"an array of {value.dtype} can't be kept; return numbers")
        return {_ARRAY: value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): _write(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_write(item) for item in value]
    raise TypeError(f"a result of type {type(value).__name__} can't be kept; return numbers, text, arrays")


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        if _ARRAY in value:
            return np.array(value[_ARRAY], dtype=value["dtype"])
        return {name: _read(item) for name, item in value.items()}
    return [_read(item) for item in value] if isinstance(value, list) else value
