"""The rooms of the package: imports between them point down, and no two modules need each other."""

from __future__ import annotations

import ast
from pathlib import Path

import harmlens

PACKAGE = Path(harmlens.__file__).parent
# From the ground up. Rooms of one floor don't know each other, like the two papers.
FLOORS = (
    ("keep",), ("evidence",), ("models",), ("world",), ("judging",), ("asking",), ("flow", "weights"),
    ("training",),
)  # fmt: skip
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def imports(file: Path) -> set[str]:
    """Dotted names below the package that a module imports, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "harmlens":
            inside = node.module.removeprefix("harmlens").lstrip(".")
            found |= {".".join(filter(None, (inside, alias.name))) for alias in node.names}
    return found


def modules() -> dict[str, Path]:
    files = [f for f in PACKAGE.rglob("*.py") if "data" not in f.relative_to(PACKAGE).parts]
    return {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in sorted(files)}


def test_every_room_says_what_it_is_for():
    rooms = {f.parent.name for f in modules().values() if f.parent != PACKAGE}
    assert rooms == set(FLOOR)
    for room in rooms:
        told = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
        assert told and "In: " in told and "Out: " in told, room


def test_imports_between_rooms_point_down():
    up = []
    for name, file in modules().items():
        here = name.split(".")[0]
        for other in imports(file):
            there = other.split(".")[0]
            if here not in FLOOR or there in (here, "__version__"):
                continue
            if FLOOR.get(there, len(FLOORS)) >= FLOOR[here]:
                up.append(f"{name} imports {other}")
    assert not up, up


def test_no_two_modules_need_each_other():
    known = modules()
    arrows = {
        name: {m for i in imports(f) for m in (i, i.rpartition(".")[0]) if m in known and m != name}
        for name, f in known.items()
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...] = ()) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(arrows[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in sorted(known):
        visit(name)
