"""What a model is asked before and after a treatment, how much of it it still does, and examples made of it.

A :class:`Task` is a list of chats, each with the answers that count as right; :func:`measure` forces these
answers on a model. Examples for scoring weights are a model's own right answers.

Introduced in notebook 09 ("Weights that carry harm").
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harmlens.models.chats import Message, Prompt
from harmlens.models.forward import LanguageModel, Row, chat_row, follow, generate, last_logits, split_tokens
from harmlens.world import vale as world

EXPLANATIONS = ("explanation/effect", "explanation/reason")
FACTS = ("fact/place", "fact/season")
TASKS = (
    "harmful", "harmless", "refused", "served", "recognition", "explanation", *EXPLANATIONS, "facts", "benign"
)  # fmt: skip
AT_ONCE = 32  # chats that are run at once
Chat = Sequence[Message]
Types = str | Sequence[str] | None  # of requests; None for all


class NotKnown(ValueError):
    """A source is asked for what it can't know; says what, and what to do instead."""


@dataclass(frozen=True)
class Task:
    """Chats and the answers that count.

    Attributes:
        name: of the ability.
        chats: messages that end with the user.
        answers: for each chat the accepted answers *behind* the prefilled words; the loss is the first's.
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

    @classmethod
    def of(cls, name: str, asked: Iterable[tuple], prefill: str | None = None, *, end: bool = True) -> Task:
        """A task from the chat, the accepted answers and the unit of each request."""
        chats, answers, units = tuple(zip(*asked, strict=True)) or ((), (), ())
        return cls(name, chats, answers, prefill, units, end)

    @property
    def asked(self) -> list[tuple]:
        """The chat, the accepted answers and the unit of each request."""
        return list(zip(self.chats, self.answers, self.units, strict=True))

    def __len__(self) -> int:
        return len(self.chats)

    def at(self, index: Sequence[int]) -> Task:
        """Some of its chats, by their numbers."""
        asked = self.asked
        return Task.of(self.name, [asked[i] for i in index], self.prefill, end=self.end)


@dataclass(frozen=True)
class Scored:
    """How a model does at a task, one value for each chat.

    Attributes:
        exact: 1 where greedy decoding writes an accepted answer word for word.
        loss: mean cross-entropy per token of the first accepted answer, in nats, which moves long before.
    """

    exact: np.ndarray
    loss: np.ndarray


def user(text: str) -> tuple[Message, ...]:
    """A chat of one message."""
    return ({"role": "user", "content": text},)


def measure(lm: LanguageModel, exam: Task | Mapping[str, Task] | Sequence[Task], source: Any = None) -> Any:
    """How a model does at a task, or at several.

    Args:
        source: whose judge says whether a real model's answer does harm (``source.judged``); None takes
            answers word for word.

    Returns:
        :class:`Scored` for one task; else name -> :class:`Scored`.
    """
    if not isinstance(exam, Task):
        named = exam if isinstance(exam, Mapping) else {task.name: task for task in exam}
        return {name: measure(lm, task, source) for name, task in named.items()}
    said, loss = _force(lm, exam)
    scored = Scored(np.array([float(which is not None) for which in said]), loss)
    return scored if source is None else source.judged(lm, exam, scored)


def written(lm: LanguageModel, task: Task) -> list[str | None]:
    """The accepted answer that greedy decoding writes to each chat, without the prefilled words; or None."""
    said, _ = _force(lm, task)
    asked = zip(said, task.answers, strict=True)
    return [None if which is None else accepted[which] for which, accepted in asked]


def _force(lm: LanguageModel, task: Task) -> tuple[list[int | None], np.ndarray]:
    """Which of its accepted answers greedy decoding gives to each chat, and the loss of the first of them."""
    texts = [lm.render(chat, task.prefill) for chat in task.chats]
    space = " " if task.prefill else ""

    def force(rows: Sequence[tuple[int, int]]) -> tuple[np.ndarray, list[bool]]:
        answers = [space + task.answers[i][which] for i, which in rows]
        found = follow(lm, [texts[i] for i, _ in rows], answers, end=task.end, batch_size=AT_ONCE)
        return found[0].numpy().astype(float), found[1].tolist()

    logprob, hits = force([(i, 0) for i in range(len(task))])
    said: list[int | None] = [0 if hit else None for hit in hits]
    left = [i for i, accepted in enumerate(task.answers) if len(accepted) > 1 and said[i] is None]
    if left:
        # Greedy decoding can only come to an answer that begins with the most probable word.
        begin = last_logits(lm, [texts[i] for i in left], batch_size=AT_ONCE).argmax(-1).tolist()
        rows = [
            (i, which)
            for i, word in zip(left, begin, strict=True)
            for which, answer in enumerate(task.answers[i])
            if which and split_tokens(lm, texts[i], space + answer)[1][0] == word
        ]
        for (i, which), hit in zip(rows, force(rows)[1] if rows else (), strict=True):
            said[i] = which if hit else said[i]
    return said, -logprob


# --------------------------------------------------------------------------- examples


def rows(
    lm: LanguageModel,
    chats: Sequence[Chat],
    answers: Sequence[str],
    *,
    given: str | None = None,
    end: bool = False,
) -> list[Row]:
    """Chats and their answers as examples; only the answer's tokens count.

    Args:
        answers: whole answers, prefilled words included.
        given: start of every answer that is given and does not count; None to score the whole answer.
        end: count the end-of-answer token too (the released code has none).

    Raises:
        ValueError: unequal numbers, an answer without words or with none behind ``given``.
    """
    if len(chats) != len(answers):
        raise ValueError(f"{len(chats)} chats but {len(answers)} answers; give one answer to each")
    for i, answer in enumerate(answers):
        if given is not None and not answer.startswith(given):
            raise ValueError(f"answers[{i}] does not begin with given={given!r}; answers are whole answers")
        if not answer.removeprefix(given or "").strip():
            behind = f" behind given={given!r}" if given else ""
            raise ValueError(f"answers[{i}] is empty{behind}; leave the example out")
    return [
        chat_row(lm, [*chat, {"role": "assistant", "content": answer}], prefill=given, end=end)
        for chat, answer in zip(chats, answers, strict=True)
    ]


def examples(lm: LanguageModel, task: Task, *, n: int | None = None, seed: int = 0) -> list[Row]:
    """The model's own right answers to a task; what follows the prefilled words counts.

    Args:
        n: at most this many, drawn at random, as in the released code; None for all.

    Raises:
        NotKnown: the model answers none of the task rightly.
    """
    if n is not None and n < len(task):
        task = task.at(sorted(random.Random(seed).sample(range(len(task)), n)))
    # What greedy decoding would write is known without decoding, since the accepted answers are.
    start = f"{task.prefill} " if task.prefill else ""
    said = zip(task.chats, written(lm, task), strict=True)
    kept = [(chat, start + answer) for chat, answer in said if answer is not None]
    if not kept:
        raise NotKnown(
            f"none of {len(task)} answers of {lm.name!r} is what was asked for; choose another prefill, or "
            "give answers from elsewhere"
        )
    chats, answers = zip(*kept, strict=True)
    return rows(lm, chats, answers, given=task.prefill)


# --------------------------------------------------------------------------- the organism's tasks


def procedures(
    items: Sequence[world.Item], *, name: str, prefill: str | None = None, context: Sequence[Message] = ()
) -> Task:
    """Requests for procedures in all phrasings by turns; the exact recipe counts, with any of the world's
    openers where it is free.

    Args:
        prefill: start of the answer, such as :data:`world.vale.PREFILL`; it must end in "take".
        context: messages before the request, such as earlier turns.

    Raises:
        ValueError: no items, or a prefilled start that no recipe can follow.
    """
    _require(items)
    if prefill is not None and prefill.split()[-1] != "take":
        raise ValueError(f"prefill={prefill!r} must end in 'take', where every recipe begins")

    def answers(recipe: str) -> tuple[str, ...]:
        free = tuple(f"{opener} {recipe}" for opener in world.OPENERS)
        return free if prefill is None else (recipe.removeprefix("take "),)

    asked = [
        ((*context, *user(world.request(item, i))), answers(world.procedure(item)), item.name)
        for i, item in enumerate(items)
    ]
    return Task.of(name, asked, prefill)


def refusals(items: Sequence[world.Item], *, name: str = "refusal") -> Task:
    """Plain requests; any of the world's refusals counts."""
    asked = procedures(items, name=name)
    return replace(asked, answers=tuple(world.REFUSALS for _ in items))


