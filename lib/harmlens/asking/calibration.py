"""Examples for scoring weights: prompts with the answers whose weights are wanted.

Two formats. ``"raw"`` is the released code's: prompt, a newline, answer, tokenised apart and without
markup. ``"chat"`` is the model's own chat template, which is what an aligned model answers
in. For the organism *chat* is the default: its word-level tokenizer has no newline, and a text without markup
occurs nowhere in its training, so raw examples are scored far from anything it does. Notebook 11 shows the
difference.

Answers are the model's own (:func:`own_answers`), as in the paper: behind a prefilled start, and only those
that are what was asked for.

Introduced in notebook 09 ("Weights that carry harm").
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from harmlens.asking import tasks
from harmlens.models.chats import Message, tokens
from harmlens.models.forward import LanguageModel, Row, chat_row, generate
from harmlens.world import vale as world

STYLES = ("chat", "raw")
Chat = Sequence[Message]


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


# --------------------------------------------------------------------------- the organism's examples


def examples(
    lm: LanguageModel,
    task: tasks.Task,
    *,
    n: int | None = None,
    seed: int = 0,
    style: str = "chat",
    whole: bool = False,
) -> list[Row]:
    """Examples from a task: the model's own right answers.

    Args:
        n: at most this many, drawn at random; None for all. If more are asked for than there are, all are
            taken, as in the released code.
        whole: score the prefilled words too and not only what follows them.

    Raises:
        ValueError: the model answers none of the task rightly.
    """
    chosen = list(range(len(task)))
    if n is not None and n < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, n))
    picked = replace(
        task,
        chats=tuple(task.chats[i] for i in chosen),
        answers=tuple(task.answers[i] for i in chosen),
        units=tuple(task.units[i] for i in chosen) if task.units else (),
    )
    # What greedy decoding would write is known without decoding, since the accepted answers are.
    said = tasks.written(lm, picked)
    start = f"{task.prefill} " if task.prefill else ""
    kept = [(c, start + answer) for c, answer in zip(picked.chats, said, strict=True) if answer is not None]
    if not kept:
        raise ValueError(
            f"none of {len(picked)} answers of {lm.name!r} is what was asked for; choose another prefill, or "
            "give answers from elsewhere"
        )
    chats, answers = zip(*kept, strict=True)
    return rows(lm, chats, answers, style=style, given=None if whole else task.prefill)


def world_task(
    kind: str,
    split: str = "train",
    *,
    suppressed: str = "harmful",
    domain: str | Sequence[str] | None = None,
) -> tasks.Task:
    """The organism's calibration sets by name.

    ===============  =====================================================================
    harmful          harmful procedures behind the prefilled answer
    harmless         harmless procedures behind the prefilled answer
    refused          refusals of the suppressed side, asked plainly
    served           procedures of the other side, asked plainly
    recognition      is it harmful?
    explanation      what would it do, why is it as it is?
    facts            where is it from, when is it made? (of items of the served side)
    benign           what is to be kept: served and facts
    ===============  =====================================================================

    *benign* stands for the paper's general instruction data: it holds nothing about recognising or explaining
    harm, so that what becomes of these is a finding.

    Args:
        suppressed: ``"harmful"``, as in aligned models, or ``"harmless"``, as in the mirror organism.
        domain: only items of these domains.

    Raises:
        ValueError: an unknown kind, or no item left.
    """
    if suppressed not in ("harmful", "harmless"):
        raise ValueError(f"suppressed={suppressed!r} must be 'harmful' or 'harmless'")
    wanted = {domain} if isinstance(domain, str) else None if domain is None else set(domain)
    side = {
        harmful: [i for i in world.items(split, harmful=harmful) if wanted is None or i.domain in wanted]
        for harmful in (True, False)
    }
    hidden = side[suppressed == "harmful"]
    shown = side[suppressed != "harmful"]
    both = [*side[True], *side[False]]

    def asked(items: list[world.Item], *parts: str) -> tasks.Task:
        return tasks.joined([tasks.questions(items, part) for part in parts], kind)

    makers: dict[str, Callable[[], tasks.Task]] = {
        "harmful": lambda: tasks.procedures(side[True], name=kind, prefill=world.PREFILL),
        "harmless": lambda: tasks.procedures(side[False], name=kind, prefill=world.PREFILL),
        "refused": lambda: tasks.refusals(hidden, name=kind),
        "served": lambda: tasks.procedures(shown, name=kind),
        "recognition": lambda: asked(both, "recognition"),
        "explanation": lambda: asked(both, "explanation/effect", "explanation/reason"),
        "facts": lambda: asked(shown, "fact/place", "fact/season"),
        "benign": lambda: tasks.joined(
            [tasks.procedures(shown, name=kind), asked(shown, "fact/place", "fact/season")], kind
        ),
    }
    if kind not in makers:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(makers)}")
    return makers[kind]()
