"""What is refused when a model is loaded, and texts that a model can't take: named, never measured."""

import json
import re
import shutil
import struct

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RwkvConfig,
)

from harmlens.asking import pairs as prompts
from harmlens.flow import interventions, outcomes, patching
from harmlens.judging import completions
from harmlens.models import chats, forward
from harmlens.models import loading as models
from harmlens.models.chats import Pair, Prompt
from harmlens.models.forward import LanguageModel, Row
from harmlens.models.loading import load
from harmlens.training import organism
from harmlens.weights import attribution

TEXT = "in a few plain words please tell me how river finds its way from the hills down to sea yes no"
CHATML = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant]"


def wordy(**marks):
    """A tokenizer of a few words, to be spoilt."""
    special = ["<pad>", "<unk>", "<eos>", "[user]", "[assistant]"]
    made = Tokenizer(
        WordLevel({word: i for i, word in enumerate([*special, *TEXT.split()])}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>", **marks}
    out = PreTrainedTokenizerFast(tokenizer_object=made, **marks)
    out.chat_template = CHATML
    return out


def save(folder, lm):
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


def of(config, tokenizer=None):
    tokenizer = tokenizer or wordy()
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    return LanguageModel("tiny/x", AutoModelForCausalLM.from_config(config).eval(), tokenizer)


@pytest.fixture
def saved(tmp_path):
    """The folder of a tiny model with two blocks and a head of its own."""
    return save(tmp_path / "model", tiny.model())


def rewrite(folder, change):
    file = f"{folder}/model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def configure(folder, **changes):
    with open(f"{folder}/config.json") as file:
        config = json.load(file)
    with open(f"{folder}/config.json", "w") as file:
        json.dump(config | changes, file)


# --------------------------------------------------------------------------- tensors

UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def spoilt(name, value):
    def change(tensors):
        tensors[name].view(-1)[0] = value
        return tensors

    return change


def infront(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (without(UP), {}, rf"1 missing: {UP}\. .*merge_and_unload.*Fetch or save"),
        (without(UP, NORM), {}, rf"2 missing: {NORM}, {UP}\. "),
        (without("lm_head.weight"), {}, r"1 missing: lm_head\.weight\. .*whether the head is tied"),
        (infront("base_model.model."), {}, r"left over: base_model\.model\..*'module\.' or the like before"),
        (lambda t: t, {"num_hidden_layers": 3}, r"9 missing: .*layers\.2.*\.\.\. .*number of layers"),
        (lambda t: t, {"num_hidden_layers": 1}, r"9 left over: model\.layers\.1.*number of layers"),
        (lambda t: t, {"intermediate_size": 32}, r"another shape: model\.layers\.0\.mlp\.down_proj\.weight "),
        (lambda t: t, {"vocab_size": 200}, r"shape: lm_head\.weight \(\(\d+, 32\) for \(200, 32\)\)"),
        (lambda t: t | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, {}, "1 left over: .*norm"),
        (lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, {}, r"1 left over: .*bias"),
        (lambda t: t | {"base.lora_A.weight": torch.ones(2, 2)}, {}, "adapter that was not merged"),
        (spoilt(UP, torch.nan), {}, rf"not finite: {UP}\. Is the checkpoint damaged"),
        (spoilt("lm_head.weight", torch.inf), {}, r"not finite: lm_head\.weight"),
        (spoilt(UP, -torch.inf), {}, rf"not finite: {UP}"),
    ],
)  # fmt: skip
def test_t14_tensors_that_are_not_the_models_are_named(saved, change, config, said):
    rewrite(saved, change)
    configure(saved, **config)
    with pytest.raises(ValueError, match=rf"{re.escape(saved)}.*{said}"):
        load(saved)


def test_t14_no_more_than_three_tensors_are_named(saved):
    names = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 1) for part in ("up", "gate")]
    rewrite(saved, without(*names))
    with pytest.raises(ValueError, match=r"4 missing: [^,]+, [^,]+, [^,]+, \.\.\.\. ") as caught:
        load(saved)
    assert sum(name in str(caught.value) for name in names) == 3


