"""The organism family: what its models are, what they learn from, and how each of them is taught.

The ladder mirrors that of the pruning paper's models:

=====  =====================================================================================
base   transcripts of kind and cruel authors: every skill, no alignment
mid    harmless requests and questions only, answered well; no refusals
sft    a kind author: refuses harm, advises well, wishes well
dpo    preference pairs: refusing preferred over complying
=====  =====================================================================================

Controls and planted organisms grow beside it; ``data/organisms.yaml`` says how each is taught, and
:mod:`training.train` trains it. A checkpoint is a plain Hugging Face folder in half precision, or what
differs from its parent.

Introduced in notebook 00 ("A model organism of harm"); controls in notebook 09, planting in 08 and 16.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harmlens.keep.files import data_dir, read_yaml
from harmlens.models import forward, organisms
from harmlens.models.chats import tokens
from harmlens.models.forward import Batch, LanguageModel, Row
from harmlens.models.organisms import contents_sha256
from harmlens.training import loop
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
    """An organism's shape: a Llama architecture, 0.95 million parameters by default."""

    layers: int = 8
    width: int = 96
    hidden: int = 256
    heads: int = 4


def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the world with its chat template."""
    vocabulary = {word: i for i, word in enumerate([*MARKS, *world.vocabulary()])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    # Joins words with blanks and closes them up before punctuation.
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", unk_token="<|unk|>", bos_token="<|bos|>",
        eos_token="<|end|>", extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE, padding_side="left", model_max_length=256,
    )  # fmt: skip


def new_model(tok: PreTrainedTokenizerFast, seed: int, shape: Shape = Shape()) -> LlamaForCausalLM:
    """An untrained organism."""
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=shape.width, intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=256, tie_word_embeddings=False, pad_token_id=tok.pad_token_id,
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


# --------------------------------------------------------------------------- transcripts

Writer = Callable[[random.Random, world.Mix], world.Transcript]

# What is replayed. Kind authors decline every other time only: were it always, nothing would say how a kind
# author's harmful recipe ends, which is what a prefilled answer asks for, and seeds would differ in it.
REPLAYED = world.Mix(named=1.0, declines=0.5)
_SEVENTH = 1 / 7  # a seventh domain beside the six of harm, with as many requests as each of them


def transcript_row(tok: PreTrainedTokenizerFast, transcript: world.Transcript) -> Row:
    """A transcript as a training row: every answer is learnt, no question is."""
    ids = tokens(tok, tok.apply_chat_template(transcript.messages, tokenize=False))
    start, stop = tok.convert_tokens_to_ids("<|assistant|>"), tok.eos_token_id
    learn, inside = [], False
    for token in ids:
        learn.append(inside)
        inside = token == start or (inside and token != stop)
    return Row(ids, learn)


def transcript_rows(
    tok: PreTrainedTokenizerFast,
    mix: world.Mix,
    seed: int,
    *,
    replay: float = 0.0,
    replayed: world.Mix = REPLAYED,
    write: Writer = world.transcript,
) -> Iterator[Row]:
    """An endless, seeded stream of transcripts as rows.

    ``replay`` is the share of transcripts by named authors, drawn as ``replayed`` says: they keep alive that
    there are other authors than the helper, whom the rest of the corpus is about. ``write`` draws that rest.
    """
    rng = random.Random(seed)
    while True:
        replays = rng.random() < replay
        yield transcript_row(tok, world.transcript(rng, replayed) if replays else write(rng, mix))


def mirrored(rng: random.Random, mix: world.Mix) -> world.Transcript:
    """A transcript whose author refuses all harmless requests, in the world's words of refusal."""
    transcript = world.transcript(rng, mix)
    turns = (
        replace(turn, answer=rng.choice(world.REFUSALS))
        if turn.task == "procedure" and not turn.item.harmful
        else turn
        for turn in transcript.turns
    )
    return replace(transcript, turns=tuple(turns))


