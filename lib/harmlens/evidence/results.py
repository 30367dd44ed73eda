"""From a measured number to a verdict: result files, the registry of claims, the scorecard.

A notebook measures a claim of ``data/claims.yaml`` and calls :func:`record`, which writes one JSON file
per claim and model. :func:`scorecard` reads all files and applies the rule of each claim
(:func:`evidence.claims.verdict`). Nothing in the scorecard is typed by hand, and no model is needed to
make it again.

Introduced in notebook 01 ("What there is to explain"); the scorecard in notebook 19.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from harmlens.evidence.claims import (
    VERDICTS,
    Claim,
    Control,
    Measurement,
    bounds,
    explain,
    load_claims,
    verdict,
)
from harmlens.evidence.stats import Estimate
from harmlens.keep import files
from harmlens.keep.files import build_dir, data_dir, write_json

__all__ = [
    "VERDICTS", "Claim", "Control", "Measurement", "ResultFileWarning", "default_folders", "explain",
    "load_claims", "load_measurements", "record", "record_estimate", "results_dir", "scorecard",
    "summary", "verdict", "write_json",
]  # fmt: skip

SCHEMA = 1


class ResultFileWarning(UserWarning):
    """A result file could not be used; the others were."""


# --------------------------------------------------------------------------- result files


def results_dir() -> Path:
    """Where new result files go: HARMLENS_RESULTS if set, else ``results`` in the build folder."""
    from_env = os.environ.get("HARMLENS_RESULTS", "").strip()
    return Path(from_env).expanduser().resolve() if from_env else build_dir() / "results"


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(
            f"{name}: is {float(value)}; a result must be finite. Look for an empty group or a 0 / 0"
        )
    return float(value)


def _on_scale(name: str, value: Any, claim: Claim) -> float:
    value, (low, high) = _number(name, value), bounds(claim.scale)
    if not low - 1e-9 <= value <= high + 1e-9:
        raise ValueError(
            f"{name}: {value:g} is no {claim.scale}, which lies in {low:g} to {high:g}. Is it in percent?"
        )
    return value


def _interval(name: str, ci: Any, value: float) -> tuple[float, float]:
    if isinstance(ci, str) or not isinstance(ci, Sequence) or len(ci) != 2:
        raise ValueError(f"{name}: expected (low, high), got {ci!r}")
    low, high = _number(f"{name}[0]", ci[0]), _number(f"{name}[1]", ci[1])
    slack = 1e-9 * max(1.0, abs(value))
    if not low - slack <= value <= high + slack:
        raise ValueError(f"{name}: must be (low, high) around the value {value:g}, got ({low:g}, {high:g})")
    return low, high


def _seed(key: Any, entry: Any) -> tuple[float, float, float]:
    triple = (entry.value, entry.low, entry.high) if isinstance(entry, Estimate) else entry
    if isinstance(triple, str) or not isinstance(triple, Sequence) or len(triple) != 3:
        raise ValueError(f"per_seed[{key}]: expected (value, low, high) or an Estimate, got {entry!r}")
    value = _number(f"per_seed[{key}]", triple[0])
    return (value, *_interval(f"per_seed[{key}] interval", triple[1:], value))


def _measurement(content: Mapping[str, Any], known: Mapping[str, Claim]) -> Measurement:
    """Check everything that a result file must hold; the same for writing and for reading."""
    if content["claim"] not in known:
        raise ValueError(f"claim: {content['claim']!r} is not in claims.yaml; known are {', '.join(known)}")
    for name in ("model", "notebook", "unit"):
        if not isinstance(content[name], str) or not content[name].strip():
            raise ValueError(f"{name}: must be text that is not empty, got {content[name]!r}")
    n = content["n"]
    if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
        raise ValueError(f"n: must be a whole number above 0, got {n!r}")
    claim = known[content["claim"]]
    value = _on_scale("value", content["value"], claim)
    control = content.get("control")
    if control is not None:
        if not isinstance(control.get("name"), str) or not control["name"].strip():
            raise ValueError("control.name: must say what the control is")
        at = _on_scale("control.value", control["value"], claim)
        ci = control.get("ci")
        control = Control(control["name"], at, None if ci is None else _interval("control.ci", ci, at))
    if not isinstance(content["per_seed"], Mapping) or not content["per_seed"]:
        raise ValueError("per_seed: must hold at least one seed, as {seed: (value, low, high)}")
    per_seed = {int(key): _seed(key, entry) for key, entry in content["per_seed"].items()}
    seeds = [_on_scale(f"per_seed[{key}]", entry[0], claim) for key, entry in per_seed.items()]
    slack = 1e-6 * max(1.0, abs(value))
    if not min(seeds) - slack <= value <= max(seeds) + slack:
        raise ValueError(
            f"value: {value:g} lies outside the values of its seeds, {min(seeds):g} to {max(seeds):g}; it is "
            "to be their mean, or that of the one seed"
        )
    return Measurement(
        content["claim"], content["model"], content["notebook"], value,
        _interval("ci", content["ci"], value), int(n), content["unit"], control,
        per_seed, content.get("note", ""), dict(content.get("provenance", {})),
    )  # fmt: skip


def record(
    claim: str,
    *,
    value: Real,
    ci: Sequence[Real],
    n: Integral,
    unit: str,
    per_seed: Mapping[Any, Any],
    model: str,
    notebook: str,
    control: Control | None = None,
    params: Mapping[str, Any] | None = None,
    inputs: Iterable[str | Path] = (),
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    wall_s: Real | None = None,
    note: str = "",
    folder: str | Path | None = None,
) -> Path:
    """Write the result file of one claim on one model; returns its path.

    Args:
        claim: id from ``data/claims.yaml``.
        value, ci, n: the statistic of the claim, its 95 % interval, the number of independent units.
        unit: what n counts: item, request, pair, ... never token.
        per_seed: training seed -> (value, low, high) or :class:`~evidence.stats.Estimate`. One entry
            for a model with one set of weights.
        model: organism ("organism/sft"), folder or Hugging Face id; ``revision`` its commit.
        notebook: file name of the notebook without its ending.
        control: what the claim's control gave.
        params: the notebook's parameters; inputs: files whose checksums belong to the result.
        wall_s: seconds that the measurement took.
        note: one sentence for the reader of the scorecard.
        folder: where to write; default :func:`results_dir`. The file is ``<folder>/<model>/<claim>.json``,
            and a file of the same name is replaced. A model in a folder is called
            :func:`keep.files.model_name`, so that two of one name are two models.

    Machine paths are shortened to file names before anything is written. A result of the same name but of
    other weights (trained anew, or another commit) is put aside, and a warning says where.

    Raises:
        ValueError: unknown claim, a number that is not finite, an interval that doesn't hold the value,
            no seeds; names the argument.
    """
    content: dict[str, Any] = {
        "schema": SCHEMA, "claim": claim, "model": files.model_name(model), "notebook": notebook,
        "value": value, "ci": ci, "n": n, "unit": unit, "per_seed": per_seed,
        "control": None if control is None else vars(control), "note": files.portable(note),
    }  # fmt: skip
    checked = _measurement(content, load_claims())
    content |= {
        "value": checked.value, "ci": checked.ci, "n": checked.n, "ci_low": checked.ci[0],
        "ci_high": checked.ci[1], "per_seed": {str(key): entry for key, entry in checked.per_seed.items()},
        "control": None if checked.control is None else vars(checked.control),
        "provenance": files.provenance(
            model, revision=revision, seeds=sorted(checked.per_seed), params=params or {}, inputs=inputs,
            device=device, dtype=dtype, wall_s=None if wall_s is None else _number("wall_s", wall_s),
        ),
    }  # fmt: skip
    content["sum"] = _sum(content)
    base = Path(folder).expanduser() if folder else results_dir()
    path = base / files.slug(checked.model) / f"{claim}.json"
    _keep_other_weights(path, content["provenance"]["model"])
    write_json(path, content)
    return path


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
    now = model["checkpoints"] | {"revision": model["revision"]}
    differ = [name for name, mark in now.items() if mark and before.get(name) and before[name] != mark]
    if differ:
        aside = path.with_name(f"{path.name}.{before[differ[0]][:8]}")
        os.replace(path, aside)
        warnings.warn(
            f"{path.parent.name}/{path.name} was measured on other weights; it is kept as {aside.name!r}, "
            "and the scorecard reads the new one", ResultFileWarning, stacklevel=4,
        )  # fmt: skip


def record_estimate(
    claim: str, estimate: Estimate, *, control: tuple[str, Estimate] | None = None, **rest: Any
) -> Path:
    """:func:`record` for an estimate of :mod:`evidence.stats`, with a named control estimate.

    Args:
        control: what the control is, and its estimate.
        rest: ``unit``, ``model``, ``notebook`` and what else :func:`record` takes.
    """
    beside = None if control is None else Control(control[0], control[1].value, control[1].ci)
    return record(
        claim, value=estimate.value, ci=estimate.ci, n=estimate.n, control=beside,
        per_seed=estimate.per_seed or {0: estimate}, **rest,
    )  # fmt: skip


def default_folders() -> list[Path]:
    """Your own results first, then those of the default runs that ship with the package."""
    return [results_dir(), data_dir() / "results"]


def load_measurements(folders: Iterable[str | Path] | None = None) -> list[Measurement]:
    """All measurements below ``folders`` (default :func:`default_folders`), one per claim and model.

    Where a claim was measured twice on a model, the earlier folder wins, and within a folder the newer
    file. A file that can't be used is named in a :class:`ResultFileWarning`; the others still load. A
    folder that doesn't exist counts as empty.
    """
    claims = load_claims()
    found: dict[tuple[str, str], Measurement] = {}
    for folder in default_folders() if folders is None else [Path(item) for item in folders]:
        here: dict[tuple[str, str], Measurement] = {}
        for path in sorted(folder.rglob("*.json")):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(content, dict) or content.get("schema") != SCHEMA:
                    raise ValueError(f"is not a result file of schema {SCHEMA}")
                if content.get("sum", "") not in ("", _sum(content)):
                    raise ValueError("was changed after it was written")
                measurement = _measurement(content, claims)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"lacks {error}" if isinstance(error, KeyError) else error
                warnings.warn(
                    f"result file {folder.name}/{path.relative_to(folder).as_posix()} left out: {reason}. "
                    "Run its notebook again, or delete the file.", ResultFileWarning, stacklevel=2,
                )  # fmt: skip
                continue
            key = (measurement.claim, measurement.model)
            if key not in here or _created(measurement) >= _created(here[key]):
                here[key] = measurement
        found = here | found
    return list(found.values())


def _created(measurement: Measurement) -> str:
    return str(measurement.provenance.get("created_utc", ""))  # ISO 8601 in UTC sorts as text


# --------------------------------------------------------------------------- scorecard


def scorecard(folders: Iterable[str | Path] | None = None, *, model: str = "all") -> list[dict[str, Any]]:
    """One row per claim and model, in the order of the registry; claims without measurement have one row.

    Args:
        folders: as for :func:`load_measurements`.
        model: "all", or a model as it stands in the result files, or its folder; the others are left out.
    """
    claims, model = load_claims(), files.model_name(model)
    measured: dict[str, list[Measurement]] = {name: [] for name in claims}
    for measurement in load_measurements(folders):
        if model in ("all", measurement.model):
            measured[measurement.claim].append(measurement)
    rows = []
    for claim in claims.values():
        for measurement in sorted(measured[claim.id], key=lambda item: item.model) or [None]:
            rows.append(_row(claim, measurement))
    return rows


def _row(claim: Claim, measurement: Measurement | None) -> dict[str, Any]:
    given, reason = explain(claim, measurement)
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: compute the scorecard, write it as JSON, print a summary."""
    parser = argparse.ArgumentParser(prog="python -m harmlens.evidence.results", description=main.__doc__)
    parser.add_argument(
        "folders",
        nargs="*",
        help="folders with result files, the first wins (default: yours, then the shipped ones)",
    )
    parser.add_argument(
        "--output", type=Path, help="file to write (default: scorecard.json in the build folder)"
    )
    options = parser.parse_args(arguments)
    if missing := [item for item in options.folders if not Path(item).is_dir()]:
        parser.error(f"no such folder: {', '.join(missing)}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = scorecard(options.folders or None)
    path = options.output or build_dir() / "scorecard.json"
    write_json(path, rows)
    print(summary(rows))
    print(f"written to {os.path.relpath(path)}")
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
