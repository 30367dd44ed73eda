"""The registry of claims and the rule that turns a measurement into a verdict.

The claims stand in ``data/claims.yaml``, each with its rule, before any number exists.

Introduced in notebook 19 ("Scorecard").
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from harmlens.keep.files import data_dir

PAPERS = ("mediation", "pruning", "harmlens")
DIRECTIONS = ("greater", "less")
VERDICTS = ("replicated", "direction only", "not replicated", "undecided", "not attempted")


@dataclass(frozen=True)
class Rule:
    """When a claim counts as replicated; see :func:`verdict`. ``no_effect`` defaults to the threshold."""

    threshold: float
    no_effect: float
    margin_over_control: float | None
    seeds_share: float


@dataclass(frozen=True)
class Claim:
    """One row of ``data/claims.yaml``; ``unit`` is what n counts, ``scale`` what the value is in."""

    id: str
    paper: str
    source: str
    statement: str
    reported: str
    direction: str
    statistic: str
    scale: str
    unit: str
    control: str
    rule: Rule
    notebook: str


@dataclass(frozen=True)
class Control:
    """What the measurement is compared with; without ``ci`` its value counts as exactly known."""

    name: str
    value: Real
    ci: Sequence[Real] | None = None


@dataclass(frozen=True)
class Measurement:
    """One measured claim on one model, as it stands in a result file."""

    claim: str
    model: str
    notebook: str
    value: float
    ci: tuple[float, float]
    n: int
    unit: str
    control: Control | None
    per_seed: dict[int, tuple[float, float, float]]
    note: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would take the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.MarkedYAMLError(None, None, f"the key {twice[0]!r} is given twice", node.start_mark)
        return node


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        yaml.YAMLError: it is no YAML, or a key is given twice; names the line.
    """
    return yaml.load(path.read_text(encoding="utf-8"), _Loader)


def load_claims(path: str | Path | None = None) -> dict[str, Claim]:
    """The registry of claims by id, in the order of the file.

    Raises:
        ValueError: a claim is incomplete or contradicts itself (names the claim and the field); the file is
            no YAML, or a key is given twice.
    """
    path = Path(path) if path is not None else data_dir() / "claims.yaml"
    try:
        content = read_yaml(path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("claims"), list):
        raise ValueError(f"{path.name}: expected a mapping with a list named 'claims'")
    claims: dict[str, Claim] = {}
    for number, entry in enumerate(content["claims"], start=1):
        claim = _claim(entry, f"{path.name}, claim {number}")
        if claim.id in claims:
            raise ValueError(f"{path.name}: claim id {claim.id!r} occurs twice")
        claims[claim.id] = claim
    return claims


