"""The registry: every claim can come out both ways, and a bad one is named when it is read."""

import math
import re

import pytest
import yaml

from harmlens.evidence import claims, results, words
from harmlens.evidence.claims import Claim
from harmlens.keep import files

KNOWN = claims.load_claims()
RULED = [name for name, claim in KNOWN.items() if claim.rule]
TOGETHER = [name for name, claim in KNOWN.items() if claim.parts]
PASSED = {"check": ("pass", "bounds met (tuned)")}


def at_its(end: str, claim: Claim) -> claims.Finding:
    """Three runs that came out at the "best" or "worst" end of what is attainable; requirements are met."""
    low, high = (min(max(edge, -100.0), 100.0) for edge in claim.attainable)
    value = high if (end == "best") == (claim.sign > 0) else low
    null = claim.rule.no_effect if claim.rule else 0.0
    spans = {name: dict.fromkeys(("value", "low", "high"), at) for name, at in
             {"effect": value, "control": null, "diff": value - null}.items()}  # fmt: skip
    spans["control"]["name"] = claim.control
    content = {
        "claim": claim.id, "model": "organism/sft", "role": "exploratory", "notebook": claim.notebook,
        "n": 30, "unit": claim.unit, **spans,
        "values": {name: at for name, compared, at in claim.conditions if compared},
    }  # fmt: skip
    return results.put_together(claim, [claims.measured(content | {"run": run}, KNOWN) for run in range(3)])


@pytest.mark.parametrize("name", RULED)
def test_no_row_can_come_out_one_way_only(name):
    claim, met = KNOWN[name], dict.fromkeys(KNOWN, "supported")
    assert words.word(claim, at_its("best", claim), met)[0] == "supported"
    assert words.word(claim, at_its("worst", claim), met)[0] == "contradicted"


def test_all_claims_together_come_out_both_ways():
    measured = [claim for claim in KNOWN.values() if not claim.parts]
    said = words.all_words(at_its("best", claim) for claim in measured)
    assert {name for name, _ in said} == KNOWN.keys()
    for (name, _), (word, _) in said.items():
        claim = KNOWN[name]
        assert word in (("table",) if claim.kind == "table" else PASSED.get(claim.role, ("supported",))), name
    for name in TOGETHER:
        for part in KNOWN[name].parts:
            said = words.all_words(at_its("worst" if c.id == part else "best", c) for c in measured)
            assert said[name, "organism/sft"][0] == "contradicted"


def test_every_claim_of_both_papers_is_registered():
    stems = {re.match(r"[A-Z]\d+", name)[0] for name in KNOWN}
    assert {f"C{i}" for i in range(1, 5)} | {f"R{i}" for i in range(1, 12)} <= stems
    papers = {"C": "mediation", "R": "pruning", "V": "harmlens"}
    assert all(claim.paper == papers[claim.id[0]] for claim in KNOWN.values())
    primary = {name for name, claim in KNOWN.items() if claim.role == "primary"}
    assert {re.match(r"[A-Z]\d+", name)[0] for name in primary} == {
        *(f"C{i}" for i in range(1, 5)), *(f"R{i}" for i in range(1, 8))}  # fmt: skip
    assert len(primary) == 11 and all((c.role == "check") == (c.paper == "harmlens") for c in KNOWN.values())


def test_what_is_not_tested_and_what_was_changed_have_a_reason():
    content = yaml.safe_load((files.data_dir() / "claims.yaml").read_text(encoding="utf-8"))
    assert all(entry["statement"] and entry["reason"] for entry in content["not_tested"])
    assert {entry["claim"] for entry in content["changes"]} == KNOWN.keys()
    assert all(entry["why"] and ("rule" in entry) == ("word" in entry) for entry in content["changes"])


def test_notebooks_are_named_by_number_and_sources_by_mark():
    marks = ("[abstract]", "[paper]", "[code]", "[third party]", "[ours]")
    for claim in KNOWN.values():
        assert re.fullmatch(r"\d\d_[a-z0-9_]+", claim.notebook)
        assert any(mark in claim.source for mark in marks), claim.id
        if claim.paper != "harmlens" and "[ours]" not in claim.source:
            assert re.search(r"arXiv 2604\.(11663|09544)", claim.source), claim.id


# ------------------------------------------------------------------ bad claims

ENTRY = {
    "id": "T1", "paper": "harmlens", "role": "check", "scope": "method", "source": "[ours]",
    "statement": "statement", "short": "short", "statistic": "statistic", "scale": "share", "unit": "item",
    "control": "control", "rule": {"threshold": 0.0, "delta": 0.1}, "notebook": "01",
}  # fmt: skip
LOSS = {"kind": "equivalence", "direction": "less", "rule": {"delta": 0.05}}


