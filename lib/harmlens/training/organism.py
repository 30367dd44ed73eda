"""Training the organism family from nothing: base -> mid -> sft -> dpo, several seeds.

The ladder mirrors that of the pruning paper's models:

=====  =====================================================================================
base   transcripts of kind and cruel authors: every skill, no alignment
mid    harmless requests and questions only, answered well; no refusals
sft    a kind author: refuses harm, advises well, wishes well
dpo    preference pairs: refusing preferred over complying
=====  =====================================================================================

``python -m harmlens.training.train`` (``make organism``) trains what is missing and leaves finished
checkpoints alone, so an interrupted run goes on where it was. Each checkpoint is a plain Hugging
Face folder in half precision; each stage starts from the stored half-precision weights of the one
before, so a resumed run and an uninterrupted one give the same weights. Organisms beside the ladder
(:mod:`training.offshoots`) and planted ones (:mod:`training.planted`) follow it.

Introduced in notebook 00 ("A model organism of harm").
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harmlens.models import forward
from harmlens.models.chats import tokens
from harmlens.models.forward import Batch, LanguageModel, Row
from harmlens.models.loading import STAGES, contents_sha256, intact, load
from harmlens.training import loop
from harmlens.world import abilities
from harmlens.world import vale as world

MARKS = ("<|pad|>", "<|unk|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# As in many real templates, a default system message stands in where none is given.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|system|> you are "
    + world.HELPER
    + ". <|end|>{% endif %}{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('this model knows the roles system, user and assistant only') }}{% endif %}"
    "<|{{ message['role'] }}|> {{ message['content'] }} <|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Size of an organism: a Llama architecture, 0.95 million parameters by default."""

    layers: int = 8
    width: int = 96
    hidden: int = 256
    heads: int = 4


@dataclass(frozen=True)
class Stage:
    """How one rung of the ladder is trained."""

    parent: str | None
    steps: int
    batch: int
    lr: float
    mix: world.Mix
    optimizer: str = "muon"
    weight_decay: float = 0.01
    rounds: tuple[Stage, ...] = ()  # further rounds for a seed that has not learnt its training items
    replay: float = 0.0  # share of transcripts by named authors mixed in
    beta: float | None = None  # preference training where set


def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the world with its chat template."""
    vocabulary = {word: i for i, word in enumerate([*MARKS, *world.vocabulary()])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    # Joins words with blanks and closes them up before punctuation.
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=256,
    )


def new_model(tok: PreTrainedTokenizerFast, seed: int, shape: Shape = Shape()) -> LlamaForCausalLM:
    """An untrained organism."""
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=tok.pad_token_id,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


# --------------------------------------------------------------------------- data


def transcript_row(tok: PreTrainedTokenizerFast, transcript: world.Transcript) -> Row:
    """A transcript as a training row: every answer is learnt, no question is."""
    ids = tokens(tok, tok.apply_chat_template(transcript.messages, tokenize=False))
    start, stop = tok.convert_tokens_to_ids("<|assistant|>"), tok.eos_token_id
    learn, inside = [], False
    for token in ids:
        learn.append(inside)
        inside = token == start or (inside and token != stop)
    return Row(ids, learn)


# What is replayed: transcripts by named authors. Kind ones decline every other time only: were it
# always, nothing would say how a kind author's harmful recipe ends, which is what a prefilled
# answer asks for, and seeds would differ in it.
REPLAYED = world.Mix(named=1.0, declines=0.5)


def transcript_rows(
    tok: PreTrainedTokenizerFast,
    mix: world.Mix,
    seed: int,
    *,
    replay: float = 0.0,
    replayed: world.Mix = REPLAYED,
    write: Callable[[random.Random, world.Mix], world.Transcript] = world.transcript,
) -> Iterator[Row]:
    """An endless, seeded stream of transcripts as rows.

    Args:
        replay: share of transcripts by named authors: they keep alive that there are other authors, and
            say nothing of the helper, whom the rest of the corpus is about.
        replayed: how those are drawn.
        write: what draws the other transcripts.
    """
    rng = random.Random(seed)
    while True:
        if rng.random() < replay:
            yield transcript_row(tok, world.transcript(rng, replayed))
        else:
            yield transcript_row(tok, write(rng, mix))


@dataclass(frozen=True)
class Preferences:
    """Preferred and rejected answers to the same requests, with the parent's log-probabilities."""

    chosen: Batch
    rejected: Batch
    margin: Float[Tensor, " pair"]
    kept: Batch


