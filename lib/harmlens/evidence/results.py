"""From a measured number to the scorecard: result files, what all runs of a claim say, the table.

A notebook measures a claim on one training run and calls :func:`record`, which writes one JSON file for each
claim, model and run. :func:`findings` puts the runs together, :mod:`evidence.words` gives each claim its
word, and :func:`scorecard` makes the table. No model is needed to make it again.

Introduced in notebook 01 ("What there is to explain"); the scorecard in notebook 19.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from harmlens.evidence.claims import (
    Claim,
    Control,
    Finding,
    Measurement,
    Span,
    load_claims,
    measured,
    read_runs,
    registered_runs,
    registration,
)
from harmlens.evidence.stats import Estimate, over_runs
from harmlens.evidence.words import CHECKS, TABLE, WORDS, all_words
from harmlens.keep import files

SCHEMA = 3


class ResultFileWarning(UserWarning):
    """A result file could not be used; the others were."""


# --------------------------------------------------------------------------- result files


def results_dir() -> Path:
    """Where new result files go: HARMLENS_RESULTS if set, else ``results`` in the build folder."""
    return files.folder_from("HARMLENS_RESULTS") or files.build_dir() / "results"


def record(
    claim: str,
    effect: Estimate | None,
    control: tuple[str, Estimate] | None = None,
    *,
    model: str,
    run: int = 0,
    values: Mapping[str, float] = {},
    attainable: tuple[float, float] | None = None,
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
        effect: the statistic of the claim, with its interval over the items of this run; None where this run
            has no value, and then the note says why.
        control: what the claim's control is, and what it gave in this run.
        model: organism ("organism/sft"), folder or Hugging Face id; called :func:`keep.files.model_name`.
        run: the training seed of an organism.
        values: what the claim's requirements and sensitivity checks came to in this run, by name.
        attainable: the least and the largest effect that could be found in this run, if not the claim's.
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
        "effect": effect and _span(effect), "control": control and {"name": control[0], **_span(control[1])},
        "diff": effect and control and _span(effect.minus(control[1])), "n": int(effect.n) if effect else 0,
        "unit": known.unit or known.kind, "values": {name: float(value) for name, value in values.items()},
        "attainable": attainable and [float(end) for end in attainable], "note": files.portable(note),
    }  # fmt: skip
    checked = measured(content, claims)
    library = files.sha256(*sorted(Path(__file__).parents[1].rglob("*.py")))
    sums = {"claim": known.sha256, "notebook": notebook_sha256(notebook), "library": library}
    if (fixed := files.data_dir() / "registration.json").is_file():
        sums["registration"] = files.sha256(fixed)
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


def notebook_sha256(name: str) -> str | None:
    """Of what a notebook of this clone computes; None where the package has no notebooks beside it.

    Set-up, parameters, cells that only draw (``hide-input``) and those of exercises don't count, nor do
    comments, blank lines and where one cell ends and the next begins.
    """
    root = files.repo_root()
    path = root / "notebooks" / f"{name}.ipynb" if root else None
    if path is None or not path.is_file():
        return None
    return _code_sha256(path, path.stat().st_mtime_ns)


@cache
def _code_sha256(path: Path, changed: int) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    apart = {"setup", "parameters", "hide-input", "exercise", "solution", "starter", "check"}
    code = [
        ast.dump(statement)
        for cell in cells
        if cell["cell_type"] == "code" and not apart & set(cell["metadata"].get("tags", []))
        for statement in ast.parse("".join(cell["source"])).body
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
    held_to = load_claims(), registered_runs(), registration()
    found: dict[tuple[str, str, int], Measurement] = {}
    for folder in default_folders() if folders is None else [Path(item) for item in folders]:
        here: dict[tuple[str, str, int], tuple[Path, Measurement]] = {}
        for path in sorted(folder.rglob("*.json")):
            if "runs" in path.relative_to(folder).parts:  # what Run.remember keeps beside result files
                continue
            try:
                one = _usable(path, *held_to)
            except (OSError, ValueError, KeyError, TypeError) as error:
                reason = f"lacks {error}" if isinstance(error, KeyError) else error
                _left_out(folder, path, f"{reason}. Run its notebook again, or delete the file")
                continue
            key = (one.claim, one.model, one.run)
            both = [here[key], (path, one)] if key in here else [(path, one)]
            both.sort(key=lambda entry: str(entry[1].provenance.get("created_utc", "")))  # in UTC, as text
            here[key] = both[-1]
            if len(both) > 1:
                newer = both[1][0].relative_to(folder).as_posix()
                _left_out(folder, both[0][0], f"{newer} is newer, of the same claim and run. Delete one")
        for key, (_, one) in here.items():
            if key not in found or (found[key].quick and not one.quick):
                found[key] = one
    return list(found.values())


def _usable(
    path: Path, claims: Mapping[str, Claim], registered: Mapping[int, str], fixed: Mapping[str, set[str]]
) -> Measurement:
    """The measurement in a file; raises what is wrong with it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"is not a result file of schema {SCHEMA}")
    if content.get("sum", "") not in ("", _sum(content)):
        raise ValueError("was changed after it was written")
    one = measured(content, claims)
    made = one.provenance.get("sha256", {})
    if made.get("claim", claims[one.claim].sha256) != claims[one.claim].sha256:
        raise ValueError(f"was measured under another wording of {one.claim}")
    now = notebook_sha256(one.notebook)
    if now is not None and (made.get("notebook") or now) not in {now} | fixed.get(one.notebook, set()):
        raise ValueError(f"was measured by another version of {one.notebook}")
    if one.role != "real" and one.run not in registered:
        raise ValueError(f"run {one.run} is not registered in runs.yaml")
    if one.role == "confirmatory":
        sums = {one.claim: claims[one.claim].registered_sha256, one.notebook: made.get("notebook")}
        for what, checksum in sums.items():
            if checksum not in fixed.get(what, ()):
                raise ValueError(f"{what} is not as it was registered; log why with tools/register.py")
    return one


