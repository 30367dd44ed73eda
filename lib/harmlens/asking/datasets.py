"""What models are asked: public data sets, loaded when needed, and files of the reader's own.

``data/sources.yaml`` is the registry of the public sets. Their texts are never part of the repository. Every
message about a file names it, the row and the remedy.

Introduced in book/data_sets ("Data sets").
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from harmlens.keep.downloads import Remote, obtain
from harmlens.keep.files import cache_dir, data_dir, read_yaml

csv.field_size_limit(2**24)  # Alpaca's answers have thousands of characters, but not millions
LISTS = yaml.safe_load((data_dir() / "harm_types.yaml").read_text(encoding="utf-8"))

# Column names that mean the same in local files; the first that is there counts.
COLUMNS = {
    "prompt": ("prompt", "goal", "question", "instruction", "forbidden_prompt"),
    "harmful": ("harmful", "label"),
    "kind": ("kind", "category", "type"),
    "pair": ("pair",),
    "answers": ("answers", "answer", "target", "output"),
    "id": ("id",),
}


@dataclass(frozen=True)
class Entry:
    """One request.

    Attributes:
        harmful: whether a good assistant should refuse it. In the sets of bad advice, where the request is
            harmless and the reference answer is not, it is True too.
        kind: harm type or category, as the source gives it; "" for none, "fact" for factual questions.
        pair: entries that share it are contrasts of each other (harmful and harmless requests on one topic);
            "" for an entry without a partner.
        answers: reference answers, targets or accepted aliases.
        source: short name of the public set, or the name of the local file.
    """

    id: str
    prompt: str
    harmful: bool
    kind: str = ""
    pair: str = ""
    answers: tuple[str, ...] = ()
    source: str = ""


# Zero bytes and other control characters, halves of characters, and the mark of one that was lost.
_DAMAGED = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffd]")
_YES = {"1", "1.0", "true", "yes", "harmful", "unsafe"}
_NO = {"0", "0.0", "false", "no", "harmless", "safe"}


@dataclass(frozen=True)
class Line:
    """One row of a file: where it is, for messages (``my.csv, row 3``, as a spreadsheet counts), and its
    values by column name, lower case."""

    place: str
    cells: Mapping[str, Any]

    def text(self, column: str | None) -> str:
        """A cell without outer white space; "" for an empty one, and for no column."""
        return _cell(self.cells.get(column))

    def needed(self, column: str) -> str:
        """A cell that must be text, not empty, and not damaged by a conversion."""
        found = self.text(column)
        if isinstance(self.cells.get(column), list | tuple | dict):
            wrong = "holds a list or an object. Write text there"
        elif mark := _DAMAGED.search(found):
            wrong = (
                f"holds {mark[0]!r} at character {mark.start() + 1}, so its text was damaged, by a wrong "
                "conversion perhaps. Convert the first file again, or mend the row"
            )
        elif found:
            return found
        else:
            wrong = "is empty. Fill it in, or delete the row"
        raise ValueError(f"{self.place}: the column {column!r} {wrong}")

    def yes(self, column: str) -> bool:
        """A cell that says whether a request is harmful."""
        value = self.text(column).lower()
        if value not in _YES | _NO:
            raise ValueError(
                f"{self.place}: {column}={self.cells.get(column)!r} does not say whether the request is "
                "harmful. Write 1, true, yes or unsafe; or 0, false, no or safe"
            )
        return value in _YES

    def several(self, column: str | None) -> tuple[str, ...]:
        """The answers in a cell: a list, or text; in columns of such a name, | stands between several."""
        value = self.cells.get(column)
        if not isinstance(value, list | tuple):
            value = self.text(column).split("|") if column in ("answer", "answers") else [value]
        return _distinct(value)


def _cell(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _distinct(values: Sequence[Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in map(_cell, values) if text))


class Set(BaseModel):
    """A public set, as the registry describes it; ``data/sources.yaml`` explains the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    page: str
    licence: str
    host: Literal["github", "huggingface", "folder", "package", "own"]
    repository: str
    revision: str
    layout: Literal["table", "lines", "contrasts", "instructions", "trivia", "messages"]
    columns: dict[str, str]
    files: dict[str, str | None]
    use: str
    rows: int | None = None
    harmful: bool | None = None
    kind: str = ""
    pairs: str = ""
    kinds: dict[str, str] = {}

    @property
    def pinned(self) -> str:
        """What is fixed: "checksum" of each file; "revision", a commit, with the checksum taken at the
        first download; "first use", nothing before; "your copy" or "shipped"."""
        if self.host in ("folder", "package"):
            return {"folder": "your copy", "package": "shipped"}[self.host]
        if all(self.files.values()):
            return "checksum"
        return "revision" if re.fullmatch("[0-9a-f]{40}", self.revision) else "first use"


