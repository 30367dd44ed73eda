"""The registry of claims, and what a run and all runs found of one.

The claims stand in ``data/claims.yaml``, each with its rule, before any number exists. ``data/runs.yaml``
registers the training runs that count.

Introduced in notebook 01 ("What there is to explain").
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from harmlens.evidence.stats import Estimate
from harmlens.keep import files


def _said(text: str) -> str:
    if not text.strip():
        raise ValueError("must be text that is not empty")
    return text


Text = Annotated[str, AfterValidator(_said)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Interval = tuple[Number, Number]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Rule:
    """What decides a claim's word; see :func:`word`.

    ``delta`` is the smallest effect of interest. ``no_effect`` is the value that means nothing is there; it
    defaults to the threshold.
    """

    threshold: Number
    no_effect: Number
    delta: Annotated[Number, Field(gt=0)]


Condition = Annotated[str, AfterValidator(lambda text: condition(text)[0] and text)]
_COMPARED = re.compile(r"(mean )?(.+?) (>=|<=) (-?[\d.]+)")


def condition(text: str) -> tuple[str, str, float]:
    """A requirement: the name of a value of the run with its bound, or the id of a claim.

    >>> condition("mean area <= 0.5"), condition("V7m")
    (('area', 'mean <=', 0.5), ('V7m', '', 0.0))
    """
    if found := _COMPARED.fullmatch(text):
        return found[2], (found[1] or "") + found[3], float(found[4])
    if not re.fullmatch(r"\w+", text):
        raise ValueError(f"{text!r} is neither a claim's id nor of the form 'name >= number'")
    return text, "", 0.0


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Claim:
    """One row of ``data/claims.yaml``, which says what the fields are."""

    id: Annotated[str, Field(pattern=r"^\w+$")]  # it names a file
    paper: Literal["mediation", "pruning", "harmlens"]
    role: Literal["primary", "secondary", "check"]
    scope: Literal["method", "logic", "mechanism"]
    source: Text
    statement: Text
    short: Text  # the statement in a few plain words, for figures and answers
    notebook: Text
    kind: Literal["effect", "equivalence", "rank", "conjunction", "table"] = "effect"
    reported: Text = "direction only"
    direction: Literal["greater", "less"] = "greater"
    statistic: str = ""
    scale: str = ""
    unit: str = ""  # what n counts
    control: str = ""
    difference: bool = False  # the statistic is a difference from its control already
    rule: Rule | None = None
    attainable: tuple[float, float] = (-math.inf, math.inf)
    requires: tuple[Condition, ...] = ()
    sensitivity: tuple[Condition, ...] = ()  # the instrument sees an effect where there is one
    parts: tuple[str, ...] = ()  # of a conjunction
    tuned: bool = False  # the organism was made to meet it

    @model_validator(mode="after")
    def _whole(self) -> Claim:
        if self.kind == "conjunction":
            if len(self.parts) < 2 or self.rule:
                raise ValueError("a conjunction has two parts or more, and no rule of its own")
            return self
        if missing := [x for x in ("statistic", "scale", "unit", "control") if not getattr(self, x).strip()]:
            raise ValueError(f"{', '.join(missing)}: must be text that is not empty")
        if self.kind == "table":
            return self
        if self.rule is None:
            raise ValueError("rule: is missing")
        if self.sign * (self.rule.threshold - self.rule.no_effect) < 0:
            raise ValueError(f"rule.no_effect lies beyond rule.threshold for direction {self.direction!r}")
        if not self.attainable[0] < self.rule.threshold < self.attainable[1]:
            raise ValueError(
                f"attainable {list(self.attainable)} lies on one side of threshold {self.rule.threshold:g}: "
                "the claim could come out one way only. Mend the statistic or the threshold"
            )
        if self.kind == "equivalence" and not (self.sensitivity and self.direction == "less"):
            raise ValueError("'nothing is lost' has direction less, and a sensitivity check that sees a loss")
        return self

    @property
    def sign(self) -> int:
        """1 where a larger value speaks for the claim, else -1."""
        return 1 if self.direction == "greater" else -1

    @property
    def conditions(self) -> list[tuple[str, str, float]]:
        """Requirements and sensitivity checks, taken apart; see :func:`condition`."""
        return [condition(text) for text in self.requires + self.sensitivity]

    @property
    def compared(self) -> bool:
        """Whether the difference from a control, recorded beside the effect, decides."""
        return self.kind != "equivalence" and not self.difference

    @property
    def asks(self) -> list[str]:
        """Claims that have to be supported first."""
        return [name for name, compared, _ in self.conditions if not compared]

    @property
    def values(self) -> list[str]:
        """Names of the values that a run has to give beside the effect."""
        return [name for name, compared, _ in self.conditions if compared]

    @property
    def sha256(self) -> str:
        """Of what is measured: a result of another statistic, control or requirement is not this claim's."""
        decides = ("id", "direction", "statistic", "scale", "unit", "control", "difference")
        text = json.dumps([*(getattr(self, name) for name in decides), self.values])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def registered_sha256(self) -> str:
        """Of all that decides its word; a registration holds it fast."""
        worded = ("paper", "scope", "source", "statement", "short", "reported", "notebook")
        text = repr([pair for pair in sorted(vars(self).items()) if pair[0] not in worded])
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
    effect: Span | None  # None where this run has no value; the note says why
    control: Control | None
    diff: Span | None
    n: Annotated[int, Strict(), Field(ge=0)]
    unit: Text
    values: dict[str, Number] = Field(default_factory=dict)  # of requirements and sensitivity checks
    attainable: Interval | None = None  # in this run, where it differs from the claim's
    note: str = ""
    provenance: dict[str, Any] = Field(default_factory=dict)

    @property
    def quick(self) -> bool:
        """Measured on a few items only, to try things out."""
        return bool(self.provenance.get("params", {}).get("quick"))


