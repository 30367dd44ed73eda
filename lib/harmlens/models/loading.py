"""One loader for every model: an organism, a local folder, or a Hugging Face id.

Nothing that takes a loaded model asks where it came from.

Introduced in notebook 00 ("A model organism of harm").
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import is_accelerate_available

from harmlens.keep import files
from harmlens.keep.files import weights_sha256
from harmlens.models import hub, organisms
from harmlens.models.chats import tokens
from harmlens.models.forward import LanguageModel, longest, padded, require_finite
from harmlens.models.organisms import STAGES, organism_folder

# Names of stages in the order of training; "aligned" where makers published one model after the base.
ORDER = ("base", "mid", "long", "sft", "dpo", "rl", "aligned")
T = TypeVar("T")


def load(
    name: str,
    *,
    seed: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    template_from: str | None = None,
) -> LanguageModel:
    """Load a model by name, and test it once.

    The test: all of its tensors are there and finite, the tokenizer fits it, and a short text gives finite
    logits in this precision, the same alone and in a padded batch.

    Args:
        name: ``"organism/<stage>"`` or ``"organism/<stage>-<seed>"``; a local folder, which may hold what
            differs from a parent beside it only; or a Hugging Face id, which may end with ``@`` and a commit,
            tag or branch.
        seed: training run of what was trained several times (default 0): an organism, or ``folder`` where
            there are ``folder-0``, ``folder-1``, ... instead. Must be left out for other models.
        dtype: weights' precision, as torch names it or for short (``"bf16"``); ``"auto"`` for that of the
            file. Default: what HARMLENS_DTYPE names, but for organisms; else float32 on a CPU, bfloat16 on a
            GPU, float16 on one that does not know bfloat16.
        device: ``"auto"`` for all GPUs together. Default: a GPU where there is one, all if the model needs
            them; for organisms the CPU (they are too small to gain from anything else).
        template_from: a model whose chat template is used, such as the aligned partner of a base model.

    Raises:
        ValueError: an argument, a folder, a checkpoint or a model that can't be used (:mod:`models.hub`).
        OSError: a Hugging Face id that can't be had; the message says what to check.
        MemoryError: a model that is too big; the message names smaller ones.
    """
    organism, chosen = _is_organism(name), device is not None
    usual = "cuda" if torch.cuda.is_available() and not organism else "cpu"
    device = str(device) if chosen else usual
    hub.require_there(device)
    if dtype is None and not organism:
        dtype = os.environ.get("HARMLENS_DTYPE") or None
    dtype = hub.precision(dtype, device)
    folder, delta = locate(name, seed), None
    local, (source, revision) = folder is not None, hub.split(name)
    if local:
        name = f"organism/{folder.name}" if organism else name
        source, delta = organisms.opened(folder, organism)
    hub.require_files(name, source, revision, local)
    if not organism:
        with hub.explained(name, local):
            config, _ = PretrainedConfig.get_config_dict(source, revision=revision)
        hub.require_causal(name, config)
        with hub.explained(name, local):
            weights = hub.weights_size(source, revision, dtype)
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        # A sixth of the first GPU is left for work.
        if not chosen and len(gpus) > 1 and weights * 6 // 5 > files.free_memory(gpus[0]):
            device = "auto"
        places = gpus if device == "auto" else [device]
        hub.require_memory(name, weights, sum(map(files.free_memory, places)), ", ".join(places))
    device_map = {"": device}  # straight to the GPU, with no copy in main memory
    if device == "cpu" or delta is not None or not is_accelerate_available():
        device_map = None
    tokenizer = read_tokenizer(name, source, revision)
    with hub.explained(name, local):
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, revision=revision, use_safetensors=True,
            device_map="auto" if device == "auto" else device_map,
            # Tensors of another shape are named below, with all else that doesn't fit.
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
        if delta is not None:
            organisms.apply_delta(model, delta)
        if device != "auto":
            model = model.to(device)
    hub.require_whole(name, model, info)
    if template_from is not None:
        tokenizer.chat_template = _template(template_from)
    version = weights_sha256(folder) if local else getattr(model.config, "_commit_hash", None) or ""
    lm = LanguageModel(name, model.eval(), tokenizer, version)
    _self_test(lm)
    return lm


def locate(name: str, seed: int | None = None) -> Path | None:
    """The folder that a name stands for, or None for a Hugging Face id; a ValueError for what is neither."""
    if _is_organism(name):
        return organism_folder(name, seed)
    folder = Path(name).expanduser()
    if in_runs(name):
        of_run = folder.with_name(f"{folder.name}-{seed or 0}")
        if not of_run.is_dir():
            there = ", ".join(sorted(found.name for found in folder.parent.glob(f"{folder.name}-*/")))
            raise ValueError(f"seed={seed or 0}: there is no {of_run.name}, only {there}")
        return of_run
    if seed is not None:
        raise ValueError(f"seed={seed} only selects among training runs; leave it out for {name!r}")
    if folder.is_dir():
        return folder
    if name.lower().endswith(".gguf"):
        raise ValueError(f"{name!r} is a GGUF file. {hub.GGUF}.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        raise ValueError(
            f"name={name!r} is no folder here and no Hugging Face id (owner/model or "
            "owner/model@revision). "
            f"Organisms are named organism/<stage> with a stage of {', '.join(STAGES)}."
        )
    return None


def in_runs(name: str) -> bool:
    """Whether a name stands for several training runs: an organism, or a folder that is there with numbers.

    ``models/sft`` does where there are ``models/sft-0``, ``models/sft-1``, ... and no ``models/sft``.
    """
    return _is_organism(name) or files.numbered(Path(name).expanduser())


def stages(model: str, only: Sequence[str] | None = None, *, least: int = 0) -> dict[str, str]:
    """The stages of a model's training, from base to the last: stage -> name to load it by.

    For a local folder called like a stage (``my_model/sft``) they are the folders beside it that are called
    so; for a model of the Hub the partners that its makers published, as far as data/models.yaml lists them.
    ``only`` some of them, but all where fewer of those than ``least`` are there; a ValueError, which says
    which models have a ladder, where there are fewer than ``least`` at all.

    >>> stages("organism/sft", ["base", "dpo"])
    {'base': 'organism/base', 'dpo': 'organism/dpo'}
    """
    home = Path(model).expanduser().resolve()
    if _is_organism(model):
        found = {stage: f"organism/{stage}" for stage in STAGES}
    elif home.is_dir() or in_runs(str(home)):
        beside = {stage: home.with_name(stage) for stage in ORDER if home.name in ORDER}
        found = {stage: str(f) for stage, f in beside.items() if f.is_dir() or in_runs(str(f))}
    else:
        wanted = model.split("@")[0].lower()
        ids = ((rungs, {name.split("@")[0].lower() for name in rungs.values()}) for rungs in hub.known()[1])
        found = next((rungs for rungs, names in ids if wanted in names), {})
    if len(found) < least:
        last = [f"{list(rungs.values())[-1]} ({', '.join(rungs)})" for rungs in hub.known()[1]]
        raise ValueError(
            f"model={model!r} has no known ladder: there is no earlier stage to compare it with. Models that "
            f"have one: organism/dpo; {'; '.join(last[:7])}; and others of the book's page Models. Or name a "
            f"folder that is called like a stage ({', '.join(ORDER)}) and has another one beside it."
        )
    chosen = {stage: name for stage, name in found.items() if only is None or stage in only}
    return chosen if len(chosen) >= least else found


def at_stage(model: str, stage: str, seed: int, measure: Callable[[LanguageModel], T]) -> T:
    """What a function says of one stage, which is loaded for it and gone afterwards: it must not keep it.

    Stages of a real model read the chat template of the last one, so that all read the same text. A
    ValueError where the model has no such stage.
    """
    found = stages(model)
    if stage not in found:
        there = ", ".join(found) or "none are known"
        raise ValueError(f"stage={stage!r} is not on the ladder of {model!r}; there: {there}")
    name = found[stage]
    own = {"seed": seed} if in_runs(name) else {"template_from": list(found.values())[-1]}
    lm = load(name, **own)
    try:
        return measure(lm)
    finally:
        del lm
        gc.collect()  # models hold cycles
        torch.cuda.empty_cache()


_SAMPLE = "In a few plain words, please tell me how a river finds its way from the hills down to the sea."


@torch.no_grad()
def _self_test(lm: LanguageModel, most: int = 64) -> None:
    """Run a short chat by itself, as transformers would, then in a padded batch with its own first half.

    In a causal model the half says the same alone, in the batch, and as the beginning of the whole.
    """
    try:
        ids = tokens(lm.tokenizer, lm.render(_SAMPLE))
    except (ValueError, TemplateError):  # no template, or one that refuses even this: told when it is needed
        ids = lm.tokenizer(_SAMPLE)["input_ids"]
    ids = ids[: min(most, longest(lm) or most)]
    hub.require_tokenizer(lm, ids)
    rows = [ids, ids[: len(ids) // 2]]
    said = f"{lm.name!r} was loaded, but a short text can't be run in a padded batch. Choose another model."
    with hub.explained(lm.name, True, said):
        alone = lm.model(torch.tensor([ids], device=lm.device), use_cache=False).logits[0]
        alone = alone[[len(row) - 1 for row in rows]].float().cpu()
        [(index, inputs)] = padded(lm, rows, len(rows))
        batch = lm.model(**inputs, logits_to_keep=1).logits[:, -1].float().cpu()
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


def _is_organism(name: str) -> bool:
    return name.split("/")[0] == "organism"


def read_tokenizer(name: str, source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, padding on the left; a ValueError where there is none that can be read."""
    options = {"revision": revision, "padding_side": "left"}
    names = [f.name for f in Path(source).glob("*") if f.name != "tokenizer_config.json"]
    there = any(re.match(r"(tokenizer|vocab|.*\.model$|tekken)", name) for name in names)
    said = (
        f"the tokenizer of {name!r} {'could not be read; is a file truncated?' if there else 'is missing.'} "
        "Save one beside the weights with tokenizer.save_pretrained(folder)."
    )
    with hub.explained(name, Path(source).is_dir(), said):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        # Set where transformers finds the wrong splitting into words that Mistral's files once had.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if getattr(backend, "fix_mistral_regex", None) is False:
            tokenizer = AutoTokenizer.from_pretrained(source, fix_mistral_regex=True, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _template(name: str) -> str:
    """The chat template of a model, of which no more than the tokenizer is read."""
    folder, (source, revision) = locate(name), hub.split(name)
    if folder is not None:
        source, _ = organisms.opened(folder, _is_organism(name))
    template = read_tokenizer(name, source, revision).chat_template
    if template is None:
        raise ValueError(f"template_from={name!r} has no chat template; choose an instruction-tuned model")
    return template
