"""What pages say from result files when the book is built: the first screen, answers, what was changed.

A page asks for it with a block: ```{first-screen}```, ```{held-up}```, ```{changes}``` or ```{quiz} 1```.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from harmlens.evidence import claims, results, words
from harmlens.keep import files

BLOCK = re.compile(r"```\{(first-screen|held-up|changes|quiz)\} ?(\w*)\n```\n")
ROW = Mapping[str, Any]
CANT_TELL = ("inconclusive", "not testable")
TOLD = ("pass", "fail", "unclear", "not testable")
KINDS = {"confirmatory": "fresh"}


def filled(page: str) -> str:
    """A page with its blocks replaced by what the shipped results say."""
    folders = results.default_folders()[1:]
    made: dict[str, Callable[[str], str]] = {
        "first-screen": lambda _: first_screen(results.scorecard(folders)),
        "held-up": lambda _: held_up(folders),
        "changes": lambda _: changes(folders),
        "quiz": quiz,
    }
    return BLOCK.sub(lambda match: made[match[1]](match[2]), page)


# --------------------------------------------------------------------------- the quiz


def questions(session: str) -> list[dict[str, Any]]:
    """The questions of a session in the form of jupyterquiz; the right answer stands anywhere."""
    made = []
    for entry in files.read_yaml(files.data_dir() / "quiz.yaml")[int(session)]:
        answers = [
            {"answer": text, "correct": place == 0, "feedback": said}
            for place, (text, said) in enumerate(entry["answers"].items())
        ]
        turn = zlib.crc32(entry["question"].encode()) % len(answers)  # the same order each time
        answers = answers[turn:] + answers[:turn]
        made.append({"question": entry["question"], "type": "multiple_choice", "answers": answers})
    return made


def quiz(session: str) -> str:
    """The questions of a session, each with its answers folded."""
    lines = []
    for number, one in enumerate(questions(session), start=1):
        lines += [f"{number}. {one['question']}", ""]
        lines += [f"   - {answer['answer']}" for answer in one["answers"]]
        right = next(answer for answer in one["answers"] if answer["correct"])
        others = "; ".join(f"*{a['answer']}*: {a['feedback']}" for a in one["answers"] if not a["correct"])
        lines += ["", "   ```{admonition} Answer", "   :class: dropdown"]
        lines += [f"   **{right['answer']}.** {right['feedback']} {others}", "   ```", ""]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------- the first screen


def first_screen(rows: Sequence[ROW]) -> str:
    """About the methods, about each paper, how sure: in at most 200 words and 20 numbers."""
    real = [row for row in rows if _of_real(row) and row["role"] == "primary"]
    rows = [row for row in rows if not _of_real(row)]
    card = "</notebooks/19_scorecard>"
    methods = [row for row in rows if row["id"] in ("V7m", "V7a", "V9")]
    parts = [f"**The methods.** On planted answers: {results.grouped(methods, TOLD, _source)}."]
    for paper, name in (("mediation", "What flows"), ("pruning", "What is needed")):
        of = [row for row in rows if row["paper"] == paper and row["role"] == "primary"]
        of = [{**row, "word": _plain(row)} for row in of]
        told = results.grouped(of, ("supported", "partial", "contradicted", "can't tell"), _source)
        parts.append(f"**{name}** ({paper} paper, {len(of)} {{doc}}`claims {card}`). {told}.")
    runs = sorted({run for row in rows for run in row["runs"]}, key=int)
    roles = sorted({row["role_of_runs"] for row in rows if row["role_of_runs"]})
    kinds = " and ".join(KINDS.get(role, role) for role in roles)
    parts.append(
        f"**How sure?** Numbers are means over {len(runs)} training runs ({kinds or 'none yet'}) of a "
        "million-parameter {doc}`organism </notebooks/00_model_organism>`; "
        f"{{doc}}`the rule <how_to_read>` lets no mean decide. {_real(real)}"
    )
    return "\n\n".join(parts) + "\n"


def _of_real(row: ROW) -> bool:
    """Whether a row is of a real model; claims that are put together have a model and no runs."""
    return bool(row["model"]) and not row["model"].startswith("organism")


def _plain(row: ROW) -> str:
    return "can't tell" if row["word"] in CANT_TELL else row["word"]


def _real(rows: Sequence[ROW]) -> str:
    """How many primary claims have which word on real models."""
    if not rows:
        own = "{doc}`notebook 18 </notebooks/18_your_own_model>`"
        return f"Real models are for {own} to ask."
    said = Counter(map(_plain, rows))
    told = ", ".join(f"{number} {word}" for word, number in said.items())
    return f"On {{doc}}`a real model </notebooks/20_a_real_language_model>`: {told}."


def _source(row: ROW) -> str:
    return _cited(row) + ("" if row["value"] is None else f", {row['value']:.2g}")


# --------------------------------------------------------------------------- what held up

MEANT = {
    "supported": "It holds on runs that nobody had looked at.",
    "partial": "Something is there, and less than the claim says.",
    "contradicted": "It does not hold in this organism",
    "inconclusive": "These runs can't tell",
    "pass": "The check is passed.",
    "bounds met (tuned)": "The bounds are met also where nobody tuned for them.",
    "fail": "The check fails",
    "unclear": "These runs can't tell",
    words.TABLE: "Numbers without a word.",
}


def held_up(folders: Sequence[Any]) -> str:
    """Claim by claim: the words of the exploratory and the fresh runs, the numbers, what it means."""
    runs, known = claims.read_runs(), claims.load_claims()
    if not runs.confirmatory:
        return "No fresh run is registered yet.\n"
    old, new = (_by_claim(folders, role) for role in ("exploratory", "confirmatory"))
    asked = f"{len(runs.confirmatory)} fresh runs** are registered: {_numbers(runs.confirmatory)}"
    told = f"**{asked}. {runs.stop}".strip()
    if not any(row["value"] is not None for row in new.values()):
        return f"{told}\n\nThey are not all measured yet, and nothing of them is shown before they are.\n"
    words_of = {name: (old[name]["word"], row["word"]) for name, row in new.items() if name in old}
    kept = sum(before == now for before, now in words_of.values())
    lines = [told, "", f"{kept} of {len(words_of)} words are the same as before.", ""]
    moved: dict[tuple[str, str], list[str]] = {}
    for name, both in words_of.items():
        if both[0] != both[1]:
            moved.setdefault(both, []).append(_cited(new[name]))
    order = sorted(moved, key=lambda both: -len(moved[both]))
    lines += [f"- *{both[0]}* before, *{both[1]}* now: {', '.join(moved[both])}" for both in order] + [""]
    for paper, title in (("mediation", "The mediation paper"), ("pruning", "The pruning paper")):
        of = [claim for claim in known.values() if claim.paper == paper]
        lines += [f"## {title}", ""]
        for claim in (claim for claim in of if claim.role == "primary"):
            row, before = new[claim.id], old[claim.id]
            lines += [
                f"**{_cited(row)}: {claim.short}.** Before: *{before['word']}*{_measured(before)}. Now: "
                f"*{row['word']}*{_measured(row)}. {_meaning(row)}", "",
            ]  # fmt: skip
        lines += [*_table([claim.id for claim in of if claim.role != "primary"], old, new), ""]
    ours = [claim.id for claim in known.values() if claim.paper == "harmlens"]
    lines += ["## Our own checks", "", *_table(ours, old, new)]
    return "\n".join(lines) + "\n"


def _by_claim(folders: Sequence[Any], role: str) -> dict[str, ROW]:
    rows = results.scorecard(folders, role=role)
    return {row["id"]: row for row in rows if not row["model"] or row["model"].startswith("organism")}


def _numbers(some: Sequence[int]) -> str:
    return (
        f"{min(some)} to {max(some)}" if len(some) == max(some) - min(some) + 1 else ", ".join(map(str, some))
    )


def _cited(row: ROW) -> str:
    return f"{{doc}}`{row['id']} </notebooks/{row['notebook']}>`"


def _measured(row: ROW) -> str:
    if row["value"] is None:
        return ""
    control = "" if row["control_value"] is None else f", control {row['control_value']:.2g}"
    span = f"{row['value']:.2g} [{row['ci_low']:.2g}, {row['ci_high']:.2g}]"
    return f" ({span}{control}, {len(row['runs'])} runs)"


def _meaning(row: ROW) -> str:
    if row["word"] == "not testable":
        return f"It can't be asked: {row['reason']}."
    meant = MEANT[row["word"]]
    return meant if meant.endswith(".") else f"{meant}: {row['reason']}."


def _table(names: Sequence[str], old: Mapping[str, ROW], new: Mapping[str, ROW]) -> list[str]:
    lines = ["| claim | before | now | what it means |", "|---|---|---|---|"]
    for row, before in ((new[name], old[name]) for name in names):
        cells = [f"{one['word']}{_measured(one)}" for one in (before, row)]
        lines.append(f"| {_cited(row)} {row['short']} | {' | '.join(cells)} | {_meaning(row)} |")
    return lines


# --------------------------------------------------------------------------- what was changed


def changes(folders: Sequence[Any]) -> str:
    """Word before, what the old rule says of the new numbers, word now, and why: a row for each claim."""
    every = results.findings(folders)
    found = {one.claim: one for one in every if one.model.startswith("organism")}
    given = words.all_words(every).items()
    said = {name: told for (name, model), (told, _) in given if model.startswith("organism")}
    known = claims.load_claims()
    lines = [
        "| claim | word before | old rule on the new numbers | word now | why |",
        "|---|---|---|---|---|",
    ]
    for change in files.read_yaml(files.data_dir() / "claims.yaml")["changes"]:
        name = change["claim"]
        again = ""
        if "rule" in change and name in found and found[name].effect:
            again = old_word(change["rule"], known[name].sign, found[name])
        cells = [
            name,
            change.get("word", "new"),
            again,
            said.get(name, "not testable"),
            change["why"].replace("|", "\\|"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def old_word(rule: Mapping[str, Any], sign: int, finding: claims.Finding) -> str:
    """The word of the first edition: a percentile bootstrap over runs, and the mean where it was in doubt."""
    value, low, high = _old_interval([sign * one.value for one in finding.estimates("effect")])
    threshold = sign * rule["threshold"]
    no_effect = sign * rule.get("no_effect", rule["threshold"])
    null = [sign * one.value for one in finding.estimates("control")]
    margin = rule["margin_over_control"]
    clear = margin is None or (bool(null) and low > _old_interval(null)[2] + margin)
    agree = np.mean([sign * one.value > no_effect for one in finding.estimates("effect")])
    if low > threshold and clear and agree >= rule["seeds_share"] - 1e-9:
        return "replicated"
    if value > threshold or low > no_effect:
        return "direction only"
    return "not replicated" if high <= threshold else "undecided"


def _old_interval(values: Sequence[float]) -> tuple[float, float, float]:
    picked = np.random.default_rng(0).integers(len(values), size=(5000, len(values)))
    low, high = np.quantile(np.array(values)[picked].mean(axis=1), (0.025, 0.975))
    return float(np.mean(values)), float(low), float(high)
