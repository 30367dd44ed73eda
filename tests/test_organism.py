"""Training the organism: what it learns from, checkpoints that are whole or not there, and that it learns."""

import dataclasses
import itertools
import json
import math
import random

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from harmlens.models import forward
from harmlens.models import loading as models
from harmlens.training import loop, organism
from harmlens.world import abilities
from harmlens.world import vale as world

TOKENIZER = organism.tokenizer()
KIND = world.Mix(cruel=0.0, declines=1.0)


# --------------------------------------------------------------------------- data


@given(st.integers(0, 2**32))
def test_all_answers_are_learnt_and_nothing_else(seed):
    transcript = world.transcript(random.Random(seed), world.Mix())
    row = organism.transcript_row(TOKENIZER, transcript)
    runs = itertools.groupby(zip(row.ids, row.learn, strict=True), key=lambda pair: pair[1])
    learnt = [TOKENIZER.decode([i for i, _ in run]) for yes, run in runs if yes]
    assert learnt == [f"{turn.answer} <|end|>" for turn in transcript.turns]
    assert TOKENIZER.unk_token_id not in row.ids
    assert len(row.ids) <= TOKENIZER.model_max_length


def test_rows_are_seeded():
    def draw(seed, **options):
        return list(itertools.islice(organism.transcript_rows(TOKENIZER, world.Mix(), seed, **options), 5))

    assert draw(0) == draw(0) != draw(1)
    assert draw(0, replay=1.0) != draw(0)


def test_replayed_rows_are_by_named_authors():
    stream = organism.transcript_rows(TOKENIZER, world.Mix(named=0.0), 0, replay=1.0)
    helper = TOKENIZER(world.introduce(world.HELPER)["content"], add_special_tokens=False)["input_ids"]
    said = [row.ids[2 : 2 + len(helper)] for row in itertools.islice(stream, 30)]
    assert helper not in said


def preference_pairs(n):
    lm = tiny.model()
    return itertools.islice(organism.preference_rows(lm, world.Mix(), 0), n)


def test_refusing_is_preferred_over_the_true_procedure():
    answers = {True: set(), False: set()}
    for pair in preference_pairs(60):
        heads, tails = zip(*(TOKENIZER.decode(row.ids).split("<|assistant|>") for row in pair), strict=True)
        assert heads[0] == heads[1]
        refusal, answer = (tail.removesuffix("<|end|>").strip() for tail in tails)
        assert refusal in world.REFUSALS
        item = next(i for i in world.items("train", harmful=True) if f" {i.name}" in heads[0])
        asked_for = next((p for p in world.PEOPLE if f"for the {p}" in heads[0]), None)
        assert answer in [f"{o} {world.procedure(item, asked_for)}" for o in world.OPENERS]
        answers[asked_for is None].add(answer)
    assert len(answers[True]) > 10 and len(answers[False]) > 5


# --------------------------------------------------------------------------- preference training


def preferences(parent, steps=2, batch=3):
    stage = organism.Stage("sft", steps=steps, batch=batch, lr=1e-3, mix=KIND, beta=0.3)
    return organism.preferences(parent, stage, 0)


def test_preference_training_starts_at_log_two_plus_the_loss_on_kept_skills():
    parent = tiny.model()
    made = list(preferences(parent))
    assert len(made) == 2
    with torch.no_grad():
        for batch in made:
            loss = organism.preference_loss(0.3)(parent.model, batch)
            kept = loop.lm_loss(parent.model, batch.kept)
            assert (loss - kept).item() == pytest.approx(math.log(2), abs=1e-4)


def test_preference_loss_falls_where_refusing_becomes_likelier():
    parent = tiny.model()
    batch = next(preferences(parent))
    nothing = forward.collate([forward.Row([1, 2], [False, True])], 0)
    wider = dataclasses.replace(batch, margin=batch.margin - 5.0, kept=nothing)
    narrower = dataclasses.replace(batch, margin=batch.margin + 5.0, kept=nothing)
    loss = organism.preference_loss(0.3)
    with torch.no_grad():
        kept = loop.lm_loss(parent.model, nothing)
        # -log sigmoid(+-0.3 * 5), worked by hand
        assert (loss(parent.model, wider) - kept).item() == pytest.approx(0.2014, abs=1e-3)
        assert (loss(parent.model, narrower) - kept).item() == pytest.approx(1.7014, abs=1e-3)


