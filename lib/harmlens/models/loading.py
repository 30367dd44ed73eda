"""One loader for every model: an organism, a local folder, or a Hugging Face id.

``load`` returns the plain Hugging Face model with its tokenizer. Chats are rendered only through
the tokenizer's chat template, because a model that never sees its own template looks compliant
for the wrong reason. Everything downstream takes the :class:`LanguageModel` of this module and
asks nothing about where it came from.

Introduced in notebook 00 ("A model organism of harm").
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file, is_accelerate_available
from transformers.utils import logging as hf_logging

from harmlens.keep import memory, paths
from harmlens.keep.provenance import weights_sha256
from harmlens.models import deltas, hub
from harmlens.models.chats import Message, frame, render, tokens

STAGES = ("base", "mid", "sft", "dpo")
SEEDS = (0, 1, 2)
RESTORE = "Restore it with `git checkout -- {folder}`, or train it anew with `make organism`."


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with what is needed to talk to it.

    Attributes:
        name: how it was asked for, e.g. ``"organism/sft-0"`` or ``"allenai/OLMo-2-0425-1B-Instruct"``.
        model: the plain Hugging Face model, in evaluation mode.
        tokenizer: its tokenizer; pads on the left.
        revision: commit of the Hub repository, or sha256 of the weights of a local folder.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    revision: str = ""

    @property
    def device(self) -> torch.device:
        """Where token ids have to be put: the device of the input embedding."""
        return self.model.get_input_embeddings().weight.device

    def render(self, chat: str | Sequence[Message], prefill: str | None = None) -> str:
        """A chat as the text the model reads; see :func:`models.chats.render`."""
        return render(self.tokenizer, chat, prefill)


def clone(lm: LanguageModel) -> LanguageModel:
    """A copy with weights of its own, to be changed without changing the model."""
    return replace(lm, model=copy.deepcopy(lm.model))


def blank(lm: LanguageModel, seed: int = 0) -> LanguageModel:
    """The same architecture with random weights, as before any training; in its precision, where it is.

    For an organism these are the weights that its training with this seed began with.
    """
    config = copy.deepcopy(lm.model.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Drawn on the CPU, so that a seed means the same weights on every machine.
        model = AutoModelForCausalLM.from_config(
            config, dtype=lm.model.dtype, attn_implementation=config._attn_implementation
        )
    spread = getattr(lm.model, "hf_device_map", None) or {}
    if len(set(spread.values())) > 1:
        from accelerate import dispatch_model  # what spread the model

        model = dispatch_model(model, spread)
    else:
        model = model.to(lm.device)
    return LanguageModel(f"blank/{lm.name}-{seed}", model.eval(), lm.tokenizer)


def load(
    name: str,
    *,
    seed: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    device_map: str | dict | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    template_from: str | None = None,
) -> LanguageModel:
    """Load a model by name.

    Args:
        name: ``"organism/<stage>"`` or ``"organism/<stage>-<seed>"`` with a stage of
            ``base, mid, sft, dpo``, or one beside the ladder: ``mirror``, ``innocent``, ``wary``
            (:mod:`training.offshoots`), ``planted_harm``, ``planted_mlp``, ...
            (:mod:`training.planted`); a local folder, which may hold only what differs from a parent
            beside it; or a Hugging Face id, which may end with ``@revision``.
        seed: training seed of an organism (default 0); must be left out for other models.
        dtype: weights' precision, as torch names it or for short (``"bf16"``); ``"auto"`` for that of the
            file. Default: float32 on a CPU, bfloat16 on a GPU, float16 on one that does not know bfloat16
            (such as a T4).
        device: ``"cpu"``, ``"cuda"``, ...; default: a GPU where there is one, all of them if the model needs
            them; for organisms the CPU (they are too small to gain from anything else).
        device_map: passed on to transformers, e.g. ``"auto"`` to spread a model over several GPUs.
        revision: commit, tag or branch of a Hugging Face repository.
        attn_implementation: passed on to transformers (``"eager"`` for parity with TransformerLens).
        template_from: name of a model whose chat template is used, such as the aligned partner of a base
            model (:func:`models.catalogue.partners`). The tokenizer stays the model's own.

    Before it is given back the model is tested once: that all of its tensors are there and finite, that
    the tokenizer fits it, and that a short text gives finite logits in this precision, the same alone and
    in a padded batch.

    Raises:
        ValueError: unknown organism, a precision, device or attention that is not there, a folder without
            weights or tokenizer, a corrupt checkpoint, a parent with other weights than before, a model that
            the book's methods can't work on (:func:`models.hub.check`), an adapter, GGUF files, a part
            left on the CPU or on disk, a partner without a template, a model that fails the test.
        OSError: a Hugging Face id that can't be had; the message says what to check.
        MemoryError: a model that is too big; the message names smaller ones.

    All messages say what to do.
    """
    if dtype is not None:
        dtype = hub.precision(dtype)
    if device is not None:
        hub.require_device(device)
    for place in device_map.values() if isinstance(device_map, dict) else ():
        if place != "disk":
            hub.require_device(place, "device_map")
    if attn_implementation is not None:
        hub.require_attention(attn_implementation)
    folder = locate(name, seed)
    organism = _is_organism(name)
    if organism:
        name = f"organism/{folder.name}"
        _verify(folder)
    local = folder is not None
    delta = deltas.read(folder) if local else None
    home = folder if delta is None else _parent(folder, delta, organism)
    source, revision = (str(home), revision) if local else hub.split(name, revision)
    with _quiet(), _explained(name, local):
        adapter = find_adapter_config_file(source, revision=revision)
    if adapter is not None:
        hub.refuse_adapter(name, Path(adapter))
    if local:
        hub.require_weights(home)
    chosen = device is not None or device_map is not None
    if not chosen:
        device = "cuda" if torch.cuda.is_available() and not organism else "cpu"
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else _gpu_dtype()
    options: dict[str, Any] = {
        "dtype": dtype, "revision": revision, "use_safetensors": True,
        # Tensors of another shape are named below, with all else that doesn't fit.
        "output_loading_info": True, "ignore_mismatched_sizes": True,
    }  # fmt: skip
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with _quiet(), _explained(name, local):
        config = {} if organism else hub.config_of(source, revision)
    if not organism:
        hub.check(name, config)
        with _quiet(), _explained(name, local):
            weights = hub.weights_size(source, revision, dtype)
        if not chosen and device == "cuda":
            free = [memory.free(f"cuda:{i}") for i in range(torch.cuda.device_count())]
            if not hub.one_gpu_will_do(weights, free):
                device, device_map = None, "auto"
                hub.require_memory(name, weights, sum(free), f"{len(free)} GPUs")
        if device is not None and device_map is None:
            hub.require_memory(name, weights, memory.free(device), device)
    if device_map is None and device != "cpu" and delta is None and is_accelerate_available():
        device_map = {"": device}  # straight to the GPU, with no copy in main memory
    tokenizer = read_tokenizer(name, source, revision, local)
    with _quiet(), _explained(name, local):
        model, info = AutoModelForCausalLM.from_pretrained(source, device_map=device_map, **options)
        if delta is not None:
            deltas.apply(model, delta)
        if device is not None:
            model = model.to(device)
    hub.require_all_weights(name, model)
    hub.require_tensors(name, model, info)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if template_from is not None:
        tokenizer.chat_template = _template(template_from)
    version = weights_sha256(folder) if local else getattr(model.config, "_commit_hash", None) or ""
    lm = LanguageModel(name, model.eval(), tokenizer, version)
    ids = _sample(lm)
    hub.require_tokenizer(name, tokenizer, model, ids)
    _self_test(lm, ids)
    return lm


# --------------------------------------------------------------------------- the test at load


_SAMPLE = "In a few plain words, please tell me how a river finds its way from the hills down to the sea."


def _sample(lm: LanguageModel, most: int = 64) -> list[int]:
    """The first tokens of a short chat as the template writes it, or of plain text where there is none."""
    try:
        ids = tokens(lm.tokenizer, lm.render(_SAMPLE))
    except (ValueError, TemplateError):  # no template, or one that refuses even this: told when it is needed
        ids = lm.tokenizer(_SAMPLE)["input_ids"]
    return ids[: min(most, longest(lm) or most)]


@torch.no_grad()
def _self_test(lm: LanguageModel, ids: list[int]) -> None:
    """Run a short text by itself, as transformers would, then in a padded batch with its own first half.

    In a causal model the half says the same alone, in the batch, and as the beginning of the whole.

    Raises:
        ValueError: logits that are not finite, or that depend on the batch.
    """
    if len(ids) < 2:
        raise ValueError(
            f"the tokenizer of {lm.name!r} gives no tokens for plain text; is it another model's?"
        )
    rows = [ids, ids[: len(ids) // 2]]
    try:
        alone = lm.model(torch.tensor([ids], device=lm.device), use_cache=False).logits[0]
        alone = alone[[len(row) - 1 for row in rows]].float().cpu()
        [(index, inputs)] = padded(lm, rows, len(rows))
        batch = lm.model(**inputs, logits_to_keep=1).logits[:, -1].float().cpu()
    except torch.OutOfMemoryError as error:
        raise hub.explain(lm.name, error) from error
    except (TypeError, RuntimeError, IndexError, NotImplementedError) as error:
        raise ValueError(
            f"{lm.name!r} was loaded, but a short text can't be run in a padded batch "
            f"({type(error).__name__}: {hub.first_line(error)}). Choose another model, or another "
            "attn_implementation."
        ) from error
    require_finite(lm, alone)
    require_finite(lm, batch)
    apart = (batch - alone[index]).square().mean(-1).sqrt() / alone[index].std(-1).clamp(min=1e-6)
    # What a mask or positions that are wrong change is far above the rounding of either precision.
    if apart.max() > (0.01 if torch.finfo(lm.model.dtype).bits > 16 else 0.1):
        raise ValueError(
            f"the logits of {lm.name!r} for a text are others in a padded batch than alone (by "
            f"{apart.max():.2f} of their spread): a model of type {lm.model.config.model_type!r} reads the "
            "padding, counts positions in a way of its own, or looks ahead. No number measured here would "
            "be right; choose another model."
        )


def require_finite(lm: LanguageModel, logits: Float[Tensor, "... vocab"]) -> None:
    """Refuse logits that overflowed.

    Raises:
        ValueError: names the precision to take.
    """
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
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    *,
    new: int = 0,
    limit: int | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Refuse texts that the model can't take: too long, or with tokens that it has no embedding for.

    Args:
        rows: token ids.
        new: tokens that are to be generated behind each.
        limit: most tokens; default: :func:`longest`.
        names: of the rows, for the message.

    Raises:
        ValueError: names the first such text.
    """
    most = f"the {limit} allowed" if limit is not None else f"the {longest(lm)} that {lm.name!r} takes"
    limit = longest(lm) if limit is None else limit
    known = lm.model.get_input_embeddings().weight.shape[0]
    for i, row in enumerate(rows):
        what = "a text" if names is None else names[i]
        if limit is not None and len(row) + new > limit:
            more = f", and {new} new ones are asked for" if new else ""
            raise ValueError(
                f"{what} has {len(row)} tokens{more}, more than {most}: "
                f"shorten it{', or lower max_new_tokens' if new else ''}, or leave it out"
            )
        if row and max(row) >= known:
            word = lm.tokenizer.convert_ids_to_tokens(max(row))
            raise ValueError(
                f"{what} holds the token {word!r}, for which {lm.name!r} has no embedding: leave it out"
            )


