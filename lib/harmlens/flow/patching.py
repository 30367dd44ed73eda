"""Activation patching: indirect effects of layers, modules, heads and neurons, at chosen positions.

For every pair :func:`patch` overwrites an activation of one run with that of the other and reads the outcome:

* **denoising** patches x1's activation into the run on x0: NIE = Y(x0; M<-M(x1)) - Y(x0), sufficiency;
* **noising** patches x0's activation into the run on x1: TIE = Y(x1) - Y(x1; M<-M(x0)), necessity.

Both have the sign of the total effect TE = Y(x1) - Y(x0), where x1 is the run that answers. Only what a patch
can reach is computed again (:mod:`flow.engine`), and it equals a whole forward pass.

Statistics of depth take one array of effects per layer (units along ``axis``) and average over units before
they take absolute values, so that noise of single pairs does not count as effect. They go straight into
:meth:`Effects.estimate`.

Introduced in notebook 02 ("Layers").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from harmlens.evidence import stats
from harmlens.flow import engine
from harmlens.flow.engine import SITES, Cell, Freeze, check_units, patchable
from harmlens.flow.outcomes import Outcome, Replies, Reply
from harmlens.flow.record import Group, Positions, reader, record_pairs, record_run
from harmlens.models import parts as decoder
from harmlens.models.chats import Pair, Prompt, tokens
from harmlens.models.forward import LanguageModel, require_room
from harmlens.models.parts import Stack

DIRECTIONS = ("denoising", "noising")
Units = Mapping[str, Mapping[int, Sequence[int]]]  # name -> layer -> hidden units of its MLP
Sites = str | Units | Sequence[str | Units]
Numbers = np.ndarray | np.floating  # one for each resample, or a single one
Target = Outcome | Replies | Reply | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Effects:
    """Outcomes of patched runs, with what they have to be compared with.

    Attributes:
        sites, layers, positions, pairs: labels of the axes of ``patched``.
        y1, y0: outcomes of the unpatched runs.
        size: Euclidean norm of what each patch changed at its site, over its positions.
    """

    sites: tuple[str, ...]
    layers: tuple[int | range, ...]
    positions: tuple[str, ...]
    pairs: tuple[str, ...]
    direction: str
    y1: Float[Tensor, " pair"]
    y0: Float[Tensor, " pair"]
    patched: Float[Tensor, "site layer position pair"]
    size: Float[Tensor, "site layer position pair"]

    @property
    def total(self) -> Float[Tensor, " pair"]:
        """TE = Y(x1) - Y(x0)."""
        return self.y1 - self.y0

    @property
    def effects(self) -> Float[Tensor, "site layer position pair"]:
        """NIE of denoising, TIE of noising, in units of the outcome."""
        return self.patched - self.y0 if self.direction == "denoising" else self.y1 - self.patched

    def at(self, site: str, position: str | None = None) -> Float[Tensor, "layer pair"]:
        """Effects of one site at one position label (which may be left out if there is one only)."""
        if site not in self.sites:
            raise ValueError(f"site={site!r} was not swept; there are {', '.join(self.sites)}")
        if position is None and len(self.positions) == 1:
            position = self.positions[0]
        if position not in self.positions:
            raise ValueError(
                f"position={position!r} was not swept; choose one of {', '.join(self.positions)}"
            )
        return self.effects[self.sites.index(site), :, self.positions.index(position)]

    def only(self, pairs: Sequence[str]) -> Effects:
        """The same for some of the pairs, by their ids."""
        rows = [self.pairs.index(name) for name in pairs]
        some = {name: getattr(self, name)[..., rows] for name in ("y1", "y0", "patched", "size")}
        return replace(self, pairs=tuple(pairs), **some)

    def columns(self, *series: str | tuple[str, str | None]) -> np.ndarray:
        """Effects [pair, layers of all series], where a series is a site, or (site, position label)."""
        both = [(one,) if isinstance(one, str) else one for one in series]
        return np.concatenate([self.at(*one).T.double().numpy() for one in both], axis=1)

    def strong(self) -> Effects:
        """The same for pairs with a total effect, above a tenth of the median; the rest can't be mediated."""
        size = self.total.abs()
        return self.only([name for name, s in zip(self.pairs, size, strict=True) if s > 0.1 * size.median()])

    def estimate(
        self, statistic: Callable, *series: str | tuple[str, str | None], **options: int
    ) -> stats.Estimate:
        """A statistic of the :meth:`columns` of some series, with its interval over pairs."""
        return stats.bootstrap_ci(self.columns(*series), statistic, **options)

    def curve(self, site: str, position: str | None = None, **options: int) -> list[stats.Estimate]:
        """Normalised effect of each layer: ratio of the means over pairs to the total effect."""
        total = self.total.double().numpy()
        each = self.columns((site, position)).T
        return [stats.bootstrap_ci(np.stack([one, total], axis=1), "ratio", **options) for one in each]

    def minus(self, other: Effects) -> Effects:
        """The same for the difference of two outcomes; ValueError where something else was patched."""
        for name in ("sites", "layers", "positions", "pairs", "direction"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"other: its {name} differ, so there is no difference cell by cell")
        values = {name: getattr(self, name) - getattr(other, name) for name in ("y1", "y0", "patched")}
        return replace(self, **values)


