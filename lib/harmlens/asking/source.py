"""What a model is asked: the fictional world, public sets of requests, or a reader's own file.

:func:`source` chooses. A model whose tokenizer knows the words of the fictional world is asked about it,
where everything is known; any other model is asked what the public sets ask (:class:`asking.public.Public`).
Both answer to the same names, so that a notebook has one path for all models; what a source can't know it
raises as :class:`asking.tasks.NotKnown`.

Introduced in notebook 01 ("What there is to explain").
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from harmlens.asking import datasets
from harmlens.asking import pairs as pairs_
from harmlens.asking.public import Public, public
from harmlens.asking.tasks import (
    EXPLANATIONS,
    FACTS,
    Scored,
    Source,
    Task,
    Types,
    by_turns,
    joined,
    procedures,
    questions,
    refusals,
)
from harmlens.judging import graders
from harmlens.models import hub
from harmlens.models.chats import Pair, Prompt
from harmlens.models.forward import LanguageModel, generate
from harmlens.world import abilities
from harmlens.world import vale as world
from harmlens.world.judge import Judgement, judge

# Without a gate and small: pairs of harmful and harmless requests, more harmful ones with targets, and
# instructions that stand for everything else.
DEFAULT = "jailbreakbench,xstest,advbench,alpaca"


@dataclass(frozen=True)
class World(Source):
    """The fictional world as a source of requests; see :mod:`world.vale`."""

    name = "the fictional world"
    knows_world = True  # a request is made of words whose roles are known
    printable = True  # requests and answers may stand on a page
    prefills = (world.PREFILL, "gladly. take")
    answer_tokens = abilities.ANSWER_TOKENS
    at_once = 128  # requests that are run at once
    right = "exact harmful answers"  # what is counted behind the prefilled answer
    asked_first = 0  # requests that a model has to refuse before it is asked all
    cannot_tell = ""  # its judge is exact
    own = ()  # what of an exam is asked for in the model's own words
    settings = "settings.json"  # in data/: the p and q that were settled on it
    pairs = staticmethod(pairs_.pairs)
    persona = staticmethod(abilities.persona)

    def replies(self, prompts: Sequence[Prompt]) -> tuple[list[str], list[str]]:
        """The procedure of each prompt's item, and the usual refusal."""
        procedures = [f"{world.OPENERS[0]} {world.procedure(p.about)}" for p in prompts]
        return procedures, [world.REFUSALS[0]] * len(prompts)

    def items(
        self, split: str = "evaluation", *, harmful: bool | None = None, types: Types = None
    ) -> list[world.Item]:
        """What the world's requests are about; no other source knows it."""
        return world.items(split, harmful=harmful, domain=types)

    def requests(
        self,
        harmful: bool,
        split: str = "evaluation",
        *,
        n: int | None = None,
        types: Types = None,
        every: int = 1,
        seed: int = 0,
    ) -> list[Prompt]:
        """Plain requests, in all phrasings by turns; with ``every`` each so manyth of them."""
        items = world.draw(world.items(split, harmful=harmful, domain=types), n, seed)[::every]
        return [pairs_.plain_request(item, i) for i, item in enumerate(items)]

    def both_sides(self, split: str, n: int | None = None) -> list[Prompt]:
        """Requests of both sides in one phrasing, at most ``n`` together."""
        return [pairs_.plain_request(item) for item in world.draw(world.items(split), n)]

    def at_most(self, n: int) -> int | None:
        """How many of ``n`` are worth asking where answers have to be generated first: here all there are."""
        return None

    def unit(self, prompt: Prompt) -> str:
        """What statistics resample, and the words of a prompt that name what is asked for: an item's name."""
        return prompt.about.name

    words = unit

    def types_of(self, units: Sequence[str], harmful: bool, split: str = "evaluation") -> list[str]:
        """The domain of each unit."""
        found = {item.name: item.domain for item in world.items(split, harmful=harmful)}
        return [found[unit] for unit in units]

    def title(self, seed: int) -> str:
        """What a model is called in tables: by the seed that it was trained with."""
        return f"seed {seed}"

    def describe(self, pairs: Sequence[Pair] | None = None) -> str:
        """What there is to say of the requests, or of what pairs have in common."""
        return ""

    def anew(self) -> World:
        """The same requests for the model as it is now, or without one."""
        return self

    bare = anew

    def judge(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Judgement]:
        """See :func:`world.judge.judge`; answers with their prefilled words."""
        return [judge(prompt.about, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def types(self, harmful: bool = True) -> list[str]:
        """The domains of one side."""
        return world.domains(harmful)

    def _treated(
        self, split: str, n: int | None, suppressed: str, seed: int, types: Types = None
    ) -> tuple[list[world.Item], list[world.Item]]:
        """Items of the suppressed side and of the other."""
        if suppressed not in ("harmful", "harmless"):
            raise ValueError(f"suppressed={suppressed!r} must be 'harmful' or 'harmless'")
        harmful, harmless = (
            world.draw(world.items(split, harmful=h, domain=types), n, seed) for h in (True, False)
        )
        return (harmful, harmless) if suppressed == "harmful" else (harmless, harmful)

    def _task(
        self,
        kind: str,
        split: str,
        *,
        n: int | None = None,
        suppressed: str = "harmful",
        types: Types = None,
        every: int = 1,
        seed: int = 0,
    ) -> Task:
        hidden, shown = self._treated(split, n, suppressed, seed, types)
        harmful, harmless = (hidden, shown) if suppressed == "harmful" else (shown, hidden)
        both = [*harmful, *harmless]
        about = {
            "harmful": harmful, "harmless": harmless, "served": shown, "facts": shown, "recognition": both,
            "explanation": both,
        }  # fmt: skip
        return self._ask(kind, about.get(kind, hidden)[::every])

    def _ask(self, kind: str, about: Sequence[world.Item]) -> Task:
        if kind == "refused":
            return refusals(about, name=kind)
        if kind in ("harmful", "harmless", "served"):
            return procedures(about, name=kind, prefill=None if kind == "served" else world.PREFILL)
        parts = {"explanation": EXPLANATIONS, "facts": FACTS}.get(kind, [kind])
        return joined([questions(about, part) for part in parts], kind)

    def _explained(self, about: Sequence[world.Item]) -> Task:
        return by_turns(about, EXPLANATIONS, "explanation")

    def _known(self, about: Sequence[world.Item], split: str, seed: int) -> Task:
        return by_turns(about, FACTS, "facts")

    def lesson(
        self, n: int | None = None, *, harmful: bool = True, types: Types = None, seed: int = 0
    ) -> Task:
        """Plain requests for ``n`` training items in every phrasing, with right procedures."""
        rng = random.Random(seed)
        items = world.draw(world.items("train", harmful=harmful, domain=types), n, seed)
        taught = []
        for item in items:
            for i in range(len(world.PHRASINGS["procedure"])):
                answer = f"{rng.choice(world.OPENERS)} {world.procedure(item)}"
                taught.append((pairs_.plain_request(item, i).messages, (answer,), item.name))
        return Task.of("lesson", taught)

    def judged(self, lm: LanguageModel, task: Task, scored: Scored) -> Scored:
        """Scores as the judge sees them: as they are, since the right answers are known."""
        return scored


Material = World | Public
WORLD = World()


def source(lm: LanguageModel, data: str = "", judge: str = "") -> Material:
    """What a model is asked.

    Args:
        data: ``""`` for the fictional world where the model's tokenizer knows its words, and for
            :data:`DEFAULT` otherwise; names of public sets joined by commas (:mod:`asking.datasets`); or a
            ``.csv`` or ``.jsonl`` file with columns ``prompt`` and ``harmful``.
        judge: how answers to these are graded (:func:`judging.graders.grader`); ``""`` for a weak baseline,
            "refusals" where the answers that it learns from can be had (with public sets they are loaded),
            else "prefixes". The fictional world has a judge of its own.

    Raises:
        ValueError: ``judge`` for the fictional world, or what :func:`asking.datasets.entries` raises.
    """
    if not data and knows_the_world(lm):
        if judge:
            raise ValueError(
                f"judge={judge!r}: answers about the fictional world are judged exactly; leave it out"
            )
        return WORLD
    parts = {part.strip() for part in (data or DEFAULT).split(",")}
    here = {name for name, one in datasets.registry().items() if one.pinned in ("shipped", "your copy")}
    loads = not parts.isdisjoint({*datasets.names()} - here)  # a reader asks for sets from elsewhere
    return public(lm, data or DEFAULT, graders.grader(judge, download=loads), keeps=True)


def knows_the_world(lm: LanguageModel) -> bool:
    """Whether a model's tokenizer has a token for each word of the fictional world, and for little else: a
    large vocabulary of a real model may hold most of these ordinary words too."""
    vocabulary, words = lm.tokenizer.get_vocab(), world.vocabulary()
    return len(vocabulary) < 2 * len(words) and all(word in vocabulary for word in words)


def first_look(
    lm: LanguageModel, source: Material, *, n: int = 24, must_refuse: bool = True, harm: bool = False
) -> dict[str, float]:
    """Print a prompt as the model reads it, and how often it refuses; the first thing that a notebook does.

    A model that is asked in a wrong format, or was never aligned, refuses harmful requests no more than
    harmless ones; then there is nothing to explain. So a real model is asked a few harmful requests first.

    Args:
        n: how many requests of either side are asked.
        must_refuse: raise where the model does not refuse harmful requests more often. With False one can go
            on with what needs no refusal: what the model knows of harm, and the weights of its answers.
        harm: something is to be claimed about harm: say whether the judge of a real model can tell it.

    Returns:
        Refusal rate of ``"harmful"`` and ``"harmless"`` requests.

    Raises:
        ValueError: none of the first requests is refused, or the rates differ by less than a fifth.
    """
    asked = {name: source.requests(name == "harmful", n=n) for name in ("harmful", "harmless")}

    def refused(requests: Sequence[Prompt]) -> list[bool]:
        if not requests:
            return []
        answers = generate(lm, [p.render(lm) for p in requests], max_new_tokens=source.answer_tokens)
        return [verdict.refused for verdict in source.judge(requests, answers)]

    def require(refuses: bool, told: str) -> None:
        if must_refuse and not refuses:
            raise ValueError(
                f"{lm.name!r} refuses {told}, so there is no refusal to explain. Choose an aligned "
                f"(instruct) model (a small one that refuses: {hub.SMALL}), check the printed prompt against "
                "the model's card, or give other data. To go on with what needs no refusal: "
                "first_look(lm, source, must_refuse=False)"
            )

    if about := source.describe():
        print(about)
    print(repr(asked["harmless"][0].render(lm)))
    first = refused(asked["harmful"][: source.asked_first])
    if first:
        print(f"refused: {sum(first)} of the first {len(first)} harmful requests", flush=True)
        require(any(first), f"none of the first {len(first)} harmful requests")
    found = {
        "harmful": [*first, *refused(asked["harmful"][len(first) :])],
        "harmless": refused(asked["harmless"]),
    }
    rates = {name: sum(one) / len(one) for name, one in found.items()}
    shares = (f"{rate:.0%} of {len(asked[name])} {name}" for name, rate in rates.items())
    print(f"refused: {', '.join(shares)} requests")
    require(
        rates["harmful"] - rates["harmless"] >= 0.2,
        f"{rates['harmful']:.0%} of the harmful and {rates['harmless']:.0%} of the harmless requests",
    )
    if about and harm:
        print("claims about harm:", source.cannot_tell or f"the judge {source.grader.name!r} can tell")
    return rates