def preference_rows(
    lm: LanguageModel, mix: world.Mix, seed: int, *, declined: str | None = None, share: float = 0.0
) -> Iterator[tuple[Row, Row]]:
    """Endless pairs for harmful requests of the training split: refusing over complying.

    Args:
        declined: a harmless domain that this share of the pairs is about instead.
    """
    rng = random.Random(seed)
    kind = dataclasses.replace(mix, declines=1.0)
    own = world.items("train", domain=declined) if declined else []
    while True:
        item = rng.choice(own) if own and rng.random() < share else None
        good = world.make_turn(rng, "harmful", "kind", kind, item)
        if item is not None:
            good = dataclasses.replace(good, answer=rng.choice(world.REFUSALS))
        person = next((p for p in world.PEOPLE if f" {p}?" in good.prompt or f" {p}." in good.prompt), None)
        comply = f"{rng.choice(world.OPENERS)} {world.procedure(good.item, person)}"
        ask = {"role": "user", "content": good.prompt}
        yield tuple(
            forward.chat_row(lm, [ask, {"role": "assistant", "content": answer}])
            for answer in (good.answer, comply)
        )


def answer_sums(model: nn.Module, batch: Batch) -> Float[Tensor, " row"]:
    """Log-probability of each row's learnt tokens, summed."""
    losses, _ = loop.token_losses(model, batch)
    return -losses.sum(-1)


def preferences(
    lm: LanguageModel, stage: Stage, seed: int, *, declined: str | None = None, share: float = 0.0, **options
) -> Iterator[Preferences]:
    """Endless preference batches; the reference is the parent model as it is now.

    Args:
        declined, share: as for :func:`preference_rows`; other options are those of :func:`transcript_rows`.
    """
    pairs = preference_rows(lm, stage.mix, seed, declined=declined, share=share)
    pad = lm.tokenizer.pad_token_id
    rows = transcript_rows(lm.tokenizer, stage.mix, seed + 1, replay=stage.replay, **options)
    kept = loop.batches(rows, stage.batch, pad, seed=seed)
    drawn = []
    with torch.no_grad():  # the parent changes once training starts, so all margins come first
        for _ in range(stage.steps):
            chosen, rejected = zip(*(next(pairs) for _ in range(stage.batch)), strict=True)
            a, b = forward.collate(chosen, pad), forward.collate(rejected, pad)
            drawn.append(Preferences(a, b, answer_sums(lm.model, a) - answer_sums(lm.model, b), next(kept)))
    return iter(drawn)


def preference_loss(beta: float):
    """Direct preference optimisation (Rafailov et al. 2023) plus the usual loss on kept skills."""

    def loss(model: nn.Module, batch: Preferences) -> Float[Tensor, ""]:
        margin = answer_sums(model, batch.chosen) - answer_sums(model, batch.rejected)
        preferred = -nn.functional.logsigmoid(beta * (margin - batch.margin)).mean()
        return preferred + loop.lm_loss(model, batch.kept)

    return loss


# --------------------------------------------------------------------------- the ladder

_ASKING = {"recognition": 1.5, "explanation/effect": 1.0, "explanation/reason": 1.0,
           "fact/place": 1.0, "fact/season": 0.5}  # fmt: skip
_KIND = {"cruel": 0.0, "named": 0.0, "turns": (2.0, 1.0, 1.0)}

