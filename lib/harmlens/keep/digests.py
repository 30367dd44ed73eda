"""Digests of what decides a computation: code, models as they are now, data and settings.

Whatever is kept of a model (answers, scores, sweeps, runs) is kept under its :func:`digest`.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
_AS_WRITTEN = (types.NoneType, bool, int, float, str, complex, types.EllipsisType, np.generic)
_CODE = (types.FunctionType, types.MethodType, types.ModuleType, functools.partial, type)
_IN_PACKAGE = re.compile(r"-packages|^<@beartype")


def digest(*things: Any) -> str:
    """sha256 over numbers, text, arrays, tensors, lists, mappings, dataclasses, models and functions.

    * A model counts as :func:`model_state` has it, not with its name: a pruned one is another one, and two
      that do the same are one.
    * A function, class or module of the package counts with the contents of its module and of those that it
      imports, near or far, without comments and docstrings; :mod:`keep`, which only stores, stays out.
    * A function of a notebook counts with its own code, with the functions that it calls, and with numbers
      and text that it takes from around it. Lists and models that it takes have to be named beside it. One
      that keeps notes from call to call says what it depends on in an attribute ``depends_on``.
    * Installed packages don't count; see :func:`keep.files.versions`.

    Raises:
        TypeError: a thing that has no digest; names its type.
    """
    return _Sum().of(*things)


def model_state(lm: Any) -> dict[str, str]:
    """What decides what a model does, as it is now, in parts: a short sum of each.

    * ``weights``: the bits of every parameter and buffer, summed as whole numbers along rows and columns:
      quick, the same on every device, changed by any pruning, shuffling or training step (though no
      protection against an adversary). Weights on the disk are left out.
    * ``configuration``: of the model, its generation and its modules, adapters and train mode among them.
    * ``tokenizer``: its vocabulary, settings and chat template.
    * ``hooks``: functions that stand on its modules or on all modules, such as those that steer it, with all
      values that they use; empty if there are none.

    Raises:
        TypeError: a hook that uses something without a digest; names hook and remedy.
    """
    net, tok = lm.model, lm.tokenizer
    configs = [found for found in (net.config, getattr(net, "generation_config", None)) if found is not None]
    settings = [sorted(found.to_diff_dict().items()) for found in configs]
    about = [[(name, repr(value)) for name, value in some if name not in _NOT_THE_MODEL] for some in settings]
    whole = getattr(tok, "backend_tokenizer", None)
    words = json.loads(whole.to_str()) if whole is not None else tok.get_vocab()
    for name in ("truncation", "padding"):  # left behind by the last call
        words.pop(name, None)
    special = {name: str(token) for name, token in sorted(tok.special_tokens_map.items())}
    hooks = []
    for where, kind, function in _standing(net):
        try:
            hooks.append([where, kind, _Sum(net).of(function)])
        except TypeError as error:
            raise TypeError(
                f"a hook stands on {where or 'the whole model'} of {lm.name!r}, and what it does can't be "
                f"told ({error}), so what is kept would be mixed up with that of other hooks. Remove the "
                "hook, or say what it does: hook.depends_on = 'direction 3, dose 2'"
            ) from error
    tensors = [*net.named_parameters(), *net.named_buffers()]
    return {
        "weights": digest(sorted((name, _bits(tensor)) for name, tensor in tensors))[:16],
        "configuration": digest(about, [(name, *_plain(part)) for name, part in net.named_modules()])[:16],
        "tokenizer": digest(_kind(tok), json.dumps(words, sort_keys=True), tok.chat_template, special)[:16],
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


def _plain(module: torch.nn.Module) -> Iterator[Any]:
    """Settings of a module that are no parameters: numbers, names and tensors."""
    import torch

    yield from (_kind(module), module.training)
    common = {*vars(torch.nn.Module()), *_NOT_THE_MODEL}
    for name, value in sorted(vars(module).items()):
        if name in common or (name.startswith("_") and "adapter" not in name):  # but which adapters are on
            continue
        if isinstance(value, torch.Tensor):
            yield name, _bits(value)
        elif _is_plain(value):
            yield name, repr(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str) or type(value).__name__ == "dtype"


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


class _Sum:
    """A running sum, in which each thing stands between marks, so that no two things are written alike.

    Of a function that stands on a model as a hook, all that it uses counts, but for that model's modules.
    """

    def __init__(self, under: torch.nn.Module | None = None) -> None:
        self.out = hashlib.sha256()
        self.hook = under is not None
        self.within = set() if under is None else set(map(id, under.modules()))  # things that are being fed

    def of(self, *things: Any) -> str:
        for thing in things:
            self.add(thing)
        return self.out.hexdigest()

    def add(self, thing: Any) -> None:
        self.out.update(f"<{type(thing).__name__}>".encode())
        if id(thing) not in self.within:  # a function may call itself
            parts = self.parts(thing)
            if isinstance(parts, bytes):
                self.out.update(parts)
            else:
                self.within.add(id(thing))
                self.of(*parts)
                self.within.remove(id(thing))
        self.out.update(b"</>")

    def parts(self, thing: Any) -> bytes | Iterable[Any]:
        """What a thing consists of: bytes, or other things."""
        if isinstance(thing, _AS_WRITTEN) or _kind(thing) in ("torch.dtype", "torch.device"):
            return repr(thing).encode()
        if isinstance(thing, bytes):
            return thing
        if is_model(thing):
            return b"" if id(thing.model) in self.within else [model_state(thing)]
        if isinstance(thing, np.ndarray):
            return [str(thing.dtype), thing.shape, thing.tobytes()]
        if hasattr(thing, "untyped_storage"):  # a tensor
            import torch

            held = thing.detach().cpu().contiguous().flatten().view(torch.uint8)
            return [str(thing.dtype), tuple(thing.shape), held.numpy().tobytes()]
        if _kind(thing) == "torch._C.Generator":
            return [thing.get_state()]
        if isinstance(thing, Mapping):
            return [part for entry in thing.items() for part in entry]
        if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
            return [getattr(thing, field.name) for field in dataclasses.fields(thing)]
        if isinstance(thing, Sequence | set | frozenset):
            return sorted(thing, key=repr) if isinstance(thing, set | frozenset) else thing
        if isinstance(thing, types.ModuleType | type):
            module = getattr(thing, "__module__", thing.__name__)
            return [getattr(thing, "__qualname__", module), "" if self.hook else _reach(module)]
        if hasattr(thing, "named_modules"):
            tensors = [[name, _bits(tensor)] for name, tensor in thing.state_dict().items()]
            return [tensors, [[name, _kind(part)] for name, part in thing.named_modules()]]
        if isinstance(thing, types.CodeType):
            return [thing.co_code, thing.co_consts, thing.co_names, thing.co_varnames]
        if callable(thing):
            return self.function(thing)
        raise TypeError(
            f"{type(thing).__name__} has no digest; give numbers, text, arrays, models, functions"
        )

    def function(self, function: Any) -> bytes | list[Any]:
        """The code of a function, and the values that it takes from around it."""
        module, code = getattr(function, "__module__", None) or "", getattr(function, "__code__", None)
        if hasattr(function, "depends_on"):
            return [function.depends_on]
        if hasattr(function, "__wrapped__") and (code is None or _IN_PACKAGE.search(code.co_filename)):
            return [function.__wrapped__]  # checks of types: told by what they stand around
        if isinstance(function, functools.partial):
            return [function.func, function.args, function.keywords]
        if isinstance(function, types.MethodType):
            return [function.__func__, _holder(function.__self__)]
        if isinstance(function, types.FunctionType):
            empty = types.CellType()
            around = [cell.cell_contents for cell in function.__closure__ or () if cell != empty]
            if not _installed(module):  # what a package's module holds goes with its version
                around += _globals(function)
            if not self.hook:  # a function that measures may keep notes, and the key names its data
                around = [value for value in around if _counts(value)]
            written = "" if self.hook else _reach(module)
            itself = [function.__qualname__, written] if written else [code, function.__defaults__]
            return [*itself, around, function.__kwdefaults__]
        known = _installed(module) and module != "builtins"
        if known or isinstance(getattr(function, "__self__", None), type):
            return getattr(function, "__qualname__", _kind(function)).encode()
        if isinstance(type(function).__call__, types.FunctionType):
            return [type(function).__call__, _holder(function)]
        raise TypeError(
            f"the source of {function!r} can't be read, so a change of it would go unseen; use a function "
            "that is written in a module or a notebook cell"
        )


def _holder(thing: Any) -> Any:
    """What a method belongs to: a model, a record, or whatever attributes it has."""
    whole = isinstance(thing, type) or hasattr(thing, "named_modules") or dataclasses.is_dataclass(thing)
    return thing if whole or is_model(thing) else [_kind(thing), vars(thing)]


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
    return value is None or isinstance(value, (bool, int, float, str, *_CODE))


def _installed(module: str) -> bool:
    """A module of a package, of Python or of this library, whose versions are known."""
    found, top = sys.modules.get(module), module.partition(".")[0]
    if found is None or module == "__main__":  # a notebook, whatever started it
        return False
    known = top == "harmlens" or top in sys.stdlib_module_names
    return known or "-packages" in (getattr(found, "__file__", None) or "")


# --------------------------------------------------------------------------- the code of the package


@cache
def _written(module: str) -> tuple[str, frozenset[str]]:
    """A sum of what a module does, without comments and docstrings, and what it imports of the package."""
    text, found = _file_of(module).read_text(encoding="utf-8"), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    inside = {name for name in found if name.startswith("harmlens.") and _file_of(name)}
    used = frozenset(name for name in inside if not name.startswith("harmlens.keep"))  # computes nothing
    return digest(compile(text, module, "exec", optimize=2)), used


def _file_of(module: str) -> Path | None:
    place = _PACKAGE.joinpath(*module.split(".")[1:])
    return next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()), None)


@cache
def _reach(module: str) -> str:
    """A sum of a module of the package and of all that it imports; empty for others."""
    reached, waiting = set(), [module] if module.startswith("harmlens.") else []
    while waiting:
        if (name := waiting.pop()) not in reached:
            reached.add(name)
            waiting += _written(name)[1]
    return digest([[name, _written(name)[0]] for name in sorted(reached)]) if reached else ""
