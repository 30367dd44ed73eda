"""From a measured number to a verdict: the registry of claims, result files, the scorecard.

The claims stand in ``data/claims.yaml``, each with its rule, before any number exists. A notebook measures
one and calls :func:`record`, which writes one JSON file per claim and model. :func:`scorecard` reads them all
and applies the rule of each claim (:func:`verdict`). No model is needed to make it again.

Introduced in notebook 01 ("What there is to explain"); the scorecard in notebook 19.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from harmlens.evidence.stats import Estimate
from harmlens.keep import files

VERDICTS = ("replicated", "direction only", "not replicated", "undecided", "not attempted")
SCHEMA = 1


class ResultFileWarning(UserWarning):
    """A result file could not be used; the others were."""


# --------------------------------------------------------------------------- claims and measurements


def _said(text: str) -> str:
    if not text.strip():
        raise ValueError("must be text that is not empty")
    return text


Text = Annotated[str, AfterValidator(_said)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Interval = tuple[Number, Number]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Rule:
    """When a claim counts as replicated; see :func:`verdict`. ``no_effect`` defaults to the threshold."""

    threshold: Number
    no_effect: Number
    margin_over_control: Annotated[Number, Field(ge=0)] | None
    seeds_share: Annotated[Number, Field(gt=0, le=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Claim:
    """One row of ``data/claims.yaml``; ``unit`` is what n counts, ``scale`` what the value is in."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # it names a file
    paper: Literal["mediation", "pruning", "harmlens"]
    source: Text
    statement: Text
    reported: Text
    direction: Literal["greater", "less"]
    statistic: Text
    scale: Text
    unit: Text
    control: Text
    rule: Rule
    notebook: Text

    @model_validator(mode="after")
    def _one_way(self) -> Claim:
        if self.sign * (self.rule.threshold - self.rule.no_effect) < 0:
            raise ValueError(f"rule.no_effect lies beyond rule.threshold for direction {self.direction!r}")
        return self

    @property
    def sign(self) -> int:
        """1 where a larger value speaks for the claim, else -1."""
        return 1 if self.direction == "greater" else -1


@dataclass(frozen=True)
class Control:
    """What the measurement is compared with; without ``ci`` its value counts as exactly known."""

    name: Text
    value: Number
    ci: Interval | None = None


@dataclass(frozen=True)
class Measurement:
    """One measured claim on one model, as it stands in a result file; seed -> (value, low, high)."""

    claim: Text
    model: Text
    notebook: Text
    value: Number
    ci: Interval
    n: Annotated[int, Strict(), Field(ge=1)]
    unit: Text
    control: Control | None
    per_seed: Annotated[dict[int, tuple[Number, Number, Number]], Field(min_length=1)]
    note: str = ""
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _around_their_values(self) -> Measurement:
        around = {"ci": (self.value, *self.ci)} | {f"per_seed[{s}]": e for s, e in self.per_seed.items()}
        if self.control is not None and self.control.ci is not None:
            around["control.ci"] = (self.control.value, *self.control.ci)
        for name, (value, low, high) in around.items():
            slack = 1e-9 * max(1.0, abs(value))
            if not low - slack <= value <= high + slack:
                raise ValueError(
                    f"{name}: must be (low, high) around the value {value:g}, got ({low:g}, {high:g})"
                )
        return self


@dataclass(frozen=True)
class _Registry:
    claims: list[dict[str, Any]]


_WORDS = {
    "missing": "is missing",
    "unexpected_keyword_argument": "is no known field",
    "finite_number": "must be finite. Look for an empty group or a 0 / 0",
}


