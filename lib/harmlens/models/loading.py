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
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file, is_accelerate_available
from transformers.utils import logging as hf_logging

from harmlens.keep.files import data_dir, free_memory, weights_sha256
from harmlens.models import deltas, hub
from harmlens.models.chats import tokens
from harmlens.models.forward import LanguageModel, longest, padded, require_finite

STAGES = ("base", "mid", "sft", "dpo")
SEEDS = (0, 1, 2)
RESTORE = "Restore it with `git checkout -- {folder}`, or train it anew with `make organism`."


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
            (:mod:`training.organism`), ``planted_harm``, ``planted_mlp``, ...
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
            model (:func:`models.hub.ladder`). The tokenizer stays the model's own.

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
            free = [free_memory(f"cuda:{i}") for i in range(torch.cuda.device_count())]
            if not hub.one_gpu_will_do(weights, free):
                device, device_map = None, "auto"
                hub.require_memory(name, weights, sum(free), f"{len(free)} GPUs")
        if device is not None and device_map is None:
            hub.require_memory(name, weights, free_memory(device), device)
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
    there = sorted(p.name for p in (data_dir() / "organisms").glob("*-*") if p.is_dir() and not p.suffix)
    listing = ", ".join(there) or "none yet: run `make organism`"
    if match is None:
        raise ValueError(f"name={name!r} is not organism/<stage>[-<seed>]; available: {listing}")
    stage, named = match.groups()
    if named is not None and seed is not None and int(named) != seed:
        raise ValueError(f"name={name!r} and seed={seed} disagree; give the seed once")
    number = int(named) if named is not None else seed or 0
    folder = data_dir() / "organisms" / f"{stage}-{number}"
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