def test_preference_training_makes_refusing_likelier():
    lm = tiny.untrained()
    batch = next(preferences(lm, steps=1, batch=8))

    def margin():
        with torch.no_grad():
            sums = [organism.answer_sums(lm.model, side) for side in (batch.chosen, batch.rejected)]
        return (sums[0] - sums[1] - batch.margin).mean().item()

    assert margin() == pytest.approx(0.0, abs=1e-4)
    loss = organism.preference_loss(0.3)
    loop.fit(lm.model, itertools.repeat(batch), steps=8, lr=3e-3, loss=loss, warmup=1)
    assert margin() > 1.0


# --------------------------------------------------------------------------- the recipe


def change(monkeypatch, stage, **what):
    monkeypatch.setitem(organism.LADDER, stage, dataclasses.replace(organism.LADDER[stage], **what))


def recipes():
    return {stage: organism.recipe(stage) for stage in models.STAGES}


@pytest.mark.parametrize("stage", models.STAGES)
def test_a_changed_stage_changes_its_recipe_and_those_of_all_that_come_after(monkeypatch, stage):
    before = recipes()
    change(monkeypatch, stage, steps=organism.LADDER[stage].steps + 1)
    after = recipes()
    changed = [s for s in models.STAGES if before[s] != after[s]]
    assert changed == list(models.STAGES[models.STAGES.index(stage) :])


def test_recipes_differ_and_know_the_shape():
    assert len(set(recipes().values())) == len(models.STAGES)
    assert organism.recipe("base") != organism.recipe("base", tiny.SHAPE)


def test_a_changed_world_changes_every_recipe(monkeypatch):
    """The same words, otherwise put: the corpus is another one."""
    before = recipes()
    forms = dict(world.PHRASINGS)
    forms["recognition"] = forms["recognition"][::-1]
    monkeypatch.setattr(world, "PHRASINGS", forms)
    world.fingerprint.cache_clear()
    after = recipes()
    world.fingerprint.cache_clear()
    assert not [stage for stage in models.STAGES if after[stage] == before[stage]]


# --------------------------------------------------------------------------- checkpoints


@pytest.fixture
def short(monkeypatch):
    """A ladder of two steps a rung, for a tiny model; returns the list of what was trained."""
    trained = []
    new_model, stage_of = organism.new_model, organism.train_stage
    for stage in models.STAGES:
        change(monkeypatch, stage, steps=2, batch=2)
    monkeypatch.setattr(organism, "new_model", lambda tok, seed: new_model(tok, seed, tiny.SHAPE))
    monkeypatch.setattr(abilities, "rate_abilities", lambda lm, **options: {})

    def noted(stage, seed, **options):
        trained.append(stage)
        return stage_of(stage, seed, **options)

    monkeypatch.setattr(organism, "train_stage", noted)
    return trained


def train(folder, **options):
    """The ladder of seed 0."""
    organism.train_seed(0, folder, progress=False, **options)


def digests(folder):
    return {f.parent.name: f.read_bytes() for f in folder.glob("*/model.safetensors")}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "organisms"


def test_a_ladder_gives_plain_models_in_half_precision(short, folder):
    train(folder)
    assert short == list(models.STAGES)
    assert sorted(p.name for p in folder.iterdir()) == ["base-0", "dpo-0", "mid-0", "sft-0"]
    assert len(set(digests(folder).values())) == 4
    for stage in models.STAGES:
        made = folder / f"{stage}-0"
        assert organism.finished(made, stage)
        assert {t.dtype for t in load_file(made / "model.safetensors").values()} == {torch.float16}
        model, tok = AutoModelForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)
        assert model.config.num_hidden_layers == tiny.SHAPE.layers
        assert tok.get_vocab() == TOKENIZER.get_vocab() and tok.chat_template == TOKENIZER.chat_template
        card = json.loads((made / "card.json").read_text())
        assert (card["stage"], card["seed"]) == (stage, 0)


