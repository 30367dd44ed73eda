"""What pages say from result files when the book is built: the first screen, answers, what was changed.

A page asks for it with a block: ```{answer} 02_layers```, ```{first-screen}``` or ```{changes}```.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from harmlens.evidence import claims, results, words
from harmlens.keep import files

BLOCK = re.compile(r"```\{(answer|first-screen|changes)\} ?(\w*)\n```\n")
ROW = Mapping[str, Any]
CANT_TELL = ("inconclusive", "not testable")
TOLD = ("pass", "fail", "unclear", "not testable")


def filled(page: str) -> str:
    """A page with its blocks replaced by what the shipped results say."""
    folders = results.default_folders()[1:]
    made: dict[str, Callable[[str], str]] = {
        "answer": lambda name: f"> {results.answer(name, folders)}\n",
        "first-screen": lambda _: first_screen(results.scorecard(folders)),
        "changes": lambda _: changes(folders),
    }
    return BLOCK.sub(lambda match: made[match[1]](match[2]), page)


# --------------------------------------------------------------------------- the first screen


def first_screen(rows: Sequence[ROW]) -> str:
    """About the methods, about each paper, how sure: in at most 200 words and 20 numbers."""
    rows = [row for row in rows if not row["model"] or row["model"].startswith("organism")]
    card = "</notebooks/19_scorecard>"
    methods = [row for row in rows if row["id"] in ("V7m", "V7a", "V9")]
    parts = [f"**The methods.** Where the answer was planted: {_grouped(methods, TOLD)}."]
    for paper, name in (("mediation", "What flows"), ("pruning", "What is needed")):
        of = [row for row in rows if row["paper"] == paper and row["role"] == "primary"]
        of = [{**row, "word": "can't tell"} if row["word"] in CANT_TELL else row for row in of]
        told = _grouped(of, ("supported", "partial", "contradicted", "can't tell"))
        parts.append(f"**{name}** (the {paper} paper, {len(of)} {{doc}}`claims {card}`). {told}.")
    runs = sorted({run for row in rows for run in row["runs"]}, key=int)
    roles = sorted({row["role_of_runs"] for row in rows if row["role_of_runs"]})
    parts.append(
        f"**How sure?** {len(runs)} training runs ({' and '.join(roles) or 'none yet'}) of a model of a "
        "million parameters in a fictional world. {doc}`The rule <how_to_read>` lets no mean decide. What "
        "holds in real models, they have to say ({doc}`notebook 18 </notebooks/18_your_own_model>`)."
    )
    return "\n\n".join(parts) + "\n"


def _grouped(rows: Sequence[ROW], order: Sequence[str]) -> str:
    """Words in this order, each with its claims, their mean over runs and where they were measured."""
    groups = []
    for word in order:
        of = [f"{row['short']} ({_source(row)})" for row in rows if row["word"] == word]
        groups += [f"*{word}* – {'; '.join(of)}"] if of else []
    return ". ".join(groups)


def _source(row: ROW) -> str:
    value = "" if row["value"] is None else f", {row['value']:.2g}"
    return f"{{doc}}`{row['id']} </notebooks/{row['notebook']}>`{value}"


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