@torch.no_grad()
def patch(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    outcome: Target | Sequence[Target],
    *,
    sites: Sites = "layer",
    layers: Sequence[int | range] | None = None,
    positions: Positions = "last",
    direction: str = "denoising",
    freeze: Freeze | None = None,
    null: int | None = None,
    noise: float | None = None,
) -> Any:
    """Patch every site in every layer at every position, for every pair.

    Args:
        outcome: :func:`flow.outcomes.y1`, ``y2``, a :class:`~flow.outcomes.Replies`, or any function of
            last-position logits [row, vocab] that gives one value for each row. Several (replies among them
            with the same texts) are read off the same runs.
        sites: one or several. ``resid_post`` is the block's output; ``layer`` its own contribution (output
            minus input); ``attn_out`` and ``mlp_out`` are the modules' outputs; ``head`` stands for every
            attention head. In place of a name: sets of hidden units of the MLPs, name -> layer -> units. What
            comes later in the same block reacts to the patch, unless it is frozen.
        layers: None for all. A range stands for neighbouring layers that are patched at once.
        positions: ``"last"`` prompt position; ``"all"`` prompt positions at once; ``"each"`` on its
            own; or a function that names groups of positions, such as :func:`asking.pairs.roles`.
        direction: ``"denoising"`` (NIE) or ``"noising"`` (TIE).
        null: a seed: each patch becomes a random direction of the same norm (per pair and position).
        noise: corrupt x0 otherwise: x1's embeddings, plus Gaussian noise of this many standard deviations of
            the model's embeddings where the two differ.

    Returns:
        :class:`Effects` on the CPU, float32; of several outcomes a list of them.

    Raises:
        ValueError: pairs of unequal length or with two equal sides (named), an unknown site, direction
            or position, a site that the model does not have, blocks that can't be patched.
    """
    if isinstance(outcome, Replies):  # a difference of two outcomes, and patching is done for each of them
        options = {k: v for k, v in locals().items() if k not in ("lm", "pairs", "outcome")}
        one, other = (patch(lm, pairs, part, **options) for part in outcome.parts())
        return one.minus(other)
    check_direction(direction)
    if noise is not None and not 0 <= noise < float("inf"):
        raise ValueError(f"noise={noise} must be a number of standard deviations, 0 or more")
    parts = patchable(lm)
    named = _sites(parts, sites)
    chosen = _layers(parts, layers, named)
    if freeze is not None:
        for layer in range(parts.depth) if freeze.layers is None else freeze.layers:
            check_units(parts, "freeze", layer, freeze.units)
    several = isinstance(outcome, Sequence)
    groups = record_pairs(
        lm, parts, pairs, tuple(outcome) if several else outcome, positions,
        details=_details(named, freeze), noise=noise,
    )  # fmt: skip
    some = next(groups)
    engine.check_partial(some)
    options = {"direction": direction, "freeze": freeze, "null": null}
    found = _effects(chain([some], groups), [pair.id for pair in pairs], named, chosen, **options)
    return found if several else found[0]


