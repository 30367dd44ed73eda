"""Scores of weights: how much each weight of a model does for a set of answers.

For an example x, L(x) is the mean cross-entropy of its answer's tokens. The two scores of the pruning paper
(arXiv 2604.09544, from the authors' released code):

=============  =============================  ==========================================================
prune score    W * sum over x of dL(x)/dW     signed. Setting a weight to zero changes the loss by about
                                              **minus** its score, so *negative* means: this weight
                                              supports the answers
preserve score |W| * sum over x of |dL(x)/dW| unsigned, the absolute value taken for each example
=============  =============================  ==========================================================

**In one pass.** The gradient of one example at a linear layer is the product of the gradient at the
layer's output and its input, over that example's positions. One forward and one backward pass over a batch
thus give every example's gradient for every layer: it is added up as the backward pass reaches the layer,
and no gradient of a weight is ever kept.

The scores cover the linear layers of the decoder blocks. Embeddings, output head, norms and biases have none.
What to do with scores is the business of :mod:`weights.masks`.

Introduced in notebook 09 ("Weights that carry harm").
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from harmlens.models import parts as decoder
from harmlens.models.forward import IGNORE, Batch, LanguageModel, Row
from harmlens.weights.scores import Scores, matrices, require_finite
from harmlens.weights.scoring import KINDS, Plan, State, Store, batches, check_rows, fingerprint, make_plan

# --------------------------------------------------------------------------- the two scores


def prune_score(lm: LanguageModel, rows: Sequence[Row], **options) -> Scores:
    """W * sum over x of dL(x)/dW: the most negative support the answers most. See :func:`attribute`."""
    return attribute(lm, rows, kinds=("signed",), **options)["signed"]


def preserve_score(lm: LanguageModel, rows: Sequence[Row], **options) -> Scores:
    """|W| * sum over x of |dL(x)/dW|: the largest weights matter most. See :func:`attribute`."""
    return attribute(lm, rows, kinds=("unsigned",), **options)["unsigned"]


def attribute(
    lm: LanguageModel,
    rows: Sequence[Row],
    *,
    kinds: Sequence[str] = KINDS,
    layers: Sequence[int] | None = None,
    max_length: int | None = None,
    max_tokens: int | None = None,
    accumulate_on: str | torch.device | None = None,
    budget: int | None = None,
    folder: Path | str | None = None,
    save_every: float = 300.0,
    progress: str | None = None,
) -> dict[str, Scores]:
    """Signed and unsigned scores of all block weights for some examples, in one pass.

    Gradients are taken in the model's precision and added up in float32. In float16 the loss is scaled, so
    that small gradients don't vanish.

    Args:
        rows: examples: token ids, and which of them are the answer; see :mod:`asking.calibration`.
        kinds: out of ``"signed"`` and ``"unsigned"``.
        layers: blocks to score; None for all.
        max_length: longest example allowed, in tokens; None for what the model allows.
        max_tokens: most tokens in one batch; None for as many as the plan allows.
        accumulate_on: device of the sums, ``"cpu"`` for host memory; None for each weight's own device.
        budget: bytes that scoring may take on top of the weights; None for what is free.
        folder: where finished scores are stored and an interrupted run goes on; None keeps nothing. A second
            process waits for the first.
        save_every: seconds between two saves of an unfinished run.
        progress: label of a progress bar, shown on a terminal only; None for none.

    Returns:
        Scores by kind, on ``accumulate_on``; on the CPU where layers had to be taken in turns.

    Raises:
        ValueError: before the model is touched: no rows, an answer without tokens, an example that is too
            long, unknown kinds, layers or stored scores of something else, too little memory for even one
            layer. Afterwards: a score that is not finite.
    """
    plan = make_plan(
        lm, rows, kinds=kinds, layers=layers, max_length=max_length, max_tokens=max_tokens,
        accumulate_on=accumulate_on, budget=budget,
    )  # fmt: skip
    store = Store(folder, "" if folder is None else fingerprint(lm, rows, layers), tuple(kinds))
    with store.alone():
        if (done := store.finished()) is not None:
            return done
        return _attribute(lm, rows, plan, store, layers, accumulate_on, save_every, progress)


def _attribute(
    lm: LanguageModel,
    rows: Sequence[Row],
    plan: Plan,
    store: Store,
    layers: Sequence[int] | None,
    accumulate_on: str | torch.device | None,
    save_every: float,
    progress: str | None,
) -> dict[str, Scores]:
    kinds = store.kinds
    values, state = store.resume()
    if state.chunks:  # the plan that was begun, whatever is free now
        plan = replace(plan, chunks=state.chunks, max_tokens=state.max_tokens, buffer=state.buffer)
    passes = list(batches(rows, plan.max_tokens, lm.tokenizer.pad_token_id))
    hidden = True if progress is None else None  # None: shown on a terminal, not in a page or a log
    bar = tqdm(total=len(passes) * len(plan.chunks), initial=state.chunk * len(passes) + state.batch,
               desc=progress, disable=hidden, leave=False)  # fmt: skip
    scale = _loss_scale(lm, passes[:: max(1, len(passes) - 1)])  # the shortest and the longest examples
    saved = time.monotonic()
    for chunk in range(state.chunk, len(plan.chunks)):
        found = matrices(lm, plan.chunks[chunk])
        first = state.batch if chunk == state.chunk else 0
        if not first:
            for kind in kinds:
                for name, module in found.items():
                    where = accumulate_on or module.weight.device
                    values[kind, name] = torch.zeros(module.weight.shape, dtype=torch.float32, device=where)
        else:
            for key in [(kind, name) for kind in kinds for name in found]:
                values[key] = values[key].to(accumulate_on or found[key[1]].weight.device)
        with _collecting(lm, found, min(plan.chunks[chunk]), values, kinds, plan.buffer) as run:
            for number in range(first, len(passes)):
                run(passes[number], scale)
                bar.update()
                if time.monotonic() - saved >= save_every:
                    store.save(values, State(chunk, number + 1, plan.chunks, plan.max_tokens, plan.buffer))
                    saved = time.monotonic()
        for kind, name in [(kind, name) for kind in kinds for name in found]:
            value, weight = values[kind, name], found[name].weight.detach()
            value.mul_((weight if kind == "signed" else weight.abs()).to(value.device)).div_(scale)
            require_finite(kind, name, value)
            if len(plan.chunks) > 1:
                values[kind, name] = value.cpu()
    bar.close()
    out = {}
    for kind in kinds:
        mine = {name: values[kind, name] for name in matrices(lm, layers)}
        out[kind] = Scores(kind, mine, lm.name, lm.revision, len(rows), store.fingerprint)
    store.finish(out)
    return out


@torch.no_grad()
def wanda(
    lm: LanguageModel, rows: Sequence[Row], *, layers: Sequence[int] | None = None, max_tokens: int = 4096
) -> Scores:
    """|W| times the root mean square of the weight's input over answer tokens (Sun et al. 2024)."""
    check_rows(lm, rows, None)
    found = matrices(lm, layers)
    sums = {name: 0.0 for name in found}
    count = 0
    with ExitStack() as hooks:
        current: list[Tensor] = []

        def watch(name: str, module: nn.Module) -> None:
            def hook(module: nn.Module, inputs: tuple) -> None:
                _require_all_tokens(name, inputs[0], current[0].shape)
                x = inputs[0].reshape(*current[0].shape, -1)[current[0].to(inputs[0].device)].float()
                sums[name] = sums[name] + x.square().sum(0)

            hooks.callback(module.register_forward_pre_hook(hook).remove)

        for name, module in found.items():
            watch(name, module)
        for batch in batches(rows, max_tokens, lm.tokenizer.pad_token_id):
            current[:] = [batch.labels != IGNORE]
            count += int(current[0].sum())
            lm.model(input_ids=batch.ids.to(lm.device), use_cache=False, logits_to_keep=1)
    values = {}
    for name, module in found.items():
        size, weight = (sums[name] / count).sqrt(), module.weight.detach().float().abs()
        values[name] = weight * (size if isinstance(module, nn.Linear) else size[:, None])
        require_finite("wanda", name, values[name])
    return Scores("wanda", values, lm.name, lm.revision, len(rows))


