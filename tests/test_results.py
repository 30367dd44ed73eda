"""Verdicts by hand and by property; result files there and back; the registry; the scorecard."""

import dataclasses
import json
import math
import re
import warnings

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import scorecard
from harmlens.evidence import plots, results, stats
from harmlens.evidence.results import Claim, Control, Finding, Measurement, Rule, Span
from harmlens.evidence.stats import Estimate
from harmlens.keep import files

SUPPORT = {"replicated": 2, "direction only": 1, "undecided": 0, "not replicated": 0}


def a_claim(direction="greater", threshold=0.5, no_effect=None, margin=0.0, share=0.66) -> Claim:
    rule = Rule(threshold, threshold if no_effect is None else no_effect, margin, share)
    return Claim("T1", "harmlens", "source", "statement", "none", direction, "statistic", "share", "item",
                 "control", rule, "01_what_there_is_to_explain")  # fmt: skip


def found(value, low, high, control=(0.0, 0.0, 0.0), runs=None) -> Finding:
    """A claim's recorded runs put together; ``runs``: the value of each, three alike by default."""
    null = None if control is None else Control(*control, name="random")
    made = [
        Measurement("T1", "organism/sft", run, "exploratory", "nb", Span(v, v, v), null, None, 30, "item")
        for run, v in enumerate([value] * 3 if runs is None else runs)
    ]
    return Finding("T1", "organism/sft", value, (low, high), null, tuple(made))


# ------------------------------------------------------------------ verdicts


@pytest.mark.parametrize(
    ("claim", "finding", "expected"),
    [
        (a_claim(), None, "not attempted"),
        (a_claim(), found(0.8, 0.7, 0.9), "replicated"),
        (a_claim(), found(0.6, 0.4, 0.8), "direction only"),  # the interval holds the threshold
        (a_claim(), found(0.4, 0.2, 0.6), "undecided"),
        (a_claim(), found(0.3, 0.2, 0.4), "not replicated"),
        (a_claim(), found(0.4, 0.3, 0.5), "not replicated"),  # nothing in it is greater than 0.5
        (a_claim(), found(0.8, 0.5, 0.9), "direction only"),  # touching is not beyond
        # control
        (a_claim(), found(0.8, 0.7, 0.9, control=(0.7, 0.6, 0.75)), "direction only"),
        (a_claim(margin=0.2), found(0.8, 0.7, 0.9, control=(0.5, 0.5, 0.55)), "direction only"),
        (a_claim(margin=0.1), found(0.8, 0.7, 0.9, control=(0.5, 0.5, 0.55)), "replicated"),
        (a_claim(), found(0.8, 0.7, 0.9, control=None), "direction only"),
        (a_claim(margin=None), found(0.8, 0.7, 0.9, control=None), "replicated"),
        (a_claim(margin=None), found(0.8, 0.7, 0.9, control=(2.0, 1.0, 3.0)), "replicated"),
        # runs
        (a_claim(), found(0.8, 0.7, 0.9, runs=[0.9, 0.9, 0.1]), "replicated"),
        (a_claim(), found(0.8, 0.7, 0.9, runs=[0.9, 0.2, 0.1]), "direction only"),
        (a_claim(share=1.0), found(0.8, 0.7, 0.9, runs=[0.9, 0.9, 0.5]), "direction only"),
        (a_claim(), found(0.8, 0.7, 0.9, runs=[0.8]), "replicated"),
        # a clear effect, but smaller than the threshold asks for
        (a_claim(no_effect=0.0), found(0.3, 0.2, 0.4), "direction only"),
        (a_claim(no_effect=0.0), found(0.0, -0.1, 0.1), "not replicated"),
        (a_claim(no_effect=0.0), found(0.2, -0.3, 0.7), "undecided"),
        (a_claim(no_effect=0.0), found(-0.3, -0.4, -0.2), "not replicated"),
        (a_claim(no_effect=0.0), found(0.8, 0.7, 0.9, runs=[0.9, 0.3, 0.2]), "replicated"),
        # the other direction: a loss below 0.05, far below the control's
        (a_claim("less", 0.05), found(0.01, 0.0, 0.03, control=(0.4, 0.3, 0.5)), "replicated"),
        (a_claim("less", 0.05), found(0.01, 0.0, 0.03, control=(0.1, 0.02, 0.2)), "direction only"),
        (a_claim("less", 0.05, margin=None), found(0.2, 0.1, 0.3), "not replicated"),
    ],
)
def test_verdict_by_hand(claim, finding, expected):
    assert results.verdict(claim, finding)[0] == expected


