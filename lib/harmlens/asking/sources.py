"""What models are asked: public data sets, loaded when needed, and files of the reader's own.

``data/sources.yaml`` is the registry of the public sets. Their texts are never part of the repository.

Introduced in book/data_sets ("Data sets").
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from harmlens.asking import layouts
from harmlens.asking import rows as tables
from harmlens.asking.layouts import Entry
from harmlens.keep.downloads import Remote, fetch, obtain
from harmlens.keep.files import cache_dir, data_dir, read_yaml

__all__ = ["Entry", "Source", "describe", "entries", "names", "plain"]

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
class Source:
    """A public set, as the registry describes it; ``data/sources.yaml`` explains the fields."""

    name: str
    title: str
    page: str
    licence: str
    host: str
    repository: str
    revision: str
    layout: str
    columns: dict[str, str]
    files: dict[str, str | None]
    use: str
    rows: int | None = None
    harmful: bool | None = None
    kind: str = ""
    pairs: str = ""
    kinds: dict[str, str] | None = None

    @property
    def pinned(self) -> str:
        """How much of the set is fixed: "checksum", "revision", "first use", "your copy" or "shipped"."""
        if self.host in ("folder", "package"):
            return {"folder": "your copy", "package": "shipped"}[self.host]
        if all(self.files.values()):
            return "checksum"
        return "revision" if re.fullmatch("[0-9a-f]{40}", self.revision) else "first use"


@cache
def _registry(file: Path) -> tuple[dict[str, Source], dict[str, list[str]]]:
    found = read_yaml(file)
    return {name: Source(name, **about) for name, about in found["sets"].items()}, found["together"]


def names() -> list[str]:
    """Short names of the public sets, and of sets that are loaded together."""
    sets, together = _registry(data_dir() / "sources.yaml")
    return sorted([*sets, *together])


def describe() -> list[dict[str, str]]:
    """One row for each public set: name, title, page, licence, columns, rows, revision, pinned, use.

    ``pinned`` says what is fixed: the file's "checksum"; the "revision", a commit, with the checksum taken at
    the first download; or nothing before the first download ("first use").
    """
    sets, _ = _registry(data_dir() / "sources.yaml")
    return [
        {
            "name": source.name,
            "title": source.title,
            "page": source.page,
            "licence": source.licence,
            "columns": ", ".join(dict.fromkeys(source.columns.values())) or "none (one prompt a line)",
            "rows": "" if source.rows is None else str(source.rows),
            "revision": source.revision,
            "pinned": source.pinned,
            "use": source.use,
        }
        for source in sets.values()
    ]


def entries(name: str, *, folder: Path | str | None = None) -> list[Entry]:
    """The requests of public sets and local files.

    Args:
        name: short name of a public set (:func:`names`), or path of a local .csv, .tsv, .jsonl, .json or
            .parquet file (``~`` is the home folder); or several of them, joined by commas. A local file has
            the columns `prompt` and `harmful` (1, true, yes, unsafe; or 0, false, no, safe) and, if wanted,
            `kind`, `pair`, `answer` (several joined by |) and `id`; :data:`COLUMNS` has other accepted
            names. A file with `question` and `answer`, but without `harmful`, holds factual questions:
            harmless, kind "fact". A .txt file has one prompt a line, and says in its name what they are
            (:func:`asking.rows.read`). A copy of a public set's own file, under any name, is read as that
            set.
        folder: where you keep files of public sets, instead of the cache. Nothing is downloaded then.

    Raises:
        ValueError: an unknown name (lists the names); a changed checksum (has both sums); a missing column
            (lists those found); a value of `harmful`, named by its row; an empty or damaged file; a request
            that is both harmful and harmless; a part of XSTest without `pair`; an id that is there twice.
            Each says what to do.
        FileNotFoundError: no such file or folder; for the sets of narrow advice, says how to get them.
        ConnectionError: the file is not in the cache and there is no network.
        PermissionError: the licence has to be accepted first; says where.
        ImportError: pyarrow (for TriviaQA) or huggingface_hub is missing.
    """
    sets, together = _registry(data_dir() / "sources.yaml")
    where = None if folder is None else Path(folder).expanduser()
    if where is not None and not where.is_dir():
        raise FileNotFoundError(
            f"folder={str(folder)!r} is no folder. Give the one with the files of the sets"
        )
    found: list[Entry] = []
    parts = [each for part in _parts(name) for each in together.get(part, [part])]
    for part in dict.fromkeys(parts):
        if part in sets:
            found += _public(sets[part], where)
        elif "/" in part or "\\" in part or Path(part).suffix.lower() in tables.ENDINGS:
            found += _local(Path(part).expanduser())
        else:
            raise ValueError(
                f"data={part!r} is unknown. Choose one of {', '.join(names())}, or give the path of a file "
                f"that ends in {', '.join(tables.ENDINGS)}"
            )
    _no_id_twice(found)
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


# ---------------------------------------------------------------------- public sets


def _public(source: Source, folder: Path | None) -> list[Entry]:
    found: list[Entry] = []
    count = 0
    for path, sha256 in source.files.items():
        file = _file(source, path, sha256, folder)
        lines = source.layout == "lines"
        table = tables.lines(file) if lines else tables.read(file)
        count += len(table)
        for column in dict.fromkeys(source.columns.values()):
            if column not in tables.columns(table):
                raise ValueError(
                    f"{source.name}: {file} has no column {column!r}; columns found: "
                    f"{', '.join(tables.columns(table))}. It is another version than the registry's: delete "
                    "it to "
                    "load it again, or load it as your own file"
                )
        kind = (source.kinds or {}).get(path, source.kind)
        found += layouts.LAYOUTS[source.layout](source, table, kind)
    if source.rows is not None and count != source.rows:
        raise ValueError(
            f"{source.name} has {count} rows instead of {source.rows}. The file is incomplete or another "
            "version than the registry's: delete it to load it again, or load it as your own file"
        )
    return found


def _file(source: Source, path: str, sha256: str | None, folder: Path | None) -> Path:
    if source.host == "package":
        return data_dir() / path
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
    # Looked up in this module at each call, so that tests can put another one in its place.
    return obtain(remote, sha256, fetch, folder)


# ---------------------------------------------------------------------- local files


def _set_of(file: Path) -> tuple[Source, str, list[tables.Row]] | None:
    """The public set that a file is a copy of, under any name, which of its files, and the rows; or None."""
    sets, _ = _registry(data_dir() / "sources.yaml")
    named = [(s, path) for s in sets.values() for path in s.files if s.host != "package"]
    for source, path in named:  # without a header, and so known by its name alone
        if source.layout == "lines" and Path(path).name == file.name and file.is_file():
            rows = tables.lines(file)
            if "harmful" not in rows[0].cells["prompt"].lower().split(","):
                return source, path, rows
    rows = tables.read(file)
    there, own = set(tables.columns(rows)), {*COLUMNS["harmful"], *COLUMNS["pair"]}
    found = []
    for source, path in named:
        used = set(source.columns.values())
        size = len(rows) == source.rows if source.rows else Path(path).name == file.name
        if used and used <= there and size and not own & (there - used):
            found.append((source, path))
    if len(found) > 1:  # the halves of a set
        whole = hashlib.sha256(file.read_bytes()).hexdigest()
        found = [(s, p) for s, p in found if s.files[p] == whole or Path(p).name == file.name] or found
    if len(found) > 1:
        sure = " or ".join(f"{Path(path).name} ({source.name})" for source, path in found)
        raise ValueError(f"{file.name} has the rows of a public set; let its name say which: {sure}")
    return (*found[0], rows) if found else None


def _local(file: Path) -> list[Entry]:
    if known := _set_of(file):
        source, path, rows = known
        return layouts.LAYOUTS[source.layout](source, rows, (source.kinds or {}).get(path, source.kind))
    rows = tables.read(file)
    there = tables.columns(rows)
    have = {field: next((a for a in aliases if a in there), None) for field, aliases in COLUMNS.items()}
    facts = (
        have["harmful"] is None and have["prompt"] == "question" and have["answers"] in ("answer", "answers")
    )
    for needed in ("prompt", "harmful"):
        if have[needed] is None and not facts:
            raise ValueError(_missing(file.name, needed, rows))
    found = []
    seen: dict[str, tuple[str, bool]] = {}
    for number, row in enumerate(rows, 1):
        cells = {field: row.cells.get(column) for field, column in have.items() if column}
        found.append(
            Entry(
                id=layouts.text(cells.get("id")) or f"{file.stem}-{number}",
                prompt=layouts.needed(row, have["prompt"]),
                harmful=False if facts else layouts.yes_or_no(row, have["harmful"]),
                kind=layouts.text(cells.get("kind")) or ("fact" if facts else ""),
                pair=layouts.text(cells.get("pair")),
                answers=layouts.several(cells.get("answers"), split=have["answers"] in ("answer", "answers")),
                source=file.name,
            )
        )
        place, side = seen.setdefault(plain(found[-1].prompt), (row.place, found[-1].harmful))
        if side != found[-1].harmful:
            raise ValueError(
                f"{place}, and {row.place.removeprefix(f'{file.name}, ')} are the same request, once harmful "
                "and once harmless. Delete one of them"
            )
    kinds = {entry.kind for entry in found}
    torn = [f"{a} and {b}" for a, b in layouts.CONTRASTS.items() if {a, b} <= kinds and not have["pair"]]
    if torn:
        raise ValueError(
            f"{file.name} holds a part of XSTest ({torn[0]}), whose contrasts must stay together. Give the "
            "whole file, or add a column 'pair' with the same value for a request and its contrast"
        )
    return found


def _missing(name: str, needed: str, rows: Sequence[tables.Row]) -> str:
    found, (_, *others) = tables.columns(rows), COLUMNS[needed]
    hint = ""
    if any(len(column) > 40 for column in found):
        hint = " The first row seems to be a request: put the names of the columns above it."
        found = [column[:40] for column in found]
    elif len(found) == 1 and any(mark in found[0] for mark in ";\t"):
        hint = " The columns seem to be separated by semicolons or tabs: save the file with commas."
    elif needed == "harmful":
        hint = " Add it, with 1 for requests that should be refused and 0 for others."
    also = f" (or {', '.join(others)})"
    return f"{name}: there is no column {needed!r}{also}. Columns found: {', '.join(found)}.{hint}"


def _no_id_twice(found: Sequence[Entry]) -> None:
    seen: dict[str, Any] = {}
    for entry in found:
        if entry.id in seen:
            raise ValueError(
                f"the id {entry.id!r} is there twice (in {seen[entry.id]} and {entry.source}). Make the "
                "values of the column 'id' unique, or leave the column out"
            )
        seen[entry.id] = entry.source
