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
from harmlens.evidence import results
from harmlens.evidence.results import Claim, Control, Measurement, Rule
from harmlens.evidence.stats import Estimate
from harmlens.keep import files

SUPPORT = {"replicated": 2, "direction only": 1, "undecided": 0, "not replicated": 0}


def a_claim(direction="greater", threshold=0.5, no_effect=None, margin=0.0, share=0.66) -> Claim:
    rule = Rule(threshold, threshold if no_effect is None else no_effect, margin, share)
    return Claim("T1", "harmlens", "source", "statement", "none", direction, "statistic", "share", "item",
                 "control", rule, "01_what_there_is_to_explain")  # fmt: skip


def measured(value, low, high, control=(0.0, 0.0, 0.0), seeds=None) -> Measurement:
    null = None if control is None else Control("random", control[0], control[1:])
    per_seed = {i: (v, v, v) for i, v in enumerate([value] * 3 if seeds is None else seeds)}
    return Measurement("T1", "organism/sft", "nb", value, (low, high), 30, "item", null, per_seed)


# ------------------------------------------------------------------ verdicts


@pytest.mark.parametrize(
    ("claim", "measurement", "expected"),
    [
        (a_claim(), None, "not attempted"),
        (a_claim(), measured(0.8, 0.7, 0.9), "replicated"),
        (a_claim(), measured(0.6, 0.4, 0.8), "direction only"),  # the interval holds the threshold
        (a_claim(), measured(0.4, 0.2, 0.6), "undecided"),
        (a_claim(), measured(0.3, 0.2, 0.4), "not replicated"),
        (a_claim(), measured(0.4, 0.3, 0.5), "not replicated"),  # nothing in it is greater than 0.5
        (a_claim(), measured(0.8, 0.5, 0.9), "direction only"),  # touching is not beyond
        # control
        (a_claim(), measured(0.8, 0.7, 0.9, control=(0.7, 0.6, 0.75)), "direction only"),
        (a_claim(margin=0.2), measured(0.8, 0.7, 0.9, control=(0.5, 0.5, 0.55)), "direction only"),
        (a_claim(margin=0.1), measured(0.8, 0.7, 0.9, control=(0.5, 0.5, 0.55)), "replicated"),
        (a_claim(), measured(0.8, 0.7, 0.9, control=None), "direction only"),
        (a_claim(margin=None), measured(0.8, 0.7, 0.9, control=None), "replicated"),
        (a_claim(margin=None), measured(0.8, 0.7, 0.9, control=(2.0, 1.0, 3.0)), "replicated"),
        # seeds
        (a_claim(), measured(0.8, 0.7, 0.9, seeds=[0.9, 0.9, 0.1]), "replicated"),
        (a_claim(), measured(0.8, 0.7, 0.9, seeds=[0.9, 0.2, 0.1]), "direction only"),
        (a_claim(share=1.0), measured(0.8, 0.7, 0.9, seeds=[0.9, 0.9, 0.5]), "direction only"),
        (a_claim(), measured(0.8, 0.7, 0.9, seeds=[0.8]), "replicated"),
        # a clear effect, but smaller than the threshold asks for
        (a_claim(no_effect=0.0), measured(0.3, 0.2, 0.4), "direction only"),
        (a_claim(no_effect=0.0), measured(0.0, -0.1, 0.1), "not replicated"),
        (a_claim(no_effect=0.0), measured(0.2, -0.3, 0.7), "undecided"),
        (a_claim(no_effect=0.0), measured(-0.3, -0.4, -0.2), "not replicated"),
        (a_claim(no_effect=0.0), measured(0.8, 0.7, 0.9, seeds=[0.9, 0.3, 0.2]), "replicated"),
        # the other direction: a loss below 0.05, far below the control's
        (a_claim("less", 0.05), measured(0.01, 0.0, 0.03, control=(0.4, 0.3, 0.5)), "replicated"),
        (a_claim("less", 0.05), measured(0.01, 0.0, 0.03, control=(0.1, 0.02, 0.2)), "direction only"),
        (a_claim("less", 0.05, margin=None), measured(0.2, 0.1, 0.3), "not replicated"),
    ],
)
def test_verdict_by_hand(claim, measurement, expected):
    assert results.verdict(claim, measurement)[0] == expected


number = st.floats(-2, 2, allow_nan=False).map(lambda x: round(x, 3))
extra = st.floats(0, 2, allow_nan=False).map(lambda x: round(x, 3))


