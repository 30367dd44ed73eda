"""The notebooks for other readers than those of the book: python tools/editions.py students

colab         plain Markdown, for a notebook that is opened outside the book: links in the place of terms,
              citations and references, formulas between dollars, captions behind their figures, solutions
              folded; no outputs
students      plain Markdown as well, without solutions and notes for teachers, and without outputs from the
              first on that is to be predicted
instructors   plain Markdown, with solutions and notes for teachers; the quizzes for jupyterquiz beside them
otter         exercises alone, as master notebooks for otter assign
slides        the cells that are tagged slide: a figure under its first sentence, no code

They are written to build/<edition>. The Colab edition of the repository, which badge and rocket open, is
written by make sync.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter

import front
from harmlens.keep import files
from layout import ROOT, address, notebooks, read_notebook, tags, write_notebook
from sync import BADGE, pages_url

FENCE = re.compile(
    r"(?ms)^(?P<fence>`{3,}|:{3,})\{(?P<kind>[\w-]+)\} ?(?P<title>.*?)\n(?P<body>.*?)^(?P=fence)[ \t]*$"
)
ROLE = re.compile(r"\{(?P<kind>[a-z]+(?::[a-z]+)?)\}`(?P<text>[^`]+)`")
LEFT = re.compile(r"\{[a-z:-]+\}`|^[`:]{3,}\{", re.M)  # markup of the book that nothing has read
HIDDEN = {"solution", "notes"}  # from students
PREDICT = "predict"  # cells whose outputs students are to predict


# --------------------------------------------------------------------------- for a course


def for_class(
    notebook: nbformat.NotebookNode, name: str, root: Path = ROOT, *, students: bool
) -> nbformat.NotebookNode:
    """A copy in plain Markdown, each caption behind its figure.

    Students get no solutions, no notes for teachers and no badge, which leads to solutions; and no outputs
    from the first one on that they are to predict, since later ones would tell.
    """
    plain, cells, told = Plain(notebook, name, root), [], True
    for cell in notebook.cells:
        marks = set(tags(cell))
        if students and HIDDEN & marks:
            continue
        new = plain.cell(cell)
        told = told and not (students and PREDICT in marks)
        if students and new.cell_type == "markdown":
            new.source = BADGE.sub("", new.source).strip()
        elif students and (not told or "hl.start(" in new.source or {"starter", "check"} & marks):
            new.outputs, new.execution_count = [], None
        if "notes" in marks:
            new.metadata["tags"] = [tag for tag in tags(new) if not tag.startswith("remove-")]
        cells += [new] if new.source else []
        if caption := new.metadata.pop("mystnb", {}).get("figure", {}).get("caption"):
            hidden = students and PREDICT in marks
            cells += [] if hidden else [plain.caption(cell, caption)]
    new = copy.deepcopy(notebook)
    new.cells = cells
    return new


def for_otter(notebook: nbformat.NotebookNode, name: str, root: Path = ROOT) -> nbformat.NotebookNode:
    """The set-up and the exercises, between the raw cells that otter assign reads.

    An exercise with a check is graded by it, any other one by hand.
    """
    raw, plain = nbformat.v4.new_raw_cell, Plain(notebook, name, root)
    cells = [raw(f"# ASSIGNMENT CONFIG\nname: {name}\ninit_cell: true")]
    cells += [cell for cell in notebook.cells if not {"exercise", "solution", "notes"} & set(tags(cell))]
    for number, exercise in enumerate(exercises(notebook), start=1):
        points = "points: 2" if exercise["check"] else "points: 2\nmanual: true"
        cells.append(raw(f"# BEGIN QUESTION\nname: q{number}\n{points}"))
        for kind, block in (
            ("text", ""),
            ("starter", "PROMPT"),
            ("solution", "SOLUTION"),
            ("check", "TESTS"),
        ):
            some = exercise[kind]
            if some and block:
                some = [raw(f"# BEGIN {block}"), *some, raw(f"# END {block}")]
            cells += some
        cells.append(raw("# END QUESTION"))
    new = copy.deepcopy(notebook)
    new.cells = [plain.cell(cell) for cell in cells]
    return new


def exercises(notebook: nbformat.NotebookNode) -> list[dict[str, list[nbformat.NotebookNode]]]:
    """The exercises of a notebook, each with its cells by what they are."""
    found: list[dict[str, list[nbformat.NotebookNode]]] = []
    for cell in notebook.cells:
        marks = set(tags(cell))
        if "exercise" in marks and cell.cell_type == "markdown" and "{exercise-start}" in cell.source:
            found.append({kind: [] for kind in ("text", "starter", "solution", "check")})
        for kind in ("starter", "check", "solution"):
            if kind in marks and found:
                found[-1][kind].append(cell)
                break
        else:
            if "exercise" in marks:
                found[-1]["text"].append(cell)
    return found


def for_slides(notebook: nbformat.NotebookNode, name: str, root: Path = ROOT) -> nbformat.NotebookNode:
    """What is tagged slide. A figure stands under its caption's first sentence, the rest of it below."""
    plain, cells = Plain(notebook, name, root), []
    for cell in (cell for cell in notebook.cells if "slide" in tags(cell)):
        caption = cell.metadata.get("mystnb", {}).get("figure", {}).get("caption", "")
        head, rest = re.fullmatch(r"(?s)(\*\*.+?\*\*|[^.]*\.)?(.*)", plain.text(caption)).groups("")
        shown = [cell] if cell.cell_type == "markdown" else []
        if cell.cell_type == "code":
            below = re.sub(r"\*?(What [\w ]+:)\*?", r"\n\n**\1**", rest.strip())
            picture = nbformat.v4.new_code_cell("")
            picture.outputs = [one for one in cell.outputs if "image/png" in one.get("data", {})]
            said = (f"## {head.strip('*').rstrip('.')}", f"<small>{below}</small>")
            above, under = (nbformat.v4.new_markdown_cell(text) for text in said)
            shown = [above, picture, under]
        for place, one in enumerate(plain.cell(one) for one in shown):
            one.metadata["slideshow"] = {"slide_type": "-" if place else "slide"}
            cells.append(one)
    new = copy.deepcopy(notebook)
    new.cells = cells
    return new


