"""Effects of single MLP hidden units and of sets of them.

A *neuron* here is a hidden unit of an MLP: one coordinate of the input of its last projection. Unit i writes
a_i * w_i into the residual stream, where w_i is column i of that projection.

In the **last** block nothing but the final norm and the head follows, so that the effect of a unit at the
last position has a closed form: with the unpatched residual stream r, the norm's gain g and row u_v of the
head,

    logit_v = (r + da_i w_i) . (g * u_v) / sigma_i,   sigma_i^2 = mean((r + da_i w_i)^2) + eps,

and all of it comes out of a few matrix products for all units of all pairs at once. It equals real patching,
the change of the norm's scale included. Before it is used it is held against the model's own norm and head;
where it does not hold (a norm behind the MLP, say) the same is computed through the model's own modules.

In other layers :func:`screen` gives first-order estimates, to be confirmed by real patching
(:func:`set_effects`).

Introduced in notebook 05 ("Neurons").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from harmlens.evidence import stats
from harmlens.flow import lastblock, partial, patching, runs
from harmlens.flow.outcomes import Replies, Reply
from harmlens.flow.runs import Group
from harmlens.models import parts as decoder
from harmlens.models.chats import Pair
from harmlens.models.forward import LanguageModel

Sets = Mapping[Any, Sequence[int]] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class NeuronEffects:
    """Effects of single hidden units, or of sets of them, in one MLP at the last prompt position.

    Attributes:
        layer: of the MLP.
        labels: what the columns are: units by their index, or names of sets.
        pairs: ids of the pairs.
        direction: ``"denoising"`` (effects are NIE) or ``"noising"`` (TIE).
        y1, y0: outcomes of the unpatched runs.
        effects: in units of the outcome, with the sign of the total effect.
        whole: effect of the whole MLP output, patched at the same position.
        sizes: Euclidean norm of what each patch changes in the MLP's output.
        method: ``"closed form"``, ``"patching"`` or ``"first order"``.
    """

    layer: int
    labels: tuple[Any, ...]
    pairs: tuple[str, ...]
    direction: str
    y1: Float[Tensor, " pair"]
    y0: Float[Tensor, " pair"]
    effects: Float[Tensor, "pair label"]
    whole: Float[Tensor, " pair"]
    sizes: Float[Tensor, "pair label"]
    method: str

    @property
    def total(self) -> Float[Tensor, " pair"]:
        """TE = Y(x1) - Y(x0)."""
        return self.y1 - self.y0

    @property
    def share(self) -> Float[Tensor, " label"]:
        """Normalised effects: mean over pairs over the mean total effect."""
        return self.effects.mean(0) / self.total.mean()

    def at(self, label: Any) -> Float[Tensor, " pair"]:
        """Effects of one unit or set, by its label."""
        if label not in self.labels:
            raise ValueError(f"label={label!r} was not patched; there are {len(self.labels)}")
        return self.effects[:, self.labels.index(label)]

    def normalized(self, label: Any) -> stats.Estimate:
        """Normalised effect of one unit or set, with its bootstrap interval over pairs."""
        return stats.ratio_of_means(self.at(label), self.total)


# --------------------------------------------------------------------------- the last layer


def last_layer(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    outcome: Any,
    *,
    direction: str = "denoising",
    max_values: int = 1 << 22,
    batch_size: int = 128,
    progress: str | None = None,
) -> NeuronEffects:
    """Effect of every hidden unit of the last MLP at the last prompt position, exactly.

    Args:
        outcome: as for :func:`flow.patching.sweep`.
        direction: ``"denoising"`` (NIE) or ``"noising"`` (TIE).
        max_values: most numbers held at once (pairs times units times what is read of each); bounds memory.
        batch_size: most pairs recorded at once.
        progress: label of a progress bar; shown on a terminal only.

    Returns:
        One column for each unit, in the model's order. ``method`` says whether the closed form held.

    Raises:
        ValueError: bad pairs (see :func:`flow.runs.encode`), an MLP without a single output projection.
    """

    def singles(last: lastblock.Last) -> tuple[Tensor, Tensor]:
        sizes = last.delta.abs() * last.weight.norm(dim=0)
        return lastblock.one_more(last, last.resid, max_values), sizes

    return _last(lm, pairs, outcome, None, singles, direction, batch_size, progress)


def set_effects(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    outcome: Any,
    sets: Sets,
    *,
    layer: int | None = None,
    direction: str = "denoising",
    max_values: int = 1 << 22,
    batch_size: int = 128,
) -> NeuronEffects:
    """Joint effect of sets of hidden units of one MLP, patched together at the last prompt position.

    Args:
        sets: name -> units, or a list of units for each set (labels are then 0, 1, ...). An empty set has
            no effect.
        layer: None or -1 for the last one; others go through :func:`flow.patching.sweep`.

    Raises:
        ValueError: no sets, a layer or a unit that the model does not have, a unit twice in one set.
    """
    parts = partial.patchable(lm)
    layer = parts.depth - 1 if layer in (None, -1) else layer
    if not 0 <= layer < parts.depth:
        raise ValueError(f"layer={layer} does not exist; choose 0 to {parts.depth - 1}")
    count = decoder.projection_weight(decoder.mlp(parts.blocks[layer])).shape[1]
    named = dict(sets) if isinstance(sets, Mapping) else dict(enumerate(sets))
    _check_sets(named, count)
    labels = tuple(named)
    if layer < parts.depth - 1:
        return _swept(lm, pairs, outcome, named, layer, direction, batch_size)

    def joint(last: lastblock.Last) -> tuple[Tensor, Tensor]:
        values, sizes, some = [], [], list(named.values())
        step = max(1, max_values // (len(last.delta) * last.breadth))
        for tile in (some[k : k + step] for k in range(0, len(some), step)):
            change = torch.stack([last.delta[:, list(s)] @ last.weight[:, list(s)].T for s in tile], dim=1)
            values.append(last.value(change))
            sizes.append(change.norm(dim=-1))
        return torch.cat(values, dim=1), torch.cat(sizes, dim=1)

    return _last(lm, pairs, outcome, labels, joint, direction, batch_size, None)


@torch.no_grad()
def greedy(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    outcome: Any,
    k: int,
    *,
    sign: int = 1,
    direction: str = "denoising",
    max_values: int = 1 << 22,
) -> list[int]:
    """Units of the last MLP in the order in which each adds most to the mean effect of those before it.

    Args:
        k: how many.
        sign: -1 looks for the most negative joint effect.

    Raises:
        ValueError: k outside 1 to the number of units; bad pairs.
    """
    if isinstance(outcome, Replies):
        raise ValueError(
            "outcome: greedy needs one outcome, such as Y1; it can't use a difference of replies"
        )
    groups = list(lastblock.groups(lm, pairs, outcome, direction, 128))
    count = groups[0].delta.shape[1]
    if not 1 <= k <= count:
        raise ValueError(f"k={k} must lie between 1 and the number of units, {count}")
    toward = sign if direction == "denoising" else -sign  # noising lowers the outcome where it has an effect
    chosen: list[int] = []
    resid = [last.resid.clone() for last in groups]
    for _ in range(k):
        score = sum(
            lastblock.one_more(last, r, max_values).sum(0) for last, r in zip(groups, resid, strict=True)
        )
        score = toward * score
        score[chosen] = -torch.inf
        best = int(score.argmax())
        chosen.append(best)
        for last, r in zip(groups, resid, strict=True):
            r += last.delta[:, best, None] * last.weight[:, best]
    return chosen


def recovery(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    outcome: Any,
    order: Sequence[int],
    ks: Sequence[int] | None = None,
    *,
    layer: int | None = None,
    direction: str = "denoising",
) -> NeuronEffects:
    """Joint effect of the first k units of an order, for each k; labels are the k.

    Divide by ``whole`` for the share of the MLP's effect that k units recover.

    Raises:
        ValueError: a k outside 0 to the length of the order.
    """
    ks = range(1, len(order) + 1) if ks is None else ks
    if not ks or min(ks) < 0 or max(ks) > len(order):
        raise ValueError(f"ks must lie between 0 and the length of the order, {len(order)}")
    sets = {k: list(order[:k]) for k in ks}
    return set_effects(lm, pairs, outcome, sets, layer=layer, direction=direction)


# --------------------------------------------------------------------------- other layers


@torch.no_grad()
def screen(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    outcome: Any,
    *,
    layers: Sequence[int] | None = None,
    direction: str = "denoising",
    batch_size: int = 128,
) -> dict[int, NeuronEffects]:
    """First-order estimates for every hidden unit of every MLP at the last position: attribution patching.

    The estimate is (a_source - a_base) * dY/da at the base run (one backward pass for all units). Rank
    with it, then confirm what it finds with :func:`set_effects`. TransformerLens' ``attribution_patch``
    scores whole modules and heads, not hidden units; summed over the units of one MLP these are its
    scores.

    Returns:
        layer -> effects with ``method="first order"``; ``whole`` is the sum over units.

    Raises:
        ValueError: a layer that does not exist; bad pairs.
    """
    parts = partial.patchable(lm)
    chosen = decoder.some_layers(parts, layers)
    if isinstance(outcome, Replies | Reply):
        raise ValueError("outcome: the screen reads the first word; use a first-token outcome such as Y1")
    encoded = runs.encode(lm, pairs, outcome, "last")
    n, toward = len(pairs), 1.0 if direction == "denoising" else -1.0
    patching.check_direction(direction)
    y1, y0 = torch.zeros(n), torch.zeros(n)
    effects: dict[int, list] = {layer: [None] * n for layer in chosen}
    sizes: dict[int, list] = {layer: [None] * n for layer in chosen}
    for group in runs.groups(lm, parts, encoded, details=["hidden"], size=batch_size):
        y1[group.index], y0[group.index] = (group.unpatched(r).cpu() for r in (group.x1, group.x0))
        base, source = group.runs(direction)
        side = 1 if direction == "denoising" else 0
        ids = torch.tensor([encoded.sides[i][side] for i in group.index], device=lm.device)
        grads = _gradients(group, ids, chosen)
        for layer in chosen:
            delta = (source.hidden[layer][:, -1] - base.hidden[layer][:, -1]).float()
            written = decoder.projection_weight(decoder.mlp(parts.blocks[layer])).float().norm(dim=0)
            for row, i in enumerate(group.index):
                effects[layer][i] = toward * (delta[row] * grads[layer][row]).cpu()
                sizes[layer][i] = (delta[row].abs() * written).detach().cpu()
    out = {}
    for layer in chosen:
        units = torch.stack(effects[layer])
        out[layer] = NeuronEffects(
            layer, tuple(range(units.shape[1])), tuple(p.id for p in pairs), direction, y1, y0, units,
            units.sum(1), torch.stack(sizes[layer]), "first order",
        )  # fmt: skip
    return out


def _gradients(group: Group, ids: Tensor, layers: Sequence[int]) -> dict[int, Float[Tensor, "pair unit"]]:
    """dY/da of the hidden units at the last position, in an ordinary run of the whole model."""
    parts, kept = group.parts, {}

    def keep(layer: int) -> Callable:
        def hook(_: Any, inputs: tuple) -> tuple:
            hidden = inputs[0].detach().requires_grad_() if not inputs[0].requires_grad else inputs[0]
            hidden.retain_grad()
            kept[layer] = hidden
            return (hidden, *inputs[1:])

        return hook

    grown: list[Tensor] = []
    with ExitStack() as held, torch.enable_grad():
        for layer in layers:
            linear = decoder.projection(decoder.mlp(parts.blocks[layer]))
            held.callback(linear.register_forward_pre_hook(keep(layer)).remove)
        last = parts.blocks[-1].register_forward_hook(lambda m, i, o: grown.append(decoder.first(o)))
        held.callback(last.remove)
        for p in parts.model.parameters():
            held.callback(p.requires_grad_, p.requires_grad)
            p.requires_grad_(False)
        parts.base(input_ids=ids, use_cache=False)
        value = group.outcome(grown[0][:, -1:], torch.arange(len(ids)))
        value.sum().backward()
    return {layer: hidden.grad[:, -1].float() for layer, hidden in kept.items()}


def _swept(
    lm: LanguageModel, pairs: Sequence[Pair], outcome: Any, named: dict, layer: int, direction: str,
    batch: int,
) -> NeuronEffects:  # fmt: skip
    units = {str(name): {layer: tuple(some)} for name, some in named.items()}
    swept = patching.sweep(
        lm, pairs, outcome, sites=("neurons", "mlp_out"), units=units, layers=[layer], direction=direction,
        batch_size=batch,
    )  # fmt: skip
    effects, sizes = swept.effects[:, 0, 0].T, swept.size[:, 0, 0].T
    return NeuronEffects(
        layer, tuple(named), swept.pairs, direction, swept.y1, swept.y0, effects[:, :-1], effects[:, -1],
        sizes[:, :-1], "patching",
    )  # fmt: skip


# --------------------------------------------------------------------------- sets


def top_k(effects: NeuronEffects | Float[Tensor, " unit"], k: int, *, sign: int = 1) -> list[int]:
    """The k units with the largest mean effect (the most negative ones with ``sign=-1``), best first."""
    mean = effects.effects.mean(0) if isinstance(effects, NeuronEffects) else effects
    if not 1 <= k <= len(mean):
        raise ValueError(f"k={k} must lie between 1 and the number of units, {len(mean)}")
    return (sign * mean).argsort(descending=True, stable=True)[:k].tolist()


def blocks(
    n_units: int, size: int, stride: int | None = None, *, order: Sequence[int] | None = None
) -> list[list[int]]:
    """Contiguous blocks of units; the last one may be shorter.

    Args:
        stride: from block to block; default ``size`` (no overlap).
        order: a permutation of the units: blocks are then contiguous in *that* order.

    >>> blocks(5, 2)
    [[0, 1], [2, 3], [4]]
    """
    stride = size if stride is None else stride
    if size < 1 or stride < 1:
        raise ValueError(f"size={size} and stride={stride} must be at least 1")
    order = list(range(n_units)) if order is None else list(order)
    if sorted(order) != list(range(n_units)):
        raise ValueError(f"order must be a permutation of 0 to {n_units - 1}")
    starts = range(0, max(1, n_units - size + stride), stride)
    return [order[s : s + size] for s in starts if order[s : s + size]]


def refine(
    effect_of_sets: Callable[[list[list[int]]], Sequence[float]],
    blocks: Sequence[Sequence[int]],
    *,
    keep: int = 4,
) -> list[tuple[list[list[int]], np.ndarray]]:
    """Hierarchical search: split the best blocks in halves, down to single units.

    Args:
        effect_of_sets: gives one number for each set of units, larger being better.
        keep: how many blocks are split at each level.

    Returns:
        For each level the blocks that were tried and their effects; the last level holds single units.

    Raises:
        ValueError: no blocks, or keep below 1.
    """
    if not blocks or keep < 1:
        raise ValueError(f"give at least one block and keep of at least 1, got {len(blocks)} and {keep}")
    level, out = [list(block) for block in blocks], []
    while True:
        scores = np.asarray(effect_of_sets(level), dtype=float)
        out.append((level, scores))
        best = [level[i] for i in np.argsort(-scores, kind="stable")[:keep]]
        if max(map(len, best)) == 1:
            return out
        halves = [half for b in best for half in (b[: (len(b) + 1) // 2], b[(len(b) + 1) // 2 :]) if half]
        level = [
            list(units) for units in dict.fromkeys(map(tuple, halves))
        ]  # overlapping blocks share halves


# --------------------------------------------------------------------------- checks and order


@torch.no_grad()
def _last(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    outcome: Any,
    labels: tuple | None,
    compute: Callable[[lastblock.Last], tuple[Tensor, Tensor]],
    direction: str,
    batch_size: int,
    progress: str | None,
) -> NeuronEffects:
    """Run ``compute`` (patched outcomes and sizes [pair, label]) on every group; put the pairs in order."""
    patching.check_direction(direction)
    if isinstance(outcome, Replies):
        a, b = (
            _last(lm, pairs, o, labels, compute, direction, batch_size, progress) for o in outcome.parts()
        )
        values = {f: getattr(a, f) - getattr(b, f) for f in ("y1", "y0", "effects", "whole")}
        return NeuronEffects(
            a.layer, a.labels, a.pairs, direction, values["y1"], values["y0"], values["effects"],
            values["whole"], a.sizes, a.method,
        )  # fmt: skip
    rows: dict[int, tuple[Tensor, ...]] = {}
    methods = set()
    hidden = True if progress is None else None
    with tqdm(total=len(pairs), desc=progress, disable=hidden, leave=False) as bar:
        for last in lastblock.groups(lm, pairs, outcome, direction, batch_size):
            group = last.group
            values, sizes = compute(last)
            whole = last.value(last.change[:, None])[:, 0]
            columns = (group.unpatched(group.x1), group.unpatched(group.x0), values, whole, sizes)
            for row, i in enumerate(group.index):
                rows[i] = tuple(c[row].float().cpu() for c in columns)
            methods.add("closed form" if last.form is not None else "patching")
            bar.update(len(group.index))
    y1, y0, values, whole, sizes = (
        torch.stack(c) for c in zip(*(rows[i] for i in range(len(pairs))), strict=True)
    )
    if not torch.isfinite(values).all():
        raise ValueError("outcome: is not finite; load the model with dtype='bfloat16' or 'float32'")
    if direction == "denoising":
        values, whole = values - y0[:, None], whole - y0
    else:
        values, whole = y1[:, None] - values, y1 - whole
    return NeuronEffects(
        group.parts.depth - 1, tuple(range(values.shape[1])) if labels is None else labels,
        tuple(p.id for p in pairs), direction, y1, y0, values, whole, sizes, " and ".join(sorted(methods)),
    )  # fmt: skip


def _check_sets(sets: Mapping[Any, Sequence[int]], count: int) -> None:
    if not sets:
        raise ValueError("sets is empty: give at least one set of units")
    for name, units in sets.items():
        outside = [u for u in units if not 0 <= u < count]
        if outside:
            raise ValueError(f"sets: {name!r} holds units {outside[:5]}; the MLP has 0 to {count - 1}")
        if len(set(units)) < len(units):
            raise ValueError(f"sets: {name!r} holds a unit twice")