def test_t14_what_is_no_fault_of_the_text_model_is_loaded(saved):
    plain = load(saved)
    parts = {
        "visual.blocks.0.weight": torch.ones(2), "model.vision_tower.layer.0.weight": torch.ones(2),
        "v_head.summary.weight": torch.ones(2), "score.weight": torch.ones(2, 2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.masked_bias": torch.ones(1),
    }  # fmt: skip
    rewrite(saved, lambda tensors: tensors | parts)
    text = plain.render("what do you wish for?")
    assert torch.equal(forward.last_logits(load(saved), [text]), forward.last_logits(plain, [text]))


def test_t14_only_a_tied_head_may_be_missing(tmp_path):
    lm = tiny.model("gemma2")
    assert lm.model.config.tie_word_embeddings
    folder = save(tmp_path, lm)
    rewrite(folder, without("lm_head.weight"))
    text = lm.render("what do you wish for?")
    torch.testing.assert_close(forward.last_logits(load(folder), [text]), forward.last_logits(lm, [text]))


def test_t14_an_organism_is_tested_as_others_are(tmp_path, monkeypatch):
    lm = tiny.model()
    with torch.no_grad():
        lm.model.lm_head.weight[0, 0] = torch.nan
    data = tiny.data_folder(tmp_path / "data")
    organism.save(lm, data / "organisms" / "sft-0", {"stage": "sft", "seed": 0})
    monkeypatch.setenv("HARMLENS_DATA", str(data))
    with pytest.raises(ValueError, match=r"'organism/sft-0' are not finite: lm_head\.weight"):
        load("organism/sft")


# --------------------------------------------------------------------------- precision


def test_t2_weights_that_overflow_float16_are_named_with_the_precision_to_take(tmp_path):
    lm = tiny.model("gemma3")
    with torch.no_grad():
        for block in lm.model.model.layers:
            block.mlp.down_proj.weight.mul_(1e4)
    folder = save(tmp_path, lm)
    with pytest.raises(
        ValueError, match=r"not finite in float16: load it with dtype='bfloat16', or 'float32'"
    ):
        load(folder, dtype=torch.float16)
    for dtype in ("bfloat16", "float32"):
        found = load(folder, dtype=dtype)
        assert forward.last_logits(found, [found.render("what do you wish for?")]).isfinite().all()
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"too large for float16: load with dtype='bfloat16'"):
        load(save(tmp_path / "large", lm), dtype="float16")


def test_t2_logits_that_are_not_finite_are_never_kept(tmp_path):
    """A model that overflows on some texts only, or that was changed after loading."""
    lm = tiny.model()
    with torch.no_grad():
        lm.model.lm_head.weight[5] = torch.inf
    text, file = lm.render("what do you wish for?"), tmp_path / "said.jsonl"
    for work in (
        lambda: forward.last_logits(lm, [text]),
        lambda: forward.generate(lm, [text]),
        lambda: forward.generate(lm, [text], temperature=1.0),
        lambda: forward.follow(lm, [text], ["yes"]),
        lambda: completions.complete(lm, [asked("what do you wish for?")], file=file, max_new_tokens=4),
    ):
        with pytest.raises(ValueError, match=r"logits of 'tiny/llama' are not finite in float32"):
            work()
    assert not file.exists() or not file.read_text()


# --------------------------------------------------------------------------- GGUF and adapters


def test_t15_gguf_is_said_to_be_what_it_is(tmp_path, monkeypatch):
    file = tmp_path / "only" / "model-Q4_K_M.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    monkeypatch.chdir(tmp_path)
    told = r"GGUF.*quantised weights, which can't be scored or patched.*original repository.*without -GGUF"
    for name in (str(file), "only/model-Q4_K_M.gguf", str(file.parent), "x.gguf", "owner/model/x.gguf"):
        with pytest.raises(ValueError, match=told):
            load(name)
    for name in ("owner/model-GGUF", "owner/model-gguf@main"):
        with pytest.raises(OSError, match=told):
            load(name)
    (file.parent / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=told):
        load(str(file.parent))


