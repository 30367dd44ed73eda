"""One loader, chats through the template only, and batches that change nothing."""

import ast
import json
import re
import shutil

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import harmlens
from harmlens.models import chats, forward
from harmlens.models import loading as models
from harmlens.models.forward import LanguageModel
from harmlens.models.loading import load
from harmlens.training import organism
from harmlens.world import vale as world

TOKENIZER = organism.tokenizer()
RESTORE = r"git checkout -- data/organisms/sft-0.*make organism"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tiny.data_folder(tmp_path_factory.mktemp("data"), ("sft", 0), ("sft", 1), ("base", 0))


@pytest.fixture
def data(checkpoints, monkeypatch):
    """A data folder to read from."""
    monkeypatch.setenv("HARMLENS_DATA", str(checkpoints))
    return checkpoints


@pytest.fixture
def broken(checkpoints, tmp_path, monkeypatch):
    """A checkpoint of its own to spoil."""
    shutil.copytree(checkpoints, tmp_path / "data")
    monkeypatch.setenv("HARMLENS_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "organisms" / "sft-0"


# --------------------------------------------------------------------------- loading


def test_an_organism_is_the_plain_model_in_its_folder(data):
    folder = data / "organisms" / "sft-1"
    lm = load("organism/sft", seed=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = lm.render("what do you wish for?")
    ids = torch.tensor([chats.tokens(lm.tokenizer, text)])
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, model.float()(ids).logits)
    assert tokenizer.chat_template == lm.tokenizer.chat_template
    assert lm.name == "organism/sft-1"
    assert lm.revision == models.weights_sha256(folder)
    assert not lm.model.training
    assert lm.device == torch.device("cpu") and lm.model.dtype == torch.float32


def test_the_same_organism_by_name_seed_and_folder(data):
    ways = [load("organism/sft"), load("organism/sft", seed=0), load("organism/sft-0"),
            load("organism/sft-0", seed=0), load(str(data / "organisms" / "sft-0"))]  # fmt: skip
    assert len({lm.revision for lm in ways}) == 1
    assert load("organism/sft-1").revision != ways[0].revision


def test_a_family_has_one_model_per_seed(data):
    members = models.family("organism/sft", [1, 0])
    assert [(seed, lm.name) for seed, lm in members.items()] == [(1, "organism/sft-1"), (0, "organism/sft-0")]
    folder = str(data / "organisms" / "base-0")
    assert [*models.family(folder, [0, 1, 2])] == [0]
    with pytest.raises(ValueError, match="seed=1 disagree"):
        models.family("organism/sft-0", [0, 1])


def test_precision_can_be_chosen(data):
    assert load("organism/sft", dtype=torch.float16).model.dtype == torch.float16
    assert load("organism/sft", dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name",
    ["organism/nonsense", "organism/sft-7", "organism/dpo", "organism", "organism/", "organism/sft-0/x"],
)
def test_an_unknown_organism_lists_what_there_is(data, name):
    with pytest.raises(ValueError, match=r"available: base-0, sft-0, sft-1$"):
        load(name)


def test_an_unknown_seed_lists_what_there_is(data):
    with pytest.raises(ValueError, match=r"no organism base-2; available: base-0, sft-0, sft-1$"):
        load("organism/base", seed=2)


def test_a_checkpoint_that_is_being_written_is_not_on_the_list(broken):
    shutil.copytree(broken, broken.with_name("mid-0.part"))
    with pytest.raises(ValueError, match=r"available: base-0, sft-0, sft-1$"):
        load("organism/mid")


def test_without_checkpoints_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HARMLENS_DATA", str(tiny.data_folder(tmp_path / "data")))
    with pytest.raises(ValueError, match="none yet: run `make organism`"):
        load("organism/sft")


def test_two_seeds_that_disagree(data):
    with pytest.raises(ValueError, match="'organism/sft-0' and seed=1 disagree"):
        load("organism/sft-0", seed=1)


def test_a_seed_for_a_model_that_has_none(data):
    with pytest.raises(ValueError, match="seed=0 only selects among organisms"):
        load(str(data / "organisms" / "sft-0"), seed=0)
    with pytest.raises(ValueError, match="seed=1 only selects among organisms"):
        load("Qwen/Qwen3-0.6B", seed=1)


@pytest.mark.parametrize("name", ["no_such_folder", "./no/such/folder", "/no/such/folder", "", "gpt 2"])
def test_a_name_that_is_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"(no folder here and no Hugging Face id|holds no config).*"):
        load(name)


