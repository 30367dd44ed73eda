"""Rows of tables, lists and text files, read with messages that name file, row and remedy.

Introduced in book/data_sets ("Data sets").
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A cell may be long: Alpaca's answers have thousands of characters, but not millions.
csv.field_size_limit(2**24)


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        place: where it is, for messages: ``my.csv, row 3`` (as a spreadsheet counts, the header is row 1).
        cells: its values by column name, lower case.
    """

    place: str
    cells: Mapping[str, Any]


def read(file: Path) -> list[Row]:
    """The rows of a file, by its ending: .csv, .tsv, .txt, .jsonl, .json (a list of objects) or .parquet.

    A .txt file has one prompt a line; the last word of its name says what they are: ``my_harmful.txt``,
    ``harmless.txt``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another ending or another kind of file than its ending says, text that is not UTF-8, a
            line that is not valid, a header in the middle, or no row at all; says how to repair it.
        ImportError: pyarrow, which reads parquet, is missing.
    """
    _there(file)
    _refuse_others(file)
    if file.suffix.lower() not in _READERS:
        raise ValueError(f"{file.name}: cannot read this kind of file. Give one of {', '.join(_READERS)}")
    return _some(file, _READERS[file.suffix.lower()](file))


def lines(file: Path) -> list[Row]:
    """The rows of a CSV file without a header and with one column, as HEx-PHI has; it is called `prompt`.

    A first line that is a usual column name is left out.

    Raises:
        FileNotFoundError, ValueError: as :func:`read`.
    """
    _there(file)
    _refuse_others(file)
    reader = csv.reader(io.StringIO(_text(file), newline=""))
    # A comma outside quotes belongs to the prompt.
    texts = [(reader.line_num, ",".join(cells).strip()) for cells in reader]
    texts = [(number, text) for number, text in texts if text]
    if texts and texts[0][1].lower() in ("prompt", "prompts", "instruction", "text", "goal"):
        texts = texts[1:]
    return _some(file, [Row(f"{file.name}, line {number}", {"prompt": text}) for number, text in texts])


def columns(rows: Sequence[Row]) -> list[str]:
    """All column names, in the order in which they are met. An object of a JSON file may lack some."""
    return list(dict.fromkeys(name for row in rows for name in row.cells))


def _there(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no file {file} (looked for from {Path.cwd()}). Check the spelling, or give its "
            "whole path"
        )


def _some(file: Path, rows: list[Row]) -> list[Row]:
    if not rows:
        raise ValueError(f"{file} is empty: it has no row of data. Check that it was saved or copied whole")
    return rows


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


def _refuse_others(file: Path) -> None:
    with file.open("rb") as stream:
        head = stream.read(512).removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, what in _OTHERS.items():
        if head[: len(start)].lower() == start.lower() and not (
            start == b"PAR1" and file.suffix == ".parquet"
        ):
            raise ValueError(f"{file} is {what}")


def _text(file: Path) -> str:
    raw = file.read_bytes()
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or _mostly_zero(raw[1::2]) or _mostly_zero(raw[::2]):
        kind = "utf-16" if raw[:1] > b"\xf0" else "utf-16le" if _mostly_zero(raw[1::2]) else "utf-16be"
        raise ValueError(f"{file} is not UTF-8 text but UTF-16. {_converted(file, kind)}")
    try:
        text = raw.decode("utf-8-sig")  # spreadsheets put a byte order mark in front
    except UnicodeDecodeError as error:
        try:
            raw.decode("cp1252")
            remedy = f"If it is of a Western language: {_converted(file, 'cp1252')}"
        except UnicodeDecodeError:
            remedy = "Save it as UTF-8 in the programme that made it"
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start}). {remedy}") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(
            f"{file.name}, line {line}: holds a zero byte, so it is damaged. Save or load it again"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _mostly_zero(part: bytes) -> bool:
    return part[:2048].count(0) > 0.4 * max(len(part[:2048]), 1)


