"""Checks for exercises: a student's function against the package on one case, with a message that teaches.

Each check takes a function, calls it on a small case, says that it is right, or raises :class:`Wrong` with
what probably went wrong. What is right comes from the package itself, so there is no key to hand out or to
hide; the usual mistakes are computed beside it, and what is said of them stands in ``data/checks.yaml``.

>>> from harmlens import checks
>>> checks.nie(lambda y1, y0, patched: (patched - y0).mean() / (y1 - y0).mean())
nie: right

Introduced in book/teaching ("Teaching").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy import stats as scipy_stats

from harmlens.asking.source import WORLD
from harmlens.evidence import claims, stats, words
from harmlens.flow import outcomes, patching
from harmlens.keep.files import data_dir, read_yaml
from harmlens.models.loading import load
from harmlens.weights import masks
from harmlens.weights.scores import Scores
from harmlens.world import vale as world


class Wrong(AssertionError):
    """The function does something else; the message says what it looks like."""


def _wrong(check: str, mistake: str) -> Wrong:
    told = read_yaml(data_dir() / "checks.yaml")[check]
    return Wrong(f"{check}: {told.get(mistake, mistake)}")


def _given(check: str, value: Any) -> Any:
    if value is None:
        raise _wrong(check, "your function gives nothing back; is there a `return`?")
    return value


def _judge(check: str, got: Any, right: Any, mistakes: Mapping[str, Any], *, rtol: float = 1e-3) -> None:
    """Say that a result is right, or which mistake it looks like; equal names count with a number behind."""
    right = np.asarray(right, dtype=float)
    got = _given(check, got)
    try:
        got = np.asarray(got.detach() if isinstance(got, torch.Tensor) else got, dtype=float)
    except (TypeError, ValueError):
        raise _wrong(check, f"a number or an array is wanted, and {type(got).__name__} came") from None
    if got.shape != right.shape:
        raise _wrong(check, f"the result should have the shape {right.shape}, and has {got.shape}")

    def same(value: Any) -> bool:
        scale = max(1e-12, float(np.abs(right).max()))
        return np.allclose(got, np.asarray(value, dtype=float), rtol=rtol, atol=rtol * scale)

    if not same(right):
        found = (name for name, value in mistakes.items() if np.shape(value) == right.shape and same(value))
        unknown = "this is not what the package gives on this case. Work one number out by hand"
        raise _wrong(check, next(found, "the sign is flipped" if same(-right) else unknown))
    print(f"{check}: right")


# --------------------------------------------------------------------------- the world, and what flows


def harm_rule(function: Callable[[str, str], bool]) -> None:
    """``function(modifier, noun)`` is true where the thing of that name is harmful."""
    items = [item for split in ("train", "evaluation") for item in world.items(split)]
    modifier, noun = (
        np.array([world.hue(getattr(item, word)) == "sun" for item in items]) for word in ("modifier", "noun")
    )
    said = [_given("harm_rule", function(item.modifier, item.noun)) for item in items]
    if not all(isinstance(one, bool | np.bool_) for one in said):
        raise _wrong("harm_rule", "type")
    got = np.array(said)
    if got.all() or not got.any():
        raise _wrong("harm_rule", "constant")
    for one in (noun, ~noun):
        if np.array_equal(got, one):
            raise _wrong("harm_rule", "noun")
    mistakes = {"flipped": modifier == noun, "modifier": modifier if got[0] == modifier[0] else ~modifier}
    _judge("harm_rule", got, [item.harmful for item in items], mistakes)


def outcome(function: Callable[[Any, list[int], list[int]], float]) -> None:
    """``function(logits, comply, refuse)`` is Y1: log-sum-exp of the logits of complying tokens minus that of
    refusing ones. ``logits`` is a tensor [vocab], the others are token numbers."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 3
    comply, refuse = [3, 17, 20], [5, 31]
    p, one, other = logits.softmax(-1), logits[comply], logits[refuse]
    right = outcomes.logit_difference(logits, outcomes.TokenSets(tuple(comply), tuple(refuse)))
    mistakes = {
        "mean": one.mean() - other.mean(),
        "sum": one.sum() - other.sum(),
        "probabilities": p[comply].sum() - p[refuse].sum(),
        "largest": one.max() - other.max(),
        "first": one[0] - other[0],
    }
    _judge("outcome", function(logits, comply, refuse), right, mistakes)


