"""From a measured number to a verdict: the registry of claims, result files, the scorecard.

The claims stand in ``data/claims.yaml``, each with its rule, before any number exists. A notebook measures
one on one training run and calls :func:`record`, which writes one JSON file for each claim, model and run.
:func:`findings` puts the runs together, :func:`scorecard` applies the rule of each claim (:func:`verdict`).
No model is needed to make it again. ``data/runs.yaml`` registers the runs that count.

Introduced in notebook 01 ("What there is to explain"); the scorecard in notebook 19.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from harmlens.evidence.stats import Estimate, over_runs
from harmlens.keep import files

VERDICTS = ("replicated", "direction only", "not replicated", "undecided", "not attempted")
SCHEMA = 2


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
    short: str = ""  # the statement in a few plain words, for figures and answers

    @model_validator(mode="after")
    def _one_way(self) -> Claim:
        if self.sign * (self.rule.threshold - self.rule.no_effect) < 0:
            raise ValueError(f"rule.no_effect lies beyond rule.threshold for direction {self.direction!r}")
        return self

    @property
    def sign(self) -> int:
        """1 where a larger value speaks for the claim, else -1."""
        return 1 if self.direction == "greater" else -1

    @property
    def sha256(self) -> str:
        """Of what decides: a result that was measured under another wording of these is not this claim's."""
        decides = ("id", "direction", "statistic", "scale", "unit", "control", "rule")
        text = json.dumps([getattr(self, name) for name in decides], default=vars)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Span:
    """A number of a result file with its interval over the items of one run."""

    value: Number
    low: Number
    high: Number

    @model_validator(mode="after")
    def _around(self) -> Span:
        slack = 1e-9 * max(1.0, abs(self.value))
        if not self.low - slack <= self.value <= self.high + slack:
            raise ValueError(
                f"must be an interval around the value {self.value:g}, got ({self.low:g}, {self.high:g})"
            )
        return self


@dataclass(frozen=True)
class Control(Span):
    """What the effect is compared with; an interval of no width counts as exactly known."""

    name: Text = Field(kw_only=True)


@dataclass(frozen=True)
class Measurement:
    """One claim, measured on one training run of one model, as it stands in a result file.

    ``diff`` is effect minus control on the same units; ``role`` is that of the run in ``data/runs.yaml``;
    a model that is no organism has the one run 0, "real".
    """

    claim: Text
    model: Text
    run: Annotated[int, Strict(), Field(ge=0)]
    role: Literal["exploratory", "confirmatory", "unregistered", "real"]
    notebook: Text
    effect: Span
    control: Control | None
    diff: Span | None
    n: Annotated[int, Strict(), Field(ge=1)]
    unit: Text
    note: str = ""
    provenance: dict[str, Any] = Field(default_factory=dict)

    @property
    def quick(self) -> bool:
        """Measured on a few items only, to try things out."""
        return bool(self.provenance.get("params", {}).get("quick"))


@dataclass(frozen=True)
class Finding:
    """What the recorded runs of one model say together about one claim; see :func:`over_runs`."""

    claim: str
    model: str
    value: float
    ci: Interval
    control: Control | None
    runs: tuple[Measurement, ...]

    @property
    def n(self) -> int:
        """Items, requests or pairs in one run, the most where runs differ."""
        return max(run.n for run in self.runs)


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
    return dict(_read_claims(path, path.stat().st_mtime_ns))


@cache
def _read_claims(path: Path, changed: int) -> dict[str, Claim]:
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


def registered_runs(path: str | Path | None = None) -> dict[int, str]:
    """The registered training runs: number -> "exploratory" or "confirmatory"."""
    content = files.read_yaml(Path(path) if path is not None else files.data_dir() / "runs.yaml")
    return {int(run): role for role in ("exploratory", "confirmatory") for run in content[role]}


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
    for name, span in {"effect": found.effect, "control": found.control}.items():
        if span and not low - 1e-9 <= span.value <= high + 1e-9:
            raise ValueError(
                f"{name}: {span.value:g} is no {scale}, which lies in {low:g} to {high:g}. Is it in percent?"
            )
    return found