# --------------------------------------------------------------------------- plain Markdown


class Plain:
    """Rewrites one notebook of the book in plain Markdown."""

    def __init__(self, notebook: nbformat.NotebookNode, name: str, root: Path = ROOT) -> None:
        self.notebook, self.name, self.root = notebook, name, root
        self.pages = pages_url(address(root))
        self.texts = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        self.formulas = re.findall(r"^:label: (eq-[\w-]+)", self.texts, re.M)
        asked = re.findall(r"\{exercise-start\} ?([\d.]*)\n:label: (ex-[\w-]+)", self.texts)
        self.exercises = {label: title or str(number) for number, (title, label) in enumerate(asked, start=1)}
        figures = [cell.metadata.get("mystnb", {}).get("figure", {}) for cell in notebook.cells]
        self.figures = {figure["name"]: figure.get("caption", "") for figure in figures if figure.get("name")}

    def whole(self) -> nbformat.NotebookNode:
        """The notebook; a caption follows its figure as a cell of its own."""
        new, inside = copy.deepcopy(self.notebook), False
        cells = []
        for cell in (cell for cell in new.cells if "notes" not in tags(cell)):
            if cell.cell_type == "markdown":
                starts, ends = (cell.source.count(f"{{solution-{end}}}") for end in ("start", "end"))
                inside = (inside or starts > 0) and ends < starts + inside
                cell.source = self.text(cell.source)
                cells += [cell] if cell.source.strip() else []
                continue
            caption = cell.metadata.pop("mystnb", {}).get("figure", {}).get("caption")
            cell.outputs, cell.execution_count = [], None
            if inside or {"setup", "hide-input"} & set(tags(cell)):
                cell.metadata["cellView"] = "form"
                title = "Solution" if inside else "Set-up" if "setup" in tags(cell) else "The figure's code"
                cell.source = f"# @title {title}\n{cell.source}"
            cells.append(cell)
            cells += [self.caption(cell, caption)] if caption else []
        new.cells = cells
        return new

    def caption(self, cell: nbformat.NotebookNode, caption: str) -> nbformat.NotebookNode:
        """A figure's caption as a cell that stands behind it."""
        return nbformat.v4.new_markdown_cell(self.text(caption), id=f"{cell.id[:50]}-caption")

    def cell(self, cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
        """A copy of a cell, in plain Markdown where it is text. What is folded over several cells is open."""
        new = copy.deepcopy(cell)
        if new.cell_type == "markdown":
            new.source = self.text(new.source)
            if new.source.count("<details>") != new.source.count("</details>"):
                new.source = new.source.replace("</details>", "").strip()
                new.source = re.sub(r"<details><summary>(.*?)</summary>", r"**\1**", new.source)
        return new

    def text(self, source: str) -> str:
        """A cell's text: directives first, from the outside in, then roles."""
        source = re.sub(r"(?m)^`{3,}\{(exercise|solution)-end\}[ \t]*\n`{3,}[ \t]*$", self._end, source)
        while (found := FENCE.search(source)) and found["kind"] in self._directives():
            source = source[: found.start()] + self._directive(found) + source[found.end() :]
        source = re.sub(r"(?m)^:::\{.*\}\s*$|^:::\s*$", "", source)
        source = re.sub(
            r"\[\]\((\w[\w-]*)\)", lambda m: f"[{m[1]}]({self.pages}/book/how_to_read.html#{m[1]})", source
        )
        return ROLE.sub(self._role, source).strip()

    # ----------------------------------------------------------------- directives

    def _directives(self) -> Mapping[str, Callable[[str, dict[str, str], str], str]]:
        return {
            "math": self._math, "admonition": self._admonition, "exercise-start": self._exercise,
            "solution-start": self._solution, "note": self._note, "tip": self._note, "warning": self._note,
            "code-block": lambda title, options, body: f"```{title}\n{body}\n```",
        }  # fmt: skip

    def _directive(self, found: re.Match) -> str:
        lines, options = found["body"].splitlines(), {}
        while lines and (option := re.fullmatch(r":([\w-]+):\s*(.*)", lines[0])):
            options[option[1]] = option[2]
            lines.pop(0)
        return self._directives()[found["kind"]](
            found["title"].strip(), options, "\n".join(lines).strip("\n")
        )

    def _math(self, title: str, options: dict[str, str], body: str) -> str:
        label = options.get("label")
        number = rf" \tag{{{self.formulas.index(label) + 1}}}" if label in self.formulas else ""
        return f"$$\n{body}{number}\n$$"

    def _admonition(self, title: str, options: dict[str, str], body: str) -> str:
        if "dropdown" in options.get("class", ""):
            return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"
        return "\n".join(f"> {line}".rstrip() for line in [f"**{title}**", "", *body.splitlines()])

    def _note(self, title: str, options: dict[str, str], body: str) -> str:
        return self._admonition(title or "Note", options, body)

    def _exercise(self, title: str, options: dict[str, str], body: str) -> str:
        return f"### Exercise {self.exercises.get(options.get('label', ''), title)}".rstrip()

    def _solution(self, title: str, options: dict[str, str], body: str) -> str:
        return f"<details><summary>Solution {self.exercises.get(title, '')}</summary>\n"

    def _end(self, found: re.Match) -> str:
        return "\n</details>" if found[1] == "solution" else ""

    # ----------------------------------------------------------------- roles

    def _role(self, found: re.Match) -> str:
        kind, (shown, target) = found["kind"], self._target(found["text"])
        if kind == "term":
            anchor = re.sub(r"[^a-z0-9]+", "-", target.lower()).strip("-")
            return f"[{shown}]({self.pages}/book/glossary.html#term-{anchor})"
        if kind == "doc":
            path = target.removeprefix("/") if target.startswith("/") else f"notebooks/{target}"
            return f"[{shown if shown != target else self._title(path)}]({self.pages}/{path}.html)"
        if kind.startswith("cite"):
            return self._cited(kind, target)
        if kind == "numref":
            lead = re.match(r"\*\*(.+?)\.?\*\*", self.figures.get(target, ""))
            return f"the figure “{lead[1]}”" if lead else f"[a figure]({self.pages}/search.html?q={target})"
        if kind == "eq":
            return f"({self.formulas.index(target) + 1})" if target in self.formulas else "the formula"
        if kind == "prf:ref" or kind == "ref":
            return shown
        return found["text"]

    def _target(self, text: str) -> tuple[str, str]:
        named = re.fullmatch(r"(?s)(.*?)\s*<([^>]+)>", text)
        return (named[1], named[2]) if named else (text, text)

    def _title(self, path: str) -> str:
        for suffix in (".md", ".ipynb"):
            file = (self.root / path).with_suffix(suffix)
            if file.is_file():
                text = read_notebook(file).cells[0].source if suffix == ".ipynb" else file.read_text("utf-8")
                return text.partition("\n")[0].lstrip("# ").strip()
        return path

    def _cited(self, kind: str, keys: str) -> str:
        known = references(self.root)
        some = [known.get(key.strip(), (key.strip(), "")) for key in keys.split(",")]
        if kind == "cite:t":
            told = " and ".join(f"{who} ({year})" for who, year in some)
        else:
            told = f"({'; '.join(f'{who} {year}' for who, year in some)})"
        return f"[{told}]({self.pages}/book/bibliography.html)"


def references(root: Path = ROOT) -> dict[str, tuple[str, str]]:
    """Of each entry of the bibliography who wrote it, in short, and when."""
    found = {}
    for entry in re.split(r"(?m)^@\w+\{", (root / "book" / "references.bib").read_text("utf-8"))[1:]:
        key = entry.partition(",")[0].strip()
        fields = dict(re.findall(r"(?ms)^\s*(\w+)\s*=\s*[{\"](.*?)[}\"],?\s*$", entry))
        people = [re.sub(r"[{}\\'\"^`~]", "", who.partition(",")[0]).strip() for who in
                  re.split(r"\s+and\s+", fields.get("author", key))]  # fmt: skip
        who = (
            people[0]
            if len(people) == 1
            else " and ".join(people)
            if len(people) == 2
            else f"{people[0]} et al."
        )
        found[key] = (who, fields.get("year", ""))
    return found


# --------------------------------------------------------------------------- all of them


def edition(which: str, path: Path, root: Path = ROOT) -> nbformat.NotebookNode:
    """One notebook in one edition."""
    notebook = read_notebook(path)
    if which in ("students", "instructors"):
        return for_class(notebook, path.stem, root, students=which == "students")
    if which in ("otter", "slides"):
        return (for_otter if which == "otter" else for_slides)(notebook, path.stem, root)
    return Plain(notebook, path.stem, root).whole()


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("edition", choices=("colab", "students", "instructors", "otter", "slides"))
    parser.add_argument("--folder", type=Path, help="where they go")
    options = parser.parse_args(arguments)
    folder = options.folder or root / "build" / options.edition
    folder.mkdir(parents=True, exist_ok=True)
    for path in notebooks(root):
        made = edition(options.edition, path, root)
        if options.edition == "slides":
            pages, _ = SlidesExporter(exclude_input=True).from_notebook_node(made)
            (folder / f"{path.stem}.html").write_text(pages, encoding="utf-8")
        else:
            write_notebook(made, folder / path.name)
    if options.edition == "instructors":  # they hold the answers
        for session in range(1, 5):
            files.write_json(folder / f"quiz-{session}.json", front.questions(str(session)))
    print(f"{len(notebooks(root))} notebooks in {folder.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