number = st.floats(-2, 2, allow_nan=False).map(lambda x: round(x, 3))
extra = st.floats(0, 2, allow_nan=False).map(lambda x: round(x, 3))


# Plain numbers only: the records are built in the tests, since their type checks draw random numbers.
case_numbers = st.fixed_dictionaries({
    "direction": st.sampled_from(["greater", "less"]),
    "threshold": number, "gap": extra, "margin": st.none() | extra, "share": st.sampled_from([0.5, 1.0]),
    "value": number, "down": extra, "up": extra,
    "control": st.none() | st.tuples(number, extra, extra),
    "runs": st.lists(number, min_size=1, max_size=4),
})  # fmt: skip


def build(case) -> tuple[Claim, Finding]:
    gap = case["gap"] if case["direction"] == "less" else -case["gap"]
    threshold, value = case["threshold"], case["value"]
    claim = a_claim(case["direction"], threshold, threshold + gap, case["margin"], case["share"])
    control = case["control"]
    if control is not None:
        control = (control[0], control[0] - control[1], control[0] + control[2])
    return claim, found(value, value - case["down"], value + case["up"], control, case["runs"])


@settings(deadline=None)
@given(case_numbers, extra, extra)
def test_a_wider_interval_never_adds_support(case, down, up):
    claim, narrow = build(case)
    wide = dataclasses.replace(narrow, ci=(narrow.ci[0] - down, narrow.ci[1] + up))
    assert SUPPORT[results.verdict(claim, wide)[0]] <= SUPPORT[results.verdict(claim, narrow)[0]]
    if claim.rule.no_effect == claim.rule.threshold and results.verdict(claim, narrow)[0] != "not replicated":
        assert results.verdict(claim, wide)[0] != "not replicated"


@settings(deadline=None)
@given(case_numbers, extra, extra)
def test_a_wider_control_never_adds_support(case, down, up):
    claim, before = build(case)
    if before.control is None:
        return
    null = before.control
    after = dataclasses.replace(
        before, control=Control(null.value, null.low - down, null.high + up, name="x")
    )
    assert SUPPORT[results.verdict(claim, after)[0]] <= SUPPORT[results.verdict(claim, before)[0]]


@settings(deadline=None)
@given(case_numbers)
def test_mirrored_claims_get_the_same_verdict(case):
    claim, one = build(case)
    rule = dataclasses.replace(claim.rule, threshold=-claim.rule.threshold, no_effect=-claim.rule.no_effect)
    other = "less" if claim.direction == "greater" else "greater"
    null = one.control and (-one.control.value, -one.control.high, -one.control.low)
    mirror = found(-one.value, -one.ci[1], -one.ci[0], null, [-value for value in case["runs"]])
    mirrored_claim = dataclasses.replace(claim, direction=other, rule=rule)
    assert results.verdict(mirrored_claim, mirror)[0] == results.verdict(claim, one)[0]


@settings(deadline=None)
@given(case_numbers)
def test_opposite_claims_are_never_both_replicated(case):
    claim, one = build(case)
    opposite = dataclasses.replace(
        claim, direction="less" if claim.direction == "greater" else "greater",
        rule=dataclasses.replace(claim.rule, no_effect=claim.rule.threshold),
    )  # fmt: skip
    assert [results.verdict(c, one)[0] for c in (claim, opposite)] != ["replicated", "replicated"]


