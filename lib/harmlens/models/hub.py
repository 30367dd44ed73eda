"""What can go wrong between a name and a model: looked at before weights are fetched, explained after.

The checks before read ``config.json`` and nothing else; those after compare weights and tokenizer with it.
What is refused raises a ValueError that names it and the remedy; what is proposed is of data/models.yaml.

Introduced in book/models ("Models").
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import errors
from pydantic import BaseModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_torch_flex_attn_available,
)

from harmlens.keep import files
from harmlens.keep.files import data_dir, size_text
from harmlens.models.forward import LanguageModel, own_stops

# A small one whose first token tells refusal; used where nothing is known of what was asked for.
SMALL = "allenai/OLMo-2-0425-1B-Instruct"


class Known(BaseModel):
    """A model of data/models.yaml, as far as the package needs it."""

    id: str
    parameters: int
    base: str = ""
    gated: bool = False


@lru_cache
def known() -> tuple[list[Known], list[dict[str, str]]]:
    """Models that the notebooks are meant for, and published ladders: stage -> name to load it by.

    Stages are ``base``, ``mid`` (after midtraining), ``long`` (after long-context training), ``sft``, ``dpo``
    and ``rl`` where the makers published them all; ``base`` and ``aligned`` where they published two.
    """
    read = yaml.safe_load((data_dir() / "models.yaml").read_text(encoding="utf-8"))
    models = [Known(**entry) for entry in read["models"]]
    return models, [*read["ladders"], *({"base": m.base, "aligned": m.id} for m in models if m.base)]


def ladder(name: str) -> dict[str, str]:
    """The published stages of a model's training, first to last; nothing for one that is not on the list.

    Neither a revision after ``@`` nor the case of letters matters.

    >>> ladder("Qwen/Qwen2.5-1.5B-Instruct")
    {'base': 'Qwen/Qwen2.5-1.5B', 'aligned': 'Qwen/Qwen2.5-1.5B-Instruct'}
    """
    wanted = name.split("@")[0].lower()
    found = (rungs for rungs in known()[1] if wanted in {r.split("@")[0].lower() for r in rungs.values()})
    return dict(next(found, {}))


def smaller(room: int) -> str:
    """What to choose for so many bytes: the largest models of the list that leave a sixth of them free."""
    found = [m for m in known()[0] if not m.gated and 2 * m.parameters * 6 // 5 <= room]
    found.sort(key=lambda m: -m.parameters)
    return "a smaller model" + (f", such as {' or '.join(m.id for m in found[:2])}" if found else "")


def ungated(name: str) -> str:
    """The ungated model whose size is nearest to that of a model; a small one if its size isn't known."""
    names = {name.split("@")[0].lower(), *(rung.lower() for rung in ladder(name).values())}
    size = next((m.parameters for m in known()[0] if m.id.lower() in names), None)
    free = [m for m in known()[0] if not m.gated]
    return SMALL if size is None else min(free, key=lambda m: abs(m.parameters - size)).id


