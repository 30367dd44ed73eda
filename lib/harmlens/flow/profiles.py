"""What a sweep says about depth and modules, as numbers: shares of thirds, MLP against attention, centres.

Each statistic takes one array of effects per layer (units along ``axis``), averages over units first and
takes absolute values after that, so that noise of single pairs does not count as effect. Functions of this
form go straight into :func:`evidence.stats.over_seeds`, which resamples the units.

Introduced in notebook 02 ("Layers").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from harmlens.evidence import stats
from harmlens.flow.patching import Sweep


def strong(sweeps: Mapping[int, Sweep], floor: float | None = None) -> list[str]:
    """Pairs that have a total effect in every seed; the rest can't be mediated.

    Raises:
        ValueError: the seeds were swept on different pairs, or no pair is left.
    """
    all_pairs = {sweep.pairs for sweep in sweeps.values()}
    if len(all_pairs) != 1:
        raise ValueError("sweeps: the seeds must have the same pairs in the same order")
    weak = {name for sweep in sweeps.values() for name in sweep.weak(floor)}
    kept = [name for name in next(iter(all_pairs)) if name not in weak]
    if not kept:
        raise ValueError(f"sweeps: none of {len(weak)} pairs has a total effect in every seed")
    return kept


def columns(
    sweep: Sweep, keep: Sequence[str], *series: tuple[str, str | None], what: str = "effect"
) -> np.ndarray:
    """Effects as one row for each pair: the layers of the first series, then those of the next.

    Args:
        keep: ids of the pairs to keep, in order.
        series: (site, position label); the label may be None if there is one only.
        what: ``"effect"``, or ``"effect per size"``, each pair's effect over its patch's norm.
    """
    rows = [sweep.pairs.index(name) for name in keep]
    blocks = []
    for site, position in series:
        effects = sweep.at(site, position)
        if what == "effect per size":
            where = 0 if position is None else sweep.positions.index(position)
            # A patch of no size has no effect either.
            effects = effects / sweep.size[sweep.sites.index(site), :, where].clamp(min=1e-12)
        elif what != "effect":
            raise ValueError(f"what={what!r} is unknown; choose 'effect' or 'effect per size'")
        blocks.append(effects[:, rows].T.double().numpy())
    return np.concatenate(blocks, axis=1)


def curve(
    sweeps: Mapping[int, Sweep], keep: Sequence[str], site: str, position: str | None = None, **options: int
) -> list[stats.Estimate]:
    """Normalised effect of each layer: ratio of means over pairs, then the mean over seeds."""
    total = {s: columns_of_total(sweep, keep) for s, sweep in sweeps.items()}
    effects = {s: columns(sweep, keep, (site, position)) for s, sweep in sweeps.items()}
    depth = next(iter(effects.values())).shape[1]
    return [
        stats.over_seeds(
            {s: np.stack([effects[s][:, layer], total[s]], axis=1) for s in sweeps},
            "ratio",
            shared_units=True,
            **options,
        )
        for layer in range(depth)
    ]


def columns_of_total(sweep: Sweep, keep: Sequence[str]) -> np.ndarray:
    """Total effects of the kept pairs."""
    return sweep.total[[sweep.pairs.index(name) for name in keep]].double().numpy()


def thirds(depth: int) -> np.ndarray:
    """Weights [3, layer]: how much of each layer lies in each third of the depth.

    Layer l of L covers l/L to (l+1)/L.

    >>> thirds(4).round(2).tolist()
    [[1.0, 0.33, 0.0, 0.0], [0.0, 0.67, 0.67, 0.0], [0.0, 0.0, 0.33, 1.0]]
    """
    edges = np.arange(depth + 1) / depth
    low, high = edges[:-1], edges[1:]
    overlap = [np.minimum(high, (k + 1) / 3) - np.maximum(low, k / 3) for k in range(3)]
    return np.clip(np.stack(overlap), 0, None) * depth


def last_of_first_third(depth: int) -> int:
    """The last layer that lies wholly in the first third of the depth (layer 0 in very shallow models).

    >>> [last_of_first_third(depth) for depth in (2, 8, 12)]
    [0, 1, 3]
    """
    return max(depth // 3 - 1, 0)


def _absolute(layers: Sequence[np.ndarray], axis: int) -> np.ndarray:
    return np.abs(np.stack([np.mean(effects, axis=axis) for effects in layers]))


def third_shares(*layers: np.ndarray, axis: int = -1) -> np.ndarray:
    """Share of the summed absolute effect in the first, middle and last third of the depth."""
    means = _absolute(layers, axis)
    return np.tensordot(thirds(len(layers)), means, axes=1) / means.sum(0)


def late_surplus(*layers: np.ndarray, axis: int = -1) -> np.ndarray:
    """Share of the last third minus the larger of the other two: above 0 if effects are late (claim C1)."""
    first, middle, last = third_shares(*layers, axis=axis)
    return last - np.maximum(first, middle)


def mlp_surplus(*layers: np.ndarray, axis: int = -1) -> np.ndarray:
    """(MLP - attention) / (MLP + attention), of effects summed over layers in absolute value (claim C2).

    Args:
        layers: first those of the MLPs, then those of attention.
    """
    means = _absolute(layers, axis)
    half = len(layers) // 2
    mlp, attention = means[:half].sum(0), means[half:].sum(0)
    return (mlp - attention) / (mlp + attention)


def centre(*layers: np.ndarray, axis: int = -1) -> np.ndarray:
    """Centre of mass of the absolute effects over relative depth: 0 first layer, 1 last layer."""
    means = _absolute(layers, axis)
    return np.tensordot(np.linspace(0, 1, len(layers)), means, axes=1) / means.sum(0)


def centre_shift(*layers: np.ndarray, axis: int = -1) -> np.ndarray:
    """Centre of the first half of the series minus that of the second (claim C4c)."""
    half = len(layers) // 2
    return centre(*layers[:half], axis=axis) - centre(*layers[half:], axis=axis)


def removed(effect: np.ndarray, frozen: np.ndarray, *, axis: int = -1) -> np.ndarray:
    """Share of a patch's mean effect that is gone once something behind it is frozen (claims C2b, C4b).

    0: nothing of the effect goes through what is frozen; 1: all of it; above 1: the rest works the other way;
    below 0: what is frozen works against the effect.
    """
    return 1 - np.mean(frozen, axis=axis) / np.mean(effect, axis=axis)


def removed_surplus(
    effect: np.ndarray, frozen: np.ndarray, other: np.ndarray, *, axis: int = -1
) -> np.ndarray | np.floating:
    """Share of an effect that freezing some modules removes, minus that by freezing others (claim C2b).

    Args:
        effect: of the patch with nothing frozen; its mean must not be (nearly) zero.
        frozen, other: of the same patch with the one and with the other kind of module frozen.
    """
    return (np.mean(other, axis=axis) - np.mean(frozen, axis=axis)) / np.mean(effect, axis=axis)