# Plain numbers only: the records are built in the tests, since their type checks draw random numbers.
case_numbers = st.fixed_dictionaries({
    "direction": st.sampled_from(["greater", "less"]),
    "threshold": number, "gap": extra, "margin": st.none() | extra, "share": st.sampled_from([0.5, 1.0]),
    "value": number, "down": extra, "up": extra,
    "control": st.none() | st.tuples(number, extra, extra),
    "seeds": st.lists(number, min_size=1, max_size=4),
})  # fmt: skip


def build(case) -> tuple[Claim, Measurement]:
    gap = case["gap"] if case["direction"] == "less" else -case["gap"]
    threshold, value = case["threshold"], case["value"]
    claim = a_claim(case["direction"], threshold, threshold + gap, case["margin"], case["share"])
    control = case["control"]
    if control is not None:
        control = (control[0], control[0] - control[1], control[0] + control[2])
    return claim, measured(value, value - case["down"], value + case["up"], control, case["seeds"])


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
    low, high = before.control.ci
    control = Control("random", before.control.value, (low - down, high + up))
    after = dataclasses.replace(before, control=control)
    assert SUPPORT[results.verdict(claim, after)[0]] <= SUPPORT[results.verdict(claim, before)[0]]


@settings(deadline=None)
@given(case_numbers)
def test_mirrored_claims_get_the_same_verdict(case):
    claim, m = build(case)
    rule = dataclasses.replace(claim.rule, threshold=-claim.rule.threshold, no_effect=-claim.rule.no_effect)
    other = "less" if claim.direction == "greater" else "greater"
    null = m.control and Control("random", -m.control.value, (-m.control.ci[1], -m.control.ci[0]))
    mirror = dataclasses.replace(
        m, value=-m.value, ci=(-m.ci[1], -m.ci[0]), control=null,
        per_seed={seed: tuple(-x for x in entry) for seed, entry in m.per_seed.items()},
    )  # fmt: skip
    mirrored_claim = dataclasses.replace(claim, direction=other, rule=rule)
    assert results.verdict(mirrored_claim, mirror)[0] == results.verdict(claim, m)[0]


@settings(deadline=None)
@given(case_numbers)
def test_opposite_claims_are_never_both_replicated(case):
    claim, m = build(case)
    opposite = dataclasses.replace(
        claim, direction="less" if claim.direction == "greater" else "greater",
        rule=dataclasses.replace(claim.rule, no_effect=claim.rule.threshold),
    )  # fmt: skip
    assert [results.verdict(c, m)[0] for c in (claim, opposite)] != ["replicated", "replicated"]


def test_the_reason_names_what_failed():
    text = results.verdict(a_claim(), measured(0.8, 0.4, 0.9, control=None, seeds=[0.9, 0.1, 0.2]))[1]
    assert "interval" in text and "no control" in text and "1 of 3 seeds" in text


# ------------------------------------------------------------------ result files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HARMLENS_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


def good(**changes):
    value = changes.get("value", 0.97)
    given = {
        "value": 0.97, "ci": (0.94, 0.99), "n": 108, "unit": "item", "per_seed": {0: (value, 0.9, 1.0)},
        "model": "organism/sft", "notebook": "00_model_organism",
        "control": ("without prefill", Estimate(0.0, 0.0, 0.02, 108)),
    } | changes  # fmt: skip
    n, seeds = given.pop("n"), given.pop("per_seed")
    per_seed = {seed: Estimate(*triple, n) for seed, triple in seeds.items()}
    return {"estimate": Estimate(given.pop("value"), *given.pop("ci"), n, per_seed), **given}


def test_what_is_recorded_is_what_is_loaded(folder):
    per_seed = {0: (0.96, 0.9, 0.99), 1: (0.98, 0.95, 1.0)}
    path = results.record(
        "V4", **good(per_seed=per_seed, params={"quick": False, "seeds": [0, 1]}, note="plain")
    )
    assert path == folder / "organism--sft" / "V4.json"
    (got,) = results.load_measurements([folder])
    assert (got.claim, got.value, got.ci, got.n) == ("V4", 0.97, (0.94, 0.99), 108)
    assert got.per_seed == {0: (0.96, 0.9, 0.99), 1: (0.98, 0.95, 1.0)}
    assert got.control == Control("without prefill", 0.0, (0.0, 0.02))
    assert got.note == "plain" and got.provenance["params"] == {"quick": False, "seeds": [0, 1]}