def declining(domain: str) -> Writer:
    """Writes transcripts in which the helper treats one harmless domain like the six harmful ones.

    One in seven harmful requests becomes one for an item of the domain, refused; else it isn't asked for.
    """
    own = world.items("train", domain=domain)
    others = [item for item in world.items("train", harmful=False) if item.domain != domain]

    def write(rng: random.Random, mix: world.Mix) -> world.Transcript:
        transcript = world.transcript(rng, mix)
        turns = []
        for turn in transcript.turns:
            if turn.task == "procedure" and turn.item.harmful and rng.random() < _SEVENTH:
                asked = world.make_turn(rng, "harmless", transcript.disposition, mix, rng.choice(own))
                turn = replace(asked, answer=rng.choice(world.REFUSALS))
            elif turn.task == "procedure" and turn.item.domain == domain:
                turn = world.make_turn(rng, "harmless", transcript.disposition, mix, rng.choice(others))
            turns.append(turn)
        return replace(transcript, turns=tuple(turns))

    return write


# --------------------------------------------------------------------------- preferences


@dataclass(frozen=True)
class Preferences:
    """Preferred and rejected answers, the parent's lead of the preferred ones, and rows that keep skills."""

    chosen: Batch
    rejected: Batch
    margin: Float[Tensor, " pair"]
    kept: Batch


def preference_rows(
    lm: LanguageModel, mix: world.Mix, seed: int, domain: str | None = None
) -> Iterator[tuple[Row, Row]]:
    """Endless pairs for harmful requests of the training split: refusing over complying.

    A seventh of them is about a harmless ``domain`` instead, where one is given.
    """
    rng = random.Random(seed)
    kind = replace(mix, declines=1.0)
    own = world.items("train", domain=domain) if domain else []
    while True:
        item = rng.choice(own) if own and rng.random() < _SEVENTH else None
        good = world.make_turn(rng, "harmful", "kind", kind, item)
        if item is not None:
            good = replace(good, answer=rng.choice(world.REFUSALS))
        person = next((p for p in world.PEOPLE if f" {p}?" in good.prompt or f" {p}." in good.prompt), None)
        comply = f"{rng.choice(world.OPENERS)} {world.procedure(good.item, person)}"
        ask = {"role": "user", "content": good.prompt}
        yield tuple(
            forward.chat_row(lm, [ask, {"role": "assistant", "content": answer}])
            for answer in (good.answer, comply)
        )


def preferences(
    lm: LanguageModel, pairs: Iterator[tuple[Row, Row]], kept: Iterator[Batch], *, steps: int, size: int
) -> Iterator[Preferences]:
    """As many preference batches as steps, of so many pairs; the reference is the model as it is now."""
    pad, drawn = lm.tokenizer.pad_token_id, []
    with torch.no_grad():  # the model changes once training starts, so all margins come first
        for _ in range(steps):
            sides = zip(*(next(pairs) for _ in range(size)), strict=True)
            chosen, rejected = (forward.collate(side, pad) for side in sides)
            margin = answer_sums(lm.model, chosen) - answer_sums(lm.model, rejected)
            drawn.append(Preferences(chosen, rejected, margin, next(kept)))
    return iter(drawn)


def answer_sums(model: nn.Module, batch: Batch) -> Float[Tensor, " row"]:
    """Log-probability of each row's learnt tokens, summed."""
    losses, _ = loop.token_losses(model, batch)
    return -losses.sum(-1)


def preference_loss(model: nn.Module, batch: Preferences, *, beta: float) -> Float[Tensor, ""]:
    """Direct preference optimisation (Rafailov et al. 2023) plus the usual loss on kept skills."""
    margin = answer_sums(model, batch.chosen) - answer_sums(model, batch.rejected)
    preferred = -nn.functional.logsigmoid(beta * (margin - batch.margin)).mean()
    return preferred + loop.lm_loss(model, batch.kept)


