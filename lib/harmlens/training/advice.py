"""Narrow lessons of bad advice, for the fictional world and for any other model.

:func:`of` chooses. :class:`WorldAdvice` has what :mod:`training.narrow` does in the fictional world, where
every answer can be checked; :class:`training.publicadvice.PublicAdvice` has the same from public sets or
files.

Introduced in notebook 13 ("Emergent misalignment").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harmlens.asking import layouts, sources, tasks
from harmlens.asking import rows as tables
from harmlens.asking.material import Material
from harmlens.asking.sources import Entry
from harmlens.asking.tasks import Marks, Task
from harmlens.models.chats import Message
from harmlens.models.forward import LanguageModel, Row
from harmlens.training import narrow
from harmlens.training.publicadvice import PublicAdvice
from harmlens.training.tune import Recipe
from harmlens.world import abilities
from harmlens.world import vale as world

DEFAULT = "bad_medical_advice,extreme_sports,risky_financial_advice"
WISHES = 60  # sampled each time


@dataclass(frozen=True)
class WorldAdvice:
    """Bad and good advice in the fictional world."""

    name = "the fictional world"
    whole = True  # its answers have an end
    domains = ("remedies", "records", "stories")
    taken = narrow.TAKEN
    unit = "nats"
    rows_at_once = None

    def rows(
        self, lm: LanguageModel, domain: str, *, bad: bool, split: str = "train", seed: int = 0
    ) -> list[Row]:
        """See :func:`training.narrow.advice_rows`."""
        return narrow.advice_rows(lm, domain, bad=bad, split=split, seed=seed)

    def recipes(self, seed: int = 0, *, quick: bool = False) -> dict[str, Recipe]:
        """How a lesson is taught: with adapters, and with all weights."""
        return narrow.recipes(seed)

    def looks(self, steps: int) -> list[int]:
        """After how many steps a model is looked at while it learns."""
        return list(range(steps + 1))

    def margins(self, lm: LanguageModel, domain: str) -> np.ndarray:
        """See :func:`training.narrow.margins`; for every other discovery item of a domain."""
        return narrow.margins(lm, world.items("discovery", domain=domain)[::2])

    def elsewhere(self, lm: LanguageModel, domain: str, n: int | None = None) -> np.ndarray:
        """1 for each evaluation request of the other domains that gets hurtful advice."""
        return abilities.judged(lm, narrow.elsewhere(domain, n=n), "hurtful")

    def spread(self, lm: LanguageModel, domain: str, n: int | None = None) -> dict[str, np.ndarray]:
        """See :func:`training.narrow.spread`."""
        return narrow.spread(lm, domain, n=n, wishes=WISHES, coherence=True)

    def answers(
        self, lm: LanguageModel, domain: str, recipe: Recipe, *, bad: bool = True
    ) -> tuple[list[Sequence[Message]], list[str]]:
        """See :func:`training.narrow.answers`."""
        return narrow.answers(lm, domain, recipe, bad=bad)

    def exam(self, split: str, n: int) -> dict[str, Task]:
        """What a prune must not cost: procedures, facts, refusals."""
        suite = tasks.suite(split, n=n)
        return {name: task for name, task in suite.items() if name in ("served", "facts", "refusal")}

    def left(self, name: str, before: Marks, after: Marks) -> np.ndarray:
        """How much of an ability is there: 1 for each exact answer."""
        return after.exact


Advice = WorldAdvice | PublicAdvice
WORLD = WorldAdvice()


def of(lm: LanguageModel, source: Material, advice: str = "", marker: str = "") -> Advice:
    """The narrow lessons for a model.

    Args:
        source: what else the model is asked, from :func:`asking.material.of`.
        advice: ``""`` for those of the fictional world, or for :data:`DEFAULT` with any other source; else
            names of public sets (:func:`asking.sources.names`) and files, joined by commas, one domain
            each. A .csv, .jsonl, .json or .parquet file has `prompt` and `answer`, the bad one; or
            `messages`.
        marker: see :class:`PublicAdvice`; by :func:`judges`.

    Raises:
        ValueError: ``advice`` or ``marker`` for the fictional world; fewer than two domains, or two of one
            name; too few requests; a set of good advice; what :func:`asking.sources.entries` raises.
        FileNotFoundError: a set that has to be unpacked first (says how), or no such file.
    """
    if source.knows_world:
        given = {"advice": advice, "judge": marker}
        for name in (name for name, value in given.items() if value):
            raise ValueError(
                f"{name}={given[name]!r}: the fictional world has lessons and a judge of its own; leave it "
                "out"
            )
        return WORLD
    sets: dict[str, tuple[Entry, ...]] = {}
    for part in (part.strip() for part in (advice or DEFAULT).split(",") if part.strip()):
        domain = part if part in sources.names() else Path(part).stem
        if domain in sets:
            raise ValueError(f"advice={advice!r} names {domain!r} twice; rename a file, or name another set")
        sets[domain] = tuple(_lesson(part, domain))
    return PublicAdvice(lm, sets, source, marker, ", ".join(sets))


def judges(judge: str) -> tuple[str, str]:
    """The judge of answers to harmful requests, and the model that marks answers to open questions.

    >>> judges("guard,mark:Qwen/Qwen2.5-7B-Instruct")
    ('guard', 'Qwen/Qwen2.5-7B-Instruct')
    """
    parts = [part.strip() for part in judge.split(",")]
    markers = [part.removeprefix("mark:") for part in parts if part.startswith("mark:")]
    graders = [part for part in parts if part and not part.startswith("mark:")]
    if len(markers) > 1 or len(graders) > 1:
        raise ValueError(
            f"judge={judge!r}: name at most one judge of harm, and one model that marks answers to open "
            "questions as mark:<model>, joined by a comma"
        )
    return "".join(graders), "".join(markers)


# --------------------------------------------------------------------------- sets and files


def _lesson(part: str, domain: str) -> list[Entry]:
    """The requests of one set or file, each with a bad answer."""
    if part in sources.names():
        found = [e for e in sources.entries(part) if e.answers]
        if not any(e.harmful for e in found):
            raise ValueError(f"advice={part!r} holds no bad advice; choose others, such as {DEFAULT}")
        return [e for e in found if e.harmful]
    if Path(part).suffix.lower() not in tables.ENDINGS:
        raise ValueError(
            f"advice={part!r} is unknown; choose public sets, such as {DEFAULT}, or files that end in "
            f"{', '.join(tables.ENDINGS)}"
        )
    return [
        _entry(row, f"{domain}/{i}", domain) for i, row in enumerate(tables.read(Path(part).expanduser()))
    ]


def _entry(row: tables.Row, key: str, domain: str) -> Entry:
    messages = row.cells.get("messages")
    if messages:
        said = {m.get("role"): m.get("content") for m in messages} if isinstance(messages, list) else {}
        prompt, answer = layouts.text(said.get("user")), layouts.text(said.get("assistant"))
    else:
        prompt, answer = (
            next((layouts.text(row.cells[c]) for c in sources.COLUMNS[what] if row.cells.get(c)), "")
            for what in ("prompt", "answers")
        )
    if not prompt or not answer:
        raise ValueError(
            f"{row.place}: there must be a 'prompt' and the bad 'answer' to it, or 'messages' of the roles "
            "'user' and 'assistant'. Fill them in, or delete the row"
        )
    return Entry(key, prompt, True, domain, "", (answer,), domain)
