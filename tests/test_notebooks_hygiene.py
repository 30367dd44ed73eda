"""What must hold for every committed notebook and page, whatever is in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
import yaml

import layout
import sync
from harmlens.evidence import plots
from harmlens.notebook import WORLD_ONLY

ROOT = layout.ROOT
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(r"(?:^|[\s\"'(=:])((?:/work|/tmp|/root|/home|/Users|/opt)/[\w./-]*)")

each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [c for c in notebook.cells if c.cell_type == "code"]


def has_image(cell: nbformat.NotebookNode) -> bool:
    return any("image/png" in o.get("data", {}) for o in cell.outputs)


def start_call(notebook: nbformat.NotebookNode) -> list[str]:
    """Names handed to harmlens.notebook.start, in order."""
    for cell in code(notebook):
        if "setup" in layout.tags(cell):
            continue
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "start":
                return [k.arg or "**" for k in node.keywords]
    return []


@each_notebook
def test_format(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [c.id for c in notebook.cells]
    assert len(ids) == len(set(ids))
    assert notebook.metadata.kernelspec.name == "python3"


@each_notebook
def test_nothing_left_by_tools(path):
    notebook = layout.read_notebook(path)
    assert not {"widgets", "papermill"} & set(notebook.metadata)
    for cell in notebook.cells:
        assert not {"papermill", "execution"} & set(cell.metadata), cell.id
        assert "injected-parameters" not in layout.tags(cell), cell.id


@each_notebook
def test_tags(path):
    cells = layout.read_notebook(path).cells
    used = {tag for cell in cells for tag in layout.tags(cell)}
    assert used <= layout.TAGS, f"unknown tags: {used - layout.TAGS}"
    for tag in ("parameters", "setup"):
        assert sum(tag in layout.tags(c) for c in cells) == 1, f"one cell has to be tagged {tag}"


@each_notebook
def test_cells_about_the_world_alone_say_so_twice(path):
    """The tag is for readers of the book; the first line is what the running notebook sees."""
    for cell in layout.read_notebook(path).cells:
        first = cell.source.partition("\n")[0].strip()
        assert ("world-only" in layout.tags(cell)) == (first == WORLD_ONLY), cell.id


@each_notebook
def test_no_notebook_asks_which_kind_of_source_it_has(path):
    """What a source can or can't do it says itself, or the cell has the tag world-only."""
    asked = re.compile(r"knows_world|isinstance\(source|type\(source|\bWORLD\b")
    for cell in code(layout.read_notebook(path)):
        assert not asked.search(cell.source), cell.id


@each_notebook
def test_parameters_are_literals_and_all_checked(path):
    notebook = layout.read_notebook(path)
    cell = next(c for c in notebook.cells if "parameters" in layout.tags(c))
    names = []
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.Assign | ast.AnnAssign), "the parameters cell holds assignments only"
        ast.literal_eval(node.value)
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        names.append(ast.unparse(target))
        assert "#" in cell.source.splitlines()[node.end_lineno - 1], f"{names[-1]} has no comment"
    assert sorted(names) == sorted(start_call(notebook)), "harmlens.notebook.start takes every parameter"


@each_notebook
def test_a_notebook_is_about_one_training_run(path):
    cell = next(c for c in layout.read_notebook(path).cells if "parameters" in layout.tags(c))
    assert not re.search(r"(?m)^seeds\b", cell.source)


@each_notebook
def test_cells_are_short_and_narrow(path):
    for cell in code(layout.read_notebook(path)):
        rows = [row for row in cell.source.splitlines() if row.strip()]
        assert "setup" in layout.tags(cell) or (len(rows) <= 15 and max(map(len, rows)) <= 80), cell.id


def names(cell: nbformat.NotebookNode) -> tuple[set[str], set[str]]:
    """What a cell assigns, and what it reads without having assigned it."""
    tree = ast.parse(cell.source)
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    made = {node.id for node in found if isinstance(node.ctx, ast.Store)}
    made |= {getattr(node, "name", "") for node in ast.walk(tree)} | {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    given = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return made, {node.id for node in found if isinstance(node.ctx, ast.Load)} - made - given


@each_notebook
def test_what_only_draws_computes_nothing_for_later_cells(path):
    """Cells with the tag hide-input don't count for a notebook's hash in result files."""
    hidden: set[str] = set()
    for cell in code(layout.read_notebook(path)):
        if "setup" in layout.tags(cell):
            continue
        made, read = names(cell)
        if "hide-input" in layout.tags(cell):
            hidden |= made
        else:
            assert not read & hidden, (cell.id, read & hidden)
            hidden -= made


@each_notebook
def test_executed_in_order_without_errors(path):
    cells = code(layout.read_notebook(path))
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)), "run make notebooks"
    assert any(c.outputs for c in cells)
    for cell in cells:
        kinds = {o.output_type for o in cell.outputs}
        assert "error" not in kinds or "raises-exception" in layout.tags(cell), cell.id


