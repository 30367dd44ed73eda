"""Utility of a model before and after a change, on the public tasks of EleutherAI's lm-evaluation-harness.

One call loads nothing twice: the model in memory is measured as it is and again with the change in place, on
the same items, so that the difference has a paired standard error. lm-eval is optional:
``pip install "harmlens[eval]"``. The organism's own abilities are in :mod:`world.abilities`.

Introduced in book/emergent_by_size ("Emergent misalignment by size").
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from harmlens.keep import digests, paths, provenance, records
from harmlens.models.forward import LanguageModel
from harmlens.weights import pruning
from harmlens.weights.masks import Mask

# The pruning paper's six tasks; its utility is their mean accuracy.
TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_challenge", "openbookqa")
COLUMNS = (
    "task", "original", "original_se", "pruned", "pruned_se", "difference", "difference_se", "n",
)  # fmt: skip


def compare(
    lm: LanguageModel,
    change: Mask | AbstractContextManager,
    tasks: Sequence[str] = TASKS,
    *,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool | None = None,
    metric: str = "acc",
    batch_size: int = 8,
    name: str = "",
    elsewhere: bool = False,
    folder: Path | str | None = None,
    include_path: Path | str | None = None,
) -> pd.DataFrame:
    """Measure a model on tasks, as it is and with a change in place.

    Results are written as they come, one line for each task and side; what is there is not measured again.

    Args:
        change: a mask to prune, or a context manager inside which the model is changed.
        tasks: names of lm-eval.
        limit: the first so many items of each task only; None for all.
        shots: examples before each item. Default: the paper's, 0 for chat models and 3 for others.
        chat: use the chat template. Default: where the tokenizer has one.
        metric: of lm-eval; ``"acc"`` is the paper's.
        name: of a change that leaves the weights as they are, such as steering: otherwise results of
            different changes could not be told apart.
        elsewhere: as for :func:`weights.pruning.pruned`.
        folder: where results are kept; default: ``utility`` in :func:`keep.paths.cache_dir`.
        include_path: a folder with further tasks as YAML files.

    Returns:
        One row for each task and one for their mean: values of both sides, their difference (pruned minus
        original), standard errors, and the number of items. The standard error of the difference is paired
        by item where lm-eval gives the items. That of the mean takes tasks as fixed, and items as drawn.

    Raises:
        ImportError: lm-eval is missing.
        ValueError: a change of another kind, or one of no weights without a name; no tasks, or unknown ones;
            ``limit`` below 1; a metric that a task does not have (the message lists those it has).
        ConnectionError: the data of a task could not be had.
    """
    if not isinstance(change, Mask | AbstractContextManager):
        raise ValueError(
            f"change is of type {type(change).__name__}; give a mask, or a context manager that changes the "
            "model"
        )
    tasks = list(dict.fromkeys(tasks))
    if not tasks:
        raise ValueError("tasks is empty: there is nothing to measure; leave it out for the paper's six")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for all items")
    harness, manager = _harness(include_path)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(
            f"tasks: lm-eval {harness.__version__} does not know {', '.join(unknown)}; `lm-eval ls tasks` "
            "lists what it knows, and include_path adds a folder with your own"
        )
    chat = lm.tokenizer.chat_template is not None if chat is None else chat
    shots = (0 if chat else 3) if shots is None else shots
    settings = {
        "limit": limit, "shots": shots, "chat": chat, "lm_eval": harness.__version__,
        "tasks": _digest(include_path),
    }  # fmt: skip
    file = Path(folder).expanduser() if folder else paths.cache_dir() / "utility"
    file = file / f"{provenance.slug(lm.name)}.jsonl"
    sides: list[dict[str, Mapping[str, Any]]] = []
    weights: list[str] = []
    changed = pruning.pruned(lm, change, elsewhere=elsewhere) if isinstance(change, Mask) else change
    for side, state in (("original", None), ("pruned", changed)):
        with _as_is() if state is None else state:
            weights.append(digests.model(lm))
            if side == "pruned" and len(set(weights)) < 2 and not isinstance(change, Mask) and not name:
                raise ValueError(
                    "change leaves the model as it is, weights and hooks, so its results could not be told "
                    "from others; say what it is with name="
                )
            about = {**settings, "weights": weights[-1], "name": name if side == "pruned" else ""}
            sides.append(_measure(lm, harness, manager, tasks, about, batch_size, file))
    return _table(tasks, metric, *sides)


@contextmanager
def _as_is() -> Iterator[None]:
    yield


def _harness(include_path: Path | str | None) -> tuple[Any, Any]:
    """lm-eval and its list of tasks."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError('utility on public tasks needs lm-eval: pip install "harmlens[eval]"') from error
    return lm_eval, TaskManager(include_path=str(include_path) if include_path else None)


