"""The forest plot of a sweep: claims over models and training seeds."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harmlens.evidence import plots

LISTED = 12  # missing cells that are named below the panels


def draw(content: dict[str, Any]) -> Figure:
    """One panel for each claim, one row for each model, one point for each training seed.

    Filled points are measurements, hollow ones their controls, lines 95 % intervals; the dashed line is
    the claim's threshold. A model without a measurement of the claim keeps its row.

    Args:
        content: as ``forest.json`` holds it.
    """
    plots.style()
    claims, models = content["claims"], content["models"]
    seeds = sorted({_seed(row) for claim in claims.values() for row in claim["rows"]})
    cycle = [plots.PALETTE[name] for name in ("blue", "red", "green", "pink", "orange", "sky")]
    colours = {seed: cycle[i % len(cycle)] for i, seed in enumerate(seeds)}
    missing = [f"{cell['cell']} ({cell['state']})" for cell in content["missing"]]
    listed = [*missing[:LISTED], *([f"and {len(missing) - LISTED} more"] if len(missing) > LISTED else [])]
    columns = min(2, len(claims))
    rows = -(-len(claims) // columns)
    tall = (0.36 + 0.13 * len(seeds)) * len(models) + 1.0
    size = (3.2 * columns + 1.6, tall * rows + 0.4 + (0.19 * (len(listed) + 1) if listed else 0.0))
    fig, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    for ax, (name, claim) in zip(axes.flat, claims.items(), strict=False):
        _panel(ax, claim, models, colours)
        ax.set_title(name)
    for ax in axes.flat[len(claims) :]:
        ax.set_visible(False)
    axes[0, 0].set(yticks=range(len(models)), yticklabels=models, ylim=(len(models) - 0.5, -0.5))
    handles = [plt.Line2D([], [], marker="o", ms=5, lw=1.5, color=colours[s], label=s) for s in seeds]
    handles.append(plt.Line2D([], [], marker="o", ms=5, lw=1.5, color="0.4", mfc="white", label="control"))
    fig.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    if listed:
        fig.supxlabel("\n".join(["Not finished:", *listed]), x=0.01, ha="left", fontsize=8)
    return fig


def _seed(row: dict[str, Any]) -> str:
    return "no seed" if row["seed"] is None else f"seed {row['seed']}"


def _panel(ax: Axes, claim: dict[str, Any], models: list[str], colours: dict[str, str]) -> None:
    step = 0.7 / (2 * len(colours))  # a measurement and its control for each seed
    for i, model in enumerate(models):
        if i % 2:
            ax.axhspan(i - 0.5, i + 0.5, color="0.95", zorder=0)
        own = {_seed(row): row for row in claim["rows"] if row["model"] == model}
        if not own:
            ax.text(0.5, i, "not measured", transform=ax.get_yaxis_transform(),
                    ha="center", va="center", color="0.45", fontsize=8)  # fmt: skip
        for j, (seed, colour) in enumerate(colours.items()):
            both = [(own[seed], colour), (own[seed]["control"], "white")] if seed in own else []
            for k, (one, face) in enumerate(both):
                if one:
                    y = i + step * (2 * j + k + 0.5 - len(colours))
                    ax.plot(one["ci"] or [one["value"]] * 2, [y, y], color=colour, lw=1.5, alpha=1 - 0.5 * k)
                    ax.plot(one["value"], y, "o", ms=5, color=colour, mfc=face, zorder=3)
    if claim["threshold"] is not None:
        ax.axvline(claim["threshold"], ls="--", lw=1, color="0.4", zorder=1)
    ax.set_xlabel(claim["scale"], fontsize=9)
    ax.tick_params(axis="y", length=0)
