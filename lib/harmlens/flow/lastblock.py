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

from harmlens.flow.engine import compose, patchable
from harmlens.flow.outcomes import Reply
from harmlens.flow.record import Group, Record, record_pairs
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
def last_blocks(lm: LanguageModel, pairs: Sequence[Pair], outcome: Any, direction: str) -> Iterator[Last]:
    """Record pairs (see :func:`flow.record.record_pairs`) and prepare each group."""
    parts = patchable(lm)
    weight = decoder.projection_weight(decoder.mlp(parts.blocks[-1])).detach().float()
    for group in record_pairs(lm, parts, pairs, outcome, details=["hidden"]):
        base, source = group.runs(direction)
        (column,) = group.columns["last"]
        resid = base.resid[-1][:, column].float()
        delta = (source.hidden[-1][:, column] - base.hidden[-1][:, column]).float()
        change = (source.mlp[-1][:, column] - base.mlp[-1][:, column]).float()
        value, plain = _through(group, base, column, change)
        form = _form(group, outcome, resid, change, value) if plain else None
        ids = getattr(outcome, "ids", None)
        breadth = max(len(weight), parts.head.weight.shape[0] if ids is None else len(ids)) * group.read
        yield Last(group, resid, delta, weight, change, value, form, breadth)


def _through(
    group: Group, base: Record, column: int, change: Tensor
) -> tuple[Callable[[Tensor], Tensor], bool]:
    """Outcome of changed MLP outputs through the model's own block, norm and head.

    And whether what the MLP gives out is simply added to the residual stream: then no block is called.
    """
    parts, cut = group.parts, slice(column, column + 1)
    before, attn, mlp, after = (
        t[:, cut] for t in (base.resid[-2], base.attn[-1], base.mlp[-1], base.resid[-1])
    )

    def behind(moved: Tensor, at: Any) -> Tensor:
        return compose(parts, base, parts.depth - 1, before[at], attn=attn[at], mlp_out=moved.to(mlp.dtype))

    expected = after.float() + change[:, None]
    gap = (behind(mlp.float() + change[:, None], slice(None)).float() - expected).abs().max()
    loose = 1e-5 if after.dtype == torch.float32 else 2e-2
    plain = bool(gap <= loose * (1 + expected.abs().max()))

    @torch.no_grad()
    def value(changes: Float[Tensor, "pair change width"]) -> Float[Tensor, "pair change"]:
        n, count, _ = changes.shape
        index = torch.arange(n).repeat_interleave(count)
        if plain:
            resid = (after.float() + changes).to(after.dtype).flatten(0, 1)[:, None]
        else:
            resid = behind((mlp.float() + changes).flatten(0, 1)[:, None], index.to(before.device))
        if group.read > 1:  # a reply: its other positions stay as they are, since no block follows
            resid = torch.cat([resid, base.resid[-1][index, cut.stop :]], dim=1)
        return group.outcome(resid, index).view(n, count)

    return value, plain


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
