"""Files of JSON lines that grow: written as things come, taken up again after an interruption, never mixed.

Beside a file ``x.jsonl`` lies ``x.jsonl.meta.json`` with the settings that its lines were made with.

Introduced in book/judging ("Judging answers").
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from harmlens.keep import paths, provenance
from harmlens.keep.paths import write_json


def outside(file: Path) -> Path:
    """The file as a whole path, if it lies outside the repository or in its build folder.

    Raises:
        ValueError: it lies elsewhere in the repository, from where it might be committed.
    """
    whole, root = file.expanduser().resolve(), paths.repo_root()
    if root is not None and whole.is_relative_to(root) and not whole.is_relative_to(paths.build_dir()):
        raise ValueError(
            f"file={file.name!r} lies inside the repository, where completions of models do not belong: they "
            "may be harmful, and would be published with it. Leave file= out, or give a path outside."
        )
    return whole


def lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; none if there is no file.

    Raises:
        ValueError: a line before the last that is no JSON; the message names it.
    """
    if not file.is_file():
        return []
    out = []
    rows = file.read_bytes().split(b"\n")
    for number, row in enumerate(rows[:-1], 1):  # what follows the last line break was not written to its end
        if not row.strip():
            continue
        try:
            out.append(json.loads(row))
        except ValueError as error:
            raise ValueError(
                f"line {number} of {file.name!r} is damaged ({error}). Remove that line; it is made anew"
            ) from error
    return out


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Within, no other process that asks for the same file goes on; one that holds it is waited for.

    A process may ask again for what it holds.

    Raises:
        PermissionError: there is no such file, and none can be written; the message names the remedy.
    """
    try:
        lock = FileLock(paths.writable(file.parent) / f".{file.name}.lock", is_singleton=True)
    except PermissionError:
        if not file.exists():
            raise
        yield  # nobody can change it here, and it may be all there
        return
    try:
        lock.acquire(blocking=False)
    except Timeout:
        warnings.warn(f"another process writes {file.name!r}; waiting until it has done so", stacklevel=3)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def append(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add lines, and see them onto the disk; a half-written last line makes way."""
    if not rows:
        return
    paths.writable(file.parent)
    with locked(file), open(file, "r+b" if file.exists() else "w+b") as out:
        if end := out.seek(0, os.SEEK_END):
            out.seek(end - 1)
            if out.read(1) != b"\n":
                out.seek(0)
                out.truncate(out.read().rfind(b"\n") + 1)
        out.seek(0, os.SEEK_END)
        out.write(_text(rows))
        out.flush()
        os.fsync(out.fileno())


def rewrite(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put other lines in the place of all, in one step."""
    paths.write_whole(file, lambda part: part.write_bytes(_text(rows)))


def _text(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def settle(file: Path, settings: Mapping[str, Any], begun: bool) -> None:
    """Write down with which settings a file is made; refuse a file that was made with others.

    Args:
        begun: the file holds lines already.

    Raises:
        ValueError: other settings, or lines without any; the message names the difference and the remedy.
    """
    beside = file.with_name(file.name + ".meta.json")
    settings = json.loads(json.dumps(provenance.portable(settings)))
    remedy = "Give another file, or remove it together with its .meta.json to begin anew."
    if begun:
        try:
            old = json.loads(beside.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"{file.name!r} has no readable {beside.name!r}, so its settings are unknown. {remedy}"
            ) from None
        differ = [
            f"{key} was {old.get(key)!r}, now {settings.get(key)!r}"
            for key in sorted({*old, *settings})
            if old.get(key) != settings.get(key)
        ]
        if differ:
            raise ValueError(f"{file.name!r} was made with other settings: {'; '.join(differ)}. {remedy}")
        return
    about = provenance.collect(
        str(settings.get("model") or settings.get("id") or ""), revision=settings.get("revision"),
        dtype=str(settings.get("dtype") or "none"), params=settings,
    )  # fmt: skip
    write_json(beside, {"settings": settings, "provenance": about})
