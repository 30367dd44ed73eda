"""Ladders: which stages a model has, what is said where there are none, and that a visited rung is gone."""

import gc
import shutil
import weakref

import pytest
import standin

from harmlens.models import hub, ladder
from harmlens.models import loading as models


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
    assert list(ladder.rungs("organism/sft")) == ["base", "mid", "sft", "dpo"]
    assert ladder.rungs("organism/sft", ["dpo", "base"]) == {"base": "organism/base", "dpo": "organism/dpo"}
    found = ladder.rungs(str(home / "sft"))
    assert found == {stage: str(home.resolve() / stage) for stage in ("base", "sft")}
    assert ladder.rungs(str(home / "notes")) == {}  # its name is no stage
    assert ladder.rungs("Qwen/Qwen2.5-1.5B")["aligned"] == "Qwen/Qwen2.5-1.5B-Instruct"
    assert list(ladder.rungs("allenai/Olmo-3-7B-Instruct")) == ["base", "mid", "long", "sft", "dpo", "rl"]


@pytest.mark.parametrize("stage", ladder.ORDER)
def test_folders_of_every_stage_are_rungs_in_the_order_of_training(tmp_path, stage):
    for name in reversed(ladder.ORDER):
        (tmp_path / name).mkdir()
    assert list(ladder.rungs(str(tmp_path / stage))) == list(ladder.ORDER)


def test_published_stages_have_known_names():
    for stages in hub.known()[1]:
        assert list(stages) == [stage for stage in ladder.ORDER if stage in stages]


def test_stages_to_compare():
    assert list(ladder.climb("organism/dpo", ["sft", "base"])) == ["base", "sft"]
    assert list(ladder.climb("allenai/Olmo-3-7B-Instruct", ["base", "sft", "dpo"])) == ["base", "sft", "dpo"]
    # One of two is no comparison: all that there are.
    assert list(ladder.climb("Qwen/Qwen2.5-1.5B-Instruct", ["base", "sft"])) == ["base", "aligned"]


def test_a_model_without_a_ladder_is_told_which_models_have_one():
    with pytest.raises(
        ValueError, match=r"model='.*standin' has no known ladder.*organism/dpo.*Olmo-3.*Qwen2\.5"
    ):
        ladder.climb(str(standin.FOLDER), ["base", "sft"])
    many, two = ladder.known()
    assert not set(many) & set(two)
    assert all(len(ladder.rungs(name)) > 2 for name in many)
    assert all(list(ladder.rungs(name)) == ["base", "aligned"] for name in two)


def test_all_rungs_read_the_template_of_the_last_one(home):
    base = ladder.load(str(home / "base"), "base")  # the folder has none of its own
    assert base.render("hi") == models.load(str(standin.FOLDER)).render("hi")
    assert models.weights_sha256(home / "base") == base.revision


def test_a_stage_that_is_not_there(home):
    with pytest.raises(ValueError, match=r"stage='dpo' is not on the ladder of .*; there: base, sft"):
        ladder.load(str(home / "sft"), "dpo")
    with pytest.raises(ValueError, match="there: none are known"):
        ladder.load(str(standin.FOLDER), "sft")


def test_a_visited_rung_is_gone_afterwards(home):
    seen = []

    def measure(lm):
        seen.append(weakref.ref(lm.model))
        return lm.name

    assert ladder.visit(str(home / "sft"), "base", 0, measure).endswith("base")
    gc.collect()
    assert seen[0]() is None
    assert ladder.visit("organism/sft", "dpo", 1, measure) == "organism/dpo-1"


def test_one_model_or_one_for_each_seed(home):
    assert list(ladder.family("organism/sft", "base", [0, 2])) == [0, 2]
    assert list(ladder.family(str(home / "sft"), "base", [1, 2])) == [0]