def verdict(claim: Claim, finding: Finding | None) -> tuple[str, str]:
    """The verdict on a claim, one of :data:`VERDICTS`, and in one line what decided it.

    Read for a claim with direction "greater"; for "less" all comparisons are mirrored. *Near* is the
    end of the 95 % interval that faces the threshold from beyond (the lower end), *far* the other one.

    - **replicated**: near > threshold, *and* near > upper end of the control's interval +
      margin_over_control (skipped where the rule has no margin; a measurement without control fails
      where it has one), *and* at least seeds_share of the runs have their own value > no_effect.
    - **direction only**: not replicated in full, but value > threshold; or near > no_effect, a clear
      effect that is smaller than the threshold asks for.
    - **not replicated**: neither of these, and far <= threshold: the interval lies wholly on the wrong
      side.
    - **undecided**: everything else: the interval reaches across the threshold and the value doesn't.
    - **not attempted**: no measurement.

    A wider interval, of the measurement or of the control, can only take support away.
    """
    if finding is None:
        return "not attempted", "no result file for this claim"
    rule, sign = claim.rule, claim.sign
    word, short = ("above", "below") if sign > 0 else ("below", "above")
    value = sign * finding.value
    near, far = sorted(sign * end for end in finding.ci)
    threshold, no_effect = sign * rule.threshold, sign * rule.no_effect

    failed = []
    if near <= threshold:
        failed.append(f"the interval is not wholly {word} {rule.threshold:g}")
    if rule.margin_over_control is not None:
        control = finding.control
        if control is None:
            failed.append("no control was measured")
        elif near <= max(sign * end for end in (control.low, control.high)) + rule.margin_over_control:
            failed.append(f"the interval does not clear the control ({control.name})")
    agree = sum(sign * run.effect.value > no_effect for run in finding.runs)
    runs = len(finding.runs)
    if agree < rule.seeds_share * runs - 1e-9:
        failed.append(f"only {agree} of {runs} runs lie {word} {rule.no_effect:g}")

    if not failed:
        cleared = "" if rule.margin_over_control is None else ", the control is cleared"
        held = f"the interval is wholly {word} {rule.threshold:g}{cleared}, {agree} of {runs} runs agree"
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
    effect: Estimate,
    control: tuple[str, Estimate] | None = None,
    *,
    model: str,
    run: int = 0,
    notebook: str = "",
    note: str = "",
    folder: str | Path | None = None,
    **made: Any,
) -> Path:
    """Write the result file of one claim on one run, ``<folder>/<model>/run-<run>/<claim>.json``.

    The unit is that of the claim. Machine paths are shortened. A file of the same name is
    replaced; one of other weights (trained anew, or another commit) is put aside, and a warning says where.

    Args:
        claim: id from ``data/claims.yaml``.
        effect: the statistic of the claim, with its interval over the items of this run.
        control: what the claim's control is, and what it gave in this run.
        model: organism ("organism/sft"), folder or Hugging Face id; called :func:`keep.files.model_name`.
        run: the training seed of an organism.
        notebook: what measured it; default the claim's own.
        note: one sentence for the reader of the scorecard.
        folder: default :func:`results_dir`.
        made: how it was measured, for :func:`keep.files.provenance`: ``params``, ``device``, ...

    Raises:
        ValueError: unknown claim, a number that is not finite or not on the claim's scale, an interval that
            doesn't hold the value; names the field.
    """
    claims = load_claims()
    if claim not in claims:
        raise ValueError(f"claim: {claim!r} is not in claims.yaml; known are {', '.join(claims)}")
    known, role = claims[claim], "real"
    notebook = notebook or known.notebook
    if organism := model.partition("/")[0] == "organism":
        role = registered_runs().get(int(run), "unregistered")
    content: dict[str, Any] = {
        "schema": SCHEMA, "claim": claim, "model": files.model_name(model), "run": int(run),
        "role": role, "notebook": notebook,
        "effect": _span(effect), "control": control and {"name": control[0], **_span(control[1])},
        "diff": control and _span(effect.minus(control[1])), "n": int(effect.n), "unit": known.unit,
        "note": files.portable(note),
    }  # fmt: skip
    checked = _measured(content, claims)
    sums = {"claim": known.sha256, "notebook": notebook_sha256(notebook), "library": _library_sha256()}
    about = files.provenance(model, seeds=[int(run)] if organism else [], **made)
    content["provenance"] = about | {"sha256": sums}
    content["sum"] = _sum(content)
    base = Path(folder).expanduser() if folder else results_dir()
    path = base / files.slug(checked.model) / f"run-{checked.run}" / f"{claim}.json"
    _keep_other_weights(path, content["provenance"]["model"])
    files.write_json(path, content)
    return path


