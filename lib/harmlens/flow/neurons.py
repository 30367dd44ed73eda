"""Effects of single MLP hidden units and of sets of them.

A *neuron* here is a hidden unit of an MLP: one coordinate of the input of its last projection. Unit i writes
a_i * w_i into the residual stream, where w_i is column i of that projection.

In the **last** block nothing but the final norm and the head follows, so that the effect of a unit at the
last position has a closed form: with the unpatched residual stream r, the norm's gain g and row u_v of the
head,

    logit_v = (r + da_i w_i) . (g * u_v) / sigma_i,   sigma_i^2 = mean((r + da_i w_i)^2) + eps,

for all units of all pairs at once. It equals real patching, the change of the norm's scale included
(:mod:`flow.lastblock`). In other layers :func:`screen` gives first-order estimates, to be confirmed by real
patching (:func:`set_effects`).

Introduced in notebook 05 ("Neurons").
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from harmlens.flow import lastblock, patching
from harmlens.flow.engine import patchable
from harmlens.flow.interventions import shown
from harmlens.flow.outcomes import Replies, Reply
from harmlens.flow.record import Group, record_pairs
from harmlens.models import parts as decoder
from harmlens.models.chats import Pair
from harmlens.models.forward import LanguageModel

Sets = Mapping[Any, Sequence[int]] | Sequence[Sequence[int]]
MOST_VALUES = 1 << 22  # numbers held at once (pairs times units times what is read of each); bounds memory


@dataclass(frozen=True)
class NeuronEffects:
    """Effects of single hidden units, or of sets of them, in one MLP at the last prompt position.

    Attributes:
        layer: of the MLP.
        labels: what the columns are: units by their index, or names of sets.
        y1, y0: outcomes of the unpatched runs.
        effects: in units of the outcome, with the sign of the total effect.
        whole: effect of the whole MLP output, patched at the same position.
        sizes: Euclidean norm of what each patch changes in the MLP's output.
        method: ``"closed form"`` or ``"patching"``.
    """

    layer: int
    labels: tuple[Any, ...]
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


# --------------------------------------------------------------------------- the last layer


def last_layer(
    lm: LanguageModel, pairs: Sequence[Pair], outcome: Any, *, direction: str = "denoising"
) -> NeuronEffects:
    """Effect of every hidden unit of the last MLP at the last prompt position, exactly.

    Args:
        outcome: as for :func:`flow.patching.patch`.
        direction: ``"denoising"`` (NIE) or ``"noising"`` (TIE).

    Returns:
        One column for each unit, in the model's order. ``method`` says whether the closed form held.

    Raises:
        ValueError: bad pairs (see :func:`flow.record.record_pairs`), an MLP without one output projection.
    """

    def singles(last: lastblock.Last) -> tuple[Tensor, Tensor]:
        sizes = last.delta.abs() * last.weight.norm(dim=0)
        return lastblock.one_more(last, last.resid, MOST_VALUES), sizes

    return _last(lm, pairs, outcome, None, singles, direction)


def set_effects(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    outcome: Any,
    sets: Sets,
    *,
    layer: int | None = None,
    direction: str = "denoising",
) -> NeuronEffects:
    """Joint effect of sets of hidden units of one MLP, patched together at the last prompt position.

    Args:
        sets: name -> units, or a list of units for each set (labels are then 0, 1, ...). An empty set has
            no effect.
        layer: None or -1 for the last one; others go through :func:`flow.patching.patch`.

    Raises:
        ValueError: no sets, a layer or a unit that the model does not have, a unit twice in one set.
    """
    parts = patchable(lm)
    layer = parts.depth - 1 if layer in (None, -1) else layer
    if not 0 <= layer < parts.depth:
        raise ValueError(f"layer={layer} does not exist; choose 0 to {parts.depth - 1}")
    named = dict(sets) if isinstance(sets, Mapping) else dict(enumerate(sets))
    _check_sets(named, decoder.projection_weight(decoder.mlp(parts.blocks[layer])).shape[1])
    if layer < parts.depth - 1:
        units = {str(name): {layer: tuple(some)} for name, some in named.items()}
        sites = (units, "mlp_out")
        swept = patching.patch(lm, pairs, outcome, sites=sites, layers=[layer], direction=direction)
        effects, sizes = swept.effects[:, 0, 0].T, swept.size[:, 0, 0].T
        return NeuronEffects(
            layer,
            tuple(named),
            swept.y1,
            swept.y0,
            effects[:, :-1],
            effects[:, -1],
            sizes[:, :-1],
            "patching",
        )

    def joint(last: lastblock.Last) -> tuple[Tensor, Tensor]:
        values, sizes, some = [], [], list(named.values())
        step = max(1, MOST_VALUES // (len(last.delta) * last.breadth))
        for tile in (some[k : k + step] for k in range(0, len(some), step)):
            change = torch.stack([last.delta[:, list(s)] @ last.weight[:, list(s)].T for s in tile], dim=1)
            values.append(last.value(change))
            sizes.append(change.norm(dim=-1))
        return torch.cat(values, dim=1), torch.cat(sizes, dim=1)

    return _last(lm, pairs, outcome, tuple(named), joint, direction)


@torch.no_grad()
def greedy(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    outcome: Any,
    k: int,
    *,
    sign: int = 1,
    direction: str = "denoising",
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
    groups = list(lastblock.last_blocks(lm, pairs, outcome, direction))
    count = groups[0].delta.shape[1]
    if not 1 <= k <= count:
        raise ValueError(f"k={k} must lie between 1 and the number of units, {count}")
    toward = sign if direction == "denoising" else -sign  # noising lowers the outcome where it has an effect
    chosen: list[int] = []
    resid = [last.resid.clone() for last in groups]
    for _ in range(k):
        score = sum(
            lastblock.one_more(last, r, MOST_VALUES).sum(0) for last, r in zip(groups, resid, strict=True)
        )
        score = toward * score
        score[chosen] = -torch.inf
        best = int(score.argmax())
        chosen.append(best)
        for last, r in zip(groups, resid, strict=True):
            r += last.delta[:, best, None] * last.weight[:, best]
    return chosen


# --------------------------------------------------------------------------- other layers


@torch.no_grad()
def screen(
    lm: LanguageModel, pairs: Sequence[Pair], outcome: Any, *, direction: str = "denoising"
) -> dict[int, Float[Tensor, " unit"]]:
    """Attribution patching: first-order estimates for every hidden unit of every MLP at the last position.

    The estimate is (a_source - a_base) * dY/da at the base run (one backward pass for all units). Rank
    with it, then confirm what it finds with :func:`set_effects`. The sums over the units of an MLP are the
    scores of TransformerLens' ``attribution_patch``.

    Returns:
        layer -> mean over pairs, with the sign of the total effect.

    Raises:
        ValueError: an outcome of more than the first word; bad pairs.
    """
    parts = patchable(lm)
    layers = range(parts.depth)
    if isinstance(outcome, Replies | Reply):
        raise ValueError("outcome: the screen reads the first word; use a first-token outcome such as Y1")
    patching.check_direction(direction)
    denoising = direction == "denoising"
    effects: dict[int, list] = {layer: [None] * len(pairs) for layer in layers}
    for group in record_pairs(lm, parts, pairs, outcome, details=["hidden"]):
        base, source = group.runs(direction)
        x1, x0 = group.ids.chunk(2)
        grads = _gradients(group, x0 if denoising else x1, layers)
        for layer in layers:
            delta = (source.hidden[layer][:, -1] - base.hidden[layer][:, -1]).float()
            for row, i in enumerate(group.index):
                effects[layer][i] = (1.0 if denoising else -1.0) * (delta[row] * grads[layer][row]).cpu()
    return {layer: torch.stack(effects[layer]).mean(0) for layer in layers}


def _gradients(group: Group, ids: Tensor, layers: Sequence[int]) -> dict[int, Float[Tensor, "pair unit"]]:
    """dY/da of the hidden units at the last position, in an ordinary run of the whole model."""
    parts, kept = group.parts, {}

    def keep(layer: int, hidden: Tensor) -> Tensor:
        kept[layer] = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        kept[layer].retain_grad()
        return kept[layer]

    grown: list[Tensor] = []
    with ExitStack() as held, torch.enable_grad():
        for layer in layers:
            linear = decoder.projection(decoder.mlp(parts.blocks[layer]))
            held.enter_context(shown(functools.partial(keep, layer), entering=[linear]))
        held.enter_context(shown(grown.append, leaving=parts.blocks[-1:]))
        for p in parts.model.parameters():
            held.callback(p.requires_grad_, p.requires_grad)
            p.requires_grad_(False)
        parts.base(input_ids=ids, use_cache=False)
        value = group.outcome(grown[0][:, -1:], torch.arange(len(ids)))
        value.sum().backward()
    return {layer: hidden.grad[:, -1].float() for layer, hidden in kept.items()}


# --------------------------------------------------------------------------- sets


def top_k(effects: NeuronEffects | Float[Tensor, " unit"], k: int, *, sign: int = 1) -> list[int]:
    """The k units with the largest mean effect (the most negative ones with ``sign=-1``), best first."""
    mean = effects.effects.mean(0) if isinstance(effects, NeuronEffects) else effects
    if not 1 <= k <= len(mean):
        raise ValueError(f"k={k} must lie between 1 and the number of units, {len(mean)}")
    return (sign * mean).argsort(descending=True, stable=True)[:k].tolist()


# --------------------------------------------------------------------------- checks and order


@torch.no_grad()
def _last(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    outcome: Any,
    labels: tuple | None,
    compute: Callable[[lastblock.Last], tuple[Tensor, Tensor]],
    direction: str,
) -> NeuronEffects:
    """Run ``compute`` (patched outcomes and sizes [pair, label]) on every group; put the pairs in order."""
    patching.check_direction(direction)
    if isinstance(outcome, Replies):
        a, b = (_last(lm, pairs, o, labels, compute, direction) for o in outcome.parts())
        fields = ("y1", "y0", "effects", "whole")
        return replace(a, **{field: getattr(a, field) - getattr(b, field) for field in fields})
    rows: dict[int, tuple[Tensor, ...]] = {}
    methods = set()
    for last in lastblock.last_blocks(lm, pairs, outcome, direction):
        group = last.group
        values, sizes = compute(last)
        whole = last.value(last.change[:, None])[:, 0]
        columns = (group.unpatched(group.x1), group.unpatched(group.x0), values, whole, sizes)
        for row, i in enumerate(group.index):
            rows[i] = tuple(c[row].float().cpu() for c in columns)
        methods.add("closed form" if last.form is not None else "patching")
    y1, y0, values, whole, sizes = (
        torch.stack(c) for c in zip(*(rows[i] for i in range(len(pairs))), strict=True)
    )
    if not torch.isfinite(values).all():
        raise ValueError("outcome: is not finite; load the model with dtype='bfloat16' or 'float32'")
    if direction == "denoising":
        values, whole = values - y0[:, None], whole - y0
    else:
        values, whole = y1[:, None] - values, y1 - whole
    labels = tuple(range(values.shape[1])) if labels is None else labels
    return NeuronEffects(
        group.parts.depth - 1, labels, y1, y0, values, whole, sizes, " and ".join(sorted(methods))
    )


def _check_sets(sets: Mapping[Any, Sequence[int]], count: int) -> None:
    if not sets:
        raise ValueError("sets is empty: give at least one set of units")
    for name, units in sets.items():
        outside = [u for u in units if not 0 <= u < count]
        if outside:
            raise ValueError(f"sets: {name!r} holds units {outside[:5]}; the MLP has 0 to {count - 1}")
        if len(set(units)) < len(units):
            raise ValueError(f"sets: {name!r} holds a unit twice")