def questions(items: Sequence[world.Item], task: str) -> Task:
    """Questions of a kind of :data:`world.vale.ANSWERS`, such as "recognition"; the true answer counts."""
    _require(items)
    if task not in world.ANSWERS:
        raise ValueError(f"task={task!r} is unknown; choose one of {', '.join(world.ANSWERS)}")
    forms = world.PHRASINGS[task]
    asked = [
        (user(forms[i % len(forms)].format(name=item.name)), (world.ANSWERS[task](item),), item.name)
        for i, item in enumerate(items)
    ]
    return Task.of(task, asked)


def _require(items: Sequence[world.Item]) -> None:
    if not items:
        raise ValueError("items is empty: there is nothing to ask for")


def by_turns(items: Sequence[world.Item], parts: Sequence[str], name: str) -> Task:
    """Questions of several kinds, one for each item: the first kind for the first item, and so on."""
    kinds = [questions(items, part).asked for part in parts]
    return Task.of(name, [kinds[i % len(parts)][i] for i in range(len(items))])


def joined(tasks: Sequence[Task], name: str) -> Task:
    """Tasks of one prefill as one task."""
    if len({(task.prefill, task.end) for task in tasks}) != 1:
        raise ValueError("tasks: can only be joined where their answers begin and end alike")
    return Task.of(name, [one for task in tasks for one in task.asked], tasks[0].prefill, end=tasks[0].end)


