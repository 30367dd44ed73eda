"""Digests of what decides a computation: code, models as they are now, data and settings.

Whatever is kept of a model (answers, scores, sweeps, runs) is kept under :func:`model_digest`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # pages and tables are made without torch
    import torch

_PACKAGE = Path(__file__).resolve().parents[1]
# Where a model came from, and what loading and use leave behind: not what it does.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "name_or_path", "gradient_checkpointing")
_HOOKS = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
_HOOK = -1
_AS_WRITTEN = (types.NoneType, bool, int, float, str, bytes, complex, types.EllipsisType, np.generic)
_IN_PACKAGE = re.compile(r"-packages|^<@beartype")


def digest(*things: Any, own: frozenset[int] = frozenset()) -> str:
    """sha256 over numbers, text, arrays, tensors, lists, mappings, dataclasses, models and functions.

    * A model counts as :func:`model_digest` has it, not with its name: a pruned one is another one.
    * A function, class or module of the package counts with the contents of its module and of those that it
      imports, near or far, without comments and docstrings; :mod:`keep`, which only stores, stays out.
    * A function of a notebook counts with its own code, with the functions that it calls, and with numbers
      and text that it takes from around it. Lists and models that it takes have to be named beside it.
    * What is in ``own``, by id, is left out: see :func:`_add`.
    * Installed packages don't count; see :func:`keep.files.versions`.

    Raises:
        TypeError: a thing that has no digest; names its type.
    """
    out = hashlib.sha256()
    for thing in things:
        _add(out, thing, own)
    return out.hexdigest()


def model_digest(lm: Any) -> str:
    """One sum of a model as it is now; equal for two models that do the same. See :func:`model_state`."""
    return digest(model_state(lm))


def model_state(lm: Any) -> dict[str, str]:
    """What decides what a model does, as it is now, in parts: a short sum of each.

    * ``weights``: the bits of every parameter and buffer, summed as whole numbers along rows and columns:
      quick, the same on every device, changed by any pruning, shuffling or training step (though no
      protection against an adversary). Weights on the disk are left out.
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
    tensors = sorted([*net.named_parameters(), *net.named_buffers()], key=lambda entry: entry[0])
    about = [
        {key: repr(value) for key, value in sorted(found.to_diff_dict().items()) if key not in _NOT_THE_MODEL}
        for found in (net.config, getattr(net, "generation_config", None))
        if found is not None
    ]
    modules = [[name, _kind(module), _plain(vars(module))] for name, module in net.named_modules()]
    hooks = []
    for where, kind, function in _standing(net):
        try:
            hooks.append([where, kind, digest(function, own=own)])
        except TypeError as error:
            raise TypeError(
                f"a hook stands on {where or 'the whole model'} of {lm.name!r}, and what it does can't be "
                f"told ({error}), so what is kept would be mixed up with that of other hooks. Remove the "
                "hook, or say what it does: hook.depends_on = 'direction 3, dose 2'"
            ) from error
    return {
        "weights": digest([[name, _bits(tensor)] for name, tensor in tensors])[:16],
        "configuration": digest(about, modules)[:16],
        "tokenizer": digest(_tokenizer(lm.tokenizer))[:16],
        "hooks": digest(hooks)[:16] if hooks else "",
    }


def is_model(thing: Any) -> bool:
    """Whether a thing is a language model: a module together with its tokenizer."""
    return hasattr(getattr(thing, "model", None), "named_modules") and hasattr(thing, "tokenizer")


