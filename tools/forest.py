"""Forest plots for sweeps: claims over models and training seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from harmlens.evidence import plots
from harmlens.evidence.stats import Estimate


def forest(
    claims: Mapping[str, Mapping[str, Mapping[str, Estimate]]],
    *,
    models: Sequence[str],
    controls: Mapping[str, Mapping[str, Mapping[str, Estimate]]] | None = None,
    thresholds: Mapping[str, float] | None = None,
    xlabels: Mapping[str, str] | None = None,
    missing: Sequence[str] = (),
) -> Figure:
    """Forest plot: one panel for each claim, one row for each model, one point for each training seed.

    Filled points are measurements, hollow ones their controls, lines 95 % intervals; the dashed line is
    the claim's threshold. A model without a measurement of the claim keeps its row.

    Args:
        claims: claim -> model -> seed label -> estimate.
        models: the rows from top to bottom, the same in every panel.
        controls: as ``claims``; may have gaps.
        thresholds: claim -> where the dashed line stands.
        xlabels: claim -> what the value is measured in.
        missing: what was not measured at all, listed below the panels.

    Raises:
        ValueError: nothing to draw, or a model of ``claims`` that is not in ``models``.
    """
    if not claims:
        raise ValueError("claims is empty: there is nothing to draw")
    if strangers := sorted({m for rows in claims.values() for m in rows} - set(models)):
        raise ValueError(f"models: lacks {', '.join(strangers)}, which claims has; add them")
    seeds = sorted({s for rows in claims.values() for row in rows.values() for s in row})
    cycle = [plots.PALETTE[name] for name in ("blue", "red", "green", "pink", "orange", "sky")]
    colours = {seed: cycle[i % len(cycle)] for i, seed in enumerate(seeds)}
    step = 0.7 / (2 * len(seeds))  # a measurement and its control for each seed
    columns = min(2, len(claims))
    rows = -(-len(claims) // columns)
    listed = [*missing[:12], *([f"and {len(missing) - 12} more"] if len(missing) > 12 else [])]
    below = 0.19 * (len(listed) + 1) if listed else 0.0
    tall = (0.36 + 0.13 * len(seeds)) * len(models) + 1.0
    size = (3.2 * columns + 1.6, tall * rows + 0.4 + below)
    fig, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    for ax, (claim, row) in zip(axes.flat, claims.items(), strict=False):
        for i, model in enumerate(models):
            if i % 2:
                ax.axhspan(i - 0.5, i + 0.5, color="0.95", zorder=0)
            if model not in row:
                ax.text(0.5, i, "not measured", transform=ax.get_yaxis_transform(),
                        ha="center", va="center", color="0.45", fontsize=8)  # fmt: skip
            for j, seed in enumerate(seeds):
                beside = (controls or {}).get(claim, {}).get(model, {}).get(seed)
                for k, (e, face) in enumerate(
                    [(row.get(model, {}).get(seed), colours[seed]), (beside, "white")]
                ):
                    if e is not None:
                        y = i + step * (2 * j + k + 0.5 - len(seeds))
                        ax.plot([e.low, e.high], [y, y], color=colours[seed], lw=1.5, alpha=1 - 0.5 * k)
                        ax.plot(e.value, y, "o", ms=5, color=colours[seed], mfc=face, zorder=3)
        if thresholds and claim in thresholds:
            ax.axvline(thresholds[claim], ls="--", lw=1, color="0.4", zorder=1)
        ax.set_title(claim)
        ax.set_xlabel((xlabels or {}).get(claim, ""), fontsize=9)
        ax.tick_params(axis="y", length=0)
    for ax in list(axes.flat)[len(claims):]:  # fmt: skip
        ax.set_visible(False)
    axes[0, 0].set(yticks=range(len(models)), yticklabels=list(models), ylim=(len(models) - 0.5, -0.5))
    handles = [plt.Line2D([], [], marker="o", ms=5, lw=1.5, color=colours[s], label=s) for s in seeds]
    if any((controls or {}).values()):
        handles.append(
            plt.Line2D([], [], marker="o", ms=5, lw=1.5, color="0.4", mfc="white", label="control")
        )
    fig.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    if listed:
        fig.supxlabel("\n".join(["Not finished:", *listed]), x=0.01, ha="left", fontsize=8)
    return fig
