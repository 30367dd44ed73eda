"""What can go wrong between a name and a model: looked at before weights are fetched, explained after.

The checks before read a model's ``config.json`` and nothing else, so a model that can't be used is refused
before gigabytes are downloaded; those after compare the weights and the tokenizer that came with what the
config says. :mod:`models.loading` loads.

Introduced in book/models ("Models").
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from pydantic import BaseModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_torch_flex_attn_available,
)

from harmlens.keep import files
from harmlens.keep.files import data_dir, size_text

# A small one whose first token tells refusal; used where nothing is known of what was asked for.
SMALL = "allenai/OLMo-2-0425-1B-Instruct"


class Known(BaseModel):
    """A model of data/models.yaml, as far as the package needs it; the file says what the fields are."""

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

    A revision after ``@`` doesn't matter, nor does the case of letters (the Hub doesn't mind it either).

    >>> ladder("Qwen/Qwen2.5-1.5B-Instruct")
    {'base': 'Qwen/Qwen2.5-1.5B', 'aligned': 'Qwen/Qwen2.5-1.5B-Instruct'}
    """
    wanted = name.split("@")[0].lower()
    for rungs in known()[1]:
        if wanted in {rung.split("@")[0].lower() for rung in rungs.values()}:
            return dict(rungs)
    return {}


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

    Raises:
        ValueError: the revision is given twice, and differently.
    """
    if "@" not in name or Path(name).expanduser().is_dir():
        return name, revision
    plain, _, named = name.partition("@")
    if revision is not None and revision != named:
        raise ValueError(f"name={name!r} and revision={revision!r} disagree; give the revision once")
    return plain, named


# --------------------------------------------------------------------------- what was asked for


_SHORT = {
    "fp16": torch.float16, "f16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32,
    "f32": torch.float32,
}  # fmt: skip


def precision(dtype: torch.dtype | str) -> torch.dtype | str:
    """A precision by torch's name for it or a usual short one; ``"auto"`` stays: that of the file.

    >>> precision("bf16"), precision("half")
    (torch.bfloat16, torch.float16)

    Raises:
        ValueError: no precision that weights can be loaded in; lists the choices.
    """
    if dtype == "auto":
        return dtype
    plain = dtype.removeprefix("torch.") if isinstance(dtype, str) else ""
    found = _SHORT.get(plain, getattr(torch, plain, None)) if plain else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ValueError(
            f"dtype={dtype!r} is no precision for weights; choose 'float32', 'bfloat16' or 'float16' (short: "
            "'fp32', 'bf16', 'fp16'), or 'auto' for that of the file"
        )
    return found


def require_device(device: torch.device | str | int, argument: str = "device") -> None:
    """Refuse a device that is not there.

    Raises:
        ValueError: lists those that there are.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if torch.backends.mps.is_available():
        there.append("mps")
    name = f"cuda:{device}" if isinstance(device, int) else str(device)
    if name not in there:
        raise ValueError(f"{argument}={device!r} is not to be had on this machine; choose {', '.join(there)}")


def require_attention(name: str) -> None:
    """Refuse an attention implementation that is unknown or not installed.

    Raises:
        ValueError: lists those that there are.
    """
    extra = {
        "flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available,
        "flex_attention": is_torch_flex_attn_available,
    }  # fmt: skip
    there = ["eager", "sdpa", *(one for one, installed in extra.items() if installed())]
    own = name in ALL_ATTENTION_FUNCTIONS and not name.startswith(("flash_", "flex_", "paged"))
    if name not in there and not own:
        raise ValueError(
            f"attn_implementation={name!r} is unknown or not installed here; choose {', '.join(there)}"
        )


# --------------------------------------------------------------------------- before


_GGUF = (
    "GGUF files hold quantised weights, which can't be scored or patched. Load the original repository, "
    "often the same name without -GGUF."
)


def refuse_gguf(name: str) -> None:
    """Refuse a GGUF file by its name.

    Raises:
        ValueError: says what to load instead.
    """
    if name.lower().endswith(".gguf"):
        raise ValueError(f"{name!r} is a GGUF file. {_GGUF}")