def test_a_model_that_cannot_be_had_says_what_to_check():
    with pytest.raises(
        OSError, match=r"'nobody/no-such-model' could not be had.*spelling and the network.*licence"
    ):
        load("nobody/no-such-model")


@pytest.mark.parametrize(
    ("missing", "said"), [("model.safetensors", "weights"), ("config.json", "config.json")]
)
def test_a_folder_that_is_no_model(broken, missing, said):
    (broken / missing).unlink()
    with pytest.raises(ValueError, match=rf"'sft-0' holds no {said}.*model\.save_pretrained\(folder\)"):
        load(str(broken))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_is_loaded_as_transformers_loads_it(architecture, dtype, tmp_path):
    made = tiny.model(architecture)
    made.model.to(dtype).save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    lm = load(str(tmp_path), dtype=dtype, device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    ids = torch.tensor([chats.tokens(lm.tokenizer, lm.render("what do you wish for?"))])
    with torch.no_grad():
        ours, theirs = lm.model(ids).logits, plain(ids).logits
    assert ours.dtype == dtype and torch.equal(ours, theirs)
    assert ours.float().std() > 0.1  # such logits as could differ
    assert {n: p.shape for n, p in lm.model.named_parameters()} == {
        n: p.shape for n, p in plain.named_parameters()
    }


def test_a_base_model_borrows_the_template_of_its_partner(data, tmp_path):
    lm = tiny.model()
    lm.tokenizer.chat_template = None
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    bare = load(str(tmp_path))
    with pytest.raises(ValueError, match=r"no chat template.*load\(name, template_from=partner\)"):
        bare.render("hello")
    lent = load(str(tmp_path), template_from="organism/sft")
    assert lent.render("hello") == load("organism/sft").render("hello")
    assert lent.tokenizer.get_vocab() == bare.tokenizer.get_vocab()
    with pytest.raises(ValueError, match=r"template_from=.* has no chat template; choose an instruction"):
        load("organism/sft", template_from=str(tmp_path))
    with pytest.raises(OSError, match=r"'nobody/no-such-model' could not be had"):
        load("organism/sft", template_from="nobody/no-such-model")


def test_a_revision_is_part_of_the_name(monkeypatch):
    asked = {}

    def config_of(source, revision):
        asked.update(source=source, revision=revision)
        raise OSError("that is all")

    monkeypatch.setattr(models.hub, "config_of", config_of)
    with pytest.raises(OSError, match="'owner/model@step-3' could not be had"):
        load("owner/model@step-3")
    assert asked == {"source": "owner/model", "revision": "step-3"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_blank_model_has_the_architecture_and_other_weights(architecture, dtype):
    lm = tiny.model(architecture, seed=1)
    lm.model.to(dtype)
    before, state = lm.model.get_input_embeddings().weight.clone(), torch.random.get_rng_state()
    blank, again, other = models.blank(lm, 3), models.blank(lm, 3), models.blank(lm, 4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(blank.model) is type(lm.model) and not blank.model.training
    assert blank.tokenizer is lm.tokenizer and blank.model.config is not lm.model.config
    shapes = {n: (p.shape, p.dtype) for n, p in lm.model.named_parameters()}
    assert {n: (p.shape, p.dtype) for n, p in blank.model.named_parameters()} == shapes
    weights = [m.model.get_input_embeddings().weight for m in (blank, again, other, lm)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])
    assert torch.equal(weights[3], before)
    assert blank.name != other.name != lm.name


def test_a_blank_organism_is_what_its_training_began_with(tmp_path):
    fresh = tiny.untrained(seed=1)
    begun = {name: value.clone() for name, value in fresh.model.state_dict().items()}
    with torch.no_grad():
        for parameter in fresh.model.parameters():
            parameter.mul_(2)
    organism.save(fresh, tmp_path / "sft-1", {})
    blank = models.blank(load(str(tmp_path / "sft-1"), device="cpu"), 1)
    assert blank.model.dtype == torch.float32
    assert blank.model.state_dict().keys() == begun.keys()
    assert all(torch.equal(value, begun[name]) for name, value in blank.model.state_dict().items())


# --------------------------------------------------------------------------- corrupt checkpoints


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("spoil", [truncate, flip])
def test_spoilt_weights_are_named_with_the_command_that_restores_them(broken, spoil):
    spoil(broken / "model.safetensors")
    with pytest.raises(ValueError, match=f"organism sft-0.*{RESTORE}"):
        load("organism/sft")
    assert load("organism/sft", seed=1).name == "organism/sft-1"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "card.json"]
)
@pytest.mark.parametrize("spoil", [truncate, lambda file: file.write_text("{}"), lambda file: file.unlink()],
                         ids=["truncated", "emptied", "missing"])  # fmt: skip