def _checked(kind: type, content: Any, where: str = "") -> Any:
    """``content`` as a ``kind``; what is wrong first is said with its place."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        words = _WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
        told = f", got {first['input']!r}" if first["loc"] and first["type"] != "missing" else ""
        raise ValueError(f"{where}{place}{': ' if place else ''}{words}{told}") from None


def load_claims(path: str | Path | None = None) -> dict[str, Claim]:
    """The registry of claims by id, in the order of the file.

    Raises:
        ValueError: a claim is incomplete or contradicts itself (names the claim and the field); the file is
            no YAML, or a key is given twice.
    """
    path = Path(path) if path is not None else files.data_dir() / "claims.yaml"
    try:
        content = files.read_yaml(path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: {error}") from error
    claims: dict[str, Claim] = {}
    for number, entry in enumerate(_checked(_Registry, content, f"{path.name}: ").claims, start=1):
        if isinstance(rule := entry.get("rule"), dict):
            entry = entry | {"rule": {"no_effect": rule.get("threshold")} | rule}
        claim = _checked(Claim, entry, f"{path.name}, claim {number} ({entry.get('id', 'without id')}): ")
        if claim.id in claims:
            raise ValueError(f"{path.name}: claim id {claim.id!r} occurs twice")
        claims[claim.id] = claim
    return claims


_BOUNDS = {
    r"share( of (?!an effect|a change).*)?|precision|balanced accuracy|Jaccard index|relative depth": (0, 1),
    r"difference of (shares|accuracies|average precisions|Jaccard indices)": (-1, 1),
    r"relative drop": (-math.inf, 1),
    "": (-math.inf, math.inf),
}


def _measured(content: Mapping[str, Any], claims: Mapping[str, Claim]) -> Measurement:
    """Check everything that a result file must hold; the same for writing and for reading."""
    if content["claim"] not in claims:
        raise ValueError(f"claim: {content['claim']!r} is not in claims.yaml; known are {', '.join(claims)}")
    found = _checked(Measurement, content)
    scale = claims[found.claim].scale
    low, high = next((ends for form, ends in _BOUNDS.items() if re.fullmatch(form, scale)), _BOUNDS[""])
    values = {"value": found.value} | {f"per_seed[{s}]": entry[0] for s, entry in found.per_seed.items()}
    for name, value in (values | ({"control.value": found.control.value} if found.control else {})).items():
        if not low - 1e-9 <= value <= high + 1e-9:
            raise ValueError(
                f"{name}: {value:g} is no {scale}, which lies in {low:g} to {high:g}. Is it in percent?"
            )
    seeds, slack = [entry[0] for entry in found.per_seed.values()], 1e-6 * max(1.0, abs(found.value))
    if not min(seeds) - slack <= found.value <= max(seeds) + slack:
        raise ValueError(
            f"value: {found.value:g} lies outside the values of its seeds, {min(seeds):g} to {max(seeds):g}; "
            "it is to be their mean, or that of the one seed"
        )
    return found


def verdict(claim: Claim, measurement: Measurement | None) -> tuple[str, str]:
    """The verdict on a claim, one of :data:`VERDICTS`, and in one line what decided it.

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

    A wider interval, of the measurement or of the control, can only take support away.
    """
    if measurement is None:
        return "not attempted", "no result file for this claim"
    rule, sign = claim.rule, claim.sign
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


# --------------------------------------------------------------------------- result files


def results_dir() -> Path:
    """Where new result files go: HARMLENS_RESULTS if set, else ``results`` in the build folder."""
    return files.folder_from("HARMLENS_RESULTS") or files.build_dir() / "results"


def record(
    claim: str,
    estimate: Estimate,
    *,
    unit: str,
    model: str,
    notebook: str,
    control: tuple[str, Estimate] | None = None,
    note: str = "",
    folder: str | Path | None = None,
    **made: Any,
) -> Path:
    """Write the result file of one claim on one model, ``<folder>/<model>/<claim>.json``; returns its path.

    Machine paths are shortened. A file of the same name is replaced; one of other weights (trained anew, or
    another commit) is put aside, and a warning says where.

    Args:
        claim: id from ``data/claims.yaml``.
        estimate: the statistic of the claim, with the estimates of the training seeds if there are several.
        unit: what its n counts: item, request, pair, ... never token.
        model: organism ("organism/sft"), folder or Hugging Face id; called :func:`keep.files.model_name`.
        notebook: file name of the notebook without its ending.
        control: what the claim's control is, and what it gave.
        note: one sentence for the reader of the scorecard.
        folder: default :func:`results_dir`.
        made: how it was measured, for :func:`keep.files.provenance`: ``params``, ``device``, ...

    Raises:
        ValueError: unknown claim, a number that is not finite or not on the claim's scale, an interval that
            doesn't hold the value; names the field.
    """
    seeds = {int(seed): _triple(e) for seed, e in (estimate.per_seed or {0: estimate}).items()}
    beside = None
    if control is not None:
        value, *ci = _triple(control[1])
        beside = {"name": control[0], "value": value, "ci": ci}
    value, low, high = _triple(estimate)
    content: dict[str, Any] = {
        "schema": SCHEMA, "claim": claim, "model": files.model_name(model), "notebook": notebook,
        "value": value, "ci": (low, high), "n": int(estimate.n), "unit": unit, "per_seed": seeds,
        "control": beside, "note": files.portable(note),
    }  # fmt: skip
    checked = _measured(content, load_claims())
    content |= {
        "ci_low": low, "ci_high": high, "per_seed": {str(seed): entry for seed, entry in seeds.items()},
        "provenance": files.provenance(model, seeds=sorted(seeds), **made),
    }  # fmt: skip
    content["sum"] = _sum(content)
    base = Path(folder).expanduser() if folder else results_dir()
    path = base / files.slug(checked.model) / f"{claim}.json"
    _keep_other_weights(path, content["provenance"]["model"])
    files.write_json(path, content)
    return path


def _triple(estimate: Estimate) -> tuple[float, float, float]:
    return float(estimate.value), float(estimate.low), float(estimate.high)


def _sum(content: Mapping[str, Any]) -> str:
    """Of all that a result file holds, so that a change by hand is seen."""
    held = {name: value for name, value in content.items() if name != "sum"}
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:16]


def _keep_other_weights(path: Path, model: Mapping[str, Any]) -> None:
    """Put a result aside that was measured on other weights than those of ``model``."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))["provenance"]["model"]
        before = old["checkpoints"] | {"revision": old["revision"]}
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name, mark in (model["checkpoints"] | {"revision": model["revision"]}).items():
        if mark and before.get(name) not in (None, "", mark):
            aside = path.with_name(f"{path.name}.{before[name][:8]}")
            os.replace(path, aside)
            said = f"{path.parent.name}/{path.name} was measured on other weights; it is kept as"
            said += f" {aside.name!r}, and the scorecard reads the new one"
            return warnings.warn(said, ResultFileWarning, stacklevel=3)