def _left_out(folder: Path, path: Path, reason: str) -> None:
    said = f"result file {folder.name}/{path.relative_to(folder).as_posix()} left out: {reason}."
    warnings.warn(said, ResultFileWarning, stacklevel=3)


def findings(folders: Iterable[str | Path] | None = None, *, role: str = "") -> list[Finding]:
    """The recorded runs of each claim and model put together, in the order of the registry.

    Runs of different roles are never put together: ``role`` says which count; "" is confirmatory runs where a
    claim has all of them, else exploratory ones. Until then nobody looks at confirmatory ones: without values
    they only say how many there are, unless ``runs.yaml`` is closed.
    """
    runs: dict[tuple[str, str], list[Measurement]] = defaultdict(list)
    for one in load_measurements(folders):
        if not role or one.role in (role, "real"):
            runs[one.claim, one.model].append(one)
    return [
        put_together(claim, sorted(runs[name, model], key=lambda one: one.run))
        for name, claim in load_claims().items()
        for model in sorted(model for of, model in runs if of == name)
    ]


def put_together(claim: Claim, some: Sequence[Measurement]) -> Finding:
    """Runs of one claim and model: of the first role that there is, and no quick ones beside full ones."""
    some, runs = [one for one in some if not one.quick] or list(some), read_runs()
    roles = dict.fromkeys(one.role for one in some)
    fresh = {one.run for one in some if one.role == "confirmatory"}
    all_in = runs.closed or fresh >= set(runs.confirmatory)
    order = ("confirmatory", "exploratory") if all_in else ("exploratory", "confirmatory")
    role = next(one for one in (*order, *roles) if one in roles)
    some = [one for one in some if one.role == role]
    if role == "confirmatory" and not all_in:
        told = f"not shown before all runs are in ({len(fresh)} of {len(runs.confirmatory)})"
        some = [replace(one, effect=None, control=None, diff=None, note=told) for one in some]
    found = Finding(claim.id, some[0].model, role, None, None, None, tuple(some))
    each = {part: found.estimates(part) for part in ("effect", "control", "diff")}
    whole = [part for part, runs in each.items() if runs and len(runs) == len(each["effect"])]
    spans = {part: Span(**_span(over_runs(each[part]))) for part in whole}
    if effect := spans.get("effect"):  # nothing lies beyond what is attainable
        low, high = claim.attainable
        spans["effect"] = replace(effect, low=max(low, effect.low), high=min(high, effect.high))
    if control := spans.get("control"):
        spans["control"] = Control(**vars(control), name=next(x.control.name for x in some if x.control))
    return replace(found, **spans)


