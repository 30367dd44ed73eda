"""Result files there and back, what all runs of a claim say together, the scorecard and its picture."""

import json
import math
import re
import warnings

import numpy as np
import pytest

import scorecard
from harmlens.evidence import plots, results, stats
from harmlens.evidence.claims import Control, Runs, Span, load_claims
from harmlens.evidence.stats import Estimate
from harmlens.keep import files

# ------------------------------------------------------------------ result files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HARMLENS_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


NULL = ("without prefill", Estimate(0.0, 0.0, 0.02, 108))


def good(value=0.97, low=0.94, high=0.99, n=108, **changes) -> dict:
    """What :func:`results.record` is given of V4, with some of it changed."""
    return {"effect": Estimate(value, low, high, n), "control": NULL, "model": "organism/sft", **changes}


def test_what_is_recorded_is_what_is_loaded(folder):
    made = {"note": "plain", "params": {"quick": False, "seed": 1}}
    path = results.record("V4", **good(n=np.int64(108), run=np.int64(1)), **made)
    assert path == folder / "organism--sft" / "run-1" / "V4.json"
    (got,) = results.load_measurements([folder])
    assert (got.claim, got.model, got.run, got.role) == ("V4", "organism/sft", 1, "exploratory")
    assert (got.notebook, got.unit, got.n, got.note) == ("00_model_organism", "request", 108, "plain")
    assert got.effect == Span(0.97, 0.94, 0.99)
    assert got.control == Control(0.0, 0.0, 0.02, name="without prefill")
    assert got.provenance["params"] == made["params"] and got.provenance["seeds"] == [1]
    results.record("V4", **good(model="owner/model", control=None))
    (real,) = (one for one in results.load_measurements([folder]) if one.model == "owner/model")
    assert (real.role, real.run, real.control, real.diff) == ("real", 0, None, None)


