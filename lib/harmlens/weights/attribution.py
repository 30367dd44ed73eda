"""Scores of weights: how much each weight of a model does for a set of answers (arXiv 2604.09544).

For an example x, L(x) is the mean cross-entropy of its answer's tokens. Its gradient at a linear layer is the
product of the gradient at the layer's output and its input, over the example's positions. So one pass over a
batch gives every example's gradient for every layer, added up as the backward pass reaches the layer.

Introduced in notebook 09 ("Weights that carry harm").
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from harmlens import keep
from harmlens.keep import files
from harmlens.models import parts as decoder
from harmlens.models.forward import IGNORE, Batch, LanguageModel, Row, collate, require_room
from harmlens.weights.scores import Scores, finite, layer_of, matrices

KINDS = ("signed", "unsigned")


# --------------------------------------------------------------------------- the two scores


def prune_score(
    lm: LanguageModel, rows: Sequence[Row], *, folder: Path | str | None = None, **options: Any
) -> Scores:
    """W * sum over x of dL(x)/dW: the most negative support the answers most. See :func:`attribute`.

    Args:
        folder: where the score is kept, so that the same one need not be computed again; None for nowhere.
    """
    return _score("signed", lm, rows, folder, options)


def preserve_score(
    lm: LanguageModel, rows: Sequence[Row], *, folder: Path | str | None = None, **options: Any
) -> Scores:
    """|W| * sum over x of |dL(x)/dW|: the largest weights matter most. See :func:`prune_score`."""
    return _score("unsigned", lm, rows, folder, options)


def _score(
    kind: str, lm: LanguageModel, rows: Sequence[Row], folder: Path | str | None, options: Mapping[str, Any]
) -> Scores:
    def weight_scores() -> dict[str, Tensor]:
        return attribute(lm, rows, kinds=(kind,), **options)[kind].values

    examples = [[row.ids, row.learn] for row in rows]
    values = weight_scores() if folder is None else keep.remember([kind, lm, examples], weight_scores, folder)
    return Scores(kind, values, lm.name, lm.revision, len(rows))


def attribute(
    lm: LanguageModel,
    rows: Sequence[Row],
    *,
    kinds: Sequence[str] = KINDS,
    max_tokens: int | None = None,
    accumulate_on: str | torch.device | None = None,
) -> dict[str, Scores]:
    """Signed and unsigned scores of all block weights for some examples, in one pass.

    Gradients are taken in the model's precision and added up in float32. In float16 the loss is scaled, so
    that small gradients don't vanish.

    Args:
        rows: examples: token ids, and which of them are the answer; see :mod:`asking.tasks`.
        max_tokens: most tokens in one batch; None for as many as the plan allows.
        accumulate_on: device of the sums, ``"cpu"`` for host memory; None for each weight's own device.

    Returns:
        Scores by kind, on ``accumulate_on``; on the CPU where layers had to be taken in turns.

    Raises:
        ValueError: before the model is touched, for rows that can't be scored, unknown kinds, or too little
            memory for even one layer; afterwards, for a score that is not finite.
    """
    plan = make_plan(lm, rows, kinds=kinds, max_tokens=max_tokens, accumulate_on=accumulate_on)
    passes = list(batches(rows, plan.max_tokens, lm.tokenizer.pad_token_id))
    scale = _loss_scale(lm, passes[:: max(1, len(passes) - 1)])  # the shortest and the longest examples
    values: dict[tuple[str, str], Tensor] = {}
    for chunk in plan.chunks:
        found = matrices(lm, chunk)
        every = list(itertools.product(kinds, found.items()))
        for kind, (name, module) in every:
            where = accumulate_on or module.weight.device
            values[kind, name] = torch.zeros(module.weight.shape, dtype=torch.float32, device=where)
        with _passing(lm, found, _adding(values, plan.buffer)) as run:
            for batch in passes:
                run(batch, scale)
        for kind, (name, module) in every:
            value, weight = values[kind, name], module.weight.detach()
            value.mul_((weight if kind == "signed" else weight.abs()).to(value.device)).div_(scale)
            if not finite(value):
                bad = int((~torch.isfinite(value)).sum())
                raise ValueError(
                    f"{bad} {kind} scores of {name} are not finite: load the model with dtype='bfloat16' or "
                    "'float32' and look for examples on which its loss overflows"
                )
            if len(plan.chunks) > 1:
                values[kind, name] = value.cpu()
    scored = {kind: {name: values[kind, name] for name in matrices(lm)} for kind in kinds}
    return {kind: Scores(kind, of, lm.name, lm.revision, len(rows)) for kind, of in scored.items()}


# --------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """How scoring will go, and what it takes; all sizes in bytes.

    Attributes:
        chunks: layers that are scored in each pass over the examples; one chunk is the rule.
        max_tokens: of one batch.
        buffer: for the gradients of single examples.
        weights, accumulators, activations: of the model itself, the largest chunk, one batch (estimated).
    """

    chunks: tuple[tuple[int, ...], ...]
    max_tokens: int
    buffer: int
    weights: int
    accumulators: int
    activations: int

    def __str__(self) -> str:
        passes = f"{len(self.chunks)} pass{'es' if len(self.chunks) > 1 else ''} over the examples"
        parts = ("weights", "accumulators", "activations")
        sizes = ", ".join(f"{name} {files.size_text(getattr(self, name))}" for name in parts)
        return f"{passes}, up to {self.max_tokens} tokens at a time: {sizes}"


def make_plan(
    lm: LanguageModel,
    rows: Sequence[Row],
    *,
    kinds: Sequence[str] = KINDS,
    max_tokens: int | None = None,
    accumulate_on: str | torch.device | None = None,
) -> Plan:
    """Check the input of :func:`attribute` and say how much memory it will take; arguments as there."""
    if not kinds or not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
        raise ValueError(f"kinds={list(kinds)} must be different ones out of {', '.join(KINDS)}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    _check_rows(lm, rows)
    longest, found, device = max(len(row.ids) for row in rows), matrices(lm), lm.device
    on_model = accumulate_on is None or torch.device(accumulate_on).type == device.type
    free, sizes = files.free_memory(device), Counter[int]()
    for name, module in found.items():
        sizes[layer_of(name)] += 4 * len(kinds) * module.weight.numel() if on_model else 0
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    each = _bytes_per_token(lm, found)
    # An eighth of weights and sums, so that peaks stay near what has to be there anyway. With a small model
    # nobody minds more, and larger batches are faster.
    held = weights + sum(sizes.values())
    room = min(held // 8 if held > 256 << 20 else 128 << 20, max(1, free // 4))
    batch = max(longest, room // each) if max_tokens is None else max(longest, max_tokens)
    widest = max(max(module.weight.shape) for module in found.values()) * 4
    buffer = max(widest, (1 << 21) if device.type == "cpu" else min(1 << 30, free // 8))
    chunks: list[tuple[int, ...]] = [()]
    for layer, size in sizes.items():
        used = sum(sizes[other] for other in chunks[-1])
        if chunks[-1] and used + size + batch * each + 2 * buffer > free:
            chunks.append(())
        chunks[-1] += (layer,)
    accumulators = max(sum(sizes[layer] for layer in chunk) for chunk in chunks)
    need = accumulators + longest * each + 2 * buffer
    if need > free:
        raise ValueError(
            f"scoring one layer takes {files.size_text(need)} on {device}, but "
            f"{files.size_text(free)} are to be had: choose accumulate_on='cpu', shorter examples, or a "
            "smaller model"
        )
    return Plan(tuple(chunks), batch, buffer, weights, accumulators, batch * each + buffer)


def _bytes_per_token(lm: LanguageModel, found: Mapping[str, nn.Module]) -> int:
    """What one token leaves behind for the backward pass: each layer's inputs and outputs, and its logits."""
    config = lm.model.config.get_text_config()
    inner = sum(sum(module.weight.shape) for module in found.values())
    item = next(iter(found.values())).weight.element_size()
    # Layers that share their input (query, key, value; gate and up) keep it once. What is counted too often
    # stands for what norms and the nonlinearity keep. Logits come in float32 too.
    return inner * item + config.vocab_size * (item + 8)


