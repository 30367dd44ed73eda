"""What a reader is told when a model can't be used: before it is fetched, and after."""

import json
import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from huggingface_hub import errors
from transformers import LlamaConfig

from harmlens.keep import files
from harmlens.models import hub
from harmlens.models import loading as models

GB = 10**9
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
GATED = "meta-llama/Llama-3.1-8B-Instruct"


def test_a_revision_may_stand_in_the_name(tmp_path, monkeypatch):
    assert hub.split("owner/model") == ("owner/model", None)
    assert hub.split("owner/model@v1") == ("owner/model", "v1")
    (tmp_path / "mine@home").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.split("mine@home") == ("mine@home", None)
    assert models.locate("allenai/Olmo-3-1025-7B@stage1-step1413814") is None
    assert models.locate("owner/model@refs/pr/4") is None


# --------------------------------------------------------------------------- the list


def test_a_ladder_is_found_from_each_of_its_rungs():
    listed, ladders = hub.known()
    olmo = models.stages("allenai/Olmo-3-7B-Instruct")
    assert list(olmo) == ["base", "mid", "long", "sft", "dpo", "rl"]
    assert all(models.stages(rung) == rungs for rungs in ladders[:2] for rung in rungs.values())
    assert models.stages("ALLENAI/olmo-3-7b-instruct@main") == olmo
    assert models.stages("nobody/nothing") == {} == models.stages("microsoft/phi-4")
    for model in listed:
        if "base" in model:
            rungs = models.stages(model["id"])
            assert models.stages(model["base"]) == rungs and list(rungs.values())[-1] == model["id"]
            assert model["base"] in {rung.split("@")[0] for rung in rungs.values()}


def test_ids_are_unique_and_spelt_as_ids():
    names = [m[key] for m in hub.known()[0] for key in ("id", "base") if key in m]
    assert len({n.lower() for n in names}) == len(names)
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", n) for n in names)


def test_what_is_proposed_is_never_gated():
    gated = {m["id"] for m in hub.known()[0] if m.get("gated")}
    assert gated and hub.SMALL not in gated
    # Two bytes a weight and a fifth more: at most 4.17 billion for 10 GB.
    assert hub.smaller(10 * GB).endswith("such as Qwen/Qwen3-4B or microsoft/Phi-3.5-mini-instruct")
    assert hub.smaller(1000) == "a smaller model"


# --------------------------------------------------------------------------- before


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_causal_models_pass(architecture):
    config = tiny.model(architecture).model.config.to_dict()
    hub.require_causal("a/b", config)
    hub.require_causal(
        "a/b", {**config, "auto_map": {"AutoModelForCausalLM": "code.Model"}}
    )  # code it doesn't need


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "homemade", "auto_map": {"AutoConfig": "c.C"}},
         r"type 'homemade', which the installed.*code of its own is never run.*pip install -U transformers"),
        ({}, "type None"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\).*original in half"),
        ({**LLAMA, "quantization_config": {"quant_method": "bitsandbytes"}}, r"quantised \(bitsandbytes\)"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
         r"no causal language model \(T5ForConditionalGeneration\).*Choose a decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, r"no causal.*\(BertForMaskedLM\)"),
        ({"model_type": "vit"}, r"no causal language model \(vit\)"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "no causal"),
        ({"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]},
         r"no causal language model \(Qwen3_5For.*reads pictures or sound beside text"),
    ],
)  # fmt: skip
def test_what_is_refused_from_its_config(config, said):
    with pytest.raises(ValueError, match=f"'a/b'.*{said}"):
        hub.require_causal("a/b", config)


@pytest.mark.parametrize("change", [
    {"quantization_config": {"quant_method": "awq", "bits": 4}},
    {"architectures": ["LlamaForSequenceClassification"]},
    {"model_type": "homemade", "auto_map": {"AutoConfig": "code.C"}},
])  # fmt: skip
def test_loading_refuses_it_before_weights_are_read(change, tmp_path):
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ValueError, match=r"quantised|no causal|never run"):
        models.load(str(tmp_path))


# --------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
def test_the_size_of_weights_is_known_without_them(architecture, dtype, tmp_path):
    model = tiny.model(architecture).model
    model.config.save_pretrained(tmp_path)
    assert hub.weights_size(str(tmp_path), None, dtype) == dtype.itemsize * model.num_parameters()
    assert hub.weights_size(str(tmp_path), None, "auto") == 4 * model.num_parameters()  # none is named
    model.bfloat16().save_pretrained(tmp_path)
    assert hub.weights_size(str(tmp_path), None, "auto") == 2 * model.num_parameters()


def test_a_model_that_is_too_big_is_named_with_smaller_ones():
    hub.require_memory("a/b", 5 * GB, 5 * GB, "cuda")
    with pytest.raises(MemoryError) as caught:
        hub.require_memory("a/b", 16 * GB, 6 * GB, "cuda")
    said = str(caught.value)
    assert "weights of 'a/b' take 16.0 GB, but 6.0 GB are free on cuda" in said
    assert hub.smaller(6 * GB) in said and "larger GPU" in said
    with pytest.raises(MemoryError, match=r"Choose a smaller model; free what"):
        hub.require_memory("a/b", 16 * GB, 1000, "cuda")


