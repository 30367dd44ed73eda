"""What a notebook defines, for tests of a method that a lecture holds: functions, classes, constants."""

from __future__ import annotations

import ast
import json
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def defined(name: str, *, skip: frozenset[str] | set[str] = frozenset(), **given: Any) -> SimpleNamespace:
    """The functions, classes and constants of ``notebooks/<name>_*.ipynb``, nothing of it computed.

    Args:
        skip: tags of cells that are left out, as a run on another model leaves out "world-only".
        given: values of names that the notebook computes, and that its functions look up.
    """
    [file] = (ROOT / "notebooks").glob(f"{name}_*.ipynb")
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    left_out = {"setup", *skip}
    code = [
        c for c in cells if c["cell_type"] == "code" and not left_out & set(c["metadata"].get("tags", []))
    ]
    space: dict[str, Any] = {"__name__": f"lecture_{name}", **given}
    for cell in code:
        for node in ast.parse("".join(cell["source"])).body:
            if _defines(node):
                with suppress(NameError):  # a constant made of what the notebook computes
                    exec(compile(ast.Module([node], []), file.name, "exec", dont_inherit=True), space)
    return SimpleNamespace(**space)


def _defines(node: ast.stmt) -> bool:
    """A definition, an import, or a constant: a name in capitals or a literal."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef):
        return True
    if not isinstance(node, ast.Assign):
        return False
    capitals = all(isinstance(t, ast.Name) and t.id.isupper() for t in node.targets)
    try:
        ast.literal_eval(node.value)
    except ValueError:
        return capitals
    return True
