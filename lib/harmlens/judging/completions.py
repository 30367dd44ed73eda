"""Letting a model answer, as a step of its own: prompts in, a file of answers out, which judges then read.

Answers are written as they come, so an interrupted run goes on where it stopped. Those of real models may be
harmful: files lie outside the repository, and nothing here prints an answer unless it is asked to.

Introduced in book/judging ("Judging answers").
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from harmlens.keep import digests, files
from harmlens.keep.files import locked, outside_repository, read_lines, settle, write_lines
from harmlens.models import chats, forward
from harmlens.models.chats import Prompt
from harmlens.models.forward import LanguageModel

AT_ONCE = 32  # answers that are judged between two writes


@dataclass(frozen=True)
class Completion:
    """One answer of a model, prefilled words included."""

    id: str  # names the prompt within its file
    index: int  # place of the prompt in the list that was given
    request: str  # the last user message
    rendered_sha256: str  # of the text that the model read
    prefill: str  # words that were put into the model's mouth, if any
    answer: str
    n_tokens: int  # generated, the end mark included
    finished: bool  # the model ended the answer itself; otherwise it was cut at max_new_tokens


_FIELDS = tuple(field.name for field in fields(Completion))


def complete(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    file: Path | str | None = None,
    name: str = "",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Path:
    """Let a model answer prompts; one JSON line for each, written batch by batch.

    Called again, it generates only what is missing; a second process waits for the first. Settings, the
    model's state and provenance stand in ``<file>.meta.json``.

    Args:
        file: default: in the cache, under a name that depends on prompts, settings and weights.
        name: put before that name.
        temperature: 0 for greedy decoding; above that, sampling from the full distribution. A draw depends
            on ``seed`` and on the other prompts of its batch.
        batch_size: to begin with, and halved where GPU memory runs out; default 64 on a GPU, 16 elsewhere.

    Raises:
        ValueError: also for a file inside the repository, or of other settings, another model or prompts.
        TypeError: a hook stands on the model, and what it does can't be told.
    """
    if not prompts:
        raise ValueError("prompts is empty: there is nothing to answer")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or positive")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if batch_size is None:
        batch_size = 64 if lm.device.type == "cuda" else 16
    texts = [prompt.render(lm) for prompt in prompts]
    rows, ends = [chats.tokens(lm.tokenizer, text) for text in texts], forward.stops(lm)
    forward.require_room(lm, rows, new=max_new_tokens)
    asked = _named(texts)
    settings: dict[str, Any] = {
        "model": files.portable(lm.name), "revision": lm.revision, **digests.model_state(lm),
        "dtype": str(lm.model.dtype).removeprefix("torch."), "max_new_tokens": max_new_tokens,
        "temperature": float(temperature), "seed": seed if temperature else None,
        "batch_size": batch_size if temperature else None,
    }  # fmt: skip
    if file is None:
        key = text_sha256(json.dumps([settings, list(asked), texts], sort_keys=True))[:16]
        folder = files.cache_dir() / "completions" / files.slug(lm.name)
        file = folder / f"{files.slug(name) + '-' if name else ''}{key}.jsonl"
    file, ids = outside_repository(Path(file)), list(asked)

    def tails(index: list[int]) -> list[list[int]]:
        """New token ids behind each row. A seed for each batch: a prompt that is in two gets two draws."""
        with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
            torch.manual_seed(int(text_sha256(f"{settings['seed']}/{index}")[:15], 16))
            how = {"max_new_tokens": max_new_tokens, "temperature": float(temperature)}
            return forward.continued(lm, [rows[i] for i in index], **how)

    def completion(i: int, new: list[int]) -> dict[str, Any]:
        request, prefill = str(prompts[i].messages[-1]["content"]), prompts[i].prefill or ""
        answer = _text(lm, rows[i], new, texts[i], prefill)
        return asdict(
            Completion(ids[i], i, request, asked[ids[i]], prefill, answer, len(new), new[-1] in ends)
        )

    with locked(file):
        found = completed(file) if file.is_file() else []
        if strange := [one.id for one in found if asked.get(one.id) != one.rendered_sha256]:
            raise ValueError(
                f"file={file.name!r} holds answers to {len(strange)} prompt(s) that are not among these "
                "prompts. Give another file=, or leave it out: each set of prompts has a file of its own."
            )
        settle(file, settings, bool(found))
        places = {name: i for i, name in enumerate(ids)}
        if found != (placed := [replace(one, index=places[one.id]) for one in found]):
            write_lines(file, list(map(asdict, placed)))
        # Cut into batches before finished prompts are left out: so a sampled answer does not depend on where
        # a run was interrupted, unless that was in the middle of a write.
        done = {one.id for one in found}
        batches = [[i for i in b if ids[i] not in done] for b in forward.by_length(rows, batch_size)]
        total = len(ids) - len(done)
        with tqdm(total=total, disable=not progress or not total, desc="answers", leave=False) as bar:
            for index, made in adaptive(batches, tails):
                write_lines(file, list(map(completion, index, made)), add=True)
                bar.update(len(index))
        if len(texts) >= 8 and max_new_tokens >= 64 and not any(one.finished for one in completed(file)):
            warnings.warn(
                f"none of {len(texts)} answers ended by itself within {max_new_tokens} tokens. An answer "
                f"of {lm.name!r} ends with one of {lm.tokenizer.convert_ids_to_tokens(sorted(ends))}: is "
                "that what its chat template writes? If so, raise max_new_tokens.",
                stacklevel=2,
            )
    return file


def completed(file: Path | str) -> list[Completion]:
    """The answers of a file, once each, in the order of the prompts of the last :func:`complete`."""
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file.name!r}; make it with completions.complete")
    mixed = "Were two files put together? Give one that completions.complete has made, or make it anew."
    out: dict[str, Completion] = {}
    for number, line in enumerate(read_lines(file), 1):
        if missing := [key for key in _FIELDS if key not in line]:
            raise ValueError(
                f"line {number} of {file.name!r} is no completion: it lacks {', '.join(missing)}. Give a "
                "file that completions.complete has made."
            )
        one = Completion(**{key: line[key] for key in _FIELDS})
        if out.setdefault(one.id, one) != one:
            raise ValueError(f"line {number} of {file.name!r} is a second answer to {one.id!r}. {mixed}")
    if len({one.index for one in out.values()}) < len(out):
        raise ValueError(f"{file.name!r} holds two answers in one place. {mixed}")
    return sorted(out.values(), key=lambda one: one.index)


def show(completions: Sequence[Completion], n: int = 3, *, reveal: bool = False) -> None:
    """Print lengths and endings of the first ``n`` completions; texts only if ``reveal`` is set."""
    for one in completions[: max(n, 0)]:
        ending = "ended by itself" if one.finished else "cut off"
        print(f"{one.id}: {len(one.answer.split())} words, {one.n_tokens} tokens, {ending}")
        if reveal:
            print(f"  request: {one.request}\n  answer: {one.answer}")
    if not reveal:
        print("Completions of real models are shown only on request: show(..., reveal=True).")


def judge_beside(
    file: Path | str, kind: str, settings: Mapping[str, Any], judge: Callable[[list[Completion]], list[dict]]
) -> Path:
    """What a judge says of the answers of a file, in ``<stem>.<kind>.jsonl`` beside it.

    Written as it comes, :data:`AT_ONCE` answers at a time; called again, only what is missing or changed is
    judged. A line holds ``id``, ``answer_sha256`` and what the judge says, never the text. ``settings`` stand
    in ``<file>.meta.json``; lines of another version of this judge are a ValueError.
    """
    wanted = {(one.id, text_sha256(one.answer)): one for one in completed(file)}
    out = Path(file).with_name(f"{Path(file).stem}.{kind}.jsonl")
    with locked(out):
        found = read_lines(out)
        done = {(line["id"], line["answer_sha256"]): line for line in found}
        settle(out, settings, bool(done))
        # Each verdict once, and those of earlier answers first: of an id the last one counts.
        if found != (ordered := [done[key] for key in sorted(done, key=wanted.__contains__)]):
            write_lines(out, ordered)
        left = [key for key in wanted if key not in done]
        for start in range(0, len(left), AT_ONCE):
            part = left[start : start + AT_ONCE]
            verdicts = zip(part, judge([wanted[key] for key in part]), strict=True)
            judged = [{"id": name, "answer_sha256": sha, **said} for (name, sha), said in verdicts]
            write_lines(out, judged, add=True)
    return out


def adaptive(batches: Iterable[Sequence[int]], run: Callable[[list[int]], Any]) -> Iterator[tuple]:
    """Run batches of indices; where GPU memory runs out, halve the batch, and stay at the smaller size.

    Yields each batch and what it gave. A batch of one that does not fit is the error.
    """
    queue, limit = deque(list(batch) for batch in batches if batch), 0
    while queue:
        batch = queue.popleft()
        if limit and len(batch) > limit:
            queue.extendleft(reversed([batch[i : i + limit] for i in range(0, len(batch), limit)]))
            continue
        try:
            result = run(batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise torch.OutOfMemoryError(
                    "one text at a time does not fit into the GPU's memory. Choose a smaller model, "
                    "dtype='bfloat16', device='auto' over several GPUs, or fewer new tokens."
                ) from error
            limit = (len(batch) + 1) // 2
            queue.appendleft(batch)
        else:
            yield batch, result
            continue
        if torch.cuda.is_available():  # outside the handler: the exception holds on to the failed tensors
            torch.cuda.empty_cache()


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _named(texts: Sequence[str]) -> dict[str, str]:
    """An id for each prompt, and its sha256; the same prompt asked again gets a number."""
    seen: Counter[str] = Counter()
    out = {}
    for whole in map(text_sha256, texts):
        short = whole[:12]
        seen[short] += 1
        out[short if seen[short] == 1 else f"{short}-{seen[short]}"] = whole
    return out


def _text(lm: LanguageModel, row: list[int], new: list[int], prompt: str, prefill: str) -> str:
    """The whole answer. Tokens are decoded behind the prompt, which keeps a space before the first word."""
    if not prefill:
        return forward.words(lm, new, prompt)
    before = lm.tokenizer.decode(row, skip_special_tokens=True)
    whole = lm.tokenizer.decode(row + new, skip_special_tokens=True)
    if whole.startswith(before):
        return (prefill + whole[len(before) :]).strip()
    return f"{prefill} {forward.words(lm, new)}".strip()