def _converted(file: Path, kind: str) -> str:
    return f"Save it as 'CSV UTF-8', or convert it: iconv -f {kind} -t utf-8 {file.name} > new{file.suffix}"


def _csv(file: Path) -> list[Row]:
    tabs = file.suffix.lower() == ".tsv"
    reader = csv.reader(io.StringIO(_text(file), newline=""), delimiter="\t" if tabs else ",", strict=True)
    found: list[Row] = []
    header: list[str] = []
    try:
        for number, cells in enumerate(reader, 1):
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [name.strip().lower() for name in cells]
                twice = [name for name in header if name and header.count(name) > 1]
                if twice:
                    raise ValueError(f"{file.name}: the column {twice[0]!r} is there twice. Rename one")
                continue
            if len(cells) > len(header):
                raise ValueError(
                    f"{file.name}, row {number}: {len(cells)} cells, but the header has {len(header)}. Put "
                    f'text that contains a {"tab" if tabs else "comma"} in double quotes: "like, this"'
                )
            if {cell.strip().lower() for cell in cells} <= {*header, ""}:
                raise ValueError(
                    f"{file.name}, row {number}: the header is there again, so two files were put behind "
                    "each other. Delete this row; if their columns differ, give both files, joined by a comma"
                )
            found.append(Row(f"{file.name}, row {number}", dict(zip(header, cells, strict=False))))
    except csv.Error as error:
        raise ValueError(
            f"{file.name}, line {reader.line_num}: not valid CSV ({error}). Put text with quotation marks in "
            "double quotes, and double each mark inside"
        ) from None
    return found


def _txt(file: Path) -> list[Row]:
    side = re.split(r"[^a-z]+", file.stem.lower())[-1]
    if side not in ("harmful", "harmless"):
        raise ValueError(
            f"{file.name}: a file of one prompt a line does not say which are harmful. Let the last word of "
            "its name say it, as in my_harmful.txt or harmless.txt; or give a .csv with a column harmful"
        )
    numbered = [(n, line.strip()) for n, line in enumerate(_text(file).split("\n"), 1)]
    return [Row(f"{file.name}, line {n}", {"prompt": line, "harmful": side}) for n, line in numbered if line]


def _objects(items: Iterable[tuple[str, Any]]) -> list[Row]:
    found = []
    for place, item in items:
        if not isinstance(item, dict):
            raise ValueError(f'{place}: expected an object such as {{"prompt": "...", "harmful": false}}')
        cells = {str(name).strip().lower(): value for name, value in item.items()}
        if len(cells) < len(item):
            raise ValueError(f"{place}: two names are the same but for case or spaces. Rename one")
        found.append(Row(place, cells))
    return found


def _jsonl(file: Path) -> list[Row]:
    items = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            try:
                items.append((f"{file.name}, line {number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{file.name}, line {number}: not valid JSON ({_why(error)}). Put one complete object on "
                    "each line"
                ) from None
    return _objects(items)


def _json(file: Path) -> list[Row]:
    text = _text(file)
    if not text.strip():
        return []
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise ValueError(
            f"{file.name}, line {line}: not valid JSON ({_why(error)}). If it has one object on each line, "
            "rename it to .jsonl"
        ) from None
    if not isinstance(whole, list):
        raise ValueError(f"{file.name}: expected a list of objects, [{{...}}, {{...}}]")
    return _objects((f"{file.name}, item {number}", item) for number, item in enumerate(whole, 1))


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return getattr(error, "msg", str(error))


def _parquet(file: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"reading {file.name} needs pyarrow: pip install pyarrow") from error
    try:
        items = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a parquet file ({error}). Delete it and load it again") from None
    return _objects((f"{file.name}, row {number}", item) for number, item in enumerate(items, 1))


_READERS = {".csv": _csv, ".tsv": _csv, ".txt": _txt, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
ENDINGS = tuple(_READERS)