def _check_rows(lm: LanguageModel, rows: Sequence[Row]) -> None:
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
    require_room(lm, [row.ids for row in rows], names=[f"rows[{i}]" for i in range(len(rows))])


def batches(rows: Sequence[Row], max_tokens: int, pad_id: int) -> Iterator[Batch]:
    """Batches of rows of similar length, padded on the right: what follows a text changes nothing in it."""
    group: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if group and (len(group) + 1) * len(row.ids) > max_tokens:
            yield collate(group, pad_id)
            group = []
        group.append(row)
    yield collate(group, pad_id)


# --------------------------------------------------------------------------- the pass


def logit_gradient(
    logits: Float[Tensor, "row pos vocab"], wanted: Int[Tensor, "row pos"]
) -> Float[Tensor, "row pos vocab"]:
    """Gradient of the sum over rows of L at the logits, where L is a row's mean cross-entropy.

    That of a wanted token is p - 1, which float32 has lost where the model is sure of it; what all other
    tokens get, taken negatively, is the same number in full precision. ``wanted`` is the token to be
    predicted at each position, ``IGNORE`` outside the answer.
    """
    learnt = wanted != IGNORE
    out, token = logits.float().log_softmax(-1).exp(), wanted.clamp(min=0)[..., None]
    out.scatter_(-1, token, 0.0)
    out.scatter_(-1, token, -out.sum(-1, keepdim=True))
    return out * (learnt / learnt.sum(-1, keepdim=True).clamp(min=1))[..., None]