@torch.no_grad()
def across(
    lm: LanguageModel,
    source: LanguageModel,
    chats: Sequence[Prompt],
    outcome: Outcome | Callable[[Tensor], Tensor],
    *,
    sites: Sites = "layer",
    layers: Sequence[int | range] | None = None,
    positions: str = "all",
    freeze: Freeze | None = None,
    null: int | None = None,
) -> Effects:
    """Patch activations of *another model* that reads the same prompts: the model contrast.

    The first module whose patch has an effect is the first whose weights differ: everything below it computes
    the same in both.

    Args:
        source: of the same architecture, such as the parent of a fine-tuned model.
        chats: each is a unit, named by its place in the list.
        positions: ``"all"`` or ``"last"``.
        layers, freeze, null: as for :func:`patch`; frozen modules keep what they gave in ``lm``.

    Returns:
        Denoising :class:`Effects` with y1 the source's outcome and y0 that of ``lm``.

    Raises:
        ValueError: models of different shape, no prompts, an unknown site or position.
    """
    parts, theirs = patchable(lm), patchable(source)
    named = _sites(parts, sites)
    if (parts.depth, parts.width) != (theirs.depth, theirs.width):
        raise ValueError(f"source: {source.name!r} has another shape than {lm.name!r}; choose a relative")
    if not chats or positions not in ("all", "last"):
        raise ValueError(f"chats must not be empty and positions be 'all' or 'last', got {positions!r}")
    ids = [tokens(lm.tokenizer, chat.render(lm)) for chat in chats]
    require_room(lm, ids)
    groups, y1, options = [], torch.zeros(len(ids)), {"details": _details(named, freeze), "share": False}
    for length in sorted(set(map(len, ids))):
        index = [i for i, row in enumerate(ids) if len(row) == length]
        rows = torch.tensor([ids[i] for i in index])
        here, there = (record_run(p, rows.to(p.model.device), **options) for p in (parts, theirs))
        columns = {positions: tuple(range(length)) if positions == "all" else (length - 1,)}
        names, read = [str(i) for i in index], reader(parts, outcome)
        groups.append(Group(parts, index, names, rows, there, here, columns, 0, 1, read))
        y1[index] = reader(theirs, outcome)(there.resid[-1][:, -1:], torch.tensor(index)).cpu()
    names, chosen = [str(i) for i in range(len(ids))], _layers(parts, layers, named)
    [found] = _effects(groups, names, named, chosen, freeze=freeze, null=null)
    return replace(found, y1=y1)


def _effects(
    groups: Iterable[Group], names: Sequence[str], named: Sequence[tuple[str, str, Any]],
    layers: Sequence[range], **options: Any,
) -> list[Effects]:  # fmt: skip
    """Run every cell of all groups: one :class:`Effects` for each value that the outcome gives."""
    found = []
    for group in groups:
        cells = [
            Cell(site, some[0], some[-1], at, units.get(some[0], ()) if isinstance(units, dict) else units)
            for _, site, units in named
            for some in layers
            for at in group.columns.values()
        ]
        y1, y0 = (group.unpatched(run).cpu() for run in (group.x1, group.x0))
        values, sizes = engine.run_cells(group, cells, **options)
        finite = torch.stack([y1, y0, *values], dim=1).isfinite().flatten(1).all(1)
        if not finite.all():
            raise ValueError(
                f"the outcome of pair {group.names[int(finite.long().argmin())]!r} is not finite. In float16 "
                "activations can overflow: load the model with dtype='bfloat16' or 'float32'"
            )
        found.append((torch.tensor(group.index), y1, y0, values.transpose(0, 1), sizes.T))
    index, *columns = (torch.cat(column) for column in zip(*found, strict=True))
    y1, y0, values, sizes = (column[index.argsort()] for column in columns)
    y1, y0, values = y1.view(len(names), -1), y0.view(len(names), -1), values.reshape(*sizes.shape, -1)
    shape = (len(named), len(layers), len(group.columns), len(names))
    return [
        Effects(
            tuple(name for name, *_ in named), tuple(some[0] if len(some) == 1 else some for some in layers),
            tuple(group.columns), tuple(names), options.get("direction", "denoising"), y1[:, k], y0[:, k],
            values[..., k].T.reshape(shape), sizes.T.reshape(shape),
        )
        for k in range(y1.shape[1])
    ]  # fmt: skip