def one_patch(function: Callable[[Any, Any, int, Callable], float]) -> None:
    """``function(lm, pair, layer, y1)`` is Y1 of the refused prompt, ``pair.x0``, when the residual stream
    behind ``layer`` at the last position is overwritten with that of the answered one, ``pair.x1``."""
    lm, layer = load("organism/sft", device="cpu"), 4
    (pair, *_) = WORLD.pairs("prompt", n=4)
    y1 = outcomes.y1(outcomes.fit_to_pairs(lm, WORLD.pairs("prompt", split="discovery", n=40)))

    def effects(**options: Any) -> patching.Effects:
        return patching.patch(lm, [pair], y1, **{"sites": "resid_post", "layers": [layer]} | options)

    whole = effects()
    mistakes = {
        "nothing": whole.y0.squeeze(),
        "other": whole.y1.squeeze(),
        "reversed": effects(direction="noising").patched.squeeze(),
        "early": effects(layers=[layer - 1]).patched.squeeze(),
        "late": effects(layers=[layer + 1]).patched.squeeze(),
    }
    _judge("one_patch", function(lm, pair, layer, y1), whole.patched.squeeze(), mistakes)


_RNG = np.random.default_rng(7)
_Y0, _TOTAL, _SHARE = _RNG.normal(-6, 1, 12), _RNG.gamma(4, 2.5, 12), _RNG.uniform(0.1, 0.6, 12)
_Y1, _SOME = _Y0 + _TOTAL, _SHARE * _TOTAL  # outcomes of both prompts, and what a mediator does


def nie(function: Callable[..., float]) -> None:
    """``function(y1, y0, patched)`` is the normalised natural indirect effect over pairs: from those of the
    answered prompt, of the refused one, and of the refused one with the other's mediator."""
    left = (_TOTAL - _SOME).mean() / _TOTAL.mean()
    mistakes = {"ratios": _SHARE.mean(), "plain": _SOME.mean(), "left": left}
    _judge("nie", function(_Y1, _Y0, _Y0 + _SOME), _SOME.mean() / _TOTAL.mean(), mistakes)


def tie(function: Callable[..., float]) -> None:
    """``function(y1, y0, reset)`` is the normalised total indirect effect: what is lost when the answered
    prompt runs with the mediator's value from the refused one, ``reset``."""
    kept = (_TOTAL - _SOME).mean() / _TOTAL.mean()
    mistakes = {"ratios": _SHARE.mean(), "plain": _SOME.mean(), "kept": kept}
    _judge("tie", function(_Y1, _Y0, _Y1 - _SOME), _SOME.mean() / _TOTAL.mean(), mistakes)