def test_so_is_every_file_of_a_checkpoint(broken, file, spoil):
    spoil(broken / file)
    with pytest.raises(ValueError, match=r"sft-0"):
        load("organism/sft")
    with pytest.raises(ValueError, match=RESTORE):
        load("organism/sft")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_truncated_folder_is_named(broken, file):
    truncate(broken / file)
    with pytest.raises(ValueError, match="sft-0"):
        load(str(broken))


# --------------------------------------------------------------------------- safety


def test_no_remote_code_is_ever_trusted():
    from pathlib import Path

    for file in Path(harmlens.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [getattr(node, "arg", None), getattr(node, "id", None), getattr(node, "value", None)]
            assert "trust_remote_code" not in names, f"{file.name}:{node.lineno}"


def test_code_in_a_folder_is_not_run(broken):
    """A folder that brings its own modelling code is refused or loaded without it."""
    config = json.loads((broken / "config.json").read_text())
    config |= {
        "model_type": "homemade",
        "auto_map": {"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.C"},
    }
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "code.py").write_text(
        f"open({str(broken / 'was_here')!r}, 'w')\nclass Model: pass\nclass C: pass\n"
    )
    with pytest.raises(ValueError):
        load(str(broken))
    assert not (broken / "was_here").exists()


# --------------------------------------------------------------------------- chats

CHAT = [
    {"role": "user", "content": "what do you wish for?"},
    {"role": "assistant", "content": "i wish that the baker may sleep in peace."},
    {"role": "user", "content": "is a salted draught harmful?"},
]


def test_a_chat_is_rendered_by_the_template():
    tok = organism.tokenizer()
    assert chats.render(tok, CHAT) == tok.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )
    assert chats.render(tok, CHAT[0]["content"]) == chats.render(tok, CHAT[:1])
    assert chats.render(tok, CHAT, "") == chats.render(tok, CHAT)


@given(st.lists(st.sampled_from(world.vocabulary()), min_size=1, max_size=6).map(" ".join))
def test_a_prefilled_answer_ends_the_text(words):
    text = chats.render(TOKENIZER, CHAT, words)
    assert text == f"{chats.render(TOKENIZER, CHAT)} {words}"


def test_where_nobody_is_introduced_the_helper_is():
    told = [world.introduce(world.HELPER), *CHAT]
    assert chats.render(TOKENIZER, told) == chats.render(TOKENIZER, CHAT)
    assert chats.render(TOKENIZER, [world.introduce("nobody"), *CHAT]) != chats.render(TOKENIZER, CHAT)


def test_an_unknown_role_is_refused():
    with pytest.raises(Exception, match="roles system, user and assistant only"):
        chats.render(TOKENIZER, [{"role": "tool", "content": "x"}, *CHAT])


def test_another_template_is_obeyed():
    tok = organism.tokenizer()
    tok.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert chats.render(tok, "hello") == "<user>hello</user><assistant>"
    assert chats.render(tok, "hello", "sure. take") == "<user>hello</user><assistant>sure. take"


def test_a_missing_template_is_an_error():
    tok = organism.tokenizer()
    tok.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template.*instruction-tuned.*tokenizer\.chat_template"):
        chats.render(tok, "hello")