def _bits(tensor: torch.Tensor) -> str:
    """A tensor by sums along its rows and columns, not with each number."""
    import torch

    out = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if not tensor.is_meta:  # moved to the disk for lack of memory; not there to be summed
        kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        table = tensor.detach()
        table = table.reshape(len(table), -1) if table.dim() > 1 else table.reshape(-1, 1)
        bits = table.contiguous().view(kinds[tensor.element_size()])
        columns: Any = 0
        for part in bits.split(max(1, (1 << 24) // max(1, bits.shape[1]))):  # large as whole numbers
            columns = columns + part.long().sum(0)
            out.update(part.long().sum(1).cpu().numpy().tobytes())
        out.update(columns.cpu().numpy().tobytes())
    return out.hexdigest()


def _kind(thing: Any) -> str:
    kind = thing if isinstance(thing, type | types.FunctionType) else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a module that are no parameters: numbers, names and tensors."""
    import torch

    out: dict[str, Any] = {"training": attributes["training"]}
    common = vars(torch.nn.Module())
    for name, value in sorted(attributes.items()):
        inner = name.startswith("_") and "adapter" not in name  # but which adapters are on
        if inner or name in common or name in _NOT_THE_MODEL:
            continue
        if isinstance(value, torch.Tensor):
            out[name] = _bits(value)
        elif _is_plain(value):
            out[name] = repr(value)
    return out


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, (*value, *value.values())))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str) or type(value).__name__ == "dtype"


def _tokenizer(tok: Any) -> list[Any]:
    whole = getattr(tok, "backend_tokenizer", None)
    content = json.loads(whole.to_str()) if whole is not None else tok.get_vocab()
    for name in ("truncation", "padding"):  # left behind by the last call
        content.pop(name, None)
    special = {name: str(token) for name, token in sorted(tok.special_tokens_map.items())}
    return [_kind(tok), json.dumps(content, sort_keys=True), tok.chat_template, special]


def _standing(net: torch.nn.Module) -> Iterator[tuple[str, str, Callable]]:
    """What changes a pass: hooks on modules and on all modules, forwards that are not those of a package."""
    modules = dict(net.named_modules())
    places = [(name, module, "_") for name, module in modules.items()]
    places.append(("all modules", sys.modules["torch.nn.modules.module"], "_global_"))
    for where, holder, prefix in places:
        for kind in _HOOKS:
            for function in getattr(holder, prefix + kind, {}).values():
                # transformers records hidden states with hooks of its own, which stay.
                if not str(getattr(function, "__module__", "")).startswith("transformers."):
                    yield where, kind, function
    for where, module in modules.items():
        if "forward" in vars(module) and "_hf_hook" not in vars(module):  # accelerate wraps, and adds nothing
            yield where, "forward", vars(module)["forward"]
    for kind in sorted({type(module) for module in modules.values()}, key=_kind):
        if not _installed(kind.forward.__module__):
            yield _kind(kind), "forward", kind.forward


def _add(out: Any, thing: Any, own: frozenset[int]) -> None:
    """Feed one thing, marked by its type so that no two things are written alike.

    ``own``: what is being fed already, by id: the modules of a model whose hooks hold them, a function that
    calls itself. With ``_HOOK`` in it, a function stands on a model, and all that it uses counts.
    """
    out.update(f"<{type(thing).__name__}>".encode())
    kind = type(thing).__module__.partition(".")[0]
    if id(thing) in own or (is_model(thing) and id(thing.model) in own):
        pass
    elif isinstance(thing, _AS_WRITTEN):
        out.update(repr(thing).encode())
    elif is_model(thing):
        out.update(model_digest(thing).encode())
    elif isinstance(thing, np.ndarray):
        out.update(f"{thing.dtype}{thing.shape}".encode() + np.ascontiguousarray(thing).tobytes())
    elif hasattr(thing, "untyped_storage"):  # a tensor
        import torch

        out.update(f"{thing.dtype}{tuple(thing.shape)}".encode())
        out.update(thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif kind == "torch" and type(thing).__name__ in ("dtype", "device"):
        out.update(repr(thing).encode())
    elif kind == "torch" and type(thing).__name__ == "Generator":
        _add(out, thing.get_state(), own)
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            _add(out, key, own)
            _add(out, value, own)
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        for field in dataclasses.fields(thing):
            _add(out, getattr(thing, field.name), own)
    elif isinstance(thing, Sequence | set | frozenset):
        for item in sorted(thing, key=repr) if isinstance(thing, set | frozenset) else thing:
            _add(out, item, own)
    elif isinstance(thing, types.ModuleType | type):
        module = thing.__module__ if isinstance(thing, type) else thing.__name__
        out.update(f"{getattr(thing, '__qualname__', module)}{_module_code(module, own)}".encode())
    elif hasattr(thing, "named_modules"):
        _add(out, [[name, _bits(tensor)] for name, tensor in thing.state_dict().items()], own)
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
    module = getattr(function, "__module__", None) or ""
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
        written = _module_code(module, own)
        around = [_content(cell) for cell in function.__closure__ or ()]
        if not _installed(module):  # what a package's module holds goes with its version
            around += _globals(function)
        if _HOOK not in own:  # a function that measures may keep notes, and the key names its data
            around = [value for value in around if _counts(value)]
        itself = [function.__qualname__, written] if written else [function.__code__, function.__defaults__]
        _add(out, [*itself, around, function.__kwdefaults__], own)
    elif isinstance(getattr(function, "__self__", None), type) or (
        _installed(module) and module != "builtins"
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
    whole = isinstance(thing, type) or hasattr(thing, "named_modules") or dataclasses.is_dataclass(thing)
    _add(out, thing if whole or is_model(thing) else [_kind(thing), vars(thing)], own)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _globals(function: types.FunctionType) -> list[Any]:
    """Values of its module that a function, and those within it, name."""
    names = sorted(_names(function.__code__))
    found = [(name, function.__globals__[name]) for name in names if name in function.__globals__]
    face = sys.modules["harmlens"]  # of it, what is named behind the dot
    if any(value is face for _, value in found):
        found += [(name, getattr(face, name)) for name in names if hasattr(face, name)]
    return [entry for entry in found if entry[1] is not face]


def _names(found: types.CodeType) -> set[str]:
    return set(found.co_names).union(*(_names(c) for c in found.co_consts if isinstance(c, types.CodeType)))


def _counts(value: Any) -> bool:
    """Whether a value that a function takes from around it is a setting or code, not data."""
    if isinstance(value, tuple):
        return all(map(_counts, value))
    kinds = (types.FunctionType, types.MethodType, types.ModuleType, functools.partial, type)
    return value is None or isinstance(value, (bool, int, float, str, *kinds))


def _installed(module: str) -> bool:
    """A module of a package, of Python or of this library, whose versions are known."""
    found, top = sys.modules.get(module), module.partition(".")[0]
    known = top == "harmlens" or top in sys.stdlib_module_names
    if found is None or module == "__main__":  # a notebook, whatever started it
        return False
    return known or "-packages" in (getattr(found, "__file__", None) or "")


# --------------------------------------------------------------------------- the code of a function


@cache
def _written(module: str) -> tuple[str, frozenset[str]]:
    """A sum of what a module says without comments and docstrings, and what it imports of the package."""
    tree = ast.parse(_file_of(module).read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            del body[0]
    inside = {name for name in found if name.startswith("harmlens.") and _file_of(name)}
    used = frozenset(name for name in inside if not name.startswith("harmlens.keep"))  # computes nothing
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), used


def _file_of(module: str) -> Path | None:
    place = _PACKAGE.joinpath(*module.split(".")[1:])
    return next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()), None)


def _module_code(module: str, own: frozenset[int]) -> str:
    """Sum over a module of the package and all that it imports; empty for others, and for hooks."""
    return _reach(module) if module.startswith("harmlens.") and _HOOK not in own else ""


@cache
def _reach(module: str) -> str:
    reached, waiting = set(), [module]
    while waiting:
        if (name := waiting.pop()) not in reached:
            reached.add(name)
            waiting += _written(name)[1]
    return digest([[name, _written(name)[0]] for name in sorted(reached)])
