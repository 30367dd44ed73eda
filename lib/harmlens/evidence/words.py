"""From what the recorded runs found to one word for each claim.

The rules are those of :func:`word`; a point estimate never decides. Introduced in the page "How to read the
notebooks"; the words in notebook 19.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from harmlens.evidence.claims import Claim, Finding, load_claims
from harmlens.evidence.stats import p_beyond

WORDS = ("supported", "partial", "contradicted", "inconclusive", "not testable")
CHECKS = ("pass", "bounds met (tuned)", "fail", "unclear")  # words of our own checks
TABLE = "table"  # in the place of a word: numbers that are only shown
REQUIRED = 0.9  # share of the runs that have to meet a requirement: all of fewer than ten
_WORST = ("contradicted", "not testable", "inconclusive", "partial", "supported")


def word(claim: Claim, finding: Finding | None, given: Mapping[str, str] = {}) -> tuple[str, str]:
    """The word for a claim that is no conjunction, one of :data:`WORDS`, and in one line what decided it.

    Read for a claim with direction "greater"; for "less" all comparisons are mirrored. Ends are those of 90 %
    intervals over runs, so that each is a one-sided statement at 5 %. The first that fits:

    - **not testable**: nothing was measured, or no control; more than one run of ten has no value, or fails a
      requirement or a sensitivity check (or their mean does, where it is asked for); a claim that is required
      is not supported; in as many runs, what could come out at all lies on one side of the threshold.
    - **supported**: the lower end of the effect is beyond the threshold, and that of the difference from
      the control beyond 0.
    - **partial**: the lower end of the difference is beyond 0 and that of the effect beyond ``no_effect``.
    - **contradicted**: the upper end of the difference is below ``delta``, or that of the effect below the
      threshold.
    - **inconclusive**: everything else.

    "Nothing is lost" (``kind: equivalence``) is supported where the upper end of the loss is below ``delta``,
    contradicted where its lower end is above. A ``table`` has no word. ``given``: words of other claims.
    """
    if claim.kind == "table":
        return TABLE, "numbers without a rule"
    if reason := _obstacle(claim, finding, given):
        return "not testable", reason
    rule, sign = claim.rule, claim.sign
    low, high = sorted(sign * end for end in (finding.effect.low, finding.effect.high))
    threshold, no_effect = sign * rule.threshold, sign * rule.no_effect
    beyond = "above" if sign > 0 else "below"
    if claim.kind == "equivalence":  # sign is -1: what is small is good
        if low > threshold:
            return "supported", f"the loss is below {rule.delta:g}"
        if high < threshold:
            return "contradicted", f"the loss is above {rule.delta:g}"
        return "inconclusive", f"the interval of the loss reaches across {rule.delta:g}"
    if claim.difference:
        least, most = low - no_effect, high - no_effect
    else:
        least, most = sorted(sign * end for end in (finding.diff.low, finding.diff.high))
    if low > threshold and least > 0:
        return "supported", f"the interval is {beyond} {rule.threshold:g}, and clear of the control"
    if low > no_effect and least > 0:
        return "partial", f"clear of the control, but the interval is not {beyond} {rule.threshold:g}"
    if most < rule.delta:
        return "contradicted", f"the difference from the control is smaller than {rule.delta:g}"
    if high < threshold:
        return "contradicted", f"the interval does not reach {rule.threshold:g}"
    across = f"the control by less or more than {rule.delta:g}" if least <= 0 else f"{rule.threshold:g}"
    return "inconclusive", f"the interval reaches across {across}"


def _obstacle(claim: Claim, finding: Finding | None, given: Mapping[str, str]) -> str:
    """Why a claim can't be tested; "" where it can."""
    if finding is None:
        return "not measured"
    without = [run for run in finding.runs if run.effect is None]
    runs = [run for run in finding.runs if run.effect]
    spared = (1 - REQUIRED) * len(finding.runs) - len(without) + 1e-9
    if spared < 0:
        which = f"run {without[0].run}" + (f" and {len(without) - 1} more" if len(without) > 1 else "")
        return f"{which}: {without[0].note}"
    if claim.compared and finding.diff is None:
        return "no control was measured"
    for name, compared, bound in claim.conditions:
        if not compared and given[name] != "supported":
            return f"it requires {name}, which is {given[name]}"
        sign = -1 if compared.endswith("<=") else 1
        if compared.startswith("mean"):
            mean = sum(run.values[name] for run in runs) / len(runs)
            if sign * (mean - bound) < 0:
                return f"it requires a mean {name} {compared[5:]} {bound:g}, which is {mean:.2g}"
            continue
        bad = [str(run.run) for run in runs if compared and sign * (run.values[name] - bound) < 0]
        if len(bad) > spared:
            return f"it requires {name} {compared} {bound:g}, not so in run {', '.join(bad)}"
    ends = {run.run: run.attainable or claim.attainable for run in runs}
    bad = [run for run, (low, high) in ends.items() if not low < claim.rule.threshold < high]
    if len(bad) > spared:
        return f"run {bad[0]} could give {ends[bad[0]][0]:g} to {ends[bad[0]][1]:g} only"
    return ""


