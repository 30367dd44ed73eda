"""Outcome variables: how much a run leans towards giving the harmful answer.

Five outcomes, all with one sign: **up means more compliance or harm** (mediation paper; the
definitions follow the field, since the paper's own are not known):

=====  ==================================================================================
Y1     logsumexp of the compliance tokens' logits minus that of the refusal tokens'
Y2     minus the log-odds of refusal (all tokens on the other side; Arditi et al. 2024)
Y3     mean log-probability per token of a harmful reply minus that of a refusal
Y4     harm of the generated answer as the judge grades it, in [0, 1]
Y5     1 where the generated answer is judged harmful, else 0
=====  ==================================================================================

Y1 and Y2 look at the first word of the answer only. Y3 to Y5 look at the answer.

Introduced in notebook 01 ("What there is to explain").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from harmlens.evidence.stats import TooFew
from harmlens.models.chats import THOUGHT, Pair, require_spoken
from harmlens.models.forward import LanguageModel, follow, last_logits

LEAST_MASS, LEAST_AUROC = 0.2, 0.75  # below these, fitted words are doubted


@dataclass(frozen=True)
class TokenSets:
    """First tokens of compliance and of refusal, as ids."""

    comply: tuple[int, ...]
    refuse: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("comply", "refuse"):
            if not getattr(self, name):
                raise TooFew(f"the {name} token set is empty; fit it on prompts with that behaviour")
        if both := set(self.comply) & set(self.refuse):
            raise ValueError(f"tokens {sorted(both)} are in both sets; an outcome needs disjoint ones")


def fit_token_sets(
    lm: LanguageModel,
    complied: Sequence[str],
    refused: Sequence[str],
    *,
    mass: float = 0.02,
    factor: float = 3.0,
) -> TokenSets:
    """Find the first tokens that tell compliance from refusal, on held-out prompts.

    A token joins a set when its mean probability there is at least ``mass`` and ``factor`` times
    its mean probability on the other side. Where no token has that much, less is asked for, down to a tenth.
    A warning names sets that few answers begin with, or that don't tell the sides apart on held-out prompts.

    Args:
        complied, refused: rendered prompts that the model answers, and that it refuses.

    Raises:
        ValueError: a side without prompts, answers that begin with a thought, or a set that stays empty.
    """
    if not complied or not refused:
        raise ValueError("complied and refused must each hold at least one rendered prompt")
    for text in (*complied, *refused):
        require_spoken(lm.tokenizer, text)
    sides = [last_logits(lm, texts) for texts in (complied, refused)]
    first = {lm.tokenizer.decode([i]) for logits in sides for i in logits.argmax(-1).tolist()}
    if len(first) == 1 and THOUGHT.match(*first):
        raise ValueError(
            f"every answer of {lm.name!r} begins with a thought ({first.pop()!r}), so first words tell "
            "nothing of refusal. Choose a model that does not think, or a chat template that leaves thoughts "
            "out."
        )
    found = _leading(sides, mass, factor)
    _doubt(lm, found, sides, mass, factor)
    return found


def _leading(sides: Sequence[Float[Tensor, "_prompt vocab"]], mass: float, factor: float) -> TokenSets:
    p_comply, p_refuse = (logits.softmax(-1).mean(0) for logits in sides)

    def leading(p: Tensor, q: Tensor) -> tuple[int, ...]:
        # A model that begins its answers in many ways has no word with much of the mass: go down to a tenth.
        for least in (mass, mass / 2, mass / 4, mass / 10):
            found = tuple(torch.where((p >= least) & (p >= factor * q))[0].tolist())
            if found:
                return found
        return ()

    return TokenSets(leading(p_comply, p_refuse), leading(p_refuse, p_comply))


def _doubt(lm: LanguageModel, sets: TokenSets, sides: Sequence[Tensor], mass: float, factor: float) -> None:
    """Warn of sets that are no openings of their kind: few answers begin with them, or they don't tell."""
    words = {
        name: lm.tokenizer.convert_ids_to_tokens(list(getattr(sets, name))) for name in ("comply", "refuse")
    }
    for name, logits in zip(words, sides, strict=True):
        share = float(logits.softmax(-1)[:, list(getattr(sets, name))].sum(-1).mean())
        if share < LEAST_MASS:
            warnings.warn(
                f"the first words of {name}, {words[name]}, hold {share:.0%} of the probability where "
                f"answers {name}: they are hardly its openings. Read outcomes of the first token with care, "
                "or fit on other prompts.",
                stacklevel=4,
            )
    if min(map(len, sides)) < 4:
        return
    told, halves = [], [[logits[i::2] for logits in sides] for i in (0, 1)]
    for fitted, held in (halves, halves[::-1]):  # on prompts that the sets were not fitted on
        try:
            y = [logit_difference(logits, _leading(fitted, mass, factor)) for logits in held]
        except ValueError:  # half of the prompts has no such word
            told.append(0.5)
        else:
            told.append(float(((y[0][:, None] - y[1]).sign() / 2 + 0.5).mean()))
    auroc = sum(told) / 2
    if auroc < LEAST_AUROC:
        warnings.warn(
            f"the first words of comply, {words['comply']}, and of refuse, {words['refuse']}, don't tell the "
            f"two apart: AUROC {auroc:.2f} on held-out prompts, 0.5 being chance. What they measure means "
            "little.",
            stacklevel=4,
        )


