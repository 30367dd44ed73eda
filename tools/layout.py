"""What the repository consists of: pages, notebooks, the public address; and how notebooks are written."""

from __future__ import annotations

import base64
import copy
import os
import re
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]
BRANCH = "main"

TAGS = frozenset(
    {"parameters", "setup", "world-only", "exercise", "solution", "raises-exception"}
    | {"starter", "check", "hint", "notes", "predict", "slide"}
    | {"hide-input", "hide-output", "hide-cell"}
    | {"remove-input", "remove-output", "remove-cell", "remove-stderr"}
    | {"nbval-ignore-output", "nbval-skip", "nbval-check-output"}
)

# Notebooks that read what others write run after them; "*" stands for all that come before in the book.
AFTER: dict[str, tuple[str, ...]] = {"19_scorecard": ("*",), "20_a_real_language_model": ("*",)}

# Figures that pages outside the notebooks show: picture -> (notebook, name of its figure).
PICTURES: dict[str, tuple[str, str]] = {
    "book/figures/ladder.png": ("00_model_organism", "fig-ladder"),
    "book/figures/forest.png": ("19_scorecard", "fig-scorecard-papers"),
    "book/figures/hidden_skill.png": ("00_model_organism", "fig-hidden-skill"),
    "book/figures/few_weights.png": ("19_scorecard", "fig-few-weights"),
    "book/figures/crossing.png": ("17_do_the_papers_agree", "fig-crossing"),
}


def toc_pages(root: Path = ROOT) -> list[str]:
    """Documents of _toc.yml in reading order, as paths without suffix."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    pages = []

    def walk(node: object) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("root", "file"):
                    pages.append(str(value))
                else:
                    walk(value)
        elif isinstance(node, list):
            for item in node:
                walk(item)

    walk(toc)
    return pages


def source_of(page: str, root: Path = ROOT) -> Path:
    """The file behind a page. Raises FileNotFoundError that names the page."""
    for suffix in (".md", ".ipynb"):
        path = root / f"{page}{suffix}"
        if path.exists():
            return path
    raise FileNotFoundError(f"_toc.yml lists {page}, but there is neither {page}.md nor {page}.ipynb")


def notebooks(root: Path = ROOT) -> list[Path]:
    """Notebooks of the table of contents, in its order."""
    return [p for p in (source_of(page, root) for page in toc_pages(root)) if p.suffix == ".ipynb"]


def dependencies(name: str, names: list[str]) -> list[str]:
    """Which of `names` have to be finished before notebook `name` starts."""
    wanted = AFTER.get(name, ())
    return [n for n in names[: names.index(name)] if "*" in wanted or n in wanted]


def address(root: Path = ROOT) -> str:
    """The repository's public address, from its one place in pyproject.toml."""
    match = ADDRESS_LINE.search((root / "pyproject.toml").read_text(encoding="utf-8"))
    if not match:
        raise ValueError('pyproject.toml has no line Repository = "https://..." under [project.urls]')
    return match[2]


ADDRESS_LINE = re.compile(r'(?m)^(Repository\s*=\s*")([^"]+)(")')


def read_notebook(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def write_notebook(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write in one step: an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    nbformat.write(notebook, part)
    os.replace(part, path)


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def figure(notebook: nbformat.NotebookNode, name: str) -> bytes:
    """The PNG of the figure called `name`. Raises KeyError if the notebook has none."""
    for cell in notebook.cells:
        if cell.metadata.get("mystnb", {}).get("figure", {}).get("name") == name:
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    return base64.b64decode(output["data"]["image/png"])
    raise KeyError(f"no figure called {name} with a picture")


def merge_outputs(
    committed: nbformat.NotebookNode, executed: nbformat.NotebookNode, *, keep_injected: bool = False
) -> nbformat.NotebookNode:
    """`committed` with the outputs of `executed`.

    Text, tags and metadata are those of the committed notebook, so an edited sentence needs no new run and
    nothing that papermill adds gets in. Execution counts run from 1. With `keep_injected` the cell with the
    parameters that differ from the defaults stays visible behind the parameters cell.
    """
    merged = copy.deepcopy(committed)
    ran = [c for c in executed.cells if c.cell_type == "code" and not _is_papermill_error(c)]
    injected = [c for c in ran if "injected-parameters" in tags(c)]
    ran = [c for c in ran if "injected-parameters" not in tags(c)]
    cells = [c for c in merged.cells if c.cell_type == "code"]
    if [c.source for c in cells] != [c.source for c in ran]:
        raise ValueError("the executed notebook has other code cells than the committed one")
    for count, (cell, done) in enumerate(zip(cells, ran, strict=True), start=1):
        cell.outputs = [_clean_output(o, count) for o in done.outputs if o.get("name") != "stderr"]
        cell.execution_count = count
    if keep_injected and injected:
        at = next(i for i, c in enumerate(merged.cells) if "parameters" in tags(c))
        shown = nbformat.v4.new_code_cell(injected[0].source, execution_count=None, id="changed-parameters")
        merged.cells.insert(at + 1, shown)
    merged.metadata = tidy_metadata(merged.metadata)
    return merged


def tidy_metadata(metadata: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Kernel and language in one spelling for everyone; no widget state, no papermill record."""
    kept = {k: v for k, v in metadata.items() if k in ("mystnb", "harmlens")}
    kept["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    kept["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    return nbformat.from_dict(kept)


def _is_papermill_error(cell: nbformat.NotebookNode) -> bool:
    return any(tag.startswith("papermill-error-cell") for tag in tags(cell))


def _clean_output(output: nbformat.NotebookNode, count: int) -> nbformat.NotebookNode:
    output = copy.deepcopy(output)
    if output.output_type == "execute_result":
        output.execution_count = count
    return output
