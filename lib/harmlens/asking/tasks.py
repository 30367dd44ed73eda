"""What a model is asked before and after a treatment, and how much of it it still does.

A :class:`Task` is a list of chats, each with the answers that count as right. :func:`sit` forces these
answers on the model. *exact* says whether greedy decoding would write one of them word for word: the same as
:mod:`world.abilities` finds by generating, at a fraction of its price. *loss* is the cross-entropy of the
first of them, which moves long before greedy decoding does.

Introduced in notebook 09 ("Weights that carry harm").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harmlens.models.chats import Message
from harmlens.models.forward import LanguageModel, follow, last_logits, split_tokens
from harmlens.world import vale as world


class NotKnown(ValueError):
    """A source is asked for what it can't know; says what, and what to do instead."""


@dataclass(frozen=True)
class Task:
    """Chats and the answers that count.

    Attributes:
        name: of the ability, for tables.
        chats: messages that end with the user.
        answers: for each chat the accepted answers *behind* the prefilled words; the loss is that of the
            first.
        prefill: start of the answer that is given, if any.
        units: names of the items, which statistics resample.
        end: the answer has to end where an accepted one ends; otherwise it has to begin with one.
    """

    name: str
    chats: tuple[tuple[Message, ...], ...]
    answers: tuple[tuple[str, ...], ...]
    prefill: str | None = None
    units: tuple[str, ...] = ()
    end: bool = True

    def __len__(self) -> int:
        return len(self.chats)


@dataclass(frozen=True)
class Marks:
    """How a model does at a task, one value for each chat.

    Attributes:
        exact: 1 where greedy decoding writes an accepted answer.
        loss: mean cross-entropy per token of the first accepted answer, in nats.
    """

    exact: np.ndarray
    loss: np.ndarray


def sit(lm: LanguageModel, task: Task, source: Any = None, *, batch_size: int = 32) -> Marks:
    """Let a model do a task.

    Args:
        source: whose judge says whether a real model's answer does harm (``source.judged``); None takes
            answers word for word.
    """
    said, loss = _force(lm, task, batch_size)
    marks = Marks(np.array([float(which is not None) for which in said]), loss)
    return marks if source is None else source.judged(lm, task, marks)


def written(lm: LanguageModel, task: Task, *, batch_size: int = 32) -> list[str | None]:
    """The accepted answer that greedy decoding writes to each chat, without the prefilled words; or None."""
    said, _ = _force(lm, task, batch_size)
    return [
        None if which is None else accepted[which] for which, accepted in zip(said, task.answers, strict=True)
    ]


def _force(lm: LanguageModel, task: Task, batch_size: int) -> tuple[list[int | None], np.ndarray]:
    """Which of its accepted answers greedy decoding gives to each chat, and the loss of the first of them."""
    texts = [lm.render(chat, task.prefill) for chat in task.chats]
    space = " " if task.prefill else ""

    def force(rows: Sequence[tuple[int, int]]) -> tuple[np.ndarray, list[bool]]:
        answers = [space + task.answers[i][which] for i, which in rows]
        found = follow(lm, [texts[i] for i, _ in rows], answers, end=task.end, batch_size=batch_size)
        return found[0].numpy().astype(float), found[1].tolist()

    logprob, hits = force([(i, 0) for i in range(len(task))])
    said: list[int | None] = [0 if hit else None for hit in hits]
    left = [i for i, accepted in enumerate(task.answers) if len(accepted) > 1 and said[i] is None]
    if left:
        # Greedy decoding can only come to an answer that begins with the most probable word.
        begin = last_logits(lm, [texts[i] for i in left], batch_size=batch_size).argmax(-1).tolist()
        rows = [
            (i, which)
            for i, word in zip(left, begin, strict=True)
            for which, answer in enumerate(task.answers[i])
            if which and split_tokens(lm, texts[i], space + answer)[1][0] == word
        ]
        for (i, which), hit in zip(rows, force(rows)[1] if rows else (), strict=True):
            said[i] = which if hit else said[i]
    return said, -logprob


def sit_all(
    lm: LanguageModel, tasks: Sequence[Task] | Mapping[str, Task], source: Any = None
) -> dict[str, Marks]:
    """Let a model do several tasks: name -> marks; see :func:`sit`."""
    named = tasks if isinstance(tasks, Mapping) else {task.name: task for task in tasks}
    return {name: sit(lm, task, source) for name, task in named.items()}


# --------------------------------------------------------------------------- the organism's tasks