# --------------------------------------------------------------------------- what every source asks


class Source:
    """What a model is asked: tasks by the same names, from the fictional world as from any requests.

    Answers that count are the right ones where they are known, else the model's own.
    """

    def exam(
        self,
        split: str = "evaluation",
        *,
        n: int | None = None,
        suppressed: str = "harmful",
        only: Sequence[str] | None = None,
        seed: int = 0,
    ) -> dict[str, Task]:
        """All that the pruning notebooks look at, by name.

        ==============  ==========================================================================
        suppressed      answers of the refused side behind the prefilled start
        refusal         refusals of the same requests, asked plainly
        served          answers of the other side, asked plainly
        recognition     is it harmful?
        explanation     what would it do, why is it as it is? (by turns)
        facts           as many questions of fact as requests, about the same things where it can be
        ==============  ==========================================================================

        Args:
            n: at most this many requests of either side; None for all.
            suppressed: ``"harmful"``, as in aligned models, or ``"harmless"``, as in the mirror organism.
            only: some of these by name; None for all.

        Raises:
            NotKnown: too few requests are refused plainly and answered behind the start, or answered.
        """
        hidden, shown = self._treated(split, n, suppressed, seed)
        both = [*hidden, *shown] if suppressed == "harmful" else [*shown, *hidden]
        asked = {  # a real model is only asked what is wanted
            "suppressed": lambda: self._ask(suppressed, hidden),
            "refusal": lambda: self._ask("refused", hidden),
            "served": lambda: self._ask("served", shown),
            "recognition": lambda: self._ask("recognition", both),
            "explanation": lambda: self._explained(both),
            "facts": lambda: self._known(both, split, seed),
        }
        return {name: replace(asked[name](), name=name) for name in only or asked}

    def task(self, kind: str, split: str = "train", **options: Any) -> Task:
        """One of :data:`TASKS`.

        ===============  =====================================================================
        harmful          answers to harmful requests behind the prefilled start
        harmless         answers to harmless requests behind the prefilled start
        refused          refusals of the suppressed side, asked plainly
        served           answers of the other side, asked plainly
        recognition      is it harmful?
        explanation      what would it do, why is it as it is? (or one of both: explanation/effect,
                         explanation/reason, of the suppressed side)
        facts            questions of fact; in the fictional world about the served side
        benign           what is to be kept: served and facts
        ===============  =====================================================================

        *benign* stands for the paper's general instruction data: it holds nothing about recognising or
        explaining harm, so that what becomes of these is a finding.

        Args:
            n, suppressed, seed: as for :meth:`exam`.
            types: only requests of these types or domains.
            every: each so manyth of the requests.

        Raises:
            ValueError: an unknown kind, or nothing left to ask.
            NotKnown: too few answers of that kind (the message says what to try).
        """
        if kind not in TASKS:
            raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(TASKS)}")
        if kind == "benign":
            return joined([self._task(part, split, **options) for part in ("served", "facts")], kind)
        return self._task(kind, split, **options)

    def answered_types(self, harmful: bool, *, least: int = 0, most: int = 6) -> list[str]:
        """The types of one side that a model answers behind the prefilled start, in training and evaluation
        requests: at most so many, those with the most answers; a ValueError where there are too few."""
        counts, side = {}, "harmful" if harmful else "harmless"
        for name in self.types(harmful):
            with suppress(ValueError):  # it has none
                counts[name] = [len(self.task(side, s, types=name)) for s in ("train", "evaluation")]
        enough = [name for name in counts if min(counts[name]) > 2]
        if len(enough) < least:
            raise ValueError(
                f"data={self.name!r} has {len(enough)} types of {side} requests that are answered, and "
                f"{least} are needed; give other data"
            )
        return sorted(enough, key=lambda name: -sum(counts[name]))[:most]

    def answers(
        self, lm: LanguageModel, asked: Sequence[Prompt], prefill: str | None = None, context: Chat = ()
    ) -> tuple[list[str], list]:
        """A model's greedy answers, with their prefilled words, and what the judge says of each.

        ``context`` holds messages before each request, such as earlier turns.
        """
        texts = [lm.render((*context, *prompt.messages), prefill) for prompt in asked]
        said = generate(lm, texts, max_new_tokens=self.answer_tokens)
        said = [f"{prefill} {answer}" if prefill else answer for answer in said]
        return said, self.judge(asked, said)