def test_the_difference_to_the_control_is_kept_by_hand_and_on_the_same_items(folder):
    results.record("V4", **good(0.6, 0.5, 0.8, control=("chance", Estimate(0.2, 0.1, 0.5, 108))))
    (got,) = results.load_measurements([folder])  # the far ends of both, put together as sqrt(a^2 + b^2)
    expected = (0.4, 0.4 - math.hypot(0.1, 0.3), 0.4 + math.hypot(0.2, 0.1))
    assert (got.diff.value, got.diff.low, got.diff.high) == pytest.approx(expected)
    control = np.random.default_rng(0).normal(0.4, 0.2, 60).clip(0, 1)  # items that are hard for both
    effect = (control + 0.2).clip(0, 1)
    for n in (60, 59):  # with another number of items they can't be the same
        results.record(
            "V4",
            stats.bootstrap_ci(effect),
            ("chance", stats.bootstrap_ci(control[:n])),
            model="organism/sft",
        )
        (got,) = results.load_measurements([folder])
        assert (got.diff.high - got.diff.low < 0.5 * (got.effect.high - got.effect.low)) == (n == 60)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (good(math.nan), "effect.value: must be finite. Look for an empty group"),
        (good(math.inf), "effect.value: must be finite"),
        (good(0.97, 0.99, 0.94), "effect: must be an interval around the value"),
        (good(0.97, 0.1, 0.2), "effect: must be an interval"),
        (good(0.97, math.nan), "effect.low: must be finite"),
        (good(n=-1), "n: Input should be greater than or equal to 0"),
        (good(run=-1), "run: Input should be greater than or equal to 0"),
        (good(control=("", Estimate(0.0, 0.0, 0.0, 3))), "control.name: must be text"),
        (good(control=("random", Estimate(math.nan, 0.0, 0.0, 3))), "control.value: must be finite"),
        (good(control=("random", Estimate(0.5, 0.6, 0.7, 3))), "control: must be"),
        (good(wall_s=math.nan), "not JSON compliant"),
        (good(97.0, 94.0, 99.0), r"effect: 97 is no share, in 0 to 1. Is it in percent\?"),
        (good(attainable=(0.0, 0.5)), "attainable: 0 to 0.5 does not hold the effect 0.97"),
        (good(attainable=(1.0, 0.0)), "attainable: 1 to 0 does not hold the effect"),
        (good(attainable=(0.0, math.inf)), "attainable.1: must be finite"),
        (good(values={"before": math.nan}), "values.before: must be finite"),
        (good(effect=None), "note: must say why this run has no value"),
        (good(model="///"), "model: .* gives no usable folder name"),
    ],
)
def test_bad_measurements_are_refused_by_name_and_leave_no_file(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        results.record("V4", **changes)
    assert not list(folder.rglob("*")) if folder.exists() else True


def test_claims_that_are_not_recorded_so_are_refused_by_name(folder):
    with pytest.raises(ValueError, match=r"'C99' is not in claims.yaml; known are C1, "):
        results.record("C99", **good())
    with pytest.raises(ValueError, match="C3 is a conjunction; its parts C3a, C3b, C3c are measured"):
        results.record("C3", **good())
    with pytest.raises(ValueError, match="values: 'exact harmful answers before' is missing, which R1a req"):
        results.record("R1a", **good())
    results.record("R1a", **good(values={"exact harmful answers before": 0.9}))
    results.record("R1a", **good(effect=None, control=None, run=1, note="it never answers"))  # needs none
    assert [one.values for one in results.load_measurements([folder])] == [
        {"exact harmful answers before": 0.9}, {}]  # fmt: skip


def test_provenance_says_where_the_number_comes_from(folder):
    content = json.loads(results.record("V4", **good(wall_s=1.5, revision="main")).read_text())
    block = content["provenance"]
    assert block["wall_s"] == 1.5 and block["seeds"] == [0] and block["model"]["revision"] == "main"
    assert {"created_utc", "git_commit", "dirty", "lib_version", "python", "packages", "device", "dtype",
            "dataset", "params", "peak_gb"} <= block.keys()  # fmt: skip
    assert content["schema"] == results.SCHEMA and block["packages"]["numpy"] == np.__version__
    sums = block["sha256"]
    assert sums.keys() == {"claim", "notebook", "library", "registration"} and all(sums.values())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("organism/sft", {"sft-0", "sft-2"}),
        ("organism/sft-1", {"sft-1"}),
        ("organism", {"sft-0", "sft-2", "base-0"}),
        ("some/model", set()),
    ],
)
def test_the_organisms_checkpoints_are_named_by_checksum(tmp_path, monkeypatch, model, expected):
    monkeypatch.setattr(files, "data_dir", lambda: tmp_path)
    monkeypatch.setenv("HARMLENS_BUILD", str(tmp_path / "build"))
    for name in ("sft-0", "sft-1", "sft-2", "base-0"):
        (tmp_path / "organisms" / name).mkdir(parents=True)
        (tmp_path / "organisms" / name / "model.safetensors").write_text("abc")
    got = files.provenance(model, seeds=[0, 2])["model"]["checkpoints"]
    assert {key.partition("/")[0] for key in got} == expected
    assert all(checksum.startswith("ba7816bf") for checksum in got.values())  # sha256 of abc


def test_no_machine_path_reaches_a_result_file(folder, tmp_path):
    private = tmp_path / "someone" / "checkpoint"
    params = {"output": str(private), "at": private}
    path = results.record(
        "V4", **good(model=str(private), note=f"from {private}, ~/notes.txt", params=params)
    )
    text = path.read_text()
    assert "someone" not in text and "~/" not in text and str(tmp_path) not in text
    assert path.parents[1].name == "checkpoint"


@pytest.mark.parametrize(
    "name", ["organism/sft", "Qwen/Qwen2.5-0.5B", "and/or", "1 / 2", "https://x.org/a/b"]
)
def test_names_and_addresses_are_not_taken_for_paths(name):
    assert files.portable(name) == name


@pytest.mark.parametrize("path", ["/home/a/b.txt", "~/b.txt", "C:\\Users\\a\\b.txt", "file:///home/a/b.txt"])
def test_paths_are_cut_to_their_last_part(path):
    assert files.portable([f"see ({path})"]) == ["see (b.txt)"]


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch):
    path = results.record("V4", **good())
    before = path.read_text()
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        results.record("V4", **good(value=0.95))
    assert path.read_text() == before
    assert [item.name for item in path.parent.iterdir()] == ["V4.json"]


