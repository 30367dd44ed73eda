"""The five words on made-up runs: what misled before, by hand and by property; conjunctions, Holm, checks."""

import dataclasses
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from harmlens.evidence import claims, results, words
from harmlens.evidence.claims import Claim, Control, Finding, Measurement, Rule, Span

SUPPORT = {"supported": 2, "partial": 1}


def a_claim(threshold=0.5, no_effect=0.0, delta=0.1, **changes) -> Claim:
    entry = {
        "id": "T1", "paper": "mediation", "role": "secondary", "scope": "method", "source": "[ours]",
        "statement": "statement", "short": "short", "notebook": "01", "statistic": "statistic",
        "scale": "share", "unit": "item", "control": "control",
    }  # fmt: skip
    return Claim(**entry | {"rule": Rule(threshold, no_effect, delta)} | changes)


EQUIVALENCE = {"kind": "equivalence", "direction": "less", "sensitivity": ("loss elsewhere >= 0.1",)}


def no_loss(**changes) -> Claim:
    return a_claim(0.05, 0.05, 0.05, **EQUIVALENCE | changes)


def span(value, half=0.0):
    return Span(value, value - half, value + half)


def run_of(value, control=0.0, *, half=0.01, run=0, claim="T1", model="organism/sft", **changes):
    """One recorded run, by the effect (None: it has no value) and the control (None: was not measured)."""
    made = {
        "claim": claim, "model": model, "run": run, "notebook": "nb", "n": 30, "unit": "item",
        "role": "exploratory" if model.startswith("organism") else "real",
        "effect": value if value is None else span(value, half),
        "control": control if control is None else Control(control, control, control, name="chance"),
        "diff": None if None in (value, control) else span(value - control, half),
    }  # fmt: skip
    return Measurement(**made | changes)


def found(claim, effects, controls=0.0, **changes) -> Finding:
    controls = controls if isinstance(controls, list) else [controls] * len(effects)
    pairs = enumerate(zip(effects, controls, strict=True))
    return results.put_together(
        claim, [run_of(e, c, run=n, claim=claim.id, **changes) for n, (e, c) in pairs]
    )


def said(claim, *runs, met=None, **changes):
    return words.word(claim, found(claim, *runs, **changes), met or {})[0]


# ------------------------------------------------------------------ one claim


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        (([0.79, 0.80, 0.81],), "supported"),
        # three runs as a range: all lie above 0.5, but a fourth may well not
        (([0.52, 0.60, 0.71],), "partial"),
        # a value just above "no effect"
        (([-0.27, 0.08, 0.31],), "inconclusive"),
        (([0.0, 0.002, 0.001],), "contradicted"),  # and one that is surely tiny
        (([0.29, 0.30, 0.31],), "partial"),  # an effect, not of the size claimed
        (([0.20, 0.30, 0.80],), "inconclusive"),
        (([-0.31, -0.30, -0.29],), "contradicted"),
        # the control equals the effect, surely; or so far as one can tell; or it beats it
        (([0.79, 0.80, 0.81], [0.80, 0.81, 0.79]), "contradicted"),
        (([0.70, 0.80, 0.90], [0.90, 0.50, 0.80]), "inconclusive"),
        (([0.79, 0.80, 0.81], 0.9), "contradicted"),
        # a claim about size: clear of its control by more than delta, and surely not as large
        (([0.1, 0.1, 0.1], [-0.3, -0.1, -0.4]), "partial"),
        (([-0.1, -0.1, -0.1], [-0.9, -0.1, -0.4]), "contradicted"),
        (([0.8],), "supported"),  # one run: by its items
        (([0.8], None), "not testable"),
    ],
)
def test_the_word_by_hand(runs, expected):
    assert said(a_claim(), *runs) == expected


def test_the_ends_are_those_of_a_t_interval_over_runs():
    """0.52, 0.60, 0.71: mean 0.61, standard error 0.0551, t of 2 degrees of freedom at 95 % 2.92."""
    got = found(a_claim(), [0.52, 0.60, 0.71])
    assert (got.effect.low, got.effect.high) == pytest.approx((0.61 - 0.161, 0.61 + 0.161), abs=1e-3)


