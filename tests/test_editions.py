"""Other editions of the notebooks: plain Markdown, and courses without solutions."""

import re

import nbformat
import pytest

import editions
from layout import notebooks, read_notebook, tags

BOOK = [path.stem for path in notebooks()]


@pytest.fixture(scope="module", params=BOOK)
def pair(request):
    (path,) = (path for path in notebooks() if path.stem == request.param)
    return read_notebook(path), path


def test_the_colab_edition_has_no_markup_of_the_book(pair):
    _, path = pair
    plain = editions.edition("colab", path)
    for cell in plain.cells:
        if cell.cell_type == "markdown":
            assert not editions.LEFT.search(cell.source), cell.source
            assert cell.source.count("<details>") == cell.source.count("</details>") or "solution" in tags(
                cell
            )
        else:
            assert cell.outputs == [] and "mystnb" not in cell.metadata
    whole = "\n".join(cell.source for cell in plain.cells if cell.cell_type == "markdown")
    assert whole.count("<details>") == whole.count("</details>")
    nbformat.validate(plain)


def test_the_colab_edition_says_everything(pair):
    """No word of a paragraph is lost, and each caption stands behind its figure."""
    book, path = pair
    plain = editions.edition("colab", path)
    captions = [cell.metadata.mystnb.figure.caption for cell in book.cells
                if "mystnb" in cell.metadata and "figure" in cell.metadata.mystnb]  # fmt: skip
    behind = [cell for cell in plain.cells if cell.id.endswith("-caption")]
    assert len(behind) == len(captions)
    assert [c.source for c in plain.cells if c.cell_type == "code"][2].endswith(
        [c.source for c in book.cells if c.cell_type == "code"][2]
    )

    def words(notebook):
        cells = [c for c in notebook.cells if c.cell_type == "markdown" and "notes" not in tags(c)]
        text = "\n".join(cell.source for cell in cells)
        text = re.sub(r"(?m)^[`:]{3,}.*$|^:\w+:.*$", " ", text)
        markup = r"\{[^}]*\}`[^`]*`|\[[^]]*\]\([^)]*\)|</?[a-z][^<>\n]*>"
        return set(re.findall(r"[a-z]{4,}", re.sub(markup, " ", text)))

    assert len(words(book) - words(plain)) <= 3


def test_students_get_no_solution(pair):
    book, path = pair
    students = editions.edition("students", path)
    solutions = [cell for cell in book.cells if {"solution", "notes"} & set(tags(cell))]
    left = "\n".join(cell.source for cell in students.cells)
    captions = [cell for cell in students.cells if cell.id.endswith("-caption")]
    assert 0 < len(solutions) <= len(book.cells) - (len(students.cells) - len(captions))
    assert "Solution " not in left and "### Exercise" in left and "colab.research" not in left
    for cell in solutions:
        for line in (line for line in cell.source.splitlines() if len(line) > 50):
            assert (
                line.startswith(("`", "def ")) or line not in left
            )  # a starter has the function's first line


@pytest.mark.parametrize("which", ["students", "instructors"])
def test_a_class_reads_plain_markdown(pair, which):
    book, path = pair
    made = editions.edition(which, path)
    nbformat.validate(made)
    for cell in made.cells:
        assert cell.cell_type == "code" or not editions.LEFT.search(cell.source), cell.source
    code = [cell.source for cell in book.cells if cell.cell_type == "code"]
    kept = [cell.source for cell in made.cells if cell.cell_type == "code"]
    assert kept == code if which == "instructors" else set(kept) < set(code)


CELLS = (
    ("markdown", ["exercise"], "```{exercise-start}\n:label: ex-a\n```\nWhat?\n```{exercise-end}\n```"),
    ("code", ["starter"], "x = ..."),
    ("code", ["check"], "assert x == 3"),
    ("code", ["solution"], "x = 3"),
    ("markdown", ["notes", "remove-cell"], "They usually say 4."),
    ("code", ["predict"], "print(3)"),
)


@pytest.fixture
def tiny():
    made = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    cells = [made[kind](source, metadata={"tags": marks}) for kind, marks, source in CELLS]
    for cell in cells:
        if cell.cell_type == "code":
            cell.outputs = [nbformat.v4.new_output("stream", text="3\n")]
    return nbformat.v4.new_notebook(cells=cells)


def test_what_is_to_be_found_out_has_no_output(tiny):
    students = editions.for_class(tiny, "tiny", students=True)
    assert [tags(cell)[0] for cell in students.cells] == ["exercise", "starter", "check", "predict"]
    assert all(not cell.outputs for cell in students.cells if cell.cell_type == "code")
    assert len(tiny.cells) == len(CELLS) and tiny.cells[1].outputs  # the notebook itself is left as it is


