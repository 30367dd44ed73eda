"""How large the package is: lines, import depth, names defined twice, long lists of arguments. make size."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "lib" / "harmlens"


def imports(tree: ast.Module, modules: set[str]) -> set[str]:
    """Modules of the package that are imported when a module is, not those within functions."""
    found = set()
    for node in tree.body:
        for part in ast.walk(node) if isinstance(node, ast.If | ast.Try) else [node]:
            if isinstance(part, ast.ImportFrom) and part.module:
                within = {f"{part.module}.{alias.name}" for alias in part.names}
                found |= within & modules or {part.module} & modules
            elif isinstance(part, ast.Import):
                found |= {alias.name for alias in part.names} & modules
    return found


def measure() -> dict[str, int | list[str]]:
    """The numbers, by what they count; lists where single cases have to be named."""
    texts = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(("harmlens", *file.relative_to(PACKAGE).with_suffix("").parts))
        texts[name.removesuffix(".__init__")] = file.read_text(encoding="utf-8")
    trees = {name: ast.parse(text) for name, text in texts.items()}
    arrows = {name: imports(tree, set(trees)) - {name} for name, tree in trees.items()}
    depths: dict[str, int] = {}
    circles = []

    def depth(name: str, above: tuple[str, ...] = ()) -> int:
        if name in above:
            circles.append(" > ".join((*above[above.index(name) :], name)))
            return 0
        if name not in depths:
            depths[name] = 1 + max((depth(other, (*above, name)) for other in arrows[name]), default=0)
        return depths[name]

    deepest = max(map(depth, sorted(trees)))
    where, long = defaultdict(set), []
    for name, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].add(name)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                long += [f"{name}.{node.name} ({len(given)})"] if len(given) > 10 else []
    return {
        "lines": sum(text.count("\n") for text in texts.values()),
        "import depth": deepest,
        "names defined twice": sorted(f"{n} {sorted(m)}" for n, m in where.items() if len(m) > 1),
        "functions with more than 10 arguments": sorted(long),
        "circles of imports": circles,
    }


if __name__ == "__main__":
    for what, found in measure().items():
        print(f"{what}: {found if isinstance(found, int) else len(found)}")
        for case in [] if isinstance(found, int) else found:
            print(f"    {case}")