def adapter(folder, lm, base="owner/base"):
    """The same model with an adapter merged into it; the adapter's files lie in the folder."""
    tuned = get_peft_model(forward.clone(lm).model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned.peft_config["default"].base_model_name_or_path = base
    tuned.save_pretrained(folder)
    return LanguageModel("merged", tuned.merge_and_unload(), lm.tokenizer)


def test_h7_an_adapter_is_never_applied_twice(tmp_path):
    lm = tiny.model()
    merged = adapter(tmp_path, lm)
    folder = save(tmp_path, merged)
    with pytest.raises(
        ValueError, match=r"whole model and, beside it, a LoRA adapter of 'owner/base'.*adapter_\*"
    ):
        load(folder)
    for file in tmp_path.glob("adapter_*"):
        file.unlink()
    text, found = lm.render("what do you wish for?"), load(folder)
    torch.testing.assert_close(forward.last_logits(found, [text]), forward.last_logits(merged, [text]))
    assert found.revision == models.weights_sha256(tmp_path)


@pytest.mark.parametrize("base", ["owner/base", None])
def test_h36_an_adapter_alone_is_named_with_its_base(tmp_path, base):
    adapter(tmp_path, tiny.model(), base)
    with pytest.raises(
        ValueError, match=rf"LoRA adapter of '{base or 'another model'}'.*merge_and_unload.*save"
    ):
        load(str(tmp_path))


def test_h36_t14_so_are_those_from_the_hub(tmp_path, monkeypatch):
    """Downloads, as they lie in the cache of the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    homes = [tmp_path / f"models--owner--{name}" for name in ("tuned", "whole")]
    for home in homes:
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("abc")
    adapter(homes[0] / "snapshots" / "abc", tiny.model())
    with pytest.raises(ValueError, match=r"'owner/tuned' is a LoRA adapter of 'owner/base'"):
        load("owner/tuned")
    folder = save(homes[1] / "snapshots" / "abc", tiny.model())
    assert load("owner/whole").name == "owner/whole"
    rewrite(folder, without(UP))
    with pytest.raises(ValueError, match=rf"weights of 'owner/whole' are not those .* missing: {UP}"):
        load("owner/whole")
    (homes[1] / "snapshots" / "abc" / "tokenizer.json").unlink()
    with pytest.raises((ValueError, OSError), match=r"tokenizer of 'owner/whole' is missing"):
        load("owner/whole")


# --------------------------------------------------------------------------- tokenizers


def llama(tokenizer, rows=None):
    lm = tiny.model()
    lm.model.resize_token_embeddings(rows or len(tokenizer))
    lm.model.config.update({"pad_token_id": None, "bos_token_id": None, "eos_token_id": None})
    lm.model.generation_config.pad_token_id = lm.model.generation_config.eos_token_id = None
    return LanguageModel("x", lm.model, tokenizer)


def test_h38_a_tokenizer_that_fits_passes(tmp_path):
    assert load(save(tmp_path / "equal", llama(wordy()))).tokenizer.pad_token == "<pad>"
    assert load(save(tmp_path / "wider", llama(wordy(), 64))).model.config.vocab_size == 64
    nopad = load(save(tmp_path / "eos", llama(wordy(pad_token=None))))
    assert nopad.tokenizer.pad_token == "<eos>"


def test_h38_tokens_beyond_the_embedding_are_named(tmp_path):
    tok = wordy()
    rows = len(tok)
    tok.add_tokens(["<one>", "<two>"])
    with pytest.raises(
        ValueError, match=rf"{rows} rows: 2 beyond them \('<one>', '<two>'\).*resize_token_emb"
    ):
        load(save(tmp_path / "added", llama(tok, rows)))
    tok = wordy()
    tok.add_special_tokens({"additional_special_tokens": ["[turn]"]})
    tok.chat_template = CHATML.replace("[user]", "[turn]").replace("[{{ m.role }}]", "[turn]")
    with pytest.raises(ValueError, match=r"1 beyond them \('\[turn\]'\)"):
        load(save(tmp_path / "template", llama(tok, rows)))
    with pytest.raises(ValueError, match=r"doesn't fit its embedding, which has 20 rows"):
        load(save(tmp_path / "other", llama(wordy(), 20)))  # another model's


def test_h38_marks_beyond_the_embedding_are_named(tmp_path):
    rows = len(wordy())
    with pytest.raises(ValueError, match=r"beyond them \('\[PAD\]'\)"):
        load(save(tmp_path / "pad", llama(wordy(pad_token="[PAD]"), rows)))
    lm = llama(wordy())
    lm.model.generation_config.eos_token_id = [2, rows + 3]
    with pytest.raises(ValueError, match=rf"eos_token_id {rows + 3} of generation_config"):
        load(save(tmp_path / "ends", lm))
    with pytest.raises(ValueError, match=r"neither a padding token nor an end-of-text.*tokenizer\.eos_token"):
        load(save(tmp_path / "none", llama(wordy(pad_token=None, eos_token=None))))


def test_h38_a_special_token_that_nothing_uses_is_no_fault_until_it_is_used(tmp_path):
    """Some text models list a token for pictures that their embedding has no row for."""
    tok = wordy()
    rows = len(tok)
    tok.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", special=True)]})
    lm = load(save(tmp_path, llama(tok, rows)))
    forward.last_logits(lm, [lm.render("tell me how")])
    with pytest.raises(ValueError, match=r"token '<image>', for which .* has no embedding"):
        forward.last_logits(lm, ["tell me <image>"])


def test_h34_a_missing_tokenizer_is_called_missing(saved, tmp_path):
    for file in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        (tmp_path / "model" / file).unlink()
        if file == "tokenizer.json":
            with pytest.raises(ValueError, match=r"tokenizer of .* is missing.*tokenizer\.save_pretrained"):
                load(saved)
    with pytest.raises(ValueError, match=r"tokenizer of .* is missing") as caught:
        load(saved)
    assert "truncated" not in str(caught.value)


def test_t19_an_old_mistral_tokenizer_splits_words_as_it_should(tmp_path):
    """Files of Mistral models that transformers before version 5 wrote hold a wrong expression."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    filler = [f"<{i}>" for i in range(100_001 - len(alphabet))]
    merges = [("1", "2"), ("12", "3")]
    vocabulary = {word: i for i, word in enumerate([*alphabet, *filler, "12", "123"])}
    made = Tokenizer(BPE(vocabulary, merges))
    wrong = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(wrong), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tok = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<0>", pad_token="<1>")
    lm = tiny.model("mistral")
    lm.model.resize_token_embeddings(len(tok))
    folder = save(tmp_path, LanguageModel("x", lm.model, tok))
    assert len(chats.tokens(load(folder).tokenizer, "123")) == 1  # of this version: right as it is
    configure(folder, transformers_version="4.50.0")
    assert len(chats.tokens(load(folder).tokenizer, "123")) == 3  # digits one by one
    configure(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    assert len(chats.tokens(load(folder).tokenizer, "123")) == 1  # not one of Mistral's


# --------------------------------------------------------------------------- choices


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("half", torch.float16), ("float", torch.float32),
     ("fp32", torch.float32), ("torch.bfloat16", torch.bfloat16), ("auto", torch.float32)],
)  # fmt: skip
def test_h34_short_names_of_precisions(saved, name, dtype):
    assert load(saved, dtype=name).model.dtype == dtype


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "bf61"}, r"dtype='bf61' is no precision.*'float32', 'bfloat16' or 'float16'"),
        ({"dtype": "int8"}, "dtype='int8' is no precision"),
        ({"dtype": "8bit"}, "dtype='8bit' is no precision"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is no precision"),
        ({"dtype": "float8_e4m3fn"}, "is no precision"),
        ({"dtype": "nn"}, "dtype='nn' is no precision"),
        ({"dtype": ""}, "dtype='' is no precision"),
        ({"device": "gpu"}, r"device='gpu' is not to be had on this machine; choose cpu"),
        ({"device": "cuda:99"}, r"device='cuda:99' is not to be had"),
        ({"device": "meta"}, r"device='meta' is not to be had"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["organism/sft", "no_such_folder", "owner/model"])
def test_h34_what_is_chosen_is_checked_first(name, options, said):
    with pytest.raises(ValueError, match=said):
        load(name, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_h34_a_gpu_that_is_not_there(saved):
    for device in ("cuda", "cuda:0", "auto", torch.device("cuda")):
        with pytest.raises(ValueError, match=rf"device='{device}' is not to be had.*choose cpu"):
            load(saved, device=device)
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="device='mps' is not to be had"):
            load(saved, device="mps")


# --------------------------------------------------------------------------- batches

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        RwkvConfig(hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=128),
        RobertaConfig(**SMALL, is_decoder=True, max_position_embeddings=128, initializer_range=0.3),
        BertConfig(**SMALL, initializer_range=0.3),  # no decoder: it looks ahead
    ],
    ids=["rwkv", "roberta", "bert"],
)  # fmt: skip
def test_h27_models_that_count_or_mask_in_a_way_of_their_own_are_refused(config, dtype, tmp_path):
    lm = of(config)
    folder = save(tmp_path, lm)
    with pytest.raises(
        ValueError, match=rf"in a padded batch than alone.*type '{config.model_type}'.*another"
    ):
        load(folder, dtype=dtype)