# --------------------------------------------------------------------------- checks and labels


def check_direction(direction: str) -> None:
    """Refuse a direction of patching that there is not."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown; choose 'denoising' or 'noising'")


def _sites(parts: Stack, sites: Sites) -> list[tuple[str, str, Any]]:
    """Label, site and units of each entry of the first axis; heads are slices of their projection's input."""
    given, out = (sites,) if isinstance(sites, str | Mapping) else tuple(sites), []
    unknown = [one for one in given if one not in SITES and not (one and isinstance(one, Mapping))]
    if unknown or not given:
        raise ValueError(
            f"sites={list(given)}: unknown {unknown}; choose from {', '.join(SITES)}, or give sets of hidden "
            "units as {name: {layer: units}}"
        )
    for site in given:
        if isinstance(site, Mapping):
            for name, sets in site.items():
                for layer, units in sets.items():
                    check_units(parts, f"sites[{name!r}]", layer, tuple(units))
                units = {layer: tuple(sorted({int(u) for u in units})) for layer, units in sets.items()}
                out.append((name, "neurons", units))
        elif site == "head":
            count = parts.model.config.get_text_config().num_attention_heads
            size = decoder.projection_weight(decoder.attention(parts.blocks[0])).shape[1] // count
            out += [(f"head {h}", site, tuple(range(h * size, (h + 1) * size))) for h in range(count)]
        else:
            out.append((site, site, ()))
    return out


def _layers(parts: Stack, layers: Sequence[int | range] | None, named: Sequence[Any]) -> list[range]:
    """What is patched at once: one layer, or several neighbouring ones."""
    given = range(parts.depth) if layers is None else layers
    chosen = [one if isinstance(one, range) else range(int(one), int(one) + 1) for one in given]
    decoder.some_layers(parts.depth, [layer for some in chosen for layer in some])
    if any(len(some) != 1 for some in chosen) and {site for _, site, _ in named} - {"layer", *engine.MODULES}:
        raise ValueError(f"layers={layers}: only layer, attn_out and mlp_out can be patched in several")
    return chosen


def _details(named: Sequence[tuple[str, str, Any]], freeze: Freeze | None = None) -> list[str]:
    sites = {site for _, site, _ in named} | {freeze.site if freeze else ""}
    return [name for name, site in (("heads", "head"), ("hidden", "neurons")) if site in sites]


# --------------------------------------------------------------------------- statistics of depth


def thirds(depth: int) -> np.ndarray:
    """Weights [3, layer]: how much of each layer, of which l covers l/L to (l+1)/L, lies in each third.

    >>> thirds(4).round(2).tolist()
    [[1.0, 0.33, 0.0, 0.0], [0.0, 0.67, 0.67, 0.0], [0.0, 0.0, 0.33, 1.0]]
    """
    edges = np.arange(depth + 1) / depth
    low, high = edges[:-1], edges[1:]
    overlap = [np.minimum(high, (k + 1) / 3) - np.maximum(low, k / 3) for k in range(3)]
    return np.clip(np.stack(overlap), 0, None) * depth


def last_of_first_third(depth: int) -> int:
    """The last layer that lies wholly in the first third of the depth (layer 0 in very shallow models)."""
    return max(depth // 3 - 1, 0)


def third_shares(*layers: np.ndarray, axis: int = -1) -> np.ndarray:
    """Share of the summed absolute effect in the first, middle and last third of the depth."""
    means = np.abs(np.stack([np.mean(effects, axis=axis) for effects in layers]))
    return np.tensordot(thirds(len(layers)), means, axes=1) / means.sum(0)


def late_surplus(*layers: np.ndarray, axis: int = -1) -> Numbers:
    """Share of the last third minus the larger of the other two: above 0 if effects are late (claim C1)."""
    first, middle, last = third_shares(*layers, axis=axis)
    return last - np.maximum(first, middle)