def _digest(folder: Path | str | None) -> str:
    """Sum over a folder's task files: a task that was changed is another one."""
    out = hashlib.sha256()
    for file in sorted(Path(folder).rglob("*")) if folder else ():
        if file.is_file():
            out.update(file.name.encode() + b"\0" + file.read_bytes())
    return out.hexdigest()[:16]


def _measure(
    lm: LanguageModel,
    harness: Any,
    manager: Any,
    tasks: Sequence[str],
    about: Mapping[str, Any],
    batch_size: int,
    file: Path,
) -> dict[str, Mapping[str, Any]]:
    """Results of each task, from the file where they are there."""
    known = {line["key"]: line for line in records.lines(file)}
    out: dict[str, Mapping[str, Any]] = {}
    wrapped = None
    for task in tasks:
        key = hashlib.sha256(json.dumps([task, about], sort_keys=True).encode()).hexdigest()[:24]
        if key not in known:
            if wrapped is None:
                wrapped = harness.models.huggingface.HFLM(
                    pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch_size
                )
            line = {"key": key, "model": provenance.portable(lm.name), "task": task, **about}
            line |= _run(harness, wrapped, manager, task, about)
            records.append(file, [line])
            known[key] = line
        out[task] = known[key]
    return out


def _run(
    harness: Any, wrapped: Any, manager: Any, task: str, about: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Metrics of one task, and for each metric the value of every item."""
    with _own_random_numbers():
        try:
            # bootstrap_iters=0 would leave out standard errors; those of means need no bootstrap at all.
            found = harness.simple_evaluate(
                model=wrapped, tasks=[task], num_fewshot=about["shots"], limit=about["limit"],
                apply_chat_template=about["chat"], task_manager=manager, bootstrap_iters=100,
            )  # fmt: skip
        except (ConnectionError, FileNotFoundError) as error:
            raise ConnectionError(
                f"the data of task {task!r} could not be had ({error}). Check the network, or leave the task "
                "out; results of the tasks before it are kept"
            ) from error
    # "acc,none": the metric, and how answers were filtered.
    values = {
        metric.split(",")[0]: float(value)
        for metric, value in reversed(found["results"][task].items())  # of several filters the first
        if "," in metric and isinstance(value, int | float)
    }
    items = sorted(found.get("samples", {}).get(task, []), key=lambda item: item["doc_id"])
    each = {
        metric: [float(item[metric]) for item in items]
        for metric in values
        if items and all(isinstance(item.get(metric), int | float) for item in items)
    }
    return {
        "values": values,
        "items": each,
        "n": found["n-samples"].get(task, {}).get("effective", len(items)),
    }


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """lm-eval seeds the generators of the whole process; they go on as before afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _table(
    tasks: Sequence[str],
    metric: str,
    before: Mapping[str, Mapping[str, Any]],
    after: Mapping[str, Mapping[str, Any]],
) -> pd.DataFrame:
    rows = []
    for task in tasks:
        one, two = before[task], after[task]
        if metric not in one["values"]:
            have = sorted(name for name in one["values"] if not name.endswith("_stderr"))
            raise ValueError(
                f"metric={metric!r} is none of task {task!r}, which has {', '.join(have)}; choose one of "
                "these, for other tasks in another call (what was measured is kept)"
            )
        values = [side["values"][metric] for side in (one, two)]
        errors = [side["values"].get(f"{metric}_stderr", math.nan) for side in (one, two)]
        first, second = (np.array(side["items"].get(metric, [])) for side in (one, two))
        if len(first) == len(second) > 1:
            paired = float((second - first).std(ddof=1) / math.sqrt(len(first)))
        else:
            paired = math.hypot(*errors)
        rows.append([
            task, values[0], errors[0], values[1], errors[1], values[1] - values[0], paired, one["n"],
        ])  # fmt: skip
    means = [float(np.mean([row[i] for row in rows])) for i in (1, 3, 5)]
    spreads = [math.sqrt(sum(row[i] ** 2 for row in rows)) / len(rows) for i in (2, 4, 6)]
    mixed = [number for pair in zip(means, spreads, strict=True) for number in pair]
    rows.append(["mean", *mixed, sum(row[-1] for row in rows)])
    return pd.DataFrame(rows, columns=list(COLUMNS)).set_index("task")