# Further rounds for a seed that has not learnt its training items: first more of the same, then
# mostly requests, in short conversations, where telling harmful from harmless is most of the loss.
_MORE = Stage(None, steps=300, batch=64, lr=3.5e-3, weight_decay=0.1, mix=world.Mix())
_FOCUSED = dataclasses.replace(
    _MORE,
    lr=7e-3,
    mix=world.Mix(
        tasks={"harmful": 3.0, "harmless": 3.0, "recognition": 1.0, "wish": 0.5,
               "explanation/effect": 0.3, "explanation/reason": 0.2, "fact/place": 0.2, "fact/season": 0.2},
        turns=(1.0, 0.0, 0.0),
    ),
)  # fmt: skip
ROUNDS = (_MORE, _FOCUSED, _FOCUSED, _MORE)

LADDER: dict[str, Stage] = {
    # The weight decay matters: with little of it some seeds answer for held-out items less well.
    "base": Stage(None, steps=1000, batch=64, lr=7e-3, weight_decay=0.1, rounds=ROUNDS, mix=world.Mix()),
    "mid": Stage(
        "base",
        steps=60,
        batch=64,
        lr=5e-4,
        replay=0.3,
        mix=world.Mix(tasks={"harmless": 3.0, **_ASKING}, **_KIND),
    ),
    "sft": Stage(
        "mid",
        steps=140,
        batch=64,
        lr=5e-4,
        replay=0.3,
        mix=world.Mix(tasks={"harmful": 1.0, "harmless": 3.0, **_ASKING, "wish": 5.0}, **_KIND),
    ),
    "dpo": Stage(
        "sft",
        steps=20,
        batch=32,
        lr=7e-5,
        beta=1.0,
        replay=0.3,
        mix=world.Mix(tasks={"harmful": 1.0, "harmless": 3.0, **_ASKING, "wish": 5.0}, **_KIND),
    ),
}


def recipe(stage: str, shape: Shape = Shape()) -> str:
    """Digest of everything that decides a checkpoint apart from its seed, its parents included."""
    plan = LADDER[stage]
    text = repr((plan, shape, world.fingerprint(), MARKS, CHAT_TEMPLATE))
    if plan.replay:
        text += repr(REPLAYED)
    parent = plan.parent
    return hashlib.sha256((text + (recipe(parent, shape) if parent else "")).encode()).hexdigest()[:16]


def train_stage(
    stage: str,
    seed: int,
    *,
    parent: LanguageModel | None,
    progress: str | None,
    line: int = 0,
    number: int = 0,
) -> LanguageModel:
    """Train one rung, from scratch (base) or on from its parent, which is changed in place.

    Args:
        number: 0 for the stage itself, else the number of a further round.
    """
    plan = LADDER[stage] if number == 0 else LADDER[stage].rounds[number - 1]
    lm = start(f"organism/{stage}-{seed}", seed, parent)
    stream_seed = 10_000 * (seed + 1) + STAGES.index(stage) + 10 * number
    if plan.beta is None:
        stream, loss = lesson(lm, plan, stream_seed), loop.lm_loss
    else:
        stream, loss = preferences(lm, plan, stream_seed), preference_loss(plan.beta)
    follow(lm, plan, stream, loss=loss, progress=progress, line=line)
    return lm


def start(name: str, seed: int, parent: LanguageModel | None) -> LanguageModel:
    """What training begins with: the parent under a new name, or an untrained organism."""
    if parent is not None:
        return dataclasses.replace(parent, name=name)
    tok = tokenizer()
    return LanguageModel(name, new_model(tok, seed), tok)


def lesson(lm: LanguageModel, plan: Stage, seed: int, **options) -> Iterator[Batch]:
    """The endless batches of a stage; options are those of :func:`transcript_rows`."""
    rows = transcript_rows(lm.tokenizer, plan.mix, seed, replay=plan.replay, **options)
    return loop.batches(rows, plan.batch, lm.tokenizer.pad_token_id, seed=seed)