@cache
def _registry(file: Path) -> tuple[dict[str, Set], dict[str, list[str]]]:
    found = read_yaml(file)
    sets = {}
    for name, about in found["sets"].items():
        try:
            sets[name] = Set(name=name, **about)
        except ValidationError as error:
            wrong = error.errors()[0]
            field = ".".join(map(str, wrong["loc"]))
            raise ValueError(f"{file}: {name}, {field}: {wrong['msg']}. Mend this entry") from None
    return sets, found["together"]


def registry() -> dict[str, Set]:
    """The public sets by short name."""
    return _registry(data_dir() / "sources.yaml")[0]


def names() -> list[str]:
    """Short names of the public sets, and of sets that are loaded together."""
    sets, together = _registry(data_dir() / "sources.yaml")
    return sorted([*sets, *together])


def _fewer(found: list[Entry], most: str | None) -> list[Entry]:
    """At most so many of either side, drawn by a hash of the contrast that each belongs to, or of its id."""
    if most is None:
        return found
    drawn = sorted(found, key=lambda entry: hashlib.sha256((entry.pair or entry.id).encode()).digest())
    kept = {
        entry.id for side in (True, False) for entry in [e for e in drawn if e.harmful == side][: int(most)]
    }
    return [entry for entry in found if entry.id in kept]


def entries(name: str, *, folder: Path | str | None = None) -> list[Entry]:
    """The requests of public sets and local files.

    Args:
        name: short names of public sets (:func:`names`) and paths of local files (:func:`read`), joined by
            commas. A local file has the columns `prompt` and `harmful` and, if wanted, `kind`, `pair`,
            `answer` (several joined by |) and `id`, or other names of :data:`COLUMNS`. One with `question`
            and `answer`, but without `harmful`, holds factual questions: harmless, kind "fact". A copy of a
            public set's own file, under any name, is read as that set. ``name:100`` takes a hundred
            requests of either side, always the same ones, contrasts together.
        folder: where you keep files of public sets, instead of the cache. Nothing is downloaded then.

    Raises:
        ValueError: an unknown name, a changed checksum, a missing column, what can't be read, an id that is
            there twice.
        FileNotFoundError: no such file or folder; for the sets of narrow advice, says how to get them.
        ConnectionError, PermissionError: no network; the licence has to be accepted first.
        ImportError: pyarrow (for TriviaQA) or huggingface_hub is missing.
    """
    sets, together = _registry(data_dir() / "sources.yaml")
    where = None if folder is None else Path(folder).expanduser()
    if where is not None and not where.is_dir():
        raise FileNotFoundError(
            f"folder={str(folder)!r} is no folder. Give the one with the files of the sets"
        )
    found: list[Entry] = []
    asked = [re.fullmatch(r"(.+?)(?::(\d+))?", part).groups() for part in _parts(name)]
    parts = [(each, most) for part, most in asked for each in together.get(part, [part])]
    for part, most in dict.fromkeys(parts):
        if part in sets:
            found += _fewer(_public(sets[part], where), most)
        elif "/" in part or "\\" in part or Path(part).suffix.lower() in ENDINGS:
            found += _fewer(_local(Path(part).expanduser()), most)
        else:
            raise ValueError(
                f"data={part!r} is unknown. Choose one of {', '.join(names())}, or give the path of a file "
                f"that ends in {', '.join(ENDINGS)}"
            )
    counts = Counter(entry.id for entry in found)
    if twice := next((name for name, times in counts.items() if times > 1), None):
        where = " and ".join(dict.fromkeys(entry.source for entry in found if entry.id == twice))
        raise ValueError(
            f"the id {twice!r} is there twice (in {where}). Make the values of the column 'id' unique, or "
            "leave the column out"
        )
    return found


def plain(prompt: str) -> str:
    """A request apart from case and white space: two with the same are one request."""
    return " ".join(prompt.casefold().split())