def test_an_effect_that_surely_misses_the_threshold_is_contradicted_however_low_its_control():
    word, why = words.word(claim := a_claim(0.0), found(claim, [-0.1, -0.1, -0.1], -0.6))
    assert word == "contradicted" and why == "the interval does not reach 0"


def test_a_difference_is_compared_with_its_control_already():
    claim = a_claim(difference=True)
    assert said(claim, [0.8, 0.8, 0.81], None) == "supported"
    assert said(claim, [0.3, 0.3, 0.31], None) == "partial"
    assert said(claim, [0.01, 0.0, 0.01], None) == "contradicted"
    assert said(claim, [0.3, -0.1, 0.4], None) == "inconclusive"


def test_an_equivalence_comes_out_both_ways_and_needs_to_see_a_loss():
    sees, blind = {"values": {"loss elsewhere": 0.4}}, {"values": {"loss elsewhere": 0.02}}
    assert said(no_loss(), [0.0, 0.01, 0.01], None, **sees) == "supported"
    assert said(no_loss(), [0.2, 0.21, 0.2], None, **sees) == "contradicted"
    assert said(no_loss(), [0.0, 0.01, 0.12], None, **sees) == "inconclusive"
    assert said(no_loss(), [0.0, 0.01, 0.01], None, **blind) == "not testable"  # nothing could be lost


def test_what_is_not_testable_says_why():
    claim = a_claim(requires=("answers before >= 0.5", "T9"), attainable=(-math.inf, 1.0))
    good, met = {"answers before": 0.9}, {"T9": "supported"}
    assert said(claim, [0.8, 0.8], values=good, met=met) == "supported"
    bare = run_of(None, run=7, note="it never refuses", values={})
    without = results.put_together(claim, [run_of(0.8, values=good), bare])
    for finding, others, reason in [
        (None, {}, "not measured"),
        (without, met, "run 7: it never refuses"),  # the ability was not there
        (found(claim, [0.8, 0.8], None, values=good), met, "no control was measured"),
        (found(claim, [0.8, 0.8], values={"answers before": 0.1}), met,
         "it requires answers before >= 0.5, not so in run 0, 1"),
        (found(claim, [0.8, 0.8], values=good), {"T9": "partial"}, "requires T9, which is partial"),
        # a capped statistic: in this run it could never have reached the threshold
        (found(claim, [0.3, 0.4], values=good, attainable=(0.0, 0.45)), met,
         "run 0 could give 0 to 0.45 only"),
    ]:  # fmt: skip
        word, why = words.word(claim, finding, others)
        assert word == "not testable" and reason in why


def test_one_run_of_ten_may_miss_a_requirement_and_none_of_nine():
    claim, runs = a_claim(requires=("answers before >= 0.5",)), range(12)

    def word(n, missing):
        made = [run_of(0.8, run=i, values={"answers before": 0.4 if i < missing else 0.9}) for i in runs][:n]
        return words.word(claim, results.put_together(claim, made))[0]

    tried = [word(9, 0), word(9, 1), word(10, 1), word(10, 2), word(12, 1), word(12, 2)]
    assert tried == ["supported", "not testable"] * 3
    lacking = [run_of(None, None, run=20 + i, note="it lacks all") for i in range(2)]  # count as missing it
    made = [run_of(0.8, run=i, values={"answers before": 0.9}) for i in runs]
    claim_of = [results.put_together(claim, some) for some in (made[:9] + lacking[:1], made[:9] + lacking)]
    assert [words.word(claim, one)[0] for one in claim_of] == ["supported", "not testable"]
    assert claim_of[0].effect.value == pytest.approx(0.8) and claim_of[0].diff
    low = [run_of(0.8, run=30, values={"answers before": 0.4})]
    assert words.word(claim, results.put_together(claim, made + low + lacking[:1]))[0] == "not testable"
    of_all = a_claim(requires=("mean answers before >= 0.5",))
    made = [run_of(0.8, run=i, values={"answers before": 0.1 + 0.09 * i}) for i in runs]
    assert words.word(of_all, results.put_together(of_all, made))[0] == "supported"  # 0.595 on average
    assert words.word(of_all, results.put_together(of_all, made[:9])) == (
        "not testable", "it requires a mean answers before >= 0.5, which is 0.46",
    )  # fmt: skip
    ceiling = a_claim(attainable=(-math.inf, 1.0))
    made = [run_of(0.3, run=i, attainable=(-1.0, 0.4) if i < 2 else None) for i in runs]
    assert words.word(ceiling, results.put_together(ceiling, made))[1] == "run 0 could give -1 to 0.4 only"
    assert words.word(ceiling, results.put_together(ceiling, made[1:]))[0] == "partial"