def _p(claim: Claim, finding: Finding | None) -> float:
    """One-sided p-value of a claim: the larger of those for the threshold and for the control."""
    if finding is None or finding.effect is None or claim.rule is None:
        return 1.0
    tested = {"effect": claim.rule.threshold} | ({"diff": 0.0} if claim.compared else {})
    runs = {part: finding.estimates(part) for part in tested}
    return max(p_beyond(runs[part], at, claim.sign) if runs[part] else 1.0 for part, at in tested.items())


def all_words(found: Iterable[Finding]) -> dict[tuple[str, str], tuple[str, str]]:
    """Word and reason of each measured claim, and of conjunctions of these: (claim, model) -> both.

    A conjunction has the worst word of its parts. Primary claims of one model are corrected for their number
    by Holm's method; one that is supported only by itself is *inconclusive*. A check of ours reads pass, fail
    or unclear. What a claim requires and its model wasn't asked is looked up on the organism.
    """
    from statsmodels.stats.multitest import multipletests

    claims, table = load_claims(), {(one.claim, one.model): one for one in found}
    said: dict[tuple[str, str], tuple[str, str]] = {}

    def home(name: str, model: str, lent: bool = True) -> str:
        """The model on which a claim was measured: this one, or else an organism (``lent`` to real ones)."""
        name = claims[name].parts[0] if claims[name].parts else name
        others = sorted(other for one, other in table if one == name and other.startswith("organism"))
        lent = lent or model.startswith("organism")
        return others[0] if others and lent and (name, model) not in table else model

    def settle(name: str, model: str) -> str:
        """The word of one claim, plainly; ``said`` keeps it as it is shown."""
        claim = claims[name]
        if claim.parts:
            parts = {part: settle(part, home(part, model, lent=False)) for part in claim.parts}
            plain = min(parts.values(), key=_WORST.index)
            which = ", ".join(part for part in parts if parts[part] == plain)
            reason = f"the worst word of its parts, that of {which}"
        else:
            given = {other: settle(other, home(other, model)) for other in claim.asks}
            plain, reason = word(claim, table.get((name, model)), given)
        shown = plain
        if claim.role == "check" and plain != TABLE:
            passed = CHECKS[1] if claim.tuned else CHECKS[0]
            shown = {"supported": passed, "contradicted": CHECKS[2]}.get(plain, CHECKS[3])
        said.setdefault((name, model), (shown, reason))
        return plain

    for claim in claims.values():
        for model in sorted({model for name, model in table if name == (claim.parts or (claim.id,))[0]}):
            settle(claim.id, model)
    said = {pair: given for pair, given in said.items() if pair in table or claims[pair[0]].parts}
    primary = [claim for claim in claims.values() if claim.role == "primary"]
    for model in {model for _, model in said} if primary else ():
        p = []  # of a conjunction the largest
        for claim in primary:
            at = {part: home(part, model, lent=False) for part in claim.parts or (claim.id,)}
            p.append(max(_p(claims[part], table.get((part, at[part]))) for part in at))
        for claim, holds in zip(primary, multipletests(p, 0.05, method="holm")[0], strict=True):
            if not holds and said.get((claim.id, model), ("",))[0] == "supported":
                reason = f"supported alone, but not as one of {len(primary)} claims (Holm)"
                said[claim.id, model] = ("inconclusive", reason)
    return said