def _span(estimate: Estimate) -> dict[str, float]:
    return {name: float(getattr(estimate, name)) for name in ("value", "low", "high")}


def _library_sha256() -> str:
    return files.sha256(*sorted(Path(__file__).parents[1].rglob("*.py")))


def notebook_sha256(name: str) -> str | None:
    """Of what a notebook of this clone computes; None where the package has no notebooks beside it.

    Set-up, parameters and cells that only draw (``hide-input``) don't count, nor do comments and blank lines.
    """
    root = files.repo_root()
    path = root / "notebooks" / f"{name}.ipynb" if root else None
    if path is None or not path.is_file():
        return None
    return _code_sha256(path, path.stat().st_mtime_ns)


@cache
def _code_sha256(path: Path, changed: int) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    apart = {"setup", "parameters", "hide-input"}
    code = [
        ast.dump(ast.parse("".join(cell["source"])))
        for cell in cells
        if cell["cell_type"] == "code" and not apart & set(cell["metadata"].get("tags", []))
    ]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


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
            said = f"{'/'.join(path.parts[-3:])} was measured on other weights; it is kept as {aside.name!r}"
            said += ", and the scorecard reads the new one"
            return warnings.warn(said, ResultFileWarning, stacklevel=3)


def default_folders() -> list[Path]:
    """Your own results first, then those of the default runs that ship with the package."""
    return [results_dir(), files.data_dir() / "results"]


def load_measurements(folders: Iterable[str | Path] | None = None) -> list[Measurement]:
    """All measurements below ``folders`` (default :func:`default_folders`), one per claim, model and run.

    Of a claim that was measured twice on a run, the earlier folder's counts, and within a folder the newer
    file's. What can't be used is named in a :class:`ResultFileWarning`, and the others still load: a damaged
    file, a second one of the same claim and run, one that was measured under another wording of its claim or
    by another version of its notebook, a run that ``data/runs.yaml`` doesn't register. A quick run counts
    only where there is no other.
    """
    claims, registered = load_claims(), registered_runs()
    found: dict[tuple[str, str, int], Measurement] = {}
    for folder in default_folders() if folders is None else [Path(item) for item in folders]:
        here: dict[tuple[str, str, int], tuple[Path, Measurement]] = {}
        for path in sorted(folder.rglob("*.json")):
            if "runs" in path.relative_to(folder).parts:  # what Run.remember keeps beside result files
                continue
            try:
                one = _usable(path, claims, registered)
            except (OSError, ValueError, KeyError, TypeError) as error:
                reason = f"lacks {error}" if isinstance(error, KeyError) else error
                _left_out(folder, path, f"{reason}. Run its notebook again, or delete the file")
                continue
            key = (one.claim, one.model, one.run)
            both = sorted([here[key], (path, one)] if key in here else [(path, one)], key=_written_at)
            here[key] = both[-1]
            if len(both) > 1:
                newer = both[1][0].relative_to(folder).as_posix()
                _left_out(folder, both[0][0], f"{newer} is newer, of the same claim and run. Delete one")
        for key, (_, one) in here.items():
            if key not in found or (found[key].quick and not one.quick):
                found[key] = one
    return list(found.values())


