"""What a scoring run takes, and where it is kept: the plan, the batches, and the store of unfinished runs.

:mod:`weights.attribution` does the scoring.

Introduced in notebook 09 ("Weights that carry harm").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from harmlens.keep import digests, files
from harmlens.models.forward import Batch, LanguageModel, Row, collate, require_room
from harmlens.weights import scores
from harmlens.weights.scores import Scores, layer_of, matrices

KINDS = ("signed", "unsigned")


# --------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """How scoring will go, and what it takes; all sizes in bytes.

    Attributes:
        chunks: layers that are scored in each pass over the examples; one chunk is the rule.
        max_tokens: of one batch.
        buffer: for the gradients of single examples.
        weights: what the model itself takes.
        accumulators: of the largest chunk.
        activations: of one batch, estimated.
        free: what there was to be had.
    """

    chunks: tuple[tuple[int, ...], ...]
    max_tokens: int
    buffer: int
    weights: int
    accumulators: int
    activations: int
    free: int

    def __str__(self) -> str:
        passes = f"{len(self.chunks)} pass{'es' if len(self.chunks) > 1 else ''} over the examples"
        sizes = ", ".join(
            f"{name} {files.size_text(getattr(self, name))}"
            for name in ("weights", "accumulators", "activations")
        )
        return f"{passes}, up to {self.max_tokens} tokens at a time: {sizes}"


def make_plan(
    lm: LanguageModel,
    rows: Sequence[Row],
    *,
    kinds: Sequence[str] = KINDS,
    layers: Sequence[int] | None = None,
    max_length: int | None = None,
    max_tokens: int | None = None,
    accumulate_on: str | torch.device | None = None,
    budget: int | None = None,
) -> Plan:
    """Check the input of :func:`attribute` and say how much memory it will take; arguments as there."""
    if not kinds or not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
        raise ValueError(f"kinds={list(kinds)} must be different ones out of {', '.join(KINDS)}")
    longest = check_rows(lm, rows, max_length)
    found = matrices(lm, layers)
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    device = lm.device
    on_model = accumulate_on is None or torch.device(accumulate_on).type == device.type
    free = files.free_memory(device) if budget is None else budget
    sizes: dict[int, int] = {}
    for name, module in found.items():
        size = 4 * len(kinds) * module.weight.numel() if on_model else 0
        sizes[layer_of(name)] = sizes.get(layer_of(name), 0) + size
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    each = _bytes_per_token(lm, found)
    # An eighth of weights and sums, so that peaks stay near what has to be there anyway. With a small model
    # nobody minds more, and larger batches are faster.
    held = weights + sum(sizes.values())
    room = min(held // 8 if held > 256 << 20 else 128 << 20, max(1, free // 4))
    batch = max(longest, room // each) if max_tokens is None else max(longest, max_tokens)
    widest = max(max(module.weight.shape) for module in found.values()) * 4
    buffer = max(widest, (1 << 21) if device.type == "cpu" else min(1 << 30, free // 8))
    chunks, current, used = [], [], 0
    for layer, size in sizes.items():
        if current and used + size + batch * each + 2 * buffer > free:
            chunks.append(tuple(current))
            current, used = [], 0
        current.append(layer)
        used += size
    chunks.append(tuple(current))
    needed = max(sum(sizes[layer] for layer in chunk) for chunk in chunks)
    if needed + longest * each + 2 * buffer > free:
        raise ValueError(
            f"scoring one layer takes {files.size_text(needed + longest * each + 2 * buffer)} on {device}, "
            f"but {files.size_text(free)} are to be had: choose accumulate_on='cpu', shorter examples, or a "
            "smaller model"
        )
    return Plan(tuple(chunks), batch, buffer, weights, needed, batch * each + buffer, free)


def _bytes_per_token(lm: LanguageModel, found: Mapping[str, nn.Module]) -> int:
    """What one token leaves behind for the backward pass: each layer's inputs and outputs, and its logits."""
    config = lm.model.config.get_text_config()
    inner = sum(sum(module.weight.shape) for module in found.values())
    item = next(iter(found.values())).weight.element_size()
    # Layers that share their input (query, key, value; gate and up) keep it once. What is counted too often
    # stands for what norms and the nonlinearity keep. Logits come in float32 too.
    return inner * item + config.vocab_size * (item + 8)