def test_a_table_has_no_word():
    claim = a_claim(kind="table", rule=None)
    assert said(claim, [0.2, 0.9]) == words.TABLE
    assert words.word(claim, None)[0] == words.TABLE


# ------------------------------------------------------------------ by property

number = st.floats(-2, 2, allow_nan=False).map(lambda x: round(x, 3))
extra = st.floats(0, 2, allow_nan=False).map(lambda x: round(x, 3))
# Plain numbers only: the records are built in the tests, since their type checks draw random numbers.
case_numbers = st.fixed_dictionaries({
    "threshold": number, "gap": extra, "delta": extra.map(lambda x: x + 0.01),
    "direction": st.sampled_from(["greater", "less"]), "kind": st.sampled_from(["effect", "equivalence"]),
    "difference": st.booleans(), "effect": st.tuples(number, extra, extra),
    "diff": st.tuples(number, extra, extra),
})  # fmt: skip


def build(case, mirrored=False) -> tuple[Claim, Finding]:
    direction, sign = case["direction"], -1 if mirrored else 1
    if case["kind"] == "equivalence" and not mirrored:
        direction, extras = "less", EQUIVALENCE
    else:
        extras = {"difference": case["difference"]}
    sides = ["greater", "less"]
    gap = case["gap"] if direction == "less" else -case["gap"]
    claim = a_claim(sign * case["threshold"], sign * (case["threshold"] + gap), case["delta"],
                    **{"direction": sides[(sides.index(direction) + mirrored) % 2], **extras})  # fmt: skip
    spans = {}
    for part in ("effect", "diff"):
        value, down, up = case[part]
        low, high = sorted((sign * (value - down), sign * (value + up)))
        spans[part] = Span(sign * value, low, high)
    runs = (run_of(0.5, values={"loss elsewhere": 1.0}),)
    return claim, Finding("T1", "organism/sft", "exploratory", spans["effect"], None, spans["diff"], runs)


def wider(one: Span, down, up):
    return Span(one.value, one.low - down, one.high + up)


@settings(deadline=None)
@given(case_numbers, extra, extra)
def test_a_wider_interval_never_adds_support_nor_contradicts(case, down, up):
    claim, narrow = build(case)
    before = words.word(claim, narrow)[0]
    for parts in (("effect",), ("diff",), ("effect", "diff")):
        wide = {part: wider(getattr(narrow, part), down, up) for part in parts}
        after = words.word(claim, dataclasses.replace(narrow, **wide))[0]
        assert SUPPORT.get(after, 0) <= SUPPORT.get(before, 0)
        assert after != "contradicted" or before in ("contradicted", "partial", "supported")
        if before == "inconclusive":
            assert after == "inconclusive"


@settings(deadline=None)
@given(case_numbers)
def test_mirrored_claims_get_the_same_word(case):
    case = case | {"kind": "effect"}
    assert words.word(*build(case))[0] == words.word(*build(case, mirrored=True))[0]


@settings(deadline=None)
@given(case_numbers)
def test_opposite_claims_are_never_both_supported(case):
    claim, one = build(case | {"kind": "effect"})
    rule = dataclasses.replace(claim.rule, no_effect=claim.rule.threshold)
    other = {"greater": "less", "less": "greater"}[claim.direction]
    opposite = dataclasses.replace(claim, direction=other, rule=rule)
    assert [words.word(c, one)[0] for c in (claim, opposite)] != ["supported", "supported"]