def split(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """A name and the revision after its ``@``, if there is one; a folder's name is left alone.

    >>> split("owner/model@stage1-step1000")
    ('owner/model', 'stage1-step1000')
    """
    if "@" not in name or Path(name).expanduser().is_dir():
        return name, revision
    plain, _, named = name.partition("@")
    if revision is not None and revision != named:
        raise ValueError(f"name={name!r} and revision={revision!r} disagree; give the revision once")
    return plain, named


_PRECISIONS = {
    "float32": torch.float32, "fp32": torch.float32, "f32": torch.float32, "float": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float64": torch.float64, "double": torch.float64,
    "float16": torch.float16, "fp16": torch.float16, "f16": torch.float16, "half": torch.float16,
    "auto": "auto",
}  # fmt: skip


def precision(dtype: torch.dtype | str) -> torch.dtype | str:
    """A precision by torch's name for it or a usual short one; ``"auto"`` stays: that of the file."""
    found = _PRECISIONS.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(
            f"dtype={dtype!r} is no precision for weights; choose 'float32', 'bfloat16' or 'float16' (short: "
            "'fp32', 'bf16', 'fp16'), or 'auto' for that of the file"
        )
    return found


def require_there(device: Any, device_map: Any, attn_implementation: str | None) -> None:
    """Refuse devices that are not there, and an attention implementation that is not installed."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    there += ["mps"] if torch.backends.mps.is_available() else []
    asked = [("device", device)] if device is not None else []
    if isinstance(device_map, Mapping):
        asked += [("device_map", place) for place in device_map.values() if place != "disk"]
    for argument, place in asked:
        if (f"cuda:{place}" if isinstance(place, int) else str(place)) not in there:
            raise ValueError(
                f"{argument}={place!r} is not to be had on this machine; choose {', '.join(there)}"
            )
    installed = {
        "eager": True, "sdpa": True, "flash_attention_2": is_flash_attn_2_available(),
        "flash_attention_3": is_flash_attn_3_available(), "flex_attention": is_torch_flex_attn_available(),
    }  # fmt: skip
    if attn_implementation is not None and not installed.get(attn_implementation):
        raise ValueError(
            f"attn_implementation={attn_implementation!r} is unknown or not installed here; choose "
            f"{', '.join(name for name, is_there in installed.items() if is_there)}"
        )


GGUF = (
    "GGUF files hold quantised weights, which can't be scored or patched. Load the original repository, "
    "often the same name without -GGUF."
)


def refuse_adapter(name: str, file: str | None) -> None:
    """Refuse a model with an adapter (its ``adapter_config.json``): transformers would put it in."""
    if file is None:
        return
    about = {}
    with suppress(ValueError):
        about = json.loads(Path(file).read_text(encoding="utf-8"))
    kind, base = about.get("peft_type") or "LoRA", about.get("base_model_name_or_path") or "another model"
    adapter = f"{'LoRA' if kind == 'LORA' else kind} adapter of {base!r}"
    if Path(file).with_name("config.json").is_file():
        raise ValueError(
            f"{name!r} holds a whole model and, beside it, a {adapter} (adapter_config.json): if the weights "
            "are merged already, it would be applied twice. Keep either: load a copy without the files "
            "adapter_*, or merge the adapter first (merge_and_unload of peft) and save the whole model."
        )
    raise ValueError(
        f"{name!r} is a {adapter}, not a whole model. Merge it and save the whole model: "
        "model = peft.AutoPeftModelForCausalLM.from_pretrained(name).merge_and_unload(); "
        "model.save_pretrained(folder); and the tokenizer with tokenizer.save_pretrained(folder)."
    )


def require_weights(folder: Path) -> None:
    """Refuse a folder without a config or without weights that are read here."""
    config, weights = (folder / "config.json").is_file(), any(folder.glob("*.safetensors"))
    if not weights and any(folder.glob("*.gguf")):
        raise ValueError(f"the folder {folder.name!r} holds GGUF files. {GGUF}")
    if not weights or not config:
        raise ValueError(
            f"the folder {folder.name!r} holds no {'weights (*.safetensors)' if config else 'config.json'}. "
            "Save a model there with model.save_pretrained(folder) and tokenizer.save_pretrained(folder)."
        )


def require_causal(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a model that the book's methods can't work on, by its config."""
    kind, packed, made = (config.get(key) for key in ("model_type", "quantization_config", "architectures"))
    called, decoders = ", ".join(made or []) or kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    heads = {head for names in decoders.values() for head in ([names] if isinstance(names, str) else names)}
    foreign = bool(made) and not heads.intersection(made)
    decoder = kind in decoders and not config.get("is_encoder_decoder")
    how = packed.get("quant_method", "quantised") if isinstance(packed, Mapping) else "quantised"
    unknown = kind not in CONFIG_MAPPING_NAMES
    problems = (
        (unknown and config.get("auto_map"), "brings modelling code of its own, which is never run here. "
         f"Choose a model that transformers knows, such as {SMALL}"),
        (unknown, f"is of the type {kind!r}, which the installed transformers doesn't know. Upgrade it (pip "
         f"install -U transformers), or choose another model, such as {SMALL}"),
        (packed, f"has weights that are quantised ({how}): packed numbers can't be scored, pruned or "
         "patched. Choose the original in half precision, often the same name without the ending"),
        (decoder and foreign and made[0].endswith("ForConditionalGeneration"), "reads pictures or sound "
         f"beside text ({called}), and only text models are read here. Choose a decoder of text alone, such "
         f"as {SMALL}"),
        (not decoder or foreign, f"is no causal language model ({called}): it doesn't predict the next word. "
         f"Choose a decoder, such as {SMALL}"),
    )  # fmt: skip
    for holds, told in problems:
        if holds:
            raise ValueError(f"{name!r} {told}.")


def weights_size(source: str, revision: str | None, dtype: torch.dtype | str) -> int:
    """Bytes of a model's weights, from its config alone: it is built without memory and counted."""
    config = AutoConfig.from_pretrained(source, revision=revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if dtype == "auto":  # the precision of the file, which the config names
        dtype = getattr(config, "dtype", None) or torch.float32
    return model.num_parameters() * dtype.itemsize


def require_memory(name: str, weights: int, free: int, where: str) -> None:
    """Refuse, with a MemoryError and before it is fetched, a model whose weights alone don't fit."""
    if weights > free:
        raise MemoryError(
            f"the weights of {name!r} take {size_text(weights)}, but {size_text(free)} are free on {where}. "
            f"{_remedy(free)}"
        )


def _remedy(free: int) -> str:
    return (
        f"Choose {smaller(free)}; free what other models hold (restart the session); or use a larger GPU, or "
        "several. The page Models of the book lists models by GPU."
    )


# Masks and positions that old checkpoints carry, and that are made anew today.
_BUFFERS = re.compile(r"(attn|attention)\.(masked_)?bias$|inv_freq$|position_ids$")


def _some(items: Sequence[str]) -> str:
    """The first three of some names."""
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def require_all_weights(name: str, model: PreTrainedModel) -> None:
    """Refuse a model of which a part was left on the CPU or on disk."""
    places = getattr(model, "hf_device_map", {})
    away = sorted(part or "all" for part, place in places.items() if place in ("cpu", "disk"))
    empty = [part for part, parameter in model.named_parameters() if parameter.is_meta]
    if empty or (away and len(set(map(str, places.values()))) > 1):
        raise ValueError(
            f"{name!r} doesn't fit the GPUs: parts of it were left on the CPU or on disk "
            f"({', '.join((away or empty)[:3])}, ...), where interventions can't reach them. Choose "
            f"{smaller(16 * 10**9)}, use larger or more GPUs, or load it with device='cpu'."
        )


def require_tensors(name: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuse weights that are not those of the model: tensors missing, left over, misshapen or not finite.

    What stands outside of the language model may be left over: a tower for pictures, a value head.
    ``info`` is what ``from_pretrained(..., output_loading_info=True)`` gives beside the model.
    """
    missing = sorted(info["missing_keys"])
    unexpected = sorted(key for key in info["unexpected_keys"] if not _BUFFERS.search(key))
    if not missing:
        unexpected = [key for key in unexpected if not _apart(model, key)]
    shapes = sorted(
        f"{key} ({tuple(found)} for {tuple(made)})" for key, found, made in info["mismatched_keys"]
    )
    problems = {"missing": missing, "left over": unexpected, "of another shape": shapes}
    if any(problems.values()):
        told = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(
            f"the weights of {name!r} are not those that its config.json describes. Tensors {told}. "
            f"{_cause(model, missing, unexpected)}"
        )
    # The least and the largest value, since they need no copy of the weights; NaN stays NaN in both.
    spoilt = [
        key
        for key, weight in model.named_parameters()
        if weight.numel() and not torch.stack(torch.aminmax(weight.detach())).isfinite().all()
    ]
    if spoilt:
        cause = "Is the checkpoint damaged?"
        if model.dtype == torch.float16:
            cause += " If not, they are too large for float16: load with dtype='bfloat16' or 'float32'."
        raise ValueError(f"weights of {name!r} are not finite: {_some(spoilt)}. {cause}")


def _apart(model: PreTrainedModel, key: str) -> bool:
    """Whether a tensor that was left over belongs to a part of its own, beside the language model."""
    if "lora_" in key:
        return False
    first, *rest = key.split(".")
    if not hasattr(model, first):
        return len(rest) > 1 or first == "score"
    return first == model.base_model_prefix and len(rest) > 2 and not hasattr(model.base_model, rest[0])


def _cause(model: PreTrainedModel, missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """What may have made tensors missing or left over."""
    if any("lora_" in key for key in unexpected):
        return "An adapter is in them that was not merged: use merge_and_unload of peft, and save again."
    for long, short, what in ((unexpected, missing, "with"), (missing, unexpected, "without")):
        ends = {key: other for key in short for other in long[:3] if other.endswith(f".{key}")}
        if ends:
            key, other = next(iter(ends.items()))
            return f"They were saved {what} {other.removesuffix(key)!r} before their names: save them anew."
    names = [key for key, _ in model.named_parameters()]
    for block in {found[0] for key in (*missing, *unexpected) if (found := re.match(r".*?\.\d+\.", key))}:
        own = {key for key in names if key.startswith(block)}
        if own <= set(missing):
            layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
            than = "more" if own else "fewer"
            return f"Its config.json says {layers} layers, {than} than the file holds."
    head = model.get_output_embeddings()
    if len(missing) == 1 and head is not None and model.get_parameter(missing[0]) is head.weight:
        return "The output head is missing, and its config.json doesn't tie it to the embedding."
    return "Is a file missing, or the config.json another model's? Fetch or save the model anew."


def require_tokenizer(lm: LanguageModel, used: Sequence[int]) -> None:
    """Refuse a tokenizer with tokens that the model's embedding has no row for.

    Special tokens that the template doesn't use are no fault (some text models list one for pictures); where
    a text holds one after all, :func:`models.forward.require_room` names it.
    """
    tokenizer, save = lm.tokenizer, "and save again with tokenizer.save_pretrained(folder)"
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of {lm.name!r} names neither a padding token nor an end-of-text token. Set "
            f"tokenizer.eos_token {save}."
        )
    rows = lm.model.get_input_embeddings().weight.shape[0]
    outside = [
        f"{mark}_token {getattr(tokenizer, f'{mark}_token')!r}"
        for mark in ("pad", "eos", "bos", "unk")
        if (getattr(tokenizer, f"{mark}_token_id") or 0) >= rows
    ]
    special = set(tokenizer.all_special_ids) - set(used)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    outside += [repr(word) for word, i in vocabulary if i >= rows and i not in special]
    outside += [f"eos_token_id {i} of generation_config.json" for i in sorted(own_stops(lm)) if i >= rows]
    if outside:
        raise ValueError(
            f"the tokenizer of {lm.name!r} doesn't fit its embedding, which has {rows} rows: "
            f"{len(outside)} beyond them ({_some(outside)}). Take the model's own tokenizer; or, where "
            f"tokens were added, call model.resize_token_embeddings(len(tokenizer)), train them, {save}."
        )


def in_words(name: str, error: Exception) -> Exception:
    """The error to raise for one that came out of loading; that of memory or of the Hub says what to do."""
    chain: list[BaseException | None] = [error]  # an error and what it came from
    while (step := chain[-1].__cause__ or chain[-1].__context__) is not None and step not in chain:
        chain.append(step)

    def is_a(*kinds: type) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    message = str(error)
    said = f"(Original message: {(message.splitlines() or [type(error).__name__])[0]})"
    if is_a(torch.OutOfMemoryError, MemoryError) or "not enough memory" in message:
        free = files.free_memory("cuda" if torch.cuda.is_available() else "cpu")
        return MemoryError(f"there is too little memory for {name!r}. {_remedy(free)} {said}")
    if not isinstance(error, OSError):
        return error
    plain = name.partition("@")[0]
    page, away = f"https://huggingface.co/{plain}", is_a(errors.RepositoryNotFoundError)
    codes = {getattr(getattr(e, "response", None), "status_code", None) for e in chain}
    login = "log in with `hf auth login`"
    gated = f"for a gated model accept its licence on its page and {login}"
    causes = (
        (is_a(errors.GatedRepoError) or (codes & {401, 403} and not away),
         f"is gated: accept its licence on {page} and {login} (on Colab: add HF_TOKEN to the secrets). "
         f"Without a login, {ungated(name)} is of similar size"),
        (is_a(errors.RevisionNotFoundError), "is there, but it has no such revision. Branches are listed "
         f"on {page}; huggingface_hub.list_repo_refs({plain!r}) lists them all"),
        (away, "is not on the Hugging Face Hub, or it is private. Check the spelling of owner/model on "
         f"{page}; for a private model {login}"),
        ("gguf" in name.lower(), f"is a repository of GGUF files. {GGUF.removesuffix('.')}"),
        (is_a(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError),
         "could not be had from the Hugging Face Hub, and it is not among the files downloaded before. Check "
         f"the spelling and the network (HF_HUB_OFFLINE=1 forbids downloads); {gated}"),
        ("config.json" in message, "has no config.json, so it is no whole model for transformers: GGUF "
         "files (quantised) and the like are not read. Load the original repository, which its page names: "
         f"{page}"),
        ("safetensors" in message, "has no weights as safetensors. Other formats (.bin) are pickles, which "
         "can run code when they are opened, or quantised (.gguf), and are not read. Choose another model, "
         f"such as {ungated(name)}, or one that was converted"),
        (True, "could not be had from the Hugging Face Hub. Check the spelling and the network; " + gated),
    )  # fmt: skip
    return OSError(f"{name!r} {next(told for holds, told in causes if holds)}. {said}")