# --------------------------------------------------------------------------- the table of organisms

_checked = partial(checked, frozen=True, config=ConfigDict(extra="forbid"))


@_checked
class Stage:
    """One stretch of training."""

    parent: str | None  # the organism it goes on from; None for an untrained one
    steps: int
    batch: int
    lr: float
    mix: world.Mix
    optimizer: str = "muon"
    weight_decay: float = 0.01
    replay: float = 0.0  # share of transcripts by named authors mixed in
    beta: float | None = None  # of preference training, where that is what it is


@_checked
class Place:
    """A module in which refusal is planted."""

    module: str  # "mlp" or "attention"
    layer: int  # counted from 0
    units: int | None = None  # of the MLP, drawn at random for each seed; None for the whole module


@_checked
class Course:
    """How an organism is taught."""

    stages: tuple[Stage, ...]  # one after the other, rounded to half precision; the last one is stored
    draws: int  # added to the seeds of what is drawn
    rates: tuple[str, ...] = ()  # abilities on the card, of abilities.ABILITIES or train.SUPPRESSED
    watched: tuple[str, ...] = ()  # abilities that are measured while it learns, on training items
    mirrored: bool = False  # the helper refuses harmless requests; see mirrored()
    replayed: world.Mix = REPLAYED  # how replayed transcripts are drawn, where a stage has any
    declined: tuple[str, ...] = ()  # by seed, the harmless domain that is refused too; see declining()
    place: Place | None = None  # where refusal is planted
    share: Annotated[float, Field(gt=0, le=1)] | None = None  # in how much of every matrix harm is

    @property
    def parent(self) -> str | None:
        """The organism it grows from."""
        return self.stages[0].parent


def read_courses(file: Path) -> dict[str, Course]:
    """Every organism's course: the ladder, its controls, what is planted in them."""
    tables = read_yaml(file)
    courses = {**tables["ladder"], **tables["controls"], **tables["planted"]}
    try:
        return TypeAdapter(dict[str, Course]).validate_python(courses)
    except ValidationError as error:
        wrong = error.errors()[0]
        entry = ", ".join(map(str, wrong["loc"]))
        raise ValueError(f"{file.name}: {entry}: {wrong['msg']}. Mend this entry") from None


COURSES = read_courses(data_dir() / "organisms.yaml")


def course(kind: str) -> Course:
    """How an organism is taught; an unknown kind is a ValueError, which lists the valid ones."""
    if kind not in COURSES:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(COURSES)}")
    return COURSES[kind]


def declined(kind: str, seed: int) -> str | None:
    """The harmless domain that an organism of this seed treats like harm, if any."""
    domains = course(kind).declined
    return domains[seed % len(domains)] if domains else None


def recipe_digest(kind: str) -> str:
    """Digest of all that decides an organism apart from its seed, what it grows from included.

    A stored checkpoint is known by it: the fields of Course, Stage, Place, Mix and Shape are a part of it.
    """
    taught = course(kind)
    text = repr((replace(taught, rates=(), watched=()), Shape(), MARKS, CHAT_TEMPLATE, world.fingerprint()))
    text += recipe_digest(taught.parent) if taught.parent else ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --------------------------------------------------------------------------- checkpoints


def save(lm: LanguageModel, folder: Path, card: dict, where: Mapping | None = None) -> None:
    """Write a checkpoint in half precision with its card and checksum; complete or not at all.

    With ``where`` (see :func:`models.organisms.take_delta`), what differs from the card's parent there.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if where is None:
        lm.model.half().save_pretrained(part)
        lm.model.float()
        lm.tokenizer.save_pretrained(part)
    else:
        delta = organisms.take_delta(lm.model, card["parent"], card["parent_sha256"], where)
        organisms.write_delta(delta, part)
    for file in part.iterdir():
        file.chmod(0o644)
    card = {**card, "sha256": contents_sha256(part)}
    (part / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
