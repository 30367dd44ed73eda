"""One sweep under many settings: does a conclusion depend on how the question was put?

Corruption, outcome, patching direction, positions and window are choices that papers make and seldom vary
(Zhang and Nanda 2024). :func:`vary` goes through all combinations. All outcomes are read off the same
patched runs: prompt and reply are run together, so the first-word outcomes stand at the prompt's end and
the whole-reply outcomes behind it.

Introduced in notebook 08 ("Can we trust it?").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from harmlens.flow import cells, partial, runs
from harmlens.flow.outcomes import Replies, TokenSets, logit_difference, refusal_log_odds
from harmlens.flow.patching import DIRECTIONS
from harmlens.models import parts as decoder
from harmlens.models.chats import Pair
from harmlens.models.forward import LanguageModel

OUTCOMES = ("Y1", "Y2", "Y3", "Y3 from word 2")
CORRUPTIONS: Mapping[str, float | None] = {"swap": None, "noise": 3.0}
POSITIONS = ("all", "last")
WINDOWS = (1, 3, 5)
SITES = ("layer", "mlp_out", "attn_out")


@dataclass(frozen=True)
class Setting:
    """One way to put the question."""

    corruption: str
    outcome: str
    direction: str
    positions: str
    window: int

    def __str__(self) -> str:
        return f"{self.corruption}, {self.outcome}, {self.direction}, {self.positions}, window {self.window}"


@torch.no_grad()
def vary(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    sets: TokenSets,
    replies: Replies,
    *,
    outcomes: Sequence[str] = OUTCOMES,
    windows: Sequence[int] = WINDOWS,
    null: int | None = None,
    sites: Sequence[str] = SITES,
    max_tokens: int = 3072,
    progress: str | None = None,
) -> dict[Setting, dict[str, np.ndarray]]:
    """Effects of every layer under every setting.

    Args:
        outcomes: out of :data:`OUTCOMES`. Without those of whole replies there is nothing to run behind
            the prompt, which saves most of the time.
        replies: a harmful reply and a refusal for each pair (``skip`` is not used: both are read).
        null: a seed: patch random directions of the same norm instead.

    Returns:
        setting -> site -> effects [pair, layer], and under ``"total"`` the total effects [pair].

    Raises:
        ValueError: as :func:`flow.patching.sweep` does for pairs, sites and windows.
    """
    if not outcomes or not set(outcomes) <= set(OUTCOMES):
        raise ValueError(f"outcomes={list(outcomes)} must be a non-empty list out of {', '.join(OUTCOMES)}")
    if any(window < 1 or window % 2 == 0 for window in windows):
        raise ValueError(f"windows={list(windows)} must be odd numbers of layers")
    parts, out = partial.patchable(lm), {}
    jobs = list(product(CORRUPTIONS.items(), POSITIONS))
    hidden = True if progress is None else None
    for (corruption, noise), where in tqdm(jobs, desc=progress, disable=hidden, leave=False):
        read, short = {}, set(outcomes) <= {"Y1", "Y2"}
        for kind, reply in zip(("harmful", "refusal"), replies.parts(), strict=True):
            encoded = runs.encode(lm, pairs, replace(reply, skip=0), where)
            if short:  # the first word is predicted behind the prompt alone
                encoded = replace(encoded, replies=[reply[:1] for reply in encoded.replies])
            if short and kind == "refusal":
                continue
            read[kind] = _read(lm, parts, encoded, sets, noise, where, windows, sites, null, max_tokens)
        for (direction, window), harmful in read["harmful"].items():
            refusal = read.get("refusal", read["harmful"])[direction, window]
            for outcome in outcomes:
                value = _VALUES[outcome]
                setting = Setting(corruption, outcome, direction, where, window)
                out[setting] = {k: value(harmful[k], refusal[k]).numpy() for k in harmful}
    return out


_VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Y1": lambda harmful, refusal: harmful[..., 0],
    "Y2": lambda harmful, refusal: harmful[..., 1],
    "Y3": lambda harmful, refusal: harmful[..., 2] - refusal[..., 2],
    "Y3 from word 2": lambda harmful, refusal: harmful[..., 3] - refusal[..., 3],
}


def _read(
    lm: LanguageModel,
    parts: decoder.Stack,
    encoded: runs.Encoded,
    sets: TokenSets,
    noise: float | None,
    where: str,
    windows: Sequence[int],
    sites: Sequence[str],
    null: int | None,
    max_tokens: int,
) -> dict[tuple[str, int], dict[str, Tensor]]:
    """(direction, window) -> site -> effects [pair, layer, value], and ``total`` [pair, value]."""
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    for group in runs.groups(lm, parts, encoded, noise=noise):
        group.outcome = _everything(parts, sets, torch.tensor([encoded.replies[i] for i in group.index]))
        y1, y0 = (group.unpatched(run).cpu() for run in (group.x1, group.x0))
        for direction, window in product(DIRECTIONS, windows):
            todo = [cells.windowed(site, layer, parts.depth, window, group.columns[where]) for site in sites
                    for layer in range(parts.depth)]  # fmt: skip
            values, _ = cells.run_cells(group, todo, direction=direction, null=null, max_tokens=max_tokens)
            effects = values - y0 if direction == "denoising" else y1 - values
            shape = (len(sites), parts.depth, *effects.shape[1:])
            into = found.setdefault((direction, window), {})
            for site, effect in zip(sites, effects.view(shape), strict=True):
                _put(into, site, effect.transpose(0, 1), group.index, len(encoded.pairs))
            _put(into, "total", y1 - y0, group.index, len(encoded.pairs))
    return found


def _put(into: dict[str, Tensor], name: str, values: Tensor, index: list[int], n: int) -> None:
    if name not in into:
        into[name] = torch.full((n, *values.shape[1:]), float("nan"))
    into[name][index] = values


def _everything(parts: decoder.Stack, sets: TokenSets, targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Y1 and Y2 of the first word, and the reply's mean log-probability from its first and second word on."""

    def read(resid: Tensor, index: Tensor) -> Tensor:
        logits = decoder.readout(parts, resid)
        wanted = targets[index].to(logits.device)[..., None]
        logp = logits.log_softmax(-1).gather(-1, wanted)[..., 0]
        first = logits[:, 0]
        return torch.stack(
            [logit_difference(first, sets), refusal_log_odds(first, sets).float(), logp.mean(-1),
             logp[:, 1:].mean(-1)], dim=-1,
        )  # fmt: skip

    return read
