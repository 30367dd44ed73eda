"""Running a model: the one type that everything takes, token rows and batches, logits, answers.

Introduced in notebook 00 ("A model organism of harm").
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from harmlens.models import chats
from harmlens.models.chats import Message, Pair, frame, require_spoken, tokens


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with what is needed to talk to it."""

    name: str  # how it was asked for, e.g. "organism/sft-0" or "allenai/OLMo-2-0425-1B-Instruct"
    model: PreTrainedModel  # plain, in evaluation mode
    tokenizer: PreTrainedTokenizerBase  # pads on the left
    revision: str = ""  # commit of the Hub repository, or sha256 of the weights of a local folder

    @property
    def device(self) -> torch.device:
        """Where token ids have to be put: the device of the input embedding."""
        return self.model.get_input_embeddings().weight.device

    def render(self, chat: str | Sequence[Message], prefill: str | None = None) -> str:
        """A chat as the text the model reads; see :func:`models.chats.render`."""
        return chats.render(self.tokenizer, chat, prefill)


def clone(lm: LanguageModel) -> LanguageModel:
    """A copy with weights of its own, to be changed without changing the model."""
    return replace(lm, model=copy.deepcopy(lm.model))


def require_finite(lm: LanguageModel, logits: Float[Tensor, "... vocab"]) -> None:
    """Refuse logits that overflowed, with a ValueError that names the precision to take."""
    if not logits.amax(-1).isfinite().all():  # NaN and infinity are larger than any number
        wider = {torch.float16: "'bfloat16', or 'float32' on a GPU without it", torch.bfloat16: "'float32'"}
        name = str(lm.model.dtype).removeprefix("torch.")
        remedy = f"load it with dtype={wider[lm.model.dtype]}" if lm.model.dtype in wider else "fetch it anew"
        raise ValueError(
            f"the logits of {lm.name!r} are not finite in {name}: {remedy}. If weights or activations were "
            "changed, the change is too large."
        )


def longest(lm: LanguageModel) -> int | None:
    """How many tokens the model takes, as far as its config says so."""
    config = lm.model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def require_room(
    lm: LanguageModel, rows: Sequence[Sequence[int]], *, new: int = 0, names: Sequence[str] | None = None
) -> None:
    """Refuse rows of ids that are too long with ``new`` tokens behind each, or hold one without embedding."""
    limit, known = longest(lm), lm.model.get_input_embeddings().weight.shape[0]
    for i, row in enumerate(rows):
        what = "a text" if names is None else names[i]
        if limit is not None and len(row) + new > limit:
            more = f", and {new} new ones are asked for" if new else ""
            raise ValueError(
                f"{what} has {len(row)} tokens{more}, more than the {limit} that {lm.name!r} takes: "
                f"shorten it{', or lower max_new_tokens' if new else ''}, or leave it out"
            )
        if row and max(row) >= known:
            word = lm.tokenizer.convert_ids_to_tokens(max(row))
            raise ValueError(
                f"{what} holds the token {word!r}, for which {lm.name!r} has no embedding: leave it out"
            )


def token_ids(lm: LanguageModel, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
    """Token ids of both sides of each pair, x1 first; a ValueError names pairs of unequal sides."""
    if not pairs:
        raise ValueError("pairs is empty: there is nothing to compare")
    texts = [side.render(lm) for pair in pairs for side in (pair.x1, pair.x0)]
    ids = lm.tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template has written any BOS
    sides = list(zip(ids[::2], ids[1::2], strict=True))
    lengths = [(pair.id, len(a), len(b)) for pair, (a, b) in zip(pairs, sides, strict=True)]
    unequal = [f"{name} ({a} and {b} tokens)" for name, a, b in lengths if a != b]
    if unequal:
        shown = "; ".join(unequal[:5]) + (" ..." if len(unequal) > 5 else "")
        raise ValueError(
            f"{len(unequal)} of {len(pairs)} pairs have sides of unequal length: {shown}. "
            "Choose words of equal token length, or drop these pairs."
        )
    require_room(lm, ids, names=[f"pair {pair.id!r}" for pair in pairs for _ in range(2)])
    return sides


def inputs_of(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> dict[str, Int[Tensor, "row pos"]]:
    """Rows of ids as the model takes them: padded on the left, so that each row's first token stands at 0."""
    if not rows or not all(rows):
        raise ValueError("rows must hold at least one row, and no row may be empty")
    pad, left = lm.tokenizer.pad_token_id, {"batch_first": True, "padding_side": "left"}
    ids = pad_sequence([torch.tensor(row) for row in rows], padding_value=pad, **left)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], **left)
    named = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return {name: tensor.to(lm.device) for name, tensor in named.items()}


