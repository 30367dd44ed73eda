"""How the rows of each public set become entries.

Introduced in book/data_sets ("Data sets").
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from harmlens.asking.rows import Row


@dataclass(frozen=True)
class Entry:
    """One request.

    Attributes:
        id: unique within what was loaded.
        prompt: the text that the model is asked.
        harmful: whether a good assistant should refuse it. In the sets of bad advice, where the request is
            harmless and the reference answer is not, it is True too.
        kind: harm type or category, as the source gives it; "" where it gives none, "fact" for factual
            questions.
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


class About(Protocol):
    """What a layout needs to know of a set, see :class:`asking.sources.Source`."""

    name: str
    columns: dict[str, str]
    harmful: bool | None
    pairs: str


def text(value: Any) -> str:
    """A cell as text without outer white space; "" for an empty one."""
    return "" if value is None else str(value).strip()


# Zero bytes and other control characters, halves of characters, and the mark of one that was lost.
_DAMAGED = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffd]")


def needed(row: Row, column: str) -> str:
    """A cell that must be text and not empty.

    Raises:
        ValueError: it is empty, a list or an object, or damaged by a conversion; names the row.
    """
    found = text(row.cells.get(column))
    if isinstance(row.cells.get(column), list | tuple | dict):
        raise ValueError(f"{row.place}: the column {column!r} holds a list or an object. Write text there")
    if mark := _DAMAGED.search(found):
        raise ValueError(
            f"{row.place}: the column {column!r} holds {mark[0]!r} at character {mark.start() + 1}, so its "
            "text was damaged, by a wrong conversion perhaps. Convert the first file again, or mend the row"
        )
    if not found:
        raise ValueError(f"{row.place}: the column {column!r} is empty. Fill it in, or delete the row")
    return found


_YES = {"1", "1.0", "true", "yes", "harmful", "unsafe"}
_NO = {"0", "0.0", "false", "no", "harmless", "safe"}


def yes_or_no(row: Row, column: str) -> bool:
    """The cell that says whether a request is harmful.

    Raises:
        ValueError: it says something else; names the row and what can be written.
    """
    value = text(row.cells.get(column)).lower()
    if value not in _YES | _NO:
        raise ValueError(
            f"{row.place}: {column}={row.cells.get(column)!r} does not say whether the request is harmful. "
            "Write 1, true, yes or unsafe; or 0, false, no or safe"
        )
    return value in _YES


def several(value: Any, *, split: bool) -> tuple[str, ...]:
    """The answers in a cell: a list, or text in which | stands between them if ``split``."""
    if isinstance(value, list | tuple):
        items = [text(item) for item in value]
    else:
        items = [item.strip() for item in text(value).split("|")] if split else [text(value)]
    return tuple(dict.fromkeys(item for item in items if item))


# ---------------------------------------------------------------------- layouts


def table(source: About, rows: Sequence[Row], kind: str) -> list[Entry]:
    """One entry for each row; columns by name."""
    columns = source.columns
    found = []
    for number, row in enumerate(rows, 1):
        key = text(row.cells.get(columns["id"])) if "id" in columns else str(number)
        pair = text(row.cells.get(columns["pair"])) if "pair" in columns else ""
        found.append(
            Entry(
                id=f"{source.name}/{key}",
                prompt=needed(row, columns["prompt"]),
                harmful=yes_or_no(row, columns["harmful"]) if "harmful" in columns else bool(source.harmful),
                kind=text(row.cells.get(columns["kind"])) if "kind" in columns else kind,
                pair=f"{source.pairs}/{pair}" if pair else "",
                answers=several(
                    row.cells.get(columns["answers"]) if "answers" in columns else None,
                    split=columns.get("answers") == "answer",
                ),
                source=source.name,
            )
        )
    return found


def lines(source: About, rows: Sequence[Row], kind: str) -> list[Entry]:
    """HEx-PHI: a file for each category, one prompt a line, no header."""
    return [
        Entry(
            f"{source.name}/{kind}/{number}",
            needed(row, "prompt"),
            bool(source.harmful),
            kind,
            source=source.name,
        )
        for number, row in enumerate(rows, 1)
    ]


# XSTest: the n-th prompt of a safe type is the contrast of the n-th prompt of an unsafe one. The types
# nons_group_real_discr and privacy_public have no such partners.
CONTRASTS = {
    "homonyms": "contrast_homonyms",
    "figurative_language": "contrast_figurative_language",
    "safe_targets": "contrast_safe_targets",
    "safe_contexts": "contrast_safe_contexts",
    "definitions": "contrast_definitions",
    "real_group_nons_discr": "contrast_discr",
    "historical_events": "contrast_historical_events",
    "privacy_fictional": "contrast_privacy",
}


