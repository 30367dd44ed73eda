"""Files of JSON lines that grow: written as things come, taken up again after an interruption, never mixed.

Beside a file ``x.jsonl`` lies ``x.jsonl.meta.json`` with the settings that its lines were made with.

Introduced in book/judging ("Judging answers").
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harmlens import paths, provenance
from harmlens.results import write_json


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


def append(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add lines, and see them onto the disk; a half-written last line makes way."""
    if not rows:
        return
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "r+b" if file.exists() else "w+b") as out:
        content = out.read()
        out.seek(content.rfind(b"\n") + 1)
        out.truncate()
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


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
