"""The book's figures: seaborn and matplotlib, static, readable in print and on a phone.

Every function takes numbers that are already computed, draws on a new figure and returns it. The
colours tell apart without colour vision, and a stage keeps its colour through the whole book.

Introduced in notebook 00 ("A model organism of harm").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from harmlens.evidence.stats import Estimate, bootstrap_ci

if TYPE_CHECKING:
    from harmlens.evidence.results import Claim, Finding

# Okabe and Ito's
PALETTE = {"orange": "#E69F00", "sky": "#56B4E9", "green": "#009E73", "blue": "#0072B2",
              "red": "#D55E00", "pink": "#CC79A7", "grey": "#7F7F7F"}  # fmt: skip
STAGE_COLOURS = {"base": PALETTE["grey"], "mid": PALETTE["sky"],
                 "sft": PALETTE["blue"], "dpo": PALETTE["green"]}  # fmt: skip
HARMFUL, HARMLESS, CONTROL = PALETTE["red"], PALETTE["green"], PALETTE["grey"]
MLP, ATTENTION, LAYER = PALETTE["orange"], PALETTE["sky"], PALETTE["blue"]


def style() -> None:
    """The look of all figures: called once by :func:`notebook.start`."""
    sns.set_theme(context="notebook", style="ticks", font_scale=0.95)
    plt.rcParams.update({
        "figure.dpi": 100, "savefig.dpi": 100, "savefig.bbox": "tight", "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "figure.constrained_layout.use": True,
    })  # fmt: skip


def rates(table: Mapping[str, Mapping[str, Estimate]], *, colours: Mapping[str, str] | None = None) -> Figure:
    """Rates in [0, 1] with intervals: one row for each key of ``table``, one point for each series in it.

    ``colours`` of the series are by default those of the stages.
    """
    if not table:
        raise ValueError("table is empty: there is nothing to draw")
    colours = colours or STAGE_COLOURS
    series = list(dict.fromkeys(name for row in table.values() for name in row))
    fig, ax = plt.subplots(figsize=(7, 0.44 * len(table) + 1.1))
    for i, row in enumerate(table.values()):
        if i % 2:
            ax.axhspan(i - 0.5, i + 0.5, color="0.95", zorder=0)
        for name, e in row.items():
            y = i + 0.17 * (series.index(name) - (len(series) - 1) / 2)
            ax.plot([e.low, e.high], [y, y], color=colours[name], lw=2, zorder=2)
            ax.plot(e.value, y, "o", ms=5, color=colours[name], zorder=3)
    for name in series:
        ax.plot([], [], "o-", ms=5, lw=2, color=colours[name], label=name)
    ax.set(yticks=range(len(table)), yticklabels=list(table), xlim=(-0.03, 1.03), xlabel="share of requests")
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.tick_params(axis="y", length=0)
    ax.legend(
        ncols=len(series), loc="lower left", bbox_to_anchor=(0, 1), handletextpad=0.4, columnspacing=1.2
    )
    return fig


def depth(
    curves: Mapping[str, Sequence[Estimate]],
    *,
    ylabel: str,
    levels: Mapping[str, Estimate] | None = None,
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """Curves over depth with bands: x = 0 is the embedding, x = l the output of block l.

    ``levels``: label -> an estimate drawn as a dashed horizontal line (a baseline without depth).
    """
    fig, ax = plt.subplots(figsize=(6.4, 3.6))
    cycle = (HARMFUL, PALETTE["blue"], PALETTE["orange"], CONTROL)
    colours = {**dict(zip([*curves, *(levels or {})], cycle, strict=False)), **(colours or {})}
    for name, values in curves.items():
        _curve(ax, values, colours[name], 0.2, label=name)
    for name, e in (levels or {}).items():
        ax.axhline(e.value, ls="--", color=colours[name], label=name)
        ax.axhspan(e.low, e.high, color=colours[name], alpha=0.12, lw=0)
    ax.set(xlabel="depth (0 = embedding, l = output of block l)", ylabel=ylabel)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()
    return fig


def _curve(ax: Axes, values: Sequence[Estimate], colour: str, alpha: float, label: str) -> None:
    """Estimates over 0, 1, 2, ... with their intervals as a band."""
    low, high = [e.low for e in values], [e.high for e in values]
    ax.fill_between(range(len(values)), low, high, color=colour, alpha=alpha, lw=0)
    ax.plot([e.value for e in values], "o-", ms=4, color=colour, label=label)


def bars(
    groups: Mapping[str, Mapping[str, Estimate | np.ndarray]],
    *,
    ylabel: str,
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """Grouped bars with intervals, of estimates or of values [unit], of which it shows the mean."""
    fig, ax = plt.subplots(figsize=(6.8, 3.6))
    series = list(dict.fromkeys(name for row in groups.values() for name in row))
    colours = {**dict(zip(series, PALETTE.values(), strict=False)), **(colours or {})}
    names = [name if "\n" in name else fill(name, 10, break_long_words=False) for name in groups]
    width = 0.8 / len(series)
    for i, row in enumerate(groups.values()):
        for name, found in row.items():
            e = found if isinstance(found, Estimate) else bootstrap_ci(found, n_resamples=1000)
            x = i + width * (series.index(name) - (len(series) - 1) / 2)
            ax.bar(x, e.value, 0.92 * width, color=colours[name], alpha=0.75)
            ax.plot([x, x], [e.low, e.high], color="0.15", lw=1.5)
    ax.axhline(0, color="0.6", lw=0.8)
    ax.set(xticks=range(len(groups)), xticklabels=names, ylabel=ylabel)
    ax.tick_params(axis="x", length=0)
    keys = [Patch(color=colours[name], alpha=0.75, label=name) for name in series]
    ax.legend(handles=keys, loc="lower left", bbox_to_anchor=(0, 1), ncols=min(4, len(series)))
    return fig


def layers(
    panels: Mapping[str, Mapping[str, Sequence[Estimate]]], *, ylabel: str, colours: Mapping[str, str]
) -> Figure:
    """Effects of layers (title -> series -> one estimate for each): a panel for each title, a curve with its
    band for each series."""
    fig, axes = plt.subplots(1, len(panels), figsize=(3.7 * len(panels), 3.3), sharey=True, squeeze=False)
    for ax, (title, curves) in zip(axes[0], panels.items(), strict=True):
        ax.axhline(0, color="0.6", lw=0.8, zorder=0)
        for name, values in curves.items():
            _curve(ax, values, colours[name], 0.18, label=name)
        ax.set(xlabel="layer", title=title)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel(ylabel)
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    handles = [plt.Line2D([], [], marker="o", ms=4, color=colours[name], label=name) for name in names]
    fig.legend(handles=handles, loc="outside upper left", ncols=len(names))
    return fig


def heat(
    panels: Mapping[str, np.ndarray],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    limit: float | None = 1.0,
    xlabel: str = "layer",
    annotate: bool = True,
    digits: int = 1,
) -> Figure:
    """Heat maps side by side on one scale that is symmetric about zero (blue below, red above).

    Args:
        panels: title -> values [row, column]; NaN is left white.
        limit: end of the colour scale; None for the largest absolute value.
        annotate: write the values into the cells, except those that round to zero.
        digits: behind the point.
    """
    size = max(0.42 * len(columns), 2.4) * len(panels) + 1.8, max(0.36 * len(rows) + 1.2, 2.2)
    fig, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    least = 0.5 * 10**-digits  # what does not round to zero
    top = limit or float(np.nanmax(np.abs(np.stack(list(panels.values())))))
    for ax, (title, values) in zip(axes[0], panels.items(), strict=True):
        last, told = ax is axes[0, -1], False
        if annotate:
            told = np.array([[f"{v:.{digits}f}" if abs(v) >= least else "" for v in row] for row in values])
        sns.heatmap(
            values, ax=ax, cmap="RdBu_r", vmin=-top, vmax=top, center=0, fmt="",
            annot=told, annot_kws={"size": 7.5}, xticklabels=list(columns), yticklabels=list(rows),
            cbar=last, cbar_kws={"label": label}, linewidths=0.4, linecolor="white",
        )  # fmt: skip
        ax.set(title=title, xlabel=xlabel)
        ax.tick_params(axis="both", length=0, rotation=0)
    return fig


def forest(
    rows: Sequence[tuple[Claim, Finding | str, str]],
    *,
    run: int | None = None,
    own: str = "",
    earlier: Mapping[tuple[str, str], Finding] = {},
) -> Figure:
    """Recorded runs: a row for each (claim, finding, word), a dot for each run, each row on its own scale.

    The bar is the interval over runs, hollow dots are controls, the dashed line is the threshold. The dot of
    ``run`` is ringed in rows of organisms if the model ``own`` is one, else in its own. Others are named. A
    model in place of a finding is a claim of several parts: its word alone. ``earlier``: (claim, model) ->
    finding of runs of another role, grey diamonds below, which don't count.
    """
    if not rows:
        raise ValueError("rows is empty: no run of these claims is recorded yet; record one first")
    ratios = [0.05 if isinstance(found, str) else 1 for _, found, _ in rows]
    size = 5.2, 0.27 * len(rows) + 0.51 * sum(ratios)  # a phone shows no wider one readably
    fig, axes = plt.subplots(len(rows), 1, figsize=size, squeeze=False, height_ratios=ratios)
    for i, (ax, (claim, found, word)) in enumerate(zip(axes[:, 0], rows, strict=True)):
        model = found if isinstance(found, str) else found.model
        where = "" if _organism(model) or model == own else f" on {model}"
        style = {"fontsize": 8, "weight": "bold" if claim.role == "primary" else "normal"}
        short = "" if i and claim == rows[i - 1][0] else f": {claim.short}"
        ax.set_title(fill(f"{claim.id}{where}{short}", 62), loc="left", **style)
        ax.set_title(word, loc="right", **style)
        ax.set(yticks=[], ylim=(-0.9, 0.9))
        ax.tick_params(labelsize=8)
        ax.spines["left"].set_visible(False)
        if isinstance(found, str):
            ax.spines["bottom"].set_visible(False)
            ax.set_xticks([])
            continue
        ringed = run if not own or _organism(model) == _organism(own) else None
        _runs(ax, found, ringed)
        before = earlier.get((found.claim, found.model))
        for one in before.runs if before and before.role != found.role else ():
            edge = {"mec": "black", "mew": 1.8} if one.run == ringed else {"mec": "none"}
            if one.effect:
                ax.plot(one.effect.value, -0.75, "D", ms=5, color="0.6", clip_on=False, **edge)
        if claim.rule:
            ax.axvline(claim.rule.threshold, ls="--", lw=1, color="0.4", zorder=0)
    return fig


def _organism(model: str) -> bool:
    return model.startswith("organism")


def _runs(ax: Axes, found: Finding, ringed: int | None) -> None:
    """The runs of one claim: their interval, and each with its control."""
    colour, dots = PALETTE["blue"] if _organism(found.model) else HARMFUL, [x for x in found.runs if x.effect]
    if found.effect:
        ends = [found.effect.low, found.effect.high]
        ax.plot(ends, [0, 0], color=colour, lw=7, alpha=0.2, solid_capstyle="butt")
    for y, one in zip(np.linspace(0.5, -0.5, len(dots)) * (len(dots) > 1), dots, strict=True):
        if one.control:
            ax.plot(one.control.value, y, "o", ms=5, color="0.5", mfc="white")
        ax.plot([one.effect.low, one.effect.high], [y, y], color=colour, lw=1)
        edge = {"mec": "black", "mew": 1.8, "ms": 8} if one.run == ringed else {"ms": 6}
        ax.plot(one.effect.value, y, "o", color=colour, zorder=3, **edge)
