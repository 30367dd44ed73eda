"""One loader for organisms, folders and the Hub, and the stages of a model's training."""

import ast
import gc
import json
import shutil
import weakref

import lecture
import pytest
import standin
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import harmlens
from harmlens.evidence import results
from harmlens.evidence.stats import Estimate
from harmlens.keep.files import weights_sha256
from harmlens.models import chats, hub
from harmlens.models import loading as models
from harmlens.models.loading import load
from harmlens.notebook import Run
from harmlens.training import organism

TOKENIZER = organism.tokenizer()
RESTORE = r"git checkout -- data/organisms/sft-0.*make organism"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tiny.data_folder(tmp_path_factory.mktemp("data"), ("sft", 0), ("sft", 1), ("base", 0))


@pytest.fixture
def data(checkpoints, monkeypatch):
    """A data folder to read from."""
    monkeypatch.setenv("HARMLENS_DATA", str(checkpoints))
    monkeypatch.setenv("HARMLENS_BUILD", str(checkpoints / "build"))  # nothing was trained there
    return checkpoints


@pytest.fixture
def broken(checkpoints, tmp_path, monkeypatch):
    """A checkpoint of its own to spoil."""
    shutil.copytree(checkpoints, tmp_path / "data")
    monkeypatch.setenv("HARMLENS_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HARMLENS_BUILD", str(tmp_path / "build"))
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
    assert lm.revision == weights_sha256(folder)
    assert not lm.model.training
    assert lm.device == torch.device("cpu") and lm.model.dtype == torch.float32


def test_the_same_organism_by_name_seed_and_folder(data):
    ways = [load("organism/sft"), load("organism/sft", seed=0), load("organism/sft-0"),
            load("organism/sft-0", seed=0), load(str(data / "organisms" / "sft-0"))]  # fmt: skip
    assert len({lm.revision for lm in ways}) == 1
    assert load("organism/sft-1").revision != ways[0].revision


def test_precision_can_be_chosen(data):
    assert load("organism/sft", dtype=torch.float16).model.dtype == torch.float16
    assert load("organism/sft", dtype="bfloat16").model.dtype == torch.bfloat16


def test_precision_of_real_models_can_be_chosen_for_all_notebooks(data, monkeypatch):
    monkeypatch.setenv("HARMLENS_DTYPE", "bf16")
    folder = str(data / "organisms" / "sft-0")
    assert load(folder).model.dtype == torch.bfloat16
    assert load(folder, dtype="float32").model.dtype == load("organism/sft").model.dtype == torch.float32
    monkeypatch.setenv("HARMLENS_DTYPE", "exact")
    with pytest.raises(ValueError, match="dtype='exact' is no precision"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    ["organism/nonsense", "organism/sft-7", "organism/dpo", "organism", "organism/", "organism/sft-0/x"],
)
def test_an_unknown_organism_lists_what_there_is(data, name):
    with pytest.raises(ValueError, match=r"available: base-0, sft-0, sft-1$"):
        load(name)


def test_an_unknown_seed_lists_what_there_is(data):
    with pytest.raises(ValueError, match=r"base-2 .*--seeds 2.*; available: base-0, sft-0, sft-1$"):
        load("organism/base", seed=2)


def test_a_checkpoint_that_is_being_written_is_not_on_the_list(broken):
    shutil.copytree(broken, broken.with_name("mid-0.part"))
    with pytest.raises(ValueError, match=r"available: base-0, sft-0, sft-1$"):
        load("organism/mid")


def test_without_checkpoints_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HARMLENS_DATA", str(tiny.data_folder(tmp_path / "data")))
    monkeypatch.setenv("HARMLENS_BUILD", str(tmp_path / "build"))
    with pytest.raises(ValueError, match="none yet: run `make organism`"):
        load("organism/sft")


def test_two_seeds_that_disagree(data):
    with pytest.raises(ValueError, match="'organism/sft-0' and seed=1 disagree"):
        load("organism/sft-0", seed=1)