def by_length(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of rows in batches of similar length, so that little is spent on padding.

    >>> list(by_length([[1, 1], [1], [1, 1]], 2))
    [[1, 0], [2]]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def padded(
    lm: LanguageModel, rows: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Indices of rows in batches of similar length, and the arguments that the model takes for them."""
    require_room(lm, rows)
    for index in by_length(rows, batch_size):
        yield index, {**inputs_of(lm, [rows[i] for i in index]), "use_cache": False}


@torch.no_grad()
def last_logits(
    lm: LanguageModel, texts: Sequence[str], *, batch_size: int = 128
) -> Float[Tensor, "text vocab"]:
    """Next-token logits after each rendered text, float32 on the CPU."""
    if not texts:
        raise ValueError("texts is empty: there is nothing to run")
    rows = [tokens(lm.tokenizer, text) for text in texts]
    out: dict[int, Tensor] = {}
    for index, inputs in padded(lm, rows, batch_size):
        logits = lm.model(**inputs, logits_to_keep=1).logits[:, -1].float().cpu()
        require_finite(lm, logits)
        out |= zip(index, logits, strict=True)
    return torch.stack([out[i] for i in range(len(rows))])


def own_stops(lm: LanguageModel) -> set[int]:
    """End marks that the model names for its generation."""
    own = getattr(lm.model.generation_config, "eos_token_id", None)
    return {int(i) for i in (own if isinstance(own, (list, tuple)) else [own]) if i is not None}


def stops(lm: LanguageModel) -> set[int]:
    """Tokens with which an answer is over: the model's own end marks, and what its template writes there."""
    return own_stops(lm) | frame(lm.tokenizer).stops


@torch.no_grad()
def continued(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
) -> list[list[int]]:
    """New token ids behind each row of a batch, up to and with the one that ends the answer.

    Of the settings that a model brings for its generation (a penalty, tokens it may not say, ...) only the
    end marks are taken over, so that what is generated agrees with the logits. ``processors`` change the
    logits before a word is chosen.
    """
    ends, inputs = stops(lm), inputs_of(lm, rows)
    del inputs["position_ids"]  # generate() counts them itself
    length = inputs["input_ids"].shape[1]

    def check(ids: Tensor, logits: Tensor) -> Tensor:
        if ids.shape[1] == length:  # at the first new token
            require_finite(lm, logits)
        return logits

    sampled = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, pad_token_id=lm.tokenizer.pad_token_id,
        eos_token_id=sorted(ends) or None, do_sample=temperature > 0, num_beams=1, **sampled,
    )  # fmt: skip
    brought = lm.model.generation_config
    lm.model.generation_config = GenerationConfig()  # generate() fills what is not set from the model's own
    try:
        new = lm.model.generate(
            **inputs, generation_config=settings, logits_processor=LogitsProcessorList([check, *processors])
        )[:, length:].tolist()
    finally:
        lm.model.generation_config = brought
    ended = [next((k for k, token in enumerate(row) if token in ends), len(row)) for row in new]
    return [row[: end + 1] for row, end in zip(new, ended, strict=True)]


def words(lm: LanguageModel, new: Sequence[int], prompt: str = "") -> str:
    """Generated ids as text, without end mark, header and mark-up; marks of thoughts stay.

    Also that of the thought which the template of the rendered prompt opens.
    """
    around = frame(lm.tokenizer)
    new = list(new[:-1]) if new and new[-1] in stops(lm) else list(new)
    header = tokens(lm.tokenizer, around.lead) if around.lead.strip() else []
    new = new[len(header) :] if new[: len(header)] == header else new
    thoughts = [mark for mark in around.control if chats.THOUGHT.fullmatch(mark)]
    kept = dict(zip(lm.tokenizer.convert_tokens_to_ids(thoughts), thoughts, strict=True))
    text = around.thinks(prompt)
    for is_mark, part in groupby(new, key=lambda token: token in kept):
        if is_mark:
            text += "".join(kept[token] for token in part)
        else:
            text += lm.tokenizer.decode(list(part), skip_special_tokens=True)
    return text.strip()


SMALL = 50_000_000  # weights, up to which a model is treated like the organism


@contextmanager
def faster(lm: LanguageModel) -> Iterator[None]:
    """Within, a large float32 model on a CPU multiplies in bfloat16, where the processor does that itself.

    For choices that are checked later, not for what is reported: products are rounded to three digits.
    """
    device, known = lm.device.type, torch.cpu.get_capabilities()
    able = known.get("avx512_bf16") or known.get("amx_bf16")
    large = lm.model.dtype == torch.float32 and lm.model.num_parameters() > SMALL
    # Without its cache, which would hand out weights from before a prune.
    use = bool(able and large and device == "cpu")
    with torch.autocast(device, torch.bfloat16, use, cache_enabled=False):
        yield


@torch.no_grad()
def generate(
    lm: LanguageModel,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 128,
) -> list[str]:
    """Continue each rendered text; only the new words are returned, markup left out (:func:`words`).

    Greedy at ``temperature`` 0; above, seeded sampling from the full distribution. The draw depends on the
    batch, so keep ``batch_size`` as well.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or positive")
    rows = [tokens(lm.tokenizer, text) for text in texts]
    require_room(lm, rows, new=max_new_tokens)
    out = [""] * len(rows)
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for index in by_length(rows, batch_size):
            batch = [rows[i] for i in index]
            new = continued(lm, batch, max_new_tokens=max_new_tokens, temperature=temperature)
            for i, row in zip(index, new, strict=True):
                out[i] = words(lm, row, texts[i])
    return out


IGNORE = -100


@dataclass(frozen=True)
class Row:
    """Token ids and which of them count in the loss."""

    ids: list[int]
    learn: list[bool]


@dataclass(frozen=True)
class Batch:
    """Rows as one tensor, padded on the right; ``labels`` is IGNORE where nothing is learnt."""

    ids: Int[Tensor, "row pos"]
    labels: Int[Tensor, "row pos"]


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Rows as one batch, padded on the right."""
    ids = [torch.tensor(row.ids) for row in rows]
    labels = [torch.where(torch.tensor(row.learn), own, IGNORE) for row, own in zip(rows, ids, strict=True)]
    return Batch(
        pad_sequence(ids, batch_first=True, padding_value=pad_id),
        pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    )


def chat_row(
    lm: LanguageModel, messages: Sequence[Message], *, prefill: str | None = None, end: bool = True
) -> Row:
    """One chat as a row, as the template writes it: only the last message, the assistant's, is learnt.

    ``prefill`` is the start of the answer that is given, not learnt; with ``end``, what the template writes
    behind an answer is learnt too. A ValueError where nothing is left to learn, for a control token, and
    where the template opens a thought.
    """
    *context, last = messages
    answer = last["content"]
    if last["role"] != "assistant" or not answer.strip():
        raise ValueError("messages must end with a non-empty assistant message")
    chats.require_plain(lm.tokenizer, answer, "the answer")
    written = chats.as_written(lm.tokenizer, answer)
    if prefill is not None:
        if not answer.startswith(prefill):
            raise ValueError(f"the answer must begin with prefill={prefill!r}")
        written = (written if written.startswith(prefill) else answer)[len(prefill) :]
    if not end and not written.strip():
        raise ValueError(f"nothing is left to learn of the answer behind prefill={prefill!r}")
    head, tail = split_tokens(lm, lm.render(context, prefill), written, end=end)
    return Row(head + tail, [False] * len(head) + [True] * len(tail))


@torch.no_grad()
def follow(
    lm: LanguageModel,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    skip: int = 0,
    end: bool = False,
    batch_size: int = 64,
) -> tuple[Float[Tensor, " prompt"], Bool[Tensor, " prompt"]]:
    """Force given answers: mean log-probability per token, in nats, and whether greedy decoding gives them.

    Greedy decoding writes an answer of which every token is the most probable one, so one pass tells. The
    first ``skip`` tokens of an answer are left out; ``end`` counts what the template writes behind it too.
    A ValueError where there are not as many answers as prompts, or an answer has no token left.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers; give one answer to each")
    rows, lengths = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        head, tail = split_tokens(lm, prompt, answer, end=end)
        if len(tail) <= skip:
            raise ValueError(f"the answer {answer!r} has no token left after skip={skip}")
        rows.append(head + tail)
        lengths.append(len(tail) - skip)
    logprob, greedy = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.bool)
    for index, inputs in padded(lm, rows, batch_size):
        keep = max(lengths[i] for i in index) + 1
        logits = lm.model(**inputs, logits_to_keep=keep).logits.float()[:, :-1]
        target = inputs["input_ids"][:, -(keep - 1) :]
        logp = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0].cpu()
        right = (logits.argmax(-1) == target).cpu()
        for i, row, hits in zip(index, logp, right, strict=True):
            require_finite(lm, row[-lengths[i] :])
            logprob[i], greedy[i] = row[-lengths[i] :].mean(), hits[-lengths[i] :].all()
    return logprob, greedy


def split_tokens(
    lm: LanguageModel, prompt: str, answer: str, *, end: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of a rendered prompt and of the answer that follows it, begun as the template begins one.

    Tokenised together where the prompt's ids are a prefix of the whole, as in training; apart
    otherwise (a tokenizer that merges across the seam). A ValueError where the template opens a thought.
    With ``end``, up to the mark with which the template ends the turn; the tokenizer's where it has none.
    """
    around = frame(lm.tokenizer)
    require_spoken(lm.tokenizer, prompt)
    text = (around.lead if around.begins(prompt) else "") + answer + (around.trail if end else "")
    head, whole = tokens(lm.tokenizer, prompt), tokens(lm.tokenizer, prompt + text)
    apart = whole[: len(head)] != head or len(whole) <= len(head)
    tail = tokens(lm.tokenizer, text) if apart else whole[len(head) :]
    return head, [*tail, lm.tokenizer.eos_token_id] if end and not around.trail else tail


def tolerance(lm: LanguageModel, exact: float = 1e-4) -> float:
    """How far two ways to the same logits may lie apart by rounding: ``exact`` in float32, more elsewhere."""
    return max(exact, 1e-5 * torch.finfo(lm.model.dtype).eps / torch.finfo(torch.float32).eps)
