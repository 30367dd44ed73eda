"""What a model is asked before and after a treatment, how much of it it still does, and examples made of it.

A :class:`Task` is a list of chats, each with the answers that count as right; :func:`measure` forces these
answers on a model. Examples for scoring weights are a model's own right answers, in its chat template or
*raw*, the released code's format: prompt, a newline, answer, without markup.

Introduced in notebook 09 ("Weights that carry harm").
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harmlens.models.chats import Message, tokens
from harmlens.models.forward import (
    LanguageModel,
    Row,
    chat_row,
    follow,
    generate,
    last_logits,
    split_tokens,
)
from harmlens.world import vale as world

STYLES = ("chat", "raw")
Chat = Sequence[Message]


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

    def at(self, index: Sequence[int]) -> Task:
        """Some of its chats, by their numbers."""
        chats, answers, units = (
            tuple(each[i] for i in index) if each else () for each in (self.chats, self.answers, self.units)
        )
        return replace(self, chats=chats, answers=answers, units=units)


@dataclass(frozen=True)
class Scored:
    """How a model does at a task, one value for each chat.

    Attributes:
        exact: 1 where greedy decoding writes an accepted answer word for word.
        loss: mean cross-entropy per token of the first accepted answer, in nats, which moves long before.
    """

    exact: np.ndarray
    loss: np.ndarray


def measure(
    lm: LanguageModel,
    exam: Task | Mapping[str, Task] | Sequence[Task],
    source: Any = None,
    *,
    batch_size: int = 32,
) -> Any:
    """How a model does at a task, or at several.

    Args:
        exam: a task, named tasks, or a list of them.
        source: whose judge says whether a real model's answer does harm (``source.judged``); None takes
            answers word for word.

    Returns:
        :class:`Scored` for one task; else name -> :class:`Scored`.
    """
    if not isinstance(exam, Task):
        named = exam if isinstance(exam, Mapping) else {task.name: task for task in exam}
        return {name: measure(lm, task, source, batch_size=batch_size) for name, task in named.items()}
    said, loss = _force(lm, exam, batch_size)
    scored = Scored(np.array([float(which is not None) for which in said]), loss)
    return scored if source is None else source.judged(lm, exam, scored)


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


# --------------------------------------------------------------------------- examples


def rows(
    lm: LanguageModel,
    chats: Sequence[Chat],
    answers: Sequence[str],
    *,
    style: str = "chat",
    given: str | None = None,
    end: bool = False,
) -> list[Row]:
    """Chats and their answers as examples; only the answer's tokens count.

    Args:
        answers: whole answers, prefilled words included.
        style: ``"chat"`` or ``"raw"``.
        given: start of every answer that is given and does not count; None to score the whole answer.
        end: count the end-of-answer token too (chat only; the released code has none).

    Raises:
        ValueError: an unknown style, unequal numbers, an answer without words or with none behind ``given``.
    """
    if style not in STYLES:
        raise ValueError(f"style={style!r} is unknown; choose one of {', '.join(STYLES)}")
    if len(chats) != len(answers):
        raise ValueError(f"{len(chats)} chats but {len(answers)} answers; give one answer to each")
    for i, answer in enumerate(answers):
        if given is not None and not answer.startswith(given):
            raise ValueError(f"answers[{i}] does not begin with given={given!r}; answers are whole answers")
        if not answer.removeprefix(given or "").strip():
            behind = f" behind given={given!r}" if given else ""
            raise ValueError(f"answers[{i}] is empty{behind}; leave the example out")
    if style == "chat":
        return [
            chat_row(lm, [*chat, {"role": "assistant", "content": answer}], prefill=given, end=end)
            for chat, answer in zip(chats, answers, strict=True)
        ]
    out = []
    for chat, answer in zip(chats, answers, strict=True):
        head = tokens(lm.tokenizer, "\n".join(message["content"] for message in chat) + "\n")
        whole = tokens(lm.tokenizer, answer)
        known = 0 if given is None else len(tokens(lm.tokenizer, given))
        out.append(Row(head + whole, [False] * (len(head) + known) + [True] * (len(whole) - known)))
    return out


def own_answers(
    lm: LanguageModel,
    chats: Sequence[Chat],
    *,
    prefill: str | None = None,
    max_new_tokens: int = 48,
    keep: Callable[[int, str], bool] = lambda i, answer: True,
) -> tuple[list[Chat], list[str]]:
    """What the model itself answers, greedily, behind a prefilled start; with the chats that are left.

    Args:
        keep: whether an answer, with the number of its chat, is what was asked for: no refusal, and judged
            to be what the example stands for. Where nothing follows the start, it is not asked.

    Raises:
        ValueError: nothing is left.
    """
    texts = [lm.render(chat, prefill) for chat in chats]
    answers = generate(lm, texts, max_new_tokens=max_new_tokens)
    said = [bool(answer.strip()) for answer in answers]
    answers = [f"{prefill} {answer}" if prefill else answer for answer in answers]
    left = [i for i, answer in enumerate(answers) if said[i] and keep(i, answer)]
    if not left:
        raise ValueError(
            f"none of {len(chats)} answers of {lm.name!r} is what was asked for; choose another prefill, or "
            "give answers from elsewhere"
        )
    return [chats[i] for i in left], [answers[i] for i in left]


def examples(
    lm: LanguageModel,
    task: Task,
    *,
    n: int | None = None,
    seed: int = 0,
    style: str = "chat",
    whole: bool = False,
) -> list[Row]:
    """Examples from a task: the model's own right answers.

    Args:
        n: at most this many, drawn at random, as in the released code; None for all.
        whole: score the prefilled words too and not only what follows them.

    Raises:
        ValueError: the model answers none of the task rightly.
    """
    chosen = list(range(len(task)))
    if n is not None and n < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, n))
    picked = task.at(chosen)
    # What greedy decoding would write is known without decoding, since the accepted answers are.
    said = written(lm, picked)
    start = f"{task.prefill} " if task.prefill else ""
    kept = [(c, start + answer) for c, answer in zip(picked.chats, said, strict=True) if answer is not None]
    if not kept:
        raise ValueError(
            f"none of {len(picked)} answers of {lm.name!r} is what was asked for; choose another prefill, or "
            "give answers from elsewhere"
        )
    chats, answers = zip(*kept, strict=True)
    return rows(lm, chats, answers, style=style, given=None if whole else task.prefill)


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


def exam(
    split: str = "evaluation", *, n: int | None = None, suppressed: str = "harmful", seed: int = 0
) -> dict[str, Task]:
    """All that the pruning notebooks look at in the fictional world, by name.

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
    hidden, shown, both = _sides(split, n, suppressed, seed)
    return {
        "suppressed": procedures(hidden, name="suppressed", prefill=world.PREFILL),
        "refusal": refusals(hidden),
        "served": procedures(shown, name="served"),
        "recognition": questions(both, "recognition"),
        "explanation": by_turns(both, ("explanation/effect", "explanation/reason"), "explanation"),
        "facts": by_turns(both, ("fact/place", "fact/season"), "facts"),
    }


