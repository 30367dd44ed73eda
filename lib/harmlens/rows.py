"""Rows of CSV, JSON, JSON Lines and parquet files, read with messages that name file, row and remedy.

Introduced in book/data_sets ("Data sets").
"""

from __future__ import annotations

import csv
import io
import json
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
    """The rows of a file, by its ending: .csv, .jsonl, .json (a list of objects) or .parquet.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another ending, text that is not UTF-8, a line that is not valid, or no row at all; says
            how to repair it.
        ImportError: pyarrow, which reads parquet, is missing.
    """
    _there(file)
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


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark in front
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text (byte {error.start}). Save it as 'CSV UTF-8', or convert it: "
            f"iconv -f latin1 -t utf-8 {file.name} > new{file.suffix}"
        ) from None


def _csv(file: Path) -> list[Row]:
    reader = csv.reader(io.StringIO(_text(file), newline=""), strict=True)
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
                    'text that contains a comma in double quotes: "like, this"'
                )
            found.append(Row(f"{file.name}, row {number}", dict(zip(header, cells, strict=False))))
    except csv.Error as error:
        raise ValueError(
            f"{file.name}, line {reader.line_num}: not valid CSV ({error}). Put text with quotation marks in "
            "double quotes, and double each mark inside"
        ) from None
    return found


def _objects(items: Iterable[tuple[str, Any]]) -> list[Row]:
    found = []
    for place, item in items:
        if not isinstance(item, dict):
            raise ValueError(f'{place}: expected an object such as {{"prompt": "...", "harmful": false}}')
        found.append(Row(place, {str(name).strip().lower(): value for name, value in item.items()}))
    return found


def _jsonl(file: Path) -> list[Row]:
    items = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            try:
                items.append((f"{file.name}, line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{file.name}, line {number}: not valid JSON ({error.msg}). Put one complete object on "
                    "each line"
                ) from None
    return _objects(items)


def _json(file: Path) -> list[Row]:
    text = _text(file)
    if not text.strip():
        return []
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file.name}, line {error.lineno}: not valid JSON ({error.msg}). If it has one object on each "
            "line, rename it to .jsonl"
        ) from None
    if not isinstance(whole, list):
        raise ValueError(f"{file.name}: expected a list of objects, [{{...}}, {{...}}]")
    return _objects((f"{file.name}, item {number}", item) for number, item in enumerate(whole, 1))


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


_READERS = {".csv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
ENDINGS = tuple(_READERS)