def _usable(path: Path, claims: Mapping[str, Claim], registered: Mapping[int, str]) -> Measurement:
    """The measurement in a file; raises what is wrong with it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"is not a result file of schema {SCHEMA}")
    if content.get("sum", "") not in ("", _sum(content)):
        raise ValueError("was changed after it was written")
    one = _measured(content, claims)
    made = one.provenance.get("sha256", {})
    if made.get("claim", claims[one.claim].sha256) != claims[one.claim].sha256:
        raise ValueError(f"was measured under another wording of {one.claim}")
    now = notebook_sha256(one.notebook)
    if now is not None and (made.get("notebook") or now) != now:
        raise ValueError(f"was measured by another version of {one.notebook}")
    if one.role != "real" and one.run not in registered:
        raise ValueError(f"run {one.run} is not registered in runs.yaml")
    return one


def _written_at(entry: tuple[Path, Measurement]) -> str:
    return str(entry[1].provenance.get("created_utc", ""))  # in UTC, as text


def _left_out(folder: Path, path: Path, reason: str) -> None:
    said = f"result file {folder.name}/{path.relative_to(folder).as_posix()} left out: {reason}."
    warnings.warn(said, ResultFileWarning, stacklevel=3)


def findings(folders: Iterable[str | Path] | None = None) -> list[Finding]:
    """The recorded runs of each claim and model put together, in the order of the registry."""
    runs: dict[tuple[str, str], list[Measurement]] = defaultdict(list)
    for one in load_measurements(folders):
        runs[one.claim, one.model].append(one)
    found = []
    for claim in load_claims():
        for model in sorted(model for name, model in runs if name == claim):
            some = sorted(runs[claim, model], key=lambda one: one.run)
            some = [one for one in some if not one.quick] or some
            effect = over_runs([_estimate(one.effect, one.n) for one in some])
            controls = [one.control for one in some if one.control is not None]
            control = None
            if len(controls) == len(some):
                null = over_runs([_estimate(one, some[0].n) for one in controls])
                control = Control(null.value, null.low, null.high, name=controls[0].name)
            found.append(Finding(claim, model, effect.value, effect.ci, control, tuple(some)))
    return found


def _estimate(span: Span, n: int) -> Estimate:
    return Estimate(span.value, span.low, span.high, n)


# --------------------------------------------------------------------------- scorecard


def scorecard(folders: Iterable[str | Path] | None = None, *, model: str = "all") -> list[dict[str, Any]]:
    """One row per claim and model, in the order of the registry; claims without measurement have one row.

    ``folders`` as for :func:`load_measurements`; ``model``: "all", or one as the result files call it, or its
    folder.
    """
    claims, model = load_claims(), files.model_name(model)
    measured: dict[str, list[Finding]] = {name: [] for name in claims}
    for finding in findings(folders):
        if model in ("all", finding.model):
            measured[finding.claim].append(finding)
    return [_row(claim, one) for claim in claims.values() for one in measured[claim.id] or [None]]


def _row(claim: Claim, finding: Finding | None) -> dict[str, Any]:
    given, reason = verdict(claim, finding)
    row: dict[str, Any] = {**vars(claim), "rule": vars(claim.rule), "verdict": given, "reason": reason}
    if finding is None:
        empty = ("value", "ci_low", "ci_high", "n", "control_value", "control_low", "control_high", "model")
        return row | dict.fromkeys(empty) | {"runs": {}, "note": "", "created_utc": None}
    control = finding.control
    return row | {
        "value": finding.value, "ci_low": finding.ci[0], "ci_high": finding.ci[1], "n": finding.n,
        "model": finding.model, "control": control.name if control else claim.control,
        "control_value": control and control.value, "control_low": control and control.low,
        "control_high": control and control.high, "note": finding.runs[-1].note,
        "runs": {str(one.run): [*vars(one.effect).values()] for one in finding.runs},
        "created_utc": max(str(one.provenance.get("created_utc")) for one in finding.runs),
    }  # fmt: skip


def answer(notebook: str, folders: Iterable[str | Path] | None = None, *, model: str = "") -> str:
    """One sentence on what a notebook's claims came to: their words, by the recorded runs of a model; ""
    where no claim is its own.

    ``model``: default the organism of each claim that was measured.
    """
    if notebook not in {claim.notebook for claim in load_claims().values()}:
        return ""
    rows = [row for row in scorecard(folders) if row["notebook"] == notebook]
    rows = [row for row in rows if row["model"] and row["model"].startswith(model or "organism")]
    if not rows:
        return "No claim of this notebook has a recorded run yet."
    parts = []
    for name in VERDICTS:
        of = [row["short"] or row["statement"].rstrip(".") for row in rows if row["verdict"] == name]
        if of:
            parts.append(f"*{name}* – {'; '.join(of)}")
    runs = sorted({run for row in rows for run in row["runs"]}, key=int)
    told = (
        f"**{len(runs)} training run{'s' * (len(runs) > 1)} of the organism say{'s' * (len(runs) == 1)}:** "
    )
    return told + ". ".join(parts) + "."


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A few lines of plain text: the rows by verdict, with ids."""
    counts = Counter(row["verdict"] for row in rows)
    lines = [f"{len(rows)} rows, {len({row['id'] for row in rows})} claims"]
    for name in VERDICTS:
        ids = list(dict.fromkeys(row["id"] for row in rows if row["verdict"] == name))
        lines.append(f"  {name:<15} {counts[name]:>3}  {' '.join(ids)}".rstrip())
    return "\n".join(lines)
