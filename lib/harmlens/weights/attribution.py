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
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from harmlens import keep
from harmlens.keep import files
from harmlens.models import parts as decoder
from harmlens.models.forward import IGNORE, Batch, LanguageModel, Row, collate, require_room
from harmlens.weights.scores import Scores, finite, layer_of, matrices, plus

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


def in_groups(
    lm: LanguageModel, rows: Mapping[Any, Sequence[Row]], kind: Callable[..., Scores] = prune_score
) -> Callable[..., Scores]:
    """The score of some groups of examples together, a function of their names: a sum, each scored once.

    Where all groups' sums would take more than a quarter of the free memory nothing is kept; what is asked
    for is scored anew.
    """
    once = cache(lambda name: kind(lm, rows[name]))
    small = 4 * lm.model.num_parameters() * len(rows) <= files.free_memory(lm.device) // 4

    def score(*names: Any) -> Scores:
        if small:
            return plus(*map(once, names))
        return kind(lm, [row for name in names for row in rows[name]])

    return score


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
    ends = passes[:: max(1, len(passes) - 1)]  # the shortest and the longest examples
    scored: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for chunk in plan.chunks:
        found = matrices(lm, chunk)
        sums = partial(_sums, lm, found, kinds, accumulate_on, plan.buffer)
        scale = 1.0
        if lm.model.dtype == torch.float16:  # the largest that leaves these finite, with some room
            powers = (k for k in (16, 12, 8, 4) if all(map(finite, sums(ends, 2.0**k).values())))
            scale = 2.0 ** (next(powers, 2) - 2)
        for (kind, name), value in sums(passes, scale).items():
            weight = found[name].weight.detach()
            value.mul_((weight if kind == "signed" else weight.abs()).to(value.device)).div_(scale)
            if not finite(value):
                bad = int((~torch.isfinite(value)).sum())
                raise ValueError(
                    f"{bad} {kind} scores of {name} are not finite: load the model with dtype='bfloat16' or "
                    "'float32' and look for examples on which its loss overflows"
                )
            scored[kind][name] = value.cpu() if len(plan.chunks) > 1 else value
    return {kind: Scores(kind, of, lm.name, lm.revision, len(rows)) for kind, of in scored.items()}