def refuse_adapter(name: str, file: Path) -> None:
    """Refuse a model with an adapter, alone or beside whole weights: transformers would put it in.

    Args:
        file: its ``adapter_config.json``.

    Raises:
        ValueError: names its base and how to merge it.
    """
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        about = {}
    kind, base = about.get("peft_type") or "LoRA", about.get("base_model_name_or_path") or "another model"
    kind = "LoRA" if kind == "LORA" else kind
    if (file.parent / "config.json").is_file():
        raise ValueError(
            f"{name!r} holds a whole model and, beside it, a {kind} adapter of {base!r} "
            "(adapter_config.json): if the weights are merged already, it would be applied twice. Keep "
            "either: load a copy without the files adapter_*, or merge the adapter first (merge_and_unload "
            "of peft) and save the whole model."
        )
    raise ValueError(
        f"{name!r} is a {kind} adapter of {base!r}, not a whole model. Merge it and save the whole model: "
        "model = peft.AutoPeftModelForCausalLM.from_pretrained(name).merge_and_unload(); "
        "model.save_pretrained(folder); and the tokenizer with tokenizer.save_pretrained(folder)."
    )


def require_weights(folder: Path) -> None:
    """Refuse a folder without a config or without weights that are read here.

    Raises:
        ValueError: says what is missing, and how a model is saved.
    """
    weights = list(folder.glob("*.safetensors"))
    if not weights and list(folder.glob("*.gguf")):
        raise ValueError(f"the folder {folder.name!r} holds GGUF files. {_GGUF}")
    for there, what in (
        ((folder / "config.json").is_file(), "config.json"),
        (weights, "weights (*.safetensors)"),
    ):
        if not there:
            raise ValueError(
                f"the folder {folder.name!r} holds no {what}. Save a model there with "
                "model.save_pretrained(folder) and tokenizer.save_pretrained(folder)."
            )


def config_of(source: str, revision: str | None = None) -> dict[str, Any]:
    """A model's config.json as it is; no code of the model's page is run. Raises what the Hub raises."""
    return PretrainedConfig.get_config_dict(source, revision=revision)[0]