def read(tmp_path, *entries):
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"claims": list(entries)}))
    return claims.load_claims(tmp_path / "claims.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "up"}, "direction: Input should be 'greater' or 'less', got 'up'"),
        ({"paper": "other"}, "paper: Input should be 'mediation', "),
        ({"statement": ""}, "statement: must be text that is not empty"),
        ({"control": " "}, "control: must be text that is not empty"),
        ({"id": "T/1"}, "id: String should match pattern"),
        ({"extra": 1}, "extra: is no known field"),
        ({"source": None}, "source: Input should be a valid string"),
        ({"rule": None}, "rule: is missing"),
        ({"rule": {"threshold": 0.0}}, "rule.delta: is missing"),
        ({"rule": {"delta": 0.1}}, "rule.threshold: is missing"),
        ({"rule": {"threshold": "0", "delta": 0.1}}, "rule.threshold: Input should be a valid number"),
        ({"rule": {"threshold": 0, "delta": 0}}, "rule.delta: Input should be greater than 0"),
        ({"rule": {"threshold": 0, "no_effect": 1, "delta": 0.1}}, "no_effect lies beyond rule.threshold"),
        # what could come out one way only
        ({"attainable": [-1.0, 0.0]}, "lies on one side of threshold 0: .* come out one way only"),
        ({"attainable": [0.5, 1.0]}, "lies on one side of threshold 0"),
        (LOSS, "a sensitivity check that sees a loss"),
        (LOSS | {"sensitivity": ["loss elsewhere >= 1"], "direction": "greater"}, "has direction less"),
        # requirements
        ({"requires": ["answers > 0.5"]}, "'answers > 0.5' is neither a claim's id nor of the form"),
        ({"requires": ["answers >= often"]}, "is neither a claim's id nor of the form"),
        ({"requires": ["T9"]}, "claim T1: names 'T9', which is no claim"),
        ({"requires": ["T1"]}, "claims rest on one another: T1, T1"),
        ({"kind": "conjunction", "parts": ["T2", "T3"]}, "has two parts or more, and no rule of its own"),
        ({"kind": "conjunction", "rule": None, "parts": ["T2"]}, "has two parts or more"),
        ({"kind": "conjunction", "rule": None, "parts": ["T8", "T9"]}, "claim T1: names 'T8'"),
    ],
)
def test_a_bad_claim_is_named_with_its_field(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"claims.yaml.*{message}"):
        read(tmp_path, ENTRY | changes)


def test_ids_occur_once_and_no_field_lacks(tmp_path):
    with pytest.raises(ValueError, match="'T1' occurs twice"):
        read(tmp_path, ENTRY, ENTRY)
    with pytest.raises(ValueError, match=r"claim 1 \(T1\): scale, control: must be text"):
        read(tmp_path, {name: x for name, x in ENTRY.items() if name not in ("control", "scale")})
    with pytest.raises(ValueError, match="claims: is missing"):
        (tmp_path / "claims.yaml").write_text("schema: 2\n")
        claims.load_claims(tmp_path / "claims.yaml")


def test_what_a_rule_leaves_out(tmp_path):
    loss = ENTRY | LOSS | {"id": "T2", "sensitivity": ["loss elsewhere >= 0.1"]}
    known = read(tmp_path, ENTRY | {"requires": ["T2", "a share <= -0.5"]}, loss)
    assert (known["T1"].rule.no_effect, known["T2"].rule.threshold) == (0.0, 0.05)
    assert known["T1"].conditions == [("T2", "", 0.0), ("a share", "<=", -0.5)]
    assert (known["T1"].asks, known["T1"].values, known["T2"].values) == (
        ["T2"],
        ["a share"],
        ["loss elsewhere"],
    )
    assert known["T1"].attainable == (-math.inf, math.inf)


def test_the_registered_runs_have_their_role(tmp_path):
    path = tmp_path / "runs.yaml"
    path.write_text("exploratory: [0, 1]\nconfirmatory: [100]\nstop: after 100\n")
    runs = claims.registered_runs(path)
    assert runs == {0: "exploratory", 1: "exploratory", 100: "confirmatory"}
    assert {0, 1, 2} <= claims.registered_runs().keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exploratory: [0, 1]\nconfirmatory: [1, 2]\nstop: x\n", "run 1 is exploratory, so it can't be conf"),
        ("exploratory: [0]\nconfirmatory: [1]\n", "stop: say when no further runs are measured"),
        ("exploratory: [zero]\n", r"runs.yaml: exploratory.0: .*integer.*got 'zero'"),
        ("exploratory: [0]\nsecret: [5]\n", "runs.yaml: secret: is no known field"),
    ],
)
def test_a_wrong_register_of_runs_is_named(tmp_path, text, message):
    (tmp_path / "runs.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        claims.read_runs(tmp_path / "runs.yaml")


def test_a_registration_sees_what_decides_a_word_and_nothing_else(tmp_path):
    before = read(tmp_path, ENTRY)["T1"].registered_sha256
    same = ENTRY | {"short": "in other words", "statement": "In other words.", "notebook": "99_moved"}
    assert read(tmp_path, same)["T1"].registered_sha256 == before
    for changed in ({"rule": {"threshold": 0.1, "delta": 0.1}}, {"statistic": "another"}, {"tuned": True}):
        assert read(tmp_path, ENTRY | changed)["T1"].registered_sha256 != before