def test_the_reason_names_what_failed():
    text = results.verdict(a_claim(), found(0.8, 0.4, 0.9, control=None, runs=[0.9, 0.1, 0.2]))[1]
    assert "interval" in text and "no control" in text and "1 of 3 runs" in text


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
        (good(n=0), "n: Input should be greater than or equal to 1"),
        (good(run=-1), "run: Input should be greater than or equal to 0"),
        (good(control=("", Estimate(0.0, 0.0, 0.0, 3))), "control.name: must be text"),
        (good(control=("random", Estimate(math.nan, 0.0, 0.0, 3))), "control.value: must be finite"),
        (good(control=("random", Estimate(0.5, 0.6, 0.7, 3))), "control: must be"),
        (good(wall_s=math.nan), "not JSON compliant"),
        (good(model="///"), "model: .* gives no usable folder name"),
    ],
)
def test_bad_measurements_are_refused_by_name_and_leave_no_file(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        results.record("V4", **changes)
    assert not list(folder.rglob("*")) if folder.exists() else True


def test_an_unknown_claim_is_refused_with_the_known_ones(folder):
    with pytest.raises(ValueError, match=r"'C99' is not in claims.yaml; known are C1, "):
        results.record("C99", **good())


def test_provenance_says_where_the_number_comes_from(folder):
    content = json.loads(results.record("V4", **good(wall_s=1.5, revision="main")).read_text())
    block = content["provenance"]
    assert block["wall_s"] == 1.5 and block["seeds"] == [0] and block["model"]["revision"] == "main"
    assert {"created_utc", "git_commit", "dirty", "lib_version", "python", "packages", "device", "dtype",
            "dataset", "params", "peak_gb"} <= block.keys()  # fmt: skip
    assert content["schema"] == results.SCHEMA and block["packages"]["numpy"] == np.__version__
    assert block["sha256"].keys() == {"claim", "notebook", "library"} and all(block["sha256"].values())


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
    "other": (lambda content: "[1, 2]", "is not a result file of schema 2"),
    "first edition": (changed(schema=1), "is not a result file of schema 2"),
    "by hand": (lambda content: json.dumps(content | {"n": 1080}), "was changed after it was written"),
    "nan": (changed(effect={"value": math.nan, "low": 0.0, "high": 0.0}), "effect.value: must be finite"),
    "lacking": (changed(n=None), "n: Input should be a valid integer"),
    "control": (changed(control="none"), "control: "),
    "stranger": (changed(claim="C99"), "'C99' is not in claims.yaml"),
    "wording": (changed(**made_by("claim")), "was measured under another wording of V5"),
    "notebook": (changed(**made_by("notebook")), "was measured by another version of 01_what_there"),
    "run": (changed(run=99), "run 99 is not registered in runs.yaml"),
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
    assert one.value == pytest.approx((0.96 + 0.99) / 2)
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
    assert notebook(*same) == before and notebook(["x = 3"]) != before
    assert results.notebook_sha256("gone") is None


def test_runs_of_a_claim_are_put_together_with_their_controls(tmp_path):
    for run, value in enumerate((0.9, 0.5, 0.7)):
        control = ("chance", Estimate(value / 10, 0.0, 0.1, 108))
        results.record("V4", **good(value, value, value, control=control, run=run, folder=tmp_path))
    (one,) = results.findings([tmp_path])
    assert one.value == pytest.approx(0.7) and one.control.value == pytest.approx(0.07)
    assert 0.5 <= one.ci[0] < 0.7 < one.ci[1] <= 0.9 and one.n == 108
    results.record("V4", **good(0.5, 0.4, 0.6, control=None, run=1, folder=tmp_path))
    (one,) = results.findings([tmp_path])  # of two runs only, it can't be compared with all three
    assert one.control is None


def test_the_registered_runs_have_their_role(tmp_path):
    (tmp_path / "runs.yaml").write_text("exploratory: [0, 1]\nconfirmatory: [100]\n")
    assert results.registered_runs(tmp_path / "runs.yaml") == {
        0: "exploratory",
        1: "exploratory",
        100: "confirmatory",
    }
    assert {0, 1, 2} <= results.registered_runs().keys()


# ------------------------------------------------------------------ the registry


def test_every_claim_of_both_papers_is_registered():
    known = results.load_claims()
    stems = {re.match(r"[A-Z]\d+", name)[0] for name in known}
    assert {f"C{i}" for i in range(1, 5)} | {f"R{i}" for i in range(1, 12)} <= stems
    papers = {"C": "mediation", "R": "pruning", "V": "harmlens"}
    assert all(claim.paper == papers[claim.id[0]] for claim in known.values())


def test_what_is_not_tested_has_a_reason():
    content = yaml.safe_load((files.data_dir() / "claims.yaml").read_text(encoding="utf-8"))
    assert all(entry["statement"] and entry["reason"] for entry in content["not_tested"])


def test_notebooks_are_named_by_number():
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+", claim.notebook) for claim in results.load_claims().values())


def test_sources_name_their_mark():
    marks = ("[abstract]", "[paper]", "[code]", "[third party]", "[ours]")
    for claim in results.load_claims().values():
        assert any(mark in claim.source for mark in marks), claim.id
        if claim.paper != "harmlens":
            assert re.search(r"arXiv 2604\.(11663|09544)", claim.source), claim.id


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "up"}, r"\(T1\): direction: Input should be 'greater' or 'less', got 'up'"),
        ({"paper": "other"}, r"\(T1\): paper: Input should be 'mediation', "),
        ({"statement": ""}, r"\(T1\): statement: must be text that is not empty"),
        ({"id": "T/1"}, r"id: String should match pattern"),
        ({"extra": 1}, "extra: is no known field"),
        ({"source": None}, "source: Input should be a valid string"),
        ({"rule": {"threshold": 0.0}}, "rule.margin_over_control: is missing"),
        (
            {"rule": {"threshold": "0", "margin_over_control": None, "seeds_share": 1}},
            "rule.threshold: Input should be a valid number",
        ),
        ({"rule": {"threshold": 0, "margin_over_control": None, "seeds_share": 2}}, "rule.seeds_share"),
        ({"rule": {"threshold": 0, "margin_over_control": -1, "seeds_share": 1}}, "rule.margin_over_control"),
        (
            {"rule": {"threshold": 0, "no_effect": 1, "margin_over_control": 0, "seeds_share": 1}},
            "rule.no_effect",
        ),
    ],
)
def test_a_bad_registry_names_claim_and_field(tmp_path, changes, message):
    entry = {item.name: getattr(a_claim(), item.name) for item in dataclasses.fields(Claim)}
    entry |= {"rule": {"threshold": 0.0, "margin_over_control": 0.0, "seeds_share": 0.66}} | changes
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"claims": [entry]}))
    with pytest.raises(ValueError, match=message):
        results.load_claims(path)


