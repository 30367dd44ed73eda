"""Digests of what decides a computation: code, packages, models as they are now, data and settings.

Whatever is kept (answers, scores, sweeps, runs) is kept under :func:`model`, the one digest of a model.

Introduced in notebook 13 ("Emergent misalignment").
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import json
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harmlens.keep.provenance import versions

# Where a model came from, and what loading and use leave behind: not what it does.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "name_or_path", "gradient_checkpointing")
_MODULE = frozenset(vars(nn.Module()))
_HOOKS = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
_HOOK = -1
_IN_PACKAGE = re.compile(r"-packages|^<@beartype")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(*things: Any) -> str:
    """sha256 over the library's code, the packages' versions and everything that is given.

    Models count as :func:`model` has it, not with their name: a pruned one is another one. Functions count
    with their code and with the values of the function that they were made in, but for lists and mappings,
    in which they may keep notes.

    Raises:
        TypeError: a thing that has no digest; names its type.
    """
    return _sum(code(), versions(), *things)


def model(lm: Any) -> str:
    """One sum of a model as it is now; equal for two models that do the same. See :func:`state`."""
    return _sum(state(lm))


def state(lm: Any) -> dict[str, str]:
    """What decides what a model does, as it is now, in parts: a short sum of each.

    * ``weights``: the bits of every parameter and buffer, summed as whole numbers along rows and along
      columns. Quick for billions of weights and the same on every device. Any pruning, shuffling or training
      step changes it; against an adversary it would be no protection. Weights on the disk are left out.
    * ``configuration``: of the model, its generation and its modules, adapters and train mode among them.
    * ``tokenizer``: its vocabulary, settings and chat template.
    * ``hooks``: functions that stand on its modules or on all modules, such as those that steer it, with the
      values that they use; empty if there are none. A function that keeps notes from call to call says what
      it depends on in an attribute ``depends_on``: a text or values.

    Raises:
        TypeError: a hook that uses something without a digest; names hook and remedy.
    """
    net = lm.model
    own = frozenset({_HOOK, *map(id, net.modules())})
    tensors = [*net.named_parameters(), *net.named_buffers()]
    about = [
        {key: repr(value) for key, value in sorted(found.to_diff_dict().items()) if key not in _NOT_THE_MODEL}
        for found in (net.config, getattr(net, "generation_config", None))
        if found is not None
    ]
    modules = [[name, _kind(module), _plain(vars(module))] for name, module in net.named_modules()]
    hooks = []
    for where, kind, function in _standing(net):
        try:
            hooks.append([where, kind, _sum(function, own=own)])
        except TypeError as error:
            raise TypeError(
                f"a hook stands on {where or 'the whole model'} of {lm.name!r}, and what it does can't be "
                f"told ({error}), so what is kept would be mixed up with that of other hooks. Remove the "
                "hook, or say what it does: hook.depends_on = 'direction 3, dose 2'"
            ) from error
    return {
        "weights": _sum([[name, _Bits(tensor)] for name, tensor in sorted(tensors, key=lambda t: t[0])])[:16],
        "configuration": _sum(about, modules)[:16],
        "tokenizer": _sum(_tokenizer(lm.tokenizer))[:16],
        "hooks": _sum(hooks)[:16] if hooks else "",
    }


def speaks(thing: Any) -> bool:
    """Whether a thing is a language model: a module together with its tokenizer."""
    return isinstance(getattr(thing, "model", None), nn.Module) and hasattr(thing, "tokenizer")


@cache
def code() -> str:
    """sha256 over all modules of the library."""
    out = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        out.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return out.hexdigest()


# --------------------------------------------------------------------------- parts of a model


@dataclasses.dataclass(frozen=True)
class _Bits:
    """A tensor that counts with sums along its rows and columns, not with each number."""

    tensor: Tensor


def _bits(tensor: Tensor) -> Iterator[bytes]:
    yield f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    if tensor.is_meta:  # moved to the disk for lack of memory; not there to be summed
        return
    table = tensor.detach().reshape(len(tensor), -1) if tensor.dim() > 1 else tensor.detach().reshape(-1, 1)
    bits = table.contiguous().view(_BITS[tensor.element_size()])
    columns: Any = 0
    for part in bits.split(max(1, (1 << 24) // max(1, bits.shape[1]))):  # as whole numbers they are large
        whole = part.long()
        columns = columns + whole.sum(0)
        yield whole.sum(1).cpu().numpy().tobytes()
    yield columns.cpu().numpy().tobytes()


def _kind(thing: Any) -> str:
    kind = thing if isinstance(thing, type | types.FunctionType) else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a module that are no parameters: numbers, names and tensors."""
    out: dict[str, Any] = {"training": attributes["training"]}
    for name, value in sorted(attributes.items()):
        inner = name.startswith("_") and "adapter" not in name  # but which adapters are on
        if inner or name in _MODULE or name in _NOT_THE_MODEL:
            continue
        if isinstance(value, Tensor):
            out[name] = _Bits(value)
        elif _is_plain(value):
            out[name] = repr(value)
    return out


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, (*value, *value.values())))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _tokenizer(tok: Any) -> list[Any]:
    whole = getattr(tok, "backend_tokenizer", None)
    content = json.loads(whole.to_str()) if whole is not None else tok.get_vocab()
    for name in ("truncation", "padding"):  # left behind by the last call
        content.pop(name, None)
    return [
        _kind(tok), json.dumps(content, sort_keys=True), tok.chat_template,
        {name: str(token) for name, token in sorted(tok.special_tokens_map.items())},
    ]  # fmt: skip