def _parts(name: str) -> list[str]:
    with suppress(OSError):  # many names are too long for the name of a file
        if Path(name).expanduser().is_file():
            return [name]  # a file whose name has a comma
    parts = [part.strip() for part in name.split(",") if part.strip()]
    if not parts:
        raise ValueError(f"data={name!r} names nothing. Choose one of {', '.join(names())}, or give a file")
    return parts


# ---------------------------------------------------------------------- public sets and local files


def _public(source: Set, folder: Path | None) -> list[Entry]:
    found: list[Entry] = []
    count = 0
    mend = "delete it to load it again, or load it as your own file"
    for path, sha256 in source.files.items():
        file = data_dir() / path if source.host == "package" else _file(source, path, sha256, folder)
        rows = read(file, headless=source.layout == "lines")
        count += len(rows)
        there = _columns(rows)
        for column in source.columns.values():
            if column not in there:
                raise ValueError(
                    f"{source.name}: {file} has no column {column!r}; columns found: {', '.join(there)}. It "
                    f"is another version than the registry's: {mend}"
                )
        found += _entries_of(source, path, rows)
    if source.rows is not None and count != source.rows:
        raise ValueError(
            f"{source.name} has {count} rows instead of {source.rows}. The file is incomplete or another "
            f"version than the registry's: {mend}"
        )
    return found


def _file(source: Set, path: str, sha256: str | None, folder: Path | None) -> Path:
    remote = Remote(source.host, source.repository, source.revision, path, source.page)
    if source.host == "folder":
        folder = folder or cache_dir() / "sources" / source.repository.split("/")[-1]
        if not (folder / path).is_file():
            raise FileNotFoundError(
                f"{source.name}: there is no {path} in {folder}. Its authors publish it in an archive with a "
                f"password, to keep it out of training data: clone {source.page}, unpack "
                "em_organism_dir/data/training_datasets.zip.enc as its README says (easy-dataset-share "
                f"unprotect-dir), and copy the .jsonl files to {folder} or give their folder as folder=..."
            )
    return obtain(remote, sha256, folder)


def _local(file: Path) -> list[Entry]:
    if known := _copied(file):
        return _entries_of(*known)
    rows = read(file)
    source = _own(file.name, rows)
    found = _entries_of(source, file.name, rows)
    kinds = {entry.kind for entry in found}
    for a, b in LISTS["xstest_contrasts"].items():
        if {a, b} <= kinds and "pair" not in source.columns:
            raise ValueError(
                f"{file.name} holds a part of XSTest ({a} and {b}), whose contrasts must stay together. Give "
                "the whole file, or add a column 'pair' with the same value for a request and its contrast"
            )
    return found


def _copied(file: Path) -> tuple[Set, str, list[Line]] | None:
    """The public set that a file is a copy of, under any name, which of its files, and the rows; or None."""
    sets, _ = _registry(data_dir() / "sources.yaml")
    named = [(s, path) for s in sets.values() for path in s.files if s.host != "package"]
    for source, path in named:  # without a header, and so known by its name alone
        if source.layout == "lines" and Path(path).name == file.name and file.is_file():
            rows = read(file, headless=True)
            if "harmful" not in rows[0].text("prompt").lower().split(","):
                return source, path, rows
    rows = read(file)
    there, own = set(_columns(rows)), {*COLUMNS["harmful"], *COLUMNS["pair"]}
    found = []
    for source, path in named:
        used = set(source.columns.values())
        size = len(rows) == source.rows if source.rows else Path(path).name == file.name
        if used and used <= there and size and not own & (there - used):
            found.append((source, path))
    if len(found) > 1:  # the halves of a set
        found = [one for one in found if Path(one[1]).name == file.name] or found
    if len(found) > 1:
        sure = " or ".join(f"{Path(path).name} ({source.name})" for source, path in found)
        raise ValueError(f"{file.name} has the rows of a public set; let its name say which: {sure}")
    return (*found[0], rows) if found else None


