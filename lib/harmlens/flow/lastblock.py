"""The last block at the last position: outcomes of changed MLP outputs, exactly and cheaply.

Behind the last MLP stand the final norm and the head only. For the norms in use (root mean square or layer
norm, with any gain) the outcome of one unit's patch has a closed form; it is held against the model's own
norm and head before it is used. Where it does not hold, the model's own modules are called.

Introduced in notebook 05 ("Neurons"); the formula stands in :mod:`flow.neurons`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from harmlens.flow import partial, runs
from harmlens.flow.outcomes import Reply
from harmlens.flow.runs import Group
from harmlens.models import parts as decoder
from harmlens.models.chats import Pair
from harmlens.models.forward import LanguageModel


@dataclass
class Last:
    """One group's last block at the last position: all that the units' effects need.

    Attributes:
        resid: base run's residual stream behind the block [pair, width], float32.
        delta: source minus base of the hidden units [pair, unit].
        weight: [width, unit].
        change: source minus base of the MLP's output [pair, width].
        value: outcome of changes of the MLP's output [pair, change, width] -> [pair, change], through the
            model's own norm and head.
        form: the norm in closed form, or None where it does not hold.
        breadth: numbers held at once for one patched run, for bounding memory.
    """

    group: Group
    resid: Tensor
    delta: Tensor
    weight: Tensor
    change: Tensor
    value: Callable[[Tensor], Tensor]
    form: _Form | None
    breadth: int


@dataclass(frozen=True)
class _Form:
    """Final norm and read rows of the head: logits = x . columns / sigma(x) + bias, x centred or not."""

    columns: Float[Tensor, "width id"]
    bias: Float[Tensor, " id"]
    eps: float
    centred: bool
    soft_cap: float | None
    value: Callable[[Tensor], Tensor]

    def centre(self, x: Tensor, dim: int) -> Tensor:
        return x - x.mean(dim, keepdim=True) if self.centred else x

    def logits(self, dot: Tensor, square: Tensor) -> Tensor:
        """From x . columns [..., id] and the mean of x^2 [...]."""
        out = dot / (square + self.eps).sqrt()[..., None] + self.bias
        return out if self.soft_cap is None else self.soft_cap * (out / self.soft_cap).tanh()


@torch.no_grad()
def groups(
    lm: LanguageModel, pairs: Sequence[Pair], outcome: Any, direction: str, batch_size: int
) -> Iterator[Last]:
    """Record pairs (see :func:`flow.runs.groups`) and prepare each group."""
    parts = partial.patchable(lm)
    linear = decoder.mlp(parts.blocks[-1])
    weight = decoder.projection_weight(linear).detach().float()
    encoded = runs.encode(lm, pairs, outcome, "last")
    for group in runs.groups(lm, parts, encoded, details=["hidden"], size=batch_size):
        base, source = group.runs(direction)
        (column,) = group.columns["last"]
        cut = slice(column, column + 1)
        resid = base.resid[-1][:, column].float()
        delta = (source.hidden[-1][:, column] - base.hidden[-1][:, column]).float()
        change = (source.mlp[-1][:, column] - base.mlp[-1][:, column]).float()
        plain = _adds(group, base, column, change)
        value = _through(group, base, cut, plain)
        form = _form(group, encoded.outcome, resid, change, value) if plain else None
        ids = getattr(encoded.outcome, "ids", None)
        breadth = max(len(weight), parts.head.weight.shape[0] if ids is None else len(ids)) * group.read
        yield Last(group, resid, delta, weight, change, value, form, breadth)


def _adds(group: Group, base: Any, column: int, change: Tensor) -> bool:
    """Whether what the MLP gives out is simply added to the residual stream."""
    cut = slice(column, column + 1)
    layer = group.parts.depth - 1
    moved = (base.mlp[-1][:, cut].float() + change[:, None]).to(base.mlp[-1].dtype)
    after = partial.compose(
        group.parts, base, layer, base.resid[-2][:, cut], attn=base.attn[-1][:, cut], mlp_out=moved
    )
    expected = base.resid[-1][:, cut].float() + change[:, None]
    return _close(after.float(), expected, after.dtype)


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    loose = 1e-5 if dtype == torch.float32 else 2e-2
    return bool((a - b).abs().max() <= loose * (1 + b.abs().max()))


def _through(group: Group, base: Any, cut: slice, plain: bool) -> Callable[[Tensor], Tensor]:
    """Outcome of changed MLP outputs through the model's own block, norm and head."""
    parts, dtype = group.parts, base.resid[-1].dtype
    before, attn, mlp = base.resid[-2][:, cut], base.attn[-1][:, cut], base.mlp[-1][:, cut]

    @torch.no_grad()
    def value(changes: Float[Tensor, "pair change width"]) -> Float[Tensor, "pair change"]:
        n, count, _ = changes.shape
        index = torch.arange(n).repeat_interleave(count)
        if plain:
            resid = (base.resid[-1][:, cut].float() + changes).to(dtype).flatten(0, 1)[:, None]
        else:
            at = index.to(before.device)
            new = (mlp.float() + changes).to(dtype).flatten(0, 1)[:, None]
            resid = partial.compose(parts, base, parts.depth - 1, before[at], attn=attn[at], mlp_out=new)
        if group.read > 1:  # a reply: its other positions stay as they are, since no block follows
            resid = torch.cat([resid, base.resid[-1][index, cut.stop :]], dim=1)
        return group.outcome(resid, index).view(n, count)

    return value