def test_ids_occur_once_and_no_field_lacks(tmp_path):
    entry = {item.name: getattr(a_claim(), item.name) for item in dataclasses.fields(Claim)}
    entry["rule"] = {"threshold": 0.0, "margin_over_control": 0.0, "seeds_share": 0.66}
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"claims": [entry, entry]}))
    with pytest.raises(ValueError, match="'T1' occurs twice"):
        results.load_claims(path)
    del entry["control"]
    path.write_text(yaml.safe_dump({"claims": [entry]}))
    with pytest.raises(ValueError, match=r"claim 1 \(T1\): control: is missing"):
        results.load_claims(path)


# ------------------------------------------------------------------ the scorecard


def test_unmeasured_claims_read_not_attempted(tmp_path):
    rows = results.scorecard([tmp_path])
    assert [row["id"] for row in rows] == list(results.load_claims())
    assert {row["verdict"] for row in rows} == {"not attempted"}
    assert all(row["value"] is None and row["runs"] == {} and row["control"] for row in rows)


def test_one_row_per_model_with_its_own_verdict(tmp_path):
    results.record("V4", **good(folder=tmp_path))
    results.record("V4", **good(0.1, 0.0, 0.2, folder=tmp_path, model="organism/base", control=None))
    rows = [row for row in results.scorecard([tmp_path]) if row["id"] == "V4"]
    assert [(row["model"], row["verdict"]) for row in rows] == [
        ("organism/base", "not replicated"), ("organism/sft", "replicated")]  # fmt: skip
    needed = "id source statement verdict value ci_low ci_high n control notebook model runs"
    assert set(needed.split()) <= rows[1].keys()
    assert (rows[1]["value"], rows[1]["ci_low"], rows[1]["ci_high"]) == (0.97, 0.94, 0.99)
    assert (rows[1]["control"], rows[1]["control_high"]) == ("without prefill", 0.02)
    assert rows[1]["runs"] == {"0": [0.97, 0.94, 0.99]}
    only = [row for row in results.scorecard([tmp_path], model="organism/sft") if row["id"] == "V4"]
    assert [row["model"] for row in only] == ["organism/sft"]