def test_numpy_numbers_are_taken(folder):
    values = {"value": np.float32(0.5), "ci": (np.float64(0.4), np.float32(0.6)), "n": np.int64(12)}
    results.record("V4", **good(**values, per_seed={np.int64(0): (np.float32(0.5),) * 3}))
    (got,) = results.load_measurements([folder])
    assert got.value == 0.5 and got.n == 12 and got.per_seed == {0: (0.5, 0.5, 0.5)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": math.nan}, "value: must be finite. Look for an empty group"),
        ({"value": math.inf}, "value: must be finite"),
        ({"ci": (0.99, 0.94)}, "ci: must be"),
        ({"ci": (0.1, 0.2)}, "ci: must be"),
        ({"ci": (math.nan, 0.99)}, r"ci.0: must be finite"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"unit": " "}, "unit: must be text that is not empty"),
        ({"notebook": ""}, "notebook: must be text"),
        ({"per_seed": {2: (math.nan, 0.0, 1.0)}}, r"per_seed.2.0: must be finite"),
        ({"per_seed": {2: (0.5, 0.6, 0.9)}}, r"per_seed\[2\]: must be"),
        ({"control": ("", Estimate(0.0, 0.0, 0.0, 3))}, "control.name: must be text"),
        ({"control": ("random", Estimate(math.nan, 0.0, 0.0, 3))}, "control.value: must be finite"),
        ({"control": ("random", Estimate(0.5, 0.6, 0.7, 3))}, "control.ci: must be"),
        ({"wall_s": math.nan}, "not JSON compliant"),
        ({"model": "///"}, "model: .* gives no usable folder name"),
    ],
)
def test_bad_measurements_are_refused_by_name_and_leave_no_file(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        results.record("V4", **good(**changes))
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
    assert {"schema", "claim", "value", "ci_low", "ci_high", "n"} <= content.keys()
    assert block["packages"]["numpy"] == np.__version__


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
    assert path.parent.name == "checkpoint"


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


def test_broken_files_are_named_and_the_others_load(folder):
    results.record("V4", **good())
    results.record("V5", **good())
    content = json.loads((folder / "organism--sft" / "V5.json").read_text())
    broken = {
        "cut.json": json.dumps(content)[:50],
        "nan.json": json.dumps(content | {"value": math.nan}),
        "lacking.json": json.dumps({key: item for key, item in content.items() if key != "n"}),
        "stranger.json": json.dumps(content | {"claim": "C99"}),
        "other.json": "[1, 2]",
        "schema.json": json.dumps(content | {"schema": 99}),
        "control.json": json.dumps(content | {"control": "none"}),
    }
    for name, text in broken.items():
        (folder / name).write_text(text)
    with pytest.warns(results.ResultFileWarning) as caught:
        got = results.load_measurements([folder])
    assert {item.claim for item in got} == {"V4", "V5"}
    messages = [str(item.message) for item in caught]
    assert len(messages) == len(broken)
    for name in broken:
        assert any(name in message and "Run its notebook again" in message for message in messages)


def test_earlier_folder_wins_and_within_a_folder_the_newer_file(tmp_path):
    mine, shipped = tmp_path / "mine", tmp_path / "shipped"
    results.record("V4", **good(folder=mine / "a", value=0.95))
    results.record("V4", **good(folder=mine / "0-newer", value=0.96))
    results.record("V4", **good(folder=shipped, value=0.98))
    results.record("V5", **good(folder=shipped))
    got = {item.claim: item.value for item in results.load_measurements([mine, shipped])}
    assert got == {"V4": 0.96, "V5": 0.97}
    assert results.load_measurements([tmp_path / "nowhere"]) == []


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
    assert all(row["value"] is None and row["seeds"] == [] and row["control"] for row in rows)


def test_one_row_per_model_with_its_own_verdict(tmp_path):
    results.record("V4", **good(folder=tmp_path))
    results.record(
        "V4",
        **good(
            folder=tmp_path,
            model="organism/base",
            value=0.1,
            ci=(0.0, 0.2),
            control=None,
            per_seed={0: (0.1, 0.0, 0.2)},
        ),
    )
    rows = [row for row in results.scorecard([tmp_path]) if row["id"] == "V4"]
    assert [(row["model"], row["verdict"]) for row in rows] == [
        ("organism/base", "not replicated"), ("organism/sft", "replicated")]  # fmt: skip
    needed = "id source statement verdict value ci_low ci_high n control notebook model seeds"
    assert set(needed.split()) <= rows[1].keys()
    assert (rows[1]["value"], rows[1]["ci_low"], rows[1]["ci_high"]) == (0.97, 0.94, 0.99)
    assert (rows[1]["control"], rows[1]["control_high"], rows[1]["seeds"]) == ("without prefill", 0.02, [0])
    only = [row for row in results.scorecard([tmp_path], model="organism/sft") if row["id"] == "V4"]
    assert [row["model"] for row in only] == ["organism/sft"]


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