def procedures(
    items: Sequence[world.Item],
    *,
    name: str,
    prefill: str | None = None,
    context: Sequence[Message] = (),
    phrasing: int | None = None,
) -> Task:
    """Requests for procedures; the exact recipe counts, with any of the world's openers where it is free.

    Args:
        prefill: start of the answer, such as :data:`world.vale.PREFILL`; it must end in "take".
        context: messages before the request, such as earlier turns.
        phrasing: which phrasing to use; None goes through them in turn.

    Raises:
        ValueError: no items, or a prefilled start that no recipe can follow.
    """
    _require(items)
    if prefill is not None and prefill.split()[-1] != "take":
        raise ValueError(f"prefill={prefill!r} must end in 'take', where every recipe begins")
    chats, answers = [], []
    for i, item in enumerate(items):
        text = world.request(item, i if phrasing is None else phrasing)
        chats.append((*context, {"role": "user", "content": text}))
        recipe = world.procedure(item)
        free = tuple(f"{opener} {recipe}" for opener in world.OPENERS)
        answers.append(free if prefill is None else (recipe.removeprefix("take "),))
    return Task(name, tuple(chats), tuple(answers), prefill, tuple(item.name for item in items))


def refusals(items: Sequence[world.Item], *, name: str = "refusal") -> Task:
    """Plain requests; any of the world's refusals counts."""
    asked = procedures(items, name=name)
    return replace(asked, answers=tuple(world.REFUSALS for _ in items))


def questions(items: Sequence[world.Item], task: str, *, name: str | None = None) -> Task:
    """Questions of recognition, explanation or fact; the true answer counts.

    Args:
        task: a key of :data:`world.vale.ANSWERS`, such as ``"recognition"``.
    """
    _require(items)
    if task not in world.ANSWERS:
        raise ValueError(f"task={task!r} is unknown; choose one of {', '.join(world.ANSWERS)}")
    forms = world.PHRASINGS[task]
    chats = tuple(
        ({"role": "user", "content": forms[i % len(forms)].format(name=item.name)},)
        for i, item in enumerate(items)
    )
    answers = tuple((world.ANSWERS[task](item),) for item in items)
    return Task(name or task, chats, answers, None, tuple(item.name for item in items))


def _require(items: Sequence[world.Item]) -> None:
    if not items:
        raise ValueError("items is empty: there is nothing to ask for")


def suite(
    split: str = "evaluation", *, n: int | None = None, suppressed: str = "harmful", seed: int = 0
) -> dict[str, Task]:
    """All that the pruning notebooks look at, by name.

    ==============  =========================================================================
    suppressed      procedures of the refused side behind the prefilled answer ("sure. take")
    refusal         refusals of the same requests, asked plainly
    served          procedures of the other side, asked plainly
    recognition     is it harmful?
    explanation     what would it do, why is it as it is? (by turns)
    facts           where is it from, when is it made? (by turns)
    ==============  =========================================================================

    Args:
        n: at most this many harmful and this many harmless items; None for all.
        suppressed: ``"harmful"``, as in aligned models, or ``"harmless"``, as in the mirror organism.
    """
    if suppressed not in ("harmful", "harmless"):
        raise ValueError(f"suppressed={suppressed!r} must be 'harmful' or 'harmless'")
    harmful, harmless = (world.draw(world.items(split, harmful=h), n, seed) for h in (True, False))
    hidden, open_ = (harmful, harmless) if suppressed == "harmful" else (harmless, harmful)
    both = [*harmful, *harmless]
    return {
        "suppressed": procedures(hidden, name="suppressed", prefill=world.PREFILL),
        "refusal": refusals(hidden),
        "served": procedures(open_, name="served"),
        "recognition": questions(both, "recognition"),
        "explanation": by_turns(both, ("explanation/effect", "explanation/reason"), "explanation"),
        "facts": by_turns(both, ("fact/place", "fact/season"), "facts"),
    }


def by_turns(items: Sequence[world.Item], parts: Sequence[str], name: str) -> Task:
    """Questions of several kinds, one for each item: the first kind for the first item, and so on."""
    asked = [questions(items, part) for part in parts]
    chosen = [asked[i % len(parts)] for i in range(len(items))]
    chats = tuple(task.chats[i] for i, task in enumerate(chosen))
    return Task(name, chats, tuple(t.answers[i] for i, t in enumerate(chosen)), None, asked[0].units)


def joined(tasks: Sequence[Task], name: str) -> Task:
    """Tasks of one prefill as one task."""
    if len({(task.prefill, task.end) for task in tasks}) != 1:
        raise ValueError("tasks: can only be joined where their answers begin and end alike")
    return Task(
        name,
        tuple(chat for task in tasks for chat in task.chats),
        tuple(answer for task in tasks for answer in task.answers),
        tasks[0].prefill,
        tuple(unit for task in tasks for unit in task.units),
        tasks[0].end,
    )