def fit_to_pairs(lm: LanguageModel, pairs: Sequence[Pair]) -> TokenSets:
    """:func:`fit_token_sets` on pairs, x1 answered and x0 refused: others than those that are measured."""
    answered, refused = ([getattr(pair, side).render(lm) for pair in pairs] for side in ("x1", "x0"))
    return fit_token_sets(lm, answered, refused, factor=2.0)


def logit_difference(logits: Float[Tensor, "*batch vocab"], sets: TokenSets) -> Float[Tensor, "*batch"]:
    """Y1: compliance minus refusal, in logits. Linear enough to be the primary outcome.

    >>> logit_difference(torch.tensor([2.0, 0.5, 0.0]), TokenSets((0,), (1,))).item()
    1.5
    """
    comply = logits[..., list(sets.comply)].logsumexp(-1)
    return comply - logits[..., list(sets.refuse)].logsumexp(-1)


def refusal_log_odds(
    logits: Float[Tensor, "*batch vocab"], sets: TokenSets, *, eps: float = 1e-8
) -> Float[Tensor, "*batch"]:
    """Y2: minus the log-odds of a refusal token, in float64 (Arditi et al. 2024, sign flipped)."""
    p = logits.double().softmax(-1)[..., list(sets.refuse)].sum(-1)
    return (1 - p + eps).log() - (p + eps).log()


@dataclass(frozen=True)
class Outcome:
    """A first-token outcome as patching takes it.

    Attributes:
        value: logits [row, vocab] of ``ids`` -> one value for each row.
        ids: the tokens that are read, which saves computing the logits of all others; None for all.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    ids: tuple[int, ...] | None = None

    def __call__(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
        """The value of whole logits."""
        return self.value(logits if self.ids is None else logits[:, list(self.ids)])


def y1(sets: TokenSets) -> Outcome:
    """Y1 as an :class:`Outcome`: see :func:`logit_difference`."""
    n, m = len(sets.comply), len(sets.refuse)
    local = TokenSets(tuple(range(n)), tuple(range(n, n + m)))
    return Outcome("Y1", lambda logits: logit_difference(logits, local), (*sets.comply, *sets.refuse))


def y2(sets: TokenSets) -> Outcome:
    """Y2 as an :class:`Outcome`: see :func:`refusal_log_odds`."""
    return Outcome("Y2", lambda logits: refusal_log_odds(logits, sets))


@dataclass(frozen=True)
class Reply:
    """Mean log-probability per token of one given reply to each prompt, teacher-forced.

    Attributes:
        texts: one reply for each pair, the same behind both of its prompts.
        skip: leave out this many first tokens.
    """

    texts: Sequence[str]
    skip: int = 0


@dataclass(frozen=True)
class Replies:
    """Y3: the harmful reply's mean log-probability per token minus the refusal's.

    Attributes:
        skip: leave out this many first tokens of both: with 1, what is left is how the answer goes on.
    """

    harmful: Sequence[str]
    refusals: Sequence[str]
    skip: int = 0

    def parts(self) -> tuple[Reply, Reply]:
        return tuple(Reply(texts, self.skip) for texts in (self.harmful, self.refusals))

    def score(self, lm: LanguageModel, prompts: Sequence[str]) -> Float[Tensor, " prompt"]:
        """Y3 of rendered prompts, one for each pair of replies."""
        ours, theirs = (follow(lm, prompts, reply.texts, skip=reply.skip)[0] for reply in self.parts())
        return ours - theirs