# --------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """How scoring will go, and what it takes; all sizes in bytes."""

    chunks: tuple[tuple[int, ...], ...]  # layers scored in each pass over the examples; one chunk is the rule
    max_tokens: int  # of one batch
    buffer: int  # for the gradients of single examples
    weights: int  # of the model itself
    accumulators: int  # of the largest chunk
    activations: int  # of one batch, estimated

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

    found, device = matrices(lm), lm.device
    shapes = {name: module.weight.shape for name, module in found.items()}
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    on_model = accumulate_on is None or torch.device(accumulate_on).type == device.type
    sums, free = Counter[int](), files.free_memory(device)
    for name, shape in shapes.items():
        sums[layer_of(name)] += 4 * len(kinds) * shape.numel() if on_model else 0
    # What one token leaves behind for the backward pass: each layer's inputs and outputs, and its logits, in
    # float32 too. Layers that share their input (query, key, value; gate and up) keep it once; what is
    # counted too often stands for what norms and the nonlinearity keep.
    item = next(iter(found.values())).weight.element_size()
    token = sum(map(sum, shapes.values())) * item + lm.model.config.get_text_config().vocab_size * (item + 8)
    # An eighth of weights and sums, so that peaks stay near what has to be there anyway. With a small model
    # nobody minds more, and larger batches are faster.
    held, longest = weights + sum(sums.values()), max(len(row.ids) for row in rows)
    room = min(held // 8 if held > 256 << 20 else 128 << 20, max(1, free // 4))
    batch = max(longest, room // token if max_tokens is None else max_tokens)
    widest = max(map(max, shapes.values())) * 4
    buffer = max(widest, (1 << 21) if device.type == "cpu" else min(1 << 30, free // 8))
    chunks: list[tuple[int, ...]] = [()]
    for layer, size in sums.items():
        used = sum(sums[other] for other in chunks[-1])
        if chunks[-1] and used + size + batch * token + 2 * buffer > free:
            chunks.append(())
        chunks[-1] += (layer,)
    accumulators = max(sum(sums[layer] for layer in chunk) for chunk in chunks)
    need = accumulators + longest * token + 2 * buffer
    if need > free:
        raise ValueError(
            f"scoring one layer takes {files.size_text(need)} on {device}, but "
            f"{files.size_text(free)} are to be had: choose accumulate_on='cpu', shorter examples, or a "
            "smaller model"
        )
    return Plan(tuple(chunks), batch, buffer, weights, accumulators, batch * token + buffer)


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


def _sums(
    lm: LanguageModel,
    found: Mapping[str, nn.Module],
    kinds: Sequence[str],
    accumulate_on: str | torch.device | None,
    buffer: int,
    passes: Sequence[Batch],
    scale: float,
) -> dict[tuple[str, str], Tensor]:
    """Sums over examples of the found weights' gradients, or of their sizes: (kind, parameter) -> sum."""
    sums = {
        (kind, name): torch.zeros(
            module.weight.shape, dtype=torch.float32, device=accumulate_on or module.weight.device
        )
        for kind, (name, module) in itertools.product(kinds, found.items())
    }
    rooms: dict[torch.device, Tensor] = {}
    shape, start, fired = (0, 0), torch.empty(0), Counter[str]()

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # The graph begins here: blocks below are run without one.
        nonlocal start
        start = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        return ((start, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": start})

    def watch(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        x = inputs[0].detach()
        version = x._version
        if x[..., 0].numel() != math.prod(shape):
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
            if "unsigned" in kinds and x.device not in rooms:
                # Made once: allocating anew for each product costs as much as the product itself.
                rooms[x.device] = torch.empty(max(1, buffer // 4), dtype=x.dtype, device=x.device)
            sides = [t.reshape(*shape, t.shape[-1]) for t in (gradient, x)]
            if not isinstance(module, nn.Linear):  # Conv1D keeps its weight the other way round
                sides.reverse()
            _add(*sides, *(sums.get((kind, name)) for kind in KINDS), rooms.get(x.device))

        if output.requires_grad:
            output.register_hook(collect)

    with ExitStack() as before:
        for module in lm.model.modules():
            before.callback(setattr, module, "training", module.training)
        for parameter in lm.model.parameters():
            before.callback(parameter.requires_grad_, parameter.requires_grad)
        lm.model.eval().requires_grad_(False)
        lowest = decoder.blocks(lm)[min(map(layer_of, found))]
        before.callback(lowest.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for name, module in found.items():
            before.callback(module.register_forward_hook(partial(watch, name)).remove)
        for batch in passes:
            # The last token is predicted and never read.
            ids, wanted = batch.ids[:, :-1].to(lm.device), batch.labels[:, 1:].to(lm.device)
            begin = int((wanted != IGNORE).any(0).int().argmax())  # no logits for what nobody answers
            wanted, shape = wanted[:, begin:], tuple(ids.shape)
            fired.clear()
            with torch.enable_grad():
                logits = lm.model(input_ids=ids, use_cache=False, logits_to_keep=wanted.shape[1]).logits
                gradient = logit_gradient(logits.detach(), wanted.to(logits.device))
                torch.autograd.grad(logits, start, (gradient * scale).to(logits.dtype))
            if wrong := [name for name in found if fired[name] != 1]:
                raise RuntimeError(
                    f"{wrong[0]} was reached {fired[wrong[0]]} times in one pass, not once, so its "
                    "gradients can't be told apart; this architecture can't be scored here"
                )
    return sums


@torch.no_grad()
def _add(
    left: Float[Tensor, "row pos out"],
    right: Float[Tensor, "row pos into"],
    signed: Float[Tensor, "out into"] | None,
    unsigned: Float[Tensor, "out into"] | None,
    room: Float[Tensor, " number"] | None,
) -> None:
    """Add to the sums over rows of left' right and of its size: one product, or that of each row."""
    if unsigned is None:
        whole = left.flatten(0, 1).T, right.flatten(0, 1)
        if signed.dtype == left.dtype and signed.device == left.device:
            signed.addmm_(*whole)
        else:
            signed.add_((whole[0] @ whole[1]).to(signed.device))
        return
    count, (height, width) = len(left), unsigned.shape
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


def _total(each: Float[Tensor, "row out in"]) -> Float[Tensor, "out in"]:
    """Sum over rows in float32; nothing is copied for a single row."""
    return each[0] if len(each) == 1 else each.sum(0, dtype=torch.float32)