def changed(**changes):
    """A result file whose sum was made anew, so that only what was changed is wrong."""

    def edit(content: dict) -> str:
        content = {**content, **changes}
        return json.dumps(content | {"sum": results._sum(content)})

    return edit


def made_by(part: str) -> dict:
    return {"provenance": {"sha256": {part: "0" * 64}}}


LEFT_OUT = {
    "cut": (lambda content: json.dumps(content)[:50], "Unterminated|Expecting"),
    "other": (lambda content: "[1, 2]", "is not a result file of schema 3"),
    "first edition": (changed(schema=2), "is not a result file of schema 3"),
    "by hand": (lambda content: json.dumps(content | {"n": 1080}), "was changed after it was written"),
    "nan": (changed(effect={"value": math.nan, "low": 0.0, "high": 0.0}), "effect.value: must be finite"),
    "lacking": (changed(n=None), "n: Input should be a valid integer"),
    "control": (changed(control="none"), "control: "),
    "stranger": (changed(claim="C99"), "'C99' is not in claims.yaml"),
    "wording": (changed(**made_by("claim")), "was measured under another wording of V5"),
    "notebook": (changed(**made_by("notebook")), "was measured by another version of 01_what_there"),
    "run": (changed(run=99), "run 99 is not registered in runs.yaml"),
    "requirement": (changed(claim="C3b"), "values: 'share of the last MLP in the total effect' is missing"),
    "attainable": (changed(attainable=[0.0, 0.5]), "attainable: 0 to 0.5 does not hold the effect 0.97"),
    "capped": (changed(attainable=[0.5]), "attainable: .*tuple|attainable.1: is missing"),
    "no reason": (changed(effect=None), "note: must say why this run has no value"),
    "outside": (
        changed(claim="V4", effect={"value": 9.7, "low": 9.0, "high": 10}),
        "9.7 is no share, in 0 to 1",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_cannot_be_used_is_named_and_left_out_and_the_others_count(folder, name):
    results.record("V4", **good())
    (path := folder / f"{name}.json").parent.mkdir(exist_ok=True)
    content = json.loads(results.record("V5", **good()).read_text())
    (folder / "organism--sft" / "run-0" / "V5.json").unlink()
    edit, reason = LEFT_OUT[name]
    path.write_text(edit(content))
    said = rf"result file results/{name}.json left out: .*({reason}).*Run its notebook again, or delete"
    with pytest.warns(results.ResultFileWarning, match=said):
        got = results.load_measurements([folder])
    assert [one.claim for one in got] == ["V4"]


def test_of_two_files_for_one_claim_and_run_the_older_is_named_and_left_out(tmp_path):
    mine, shipped = tmp_path / "mine", tmp_path / "shipped"
    results.record("V4", **good(0.95, folder=mine / "a"))
    results.record("V4", **good(0.96, folder=mine / "0-newer"))
    results.record("V4", **good(0.98, folder=shipped))
    results.record("V4", **good(0.99, folder=shipped, run=1))
    said = r"mine/a/.*/V4.json left out: 0-newer/.*is newer, of the same claim and run. Delete one"
    with pytest.warns(results.ResultFileWarning, match=said):
        got = results.findings([mine, shipped])
    (one,) = got
    assert [(run.run, run.effect.value) for run in one.runs] == [(0, 0.96), (1, 0.99)]
    assert one.effect.value == pytest.approx((0.96 + 0.99) / 2)
    assert results.load_measurements([tmp_path / "nowhere"]) == []


def test_what_a_run_remembers_beside_its_result_files_is_none(folder):
    path = results.record("V4", **good())
    (folder / "runs" / "answer").mkdir(parents=True)
    (folder / "runs" / "answer" / "1.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(results.load_measurements([folder])) == 1 and path.is_file()


def test_the_notebook_counts_by_what_it_computes(tmp_path, monkeypatch):
    def notebook(*cells):
        made = [
            {"cell_type": "code", "source": source, "metadata": {"tags": list(marks)}}
            for source, *marks in cells
        ]
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        (tmp_path / "notebooks" / "nb.ipynb").write_text(json.dumps({"cells": made}))
        return results.notebook_sha256("nb")

    monkeypatch.setattr(files, "repo_root", lambda: tmp_path)
    before = notebook(["n = 1", "parameters"], ["x = 2"])
    same = [["n = 9", "parameters"], ["plot()", "hide-input"], ["%pip", "setup"], ["x = 2  # two\n\n"]]
    same += [["x = 5", "exercise", "solution"]]
    assert notebook(*same) == before and notebook(["x = 3"]) != before
    assert notebook(["x = 2", "world-only"], ["y = x"]) == notebook(["x = 2\ny = x"]) != before
    assert results.notebook_sha256("gone") is None


# ------------------------------------------------------------------ all runs


def test_runs_of_a_claim_are_put_together_with_their_controls(tmp_path):
    for run, value in enumerate((0.9, 0.5, 0.7)):
        control = ("chance", Estimate(value / 10, value / 10, value / 10, 108))
        results.record("V4", **good(value, value, value, control=control, run=run, folder=tmp_path))
    (one,) = results.findings([tmp_path])
    half = 4.303 * 0.2 / math.sqrt(3) * 2.920 / 4.303  # Student's t at 95 % of 2 degrees of freedom
    assert (one.effect.value, one.effect.low) == pytest.approx((0.7, 0.7 - half), abs=1e-3)
    assert one.effect.high == 1.0 and one.n == 108  # no share lies above 1
    assert (one.control.value, one.control.name) == (pytest.approx(0.07), "chance")
    assert (one.diff.value, one.diff.low) == pytest.approx((0.63, 0.63 - 0.9 * half), abs=1e-3)
    results.record("V4", **good(0.5, 0.4, 0.6, control=None, run=1, folder=tmp_path))
    (one,) = results.findings([tmp_path])  # of two runs only, it can't be compared with all three
    assert (one.control, one.diff) == (None, None) and len(one.estimates("control")) == 2


def test_a_run_without_a_value_stays_and_says_why(tmp_path):
    results.record("V4", **good(run=0, folder=tmp_path))
    results.record("V4", None, model="organism/sft", run=1, note="nothing is refused", folder=tmp_path)
    (one,) = results.findings([tmp_path])
    assert one.effect.value == 0.97 and [run.effect is None for run in one.runs] == [False, True]
    (row,) = (row for row in results.scorecard([tmp_path]) if row["id"] == "V4")
    assert (row["word"], row["reason"]) == ("unclear", "run 1: nothing is refused")
    assert row["runs"] == {"0": [0.97, 0.94, 0.99]} and row["control_value"] == 0.0
    results.record("V4", None, model="organism/sft", run=0, note="nor here", folder=tmp_path)
    (row,) = (row for row in results.scorecard([tmp_path]) if row["id"] == "V4")
    assert (row["value"], row["reason"], row["runs"]) == (None, "run 0 and 1 more: nor here", {})
    results.record("V4", **good(run=1, folder=tmp_path))  # now the first one has none
    (one,) = results.findings([tmp_path])
    assert (one.effect.value, one.control.name) == (0.97, NULL[0])


def register(monkeypatch, claim="V4", **runs) -> dict[str, set[str]]:
    """Registers runs, and what decides the claim as it stands today; returns what a test may change of it."""
    known = load_claims()[claim]
    fixed = {claim: {known.registered_sha256}, known.notebook: {results.notebook_sha256(known.notebook)}}
    runs = Runs(**runs)
    roles = {run: role for role in ("exploratory", "confirmatory") for run in getattr(runs, role)}
    monkeypatch.setattr(results, "registered_runs", lambda: roles)
    monkeypatch.setattr(results, "read_runs", lambda: runs)
    monkeypatch.setattr(results, "registration", lambda: fixed)
    return fixed


def test_nobody_looks_at_fresh_runs_before_all_are_in(tmp_path, monkeypatch):
    """Their values show nowhere, and the word is that of exploratory runs; unless the register is closed."""
    runs = {"exploratory": (0,), "confirmatory": (100, 101, 102), "stop": "after 102"}
    register(monkeypatch, **runs)

    def row(**which):
        return next(row for row in results.scorecard([tmp_path], **which) if row["id"] == "V4")

    for run, value in {0: 0.9, 100: 0.3, 101: 0.4}.items():
        results.record("V4", **good(value, value, value, run=run, folder=tmp_path))
    assert (row()["role_of_runs"], row()["value"]) == ("exploratory", 0.9)
    fresh = row(role="confirmatory")
    assert fresh["reason"] == "run 100 and 1 more: not shown before all runs are in (2 of 3)"
    assert (fresh["word"], fresh["value"], fresh["runs"]) == ("unclear", None, {})
    register(monkeypatch, **runs, closed=True)
    assert (row()["role_of_runs"], row()["value"]) == ("confirmatory", pytest.approx(0.35))
    register(monkeypatch, **runs)
    results.record("V4", **good(0.5, 0.5, 0.5, run=102, folder=tmp_path))
    assert (row()["role_of_runs"], row()["value"]) == ("confirmatory", pytest.approx(0.4))
    assert row(role="exploratory")["value"] == 0.9


@pytest.mark.parametrize("changed", ["V4", "00_model_organism"])
def test_a_fresh_run_counts_only_as_it_was_registered(tmp_path, monkeypatch, changed):
    fixed = register(monkeypatch, exploratory=(0,), confirmatory=(100,), stop="after 100")
    for run in (0, 100):
        results.record("V4", **good(run=run, folder=tmp_path))
    assert {one.run for one in results.load_measurements([tmp_path])} == {0, 100}
    now, fixed[changed] = fixed[changed], {"of that day"}
    with pytest.warns(results.ResultFileWarning, match=f"{changed} is not as it was registered; log why"):
        assert {one.run for one in results.load_measurements([tmp_path])} == {0}
    fixed[changed] |= now  # a logged deviation
    assert {one.run for one in results.load_measurements([tmp_path])} == {0, 100}


def test_a_result_of_the_registered_notebook_stays_when_its_cells_are_rewritten(tmp_path, monkeypatch):
    fixed = register(monkeypatch, exploratory=(0,))
    results.record("V4", **good(folder=tmp_path))
    monkeypatch.setattr(results, "notebook_sha256", lambda name: "of today")
    assert len(results.load_measurements([tmp_path])) == 1
    fixed.clear()
    with pytest.warns(results.ResultFileWarning, match="another version of 00_model_organism"):
        assert results.load_measurements([tmp_path]) == []


def test_roles_are_never_pooled(tmp_path, monkeypatch):
    register(monkeypatch, exploratory=(0, 1), confirmatory=(100,), stop="after 100")
    for run, value in {0: 0.9, 1: 0.8, 100: 0.5}.items():
        results.record("V4", **good(value, value, value, run=run, folder=tmp_path))
    results.record("V4", **good(0.1, 0.1, 0.1, model="owner/model", folder=tmp_path))

    def of(**which):
        found = results.findings([tmp_path], **which)
        return {one.model: (one.role, [run.run for run in one.runs]) for one in found}

    real = {"owner/model": ("real", [0])}
    assert of() == of(role="confirmatory") == {"organism/sft": ("confirmatory", [100]), **real}
    assert of(role="exploratory") == {"organism/sft": ("exploratory", [0, 1]), **real}
    rows = results.scorecard([tmp_path], role="exploratory", model="organism/sft")
    (row,) = (row for row in rows if row["id"] == "V4")
    assert (row["role_of_runs"], [*row["runs"]]) == ("exploratory", ["0", "1"])
    (tmp_path / "organism--sft" / "run-100" / "V4.json").unlink()
    assert of()["organism/sft"] == ("exploratory", [0, 1])


# ------------------------------------------------------------------ the scorecard


def test_unmeasured_claims_read_not_testable(tmp_path):
    rows = results.scorecard([tmp_path])
    assert [row["id"] for row in rows] == list(load_claims())
    assert {(row["word"], row["reason"]) for row in rows} == {("not testable", "not measured")}
    assert all(row["value"] is None and row["runs"] == {} for row in rows)
    assert all(row["control"] or row["parts"] for row in rows)


def test_one_row_per_model_with_its_own_word(tmp_path):
    results.record("V4", **good(folder=tmp_path))
    results.record("V4", **good(0.1, 0.0, 0.2, folder=tmp_path, model="organism/base"))
    rows = [row for row in results.scorecard([tmp_path]) if row["id"] == "V4"]
    assert [(row["model"], row["word"]) for row in rows] == [
        ("organism/base", "fail"), ("organism/sft", "bounds met (tuned)")]  # fmt: skip
    needed = "id source statement word reason value ci_low ci_high n control notebook model runs"
    assert set(needed.split()) <= rows[1].keys()
    assert (rows[1]["value"], rows[1]["ci_low"], rows[1]["ci_high"]) == (0.97, 0.94, 0.99)
    assert (rows[1]["control"], rows[1]["control_high"]) == ("without prefill", 0.02)
    assert rows[1]["runs"] == {"0": [0.97, 0.94, 0.99]}
    only = [row for row in results.scorecard([tmp_path], model="organism/sft") if row["id"] == "V4"]
    assert [row["model"] for row in only] == ["organism/sft"]


def test_the_answer_of_a_notebook_has_the_words_of_its_claims(tmp_path):
    said = load_claims()["V4"].short
    for run in (0, 1):
        results.record("V4", **good(folder=tmp_path, run=run))
    results.record("V4", **good(0.1, 0.0, 0.2, folder=tmp_path, model="owner/model"))
    runs = "**2 training runs of the organism say:** "
    told = f"{said} (V4: 0.97 [0.91, 1])"
    assert results.answer("00_model_organism", [tmp_path]) == f"{runs}*bounds met (tuned)* – {told}."
    assert "*fail* – " in results.answer("00_model_organism", [tmp_path], model="owner/model")
    assert "no claim" in results.answer("05_neurons", [tmp_path]).lower()
    assert results.answer("18_your_own_model", [tmp_path]) == ""  # no claim is its own


def test_a_result_names_the_notebook_that_measured_it(folder):
    results.record("V4", **good(notebook="18_your_own_model"))
    (got,) = results.load_measurements([folder])
    assert got.notebook == "18_your_own_model"
    assert got.provenance["sha256"]["notebook"] == results.notebook_sha256("18_your_own_model")


def test_command_line_writes_the_same_rows_and_a_summary(tmp_path, capsys):
    results.record("V4", **good(folder=tmp_path / "results"))
    (tmp_path / "results" / "broken.json").write_text("{")
    output = tmp_path / "build" / "scorecard.json"
    assert scorecard.main([str(tmp_path / "results"), "--output", str(output)]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", results.ResultFileWarning)
        assert json.loads(output.read_text()) == results.scorecard([tmp_path / "results"])
    printed = capsys.readouterr()
    assert re.search(r"bounds met \(tuned\)\s+1\s+V4", printed.out) and "scorecard.json" in printed.out
    assert "broken.json" in printed.err
    with pytest.raises(SystemExit):
        scorecard.main([str(tmp_path / "nowhere")])
    assert "no such folder" in capsys.readouterr().err


def test_a_quick_run_counts_only_where_there_is_no_other(tmp_path):
    mine, shipped = tmp_path / "mine", tmp_path / "shipped"
    quick = {"params": {"quick": True}}
    results.record("V4", Estimate(0.2, 0.1, 0.3, 12), model="organism/sft", run=0, folder=mine, **quick)
    (alone,) = results.findings([mine])
    assert alone.effect.value == 0.2
    results.record("V4", Estimate(0.9, 0.8, 1.0, 108), model="organism/sft", run=0, folder=shipped)
    (one,) = results.findings([mine, shipped])
    assert one.effect.value == 0.9 and len(one.runs) == 1
    results.record("V4", Estimate(0.3, 0.1, 0.4, 12), model="organism/sft", run=1, folder=mine, **quick)
    (one,) = results.findings([mine, shipped])
    assert one.effect.value == 0.9 and len(one.runs) == 1


# ------------------------------------------------------------------ the forest


@pytest.fixture
def forest(tmp_path):
    """Draw what is recorded of V4; the axes of its one row."""

    def draw(word="bounds met (tuned)", **options):
        figure = plots.forest([(load_claims()["V4"], *results.findings([tmp_path]), word)], **options)
        plots.plt.close(figure)
        (ax,) = figure.axes
        return ax

    return draw


def of(ax, **kind):
    """x of the lines of a kind, such as dots."""
    return [[*line.get_xdata()] for line in ax.lines if all(
        getattr(line, f"get_{name}")() == value for name, value in kind.items())]  # fmt: skip


def test_the_forest_draws_every_run_rings_one_and_says_the_word(tmp_path, forest):
    for run in (0, 1, 2):
        results.record("V4", **good(0.9 + run / 50, 0.8, 1.0, run=run, folder=tmp_path))
    ax, (found,) = forest(run=1), results.findings([tmp_path])
    blue = {"marker": "o", "markerfacecolor": plots.PALETTE["blue"]}
    assert [x for (x,) in of(ax, **blue)] == pytest.approx([0.9, 0.92, 0.94])
    assert of(ax, **blue, markeredgecolor="black") == [[0.92]]
    assert of(ax, markerfacecolor="white") == [[0.0]] * 3
    assert ax.get_title("right") == "bounds met (tuned)"
    assert of(ax, linewidth=7) == [[found.effect.low, found.effect.high]]  # over runs
    assert [load_claims()["V4"].rule.threshold] * 2 in of(ax, linestyle="--")
    assert not of(forest(run=0, own="owner/model"), markeredgecolor="black")  # no run of its own
    with pytest.raises(ValueError, match="rows is empty"):
        plots.forest([])


def test_earlier_runs_are_drawn_apart(tmp_path, forest, monkeypatch):
    register(monkeypatch, exploratory=(0, 1), confirmatory=(7, 8), stop="after 8")
    for run, value in {0: 0.5, 1: 0.6, 7: 0.9, 8: 0.8}.items():
        results.record("V4", **good(value, value, value, run=run, folder=tmp_path))
    earlier = {(f.claim, f.model): f for f in results.findings([tmp_path], role="exploratory")}
    ax = forest(earlier=earlier, run=1)
    assert of(ax, marker="D") == [[0.5], [0.6]] and of(ax, marker="D", markeredgecolor="black") == [[0.6]]
    assert of(ax, marker="o", markerfacecolor=plots.PALETTE["blue"]) == [[0.9], [0.8]]
    (found,) = results.findings([tmp_path], role="confirmatory")
    assert of(ax, linewidth=7) == [[found.effect.low, found.effect.high]]  # they don't count
    register(monkeypatch, exploratory=(0, 1))
    assert not of(forest(earlier=earlier), marker="D")  # they are what is shown


def test_the_forest_names_other_models_and_leaves_out_runs_without_a_value(tmp_path, forest):
    results.record("V4", **good(model="owner/model", folder=tmp_path))
    assert forest(own="owner/model", run=0).get_title("left").startswith("V4: refusal")
    assert forest(own="organism/sft").get_title("left").startswith("V4 on owner/model: refusal")
    results.record("V4", None, note="nothing is refused", model="owner/model", folder=tmp_path)
    ax = forest("not testable")
    assert not of(ax, marker="o") and ax.get_title("right") == "not testable"


def test_claims_of_several_parts_are_told_apart_by_model():
    rows = [(load_claims()["C3"], model, "partial") for model in ("organism/dpo", "owner/model")]
    figure = plots.forest(rows)
    plots.plt.close(figure)
    assert [ax.get_title("left") for ax in figure.axes] == [
        "C3: a sparse gate in the last layer decides", "C3 on owner/model",
    ]  # fmt: skip
    assert [ax.get_title("right") for ax in figure.axes] == ["partial"] * 2