# ------------------------------------------------------------------ all claims together


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Have :func:`words.all_words` read these claims: id -> changes of the made-up claim."""

    def use(**entries):
        base = {f.name: getattr(a_claim(), f.name) for f in dataclasses.fields(Claim)}
        base = {name: value for name, value in base.items() if name not in ("rule", "attainable", "parts")}
        listed = []
        for name, changes in entries.items():
            whole = {
                "rule": {"threshold": 0.5, "no_effect": 0.0, "delta": 0.1},
                **base,
                "id": name,
                **changes,
            }
            listed.append(
                {k: list(v) if isinstance(v, tuple) else v for k, v in whole.items() if v is not None}
            )
        (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"claims": listed}))
        monkeypatch.setattr(words, "load_claims", lambda: claims.load_claims(tmp_path / "claims.yaml"))

    return use


def all_said(*findings: Finding) -> dict:
    return {(name, model.rpartition("/")[2]): word for (name, model), (word, _) in
            words.all_words(findings).items()}  # fmt: skip


def of(name, value, control=0.0, model="organism/sft", **changes) -> Finding:
    """Three runs that agree closely, of one claim."""
    values = [value - 0.001, value, value + 0.001]
    return found(a_claim(id=name), values, control, model=model, half=0.001, **changes)


BOTH = {"kind": "conjunction", "rule": None, "parts": ("A", "B")}


@pytest.mark.parametrize(
    ("b", "expected"),
    [
        (of("B", 0.8), "supported"),
        (of("B", 0.3), "partial"),
        (found(a_claim(id="B"), [0.3, -0.1, 0.8]), "inconclusive"),
        (None, "not testable"),
        (of("B", 0.0), "contradicted"),
    ],
)
def test_a_conjunction_takes_the_worst_word_of_its_parts(registry, b, expected):
    registry(A={}, B={}, AB=BOTH)
    got = words.all_words([one for one in (of("A", 0.8), b) if one])
    assert got["AB", "organism/sft"][0] == expected
    assert "the worst word of its parts" in got["AB", "organism/sft"][1]


def test_parts_on_another_organism_count_but_not_for_a_real_model(registry):
    registry(A={}, B={}, AB=BOTH | {"role": "primary"})
    got = all_said(of("A", 0.8), of("B", 0.8, model="organism/dpo"), of("A", 0.8, model="owner/real"))
    assert got["AB", "sft"] == "supported" and got["AB", "real"] == "not testable"


def test_a_required_claim_is_looked_up_on_the_organism_for_a_real_model(registry):
    registry(A={"requires": ("B",)}, B={})
    real, at = of("A", 0.8, model="owner/real"), "organism/planted"
    assert all_said(real, of("B", 0.8, model=at))["A", "real"] == "supported"
    assert all_said(real, of("B", 0.3, model=at))["A", "real"] == "not testable"
    assert all_said(real)["A", "real"] == "not testable"
    own = of("B", 0.0, model="owner/real")  # where it was measured itself, that counts
    assert all_said(real, of("B", 0.8, model=at), own)["A", "real"] == "not testable"
    assert ("B", "real") not in all_said(real)  # what was only looked up is no row


def test_checks_read_pass_fail_or_unclear(registry):
    registry(A={"role": "check"}, B={"role": "check", "tuned": True}, C={"requires": ("A",)})
    strong = all_said(of("A", 0.8), of("B", 0.8), of("C", 0.8))
    assert list(strong.values()) == ["pass", "bounds met (tuned)", "supported"]
    weak = all_said(of("A", 0.3), of("B", 0.0), of("C", 0.8))
    assert list(weak.values()) == ["unclear", "fail", "not testable"]


def test_primary_claims_are_corrected_for_their_number(registry):
    """Of 0.55, 0.6 and 0.65 t is 3.46 above 0.5: p = 0.037, enough alone, not as one of two."""
    values = [0.55, 0.6, 0.65]
    registry(A={"role": "primary"}, B={"role": "primary"}, C={})
    alike = [found(a_claim(id=name), values) for name in "ABC"]
    assert all_said(*alike) == {("A", "sft"): "inconclusive", ("B", "sft"): "inconclusive",
                                ("C", "sft"): "supported"}  # fmt: skip
    # step-down: where the other one is clear, this one has the whole 5 %, also on another organism
    for model in ("organism/sft", "organism/dpo"):
        assert all_said(alike[0], of("B", 0.8, model=model))["A", "sft"] == "supported"
    registry(A={"role": "primary"})
    assert all_said(alike[0])["A", "sft"] == "supported"
