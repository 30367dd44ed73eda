"""How large package, notebooks and organisms are. This is `make size`.

A line of a notebook states the idea where it says what is asked, patched, pruned or taught, or how a
statistic is defined: every code line but set-up, parameters, the call of hl.start, imports, prints, what is
recorded, and cells that only draw (hide-input).
"""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lib" / "harmlens"
GLUE = re.compile(r"\s*(import |from |print\(|run\.(record|all_runs)\(|fig\b|#|\)|\])")


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


def package() -> dict[str, int | list[str]]:
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


def notebook(path: Path) -> dict[str, int | float]:
    """Counts of one notebook: code lines, the longest cell, those beyond 80 characters, those of the idea."""
    lines = longest = wide = idea = 0
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        rows = [row for row in "".join(cell["source"]).splitlines() if row.strip()]
        tags = set(cell["metadata"].get("tags", []))
        lines += len(rows)
        if "setup" in tags:
            continue
        longest, wide = max(longest, len(rows)), wide + sum(len(row) > 80 for row in rows)
        if not tags & {"parameters", "hide-input"} and not any("hl.start(" in row for row in rows):
            idea += sum(not GLUE.match(row) for row in rows)
    return {"lines": lines, "longest cell": longest, "beyond 80 characters": wide, "idea": idea / lines}


def measure() -> dict[str, int | float | list[str]]:
    """All counts: of the package, of the notebooks together, and of what ships in data/organisms."""
    books = [notebook(path) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    lines = sum(one["lines"] for one in books)
    shipped = sum(f.stat().st_size for f in (ROOT / "data" / "organisms").rglob("*") if f.is_file())
    return {
        **package(),
        "code lines of the notebooks": lines,
        "longest cell of a notebook": max(one["longest cell"] for one in books),
        "lines of notebooks beyond 80 characters": sum(one["beyond 80 characters"] for one in books),
        "percent of notebooks' lines that state the idea": round(
            100 * sum(one["idea"] * one["lines"] for one in books) / lines
        ),
        "MB of shipped organisms": round(shipped / 1e6, 1),
    }


if __name__ == "__main__":
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        found = notebook(path)
        print(f"{path.stem:36} {found['lines']:4} lines, {found['idea']:.0%} of them state the idea")
    for what, found in measure().items():
        print(f"{what}: {len(found) if isinstance(found, list) else found}")
        for case in found if isinstance(found, list) else []:
            print(f"    {case}")