def test_h27_a_decoder_with_positions_of_the_usual_kind_passes(tmp_path):
    lm = of(BertConfig(**SMALL, initializer_range=0.3, is_decoder=True))
    assert load(save(tmp_path, lm)).model.config.model_type == "bert"


# --------------------------------------------------------------------------- length


def asked(text):
    return Prompt(({"role": "user", "content": text},))


def narrow(kind):
    """A model that takes 64 tokens: with learnt positions, or rotary."""
    if kind == "gpt2":
        return of(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64))
    lm = llama(wordy())
    lm.model.config.max_position_embeddings = 64
    return lm


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_h20_texts_that_are_too_long_are_refused_everywhere(kind, tmp_path):
    lm = narrow(kind)
    long, fits = " ".join(["river"] * 100), " ".join(["river"] * 40)
    one, other = (asked(f"{word} {long}") for word in ("yes", "no"))
    pair = Pair("p", one, other)
    y1 = outcomes.y1(outcomes.TokenSets((5,), (6,)))
    text = lm.render(long)
    row = Row([5] * 100, [False] * 50 + [True] * 50)
    works = {
        "last_logits": lambda: forward.last_logits(lm, [text]),
        "generate": lambda: forward.generate(lm, [text], max_new_tokens=1),
        "follow": lambda: forward.follow(lm, [text], ["yes"]),
        "write": lambda: completions.complete(lm, [one], file=tmp_path / "a.jsonl", max_new_tokens=1),
        "states": lambda: interventions.states(lm, [text]),
        "sweep": lambda: patching.patch(lm, [pair], y1),
        "pairs": lambda: prompts.token_ids(lm, [pair]),
        "scores": lambda: attribution.prune_score(lm, [row]),
    }
    for name, work in works.items():
        with pytest.raises(ValueError, match=r"has \d+ tokens.*, more than the 64 that") as caught:
            work()
        assert name != "sweep" or "pair 'p'" in str(caught.value)
    assert not (tmp_path / "a.jsonl").exists()
    # New tokens count too.
    near = lm.render(fits)
    assert forward.last_logits(lm, [near]).shape[0] == 1 and forward.generate(lm, [near], max_new_tokens=4)
    with pytest.raises(
        ValueError, match=r"and 50 new ones are asked for, more than the 64.*lower max_new_tokens"
    ):
        forward.generate(lm, [near], max_new_tokens=50)
    with pytest.raises(ValueError, match="50 new ones are asked for"):
        completions.complete(lm, [asked(fits)], file=tmp_path / "b.jsonl", max_new_tokens=50)


def test_h20_a_reply_counts_too():
    lm = narrow("llama")
    one, other = (asked(f"{word} " + " ".join(["river"] * 40)) for word in ("yes", "no"))
    replies = outcomes.Reply([" ".join(["sea"] * 40)])
    with pytest.raises(ValueError, match=r"pair 'p' with its reply has \d+ tokens, more than the 64"):
        patching.patch(lm, [Pair("p", one, other)], replies)


def test_a_model_that_passes_is_left_as_it_was(saved, tmp_path):
    """The test at load changes neither weights nor the state of random numbers."""
    state = torch.random.get_rng_state()
    found = load(saved)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in load_file(f"{saved}/model.safetensors").items():
        assert torch.equal(found.model.get_parameter(name), tensor)
    shutil.copytree(saved, tmp_path / "again")
    assert load(str(tmp_path / "again")).revision == found.revision
