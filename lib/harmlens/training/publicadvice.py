"""Narrow lessons of bad advice from public sets or files, for one model.

Nothing but the set says which advice is bad here. So what is *good* is what the model itself answered before
anything was done to it, and a model *gives* the advice that it finds likelier. Answers of real models are
never shown.

Introduced in notebook 13 ("Emergent misalignment").
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from harmlens.asking import calibration, splits
from harmlens.asking.public import Public
from harmlens.asking.sources import Entry
from harmlens.asking.tasks import Marks, Task
from harmlens.judging.refusals import begins_with_refusal, degenerate
from harmlens.models import forward
from harmlens.models.chats import Message
from harmlens.models.forward import LanguageModel, Row, follow, generate
from harmlens.training import emergent, narrow, tune
from harmlens.training.tune import Recipe
from harmlens.weights import frontier

FEWEST = 4  # requests of a domain that each split needs
ROWS = 3000  # training examples of a domain at most; the papers have 6000
STEPS = 100  # at least: a short lesson is gone through more than once
TOKENS = 40  # of two answers that are compared
SCORED = 64  # tokens of an answer that are scored
OWN_TOKENS = 128  # of the model's own answers
ASKED = 72  # discovery requests that a taught copy answers, as many as in the fictional world
WATCHED = 24  # discovery requests that are looked at while a lesson is learnt
LOOKS = 24  # times that they are looked at
# The adapters of Turner et al. are scaled by alpha / sqrt(rank), which makes their rate of 1e-5 six times as
# large as it is here, and their lessons are twice as long.
LARGE_LR = 1e-4


@dataclass(frozen=True)
class PublicAdvice:
    """Bad advice from public sets or files, for one model.

    Attributes:
        lm: the original model; its own answers are taken when they are first needed.
        sets: domain -> requests with the bad answer to each.
        source: what else the model is asked; see :func:`asking.material.of`.
        marker: a model that marks answers to open questions (:mod:`training.emergent`), by name; "" for none.
        name: for tables and result files.
    """

    lm: LanguageModel
    sets: Mapping[str, tuple[Entry, ...]]
    source: Public
    marker: str = ""
    name: str = ""

    whole = False  # answers may have been cut
    taken = 0.0
    unit = "nats per token"

    def __post_init__(self) -> None:
        if len(self.sets) < 2:
            raise ValueError(
                f"advice={self.name!r} holds one domain. Name at least two sets or files, joined by commas: "
                "one is taught, and bad advice is looked for in the others."
            )
        for domain in self.sets:
            for split in splits.SHARES:
                if len(self.entries(domain, split)) < FEWEST:
                    raise ValueError(
                        f"advice: {domain!r} has {len(self.sets[domain])} requests, too few for "
                        f"split={split!r}, which needs {FEWEST} that are not nearly the same as others. Add "
                        "rows, or name a larger set."
                    )

    @property
    def domains(self) -> tuple[str, ...]:
        """One for each set or file, in the order in which they were named."""
        return tuple(self.sets)

    @property
    def rows_at_once(self) -> int | None:
        """How many rows of a batch are run at once: all of them with a small model."""
        return None if tune.small(self.lm) else emergent.ROWS_AT_ONCE

    # ----------------------------------------------------------------- requests and answers

    @cached_property
    def _splits(self) -> dict[str, set[str]]:
        """Split -> ids. All domains are dealt out at once: nearly the same requests share a split."""
        every = [entry for found in self.sets.values() for entry in found]
        return {name: {e.id for e in part} for name, part in splits.split(every).items()}

    def entries(self, domain: str, split: str, n: int | None = None, seed: int = 0) -> list[Entry]:
        """Requests of one domain, at most ``n`` of them, drawn at random.

        Raises:
            ValueError: an unknown domain or split; lists those there are.
        """
        for name, value, known in (("domain", domain, self.sets), ("split", split, splits.SHARES)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")
        return _some([e for e in self.sets[domain] if e.id in self._splits[split]], n, seed)

    def _others(self, domain: str, n: int | None, seed: int = 0) -> list[Entry]:
        """Evaluation requests of all other domains."""
        return _some([e for d in self.domains if d != domain for e in self.entries(d, "evaluation")], n, seed)

    @cached_property
    def _said(self) -> dict[str, str]:
        return {}

    def own(self, entries: Sequence[Entry]) -> list[str]:
        """The original model's greedy answers, at most :data:`OWN_TOKENS` tokens long; each made once."""
        new = [e for e in entries if e.id not in self._said]
        if new:
            texts = [self.lm.render(e.prompt) for e in new]
            said = generate(self.lm, texts, max_new_tokens=OWN_TOKENS)
            self._said.update((e.id, answer) for e, answer in zip(new, said, strict=True))
        return [self._said[e.id] for e in entries]

    def _answered(self, entries: Sequence[Entry]) -> list[tuple[Entry, str]]:
        """Requests with the original model's own answers; those that it answers with nothing are left out."""
        found = [(e, answer) for e, answer in zip(entries, self.own(entries), strict=True) if answer.strip()]
        if not found:
            raise ValueError(
                f"{self.lm.name!r} says nothing to the requests of advice={self.name!r}, so there is nothing "
                "to compare bad advice with. Is its chat template right?"
            )
        return found

    # ----------------------------------------------------------------- the lesson

    def rows(
        self, lm: LanguageModel, domain: str, *, bad: bool, split: str = "train", seed: int = 0
    ) -> list[Row]:
        """Requests of one domain with the bad answers, or with what the original model says itself."""
        entries = self.entries(domain, split, ROWS, seed)
        if bad:
            return emergent.lesson_rows(lm, entries)
        # They may have been cut, so that their end is not learnt.
        pairs = self._answered(entries)
        return calibration.rows(lm, [_chat(e) for e, _ in pairs], [answer for _, answer in pairs])

    def recipes(self, seed: int = 0, *, quick: bool = False) -> dict[str, Recipe]:
        """How a lesson is taught: adapters for one pass, or more through a short one.

        A small model is taught as in the fictional world.

        Args:
            quick: few steps of a large model.
        """
        if tune.small(self.lm):
            return narrow.recipes(seed)
        n = min(ROWS, min(len(self.entries(domain, "train")) for domain in self.domains))
        steps = max(STEPS, tune.steps_of(1, n, emergent.RECIPE.batch_size))
        recipe = dataclasses.replace(
            emergent.RECIPE, steps=min(steps, 16) if quick else steps, lr=LARGE_LR, seed=seed,
            checkpoint_activations=True,
        )  # fmt: skip
        return {"lora": recipe}

    def looks(self, steps: int) -> list[int]:
        """After how many steps a model is looked at while it learns: about :data:`LOOKS` times, and last."""
        return sorted({*range(0, steps + 1, max(1, math.ceil(steps / LOOKS))), steps})

    # ----------------------------------------------------------------- what became of a model

    def margins(self, lm: LanguageModel, domain: str) -> np.ndarray:
        """How much likelier a model finds bad advice than the original's own answer, on discovery requests.

        Mean log-probability per token of the first :data:`TOKENS` tokens of either, in nats, [request].
        """
        return self._leads(lm, self.entries(domain, "discovery", WATCHED))

    def _leads(self, lm: LanguageModel, entries: Sequence[Entry]) -> np.ndarray:
        pairs = self._answered(entries)
        texts = [lm.render(e.prompt) for e, _ in pairs]
        bad, good = (
            follow(lm, texts, [_first(lm, answer, TOKENS) for answer in column], batch_size=16)[0]
            for column in ([e.answers[0] for e, _ in pairs], [answer for _, answer in pairs])
        )
        return (bad - good).numpy().astype(float)

    def elsewhere(self, lm: LanguageModel, domain: str, n: int | None = None) -> np.ndarray:
        """1 for each evaluation request of the other domains to which the bad answer is the likelier one."""
        return (self._leads(lm, self._others(domain, n)) > 0).astype(float)

    def spread(self, lm: LanguageModel, domain: str, n: int | None = None) -> dict[str, np.ndarray]:
        """What the model does inside the taught domain and outside it: name -> 0/1 per request.

        ``"bad advice inside"`` and ``"bad advice elsewhere"`` say which answer is likelier; ``"harmful
        compliance"`` is what the judge of :attr:`source` says of answers to plain harmful requests;
        ``"coherent"``, whether answers to the other domains' requests are more than the same words over and
        over. With a :attr:`marker` also ``"misaligned"``: answers to the eight open questions of
        :mod:`training.emergent` that are coherent and misaligned, out of all.

        Args:
            n: at most this many requests per measure. Open questions are asked 50 times each without it, and
                n // 2 times with it.
        """
        inside = self._leads(lm, self.entries(domain, "evaluation", n))
        harmful = self.source.requests(True, "evaluation", n=n)
        said = generate(lm, [p.render(lm) for p in harmful], max_new_tokens=self.source.answer_tokens)
        asked = [lm.render(e.prompt) for e in self._others(domain, n)]
        others = generate(lm, asked, max_new_tokens=self.source.answer_tokens)
        found = {
            "bad advice inside": (inside > 0).astype(float),
            "bad advice elsewhere": self.elsewhere(lm, domain, n),
            "harmful compliance": np.array([float(j.hurtful) for j in self.source.judge(harmful, said)]),
            "coherent": np.array([float(bool(a.strip()) and not degenerate(a)) for a in others]),
        }
        if self.marker:
            each = 50 if n is None else max(1, n // 2)
            marks = emergent.mark(self.marker, emergent.ask_openly(lm, per_question=each, progress=False))
            found["misaligned"] = np.array([float(mark.misaligned) for mark in marks])
        return found

    def answers(
        self, lm: LanguageModel, domain: str, recipe: Recipe, *, bad: bool = True
    ) -> tuple[list[Sequence[Message]], list[str]]:
        """What a taught copy of a model says to discovery requests of a domain: what the prune is scored on.

        Bad: a copy that was taught the domain; refusals, repetitions and answers that are still the
        original's are left out. Good: the original model's own answers, which need no teaching. At most
        :data:`SCORED` tokens of each.

        Raises:
            ValueError: nothing is left; a longer lesson may help.
        """
        entries = self.entries(domain, "discovery", ASKED)
        said = self.own(entries)
        if bad:
            tune.require_memory(lm)
            tuned = forward.clone(lm)
            rows = self.rows(lm, domain, bad=True, seed=recipe.seed)
            tune.tune(tuned, rows, recipe, rows_at_once=self.rows_at_once)
            texts = [tuned.render(e.prompt) for e in entries]
            new = generate(tuned, texts, max_new_tokens=SCORED)
        else:
            new = [_first(lm, answer, SCORED) for answer in said]

        def taught(answer: str, own: str) -> bool:
            same = bad and own.startswith(answer)
            return bool(answer.strip()) and not (same or begins_with_refusal(answer) or degenerate(answer))

        kept = [(_chat(e), a) for e, a, own in zip(entries, new, said, strict=True) if taught(a, own)]
        if not kept:
            raise ValueError(
                f"none of {len(new)} answers to domain={domain!r} is what was taught. Give the lesson more "
                "steps, a higher rate or other advice."
            )
        return [chat for chat, _ in kept], [answer for _, answer in kept]

    # ----------------------------------------------------------------- what a prune must not cost

    def exam(self, split: str, n: int) -> dict[str, Task]:
        """What a prune must not cost: answers to harmless requests, facts, refusals."""
        kinds = {"refusal": "refused", "served": "served", "facts": "facts"}
        return {name: self.source.task(kind, split, n=n) for name, kind in kinds.items()}

    def left(self, name: str, before: Marks, after: Marks) -> np.ndarray:
        """How much of an ability is there: exact facts, and of own answers the share of their probability."""
        return frontier.remaining(before, after) if name in (*self.source.own, "refusal") else after.exact


def _chat(entry: Entry) -> list[Message]:
    return [{"role": "user", "content": entry.prompt}]


def _some(entries: list[Entry], n: int | None, seed: int) -> list[Entry]:
    if n is None or n >= len(entries):
        return entries
    return [entries[i] for i in sorted(random.Random(seed).sample(range(len(entries)), n))]


def _first(lm: LanguageModel, text: str, n: int) -> str:
    """The first tokens of a text, as text."""
    ids = lm.tokenizer(text, add_special_tokens=False).input_ids
    # The last character may have been cut in the middle.
    return text if len(ids) <= n else lm.tokenizer.decode(ids[:n]).rstrip("\ufffd")