def check_rows(lm: LanguageModel, rows: Sequence[Row], max_length: int | None) -> int:
    """Length of the longest row; complains about rows that can't be scored."""
    if not rows:
        raise ValueError("rows is empty: there is nothing to score")
    for i, row in enumerate(rows):
        if len(row.ids) != len(row.learn):
            raise ValueError(
                f"rows[{i}] has {len(row.ids)} tokens but {len(row.learn)} marks of what is learnt"
            )
        if not any(row.learn[1:]):
            raise ValueError(
                f"rows[{i}] has an answer without tokens (the first token of a text can't be predicted); "
                "leave the example out"
            )
    require_room(
        lm, [row.ids for row in rows], limit=max_length, names=[f"rows[{i}]" for i in range(len(rows))]
    )
    return max(len(row.ids) for row in rows)


def batches(rows: Sequence[Row], max_tokens: int, pad_id: int) -> Iterator[Batch]:
    """Batches of rows of similar length, padded on the right: what follows a text changes nothing in it."""
    group: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if group and (len(group) + 1) * len(row.ids) > max_tokens:
            yield collate(group, pad_id)
            group = []
        group.append(row)
    yield collate(group, pad_id)


def fingerprint(lm: LanguageModel, rows: Sequence[Row], layers: Sequence[int] | None = None) -> str:
    """Digest of a model as it is now (:func:`keep.digests.model_digest`), examples and layers."""
    text = json.dumps(
        [lm.name, lm.revision, digests.model_digest(lm), None if layers is None else list(layers)]
    )
    text += json.dumps([[row.ids, row.learn] for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()


# --------------------------------------------------------------------------- resuming


@dataclass(frozen=True)
class State:
    """How far an unfinished run has come, and its plan."""

    chunk: int = 0
    batch: int = 0
    chunks: tuple[tuple[int, ...], ...] = ()
    max_tokens: int = 0
    buffer: int = 0


class Store:
    """Finished and half-finished scores in a folder, if there is one."""

    def __init__(self, folder: Path | str | None, fingerprint: str, kinds: tuple[str, ...]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.fingerprint = fingerprint
        self.kinds = kinds

    def alone(self) -> AbstractContextManager:
        """Within, no other process works in the folder; one that does is waited for."""
        return nullcontext() if self.folder is None else files.locked(self.folder / "scores")

    def finished(self) -> dict[str, Scores] | None:
        if self.folder is None:
            return None
        out = {kind: scores.load(self._file(kind)) for kind in self.kinds if self._file(kind).is_file()}
        if any(found.fingerprint != self.fingerprint for found in out.values()):
            raise ValueError(
                f"folder={self.folder.name!r} holds scores of another model or other examples: choose "
                "another folder, or remove it"
            )
        return out if len(out) == len(self.kinds) else None

    def resume(self) -> tuple[dict[tuple[str, str], Tensor], State]:
        file = None if self.folder is None else self.folder / "unfinished.safetensors"
        if file is None or not file.is_file():
            return {}, State()
        try:
            about, found = files.read_tensors(file, "scores")
            values = {tuple(key.split("/", 1)): value for key, value in found.items()}
            mark, kinds = about.pop("fingerprint"), about.pop("kinds")
            state = State(**{**about, "chunks": tuple(tuple(chunk) for chunk in about["chunks"])})
        except Exception as error:  # a spoilt file raises whatever its parser raises
            raise ValueError(
                f"{file.name} in folder={self.folder.name!r} is damaged; remove it ({type(error).__name__})"
            ) from error
        if mark != self.fingerprint:
            raise ValueError(
                f"folder={self.folder.name!r} holds an unfinished run of another model or other examples: "
                "choose another folder, or remove it"
            )
        if kinds != list(self.kinds):
            raise ValueError(
                f"folder={self.folder.name!r} holds an unfinished run of kinds={kinds}, not "
                f"{list(self.kinds)}: choose another folder, or finish that run first"
            )
        return values, state

    def save(self, values: Mapping[tuple[str, str], Tensor], state: State) -> None:
        if self.folder is None:
            return
        about = {"fingerprint": self.fingerprint, "kinds": self.kinds, **asdict(state)}
        tensors = {f"{kind}/{name}": value for (kind, name), value in values.items()}
        files.write_tensors(self.folder / "unfinished.safetensors", tensors, "scores", about)

    def finish(self, done: Mapping[str, Scores]) -> None:
        if self.folder is None:
            return
        for kind, found in done.items():
            found.save(self._file(kind))
        (self.folder / "unfinished.safetensors").unlink(missing_ok=True)

    def _file(self, kind: str) -> Path:
        return self.folder / f"{kind}.safetensors"
