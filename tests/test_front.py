"""What pages say from result files: the first screen, the table of what was changed, the old rule."""

import re
import warnings

import pytest

import front
from harmlens.evidence import claims, results
from harmlens.evidence.stats import Estimate

KNOWN = claims.load_claims()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Three made-up runs of every claim, all of them as far on the claimed side as can be."""
    folder = tmp_path_factory.mktemp("results")
    made_up(folder, range(3))
    return folder


def made_up(folder, runs):
    for claim in (claim for claim in KNOWN.values() if not claim.parts):
        low, high = max(-2.0, claim.attainable[0]), min(2.0, claim.attainable[1])
        best, worst = (high, low) if claim.sign > 0 else (low, high)
        for run in runs:
            values = {name: bound for name, compared, bound in claim.conditions if compared}
            control = ("chance", Estimate(worst, worst, worst, 30))
            results.record(
                claim.id, Estimate(best, best, best, 30), control, model="organism/sft", run=run,
                values=values, folder=folder,
            )  # fmt: skip


def read(markdown: str) -> str:
    """As a reader sees it: links by their text, no marks."""
    return re.sub(r"\{doc\}`([^`<]*)(?: <[^>]*>)?`", r"\1", markdown).replace("*", "")


@pytest.mark.parametrize("shipped", [False, True])
def test_the_first_screen_is_short_and_links_every_claim(measured, shipped):
    shown = front.first_screen(results.scorecard(results.default_folders()[1:] if shipped else [measured]))
    text = read(shown)
    assert len(text.split()) <= 200
    claimed = re.findall(r"\b[CRV]\d\w*", text)
    assert len(re.findall(r"(?<![\w.])-?\d[\d.]*", text)) <= 20
    assert {name for name, claim in KNOWN.items() if claim.role == "primary"} <= set(claimed)
    for claim in claimed:
        assert f"{claim} </notebooks/" in shown
    assert not re.search("logit|surplus|log2|Jaccard", text)


def test_the_first_screen_counts_the_words_of_a_real_model(measured):
    rows = results.scorecard([measured])
    primary = [row for row in rows if row["role"] == "primary"]
    assert "notebook 18" in front.first_screen(rows)
    taught = {"model": "smollm2/dpo", "role_of_runs": "real"}
    words = ["supported", "contradicted", "inconclusive", *["not testable"] * (len(primary) - 3)]
    rows += [row | taught | {"word": word} for row, word in zip(primary, words, strict=True)]
    rows[-1] |= {"role_of_runs": ""}  # of a claim that is put together
    told = read(front.first_screen(rows))
    assert f"On a real model: 1 supported, 1 contradicted, {len(primary) - 2} can't tell." in told
    assert "notebook 18" not in told and "smollm2" not in told


def test_the_first_screen_without_a_result_says_so():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = read(front.first_screen(results.scorecard([])))
    assert text.count("can't tell") == 2 and "0 training runs (none yet)" in text


def test_blocks_of_a_page_are_filled(measured, monkeypatch):
    monkeypatch.setattr(results, "default_folders", lambda: [measured, measured])
    blocks = ("{held-up}", "{first-screen}", "{changes}")
    page = "# A\n\n" + "".join(f"```{block}\n```\n\n" for block in blocks) + "end\n"
    filled = front.filled(page)
    assert "```" not in filled and filled.endswith("end\n")
    assert re.search("fresh runs?.* registered", filled) and "**How sure?**" in filled and "| why |" in filled


def test_what_held_up_waits_for_all_fresh_runs_and_then_goes_claim_by_claim(measured, tmp_path, monkeypatch):
    """Made-up fresh runs: those of R2a find nothing, all others are as far on the claimed side as before."""
    runs = claims.Runs((0, 1, 2), (100, 101), "They are all there will be.")
    roles = dict.fromkeys(runs.exploratory, "exploratory") | dict.fromkeys(runs.confirmatory, "confirmatory")
    fixed = {claim.id: {claim.registered_sha256} for claim in KNOWN.values()}
    fixed |= {claim.notebook: {results.notebook_sha256(claim.notebook)} for claim in KNOWN.values()}
    for module in (claims, results):
        monkeypatch.setattr(module, "read_runs", lambda: runs)
    monkeypatch.setattr(results, "registered_runs", lambda: roles)
    monkeypatch.setattr(results, "registration", lambda: fixed)
    made_up(tmp_path, [100])
    page = front.held_up([measured, tmp_path])
    assert page.startswith("**2 fresh runs** are registered: 100 to 101. They are all there will be.")
    assert "not all measured yet" in page and "## The pruning paper" not in page
    made_up(tmp_path, [100, 101])
    for run in runs.confirmatory:
        nothing = Estimate(0.0, -0.01, 0.01, 30)
        results.record(
            "R2a", nothing, ("chance", nothing), model="organism/sft", run=run, folder=tmp_path,
            values={name: bound for name, _, bound in KNOWN["R2a"].conditions},
        )  # fmt: skip
    page = front.held_up([measured, tmp_path])
    assert page.count("before, *contradicted* now: {doc}`R2a") == 1
    text = read(page)
    assert set(re.findall(r"\b[CRV]\d\w*", text)) >= set(KNOWN)
    (of,) = (line for line in text.splitlines() if line.startswith("R2a: "))
    assert "Before: supported (1 [1, 1], control -2, 3 runs). Now: contradicted (0 [" in of
    assert "control 0, 2 runs). It does not hold in this organism: the difference from the control is" in of
    assert re.search(
        r"\n\| R10a .* \| supported .* \| supported .*2 runs.* \| It holds on runs that nobody", text
    )


@pytest.mark.parametrize("session", ["1", "2", "3", "4"])
def test_a_quiz_has_five_questions_with_one_right_answer_each(session):
    asked = front.questions(session)
    assert len(asked) == 5 and all(sum(a["correct"] for a in one["answers"]) == 1 for one in asked)
    assert all(a["feedback"] for one in asked for a in one["answers"])
    places = {[a["correct"] for a in one["answers"]].index(True) for one in asked}
    assert len(places) > 1  # the first one is not always right
    page = front.filled(f"```{{quiz}} {session}\n```\n")
    assert page.count(":class: dropdown") == 5 and page.startswith("1. ")


def test_every_claim_has_a_row_among_the_changes(measured):
    lines = front.changes([measured]).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert [row[0] for row in cells] == list(KNOWN) and all(len(row) == 5 and row[4] for row in cells)
    words = {row["id"]: row["word"] for row in results.scorecard([measured])}
    assert all(row[3] == words[row[0]] for row in cells)


@pytest.mark.parametrize(
    ("values", "control", "expected"),
    [
        ([0.8, 0.9, 0.7], 0.0, "replicated"),
        ([0.8, 0.9, 0.7], 0.75, "direction only"),  # the control does it too
        ([0.9, 0.9, 0.1], 0.0, "direction only"),  # the mean decided
        ([0.3, 0.4, 0.2], 0.0, "direction only"),  # clear of nothing, short of the threshold
        ([0.1, -0.1, 0.0], 0.0, "not replicated"),
        ([0.9, 0.1, -0.2], 0.0, "undecided"),
    ],
)
def test_the_old_rule_by_hand(tmp_path, values, control, expected):
    rule = {"threshold": 0.5, "no_effect": 0.0, "margin_over_control": 0.0, "seeds_share": 0.66}
    for run, value in enumerate(values):
        null = ("chance", Estimate(control, control, control, 30))
        results.record(
            "R1a", Estimate(value, value, value, 30), null, model="organism/sft", run=run, folder=tmp_path,
            values={KNOWN["R1a"].values[0]: 1.0},
        )  # fmt: skip
    (one,) = results.findings([tmp_path])
    assert front.old_word(rule, 1, one) == expected