# --------------------------------------------------------------------------- scorecard


def scorecard(
    folders: Iterable[str | Path] | None = None, *, model: str = "all", role: str = ""
) -> list[dict[str, Any]]:
    """One row per claim and model, in the order of the registry; claims without measurement have one row.

    ``folders`` as for :func:`load_measurements`; ``model``: "all", or one as the result files call it, or its
    folder.
    """
    claims, model = load_claims(), files.model_name(model)
    found = findings(folders, role=role)
    said, known = all_words(found), {(one.claim, one.model): one for one in found}
    pairs = [pair for pair in said if model in ("all", pair[1])]
    rows = []
    for claim in claims.values():
        mine = [pair for pair in pairs if pair[0] == claim.id]
        rows += [_row(claim, known.get(pair), pair[1], *said[pair]) for pair in mine]
        rows += [] if mine else [_row(claim, None, None, "not testable", "not measured")]
    return rows


def _row(claim: Claim, finding: Finding | None, model: str | None, word: str, reason: str) -> dict[str, Any]:
    row = {name: list(x) if isinstance(x, tuple) else x for name, x in vars(claim).items()}
    row["attainable"] = [end if math.isfinite(end) else None for end in claim.attainable]  # as in JSON
    row |= {"rule": claim.rule and vars(claim.rule), "word": word, "reason": reason, "model": model}
    if finding is None:
        empty = ("value", "ci_low", "ci_high", "n", "control_value", "control_low", "control_high")
        return row | dict.fromkeys(empty) | {"runs": {}, "role_of_runs": "", "note": "", "created_utc": None}
    effect, control = finding.effect, finding.control
    return row | {
        "value": effect and effect.value, "ci_low": effect and effect.low, "ci_high": effect and effect.high,
        "n": finding.n, "control": control.name if control else claim.control,
        "control_value": control and control.value, "control_low": control and control.low,
        "control_high": control and control.high, "note": finding.runs[-1].note, "role_of_runs": finding.role,
        "runs": {str(one.run): [*vars(one.effect).values()] for one in finding.runs if one.effect},
        "created_utc": max(str(one.provenance.get("created_utc")) for one in finding.runs),
    }  # fmt: skip


def answer(notebook: str, folders: Iterable[str | Path] | None = None, *, model: str = "") -> str:
    """One sentence on what a notebook's claims came to by the recorded runs of a model: words, claims, means
    over runs with their intervals; "" where no claim is its own.

    ``model``: default the organism of each claim that was measured.
    """
    if notebook not in {claim.notebook for claim in load_claims().values()}:
        return ""
    rows = [row for row in scorecard(folders) if row["notebook"] == notebook]
    rows = [row for row in rows if row["model"] and row["model"].startswith(model or "organism")]
    if not rows:
        return "No claim of this notebook has a recorded run yet."
    n = len({run for row in rows for run in row["runs"]})
    told = f"**{n} training run{'s' * (n > 1)} of the organism say{'s' * (n == 1)}:** "
    return f"{told}{grouped(rows, (*WORDS, *CHECKS), _measured)}."


def grouped(
    rows: Sequence[Mapping[str, Any]], order: Iterable[str], about: Callable[[Mapping[str, Any]], str]
) -> str:
    """Words in this order, each with its claims in plain words and what is said ``about`` each of them."""
    of = {word: [f"{row['short']} ({about(row)})" for row in rows if row["word"] == word] for word in order}
    return ". ".join(f"*{word}* – {'; '.join(some)}" for word, some in of.items() if some)


def _measured(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return row["id"]
    return f"{row['id']}: {row['value']:.2g} [{row['ci_low']:.2g}, {row['ci_high']:.2g}]"


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A few lines of plain text: the rows by word, with ids."""
    counts = Counter(row["word"] for row in rows)
    lines = [f"{len(rows)} rows, {len({row['id'] for row in rows})} claims"]
    for name in (*WORDS, *CHECKS, TABLE):
        ids = list(dict.fromkeys(row["id"] for row in rows if row["word"] == name))
        lines.append(f"  {name:<18} {counts[name]:>3}  {' '.join(ids)}".rstrip())
    return "\n".join(lines)