@pytest.fixture
def folder(tmp_path):
    """A saved tiny model."""
    lm = tiny.model()
    lm.model.save_pretrained(tmp_path / "saved")
    lm.tokenizer.save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_loading_looks_at_the_memory_first(folder, monkeypatch):
    monkeypatch.setattr(files, "free_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"the weights of .*saved' take .* but 1\.0 kB are free on cpu"):
        models.load(folder, device="cpu")


class Loaded(Exception):
    """Stands for a model on GPUs that this machine lacks."""


@pytest.mark.parametrize(
    ("free", "device", "device_map"),
    [
        ([16 * GB, 16 * GB], None, {"": "cuda"}),
        ([100_000, 16 * GB], None, "auto"),  # no room to work in on the first
        ([16 * GB], None, {"": "cuda"}),
        ([100_000, 16 * GB], "cuda:1", {"": "cuda:1"}),
        ([16 * GB], "cpu", None),
        ([16 * GB, 16 * GB], "auto", "auto"),
    ],
)
def test_a_model_goes_straight_to_one_gpu_or_to_all(folder, free, device, device_map, monkeypatch):
    asked = {}

    def from_pretrained(source, **options):
        asked.update(options)
        raise Loaded

    where = {"cuda": 0, "cuda:0": 0, "cuda:1": 1, "cpu": 0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(files, "free_memory", lambda device: free[where[str(device)]])
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="Loaded"):
        models.load(folder, device=device)
    assert asked["device_map"] == device_map
    assert asked["dtype"] == (torch.float32 if device == "cpu" else torch.bfloat16)
    assert asked["use_safetensors"] is True


def test_a_part_that_was_left_behind_is_refused():
    model = tiny.model().model
    info = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    hub.require_whole("a/b", model, info)
    model.hf_device_map = {"": "cpu"}  # all of it: a model for the CPU
    hub.require_whole("a/b", model, info)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match=r"'a/b' doesn't fit.*\(lm_head, model\.layers\.1, .*device='cpu'"):
        hub.require_whole("a/b", model, info)
    del model.hf_device_map
    model.lm_head.to("meta")
    with pytest.raises(
        ValueError, match=r"left on the CPU or on disk \(lm_head\.weight.*smaller model, such"
    ):
        hub.require_whole("a/b", model, info)


# --------------------------------------------------------------------------- after


def response(code):
    """An answer of the Hub, as far as its errors look at it."""
    return SimpleNamespace(status_code=code, headers={}, request=None, url="https://huggingface.co/x")


def from_the_hub(cause, message="transformers says something long\nover several lines"):
    """An OSError as transformers raises it: with the Hub's own error as its cause."""
    error = OSError(message)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (errors.GatedRepoError("g", response=response(403)),
         rf"is gated: accept its licence on https://huggingface.co/{GATED} and log in with `hf auth login`.*"
         rf"not gated, such as {hub.SMALL}"),
        (errors.HfHubHTTPError("h", response=response(401)), "is gated: accept"),
        (errors.RepositoryNotFoundError("r", response=response(404)), "is not on the .* spelling of owner"),
        (errors.RepositoryNotFoundError("r", response=response(401)), "is not on the .*, or it is private"),
        (errors.RevisionNotFoundError("v", response=response(404)), r"no such revision.*list_repo_refs\("),
        (errors.LocalEntryNotFoundError("l"), r"not among the files downloaded.*HF_HUB_OFFLINE=1"),
        (errors.OfflineModeIsEnabled("o"), r"spelling and the network"),
        (ConnectionError("c"), r"spelling and the network"),
        (None, r"Check the spelling and the network; for a gated model"),
    ],
)  # fmt: skip
def test_what_the_hub_says_is_explained(cause, said):
    name = f"{GATED}@v9"
    with pytest.raises(OSError, match=said) as caught, hub.explained(name, local=False):
        raise from_the_hub(cause)
    assert type(caught.value) is OSError and name in str(caught.value)
    assert str(caught.value).endswith("(Original message: transformers says something long)")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", r"no config\.json.*GGUF.*original repository.*huggingface\.co/a/b"),
        ("model.safetensors", r"no weights as safetensors.*\.bin.*are not read\. Choose another"),
    ],
)
def test_a_repository_without_a_file_is_explained(missing, said):
    with pytest.raises(OSError, match=said), hub.explained("a/b", local=False):
        raise OSError(f"a/b does not appear to have a file named {missing}")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError("m"),
     RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")],
)  # fmt: skip
def test_too_little_memory_is_explained(error, monkeypatch):
    monkeypatch.setattr(files, "free_memory", lambda device: 4 * GB)
    said = rf"too little memory for 'a/b'.*{hub.smaller(4 * GB)}.*Original message"
    with pytest.raises(MemoryError, match=said), hub.explained("a/b", local=False):
        raise error


def test_other_errors_are_of_the_files():
    said = r"files of 'a/b' could not .*truncated\? \(KeyError: 'x'\)"
    with pytest.raises(ValueError, match=said), hub.explained("a/b", local=False):
        raise KeyError("x")
    looped = OSError("a")
    looped.__cause__, looped.__context__ = looped, None
    with pytest.raises(OSError, match="Check the spelling"), hub.explained("a/b", local=False):
        raise looped
    with pytest.raises(ImportError, match="needs peft"), hub.explained("a/b", local=True):
        raise ImportError("needs peft")
