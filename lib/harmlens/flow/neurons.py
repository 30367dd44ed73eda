"""Effects of single MLP hidden units and of sets of them.

A *neuron* here is a hidden unit of an MLP: one coordinate of the input of its last projection. Unit i writes
a_i * w_i into the residual stream, where w_i is column i of that projection.

In the **last** block nothing but the final norm and the head follows, so that the effect of a unit at the
last position has a closed form: with the unpatched residual stream r, the norm's gain g and row u_v of the
head,

    logit_v = (r + da_i w_i) . (g * u_v) / sigma_i,   sigma_i^2 = mean((r + da_i w_i)^2) + eps,

for all units of all pairs at once. It equals real patching, the change of the norm's scale included. It is
held against the model's own norm and head before it is used; where it does not hold, these are called. In
other layers :func:`screen` gives first-order estimates, to be confirmed by patching (:func:`set_effects`).

Introduced in notebook 05 ("Neurons").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from harmlens.flow import patching
from harmlens.flow.engine import check_units, compose, patchable
from harmlens.flow.interventions import units_shown
from harmlens.flow.outcomes import Replies, Reply
from harmlens.flow.record import Group, Record, record_pairs, shown
from harmlens.models import parts as decoder
from harmlens.models.chats import Pair
from harmlens.models.forward import LanguageModel

Sets = Mapping[Any, Sequence[int]] | Sequence[Sequence[int]]
MOST_VALUES = 1 << 22  # numbers held at once (pairs times units times what is read of each); bounds memory


@dataclass(frozen=True)
class NeuronEffects:
    """Effects of single hidden units, or of sets of them, in one MLP at the last prompt position.

    Attributes:
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


def last_layer(
    lm: LanguageModel, pairs: Sequence[Pair], outcome: Any, *, direction: str = "denoising"
) -> NeuronEffects:
    """Effect of every hidden unit of the last MLP at the last prompt position, exactly.

    Args:
        outcome, direction: as for :func:`flow.patching.patch`.

    Returns:
        One column for each unit, in the model's order. ``method`` says whether the closed form held.

    Raises:
        ValueError: bad pairs (see :func:`flow.record.record_pairs`), an MLP without one output projection.
    """

    def singles(last: _Last) -> tuple[Tensor, Tensor]:
        return last.one_more(), last.delta.abs() * last.weight.norm(dim=0)

    return _measured(lm, pairs, outcome, None, singles, direction)