@torch.no_grad()
def _form(
    group: Group, outcome: Any, resid: Tensor, change: Tensor, value: Callable[[Tensor], Tensor]
) -> _Form | None:
    """The closed form, if the model's own norm and head agree on the base run and on a patched one."""
    parts, width = group.parts, resid.shape[1]
    if parts.norm is None or not parts.plain_head or isinstance(outcome, Reply) or width % 2:
        return None
    ids = getattr(outcome, "ids", None)
    read = getattr(outcome, "value", outcome)
    dtype = parts.head.weight.dtype
    eps = next((getattr(parts.norm, n) for n in ("variance_epsilon", "eps") if hasattr(parts.norm, n)), 1e-6)
    # A vector of +1 and -1 has mean 0 and mean square 1, so any such norm gives back its gain there.
    signs = torch.ones(1, width, dtype=dtype, device=resid.device)
    signs[:, 1::2] = -1
    shift = parts.norm(torch.zeros_like(signs)).float()[0]
    gain = (parts.norm(signs).float()[0] - shift) * signs.float()[0] * (1 + eps) ** 0.5
    rows = parts.head.weight if ids is None else parts.head.weight[list(ids)]
    rows = rows.to(resid.device).float()
    bias = getattr(parts.head, "bias", None)
    bias = 0.0 if bias is None else (bias if ids is None else bias[list(ids)]).to(resid.device).float()
    for centred in (False, True):
        form = _Form((gain * rows).T, rows @ shift + bias, eps, centred, parts.soft_cap, read)
        own = [form.centre(x, -1) for x in (resid, resid + change)]
        mine = [read(form.logits(x @ form.columns, x.square().mean(-1))).float() for x in own]
        theirs = [value(c[:, None])[:, 0] for c in (torch.zeros_like(change), change)]
        loose = 1e-4 if dtype == torch.float32 else 0.1
        gap = max((m - t).abs().max().item() for m, t in zip(mine, theirs, strict=True))
        if gap <= loose * (1 + max(t.abs().max().item() for t in theirs)):
            return form
    return None


@torch.no_grad()
def one_more(last: Last, resid: Float[Tensor, "pair width"], max_values: int) -> Float[Tensor, "pair unit"]:
    """Outcome when one unit more is patched, for every unit, starting from a residual stream ``resid``."""
    form, width = last.form, len(last.weight)
    if form is None:
        already = (resid - last.resid)[:, None]
        step = max(1, max_values // (len(resid) * last.breadth))
        columns = torch.arange(last.weight.shape[1]).split(step)
        changes = (already + last.delta[:, c, None] * last.weight.T[c] for c in columns)
        return torch.cat([last.value(change) for change in changes], dim=1)
    x, w = form.centre(resid, -1), form.centre(last.weight, 0)
    write, length = w.T @ form.columns, w.square().sum(0)  # what each unit writes to each read logit
    step = max(1, max_values // (w.shape[1] * write.shape[1]))
    out = []
    for rows, da in zip(x.split(step), last.delta.split(step), strict=True):
        square = (rows.square().sum(-1)[:, None] + 2 * da * (rows @ w) + da.square() * length) / width
        logits = form.logits((rows @ form.columns)[:, None] + da[..., None] * write, square)
        out.append(form.value(logits.flatten(0, 1)).view(da.shape).float())
    return torch.cat(out)