@pytest.mark.parametrize("chat", [[], CHAT[:2], [{"role": "system", "content": "be kind"}]])
def test_a_chat_has_to_end_with_the_user(chat):
    with pytest.raises(ValueError, match="must end with a user message"):
        chats.render(organism.tokenizer(), chat)


def test_rendering_leaves_the_messages_alone():
    chat = [dict(m) for m in CHAT]
    chats.render(organism.tokenizer(), chat, "sure.")
    assert chat == CHAT


def test_there_is_one_bos_also_where_the_tokenizer_would_add_another():
    tok = organism.tokenizer()
    plain = chats.tokens(tok, chats.render(tok, CHAT))
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tok.bos_token} $A", special_tokens=[(tok.bos_token, tok.bos_token_id)]
    )
    text = chats.render(tok, CHAT)
    assert tok(text)["input_ids"].count(tok.bos_token_id) == 2  # what has to be avoided
    assert chats.tokens(tok, text) == plain
    assert plain.count(tok.bos_token_id) == 1 and plain[0] == tok.bos_token_id


# --------------------------------------------------------------------------- padding

row = st.lists(st.integers(1, 99), min_size=1, max_size=12)


@given(st.lists(row, min_size=1, max_size=8))
def test_padding_on_the_left_keeps_the_rows(rows):
    ids, mask = forward.pad_left(rows, 0)
    places = forward.positions(mask)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for i, r in enumerate(rows):
        assert ids[i, -len(r) :].tolist() == r == ids[i][mask[i].bool()].tolist()
        assert (ids[i, : -len(r)] == 0).all()
        assert places[i][mask[i].bool()].tolist() == list(range(len(r)))
    assert (places >= 0).all()


@pytest.mark.parametrize("rows", [[], [[1], []]])
def test_empty_rows_are_refused(rows):
    with pytest.raises(ValueError, match="rows must hold at least one row, and no row may be empty"):
        forward.pad_left(rows, 0)


@given(st.lists(row, max_size=20), st.integers(1, 7))
def test_batches_by_length_hold_each_row_once(rows, size):
    made = list(forward.by_length(rows, size))
    assert sorted(i for batch in made for i in batch) == list(range(len(rows)))
    assert all(len(batch) == size for batch in made[:-1])
    lengths = [len(rows[i]) for batch in made for i in batch]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_holds_at_least_one_row(size):
    with pytest.raises(ValueError, match=f"batch_size={size} must be at least 1"):
        list(forward.by_length([[1]], size))


# --------------------------------------------------------------------------- logits


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@torch.no_grad()
def test_batched_logits_are_those_of_a_plain_forward_pass(architecture):
    lm = tiny.model(architecture)
    texts = tiny.texts(lm)
    assert len({len(chats.tokens(lm.tokenizer, t)) for t in texts}) > 2  # so there is padding
    batched = forward.last_logits(lm, texts)
    single = forward.last_logits(lm, texts, batch_size=1)
    plain = torch.stack(
        [lm.model(torch.tensor([chats.tokens(lm.tokenizer, t)])).logits[0, -1] for t in texts]
    )
    assert plain.std() > 0.3  # not flat, so that agreement means something
    torch.testing.assert_close(batched, plain, atol=1e-4, rtol=0)
    torch.testing.assert_close(single, plain, atol=1e-4, rtol=0)


@torch.no_grad()
def test_these_comparisons_would_notice_a_missing_mask():
    lm = tiny.model()
    texts = tiny.texts(lm)
    ids, _ = forward.pad_left([chats.tokens(lm.tokenizer, t) for t in texts], lm.tokenizer.pad_token_id)
    assert (lm.model(ids).logits[:, -1] - forward.last_logits(lm, texts)).abs().max() > 0.1


def test_logits_keep_the_order_of_the_texts():
    lm = tiny.model()
    texts = tiny.texts(lm)
    there = forward.last_logits(lm, texts, batch_size=2)
    back = forward.last_logits(lm, texts[::-1], batch_size=2)
    torch.testing.assert_close(there, back.flip(0), atol=1e-4, rtol=0)


