"""Digests of what decides a computation: code, packages, models as they are now, data and settings.

Introduced in notebook 13 ("Emergent misalignment").
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harmlens.models import LanguageModel
from harmlens.provenance import versions

_NOT_THE_MODEL = ("_name_or_path", "transformers_version")  # in a configuration: where it came from


def digest(*things: Any) -> str:
    """sha256 over the library's code, the packages' versions and everything that is given.

    Models count with their weights as they are now, not with their name: a pruned one is another one.
    Functions count with their source.

    Raises:
        TypeError: a thing that has no digest; names its type.
    """
    out = hashlib.sha256(json.dumps([code(), versions()]).encode())
    for thing in things:
        _add(out, thing)
    return out.hexdigest()


@cache
def code() -> str:
    """sha256 over all modules of the library."""
    out = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        out.update(file.name.encode() + b"\0" + file.read_bytes())
    return out.hexdigest()


def _add(out: Any, thing: Any) -> None:
    """Feed one thing, marked by its type so that no two things are written alike."""
    out.update(f"<{type(thing).__name__}>".encode())
    if thing is None or isinstance(thing, bool | int | float | str):
        out.update(repr(thing).encode())
    elif isinstance(thing, LanguageModel):
        for name, parameter in sorted(thing.model.state_dict().items()):
            out.update(name.encode())
            _add(out, parameter)
        config = thing.model.config.to_diff_dict()
        _add(out, {key: repr(value) for key, value in sorted(config.items()) if key not in _NOT_THE_MODEL})
        _add(out, thing.tokenizer.chat_template)
    elif isinstance(thing, torch.Tensor):
        out.update(f"{thing.dtype}{tuple(thing.shape)}".encode())
        out.update(thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(thing, np.ndarray):
        out.update(f"{thing.dtype}{thing.shape}".encode() + np.ascontiguousarray(thing).tobytes())
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            _add(out, key)
            _add(out, value)
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        for entry in dataclasses.fields(thing):
            _add(out, getattr(thing, entry.name))
    elif isinstance(thing, Sequence | set | frozenset):
        items = sorted(thing, key=repr) if isinstance(thing, set | frozenset) else thing
        for item in items:
            _add(out, item)
    elif callable(thing):
        out.update(_source(thing).encode())
    else:
        raise TypeError(
            f"{type(thing).__name__} has no digest; give numbers, text, arrays, models, functions"
        )
    out.update(b"</>")


def _source(function: Callable) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        raise TypeError(
            f"the source of {function!r} can't be read, so a change of it would go unseen; use a function "
            "that is written in a module or a notebook cell"
        ) from None