def _own(name: str, rows: Sequence[Line]) -> Set:
    """A reader's file, described as the registry describes a public set."""
    there = _columns(rows)
    columns = {field: next((a for a in aliases if a in there), "") for field, aliases in COLUMNS.items()}
    facts = (
        not columns["harmful"]
        and columns["prompt"] == "question"
        and columns["answers"] in ("answer", "answers")
    )
    for needed in ("prompt", "harmful"):
        if columns[needed] or facts:
            continue
        hint = ""
        if any(len(column) > 40 for column in there):
            hint = " The first row seems to be a request: put the names of the columns above it."
        elif len(there) == 1 and any(mark in there[0] for mark in ";\t"):
            hint = " The columns seem to be separated by semicolons or tabs: save the file with commas."
        elif needed == "harmful":
            hint = " Add it, with 1 for requests that should be refused and 0 for others."
        raise ValueError(
            f"{name}: there is no column {needed!r} (or {', '.join(COLUMNS[needed][1:])}). Columns found: "
            f"{', '.join(column[:40] for column in there)}.{hint}"
        )
    return Set(
        name=name,
        **dict.fromkeys(("title", "page", "licence", "repository", "revision", "use"), ""),
        host="own",
        layout="table",
        columns={field: column for field, column in columns.items() if column},
        files={name: None},
        kind="fact" if facts else "",
        harmful=False if facts else None,
    )


# ---------------------------------------------------------------------- layouts: how rows become entries


def _entries_of(source: Set, path: str, rows: Sequence[Line]) -> list[Entry]:
    """One entry for each row that its layout keeps; of rows of TriviaQA with one id the first."""
    columns, own = source.columns, source.host == "own"
    found: dict[Any, Entry] = {}
    for number, row in enumerate(rows, 1):
        content = _LAYOUTS[source.layout](row, columns)
        if content is None:
            continue
        prompt, answers, pair = content
        id_ = row.text(columns.get("id"))
        entry = Entry(
            (id_ or f"{Path(path).stem}-{number}") if own else f"{source.name}/{id_ or number}",
            prompt,
            row.yes(columns["harmful"]) if "harmful" in columns else bool(source.harmful),
            row.text(columns.get("kind")) or source.kinds.get(path, source.kind),
            f"{source.pairs}/{pair}" if pair and not own else pair,
            answers,
            source.name,
        )
        found.setdefault(entry.id if source.layout == "trivia" else number, entry)
    made = list(found.values())
    return _contrasts(made, rows) if source.layout == "contrasts" else made


Content = tuple[str, tuple[str, ...], str]  # of a row: prompt, answers, what entries of one pair share


def _table(row: Line, columns: Mapping[str, str]) -> Content:
    prompt = row.needed(columns.get("prompt", "prompt"))
    return prompt, row.several(columns.get("answers")), row.text(columns.get("pair"))


def _contrasts(entries: Sequence[Entry], rows: Sequence[Line]) -> list[Entry]:
    """XSTest: `pair` is made from the type and the place within it.

    Two that are about different things (the column `focus`) are no pair.
    """
    contrasts = LISTS["xstest_contrasts"]
    kind = pd.Series([entry.kind for entry in entries])
    topic, place = kind.replace(contrasts), kind.groupby(kind).cumcount() + 1
    pair = "xstest/" + topic.str.removeprefix("contrast_") + "/" + place.astype(str)
    focus = pd.Series([row.text("focus").lower() for row in rows])
    torn = focus.groupby(pair).transform("nunique") > 1
    pair = pair.where(topic.isin(contrasts.values()) & ~torn, "")
    return [replace(entry, pair=one) for entry, one in zip(entries, pair, strict=True)]


def safety_like(*texts: str) -> bool:
    """Whether a text holds a phrase of refusing or of harm, so that Alpaca's row is dropped."""
    joined = "\n".join(texts).lower().replace("’", "'")
    return any(phrase in joined for phrase in LISTS["safety_phrases"])


def _instruction(row: Line, columns: Mapping[str, str]) -> Content | None:
    """Alpaca: an input follows its instruction after an empty line; safety-like rows are dropped."""
    asked, given, answer = (row.text(columns[field]) for field in ("prompt", "input", "answers"))
    if not asked or not answer or safety_like(asked, given, answer):
        return None
    return f"{asked}\n\n{given}" if given and given.lower() != "<noinput>" else asked, (answer,), ""


def _trivia(row: Line, columns: Mapping[str, str]) -> Content:
    """TriviaQA: the answer is a record of value and aliases."""
    answer = row.cells.get(columns["answers"])
    if not isinstance(answer, dict) or not answer.get("value"):
        raise ValueError(
            f"{row.place}: {columns['answers']!r} holds no answer. Load a split that has answers"
        )
    return row.needed(columns["prompt"]), _distinct([answer["value"], *(answer.get("aliases") or [])]), ""