def default_folders() -> list[Path]:
    """Your own results first, then those of the default runs that ship with the package."""
    return [results_dir(), files.data_dir() / "results"]


def load_measurements(folders: Iterable[str | Path] | None = None) -> list[Measurement]:
    """All measurements below ``folders`` (default :func:`default_folders`), one per claim and model.

    Of a claim that was measured twice on a model, the earlier folder's counts, and within a folder the newer
    file's. A file that can't be used is named in a :class:`ResultFileWarning`; the others still load.
    """
    claims = load_claims()
    found: dict[tuple[str, str], Measurement] = {}
    for folder in default_folders() if folders is None else [Path(item) for item in folders]:
        here: list[Measurement] = []
        for path in sorted(folder.rglob("*.json")):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(content, dict) or content.get("schema") != SCHEMA:
                    raise ValueError(f"is not a result file of schema {SCHEMA}")
                if content.get("sum", "") not in ("", _sum(content)):
                    raise ValueError("was changed after it was written")
                here.append(_measured(content, claims))
            except (OSError, ValueError, KeyError, TypeError) as error:
                reason = f"lacks {error}" if isinstance(error, KeyError) else error
                warnings.warn(
                    f"result file {folder.name}/{path.relative_to(folder).as_posix()} left out: {reason}. "
                    "Run its notebook again, or delete the file.", ResultFileWarning, stacklevel=2,
                )  # fmt: skip
        by_time = sorted(here, key=lambda one: str(one.provenance.get("created_utc", "")))  # in UTC, as text
        # in the order of the paths, whichever is newest
        found = {(one.claim, one.model): one for one in (*here, *by_time)} | found
    return list(found.values())


# --------------------------------------------------------------------------- scorecard


def scorecard(folders: Iterable[str | Path] | None = None, *, model: str = "all") -> list[dict[str, Any]]:
    """One row per claim and model, in the order of the registry; claims without measurement have one row.

    ``folders`` as for :func:`load_measurements`; ``model``: "all", or one as the result files call it, or its
    folder.
    """
    claims, model = load_claims(), files.model_name(model)
    measured: dict[str, list[Measurement]] = {name: [] for name in claims}
    for measurement in load_measurements(folders):
        if model in ("all", measurement.model):
            measured[measurement.claim].append(measurement)
    return [
        _row(claim, measurement)
        for claim in claims.values()
        for measurement in sorted(measured[claim.id], key=lambda item: item.model) or [None]
    ]


def _row(claim: Claim, measurement: Measurement | None) -> dict[str, Any]:
    given, reason = verdict(claim, measurement)
    row: dict[str, Any] = {**vars(claim), "rule": vars(claim.rule), "verdict": given, "reason": reason}
    if measurement is None:
        empty = ("value", "ci_low", "ci_high", "n", "control_value", "control_low", "control_high", "model")
        return row | dict.fromkeys(empty) | {"seeds": [], "per_seed": {}, "note": "", "created_utc": None}
    control = measurement.control
    low, high = (control.ci or (control.value, control.value)) if control else (None, None)
    return row | {
        "value": measurement.value, "ci_low": measurement.ci[0], "ci_high": measurement.ci[1],
        "n": measurement.n, "unit": measurement.unit, "model": measurement.model,
        "notebook": measurement.notebook, "control": control.name if control else claim.control,
        "control_value": control.value if control else None, "control_low": low, "control_high": high,
        "seeds": sorted(measurement.per_seed), "note": measurement.note,
        "per_seed": {str(key): list(entry) for key, entry in sorted(measurement.per_seed.items())},
        "created_utc": measurement.provenance.get("created_utc"),
    }  # fmt: skip


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A few lines of plain text: the rows by verdict, with ids."""
    counts = Counter(row["verdict"] for row in rows)
    lines = [f"{len(rows)} rows, {len({row['id'] for row in rows})} claims"]
    for name in VERDICTS:
        ids = list(dict.fromkeys(row["id"] for row in rows if row["verdict"] == name))
        lines.append(f"  {name:<15} {counts[name]:>3}  {' '.join(ids)}".rstrip())
    return "\n".join(lines)