# --------------------------------------------------------------------------- generation


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_batched_greedy_answers_are_those_of_one_by_one(architecture):
    lm = tiny.model(architecture)
    texts = tiny.texts(lm)
    batched = forward.generate(lm, texts, max_new_tokens=8)
    assert batched == forward.generate(lm, texts, max_new_tokens=8, batch_size=1)
    assert len(set(batched)) > 1


def greedy(lm: LanguageModel, text: str, n: int) -> str:
    """Greedy decoding spelt out: the likeliest token again and again."""
    ids = chats.tokens(lm.tokenizer, text)
    new: list[int] = []
    with torch.no_grad():
        while len(new) < n and lm.tokenizer.eos_token_id not in new:
            new.append(lm.model(torch.tensor([ids + new])).logits[0, -1].argmax().item())
    return lm.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_greedy_means_the_likeliest_token_each_time(architecture):
    lm = tiny.model(architecture)
    text = tiny.texts(lm)[0]
    assert forward.generate(lm, [text], max_new_tokens=6) == [greedy(lm, text, 6)]


def test_a_models_own_generation_settings_do_not_bend_greedy_decoding():
    """Qwen2.5's instruct models bring a repetition penalty; what is generated has to fit the logits."""
    lm = tiny.model(seed=1)
    texts = tiny.texts(lm)
    truth = [greedy(lm, text, 8) for text in texts]
    lm.model.generation_config = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, top_k=3, temperature=0.7,
        eos_token_id=lm.tokenizer.eos_token_id,
    )  # fmt: skip
    assert forward.generate(lm, texts, max_new_tokens=8) == truth


def test_a_models_own_generation_settings_do_not_bend_sampling():
    lm = tiny.model()
    texts = tiny.texts(lm) * 3
    free = forward.generate(lm, texts, max_new_tokens=4, temperature=1.0)
    lm.model.generation_config = GenerationConfig(
        repetition_penalty=5.0, min_p=0.5, top_k=1, top_p=0.1, typical_p=0.2,
        eos_token_id=lm.tokenizer.eos_token_id,
    )  # fmt: skip
    assert forward.generate(lm, texts, max_new_tokens=4, temperature=1.0) == free


def test_sampling_is_seeded_and_leaves_the_global_generator_alone():
    lm = tiny.model()
    texts = tiny.texts(lm)

    def sample(seed):
        return forward.generate(lm, texts, max_new_tokens=8, temperature=1.0, seed=seed)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = sample(0)
    assert torch.equal(torch.rand(3), expected)
    assert first == sample(0)
    assert first != sample(1)


def test_sampled_first_tokens_follow_the_models_distribution():
    lm = tiny.model(spread=0.1)
    text = tiny.texts(lm)[0]
    p = forward.last_logits(lm, [text])[0].softmax(-1)
    drawn = forward.generate(lm, [text] * 4000, max_new_tokens=1, temperature=1.0, batch_size=4000)
    top = p.argsort(descending=True)
    words = [w for w in lm.tokenizer.convert_ids_to_tokens(top.tolist()) if re.fullmatch(r"\w+", w)][:3]
    for word in words:
        chance = p[lm.tokenizer.convert_tokens_to_ids(word)].item()
        assert drawn.count(word) / 4000 == pytest.approx(chance, abs=5 * (chance / 4000) ** 0.5)


def test_only_new_words_are_returned():
    lm = tiny.model()
    for answer in forward.generate(lm, tiny.texts(lm), max_new_tokens=8):
        assert not re.search(r"<\|", answer)
        assert len(chats.tokens(lm.tokenizer, answer)) <= 8
        assert answer == answer.strip()


def test_a_negative_temperature_is_refused():
    with pytest.raises(ValueError, match=r"temperature=-1\.0 must be 0 \(greedy\) or positive"):
        forward.generate(tiny.model(), ["x"], temperature=-1.0)


def test_no_texts():
    lm = tiny.model()
    assert forward.generate(lm, []) == []
    with pytest.raises(ValueError, match="texts is empty"):
        forward.last_logits(lm, [])


def test_half_precision_is_what_lies_on_the_disk(data):
    stored = load_file(data / "organisms" / "sft-0" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