def set_effects(
    lm: LanguageModel, pairs: Sequence[Pair], outcome: Any, sets: Sets, *, direction: str = "denoising"
) -> NeuronEffects:
    """Joint effect of sets of hidden units of the last MLP, patched together at the last prompt position.

    Args:
        sets: name -> units, or a list of units for each set (labels are then 0, 1, ...). An empty set has
            no effect.

    Raises:
        ValueError: no sets, a unit that the model does not have, a unit twice in one set.
    """
    parts = patchable(lm)
    named = dict(sets) if isinstance(sets, Mapping) else dict(enumerate(sets))
    if not named:
        raise ValueError("sets is empty: give at least one set of units")
    for name, some in named.items():
        check_units(parts, f"sets[{name!r}]", parts.depth - 1, some)
        if len(set(some)) < len(some):
            raise ValueError(f"sets[{name!r}] holds a unit twice")

    def joint(last: _Last) -> tuple[Tensor, Tensor]:
        values, sizes, some = [], [], list(named.values())
        step = max(1, MOST_VALUES // (len(last.delta) * last.breadth))
        for tile in (some[k : k + step] for k in range(0, len(some), step)):
            change = torch.stack([last.delta[:, list(s)] @ last.weight[:, list(s)].T for s in tile], dim=1)
            values.append(last.value(change))
            sizes.append(change.norm(dim=-1))
        return torch.cat(values, dim=1), torch.cat(sizes, dim=1)

    return _measured(lm, pairs, outcome, tuple(named), joint, direction)


@torch.no_grad()
def screen(lm: LanguageModel, pairs: Sequence[Pair], outcome: Any) -> dict[int, Float[Tensor, " unit"]]:
    """Attribution patching: first-order estimates for every hidden unit of every MLP at the last position.

    The estimate of denoising is (a(x1) - a(x0)) * dY/da in the run on x0; one backward pass for all units.
    Sums over the units of an MLP are the scores of TransformerLens' ``attribution_patch``.

    Returns:
        layer -> mean over pairs.

    Raises:
        ValueError: an outcome of more than the first word; bad pairs.
    """
    parts = patchable(lm)
    if isinstance(outcome, Replies | Reply):
        raise ValueError("outcome: the screen reads the first word; use a first-token outcome such as Y1")
    effects: dict[int, list[Tensor]] = {layer: [] for layer in range(parts.depth)}
    for group in record_pairs(lm, parts, pairs, outcome, details=["hidden"]):
        grads = _gradients(group, group.ids.chunk(2)[1])
        for layer in effects:
            delta = (group.x1.hidden[layer][:, -1] - group.x0.hidden[layer][:, -1]).float()
            effects[layer].append((delta * grads[layer]).cpu())
    return {layer: torch.cat(rows).mean(0) for layer, rows in effects.items()}


def _gradients(group: Group, ids: Tensor) -> dict[int, Float[Tensor, "pair unit"]]:
    """dY/da of the hidden units at the last position, in an ordinary run of the whole model."""
    parts, kept = group.parts, {}

    def keep(layer: int, hidden: Tensor) -> Tensor:
        kept[layer] = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        kept[layer].retain_grad()
        return kept[layer]

    grown: list[Tensor] = []
    with ExitStack() as held, torch.enable_grad():
        held.enter_context(units_shown(parts, range(parts.depth), keep))
        held.enter_context(shown(grown.append, leaving=parts.blocks[-1:]))
        for p in parts.model.parameters():
            held.callback(p.requires_grad_, p.requires_grad)
            p.requires_grad_(False)
        parts.base(input_ids=ids, use_cache=False)
        value = group.outcome(grown[0][:, -1:], torch.arange(len(ids)))
        value.sum().backward()
    return {layer: hidden.grad[:, -1].float() for layer, hidden in kept.items()}


def top_k(effects: NeuronEffects | Float[Tensor, " unit"], k: int, *, sign: int = 1) -> list[int]:
    """The k units with the largest mean effect (the most negative ones with ``sign=-1``), best first."""
    mean = effects.effects.mean(0) if isinstance(effects, NeuronEffects) else effects
    if not 1 <= k <= len(mean):
        raise ValueError(f"k={k} must lie between 1 and the number of units, {len(mean)}")
    return (sign * mean).argsort(descending=True, stable=True)[:k].tolist()


# --------------------------------------------------------------------------- the last block


@torch.no_grad()
def _measured(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    outcome: Any,
    labels: tuple | None,
    compute: Callable[[_Last], tuple[Tensor, Tensor]],
    direction: str,
) -> NeuronEffects:
    """Run ``compute`` (patched outcomes and sizes [pair, label]) on every group; put the pairs in order."""
    patching.check_direction(direction)
    if isinstance(outcome, Replies):
        a, b = (_measured(lm, pairs, o, labels, compute, direction) for o in outcome.parts())
        fields = ("y1", "y0", "effects", "whole")
        return replace(a, **{field: getattr(a, field) - getattr(b, field) for field in fields})
    found, methods = [], set()
    for last in _last_blocks(lm, pairs, outcome, direction):
        group = last.group
        values, sizes = compute(last)
        whole = last.value(last.change[:, None])[:, 0]
        columns = (group.unpatched(group.x1), group.unpatched(group.x0), values, whole, sizes)
        found.append((torch.tensor(group.index), *(column.float().cpu() for column in columns)))
        methods.add("closed form" if last.form is not None else "patching")
    index, *columns = (torch.cat(column) for column in zip(*found, strict=True))
    y1, y0, values, whole, sizes = (column[index.argsort()] for column in columns)
    if not torch.isfinite(values).all():
        raise ValueError("outcome: is not finite; load the model with dtype='bfloat16' or 'float32'")
    if direction == "denoising":
        values, whole = values - y0[:, None], whole - y0
    else:
        values, whole = y1[:, None] - values, y1 - whole
    labels = tuple(range(values.shape[1])) if labels is None else labels
    method = " and ".join(sorted(methods))
    return NeuronEffects(group.parts.depth - 1, labels, y1, y0, values, whole, sizes, method)


def _last_blocks(lm: LanguageModel, pairs: Sequence[Pair], outcome: Any, direction: str) -> Iterator[_Last]:
    parts = patchable(lm)
    weight = decoder.projection_weight(decoder.mlp(parts.blocks[-1])).detach().float()
    for group in record_pairs(lm, parts, pairs, outcome, details=["hidden"]):
        yield _Last(group, outcome, weight, *group.runs(direction))


class _Last:
    """One group's last block at the last position: what is there, and outcomes of changed MLP outputs.

    Attributes:
        resid: base run's residual stream behind the block [pair, width], float32.
        delta, change: source minus base of the hidden units [pair, unit], and of the MLP's output.
        weight: [width, unit].
        plain: what the MLP gives out is simply added to the stream, so that no block is called.
        form: :meth:`one_more` in closed form, or None where that does not hold.
        breadth: numbers held at once for one patched run, for bounding memory.
    """

    @torch.no_grad()
    def __init__(self, group: Group, outcome: Any, weight: Tensor, base: Record, source: Record) -> None:
        (column,) = group.columns["last"]
        self.group, self.base, self.weight, self.after = group, base, weight, slice(column + 1, None)
        self.resid = base.resid[-1][:, column].float()
        self.delta = (source.hidden[-1][:, column] - base.hidden[-1][:, column]).float()
        self.change = (source.mlp[-1][:, column] - base.mlp[-1][:, column]).float()
        cut = slice(column, column + 1)
        self.before, self.attn, self.mlp, self.end = (
            t[:, cut] for t in (base.resid[-2], base.attn[-1], base.mlp[-1], base.resid[-1])
        )
        expected = self.end.float() + self.change[:, None]
        gap = (self._composed(self.mlp.float() + self.change[:, None]).float() - expected).abs().max()
        loose = 1e-5 if self.end.dtype == torch.float32 else 2e-2
        self.plain = bool(gap <= loose * (1 + expected.abs().max()))
        self.form = _closed_form(self, outcome) if self.plain else None
        ids = getattr(outcome, "ids", None)
        read = group.parts.head.weight.shape[0] if ids is None else len(ids)
        self.breadth = max(len(weight), read) * group.read

    def _composed(self, moved: Tensor, at: Any = slice(None)) -> Tensor:
        parts, out = self.group.parts, moved.to(self.mlp.dtype)
        return compose(parts, self.base, parts.depth - 1, self.before[at], attn=self.attn[at], mlp_out=out)

    @torch.no_grad()
    def value(self, changes: Float[Tensor, "pair change width"]) -> Float[Tensor, "pair change"]:
        """Outcome of changes of the MLP's output, through the model's own norm and head."""
        n, count, _ = changes.shape
        index = torch.arange(n).repeat_interleave(count)
        if self.plain:
            resid = (self.end.float() + changes).to(self.end.dtype).flatten(0, 1)[:, None]
        else:
            moved = (self.mlp.float() + changes).flatten(0, 1)[:, None]
            resid = self._composed(moved, index.to(self.before.device))
        if self.group.read > 1:  # a reply: its other positions stay as they are, since no block follows
            resid = torch.cat([resid, self.base.resid[-1][index, self.after]], dim=1)
        return self.group.outcome(resid, index).view(n, count)

    @torch.no_grad()
    def one_more(self) -> Float[Tensor, "pair unit"]:
        """Outcome when one unit is patched, for every unit."""
        if self.form is not None:
            return self.form()
        step = max(1, MOST_VALUES // (len(self.resid) * self.breadth))
        columns = torch.arange(self.weight.shape[1]).split(step)
        changes = (self.delta[:, c, None] * self.weight.T[c] for c in columns)
        return torch.cat([self.value(change) for change in changes], dim=1)


def _closed_form(last: _Last, outcome: Any) -> Callable[[], Tensor] | None:
    """:meth:`_Last.one_more` in closed form, where the model's own norm and head agree on two runs.

    With norm and read rows of the head, logits = x . columns / sigma(x) + bias, x centred or not.
    """
    parts, resid, change = last.group.parts, last.resid, last.change
    width, device, dtype = resid.shape[1], resid.device, parts.head.weight.dtype
    if parts.norm is None or not parts.plain_head or isinstance(outcome, Reply) or width % 2:
        return None
    ids, read = getattr(outcome, "ids", None), getattr(outcome, "value", outcome)
    eps = next((getattr(parts.norm, n) for n in ("variance_epsilon", "eps") if hasattr(parts.norm, n)), 1e-6)
    # A vector of +1 and -1 has mean 0 and mean square 1, so any such norm gives back its gain there.
    signs = torch.ones(1, width, dtype=dtype, device=device)
    signs[:, 1::2] = -1
    shift = parts.norm(torch.zeros_like(signs)).float()[0]
    gain = (parts.norm(signs).float()[0] - shift) * signs.float()[0] * (1 + eps) ** 0.5
    some = slice(None) if ids is None else list(ids)
    rows, bias = parts.head.weight[some].to(device).float(), getattr(parts.head, "bias", None)
    bias = rows @ shift + (0.0 if bias is None else bias[some].to(device).float())
    columns, cap = (gain * rows).T, parts.soft_cap

    def centre(x: Tensor, dim: int) -> Tensor:
        return x - x.mean(dim, keepdim=True) if centred else x

    def value(dot: Tensor, square: Tensor) -> Tensor:
        """From x . columns [row, id] and the mean of x^2 [row]."""
        logits = dot / (square + eps).sqrt()[..., None] + bias
        return read((logits if cap is None else cap * (logits / cap).tanh()).flatten(0, -2)).float()

    theirs = [last.value(c[:, None])[:, 0] for c in (torch.zeros_like(change), change)]
    loose = (1e-4 if dtype == torch.float32 else 0.1) * (1 + max(t.abs().max().item() for t in theirs))
    for centred in (False, True):  # noqa: B007 -- centre() looks at it
        own = [centre(x, -1) for x in (resid, resid + change)]
        mine = [value(x @ columns, x.square().mean(-1)) for x in own]
        if max((m - t).abs().max().item() for m, t in zip(mine, theirs, strict=True)) <= loose:
            break
    else:
        return None

    def one_more() -> Float[Tensor, "pair unit"]:
        x, w = centre(resid, -1), centre(last.weight, 0)
        write, length = w.T @ columns, w.square().sum(0)  # what each unit writes to each read logit
        step = max(1, MOST_VALUES // (w.shape[1] * write.shape[1]))
        out = []
        for rows, da in zip(x.split(step), last.delta.split(step), strict=True):
            square = (rows.square().sum(-1)[:, None] + 2 * da * (rows @ w) + da.square() * length) / width
            dot = (rows @ columns)[:, None] + da[..., None] * write
            out.append(value(dot, square).view(da.shape))
        return torch.cat(out)

    return one_more