def _claim(entry: Any, where: str) -> Claim:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected a mapping, got {type(entry).__name__}")
    where = f"{where} ({entry.get('id', 'without id')})"
    known = {item.name for item in fields(Claim)}
    if missing := sorted(known - entry.keys()):
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    if unknown := sorted(entry.keys() - known):
        raise ValueError(f"{where}: unknown field {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    for name in sorted(known - {"rule"}):
        if not isinstance(entry[name], str) or not entry[name].strip():
            raise ValueError(f"{where}: {name} must be text that is not empty, got {entry[name]!r}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", entry["id"]):
        raise ValueError(f"{where}: id may hold letters, digits, - and _ only, since it names a file")
    for name, allowed in (("paper", PAPERS), ("direction", DIRECTIONS)):
        if entry[name] not in allowed:
            raise ValueError(f"{where}: {name} must be one of {', '.join(allowed)}, got {entry[name]!r}")
    return Claim(**{**entry, "rule": _rule(entry["rule"], entry["direction"], where)})


def _rule(entry: Any, direction: str, where: str) -> Rule:
    required, known = ("threshold", "margin_over_control", "seeds_share"), {f.name for f in fields(Rule)}
    if not isinstance(entry, dict) or not set(required) <= entry.keys() <= known:
        raise ValueError(f"{where}: rule needs {', '.join(required)} and may hold no_effect, got {entry!r}")
    for name, value in entry.items():
        if value is None and name == "margin_over_control":
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{where}: rule.{name} must be a finite number, got {value!r}")
    threshold, margin = float(entry["threshold"]), entry["margin_over_control"]
    no_effect, share = float(entry.get("no_effect", threshold)), float(entry["seeds_share"])
    if not 0 < share <= 1:
        raise ValueError(f"{where}: rule.seeds_share must lie above 0 and at most at 1, got {share}")
    if margin is not None and margin < 0:
        raise ValueError(f"{where}: rule.margin_over_control must not be negative, got {margin}")
    if _sign(direction) * (threshold - no_effect) < 0:
        raise ValueError(f"{where}: rule.no_effect lies beyond rule.threshold for direction {direction!r}")
    return Rule(threshold, no_effect, None if margin is None else float(margin), share)


_BOUNDS = (
    (
        r"share( of (?!an effect|a change).*)?|precision|balanced accuracy|Jaccard index|relative depth",
        (0, 1),
    ),
    (r"difference of (shares|accuracies|average precisions|Jaccard indices)", (-1, 1)),
    (r"relative drop", (-math.inf, 1)),
)


def bounds(scale: str) -> tuple[float, float]:
    """Between what a claim's value must lie, by its scale; infinite where there is no bound."""
    return next((ends for form, ends in _BOUNDS if re.fullmatch(form, scale)), (-math.inf, math.inf))


# --------------------------------------------------------------------------- verdicts


def _sign(direction: str) -> float:
    return 1.0 if direction == "greater" else -1.0


def verdict(claim: Claim, measurement: Measurement | None) -> str:
    """The verdict on a claim, one of :data:`VERDICTS`.

    Read for a claim with direction "greater"; for "less" all comparisons are mirrored. *Near* is the
    end of the 95 % interval that faces the threshold from beyond (the lower end), *far* the other one.

    - **replicated**: near > threshold, *and* near > upper end of the control's interval +
      margin_over_control (skipped where the rule has no margin; a measurement without control fails
      where it has one), *and* at least seeds_share of the seeds have their own value > no_effect.
    - **direction only**: not replicated in full, but value > threshold; or near > no_effect, a clear
      effect that is smaller than the threshold asks for.
    - **not replicated**: neither of these, and far <= threshold: the interval lies wholly on the wrong
      side.
    - **undecided**: everything else: the interval reaches across the threshold and the value doesn't.
    - **not attempted**: no measurement.

    ``no_effect`` equals the threshold unless the rule says otherwise. A wider interval, of the
    measurement or of the control, can only take support away.
    """
    return explain(claim, measurement)[0]


def explain(claim: Claim, measurement: Measurement | None) -> tuple[str, str]:
    """The verdict and, in one line, what decided it."""
    if measurement is None:
        return "not attempted", "no result file for this claim"
    rule, sign = claim.rule, _sign(claim.direction)
    word, short = ("above", "below") if sign > 0 else ("below", "above")
    value = sign * measurement.value
    near, far = sorted(sign * end for end in measurement.ci)
    threshold, no_effect = sign * rule.threshold, sign * rule.no_effect

    failed = []
    if near <= threshold:
        failed.append(f"the interval is not wholly {word} {rule.threshold:g}")
    if rule.margin_over_control is not None:
        control = measurement.control
        if control is None:
            failed.append("no control was measured")
        elif near <= max(sign * end for end in control.ci or [control.value]) + rule.margin_over_control:
            failed.append(f"the interval does not clear the control ({control.name})")
    agree = sum(sign * seed[0] > no_effect for seed in measurement.per_seed.values())
    seeds = len(measurement.per_seed)
    if agree < rule.seeds_share * seeds - 1e-9:
        failed.append(f"only {agree} of {seeds} seeds lie {word} {rule.no_effect:g}")

    if not failed:
        cleared = "" if rule.margin_over_control is None else ", the control is cleared"
        held = f"the interval is wholly {word} {rule.threshold:g}{cleared}, {agree} of {seeds} seeds agree"
        return "replicated", held
    if value > threshold or near > no_effect:
        return "direction only", "; ".join(failed)
    if far <= threshold:
        return "not replicated", f"the interval is wholly {short} {rule.threshold:g} or at it"
    return "undecided", f"the interval reaches across {rule.threshold:g}"