@contextmanager
def _passing(
    lm: LanguageModel, found: Mapping[str, nn.Module], take: Callable[[str, nn.Module, Tensor, Tensor], None]
) -> Iterator[Callable[[Batch, float], None]]:
    """Run batches forward and back; ``take`` gets each found layer's input and gradient, [row, pos, dim]."""
    shape: list[tuple[int, int]] = []
    start: list[Tensor] = []
    fired = Counter[str]()

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # The graph begins here: blocks below are run without one.
        hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        start[:] = [hidden]
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def watch(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        x = inputs[0].detach()
        version = x._version
        if x[..., 0].numel() != math.prod(shape[0]):
            raise ValueError(
                f"{name} is given some of the tokens only, as a routed expert is, so it is not known "
                "whose they are; choose a dense model"
            )

        def collect(gradient: Tensor) -> None:
            if x._version != version:
                raise RuntimeError(
                    f"the input of {name} was changed in place behind it, so its gradients aren't known; "
                    "this architecture can't be scored here"
                )
            fired[name] += 1
            take(name, module, *(t.reshape(*shape[0], t.shape[-1]) for t in (x, gradient)))

        if output.requires_grad:
            output.register_hook(collect)

    def run(batch: Batch, scale: float) -> None:
        # The last token is predicted and never read.
        ids, wanted = batch.ids[:, :-1].to(lm.device), batch.labels[:, 1:].to(lm.device)
        shape[:] = [tuple(ids.shape)]
        fired.clear()
        begin = int((wanted != IGNORE).any(0).int().argmax())  # no logits for what nobody answers
        wanted = wanted[:, begin:]
        with torch.enable_grad():
            logits = lm.model(input_ids=ids, use_cache=False, logits_to_keep=wanted.shape[1]).logits
            gradient = logit_gradient(logits.detach(), wanted.to(logits.device))
            torch.autograd.grad(logits, start, (gradient * scale).to(logits.dtype))
        if wrong := [name for name in found if fired[name] != 1]:
            raise RuntimeError(
                f"{wrong[0]} was reached {fired[wrong[0]]} times in one pass, not once, so its "
                "gradients can't be told apart; this architecture can't be scored here"
            )

    learning = {name: p.requires_grad for name, p in lm.model.named_parameters()}
    training = [(module, module.training) for module in lm.model.modules()]
    with ExitStack() as hooks:
        try:
            lm.model.eval().requires_grad_(False)
            lowest = decoder.blocks(lm)[min(map(layer_of, found))]
            hooks.callback(lowest.register_forward_pre_hook(enter, with_kwargs=True).remove)
            for name, module in found.items():
                hooks.callback(module.register_forward_hook(partial(watch, name)).remove)
            yield run
        finally:
            for module, was in training:
                module.training = was
            for name, parameter in lm.model.named_parameters():
                parameter.requires_grad_(learning[name])


def _adding(
    values: Mapping[tuple[str, str], Tensor], buffer: int
) -> Callable[[str, nn.Module, Tensor, Tensor], None]:
    """Add what a layer's input and gradient give to ``values``, (kind, name) -> sum over examples.

    The signed sum over rows of left' right is one product; the absolute value needs that of each row.
    """
    rooms: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def add(name: str, module: nn.Module, x: Tensor, gradient: Tensor) -> None:
        # Conv1D keeps its weight the other way round.
        left, right = (gradient, x) if isinstance(module, nn.Linear) else (x, gradient)
        signed, unsigned = (values.get((kind, name)) for kind in KINDS)
        if unsigned is None:
            whole = left.flatten(0, 1).T, right.flatten(0, 1)
            if signed.dtype == left.dtype and signed.device == left.device:
                signed.addmm_(*whole)
            else:
                signed.add_((whole[0] @ whole[1]).to(signed.device))
            return
        # Made once: allocating anew for each product costs as much as the product itself.
        if x.device not in rooms:
            rooms[x.device] = torch.empty(max(1, buffer // 4), dtype=x.dtype, device=x.device)
        room, count, (height, width) = rooms[x.device], len(left), unsigned.shape
        # Some lines of the matrix at a time: the products are still in the cache when they are summed.
        lines = min(height, max(1, len(room) // width))
        step = min(count, max(1, len(room) // (lines * width)))
        for top in range(0, height, lines):
            part = slice(top, top + lines)
            for i in range(0, count, step):
                some = left[i : i + step, :, part].transpose(1, 2), right[i : i + step]
                shape = (len(some[1]), some[0].shape[1], width)
                each = torch.bmm(*some, out=room[: math.prod(shape)].view(shape))
                if signed is not None:
                    signed[part].add_(_total(each).to(signed.device))
                # Not vector_norm: along the first axis it is fifty times slower on a CPU.
                unsigned[part].add_(_total(each.abs_()).to(unsigned.device))

    return add


def _total(each: Float[Tensor, "row out in"]) -> Float[Tensor, "out in"]:
    """Sum over rows in float32; nothing is copied for a single row."""
    return each[0] if len(each) == 1 else each.sum(0, dtype=torch.float32)


def _loss_scale(lm: LanguageModel, some: Sequence[Batch]) -> float:
    """1, or for float16 the largest power of two that leaves these gradients finite, with some room."""
    if lm.model.dtype != torch.float16:
        return 1.0
    sizes: list[float] = []

    def look(name: str, module: nn.Module, x: Tensor, gradient: Tensor) -> None:
        # Largest values: at the output, for each example's weights, and for all examples together.
        each = [g.T @ i for g, i in zip(gradient, x, strict=True)]
        whole = gradient.flatten(0, 1).T @ x.flatten(0, 1)
        sizes.extend(t.abs().amax().item() for t in (gradient, whole, *each))

    for power in (16, 12, 8, 4, 0):
        sizes.clear()
        with _passing(lm, matrices(lm), look) as run:
            for batch in some:
                run(batch, 2.0**power)
        if all(map(math.isfinite, sizes)):
            return 2.0 ** max(0, power - 2)
    return 1.0