# --------------------------------------------------------------------------- the pass


def logit_gradient(
    logits: Float[Tensor, "row pos vocab"], wanted: Int[Tensor, "row pos"]
) -> Float[Tensor, "row pos vocab"]:
    """Gradient of the sum over rows of L at the logits, where L is a row's mean cross-entropy.

    That of a wanted token is p - 1, which float32 has lost where the model is sure of it; what all other
    tokens get, taken negatively, is the same number in full precision.

    Args:
        wanted: the token to be predicted at each position, ``IGNORE`` outside the answer.
    """
    learnt = wanted != IGNORE
    out, token = logits.float().log_softmax(-1).exp(), wanted.clamp(min=0)[..., None]
    out.scatter_(-1, token, 0.0)
    out.scatter_(-1, token, -out.sum(-1, keepdim=True))
    return out * (learnt / learnt.sum(-1, keepdim=True).clamp(min=1))[..., None]


@contextmanager
def _collecting(
    lm: LanguageModel,
    found: Mapping[str, nn.Module],
    lowest: int,
    values: dict[tuple[str, str], Tensor],
    kinds: Sequence[str],
    buffer: int,
) -> Iterator[Callable[[Batch, float], None]]:
    """Run batches forward and backward; gradients at the found layers are added to ``values``."""
    shape: list[tuple[int, int]] = []
    start: list[Tensor] = []
    fired: dict[str, int] = {}
    rooms: dict[torch.device, Tensor] = {}

    def room(device: torch.device) -> Tensor:
        # Made once: allocating anew for each product costs as much as the product itself.
        if device not in rooms:
            rooms[device] = torch.empty(max(1, buffer // 4), dtype=lm.model.dtype, device=device)
        return rooms[device]

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # The graph begins here: blocks below are run without one.
        hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        start[:] = [hidden]
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            x = inputs[0].detach()
            _require_all_tokens(name, x, shape[0])
            if output.requires_grad:
                version = x._version
                output.register_hook(lambda gradient: collect(name, module, x, gradient, version))

        return hook

    def collect(name: str, module: nn.Module, x: Tensor, gradient: Tensor, version: int) -> None:
        if x._version != version:
            raise RuntimeError(
                f"the input of {name} was changed in place behind it, so its gradients aren't known; this "
                "architecture can't be scored here"
            )
        fired[name] = fired.get(name, 0) + 1
        x, gradient = (t.reshape(*shape[0], t.shape[-1]) for t in (x, gradient))
        # Conv1D keeps its weight the other way round.
        left, right = (gradient, x) if isinstance(module, nn.Linear) else (x, gradient)
        _add(left, right, *(values.get((kind, name)) for kind in KINDS), room(x.device))

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
        wrong = [name for name in found if fired.get(name, 0) != 1]
        if wrong:
            raise RuntimeError(
                f"{wrong[0]} was reached {fired.get(wrong[0], 0)} times in one pass, not once, so its "
                "gradients can't be told apart; this architecture can't be scored here"
            )

    learning = {name: p.requires_grad for name, p in lm.model.named_parameters()}
    training = [(module, module.training) for module in lm.model.modules()]
    with ExitStack() as hooks:
        try:
            lm.model.eval().requires_grad_(False)
            entry = decoder.blocks(lm)[lowest].register_forward_pre_hook(enter, with_kwargs=True)
            hooks.callback(entry.remove)
            for name, module in found.items():
                hooks.callback(module.register_forward_hook(watch(name)).remove)
            yield run
        finally:
            for module, was in training:
                module.training = was
            for name, parameter in lm.model.named_parameters():
                parameter.requires_grad_(learning[name])


def _require_all_tokens(name: str, x: Tensor, shape: Sequence[int]) -> None:
    if x[..., 0].numel() != math.prod(shape):
        raise ValueError(
            f"{name} is given some of the tokens only, as a routed expert is, so it is not known whose they "
            "are; choose a dense model"
        )


@torch.no_grad()
def _add(
    left: Float[Tensor, "row pos out"],
    right: Float[Tensor, "row pos in"],
    signed: Float[Tensor, "out in"] | None,
    unsigned: Float[Tensor, "out in"] | None,
    room: Float[Tensor, " size"],
) -> None:
    """Add the sum over rows of left' right to ``signed``, and that of its absolute value to ``unsigned``.

    Products of single rows are made in ``room``.
    """
    if unsigned is None:
        whole = left.flatten(0, 1).T, right.flatten(0, 1)
        if signed.dtype == left.dtype and signed.device == left.device:
            signed.addmm_(*whole)
        else:
            signed.add_((whole[0] @ whole[1]).to(signed.device))
        return
    count, (height, width) = len(left), unsigned.shape
    # Some lines of the matrix at a time, so that the products are still in the cache when they are summed.
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


def _loss_scale(lm: LanguageModel, some: Sequence[Batch]) -> float:
    """1, or for float16 the largest power of two that leaves gradients finite, with some room.

    Looked at for a few batches: the gradients at the layers' outputs, and what they give for the weights.
    """
    if lm.model.dtype != torch.float16:
        return 1.0
    found = matrices(lm)
    sizes: list[float] = []

    def look(x: Tensor, gradient: Tensor) -> None:
        # Largest values: at the output, for each example's weights, and for all examples together.
        each = [g.T @ i for g, i in zip(gradient, x, strict=True)]
        whole = gradient.flatten(0, 1).T @ x.flatten(0, 1)
        sizes.extend(t.abs().amax().item() for t in (gradient, whole, *each))

    def watch(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if output.requires_grad:
            x, shape = inputs[0].detach(), shapes[-1]
            output.register_hook(lambda g: look(x.reshape(*shape, -1), g.reshape(*shape, -1)))

    shapes: list[tuple[int, ...]] = []
    for power in (16, 12, 8, 4, 0):
        sizes.clear()
        with ExitStack() as hooks:
            for module in found.values():
                hooks.callback(module.register_forward_hook(watch).remove)
            with _collecting(lm, {}, 0, {}, (), 1) as run:
                for batch in some:
                    shapes.append((len(batch.ids), batch.ids.shape[1] - 1))
                    run(batch, 2.0**power)
        if all(map(math.isfinite, sizes)):
            return 2.0 ** max(0, power - 2)
    return 1.0