def test_the_answer_of_a_notebook_has_the_words_of_its_claims(tmp_path):
    said = results.load_claims()["V4"]
    said = said.short or said.statement.rstrip(".")
    for run in (0, 1):
        results.record("V4", **good(folder=tmp_path, run=run))
    results.record("V4", **good(0.1, 0.0, 0.2, folder=tmp_path, model="owner/model", control=None))
    runs = "**2 training runs of the organism say:** "
    assert results.answer("00_model_organism", [tmp_path]) == f"{runs}*replicated* – {said}."
    assert "*not replicated*" in results.answer("00_model_organism", [tmp_path], model="owner/model")
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
    assert re.search(r"replicated\s+1\s+V4", printed.out) and "scorecard.json" in printed.out
    assert "broken.json" in printed.err
    with pytest.raises(SystemExit):
        scorecard.main([str(tmp_path / "nowhere")])
    assert "no such folder" in capsys.readouterr().err


def test_the_forest_draws_every_run_rings_one_and_says_the_word(tmp_path):
    for run in (0, 1, 2):
        results.record("V4", **good(0.9 + run / 50, 0.8, 1.0, run=run, folder=tmp_path))
    (one,) = results.findings([tmp_path])
    figure = plots.forest([(results.load_claims()["V4"], one, "replicated")], run=1)
    (ax,) = figure.axes
    dots = [line for line in ax.lines if line.get_marker() == "o" and line.get_markerfacecolor() != "white"]
    assert [line.get_xdata()[0] for line in dots] == pytest.approx([0.9, 0.92, 0.94])
    assert [line.get_markeredgecolor() == "black" for line in dots] == [False, True, False]
    hollow = [line.get_xdata()[0] for line in ax.lines if line.get_markerfacecolor() == "white"]
    assert hollow == [0.0] * 3 and [text.get_text() for text in ax.texts] == ["replicated"]
    threshold = results.load_claims()["V4"].rule.threshold
    assert any(line.get_linestyle() == "--" and line.get_xdata()[0] == threshold for line in ax.lines)
    plots.plt.close(figure)
    figure = plots.forest([(results.load_claims()["V4"], one, "replicated")], run=0, own="owner/model")
    assert not any(
        line.get_markeredgecolor() == "black" for line in figure.axes[0].lines
    )  # no run of its own
    plots.plt.close(figure)
    with pytest.raises(ValueError, match="rows is empty"):
        plots.forest([])


def test_a_quick_run_counts_only_where_there_is_no_other(tmp_path):
    mine, shipped = tmp_path / "mine", tmp_path / "shipped"
    quick = {"params": {"quick": True}}
    results.record("V4", Estimate(0.2, 0.1, 0.3, 12), model="organism/sft", run=0, folder=mine, **quick)
    (alone,) = results.findings([mine])
    assert alone.value == 0.2
    results.record("V4", Estimate(0.9, 0.8, 1.0, 108), model="organism/sft", run=0, folder=shipped)
    (one,) = results.findings([mine, shipped])
    assert one.value == 0.9 and len(one.runs) == 1
    results.record("V4", Estimate(0.3, 0.1, 0.4, 12), model="organism/sft", run=1, folder=mine, **quick)
    (one,) = results.findings([mine, shipped])
    assert one.value == 0.9 and len(one.runs) == 1
