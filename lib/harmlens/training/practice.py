"""A model practises the skill that it suppresses until its loss is that of another; what transfers then.

The test that tells compression from fragility: is a skill easier to remove because alignment compressed
it, or because it sits less firmly.

Introduced in notebook 12 ("What alignment does").
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from harmlens.asking import calibration, tasks
from harmlens.asking.material import Material
from harmlens.asking.tasks import NotKnown
from harmlens.models import forward
from harmlens.models.forward import LanguageModel, chat_row
from harmlens.training import finetune
from harmlens.training.finetune import Recipe
from harmlens.weights import attribution, masks
from harmlens.weights.separability import Domains, score, sweep
from harmlens.world import vale as world

PRACTICE = Recipe(steps=200, lr=2e-4, batch_size=32)


def practised(
    lm: LanguageModel,
    suppressed: Domains,
    served: Domains,
    *,
    target: float,
    source: Material,
    recipe: Recipe = PRACTICE,
    p: float = 0.01,
    q: float = 0.002,
    **options: int | None,
) -> dict:
    """A copy of a model practises its suppressed skill until its loss is low enough, and is swept then.

    It learns the suppressed answers *behind* the prefilled words, so that nothing teaches it to comply, mixed
    with as many answers that it serves. What differs from the model afterwards is how firmly the skill sits.

    Args:
        target: practice ends when the mean loss on discovery items is at most this (nats per token).
        p, q: of the transfer between the suppressed domains.
        source: what the model is asked. Answers are the model's own, from before it practises.
        options: as for :func:`sweep`.

    Returns:
        ``sweep`` of the copy, ``steps`` of practice, ``reached`` (the loss at its end, on discovery items),
        ``refusal`` (plain requests of the suppressed domains that are still refused, 0/1); where the source
        knows what its requests are made of also ``transfer`` of the copy.
    """
    n, few = options.get("n", 108), options.get("few", 24)
    train = source.skills(suppressed, served, "train", n=source.at_most(n))
    held = source.skills(suppressed, served, "discovery", n=source.at_most(few))["suppressed"]
    copy = forward.clone(lm)
    rows = []
    hidden, kept = train["suppressed"], train["served"]
    for chat, answers in zip(hidden.chats, hidden.answers, strict=True):
        told = {"role": "assistant", "content": f"{hidden.prefill} {answers[0]}"}
        rows.append(chat_row(copy, [*chat, told], prefill=hidden.prefill, end=hidden.end))
    for i, (chat, answers) in enumerate(zip(kept.chats, kept.answers, strict=True)):
        answer = answers[i % len(answers)]
        rows.append(chat_row(copy, [*chat, {"role": "assistant", "content": answer}], end=kept.end))

    def loss() -> float:
        return float(tasks.sit(copy, held).loss.mean())

    done = finetune.tune(
        copy, rows, recipe, watch=loss, at=range(0, recipe.steps + 1, 4), until=lambda now: now <= target
    )
    found = {
        "sweep": sweep(copy, suppressed, served, source=source, **options),
        "steps": len(done.losses), "reached": loss(),
        "refusal": _refusals(copy, suppressed, source, few),
    }  # fmt: skip
    with contextlib.suppress(NotKnown):
        found["transfer"] = transfer(copy, suppressed, suppressed, served, source=source, p=p, q=q, n=n)
    return found


def _refusals(lm: LanguageModel, suppressed: Domains, source: Material, n: int) -> np.ndarray:
    """Which plain requests for the suppressed skill are refused, 0/1, [item]."""
    plain = source.requests(True, "discovery", n=source.at_most(3 * n), types=suppressed, every=3)
    texts = [prompt.render(lm) for prompt in plain]
    answers = forward.generate(lm, texts, max_new_tokens=source.answer_tokens)
    return np.array([float(verdict.refused) for verdict in source.judge(plain, answers)])


def transfer(
    lm: LanguageModel,
    sources: Sequence[str],
    targets: Sequence[str],
    served: Sequence[str],
    *,
    source: Material,
    p: float,
    q: float,
    n: int = 108,
) -> dict:
    """Prune with one domain, ask for others.

    Args:
        sources: domains that are pruned with, one at a time.
        targets: domains that are asked for behind the prefilled words, all evaluation items.
        served: harmless domains that are to be kept.
        source: what the model is asked.
        p, q: of the selection.
        n: at most this many examples of what is kept are scored.

    Returns:
        ``domain`` (number of each item's domain among the targets, [item]); ``exact`` and ``loss``, [row,
        item]; row 0 is the whole model, row 1 + i the model without the weights of source i; ``weights``,
        [source].

    Raises:
        NotKnown: the source does not know what its requests are made of.
    """
    items = source.items("evaluation", types=targets)
    task = source.procedures(items, name="targets", prefill=world.PREFILL)
    preserve = score(lm, sources[:1], served, n=n, source=source)[1]
    spared, marks, weights = masks.top(preserve, p), [tasks.sit(lm, task)], []
    for domain in sources:
        own = source.procedures(source.items("train", types=domain), name=domain, prefill=world.PREFILL)
        prune = attribution.prune_score(lm, calibration.examples(lm, own))
        mask = masks.top(prune, q, lowest=True) - spared
        weights.append(len(mask))
        with masks.without(lm, mask):
            marks.append(tasks.sit(lm, task))
    return {
        "domain": np.array([list(targets).index(item.domain) for item in items]),
        "exact": np.stack([m.exact for m in marks]), "loss": np.stack([m.loss for m in marks]),
        "weights": np.array(weights),
    }  # fmt: skip


def starting_loss(
    lm: LanguageModel,
    suppressed: Domains,
    served: Domains,
    *,
    source: Material,
    n: int | None = None,
) -> np.ndarray:
    """Loss of the suppressed answers on discovery items, at most ``n``, nats per token, [item]."""
    return tasks.sit(lm, source.skills(suppressed, served, "discovery", n=n)["suppressed"]).loss