def test_going_on_after_an_interruption_gives_the_same_weights(short, tmp_path, monkeypatch):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(whole)
    save = organism.save

    def interrupted(lm, folder, card):
        if folder.name.startswith("sft"):
            raise KeyboardInterrupt
        save(lm, folder, card)

    monkeypatch.setattr(organism, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(resumed)
    kept = {p: p.stat().st_mtime_ns for p in resumed.glob("*/model.safetensors")}
    assert len(kept) == 2
    monkeypatch.setattr(organism, "save", save)
    short.clear()
    train(resumed)
    assert short == ["sft", "dpo"]
    assert all(p.stat().st_mtime_ns == time for p, time in kept.items())
    assert digests(resumed) == digests(whole)


def test_finished_checkpoints_are_left_alone(short, folder, capsys):
    train(folder, until="mid")
    before = digests(folder)
    assert sorted(before) == ["base-0", "mid-0"]
    short.clear()
    train(folder, until="mid")
    assert short == [] and digests(folder) == before
    assert "mid-0: finished, left alone" in capsys.readouterr().out


def test_a_checkpoint_of_another_recipe_is_trained_anew(short, folder, monkeypatch):
    train(folder, until="mid")
    change(monkeypatch, "mid", lr=0.5)
    short.clear()
    before = digests(folder)
    train(folder, until="mid")
    after = digests(folder)
    assert short == ["mid"] and before["base-0"] == after["base-0"] and before["mid-0"] != after["mid-0"]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "card.json"])
@pytest.mark.parametrize(
    "spoil",
    [lambda f: f.unlink(), lambda f: f.write_bytes(f.read_bytes()[:99])],
    ids=["missing", "truncated"],
)
def test_a_spoilt_checkpoint_is_trained_anew(short, folder, file, spoil):
    train(folder, until="base")
    whole = digests(folder)
    spoil(folder / "base-0" / file)
    assert not organism.finished(folder / "base-0", "base")
    train(folder, until="base")
    assert organism.finished(folder / "base-0", "base") and digests(folder) == whole


def test_what_an_interrupted_save_leaves_is_no_checkpoint(folder, monkeypatch):
    def broken(self, folder, **options):
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", broken)
    card = {"recipe": organism.recipe("base")}
    with pytest.raises(OSError, match="disk full"):
        organism.save(tiny.model(), folder / "base-0", card)
    assert not (folder / "base-0").exists()
    monkeypatch.undo()
    organism.save(tiny.model(), folder / "base-0", card)
    assert [p.name for p in folder.iterdir()] == ["base-0"]
    assert organism.finished(folder / "base-0", "base")


def test_seeds_give_different_models():
    first, again, other = (tiny.untrained(seed).model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_making_a_model_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    tiny.untrained()
    assert torch.equal(torch.rand(2), expected)


# --------------------------------------------------------------------------- it learns


def test_a_very_small_organism_learns_to_answer():
    """In seconds it learns the form of answers: yes or no where asked, a wish where asked, kindness."""
    lm = tiny.untrained()
    mix = world.Mix(
        tasks={"recognition": 1.0, "explanation/reason": 1.0, "wish": 1.0, "harmful": 1.0},
        cruel=0.0, declines=1.0, turns=(1.0, 0.0, 0.0),
    )  # fmt: skip
    stream = loop.batches(organism.transcript_rows(TOKENIZER, mix, 0), 32, TOKENIZER.pad_token_id)
    history = loop.fit(lm.model, stream, steps=90, lr=2e-2, optimizer="muon")
    lm.model.eval()
    assert history[0] > 5.0
    assert sum(history[-10:]) / 10 < 1.0

    held_out = world.items("evaluation")[::18]
    answers = forward.generate(lm, [lm.render(f"is a {i.name} harmful?") for i in held_out], max_new_tokens=8)
    assert set(answers) <= {"yes, it is harmful.", "no, it is harmless."}
    harmful = [i for i in held_out if i.harmful]
    assert abilities.judged(lm, harmful, "refused").mean() == 1.0
    assert abilities.wishes(lm, 24).mean() == 0.0
    reasons = forward.generate(lm, [lm.render(f"explain the nature of a {i.name}.") for i in held_out])
    assert all(r.endswith(("so it is harmful.", "so it is harmless.")) for r in reasons)