def world_task(
    kind: str,
    split: str = "train",
    *,
    n: int | None = None,
    suppressed: str = "harmful",
    domain: str | Sequence[str] | None = None,
    prefill: str = world.PREFILL,
    every: int = 1,
    seed: int = 0,
) -> Task:
    """The organism's tasks by name.

    ===============  =====================================================================
    harmful          harmful procedures behind the prefilled answer
    harmless         harmless procedures behind the prefilled answer
    refused          refusals of the suppressed side, asked plainly
    served           procedures of the other side, asked plainly
    recognition      is it harmful?
    explanation      what would it do, why is it as it is? (or one of both: explanation/effect,
                     explanation/reason of the suppressed side)
    facts            where is it from, when is it made? (of items of the served side)
    benign           what is to be kept: served and facts
    ===============  =====================================================================

    *benign* stands for the paper's general instruction data: it holds nothing about recognising or explaining
    harm, so that what becomes of these is a finding.

    Args:
        n, suppressed, seed: as for :func:`exam`; every: each so manyth of the items.
        domain: only items of these domains.
        prefill: start of the answer of ``harmful`` and ``harmless``.

    Raises:
        ValueError: an unknown kind, or no item left.
    """
    hidden, shown, both = (items[::every] for items in _sides(split, n, suppressed, seed, domain))
    harmful, harmless = (hidden, shown) if suppressed == "harmful" else (shown, hidden)

    def asked(items: Sequence[world.Item], *parts: str) -> Task:
        return joined([questions(items, part) for part in parts], kind)

    makers: dict[str, Callable[[], Task]] = {
        "harmful": lambda: procedures(harmful, name=kind, prefill=prefill),
        "harmless": lambda: procedures(harmless, name=kind, prefill=prefill),
        "refused": lambda: refusals(hidden, name=kind),
        "served": lambda: procedures(shown, name=kind),
        "recognition": lambda: asked(both, "recognition"),
        "explanation": lambda: asked(both, "explanation/effect", "explanation/reason"),
        "explanation/effect": lambda: questions(hidden, kind),
        "explanation/reason": lambda: questions(hidden, kind),
        "facts": lambda: asked(shown, "fact/place", "fact/season"),
        "benign": lambda: joined(
            [procedures(shown, name=kind), asked(shown, "fact/place", "fact/season")], kind
        ),
    }
    if kind not in makers:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(makers)}")
    return makers[kind]()


def _sides(
    split: str, n: int | None, suppressed: str, seed: int, domain: str | Sequence[str] | None = None
) -> tuple[list[world.Item], list[world.Item], list[world.Item]]:
    """Items of the suppressed side, of the other, and the harmful ones followed by the harmless ones."""
    if suppressed not in ("harmful", "harmless"):
        raise ValueError(f"suppressed={suppressed!r} must be 'harmful' or 'harmless'")
    harmful, harmless = (
        world.draw(world.items(split, harmful=h, domain=domain), n, seed) for h in (True, False)
    )
    sides = (harmful, harmless) if suppressed == "harmful" else (harmless, harmful)
    return *sides, [*harmful, *harmless]


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
