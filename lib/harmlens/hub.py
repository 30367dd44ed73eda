"""What can go wrong between a name and a model: looked at before weights are fetched, explained after.

The checks read a model's ``config.json`` and nothing else, so a model that can't be used is refused before
gigabytes are downloaded. :mod:`harmlens.models` loads.

Introduced in book/models ("Models").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from harmlens import catalogue, memory
from harmlens.memory import shown


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
                f"transformers knows, such as {catalogue.SMALL}."
            )
        raise ValueError(
            f"{name!r} is of the type {kind!r}, which the installed transformers doesn't know. Upgrade it "
            f"(pip install -U transformers), or choose another model, such as {catalogue.SMALL}."
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
    if (
        config.get("is_encoder_decoder")
        or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or (made and not heads.intersection(made))
    ):
        raise ValueError(
            f"{name!r} is no causal language model ({', '.join(made) or kind}): it doesn't predict the next "
            f"word. Choose a decoder, such as {catalogue.SMALL}."
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
            f"the weights of {name!r} take {shown(weights)}, but {shown(free)} are free on {where}. "
            f"{remedy(free)}"
        )


def remedy(free: int) -> str:
    """What to do when a model is too big: smaller ones of the list, or a larger machine."""
    fitting = catalogue.smaller(free)[:2]
    choose = (
        f"Choose a smaller model, such as {' or '.join(fitting)}" if fitting else "Choose a smaller model"
    )
    return (
        f"{choose}; free what other models hold (restart the session); or use a larger GPU, or several. "
        "The page Models of the book lists models by GPU."
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
        proposed = catalogue.smaller(catalogue.usable("T4"))[:2]
        raise ValueError(
            f"{name!r} doesn't fit the GPUs: parts of it were left on the CPU or on disk "
            f"({', '.join(parts)}, ...), where interventions can't reach them. Choose a smaller model, such "
            f"as {' or '.join(proposed)}, use larger or more GPUs, or load it with device='cpu'."
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
        free = memory.free("cuda" if torch.cuda.is_available() else "cpu")
        return MemoryError(f"there is too little memory for {name!r}. {remedy(free)} {said}")
    if not isinstance(error, OSError):
        return error if isinstance(error, Exception) else RuntimeError(str(error))
    codes = {
        e.response.status_code for e in chain if isinstance(e, HfHubHTTPError) and e.response is not None
    }
    if is_a(GatedRepoError) or (codes & {401, 403} and not is_a(RepositoryNotFoundError)):
        return OSError(
            f"{name!r} is gated: accept its licence on {page} and log in with `hf auth login` (on Colab: add "
            f"HF_TOKEN to the secrets). Without a login, {catalogue.ungated(name)} is of similar size. {said}"
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
    if is_a(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        return OSError(
            f"{name!r} could not be had from the Hugging Face Hub, and it is not among the files downloaded "
            "before. Check the spelling and the network (HF_HUB_OFFLINE=1 forbids downloads); for a gated "
            f"model accept its licence on its page and log in with `hf auth login`. {said}"
        )
    if "safetensors" in str(error):
        return OSError(
            f"{name!r} has no weights as safetensors. Other formats (.bin) are pickles, which can run code "
            f"when they are opened, and are not read. Choose another model, such as "
            f"{catalogue.ungated(name)}, or one that was converted. {said}"
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