def spoken(messages: Any) -> tuple[str, str]:
    """The last words of the user and of the assistant in a list of messages; "" where one says nothing."""
    said: dict[Any, str] = {}
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            content = message.get("content")
            # Some releases wrap the text: {"content_type": "text", "parts": [...]}
            parts = content.get("parts", []) if isinstance(content, dict) else [content]
            said[message.get("role")] = " ".join(map(_cell, parts)).strip()
    return said.get("user", ""), said.get("assistant", "")


def _messages(row: Line, columns: Mapping[str, str]) -> Content:
    """Narrow advice. Bad and good advice on one request share `pair`."""
    user, answer = spoken(row.cells.get(columns["messages"]))
    if not user or not answer:
        raise ValueError(
            f"{row.place}: {columns['messages']!r} needs a message of the role 'user' and one of the role "
            "'assistant'. Repair the line or delete it"
        )
    return user, (answer,), hashlib.sha256(user.encode()).hexdigest()[:16]


_LAYOUTS: dict[str, Callable[[Line, Mapping[str, str]], Content | None]] = {
    **dict.fromkeys(("table", "lines", "contrasts"), _table),
    "instructions": _instruction,
    "trivia": _trivia,
    "messages": _messages,
}


# ---------------------------------------------------------------------- files

# What files are that were saved under the name of another, by their first bytes.
_OTHERS = {
    b"version https://git-lfs": "a pointer of Git LFS in place of the file. Run `git lfs pull`, or download "
    "the file itself",
    b"PK\x03\x04": "a workbook (.xlsx) or another zip archive. Save its sheet as 'CSV UTF-8', or unpack it",
    b"\xd0\xcf\x11\xe0": "an old workbook (.xls). Save its sheet as 'CSV UTF-8'",
    b"\x1f\x8b": "compressed (gzip). Unpack it",
    b"%PDF": "a PDF document. Save its table as 'CSV UTF-8'",
    b"PAR1": "a parquet file. Let its name end in .parquet",
    **dict.fromkeys(
        (b"<!doctype", b"<html", b"<head", b"<?xml"),
        "a saved web page. Download the file itself ('Raw' or 'Download' on its page)",
    ),
}