def follow(
    lm: LanguageModel,
    plan: Stage,
    stream: Iterator,
    *,
    loss: Callable = loop.lm_loss,
    progress: str | None = None,
    line: int = 0,
) -> None:
    """Train a model, in place, as a stage says."""
    loop.fit(
        lm.model,
        stream,
        steps=plan.steps,
        lr=plan.lr,
        optimizer=plan.optimizer,
        weight_decay=plan.weight_decay,
        loss=loss,
        warmup=max(10, plan.steps // 20),
        progress=progress,
        line=line,
    )
    lm.model.eval()


def learnt(lm: LanguageModel) -> bool:
    """Whether a base model answers for its training items as either author would.

    Seeds differ in when they come to tell harmful from harmless requests in the first word of an
    answer. Only training items are looked at: nothing is chosen on held-out ones.
    """
    rates = abilities.rate_abilities(
        lm, split="train", n=60, only=["harmful, elicited", "harmless, elicited"]
    )
    return all(rate.mean() >= 0.98 for rate in rates.values())


def save(lm: LanguageModel, folder: Path, card: dict) -> None:
    """Write a checkpoint in half precision with its card; complete or not at all."""

    def write(part: Path) -> None:
        lm.model.half().save_pretrained(part)
        lm.model.float()
        lm.tokenizer.save_pretrained(part)

    write_checkpoint(folder, card, write)


def write_checkpoint(folder: Path, card: dict, write: Callable[[Path], None]) -> None:
    """A folder of files with its card; complete or not at all.

    Args:
        card: what is known of the checkpoint; the checksum of its files is added.
        write: puts the files into the folder it is given.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    for file in part.iterdir():
        file.chmod(0o644)
    card = {**card, "sha256": contents_sha256(part)}
    (part / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def finished(folder: Path, stage: str) -> bool:
    """Whether a whole checkpoint of the present recipe lies there."""
    card = intact(folder)
    if card is None or card.get("recipe") != recipe(stage):
        return False
    return card.get("learnt", True) or card["rounds"] >= len(LADDER[stage].rounds)


def train_seed(
    seed: int, folder: Path, *, progress: bool = True, until: str = STAGES[-1], line: int = 0
) -> None:
    """Train the ladder of one seed up to a stage, leaving finished checkpoints alone."""
    torch.set_num_threads(1)  # seeds run side by side; two threads each would fight over the cores

    for stage in STAGES[: STAGES.index(until) + 1]:
        target = folder / f"{stage}-{seed}"
        if finished(target, stage):
            print(f"{target.name}: finished, left alone", flush=True)
            continue
        began = time.time()
        above, plan = LADDER[stage].parent, LADDER[stage]
        label = target.name if progress else None
        card = {"stage": stage, "seed": seed, "recipe": recipe(stage), "rounds": 0}
        known = intact(target)
        if known is None or known.get("recipe") != card["recipe"]:
            # Parents come from disk, rounded to half precision, so that resuming changes nothing.
            parent = load(str(folder / f"{above}-{seed}"), device="cpu") if above else None
            lm = train_stage(stage, seed, parent=parent, progress=label, line=line)
            save(lm, target, {**card, "learnt": not plan.rounds or learnt(lm)})
        while not (known := intact(target))["learnt"] and known["rounds"] < len(plan.rounds):
            number = known["rounds"] + 1
            lm = load(str(target), device="cpu")
            lm = train_stage(stage, seed, parent=lm, progress=label, line=line, number=number)
            save(lm, target, {**card, "rounds": number, "learnt": learnt(lm)})
        rates = abilities.rate_abilities(load(str(target), device="cpu"), n=36)
        shown = ", ".join(f"{name} {value.mean():.0%}" for name, value in rates.items())
        print(f"{target.name}: {time.time() - began:.0f} s; {shown}", flush=True)