def test_a_seed_for_a_model_that_has_none(data):
    with pytest.raises(ValueError, match="seed=0 only selects among training runs"):
        load(str(data / "organisms" / "sft-0"), seed=0)
    with pytest.raises(ValueError, match="seed=1 only selects among training runs"):
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

    def get_config_dict(source, revision):
        asked.update(source=source, revision=revision)
        raise OSError("that is all")

    monkeypatch.setattr(models.PretrainedConfig, "get_config_dict", get_config_dict)
    with pytest.raises(OSError, match="'owner/model@step-3' could not be had"):
        load("owner/model@step-3")
    assert asked == {"source": "owner/model", "revision": "step-3"}


def test_half_precision_is_what_lies_on_the_disk(data):
    stored = load_file(data / "organisms" / "sft-0" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}


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


# --------------------------------------------------------------------------- stages


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder whose parts are called like stages."""
    folder = tmp_path_factory.mktemp("ladder")
    shutil.copytree(standin.BASE, folder / "base")
    shutil.copytree(standin.FOLDER, folder / "sft")
    (folder / "notes").mkdir()
    (folder / "base" / "chat_template.jinja").unlink()
    return folder


def test_rungs_of_an_organism_of_folders_and_of_the_hub(home):
    assert list(models.stages("organism/sft")) == ["base", "mid", "sft", "dpo"]
    assert models.stages("organism/sft", ["dpo", "base"]) == {"base": "organism/base", "dpo": "organism/dpo"}
    found = models.stages(str(home / "sft"))
    assert found == {stage: str(home.resolve() / stage) for stage in ("base", "sft")}
    assert models.stages(str(home / "notes")) == {}  # its name is no stage
    assert models.stages("Qwen/Qwen2.5-1.5B")["aligned"] == "Qwen/Qwen2.5-1.5B-Instruct"
    assert list(models.stages("allenai/Olmo-3-7B-Instruct")) == ["base", "mid", "long", "sft", "dpo", "rl"]


@pytest.mark.parametrize("stage", models.ORDER)
def test_folders_of_every_stage_are_rungs_in_the_order_of_training(tmp_path, stage):
    for name in reversed(models.ORDER):
        (tmp_path / name).mkdir()
    assert list(models.stages(str(tmp_path / stage))) == list(models.ORDER)


def test_published_stages_have_known_names():
    for stages in hub.known()[1]:
        assert list(stages) == [stage for stage in models.ORDER if stage in stages]


def test_stages_to_compare():
    assert list(models.stages("organism/dpo", ["sft", "base"], least=2)) == ["base", "sft"]
    assert list(models.stages("allenai/Olmo-3-7B-Instruct", ["base", "sft", "dpo"], least=2)) == [
        "base",
        "sft",
        "dpo",
    ]
    # One of two is no comparison: all that there are.
    assert list(models.stages("Qwen/Qwen2.5-1.5B-Instruct", ["base", "sft"], least=2)) == ["base", "aligned"]


def test_a_model_without_a_ladder_is_told_which_models_have_one():
    with pytest.raises(
        ValueError, match=r"model='.*standin' has no known ladder.*organism/dpo.*Olmo-3.*Qwen2\.5"
    ):
        models.stages(str(standin.FOLDER), ["base", "sft"], least=2)


def test_all_rungs_read_the_template_of_the_last_one(home):
    def look(lm):  # the folder has no template of its own
        return lm.render("hi"), lm.revision

    said, revision = models.at_stage(str(home / "base"), "base", 0, look)
    assert said == models.load(str(standin.FOLDER)).render("hi")
    assert weights_sha256(home / "base") == revision


def test_a_stage_that_is_not_there(home):
    with pytest.raises(ValueError, match=r"stage='dpo' is not on the ladder of .*; there: base, sft"):
        models.at_stage(str(home / "sft"), "dpo", 0, str)
    with pytest.raises(ValueError, match="there: none are known"):
        models.at_stage(str(standin.FOLDER), "sft", 0, str)


def test_a_visited_rung_is_gone_afterwards(home):
    seen = []

    def measure(lm):
        seen.append(weakref.ref(lm.model))
        return lm.name

    assert models.at_stage(str(home / "sft"), "base", 0, measure).endswith("base")
    gc.collect()
    assert seen[0]() is None
    assert models.at_stage("organism/sft", "dpo", 1, measure) == "organism/dpo-1"


# --------------------------------------------------------------------------- notebook 02


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_an_untrained_model_has_the_architecture_and_other_weights(architecture):
    untrained, lm = lecture.defined("02").untrained, tiny.model(architecture, seed=1)
    lm.model.to(torch.bfloat16)
    state = torch.random.get_rng_state()
    made = [untrained(lm) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    shapes = [{n: (p.shape, p.dtype) for n, p in m.model.named_parameters()} for m in (lm, *made)]
    assert all(found == shapes[0] for found in shapes) and not made[0].model.training
    weights = [m.model.get_input_embeddings().weight for m in (*made, lm)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_an_untrained_organism_is_what_its_training_began_with(tmp_path):
    fresh = tiny.untrained(seed=0)
    begun = {name: value.clone() for name, value in fresh.model.state_dict().items()}
    with torch.no_grad():
        for parameter in fresh.model.parameters():
            parameter.mul_(2)
    organism.save(fresh, tmp_path / "sft-0", {})
    found = lecture.defined("02").untrained(load(str(tmp_path / "sft-0"), device="cpu")).model
    assert found.dtype == torch.float32 and found.state_dict().keys() == begun.keys()
    assert all(torch.equal(value, begun[name]) for name, value in found.state_dict().items())


# ------------------------------------------------------------------ a ladder that was trained several times


@pytest.fixture
def ladder(tmp_path):
    """A parent, and two runs of what was made of it."""
    for number, name in enumerate(("mid", "sft-0", "sft-1")):
        lm = tiny.model(seed=number)
        lm.model.save_pretrained(tmp_path / "mine" / name)
        lm.tokenizer.save_pretrained(tmp_path / "mine" / name)
    return tmp_path / "mine"


def test_a_folder_with_numbers_stands_for_training_runs(ladder):
    name = str(ladder / "sft")
    assert models.in_runs(name) and models.in_runs("organism/sft") and not models.in_runs(str(ladder / "mid"))
    runs = [models.load(name, seed=seed) for seed in (0, 1)]
    assert runs[0].revision == models.load(str(ladder / "sft-0")).revision != runs[1].revision
    assert models.load(name).revision == runs[0].revision
    with pytest.raises(ValueError, match="seed=2: there is no sft-2, only sft-0, sft-1"):
        models.load(name, seed=2)
    with pytest.raises(ValueError, match="seed=1 only selects among training runs"):
        models.load(str(ladder / "mid"), seed=1)


def test_its_stages_and_its_runs_are_those_of_a_notebook(ladder, tmp_path):
    name = str(ladder / "sft")
    assert models.stages(name) == {"mid": str(ladder / "mid"), "sft": name}
    assert models.at_stage(name, "sft", 1, lambda lm: lm.revision) == models.load(name, seed=1).revision
    run = Run({"model": name, "seed": 1, "output": str(tmp_path / "out")}, "18_your_own_model")
    assert run.lm.revision == models.load(name, seed=1).revision
    assert run.before.revision == models.load(str(ladder / "mid")).revision
    run.record("V5", Estimate(2.0, 1.0, 3.0, 9), ("where harm stays", Estimate(0.1, 0.0, 0.2, 9)))
    (one,) = results.load_measurements([tmp_path / "out"])
    assert (one.run, one.role) == (1, "real") and one.model.endswith("mine/sft")