def check(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a model that the book's methods can't work on.

    Raises:
        ValueError: the model needs code of its own, is quantised, or is no causal language model.
    """
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING_NAMES:
        if config.get("auto_map"):
            raise ValueError(
                f"{name!r} brings modelling code of its own, which is never run here. Choose a model that "
                f"transformers knows, such as {SMALL}."
            )
        raise ValueError(
            f"{name!r} is of the type {kind!r}, which the installed transformers doesn't know. Upgrade it "
            f"(pip install -U transformers), or choose another model, such as {SMALL}."
        )
    packed = config.get("quantization_config")
    if packed:
        how = packed.get("quant_method", "quantised") if isinstance(packed, Mapping) else "quantised"
        raise ValueError(
            f"the weights of {name!r} are quantised ({how}): packed numbers can't be scored, pruned or "
            "patched. Choose the original in half precision, often the same name without the ending."
        )
    heads = {
        head
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for head in ([names] if isinstance(names, str) else names)
    }
    made = config.get("architectures") or []
    decoder = not config.get("is_encoder_decoder") and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if decoder and made and made[0].endswith("ForConditionalGeneration") and not heads.intersection(made):
        raise ValueError(
            f"{name!r} reads pictures or sound beside text ({', '.join(made)}), and only text models are "
            f"read here. Choose a decoder of text alone, such as {SMALL}."
        )
    if (
        config.get("is_encoder_decoder")
        or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or (made and not heads.intersection(made))
    ):
        raise ValueError(
            f"{name!r} is no causal language model ({', '.join(made) or kind}): it doesn't predict the next "
            f"word. Choose a decoder, such as {SMALL}."
        )


# --------------------------------------------------------------------------- memory


def weights_size(source: str, revision: str | None, dtype: torch.dtype | str) -> int:
    """Bytes of a model's weights, from its config alone: it is built without memory and counted."""
    config = AutoConfig.from_pretrained(source, revision=revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if isinstance(dtype, str):  # "auto" is the precision of the file, which the config names
        dtype = getattr(torch, dtype) if dtype != "auto" else getattr(config, "dtype", None) or torch.float32
    return model.num_parameters() * dtype.itemsize


def one_gpu_will_do(weights: int, free: Sequence[int]) -> bool:
    """Whether a model should go to the first GPU: it leaves a sixth of it for work, or there is no other.

    Args:
        weights: bytes of the model.
        free: bytes that can be had on each GPU.
    """
    return len(free) < 2 or weights * 6 // 5 <= free[0]


def require_memory(name: str, weights: int, free: int, where: str) -> None:
    """Refuse, before it is fetched, a model whose weights alone don't fit.

    Raises:
        MemoryError: with the need, what is free, and smaller models.
    """
    if weights > free:
        raise MemoryError(
            f"the weights of {name!r} take {size_text(weights)}, but {size_text(free)} are free on {where}. "
            f"{remedy(free)}"
        )


def remedy(free: int) -> str:
    """What to do when a model is too big: smaller ones of the list, or a larger machine."""
    return (
        f"Choose {smaller(free)}; free what other models hold (restart the session); or use a larger GPU, or "
        "several. The page Models of the book lists models by GPU."
    )


def require_all_weights(name: str, model: PreTrainedModel) -> None:
    """Refuse a model of which a part was left on the CPU or on disk.

    Raises:
        ValueError: names the parts and smaller models.
    """
    places = getattr(model, "hf_device_map", None) or {}
    away = sorted(part or "all" for part, place in places.items() if place in ("cpu", "disk"))
    mixed = away and len(set(map(str, places.values()))) > 1
    empty = [part for part, parameter in model.named_parameters() if parameter.is_meta]
    if mixed or empty:
        parts = (away or empty)[:3]
        raise ValueError(
            f"{name!r} doesn't fit the GPUs: parts of it were left on the CPU or on disk "
            f"({', '.join(parts)}, ...), where interventions can't reach them. Choose "
            f"{smaller(16 * 10**9)}, use larger or more GPUs, or load it with device='cpu'."
        )


# --------------------------------------------------------------------------- what was loaded


# Masks and positions that old checkpoints carry, and that are made anew today.
_BUFFERS = re.compile(r"(attn|attention)\.(masked_)?bias$|inv_freq$|position_ids$")


def require_tensors(name: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuse weights that are not those of the model: tensors missing, left over, misshapen or not finite.

    What stands outside of the language model may be left over: a tower for pictures, a value head.

    Args:
        info: what ``from_pretrained(..., output_loading_info=True)`` gives beside the model.

    Raises:
        ValueError: names up to three tensors and what may have made them so.
    """
    missing = sorted(info["missing_keys"])
    unexpected = sorted(key for key in info["unexpected_keys"] if not _BUFFERS.search(key))
    if not missing:
        unexpected = [key for key in unexpected if not _apart(model, key)]
    shapes = [
        f"{key} ({tuple(found)} for {tuple(made)})"
        for key, found, made in sorted(info["mismatched_keys"], key=lambda entry: entry[0])
    ]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        for keys, what in ((missing, "missing"), (unexpected, "left over"), (shapes, "of another shape"))
        if keys
    ]
    if problems:
        raise ValueError(
            f"the weights of {name!r} are not those that its config.json describes. Tensors "
            f"{'; '.join(problems)}. {_cause(model, missing, unexpected)}"
        )
    spoilt = [key for key, weight in model.named_parameters() if not _finite(weight)]
    if spoilt:
        cause = "Is the checkpoint damaged?"
        if model.dtype == torch.float16:
            cause += " If not, they are too large for float16: load with dtype='bfloat16' or 'float32'."
        raise ValueError(
            f"weights of {name!r} are not finite: {', '.join(spoilt[:3])}"
            f"{', ...' if len(spoilt) > 3 else ''}. {cause}"
        )


def _finite(weight: torch.Tensor) -> bool:
    """Whether a tensor is finite, with no copy of it; NaN stays NaN in a minimum."""
    return not weight.numel() or bool(torch.stack(torch.aminmax(weight.detach())).isfinite().all())


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
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    blocks = {found[0] for key in (*missing, *unexpected) if (found := re.match(r".*?\.\d+\.", key))}
    names = [key for key, _ in model.named_parameters()]
    for block in blocks:
        own = [key for key in names if key.startswith(block)]
        if set(own) <= set(missing):
            than = "more" if own else "fewer"
            return f"Its config.json says {layers} layers, {than} than the file holds."
    head = model.get_output_embeddings()
    if len(missing) == 1 and head is not None and model.get_parameter(missing[0]) is head.weight:
        return "The output head is missing, and its config.json doesn't tie it to the embedding."
    return "Is a file missing, or the config.json another model's? Fetch or save the model anew."


def require_tokenizer(
    name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, used: Sequence[int]
) -> None:
    """Refuse a tokenizer that doesn't fit the model: tokens that the embedding has no row for.

    Special tokens beyond it that nothing uses are no fault (some text models list one for pictures); where
    a text holds one after all, :func:`models.forward.require_room` names it.

    Args:
        used: ids of a text as the chat template writes it.

    Raises:
        ValueError: names tokens or marks, and the remedy.
    """
    save = "and save again with tokenizer.save_pretrained(folder)"
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of {name!r} names neither a padding token nor an end-of-text token. Set "
            f"tokenizer.eos_token {save}."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    marks = {mark: getattr(tokenizer, f"{mark}_token_id") for mark in ("pad", "eos", "bos", "unk")}
    outside = [f"{mark}_token {getattr(tokenizer, f'{mark}_token')!r}" for mark, i in marks.items()
               if i is not None and i >= rows]  # fmt: skip
    special = set(tokenizer.all_special_ids) - set(used)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    outside += [repr(word) for word, i in vocabulary if i >= rows and i not in special]
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    outside += [
        f"eos_token_id {i} of generation_config.json"
        for i in ([] if ends is None else ends if isinstance(ends, list) else [ends])
        if i >= rows
    ]
    if outside:
        raise ValueError(
            f"the tokenizer of {name!r} doesn't fit its embedding, which has {rows} rows: "
            f"{len(outside)} beyond them ({', '.join(outside[:3])}{', ...' if len(outside) > 3 else ''}). "
            "Take the model's own tokenizer; or, where tokens were added, call "
            f"model.resize_token_embeddings(len(tokenizer)), train them, {save}."
        )


# --------------------------------------------------------------------------- explaining


def explain(name: str, error: BaseException) -> Exception:
    """The error to raise for one that came out of loading a model of the Hub; says what to do.

    A ``MemoryError`` for too little memory, an ``OSError`` for what can't be had; others come back as they
    are.
    """
    chain = list(_chain(error))
    said = f"(Original message: {first_line(error)})"
    page = f"https://huggingface.co/{name.partition('@')[0]}"

    def is_a(*kinds: type) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    if is_a(torch.OutOfMemoryError, MemoryError) or "not enough memory" in str(error):
        free = files.free_memory("cuda" if torch.cuda.is_available() else "cpu")
        return MemoryError(f"there is too little memory for {name!r}. {remedy(free)} {said}")
    if not isinstance(error, OSError):
        return error if isinstance(error, Exception) else RuntimeError(str(error))
    codes = {
        e.response.status_code for e in chain if isinstance(e, HfHubHTTPError) and e.response is not None
    }
    if is_a(GatedRepoError) or (codes & {401, 403} and not is_a(RepositoryNotFoundError)):
        return OSError(
            f"{name!r} is gated: accept its licence on {page} and log in with `hf auth login` (on Colab: add "
            f"HF_TOKEN to the secrets). Without a login, {ungated(name)} is of similar size. {said}"
        )
    if is_a(RevisionNotFoundError):
        return OSError(
            f"{name!r}: the model is there, but it has no such revision. Branches are listed on {page}; "
            f"huggingface_hub.list_repo_refs({name.partition('@')[0]!r}) lists them all. {said}"
        )
    if is_a(RepositoryNotFoundError):
        return OSError(
            f"there is no {name!r} on the Hugging Face Hub, or it is private. Check the spelling of "
            f"owner/model on {page}; for a private model log in with `hf auth login`. {said}"
        )
    if "gguf" in name.lower():
        return OSError(f"{name!r} is a repository of GGUF files. {_GGUF} {said}")
    if is_a(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        return OSError(
            f"{name!r} could not be had from the Hugging Face Hub, and it is not among the files downloaded "
            "before. Check the spelling and the network (HF_HUB_OFFLINE=1 forbids downloads); for a gated "
            f"model accept its licence on its page and log in with `hf auth login`. {said}"
        )
    if "config.json" in str(error):
        return OSError(
            f"{name!r} has no config.json, so it is no whole model for transformers: GGUF files (quantised) "
            f"and the like are not read. Load the original repository, which its page names: {page}. {said}"
        )
    if "safetensors" in str(error):
        return OSError(
            f"{name!r} has no weights as safetensors. Other formats (.bin) are pickles, which can run code "
            "when they are opened, or quantised (.gguf), and are not read. Choose another model, such as "
            f"{ungated(name)}, or one that was converted. {said}"
        )
    return OSError(
        f"{name!r} could not be had from the Hugging Face Hub. Check the spelling and the network; "
        f"for a gated model accept its licence on its page and log in with `hf auth login`. {said}"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