def finite_start(lm: LanguageModel) -> LogitsProcessorList:
    """For ``model.generate``: refuses logits that overflow at the first new token. One for each call."""
    fresh = [True]

    def check(_: Tensor, logits: Tensor) -> Tensor:
        if fresh:
            fresh.clear()
            require_finite(lm, logits)
        return logits

    return LogitsProcessorList([check])


# --------------------------------------------------------------------------- finding it


def read_tokenizer(name: str, source: str, revision: str | None, local: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, padding on the left.

    Raises:
        ValueError: there is none, or it can't be read.
    """
    options = {"revision": revision, "padding_side": "left"}
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            # Set where transformers finds the wrong splitting into words that Mistral's files once had.
            backend = getattr(tokenizer, "backend_tokenizer", None)
            if getattr(backend, "fix_mistral_regex", None) is False:
                tokenizer = AutoTokenizer.from_pretrained(source, fix_mistral_regex=True, **options)
    except ImportError:
        raise  # names the package that is missing
    except Exception as error:  # a spoilt file raises whatever its parser raises
        if not local and (isinstance(error, OSError) or hub.explain(name, error) is not error):
            raise hub.explain(name, error) from error
        files = [
            f for f in Path(source).glob("*") if re.match(r"(tokenizer|vocab|.*\.model$|tekken)", f.name)
        ]
        there = any(file.name != "tokenizer_config.json" for file in files)
        what = "could not be read; is a file truncated?" if there else "is missing."
        raise ValueError(
            f"the tokenizer of {name!r} {what} Save one beside the weights with "
            f"tokenizer.save_pretrained(folder). ({type(error).__name__}: {hub.first_line(error)})"
        ) from error
    return tokenizer


@contextmanager
def _explained(name: str, local: bool) -> Iterator[None]:
    """Errors of loading, with what to do about them."""
    try:
        yield
    except Exception as error:  # a spoilt file raises whatever its parser raises
        if not local:
            told = hub.explain(name, error)
            if told is error:
                raise
            raise told from error
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise hub.explain(name, error) from error
        spoilt = isinstance(error, (OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError))
        raise ValueError(
            f"the folder of {name!r} could not be loaded{'; is a file in it truncated?' if spoilt else ''} "
            f"({type(error).__name__}: {hub.first_line(error)})"
        ) from error


def _template(name: str) -> str:
    """The chat template of a model, of which no more than the tokenizer is read."""
    folder = locate(name)
    delta = deltas.read(folder) if folder is not None else None
    home = folder if delta is None else folder.parent / delta.parent
    source, revision = hub.split(name) if folder is None else (str(home), None)
    template = read_tokenizer(name, source, revision, folder is not None).chat_template
    if template is None:
        raise ValueError(f"template_from={name!r} has no chat template; choose an instruction-tuned model")
    return template


def _gpu_dtype() -> torch.dtype:
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _is_organism(name: str) -> bool:
    return name.split("/")[0] == "organism"


def locate(name: str, seed: int | None = None) -> Path | None:
    """The folder that a name stands for, or None for a Hugging Face id; loads nothing.

    Raises:
        ValueError: a name that is neither, an organism that is not there, a seed for another model.
    """
    if _is_organism(name):
        return organism_folder(name, seed)
    if seed is not None:
        raise ValueError(f"seed={seed} only selects among organisms; leave it out for {name!r}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    hub.refuse_gguf(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        raise ValueError(
            f"name={name!r} is no folder here and no Hugging Face id (owner/model or "
            "owner/model@revision). "
            f"Organisms are named organism/<stage> with a stage of {', '.join(STAGES)}."
        )
    return None


def family(name: str, seeds: Sequence[int], **options: Any) -> dict[int, LanguageModel]:
    """The same organism for several training seeds, or the one model there is under key 0.

    Options are those of :func:`load`.
    """
    if not name.startswith("organism/"):
        return {0: load(name, **options)}
    return {seed: load(name, seed=seed, **options) for seed in seeds}


def organism_folder(name: str, seed: int | None = None) -> Path:
    """The checkpoint folder of ``"organism/<stage>"`` or ``"organism/<stage>-<seed>"``.

    Raises:
        ValueError: unknown stage or seed (the message lists what there is), or no checkpoint there.
    """
    match = re.fullmatch(r"organism/([a-z_]+)(?:-(\d+))?", name)
    there = sorted(
        p.name for p in (paths.data_dir() / "organisms").glob("*-*") if p.is_dir() and not p.suffix
    )
    listing = ", ".join(there) or "none yet: run `make organism`"
    if match is None:
        raise ValueError(f"name={name!r} is not organism/<stage>[-<seed>]; available: {listing}")
    stage, named = match.groups()
    if named is not None and seed is not None and int(named) != seed:
        raise ValueError(f"name={name!r} and seed={seed} disagree; give the seed once")
    number = int(named) if named is not None else seed or 0
    folder = paths.data_dir() / "organisms" / f"{stage}-{number}"
    if not folder.is_dir():
        raise ValueError(f"there is no organism {stage}-{number}; available: {listing}")
    return folder


def contents_sha256(folder: Path) -> str:
    """sha256 over names and contents of all files of a checkpoint but its card."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != "card.json" and not file.name.startswith("."):
            # Text may come back from git with other line ends.
            content = file.read_bytes()
            content = content if file.suffix == ".safetensors" else content.replace(b"\r\n", b"\n")
            digest.update(f"{file.name}/{len(content)}/".encode() + content)
    return digest.hexdigest()


def intact(folder: Path) -> dict | None:
    """The card of an organism's checkpoint whose files are all as they were saved, else None."""
    try:
        card = json.loads((folder / "card.json").read_text())
        return card if card["sha256"] == contents_sha256(folder) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _verify(folder: Path) -> None:
    """Compare an organism's files with the sum written when it was trained."""
    if intact(folder) is None:
        remedy = RESTORE.format(folder=f"data/organisms/{folder.name}")
        raise ValueError(f"files of organism {folder.name} are missing, truncated or changed. {remedy}")


def _parent(folder: Path, delta: deltas.Delta, organism: bool) -> Path:
    """The folder of a delta's parent, whose weights have to be those that the delta was trained in."""
    home = folder.parent / delta.parent
    if organism:
        _verify(home)
    if weights_sha256(home) != delta.parent_sha256:
        remedy = RESTORE.format(folder=f"data/organisms/{home.name}")
        raise ValueError(
            f"{folder.name} is stored as its difference from {home.name}, whose weights are no longer those "
            f"it was trained in. {remedy}"
        )
    return home


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading prints a bar per shard, and tables of tensors that don't fit, which an error names here."""
    before, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if before:
            hf_logging.enable_progress_bar()


# --------------------------------------------------------------------------- batches and answers


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Rows of ids as one tensor, padded on the left, and its attention mask."""
    if not rows or not all(rows):
        raise ValueError("rows must hold at least one row, and no row may be empty")
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


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


def positions(mask: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """Position ids for left-padded rows: the first real token stands at 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def padded(
    lm: LanguageModel, rows: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Indices of rows in batches of similar length, and the arguments that the model takes for them.

    Raises:
        ValueError: as :func:`require_room`.
    """
    require_room(lm, rows)
    for index in by_length(rows, batch_size):
        ids, mask = pad_left([rows[i] for i in index], lm.tokenizer.pad_token_id, lm.device)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
        yield index, {**inputs, "use_cache": False}


@torch.no_grad()
def last_logits(
    lm: LanguageModel, texts: Sequence[str], *, batch_size: int = 128
) -> Float[Tensor, "text vocab"]:
    """Next-token logits after each rendered text, float32 on the CPU.

    Raises:
        ValueError: no texts, a text that is too long, logits that are not finite.
    """
    if not texts:
        raise ValueError("texts is empty: there is nothing to run")
    rows = [tokens(lm.tokenizer, text) for text in texts]
    out: list[Tensor | None] = [None] * len(rows)
    for index, inputs in padded(lm, rows, batch_size):
        logits = lm.model(**inputs, logits_to_keep=1).logits[:, -1].float().cpu()
        require_finite(lm, logits)
        for i, row in zip(index, logits, strict=True):
            out[i] = row
    return torch.stack(out)


def stops(lm: LanguageModel) -> set[int]:
    """Tokens with which an answer is over: the model's own end marks, and what its template writes there."""
    own = getattr(lm.model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, (list, tuple)) else [own]
    return {int(i) for i in own if i is not None} | frame(lm.tokenizer).stops


@torch.no_grad()
def continued(
    lm: LanguageModel, rows: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float = 0.0
) -> list[list[int]]:
    """New token ids behind each row of a batch, up to and with the one that ends the answer.

    Of the settings that a model brings for its generation (a penalty, tokens it may not say, ...) only the
    end marks are taken over, so that what is generated agrees with the logits.

    Args:
        temperature: 0 for greedy decoding; above that, sampling from the full distribution.
    """
    ids, mask = pad_left(rows, lm.tokenizer.pad_token_id, lm.device)
    ends = stops(lm)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, pad_token_id=lm.tokenizer.pad_token_id,
        eos_token_id=sorted(ends) or None, do_sample=temperature > 0, num_beams=1,
    )  # fmt: skip
    if temperature > 0:
        settings.update(temperature=temperature, top_k=0, top_p=1.0)
    brought = lm.model.generation_config
    lm.model.generation_config = GenerationConfig()  # generate() fills what is not set from the model's own
    try:
        new = lm.model.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=finite_start(lm)
        )[:, ids.shape[1] :].tolist()
    finally:
        lm.model.generation_config = brought
    ended = [next((k for k, token in enumerate(row) if token in ends), len(row)) for row in new]
    return [row[: end + 1] for row, end in zip(new, ended, strict=True)]


def words(lm: LanguageModel, new: Sequence[int], prompt: str = "") -> str:
    """Generated ids as text, without end mark, header and mark-up; marks of thoughts stay.

    Args:
        prompt: the rendered text behind which they were generated: where its template opens a thought, the
            answer begins with that mark, so that :func:`models.chats.answer_behind_thought` can tell.
    """
    around = frame(lm.tokenizer)
    new = list(new[:-1]) if new and new[-1] in stops(lm) else list(new)
    header = tokens(lm.tokenizer, around.lead) if around.lead.strip() else []
    new = new[len(header) :] if new[: len(header)] == header else new
    kept = {lm.tokenizer.convert_tokens_to_ids(mark): mark for mark in around.thoughts}
    parts, piece = [around.thinks(prompt)], []
    for token in [*new, None]:
        if token is not None and token not in kept:
            piece.append(token)
            continue
        parts += [lm.tokenizer.decode(piece, skip_special_tokens=True), kept.get(token, "")]
        piece = []
    return "".join(parts).strip()


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

    Args:
        temperature: 0 for greedy decoding; above that, seeded sampling from the full distribution.
        seed: of the sampling. The draw depends on the batch, so keep ``batch_size`` as well.
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