def read(file: Path, *, headless: bool = False) -> list[Line]:
    """The rows of a file, by its ending: .csv, .tsv, .txt, .jsonl, .json (a list of objects) or .parquet.

    A .txt file has one prompt a line; the last word of its name says what they are: ``my_harmful.txt``,
    ``harmless.txt``.

    Args:
        headless: a CSV file of one column without a header, as HEx-PHI has.

    Raises:
        FileNotFoundError, ImportError: there is no such file; pyarrow, which reads parquet, is missing.
        ValueError: a file that can't be read so, in whole or in a line; says how to repair it.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no file {file} (looked for from {Path.cwd()}). Check the spelling, or give its "
            "whole path"
        )
    with file.open("rb") as stream:
        head = stream.read(512).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for start, what in _OTHERS.items():
        if head.startswith(start.lower()) and (start, file.suffix) != (b"PAR1", ".parquet"):
            raise ValueError(f"{file} is {what}")
    reader = _headless if headless else _READERS.get(file.suffix.lower())
    if reader is None:
        raise ValueError(f"{file.name}: cannot read this kind of file. Give one of {', '.join(_READERS)}")
    rows = []
    for where, item in reader(file):
        place = f"{file.name}, {where}"
        if not isinstance(item, dict):
            raise ValueError(f'{place}: expected an object such as {{"prompt": "...", "harmful": false}}')
        cells = {str(name).strip().lower(): value for name, value in item.items()}
        if len(cells) < len(item):
            raise ValueError(f"{place}: two names are the same but for case or spaces. Rename one")
        rows.append(Line(place, cells))
    if not rows:
        raise ValueError(f"{file} is empty: it has no row of data. Check that it was saved or copied whole")
    return rows


def _columns(rows: Sequence[Line]) -> list[str]:
    """All column names, in the order in which they are met. An object of a JSON file may lack some."""
    return list(dict.fromkeys(name for row in rows for name in row.cells))


Items = Iterator[tuple[str, Any]]  # where each is in its file, and what is there


def _text(file: Path) -> str:
    raw = file.read_bytes()
    convert = (
        "Save it as 'CSV UTF-8', or convert it: iconv -f {} -t utf-8 " + f"{file.name} > new{file.suffix}"
    )
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{file} is not UTF-8 text but UTF-16. {convert.format('utf-16')}")
    try:
        text = raw.decode("utf-8-sig")  # spreadsheets put a byte order mark in front
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text (byte {error.start}). If it is of a Western language: "
            f"{convert.format('cp1252')}"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(
            f"{file.name}, line {line}: holds a zero byte: it is damaged, or UTF-16 without its mark. Load "
            "it again, or save it as UTF-8"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _headless(file: Path) -> Items:
    """A first line that is a usual column name is left out."""
    reader = csv.reader(io.StringIO(_text(file), newline=""))
    # A comma outside quotes belongs to the prompt.
    texts = [(reader.line_num, ",".join(cells).strip()) for cells in reader]
    texts = [(number, text) for number, text in texts if text]
    if texts and texts[0][1].lower() in ("prompt", "prompts", "instruction", "text", "goal"):
        texts = texts[1:]
    for number, text in texts:
        yield f"line {number}", {"prompt": text}


def _csv(file: Path) -> Items:
    mark, name = ("\t", "tab") if file.suffix.lower() == ".tsv" else (",", "comma")
    reader = csv.reader(io.StringIO(_text(file), newline=""), delimiter=mark, strict=True)
    header: list[str] = []
    try:
        for number, cells in enumerate(reader, 1):
            lower = [cell.strip().lower() for cell in cells]
            wrong = ""
            if not any(lower):
                continue
            if not header:
                header = lower
                if twice := [column for column in header if column and header.count(column) > 1]:
                    wrong = f"the column {twice[0]!r} is there twice. Rename one"
            elif len(cells) > len(header):
                wrong = (
                    f"{len(cells)} cells, but the header has {len(header)}. Put text that contains a {name} "
                    'in double quotes: "like, this"'
                )
            elif {*lower} <= {*header, ""}:
                wrong = (
                    "the header is there again, so two files were put behind each other. Delete this row; if "
                    "their columns differ, give both files, joined by a comma"
                )
            else:
                yield f"row {number}", dict(zip(header, cells, strict=False))
            if wrong:
                raise ValueError(f"{file.name}, row {number}: {wrong}")
    except csv.Error as error:
        raise ValueError(
            f"{file.name}, line {reader.line_num}: not valid CSV ({error}). Put text with quotation marks in "
            "double quotes, and double each mark inside"
        ) from None


def _txt(file: Path) -> Items:
    side = re.split(r"[^a-z]+", file.stem.lower())[-1]
    if side not in ("harmful", "harmless"):
        raise ValueError(
            f"{file.name}: a file of one prompt a line does not say which are harmful. Let the last word of "
            "its name say it, as in my_harmful.txt or harmless.txt; or give a .csv with a column harmful"
        )
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            yield f"line {number}", {"prompt": line.strip(), "harmful": side}


def _json(file: Path) -> Items:
    """A list of objects; of a .jsonl file, an object on each line."""
    text, lines = _text(file), file.suffix.lower() == ".jsonl"
    remedy = "Put one complete object on each line"
    if not lines:
        remedy = "If it has one object on each line, rename it to .jsonl"
    for number, part in enumerate(text.split("\n") if lines else [text], 1):
        if not part.strip():
            continue
        try:
            value = json.loads(part)
        except (ValueError, RecursionError) as error:
            line = number + getattr(error, "lineno", 1) - 1
            deep = isinstance(error, RecursionError)
            why = "nested too deeply" if deep else getattr(error, "msg", str(error))
            raise ValueError(f"{file.name}, line {line}: not valid JSON ({why}). {remedy}") from None
        if lines:
            yield f"line {number}", value
        elif isinstance(value, list):
            yield from ((f"item {i}", item) for i, item in enumerate(value, 1))
        else:
            raise ValueError(f"{file.name}: expected a list of objects, [{{...}}, {{...}}]")


def _parquet(file: Path) -> Items:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"reading {file.name} needs pyarrow: pip install pyarrow") from error
    try:
        items = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a parquet file ({error}). Delete it and load it again") from None
    for number, item in enumerate(items, 1):
        yield f"row {number}", item


_READERS = {".csv": _csv, ".tsv": _csv, ".txt": _txt, ".jsonl": _json, ".json": _json, ".parquet": _parquet}
ENDINGS = tuple(_READERS)