def _standing(net: nn.Module) -> Iterator[tuple[str, str, Callable]]:
    """What changes a pass: hooks on modules and on all modules, forwards that are not those of a package."""
    modules = dict(net.named_modules())
    places = [(name, module, "_") for name, module in modules.items()]
    for where, holder, prefix in [*places, ("all modules", nn.modules.module, "_global_")]:
        for kind in _HOOKS:
            for function in getattr(holder, prefix + kind, {}).values():
                # transformers records hidden states with hooks of its own, which stay.
                if not str(getattr(function, "__module__", "")).startswith("transformers."):
                    yield where, kind, function
    for where, module in modules.items():
        if "forward" in vars(module) and "_hf_hook" not in vars(module):  # accelerate wraps, and adds nothing
            yield where, "forward", vars(module)["forward"]
    for kind in sorted({type(module) for module in modules.values()}, key=_kind):
        if not _installed(sys.modules.get(kind.forward.__module__)):
            yield _kind(kind), "forward", kind.forward


# --------------------------------------------------------------------------- any thing


def _sum(*things: Any, own: frozenset[int] = frozenset()) -> str:
    out = hashlib.sha256()
    for thing in things:
        _add(out, thing, own)
    return out.hexdigest()


def _add(out: Any, thing: Any, own: frozenset[int]) -> None:
    """Feed one thing, marked by its type so that no two things are written alike.

    Args:
        own: what is being fed already, by id: the modules of a model whose hooks hold them, a function that
            calls itself. With ``_HOOK`` in it, values that functions find in their module count too.
    """
    out.update(f"<{type(thing).__name__}>".encode())
    if id(thing) in own or (speaks(thing) and id(thing.model) in own):
        pass
    elif thing is None or isinstance(thing, bool | int | float | str | bytes | complex | type(...)):
        out.update(repr(thing).encode())
    elif speaks(thing):
        out.update(model(thing).encode())
    elif isinstance(thing, _Bits):
        for piece in _bits(thing.tensor):
            out.update(piece)
    elif isinstance(thing, torch.Tensor):
        out.update(f"{thing.dtype}{tuple(thing.shape)}".encode())
        out.update(thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(thing, np.ndarray):
        out.update(f"{thing.dtype}{thing.shape}".encode() + np.ascontiguousarray(thing).tobytes())
    elif isinstance(thing, torch.dtype | torch.device | np.generic):
        out.update(repr(thing).encode())
    elif isinstance(thing, torch.Generator):
        _add(out, thing.get_state(), own)
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            _add(out, key, own)
            _add(out, value, own)
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        for entry in dataclasses.fields(thing):
            _add(out, getattr(thing, entry.name), own)
    elif isinstance(thing, Sequence | set | frozenset):
        items = sorted(thing, key=repr) if isinstance(thing, set | frozenset) else thing
        for item in items:
            _add(out, item, own)
    elif isinstance(thing, type) or (isinstance(thing, types.ModuleType) and _installed(thing)):
        out.update(getattr(thing, "__qualname__", thing.__name__).encode())
    elif isinstance(thing, nn.Module):
        _add(out, [[name, _Bits(tensor)] for name, tensor in thing.state_dict().items()], own)
        _add(out, [[name, _kind(part)] for name, part in thing.named_modules()], own)
    elif isinstance(thing, types.CodeType):
        _add(out, [thing.co_code, thing.co_consts, thing.co_names, thing.co_varnames], own)
    elif callable(thing):
        _function(out, thing, own)
    else:
        raise TypeError(
            f"{type(thing).__name__} has no digest; give numbers, text, arrays, models, functions"
        )
    out.update(b"</>")


def _function(out: Any, function: Callable, own: frozenset[int]) -> None:
    """A function by its code and by the values that it takes from around it."""
    own = own | {id(function)}
    known = _installed(sys.modules.get(getattr(function, "__module__", None) or ""))
    if hasattr(function, "depends_on"):
        _add(out, function.depends_on, own)
    elif hasattr(function, "__wrapped__") and _IN_PACKAGE.search(function.__code__.co_filename):
        _function(out, function.__wrapped__, own)  # checks of types: told by what they stand around
    elif isinstance(function, functools.partial):
        _add(out, [function.func, function.args, function.keywords], own)
    elif isinstance(function, types.MethodType):
        _add(out, function.__func__, own)
        _object(out, function.__self__, own)
    elif isinstance(function, types.FunctionType):
        around = [_content(cell) for cell in function.__closure__ or ()]
        if _HOOK not in own:  # a function that measures may keep notes; one that stands on a model may not
            around = [value for value in around if not isinstance(value, list | dict | set)]
        _add(out, [function.__code__, around, function.__defaults__, function.__kwdefaults__], own)
        if _HOOK in own and not known:  # what a package's module holds goes with its version
            names = sorted(_globals(function.__code__) & function.__globals__.keys())
            _add(out, {name: function.__globals__[name] for name in names}, own)
    elif isinstance(getattr(function, "__self__", None), type) or (
        known and function.__module__ != "builtins"
    ):
        out.update(getattr(function, "__qualname__", _kind(function)).encode())
    elif isinstance(type(function).__call__, types.FunctionType):
        _add(out, type(function).__call__, own)
        _object(out, function, own)
    else:
        raise TypeError(
            f"the source of {function!r} can't be read, so a change of it would go unseen; use a function "
            "that is written in a module or a notebook cell"
        )


def _object(out: Any, thing: Any, own: frozenset[int]) -> None:
    """What a method belongs to: a model, a record, or whatever attributes it has."""
    if isinstance(thing, nn.Module | type) or speaks(thing) or dataclasses.is_dataclass(thing):
        _add(out, thing, own)
    else:
        _add(out, [_kind(thing), vars(thing)], own)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _globals(found: types.CodeType) -> set[str]:
    """Names that a function, and those within it, look up in their module."""
    steps = (step for step in dis.get_instructions(found) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    within = (_globals(part) for part in found.co_consts if isinstance(part, types.CodeType))
    return {step.argval for step in steps}.union(*within)


def _installed(module: types.ModuleType | None) -> bool:
    """A module of a package, of Python or of this library, whose versions are known."""
    if module is None:
        return False
    top = module.__name__.partition(".")[0]
    known = top == "harmlens" or top in sys.stdlib_module_names
    return known or "-packages" in (getattr(module, "__file__", None) or "")
