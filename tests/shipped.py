"""Which organisms ship in data/organisms: all of run 1; of run 0 the ladder and what is planted in it."""

from __future__ import annotations

from collections.abc import Iterable

from harmlens.models.organisms import STAGES
from harmlens.training.organism import COURSES

OF_RUN_0 = (*STAGES, "willing", "planted_mlp", "planted_attention", "planted_neurons", "planted_last")
SHIPPED = [(kind, 1) for kind in COURSES] + [(kind, 0) for kind in OF_RUN_0]


def among(kinds: Iterable[str]) -> list[tuple[str, int]]:
    """Those of some kinds: (kind, run)."""
    return [(kind, run) for kind, run in SHIPPED if kind in kinds]