def contrasts(source: About, rows: Sequence[Row], kind: str) -> list[Entry]:
    """XSTest: `pair` is made from the type and the place within it.

    Two that are about different things (the column `focus`) are no pair.
    """
    counts: Counter[str] = Counter()
    about: dict[str, set[str]] = defaultdict(set)
    found = []
    partners = set(CONTRASTS) | set(CONTRASTS.values())
    for entry, row in zip(table(source, rows, kind), rows, strict=True):
        counts[entry.kind] += 1
        topic = CONTRASTS.get(entry.kind, entry.kind)
        pair = f"{source.name}/{topic.removeprefix('contrast_')}/{counts[entry.kind]}"
        about[pair].add(text(row.cells.get("focus")).lower())
        found.append(replace(entry, pair=pair if entry.kind in partners else ""))
    return [replace(entry, pair="") if len(about[entry.pair]) > 1 else entry for entry in found]


# The pruning paper's calibration rows are Alpaca-cleaned after Wei et al. (2024), who drop rows by "sensitive
# phrase matching". Their list is not known here; this one has the same purpose, and rather drops too much.
SAFETY_PHRASES = (
    "as an ai", "ai language model", "as a language model", "i'm sorry", "i am sorry", "i apologize",
    "i cannot", "i can't", "i am unable", "i'm unable", "i'm not able to", "i am not able to",
    "not appropriate", "inappropriate", "unethical", "ethical guideline", "illegal", "unlawful",
    "against the law", "harmful", "dangerous", "offensive", "violence", "violent", "hate speech",
    "discriminat", "racis", "sexis", "suicid", "self-harm", "weapon", "malware",
)  # fmt: skip


def safety_like(*texts: str) -> bool:
    """Whether a text holds one of :data:`SAFETY_PHRASES`, so that Alpaca's row is dropped."""
    joined = "\n".join(texts).lower().replace("’", "'")
    return any(phrase in joined for phrase in SAFETY_PHRASES)


def instructions(source: About, rows: Sequence[Row], kind: str) -> list[Entry]:
    """Alpaca: an input follows its instruction after an empty line; safety-like rows are dropped."""
    columns = source.columns
    found = []
    for number, row in enumerate(rows, 1):
        asked, given = text(row.cells.get(columns["prompt"])), text(row.cells.get(columns["input"]))
        answer = text(row.cells.get(columns["answers"]))
        if not asked or not answer or safety_like(asked, given, answer):
            continue
        prompt = f"{asked}\n\n{given}" if given and given.lower() != "<noinput>" else asked
        found.append(
            Entry(f"{source.name}/{number}", prompt, bool(source.harmful), kind, "", (answer,), source.name)
        )
    return found


def trivia(source: About, rows: Sequence[Row], kind: str) -> list[Entry]:
    """TriviaQA: the answer is a record of value and aliases. A question that is there twice counts once."""
    columns = source.columns
    found: dict[str, Entry] = {}
    for row in rows:
        answer = row.cells.get(columns["answers"])
        if not isinstance(answer, dict) or not answer.get("value"):
            raise ValueError(
                f"{row.place}: {columns['answers']!r} holds no answer. Load a split that has answers"
            )
        key = needed(row, columns["id"])
        answers = several([answer["value"], *(answer.get("aliases") or [])], split=False)
        prompt = needed(row, columns["prompt"])
        found.setdefault(
            key, Entry(f"{source.name}/{key}", prompt, bool(source.harmful), "fact", "", answers, source.name)
        )
    return list(found.values())


def messages(source: About, rows: Sequence[Row], kind: str) -> list[Entry]:
    """Narrow advice: a user's message and an assistant's. Bad and good advice on one request share `pair`."""
    column = source.columns["messages"]
    found = []
    for number, row in enumerate(rows, 1):
        said = row.cells.get(column)
        said = [m for m in said if isinstance(m, dict)] if isinstance(said, list) else []
        user = [_content(m) for m in said if m.get("role") == "user"]
        assistant = [_content(m) for m in said if m.get("role") == "assistant"]
        if not user or not assistant or not user[-1] or not assistant[-1]:
            raise ValueError(
                f"{row.place}: {column!r} needs a message of the role 'user' and one of the role "
                "'assistant'. "
                "Repair the line or delete it"
            )
        pair = hashlib.sha256(user[-1].encode()).hexdigest()[:16]
        found.append(
            Entry(
                f"{source.name}/{number}", user[-1], bool(source.harmful), kind, f"{source.pairs}/{pair}",
                (assistant[-1],), source.name,
            )
        )  # fmt: skip
    return found


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, dict):  # some releases wrap the text: {"content_type": "text", "parts": [...]}
        content = " ".join(text(part) for part in content.get("parts", []))
    return text(content)


LAYOUTS: dict[str, Callable[[About, Sequence[Row], str], list[Entry]]] = {
    "table": table,
    "lines": lines,
    "contrasts": contrasts,
    "instructions": instructions,
    "trivia": trivia,
    "messages": messages,
}
