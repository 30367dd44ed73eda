"""What can go wrong between a name and a model: looked at before weights are fetched, explained after.

The checks before read ``config.json`` and nothing else; those after compare weights and tokenizer with it.
What is refused raises a ValueError that names it and the remedy; what is proposed is of data/models.yaml.

Introduced in book/models ("Models").
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as hf_logging

from harmlens.keep import files
from harmlens.keep.files import data_dir, size_text
from harmlens.models.forward import LanguageModel, own_stops

# A small one whose first token tells refusal; used where nothing is known of what was asked for.
SMALL = "allenai/OLMo-2-0425-1B-Instruct"


@lru_cache
def known() -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Models that the notebooks are meant for, and published ladders: stage -> name to load it by.

    Stages are ``base``, ``mid`` (after midtraining), ``long`` (after long-context training), ``sft``, ``dpo``
    and ``rl`` where the makers published them all; ``base`` and ``aligned`` where they published two.
    """
    read = yaml.safe_load((data_dir() / "models.yaml").read_text(encoding="utf-8"))
    two = [{"base": model["base"], "aligned": model["id"]} for model in read["models"] if "base" in model]
    return read["models"], read["ladders"] + two


def smaller(room: int) -> str:
    """What to choose for so many bytes: the largest models of the list that leave a sixth of them free."""
    found = [m for m in known()[0] if not m.get("gated") and 2 * m["parameters"] * 6 // 5 <= room]
    found.sort(key=lambda m: -m["parameters"])
    return "a smaller model" + (f", such as {' or '.join(m['id'] for m in found[:2])}" if found else "")


def split(name: str) -> tuple[str, str | None]:
    """A name and the revision after its ``@``, if there is one; a folder's name is left alone.

    >>> split("owner/model@stage1-step1000")
    ('owner/model', 'stage1-step1000')
    """
    plain, at, revision = name.partition("@")
    return (plain, revision) if at and not Path(name).expanduser().is_dir() else (name, None)


def precision(dtype: torch.dtype | str | None, device: str) -> torch.dtype | str:
    """A precision by torch's name for it or a usual short one; ``"auto"`` stays: that of the file.

    None: float32 on a CPU, bfloat16 on a GPU, float16 on one that does not know bfloat16.
    """
    if dtype is None:
        if device == "cpu" or not torch.cuda.is_available():
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    name = re.sub(r"^(b?)fp?(?=\d)", r"\1float", str(dtype).removeprefix("torch."))  # bf16, fp16, f16
    found = "auto" if name == "auto" else getattr(torch, name, None)
    if found not in ("auto", torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"dtype={dtype!r} is no precision for weights; choose 'float32', 'bfloat16' or 'float16' (short: "
            "'fp32', 'bf16', 'fp16'), or 'auto' for that of the file"
        )
    return found


# --------------------------------------------------------------------------- before weights are fetched


def require_there(device: str) -> None:
    """Refuse a device that is not there; ``"auto"`` stands for all GPUs."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cpu", *(["cuda", "auto"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    there += ["mps"] if torch.backends.mps.is_available() else []
    if device not in there:
        raise ValueError(f"device={device!r} is not to be had on this machine; choose {', '.join(there)}")


GGUF = (
    "GGUF files hold quantised weights, which can't be scored or patched. Load the original repository, "
    "often the same name without -GGUF, or write what the file decodes to as a plain model: "
    "harmlens.models.gguf.unpack(file, folder)"
)


def require_files(name: str, source: str, revision: str | None, local: bool) -> None:
    """Refuse an adapter, which transformers would put in, and a folder without config or readable weights."""
    with explained(name, local):
        file = find_adapter_config_file(source, revision=revision)
        about = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    if file is not None:
        kind = str(about.get("peft_type") or "LoRA").replace("LORA", "LoRA")
        adapter = f"{kind} adapter of {about.get('base_model_name_or_path') or 'another model'!r}"
        if Path(file).with_name("config.json").is_file():
            raise ValueError(
                f"{name!r} holds a whole model and, beside it, a {adapter} (adapter_config.json): if the "
                "weights are merged already, it would be applied twice. Keep either: load a copy without the "
                "files adapter_*, or merge the adapter first (merge_and_unload of peft) and save the model."
            )
        raise ValueError(
            f"{name!r} is a {adapter}, not a whole model. Merge it and save the whole model: "
            "model = peft.AutoPeftModelForCausalLM.from_pretrained(name).merge_and_unload(); "
            "model.save_pretrained(folder); and the tokenizer with tokenizer.save_pretrained(folder)."
        )
    folder = Path(source)
    config, weights = (folder / "config.json").is_file(), any(folder.glob("*.safetensors"))
    if local and not weights and any(folder.glob("*.gguf")):
        raise ValueError(f"the folder {folder.name!r} holds GGUF files. {GGUF}.")
    if local and not (weights and config):
        raise ValueError(
            f"the folder {folder.name!r} holds no {'weights (*.safetensors)' if config else 'config.json'}. "
            "Save a model there with model.save_pretrained(folder) and tokenizer.save_pretrained(folder)."
        )


def require_causal(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a model that the book's methods can't work on, by its config."""
    kind, packed, made = (config.get(key) for key in ("model_type", "quantization_config", "architectures"))
    called, decoders = ", ".join(made or []) or kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    heads = {head for names in decoders.values() for head in ([names] if isinstance(names, str) else names)}
    decoder = kind in decoders and not config.get("is_encoder_decoder")
    how = packed.get("quant_method", "quantised") if isinstance(packed, Mapping) else "quantised"
    problems = (
        (kind not in CONFIG_MAPPING_NAMES, f"is of the type {kind!r}, which the installed transformers does "
         "not know; code of its own is never run here. Upgrade it (pip install -U transformers), or choose "
         f"another model, such as {SMALL}"),
        (packed, f"has weights that are quantised ({how}): packed numbers can't be scored, pruned or "
         "patched. Choose the original in half precision, often the same name without the ending"),
        (not decoder or (made and not heads.intersection(made)), f"is no causal language model ({called}): "
         "it doesn't predict the next word, or it reads pictures or sound beside text. Choose a decoder of "
         f"text alone, such as {SMALL}"),
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


# --------------------------------------------------------------------------- after they are loaded

# Masks and positions that old checkpoints carry, and that are made anew today.
_BUFFERS = re.compile(r"(attn|attention)\.(masked_)?bias$|inv_freq$|position_ids$")


def _some(items: Sequence[str]) -> str:
    """The first three of some names."""
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def require_whole(name: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuse a model of which a part is on the CPU or disk, missing, left over, misshapen or not finite.

    What stands outside of the language model may be left over: a tower for pictures, a value head.
    ``info`` is what ``from_pretrained(..., output_loading_info=True)`` gives beside the model.
    """
    places = getattr(model, "hf_device_map", {})
    away = sorted(part or "all" for part, place in places.items() if place in ("cpu", "disk"))
    empty = [part for part, parameter in model.named_parameters() if parameter.is_meta]
    if empty or (away and len(set(map(str, places.values()))) > 1):
        raise ValueError(
            f"{name!r} doesn't fit the GPUs: parts of it were left on the CPU or on disk "
            f"({', '.join((away or empty)[:3])}, ...), where interventions can't reach them. Choose "
            f"{smaller(16 * 10**9)}, use larger or more GPUs, or load it with device='cpu'."
        )
    missing = sorted(info["missing_keys"])
    unexpected = sorted(key for key in info["unexpected_keys"] if not _BUFFERS.search(key))
    problems = {
        "missing": missing,
        "left over": unexpected if missing else [key for key in unexpected if not _apart(model, key)],
        "of another shape": sorted(
            f"{key} ({tuple(found)} for {tuple(made)})" for key, found, made in info["mismatched_keys"]
        ),
    }
    if any(problems.values()):
        told = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(
            f"the weights of {name!r} are not those that its config.json describes. Tensors {told}. Is a "
            "file missing, or the config.json another model's (its number of layers, whether the head is "
            "tied to the embedding)? Were they saved with 'module.' or the like before their names, or with "
            "an adapter that was not merged (merge_and_unload of peft)? Fetch or save the model anew."
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
    if len(used) < 2:
        raise ValueError(f"the tokenizer of {lm.name!r} gives no tokens for plain text; is it another's?")
    rows = lm.model.get_input_embeddings().weight.shape[0]
    marks = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    unused = set(tokenizer.all_special_ids) - marks - set(used)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    outside = [repr(word) for word, i in vocabulary if i >= rows and i not in unused]
    outside += [f"eos_token_id {i} of generation_config.json" for i in sorted(own_stops(lm)) if i >= rows]
    if outside:
        raise ValueError(
            f"the tokenizer of {lm.name!r} doesn't fit its embedding, which has {rows} rows: "
            f"{len(outside)} beyond them ({_some(outside)}). Take the model's own tokenizer; or, where "
            f"tokens were added, call model.resize_token_embeddings(len(tokenizer)), train them, {save}."
        )


# --------------------------------------------------------------------------- errors of the libraries


@contextmanager
def explained(name: str, local: bool, said: str = "") -> Iterator[None]:
    """Transformers at work, without bars and tables; its errors with what to do about them.

    A MemoryError where memory is short, an OSError where the Hub doesn't give the model (in the words of
    data/load_errors.yaml), else a ValueError, as ``said``: a spoilt file raises whatever its parser raises.
    """
    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    except ImportError:
        raise  # names the package that is missing
    except Exception as error:
        chain: list[BaseException | None] = [error]  # an error and what it came from
        while (step := chain[-1].__cause__ or chain[-1].__context__) is not None and step not in chain:
            chain.append(step)
        kinds = [kind.__name__ for e in chain for kind in type(e).__mro__]
        codes = [str(getattr(getattr(e, "response", None), "status_code", "")) for e in chain]
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if re.search(r"\bMemoryError|OutOfMemoryError|not enough memory", f"{kinds} {error}"):
            free = files.free_memory("cuda" if torch.cuda.is_available() else "cpu")
            raise MemoryError(
                f"there is too little memory for {name!r}. {_remedy(free)} (Original message: {first})"
            ) from error
        if isinstance(error, OSError) and not local:
            text, plain = f"{' '.join(kinds + codes)}\n{name}\n{error}", name.partition("@")[0]
            table = yaml.safe_load((data_dir() / "load_errors.yaml").read_text(encoding="utf-8"))
            told = next(entry["told"] for entry in table if re.search(entry["pattern"], text))
            told = told.format(page=f"https://huggingface.co/{plain}", plain=plain, other=SMALL, gguf=GGUF)
            raise OSError(f"{name!r} {told}. (Original message: {first})") from error
        said = said or f"the files of {name!r} could not be loaded; is one truncated?"
        raise ValueError(f"{said} ({type(error).__name__}: {first})") from error
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