def test_notes_for_teachers_are_open_to_teachers(tiny):
    cells = editions.for_class(tiny, "tiny", students=False).cells
    (notes,) = (cell for cell in cells if "notes" in tags(cell))
    assert tags(notes) == ["notes"]


PAGES = "https://harmlens.github.io/harmlens"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{term}`gates <gate>` open", f"[gates]({PAGES}/book/glossary.html#term-gate) open"),
        ("see {doc}`/book/models`", f"see [Models]({PAGES}/book/models.html)"),
        ("see {doc}`this one <05_neurons>`", f"see [this one]({PAGES}/notebooks/05_neurons.html)"),
        ("{cite:t}`ganguli2026why`", f"[Ganguli and Moraffah (2026)]({PAGES}/book/bibliography.html)"),
        ("so {cite}`holm1979simple`", f"so [(Holm 1979)]({PAGES}/book/bibliography.html)"),
        ("```{math}\n:label: eq-a\nx = 1\n```\nby {eq}`eq-a`", "$$\nx = 1 \\tag{1}\n$$\nby (1)"),
        ("```{admonition} On a real model\n:class: dropdown\nNo.\n```",
         "<details><summary>On a real model</summary>\n\nNo.\n\n</details>"),
        ("```{admonition} Learn\n:class: tip\n- this\n```", "> **Learn**\n>\n> - this"),
        ("```{exercise-start}\n:label: ex-a\n```\nWhat?\n```{exercise-end}\n```", "### Exercise 1\nWhat?"),
        ("```{solution-start} ex-a\n:class: dropdown\n```\nThis.\n```{solution-end}\n```",
         "<details><summary>Solution 1</summary>\n\nThis.\n\n</details>"),
        ("```python\nx = {term}\n```", "```python\nx = {term}\n```"),
    ],
)  # fmt: skip
def test_markup_by_hand(source, expected):
    asked = nbformat.v4.new_markdown_cell("```{exercise-start}\n:label: ex-a")
    cells = [nbformat.v4.new_markdown_cell(source)] + [asked] * ("exercise-start" not in source)
    plain = editions.Plain(nbformat.v4.new_notebook(cells=cells), "00_model_organism")
    assert plain.text(source) == expected


def test_otter_gets_blocks_that_close_and_every_solution(pair):
    book, path = pair
    cells = editions.edition("otter", path).cells
    blocks = []
    for cell in cells:
        if cell.cell_type == "raw" and (mark := re.match(r"# (BEGIN|END) (\w+)", cell.source)):
            if mark[1] == "BEGIN":
                blocks.append(mark[2])
            else:
                assert blocks.pop() == mark[2]
    assert blocks == [] and cells[0].source.startswith("# ASSIGNMENT CONFIG")
    text = "\n".join(cell.source for cell in cells)
    asked = "\n".join(cell.source for cell in book.cells).count("{exercise-start}")
    assert text.count("# BEGIN QUESTION") == asked >= 3
    assert text.count("# BEGIN TESTS") == sum("check" in tags(cell) for cell in book.cells)
    assert text.count("manual: true") == asked - text.count("# BEGIN TESTS")
    assert not editions.LEFT.search(text)
    assert all(cell.source.count("<details>") == cell.source.count("</details>") for cell in cells)


def test_slides_are_figures_under_a_sentence_without_code(pair):
    book, path = pair
    cells = editions.edition("slides", path).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    figures = [c for c in book.cells if c.metadata.get("mystnb", {}).get("figure") and c.cell_type == "code"]
    assert len(code) == sum("solution" not in tags(cell) for cell in figures) > 0
    for cell in code:
        assert cell.source == "" and all("image/png" in output.data for output in cell.outputs)
    starts = [cell for cell in cells if cell.metadata.slideshow.slide_type == "slide"]
    assert all(cell.source.startswith("## ") and len(cell.source.splitlines()[0]) < 140 for cell in starts)


def test_there_is_something_to_do_by_hand_with_a_check_and_to_argue(pair):
    book, path = pair
    asked = editions.exercises(book)
    texts = [exercise["text"][0].source for exercise in asked]
    assert len(asked) >= 3
    for number, text in enumerate(texts, start=1):
        assert f"{{exercise-start}} {path.stem[:2]}.{number}\n" in text
        assert re.search(r"\*(By hand|With code[\w ]*|To argue); (easy|medium|hard), \d+ minutes\.\*", text)
    for kind in ("By hand;", "With code and a check;", "To argue;"):
        assert any(f"*{kind}" in text for text in texts), kind
    for exercise, text in zip(asked, texts, strict=True):
        assert bool(exercise["check"]) == bool(exercise["starter"]) == ("and a check" in text)