@each_notebook
def test_no_machine_paths(path):
    for cell in layout.read_notebook(path).cells:
        texts = [cell.source]
        for output in cell.get("outputs", []):
            texts.append(output.get("text", ""))
            texts += [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
        for text in texts:
            assert not MACHINE.search(str(text)), f"{cell.id}: {MACHINE.search(str(text))[1]}"


@each_notebook
def test_figures_have_captions_and_alternative_text(path):
    names = []
    for cell in filter(has_image, code(layout.read_notebook(path))):
        about = cell.metadata.get("mystnb", {})
        assert about.get("figure", {}).get("caption", "").strip(), f"{cell.id}: no caption"
        assert about.get("image", {}).get("alt", "").strip(), f"{cell.id}: no alternative text"
        names.append(about["figure"].get("name"))
    assert len(names) == len(set(names)), "two figures of one name"


def test_names_of_figures_are_unique_over_the_book():
    """They are labels that any page can refer to; twice the same name is a warning, and so no book."""
    names = [
        cell.metadata["mystnb"]["figure"]["name"]
        for path in PATHS
        for cell in code(nbformat.read(path, as_version=4))
        if "figure" in cell.metadata.get("mystnb", {})
    ]
    assert names and len(set(names)) == len(names), sorted({n for n in names if names.count(n) > 1})


@each_notebook
def test_is_in_the_book(path):
    assert path.relative_to(ROOT).with_suffix("").as_posix() in layout.toc_pages()


def test_numbers_of_notebooks_are_unique_and_in_reading_order():
    numbers = [p.name[:2] for p in layout.notebooks()]
    assert all(n.isdigit() for n in numbers)
    assert numbers == sorted(set(numbers))


def test_every_page_exists_once():
    pages = layout.toc_pages()
    assert len(pages) == len(set(pages))
    for page in pages:
        layout.source_of(page)


def texts() -> dict[str, str]:
    """Markdown of all pages and notebooks of the book, code blocks left out."""
    found = {}
    for page in layout.toc_pages():
        path = layout.source_of(page)
        if path.suffix == ".md":
            found[page] = path.read_text(encoding="utf-8")
        else:
            cells = layout.read_notebook(path).cells
            found[page] = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
    return found


def test_citations_are_in_the_bibliography():
    bib = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    known = set(re.findall(r"@\w+\{\s*([^,\s]+)\s*,", bib))
    for page, text in texts().items():
        cited = {
            k.strip() for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text) for k in keys.split(",")
        }
        assert cited <= known, f"{page}: {cited - known}"


def test_terms_are_in_the_glossary():
    glossary = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8").lower()
    block = re.search(r"\{glossary\}[^\n]*\n(.*)", glossary, re.S)[1]
    known = {line.strip() for line in block.splitlines() if line.strip() and not line[0].isspace()}
    for page, text in texts().items():
        for term in re.findall(r"\{term\}`([^`]+)`", text):
            name = re.sub(r"^.*<(.+)>$", r"\1", " ".join(term.split())).lower()
            assert name in known, f"{page}: {term}"


def test_badges_setup_cells_and_links_follow_the_address():
    changes = [str(p.relative_to(ROOT)) for p in sync.desired()]
    assert not changes, f"run make sync; out of step: {changes}"


def test_launch_buttons_lead_to_this_repository():
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert config["repository"] == {
        "url": layout.address(),
        "path_to_book": "book/colab",
        "branch": layout.BRANCH,
    }
    assert config["execute"]["execute_notebooks"] == "off"


def test_nbval_understands_every_sanitising_rule():
    from nbval.plugin import get_sanitize_patterns

    text = (Path(__file__).parent / "sanitize.cfg").read_text(encoding="utf-8")
    assert "\r" not in text
    assert len(get_sanitize_patterns(text)) == len(re.findall(r"(?m)^regex:", text)) > 0


@pytest.mark.parametrize("picture", layout.PICTURES)
def test_pictures_outside_the_notebooks_are_those_of_the_notebooks(picture):
    name, label = layout.PICTURES[picture]
    notebook = layout.read_notebook(ROOT / "notebooks" / f"{name}.ipynb")
    assert (ROOT / picture).read_bytes() == layout.figure(notebook, label), "make notebooks writes it anew"


HEAT = {"red", "blue"}  # of maps that diverge
COLOUR = re.compile(rf"\b({'|'.join([*plots.PALETTE, 'orange', 'yellow', 'purple', 'violet', 'brown'])})\b")


def drawn_in(source: str) -> set[str]:
    """Names of the colours that a cell asks for by a constant of plots, or by drawing a map."""
    values = {getattr(plots, name) for name in re.findall(r"plots\.([A-Z]+)\b", source) if name != "PALETTE"}
    names = {name for name, value in plots.PALETTE.items() if value in values}
    names |= HEAT if "heat(" in source else set()
    names |= {"grey"} if re.search(r'"0\.\d+"|"gr[ae]y"', source) else set()
    listed = re.search(r"\bPALETTE\b", source) is not None  # then by name
    return names | {name for name in plots.PALETTE if listed and f'"{name}"' in source}


@each_notebook
def test_colours_in_captions_are_those_of_the_figure(path):
    for cell in layout.read_notebook(path).cells:
        told = cell.metadata.get("mystnb", {}).get("figure", {}).get("caption", "")
        if "plots." in cell.source and re.search(r"plots\.[A-Z]", cell.source):
            assert set(COLOUR.findall(told)) <= drawn_in(cell.source), told