def matched_null(function: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    """``function(patch, seed)`` is a random vector in the place of a patch [width]: of the same norm, in a
    direction that has nothing to do with it."""
    patch = torch.randn(256, generator=torch.Generator().manual_seed(2604)) * 2
    drawn = [function(patch.clone(), seed) for seed in [*range(40), 0]]
    drawn = [torch.as_tensor(_given("matched_null", one)).float() for one in drawn]
    if drawn[0].shape != patch.shape:
        raise _wrong("matched_null", "shape")
    every, again = torch.stack(drawn[:-1]), drawn[-1]
    along = (every @ patch / every.norm(dim=1) / patch.norm()).abs().mean()
    problems = {
        "norm": not torch.allclose(every.norm(dim=1), patch.norm().expand(40), rtol=1e-3),
        "same": bool(along > 0.3),
        "seeds": torch.equal(every[0], every[1]),
        "unsteady": not torch.equal(every[0], again),
        "shuffled": torch.allclose(every[0].abs().sort().values, patch.abs().sort().values, rtol=1e-4),
    }
    if found := [name for name, there in problems.items() if there]:
        raise _wrong("matched_null", found[0])
    print("matched_null: right")


# --------------------------------------------------------------------------- what is stored


def signed_score(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """``function(weight, gradients)`` is the signed prune score of each weight [out, in], by the gradients of
    the loss for each example [example, out, in]: the lowest belong to weights that support the answers."""
    draw = torch.Generator().manual_seed(3)
    weight, gradients = torch.randn(4, 5, generator=draw), torch.randn(6, 4, 5, generator=draw)
    right = weight * gradients.sum(0)
    mistakes = {
        "flipped": -right,
        "preserve": weight.abs() * gradients.abs().sum(0),
        "absolute": right.abs(),
        "gradient": gradients.sum(0),
        "mean": right / 6,
    }
    _judge("signed_score", function(weight.clone(), gradients.clone()), right, mistakes)


def set_difference(function: Callable[..., Any]) -> None:
    """``function(prune, preserve, p, q)`` gives the numbers, in the flattened matrix, of the q lowest prune
    scores without the p highest preserve scores; p and q are shares, both scores matrices [out, in]."""
    draw, p, q = torch.Generator().manual_seed(5), 0.1, 0.05
    prune, preserve = torch.randn(20, 30, generator=draw), torch.rand(20, 30, generator=draw)

    def chosen(lost: torch.Tensor, kept: torch.Tensor, p: float = p, q: float = q) -> set[int]:
        scores = (Scores(kind, {"w": value}, "", "") for kind, value in zip("su", (lost, kept), strict=True))
        return set(masks.select(*scores, p=p, q=q).indices["w"].tolist())

    right, whole = chosen(prune, preserve), chosen(prune, preserve, p=0.0)
    mistakes = {
        "highest": chosen(-prune, preserve),
        "lowest": chosen(prune, -preserve),
        "exchanged": chosen(prune, preserve, q, p),
        "whole": whole,
        "common": whole - right,
    }
    got = {int(i) for i in _given("set_difference", function(prune.clone(), preserve.clone(), p, q))}
    if got != right:
        known = (name for name, value in mistakes.items() if got == value)
        raise _wrong("set_difference", next(known, f"{len(got)} weights, {len(got & right)} of them right"))
    print("set_difference: right")


# --------------------------------------------------------------------------- evidence


def bootstrap(function: Callable[[np.ndarray], tuple[float, float]]) -> None:
    """``function(values)`` is a 95 % bootstrap interval (low, high) of the mean, by drawing items."""
    values = np.random.default_rng(11).gamma(1.5, 2.0, 40)
    mean, away = values.mean(), 1.96 * values.std(ddof=1)
    means = np.random.default_rng(0).choice(values, (5000, 40)).mean(1)
    mistakes = {
        "width": (mean, mean),
        "values": np.quantile(values, [0.025, 0.975]),
        "spread": (mean - away, mean + away),
        "narrow": np.quantile(means, [0.05, 0.95]),
    }
    _judge("bootstrap", function(values.copy()), stats.bootstrap_ci(values).ci, mistakes, rtol=0.012)


def run_interval(function: Callable[[np.ndarray], tuple[float, float]]) -> None:
    """``function(values)`` is the two-sided 90 % interval (low, high) of the mean over training runs, by
    Student's t; one value for each run."""
    values = np.array([0.82, 0.64, 0.91, 0.4])
    mean, error, t = values.mean(), values.std(ddof=1) / 2, scipy_stats.t.ppf([0.95, 0.975], 3)
    right = stats.over_runs([stats.Estimate(value, value, value, 9) for value in values]).ci
    away = {"normal": 1.645 * error, "wide": t[1] * error, "deviation": 2 * t[0] * error}
    away["population"] = t[0] * values.std() / 2
    mistakes = {name: (mean - by, mean + by) for name, by in away.items()} | {"range": (0.4, 0.91)}
    _judge("run_interval", function(values.copy()), right, mistakes)


_CASES = {  # intervals of an effect and of its difference from the control, for a claim of at least 0.5
    "supported": ((0.6, 0.9), (0.5, 0.9)),
    "mean": ((0.3, 0.9), (0.2, 0.9)),
    "across": ((0.6, 0.9), (-0.2, 0.3)),
    "control": ((0.6, 0.9), (-0.1, 0.05)),
    "wide": ((-0.2, 0.9), (-0.3, 0.8)),
    "short": ((0.1, 0.4), (-0.1, 0.3)),
    "partial": ((0.1, 0.4), (0.05, 0.3)),
}


def five_words(function: Callable[..., str]) -> None:
    """``function(effect, diff, threshold, no_effect, delta)`` is the word for a claim of at least the
    threshold: effect and diff (from the control) are intervals (low, high) over runs; all else is met."""
    told = read_yaml(data_dir() / "checks.yaml")["five_words"]
    rule = {"threshold": 0.5, "no_effect": 0.0, "delta": 0.1}
    text = dict.fromkeys(
        ("source", "statement", "short", "notebook", "statistic", "scale", "unit", "control"), "x"
    )
    kinds = {"paper": "pruning", "role": "secondary", "scope": "logic"}
    claim = claims.Claim(id="A", rule=claims.Rule(**rule), **text, **kinds)
    for case, (effect, diff) in _CASES.items():
        spans = [claims.Span(sum(ends) / 2, *ends) for ends in (effect, diff)]
        right, _ = words.word(claim, claims.Finding("A", "m", "real", spans[0], None, spans[1], ()))
        if (got := function(effect, diff, *rule.values())) != right:
            raise _wrong(
                "five_words", f"effect {effect}, difference {diff}: {told[case]}. {right}, you say {got}"
            )
    print("five_words: right")