@dataclass(frozen=True)
class Finding:
    """What the recorded runs of one role and model say together about one claim (:func:`stats.over_runs`)."""

    claim: str
    model: str
    role: str
    effect: Span | None  # None where no run has a value
    control: Control | None
    diff: Span | None
    runs: tuple[Measurement, ...]

    @property
    def n(self) -> int:
        """Items, requests or pairs in one run, the most where runs differ."""
        return max(run.n for run in self.runs)

    def estimates(self, part: str) -> list[Estimate]:
        """ "effect", "control" or "diff" of each run that has it."""
        spans = [(getattr(run, part), run.n) for run in self.runs]
        return [Estimate(span.value, span.low, span.high, n) for span, n in spans if span]


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
            if entry.get("kind") == "equivalence":
                rule = {"threshold": rule.get("delta")} | rule
            entry = entry | {"rule": {"no_effect": rule.get("threshold")} | rule}
        claim = _checked(Claim, entry, f"{path.name}, claim {number} ({entry.get('id', 'without id')}): ")
        if claim.id in claims:
            raise ValueError(f"{path.name}: claim id {claim.id!r} occurs twice")
        claims[claim.id] = claim
    rests_on = {claim.id: [*claim.parts, *claim.asks] for claim in claims.values()}
    for claim, others in rests_on.items():
        if strange := [name for name in others if name not in claims]:
            raise ValueError(f"{path.name}, claim {claim}: names {strange[0]!r}, which is no claim")
    try:
        TopologicalSorter(rests_on).prepare()
    except CycleError as error:
        raise ValueError(f"{path.name}: claims rest on one another: {', '.join(error.args[1])}") from None
    return claims


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Runs:
    """``data/runs.yaml``, which says what the fields are."""

    exploratory: tuple[int, ...]
    confirmatory: tuple[int, ...] = ()
    stop: str = ""
    closed: bool = False

    @model_validator(mode="after")
    def _apart(self) -> Runs:
        if twice := set(self.exploratory) & set(self.confirmatory):
            raise ValueError(f"run {min(twice)} is exploratory, so it can't be confirmatory. Take a new one")
        if self.confirmatory and not self.stop:
            raise ValueError("stop: say when no further runs are measured, before the first one is")
        return self


def registered_runs(path: str | Path | None = None) -> dict[int, str]:
    """The registered training runs: number -> "exploratory" or "confirmatory"."""
    runs = read_runs(path)
    return {run: role for role in ("exploratory", "confirmatory") for run in getattr(runs, role)}


def read_runs(path: str | Path | None = None) -> Runs:
    """The register of training runs, default ``data/runs.yaml``; a ValueError says what is wrong with it."""
    path = Path(path) if path is not None else files.data_dir() / "runs.yaml"
    return _read_runs(path, path.stat().st_mtime_ns)


@cache
def _read_runs(path: Path, changed: int) -> Runs:
    return _checked(Runs, files.read_yaml(path), f"{path.name}: ")


def registration() -> dict[str, set[str]]:
    """What was fixed before the confirmatory runs were measured, ``data/registration.json``.

    Claim, notebook or kind of organism -> checksums that count: the one of that day, and those of logged
    deviations. Empty where nothing is registered.
    """
    path = files.data_dir() / "registration.json"
    content = json.loads(path.read_text()) if path.is_file() else {"sha256": {}, "deviations": []}
    allowed = {name: {checksum} for name, checksum in content["sha256"].items()}
    for one in content["deviations"]:
        allowed.setdefault(one["what"], set()).add(one["sha256"])
    return allowed


def measured(content: Mapping[str, Any], claims: Mapping[str, Claim]) -> Measurement:
    """Check everything that a result file must hold; the same for writing and for reading."""
    if content["claim"] not in claims:
        raise ValueError(f"claim: {content['claim']!r} is not in claims.yaml; known are {', '.join(claims)}")
    found, claim = _checked(Measurement, content), claims[content["claim"]]
    if claim.kind == "conjunction":
        raise ValueError(
            f"claim: {claim.id} is a conjunction; its parts {', '.join(claim.parts)} are measured"
        )
    if found.effect is None:
        if not found.note:
            raise ValueError("note: must say why this run has no value")
        return found
    if missing := [name for name in claim.values if name not in found.values]:
        raise ValueError(f"values: {missing[0]!r} is missing, which {claim.id} requires")
    low, high = found.attainable or claim.attainable
    if not low - 1e-9 <= found.effect.value <= high + 1e-9 and found.attainable:
        raise ValueError(f"attainable: {low:g} to {high:g} does not hold the effect {found.effect.value:g}")
    low, high = claim.attainable
    for name, span in {"effect": found.effect, "control": found.control}.items():
        if span and not low - 1e-9 <= span.value <= high + 1e-9:
            raise ValueError(
                f"{name}: {span.value:g} is no {claim.scale}, in {low:g} to {high:g}. Is it in percent?"
            )
    return found
