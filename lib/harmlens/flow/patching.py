"""Activation patching: indirect effects of layers, modules, heads and neurons, at chosen positions.

One engine, :func:`sweep`. For every pair it overwrites an activation of one run with that of the other
and reads the outcome:

* **denoising** patches x1's activation into the run on x0: NIE = Y(x0; M<-M(x1)) - Y(x0), sufficiency;
* **noising** patches x0's activation into the run on x1: TIE = Y(x1) - Y(x1; M<-M(x0)), necessity.

Both have the sign of the total effect TE = Y(x1) - Y(x0), where x1 is the run that answers.

Only the part of a run that a patch can reach is computed again: see :mod:`flow.cells`.

Introduced in notebook 02 ("Layers").
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from harmlens.evidence import stats
from harmlens.flow import cells, partial, runs, stack
from harmlens.flow.cells import Freeze
from harmlens.flow.outcomes import Outcome, Replies, Reply
from harmlens.keep import digests, files
from harmlens.models import parts as decoder
from harmlens.models.chats import Pair, Prompt, tokens
from harmlens.models.forward import LanguageModel, require_room
from harmlens.models.parts import Stack

DIRECTIONS = ("denoising", "noising")


@dataclass(frozen=True)
class Sweep:
    """Outcomes of patched runs, with what they have to be compared with.

    Attributes:
        sites, layers, positions: labels of the first three axes of ``patched``.
        pairs: ids of the pairs, the last axis.
        y1, y0: outcomes of the unpatched runs.
        patched: outcome of each patched run.
        size: Euclidean norm of what each patch changed at its site, over its positions.
    """

    sites: tuple[str, ...]
    layers: tuple[int, ...]
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
        """NIE of a denoising sweep, TIE of a noising one, in units of the outcome."""
        return self.patched - self.y0 if self.direction == "denoising" else self.y1 - self.patched

    def at(self, site: str, position: str | None = None) -> Float[Tensor, "layer pair"]:
        """Effects of one site at one position label (which may be left out if there is one only)."""
        if site not in self.sites:
            raise ValueError(f"site={site!r} was not swept; there are {', '.join(self.sites)}")
        if position is None and len(self.positions) > 1:
            raise ValueError(f"position: choose one of {', '.join(self.positions)}")
        if position is not None and position not in self.positions:
            raise ValueError(f"position={position!r} was not swept; there are {', '.join(self.positions)}")
        where = 0 if position is None else self.positions.index(position)
        return self.effects[self.sites.index(site), :, where]

    def weak(self, floor: float | None = None) -> list[str]:
        """Pairs whose total effect is too small to be mediated.

        Args:
            floor: in units of the outcome; default: a tenth of the median absolute total effect.
        """
        limit = 0.1 * self.total.abs().median() if floor is None else floor
        return [name for name, te in zip(self.pairs, self.total, strict=True) if te.abs() <= limit]

    def strong(self, floor: float | None = None) -> Sweep:
        """The sweep without its weak pairs, which a warning names.

        Raises:
            ValueError: no pair is left.
        """
        weak = set(self.weak(floor))
        if not weak:
            return self
        if len(weak) == len(self.pairs):
            raise ValueError(f"pairs: none of {len(weak)} has a total effect, so there is nothing to mediate")
        names = ", ".join(sorted(weak)[:5]) + (" ..." if len(weak) > 5 else "")
        warnings.warn(
            f"{len(weak)} of {len(self.pairs)} pairs have (nearly) no total effect and are left out: {names}",
            stacklevel=2,
        )
        keep = torch.tensor([name not in weak for name in self.pairs])
        return replace(
            self, pairs=tuple(name for name in self.pairs if name not in weak), y1=self.y1[keep],
            y0=self.y0[keep], patched=self.patched[..., keep], size=self.size[..., keep],
        )  # fmt: skip

    def normalized(self, site: str, position: str | None = None) -> list[stats.Estimate]:
        """Ratio of mean effect to mean total effect for each layer, with bootstrap intervals over pairs."""
        return [stats.ratio_of_means(e, self.total) for e in self.at(site, position)]

    def minus(self, other: Sweep) -> Sweep:
        """The same sweep for the difference of two outcomes.

        Raises:
            ValueError: the other one patched something else.
        """
        for name in ("sites", "layers", "positions", "pairs", "direction"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"other: its {name} differ, so there is no difference cell by cell")
        return replace(
            self, y1=self.y1 - other.y1, y0=self.y0 - other.y0, patched=self.patched - other.patched
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each site, layer, position and pair."""
        index = pd.MultiIndex.from_product(
            [self.sites, self.layers, self.positions, self.pairs], names=["site", "layer", "position", "pair"]
        )
        columns = {"effect": self.effects, "patched": self.patched, "size": self.size}
        frame = pd.DataFrame({k: v.flatten().numpy() for k, v in columns.items()}, index=index).reset_index()
        return frame.assign(total=np.tile(self.total.numpy(), len(frame) // len(self.pairs)))


@torch.no_grad()
def sweep(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    outcome: Outcome | Replies | Reply | Callable[[Tensor], Tensor],
    *,
    sites: Sequence[str] = ("layer",),
    layers: Sequence[int] | None = None,
    positions: runs.Positions = "last",
    direction: str = "denoising",
    window: int = 1,
    units: Mapping[str, Mapping[int, Sequence[int]]] | None = None,
    freeze: Freeze | None = None,
    null: int | None = None,
    noise: float | None = None,
    max_tokens: int = 3072,
    batch_size: int = 128,
    progress: str | None = None,
    save: str | Path | None = None,
) -> Sweep:
    """Patch every site in every layer at every position, for every pair.

    Args:
        outcome: :func:`flow.outcomes.y1`, ``y2``, a :class:`~flow.outcomes.Replies` for Y3, or
            any function of last-position logits [row, vocab] that gives one value for each row.
        sites: out of :data:`flow.cells.SITES`. ``resid_post`` is the block's output; ``layer`` its own
            contribution (output minus input); ``attn_out`` and ``mlp_out`` are the modules' outputs;
            ``head`` stands for every attention head; ``neurons`` for each set in ``units``. What comes
            later in the same block reacts to the patch, unless it is frozen.
        layers: None for all.
        positions: ``"last"`` prompt position; ``"all"`` prompt positions at once; ``"each"`` on its
            own; or a function that names groups of positions, such as :func:`asking.pairs.roles`.
        direction: ``"denoising"`` (NIE) or ``"noising"`` (TIE).
        window: patch this many neighbouring layers at once (an odd number).
        units: name -> layer -> hidden units of its MLP, for the site ``neurons``.
        freeze: modules that do not react to the patch.
        null: a seed: each patch becomes a random direction of the same norm (per pair and position).
        noise: corrupt x0 otherwise: instead of its own words, x1's embeddings where the two differ, plus
            Gaussian noise of this many standard deviations of the model's embeddings.
        max_tokens: most tokens (rows times positions) that go through a block at once; bounds memory.
        batch_size: most pairs recorded at once.
        progress: label of a progress bar; shown on a terminal only.
        save: JSON-lines file to which each pair's outcomes are added as they come. Pairs found there,
            from a call with the same arguments on the same model, are not run again; a second process waits
            for the first.

    Returns:
        A :class:`Sweep` on the CPU, float32.

    Raises:
        ValueError: pairs of unequal length or with two equal sides (named), an unknown site, direction
            or position, a site that the model does not have, blocks that can't be patched.
    """
    _check(sites, direction, window, units, noise, max_tokens, batch_size)
    if isinstance(outcome, Replies):
        # Y3 is a difference of two outcomes, and patching is done for each of them.
        options = {k: v for k, v in locals().items() if k not in ("lm", "pairs", "outcome")}
        parts_of = [sweep(lm, pairs, part, **options) for part in outcome.parts()]
        return parts_of[0].minus(parts_of[1])
    parts = partial.patchable(lm)
    chosen = decoder.some_layers(parts, layers)
    encoded = runs.encode(lm, pairs, outcome, positions)
    labels = encoded.labels
    _check_units(parts, units, freeze)
    names = _site_names(parts, sites, units)
    settings = [names, chosen, labels, direction, window, freeze, null, noise]
    key = "" if save is None else _key(lm, parts, outcome, [encoded.fingerprint, *settings])
    hidden = True if progress is None else None
    checked = False
    alone = nullcontext() if save is None else files.locked(Path(save))
    with alone, tqdm(total=len(pairs), desc=progress, disable=hidden, leave=False) as bar:
        rows = _Rows(save, key, len(names) * len(chosen) * len(labels))
        todo = [i for i in range(len(pairs)) if pairs[i].id not in rows.done]
        bar.update(len(pairs) - len(todo))
        for group in runs.groups(
            lm, parts, encoded, todo, details=_details(sites, freeze), noise=noise, size=batch_size
        ):
            if not checked:
                cells.check_partial(group)
                checked = True
            patches = list(_cells(group, names, chosen, labels, window))
            y1, y0 = group.unpatched(group.x1), group.unpatched(group.x0)
            values, sizes = cells.run_cells(
                group, patches, direction=direction, freeze=freeze, null=null, max_tokens=max_tokens
            )
            for row, i in enumerate(group.index):
                rows.add(pairs[i].id, y1[row], y0[row], values[:, row], sizes[:, row])
            bar.update(len(group.index))
    shape = (len(names), len(chosen), len(labels), len(pairs))
    y1, y0, values, sizes = rows.collect([pair.id for pair in pairs])
    return Sweep(
        tuple(name for name, *_ in names), tuple(chosen), tuple(labels), tuple(pair.id for pair in pairs),
        direction, y1, y0, values.T.reshape(shape), sizes.T.reshape(shape),
    )  # fmt: skip


@torch.no_grad()
def across(
    lm: LanguageModel,
    source: LanguageModel,
    chats: Sequence[Prompt],
    outcome: Outcome | Callable[[Tensor], Tensor],
    *,
    sites: Sequence[str] = ("layer",),
    positions: str = "all",
    max_tokens: int = 3072,
) -> Sweep:
    """Patch activations of *another model* that reads the same prompts: the model contrast.

    Where two models differ in some weights, the first module whose patch has an effect is the first that
    differs: everything below it computes the same in both.

    Args:
        source: of the same architecture, such as the parent of a fine-tuned model.
        chats: prompts; each is a unit, named by its place in the list.
        positions: ``"all"`` or ``"last"``.

    Returns:
        A denoising :class:`Sweep` with y1 the source's outcome and y0 that of ``lm``.

    Raises:
        ValueError: models of different shape, no prompts, an unknown site or position.
    """
    _check(sites, "denoising", 1, None, None, max_tokens, 1)
    parts, theirs = partial.patchable(lm), partial.patchable(source)
    if (parts.depth, parts.width) != (theirs.depth, theirs.width):
        raise ValueError(
            f"source: {source.name!r} has another shape than {lm.name!r}; choose a relative of it"
        )
    if not chats or positions not in ("all", "last"):
        raise ValueError(f"chats must not be empty and positions be 'all' or 'last', got {positions!r}")
    ids = [tokens(lm.tokenizer, chat.render(lm)) for chat in chats]
    require_room(lm, ids)
    names = _site_names(parts, sites, None)
    depth, n = parts.depth, len(ids)
    values, sizes = torch.zeros(len(names) * depth, n), torch.zeros(len(names) * depth, n)
    y1, y0 = torch.zeros(n), torch.zeros(n)
    for length in sorted(set(map(len, ids))):
        index = [i for i in range(n) if len(ids[i]) == length]
        rows = torch.tensor([ids[i] for i in index])
        columns = {positions: tuple(range(length)) if positions == "all" else (length - 1,)}
        here, there = (
            stack.record(p, rows.to(model.device), details=_details(sites, None), share=False)
            for p, model in ((parts, lm), (theirs, source))
        )
        read = runs.first_token(parts, outcome)
        group = runs.Group(parts, index, there, here, columns, 0, 1, read, [str(i) for i in index])
        y1[index] = runs.first_token(theirs, outcome)(there.resid[-1], torch.tensor(index)).cpu()
        y0[index] = group.unpatched(here).cpu()
        patches = list(_cells(group, names, range(depth), list(columns), 1))
        values[:, index], sizes[:, index] = cells.run_cells(group, patches, max_tokens=max_tokens)
    shape = (len(names), depth, 1, n)
    return Sweep(
        tuple(name for name, *_ in names), tuple(range(depth)), (positions,), tuple(map(str, range(n))),
        "denoising", y1, y0, values.view(shape), sizes.view(shape),
    )  # fmt: skip


# Named sweeps, as the field asks for them.
def layers(lm: LanguageModel, pairs: Sequence[Pair], outcome: Any, **options: Any) -> Sweep:
    """Each layer's own contribution, attention and MLP together (mediation paper, layer level)."""
    return sweep(lm, pairs, outcome, sites=("layer",), **options)


def modules(lm: LanguageModel, pairs: Sequence[Pair], outcome: Any, **options: Any) -> Sweep:
    """MLP and attention output of each layer (mediation paper, module level)."""
    return sweep(lm, pairs, outcome, sites=("mlp_out", "attn_out"), **options)


def residual(lm: LanguageModel, pairs: Sequence[Pair], outcome: Any, **options: Any) -> Sweep:
    """The residual stream after each layer: at the last position it ends at 1, whatever the model."""
    return sweep(lm, pairs, outcome, sites=("resid_post",), **options)


def heads(lm: LanguageModel, pairs: Sequence[Pair], outcome: Any, **options: Any) -> Sweep:
    """Every attention head of each layer."""
    return sweep(lm, pairs, outcome, sites=("head",), **options)


# --------------------------------------------------------------------------- checks and labels


def check_direction(direction: str) -> None:
    """Refuse a direction of patching that there is not."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown; choose 'denoising' or 'noising'")


def _check(
    sites: Sequence[str], direction: str, window: int, units: Any, noise: float | None, max_tokens: int,
    batch_size: int,
) -> None:  # fmt: skip
    unknown = [site for site in sites if site not in cells.SITES]
    if unknown or not sites:
        raise ValueError(f"sites={list(sites)}: unknown {unknown}; choose from {', '.join(cells.SITES)}")
    check_direction(direction)
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window={window} must be an odd number of layers, such as 1 or 3")
    if window > 1 and not set(sites) <= {"layer", "attn_out", "mlp_out"}:
        raise ValueError(f"window={window}: only layer, attn_out and mlp_out can be patched in windows")
    if ("neurons" in sites) != bool(units):
        raise ValueError("units: give sets of hidden units with the site 'neurons', and only with it")
    if noise is not None and not 0 <= noise < float("inf"):
        raise ValueError(f"noise={noise} must be a number of standard deviations, 0 or more")
    for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _check_units(parts: Stack, units: Any, freeze: Freeze | None) -> None:
    """What a model does not have would silently count as not patched or not frozen."""
    every = range(parts.depth)
    asked = [
        (f"units[{name!r}]", layer, chosen)
        for name, u in (units or {}).items()
        for layer, chosen in u.items()
    ]
    if freeze is not None:
        where = every if freeze.layers is None else freeze.layers
        asked += [("freeze", layer, freeze.units) for layer in where]
    for name, layer, chosen in asked:
        if layer not in every:
            raise ValueError(f"{name}: there is no layer {layer}; choose out of 0 to {parts.depth - 1}")
        if len(chosen):
            count = decoder.projection_weight(decoder.mlp(parts.blocks[layer])).shape[1]
            wrong = [int(u) for u in chosen if not 0 <= u < count]
            if wrong:
                raise ValueError(
                    f"{name}: layer {layer} has the hidden units 0 to {count - 1}, not {wrong[:5]}"
                )


def _site_names(parts: Stack, sites: Sequence[str], units: Any) -> list[tuple[str, str, Any]]:
    """Label, site and units of each entry of the first axis; heads are slices of their projection's input."""
    out: list[tuple[str, str, Any]] = []
    for site in sites:
        if site == "head":
            count = parts.model.config.get_text_config().num_attention_heads
            size = decoder.projection_weight(decoder.attention(parts.blocks[0])).shape[1] // count
            out += [(f"head {h}", site, tuple(range(h * size, (h + 1) * size))) for h in range(count)]
        elif site == "neurons":
            out += [
                (
                    name,
                    site,
                    {layer: tuple(sorted({int(u) for u in chosen})) for layer, chosen in sets.items()},
                )
                for name, sets in units.items()
            ]
        else:
            out.append((site, site, ()))
    return out


def _details(sites: Sequence[str], freeze: Freeze | None) -> list[str]:
    out = ["heads"] if "head" in sites else []
    return [*out, "hidden"] if "neurons" in sites or (freeze and freeze.site == "neurons") else out


def _cells(
    group: runs.Group,
    names: Sequence[tuple[str, str, Any]],
    chosen: Sequence[int],
    labels: Sequence[str],
    window: int,
) -> Iterator[cells.Cell]:
    depth = group.parts.depth
    for _, site, units in names:
        for layer in chosen:
            for label in labels:
                which = tuple(units.get(layer, ())) if isinstance(units, dict) else units
                yield cells.windowed(site, layer, depth, window, group.columns[label], which)


# --------------------------------------------------------------------------- results as they come


def _key(lm: LanguageModel, parts: Stack, outcome: Any, settings: Any) -> str:
    """Of everything that outcomes depend on: model as it is now, outcome with its tokens, settings."""
    # A function says what it is by what it does: on a few made-up logits.
    if isinstance(outcome, Reply):
        reads: Any = outcome.skip
    else:
        ids = getattr(outcome, "ids", None)
        count = parts.head.weight.shape[0] if ids is None else len(ids)
        made_up = 3 * torch.randn(4, count, generator=torch.Generator().manual_seed(0))
        values = getattr(outcome, "value", outcome)(made_up.to(parts.head.weight.device))
        reads = (ids, [f"{v:.6g}" for v in values.flatten().tolist()])
    text = repr((lm.name, lm.revision, digests.model_digest(lm), reads, settings))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Rows:
    """Outcomes by pair; with a file, each is added to it at once, and those of an earlier run are there."""

    def __init__(self, path: str | Path | None, key: str, cells: int) -> None:
        self.key, self.done = key, {}
        self.path = None if path is None else Path(path)
        for row in files.read_lines(self.path) if self.path is not None else ():
            if isinstance(row, dict) and row.get("key") == key and len(row["values"]) == cells:
                self.done[row["pair"]] = (row["y1"], row["y0"], row["values"], row["sizes"])

    def add(self, pair: str, y1: Tensor, y0: Tensor, values: Tensor, sizes: Tensor) -> None:
        row = (y1.item(), y0.item(), values.tolist(), sizes.tolist())
        if not np.isfinite([*row[:2], *row[2]]).all():
            raise ValueError(
                f"the outcome of pair {pair!r} is not finite. In float16 activations can overflow: load "
                "the model with dtype='bfloat16' or 'float32'"
            )
        self.done[pair] = row
        if self.path is not None:
            line = dict(zip(("y1", "y0", "values", "sizes"), row, strict=True))
            files.append_lines(self.path, [{"key": self.key, "pair": pair, **line}])

    def collect(self, pairs: Sequence[str]) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(column) for column in zip(*(self.done[p] for p in pairs), strict=True))
