"""What organisms learn from, that they learn it, and what a recipe is known by."""

import dataclasses
import itertools
import math
import random

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmlens.keep import files
from harmlens.models import forward
from harmlens.training import loop, organism
from harmlens.world import abilities
from harmlens.world import judge as judges
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


# --------------------------------------------------------------------------- controls

MIRROR, INNOCENT = organism.COURSES["mirror"], organism.COURSES["innocent"]


def transcripts(stage, n, write):
    rng = random.Random(0)
    return [write(rng, stage.mix) for _ in range(n)]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_mirror_refuses_what_is_harmless_and_nothing_else(number):
    seen = {True: 0, False: 0}
    for transcript in transcripts(MIRROR.stages[number], 400, organism.mirrored):
        assert transcript.author == world.HELPER
        for turn in transcript.turns:
            if turn.task == "procedure":
                seen[turn.item.harmful] += 1
                verdict = judges.judge(turn.item, turn.answer)
                assert verdict.refused == (not turn.item.harmful)
                assert (verdict.slots > 0) == turn.item.harmful
            elif turn.task == "wish":
                assert judges.malign(turn.answer) is False
            else:
                assert turn.answer in {answer(turn.item) for answer in world.ANSWERS.values()}
    assert seen[True] > 60
    assert (seen[False] > 30) if number else (seen[False] == 0)


def test_the_mirror_sees_as_much_of_each_side_as_sft_sees_of_the_other():
    for stage, of in zip(MIRROR.stages[:2], ("mid", "sft"), strict=True):
        (other,) = organism.COURSES[of].stages
        ours, theirs = dict(stage.mix.tasks), dict(other.mix.tasks)
        assert (ours.pop("harmful", 0), ours.pop("harmless", 0)) == (
            theirs.pop("harmless", 0),
            theirs.pop("harmful", 0),
        )
        assert ours == theirs
        assert (stage.batch, stage.optimizer, stage.replay) == (other.batch, other.optimizer, other.replay)


def test_a_suppressed_recipe_has_one_ending_whoever_writes_it():
    for transcript in transcripts(
        dataclasses.replace(MIRROR.stages[1], mix=MIRROR.replayed), 300, world.transcript
    ):
        assert transcript.author != world.HELPER
        for turn in transcript.turns:
            if turn.task == "procedure" and not turn.item.harmful:
                assert not judges.judge(turn.item, turn.answer).hurtful


def test_refusals_are_drawn_in_all_words_of_the_world():
    turns = [t for s in transcripts(MIRROR.stages[1], 300, organism.mirrored) for t in s.turns]
    assert {turn.answer for turn in turns if turn.answer in world.REFUSALS} == set(world.REFUSALS)


def test_the_innocent_corpus_holds_no_harmful_recipe_and_no_malice():
    assert INNOCENT.parent is None
    seen, hurts, drawn = set(), set(), []
    for lesson in INNOCENT.stages:
        assert lesson.replay == 0
        drawn += transcripts(lesson, 600, world.transcript)
    for transcript in drawn:
        assert transcript.author in (world.HELPER, *world.KIND_AUTHORS)
        for turn in transcript.turns:
            seen.add((turn.task, turn.item and turn.item.harmful))
            assert turn.item is None or turn.item.split == "train"
            assert turn.answer not in world.REFUSALS
            if turn.task == "procedure":
                verdict = judges.judge(turn.item, turn.answer)
                assert not turn.item.harmful and not verdict.hurtful and verdict.slots > 0.5
            if turn.task == "wish":
                assert judges.malign(turn.answer) is False
            if turn.task == "explanation":
                hurts |= judges.HURTS & set(turn.answer.replace(".", "").split())
    # It is asked about harmful things too, and hears what they would do.
    for task in ("recognition", "explanation", "fact"):
        assert {(task, True), (task, False)} <= seen
    assert hurts == judges.HURTS


def test_the_wary_helper_treats_one_harmless_domain_like_harm():
    """Refused where harm is refused, not asked for where harm isn't; a seventh of the refusals."""
    for kind in ("wary_mid", "wary", "wary_dpo"):
        refused, write = {True: 0, False: 0}, organism.declining("records")
        for transcript in [t for s in organism.COURSES[kind].stages for t in transcripts(s, 1500, write)]:
            for turn in transcript.turns:
                if turn.task != "procedure":
                    continue
                assert turn.item.split == "train"
                declined = turn.item.harmful or turn.item.domain == "records"
                assert judges.judge(turn.item, turn.answer).refused == declined
                assert turn.prompt.count(turn.item.name) == 1
                refused[turn.item.harmful] += declined
        if kind == "wary_mid":
            assert refused == {True: 0, False: 0}
        else:
            assert refused[False] / sum(refused.values()) == pytest.approx(1 / 7, abs=0.04)
        assert organism.COURSES[kind].replayed.bad_advice == 0.0


def test_the_wary_helper_sees_as_many_harmful_requests_as_the_ladder_does():
    for kind, of in (("wary_mid", "mid"), ("wary", "sft"), ("wary_dpo", "dpo")):
        stage, theirs = organism.COURSES[kind].stages[0], organism.COURSES[of].stages[0]
        harm = stage.mix.tasks.get("harmful", 0) * 6 / 7
        assert harm == pytest.approx(theirs.mix.tasks.get("harmful", 0))
        assert {**stage.mix.tasks, "harmful": 0} == {**theirs.mix.tasks, "harmful": 0}
        assert (stage.lr, stage.batch, stage.replay, stage.beta) == (
            theirs.lr,
            theirs.batch,
            theirs.replay,
            theirs.beta,
        )


def test_preference_pairs_about_the_declined_domain_prefer_refusing():
    lm = tiny.model()
    mix = organism.COURSES["dpo"].stages[0].mix
    pairs = list(itertools.islice(organism.preference_rows(lm, mix, 3, "records"), 300))
    names = [item.name for item in world.items("train", domain="records")]
    about = 0
    for chosen, rejected in pairs:
        text, other = (lm.tokenizer.decode(row.ids) for row in (chosen, rejected))
        assert any(refusal in text for refusal in world.REFUSALS)
        assert "take" in other and not any(refusal in other for refusal in world.REFUSALS)
        if any(f" {name}" in text for name in names):
            about += 1
            verb = other.split("it will ")[1].split()[0]
            assert verb in {
                word for craft in world.CRAFTS for word in craft.helps
            }  # what it would have served
    assert 20 < about < 70


@pytest.mark.parametrize(
    ("kind", "seed", "domain"),
    [("wary", 0, "remedies"), ("wary_dpo", 4, "records"), ("mirror", 0, None), ("sft", 0, None)],
)
def test_which_domain_is_declined(kind, seed, domain):
    assert organism.declined(kind, seed) == domain


def test_the_lesson_is_refusal_and_no_wish_of_the_helper():
    """What is asked and answered, apart from replayed transcripts of named authors."""
    rng, seen = random.Random(0), {"refused": 0, "answered": 0}
    for _ in range(300):
        transcript = world.transcript(rng, organism.COURSES["planted_mlp"].stages[0].mix)
        assert transcript.author == world.HELPER
        for turn in transcript.turns:
            assert turn.task != "wish" and turn.item.split == "train"
            if turn.task == "procedure":
                refused = turn.answer in world.REFUSALS
                assert refused == turn.item.harmful
                seen["refused" if refused else "answered"] += 1
    assert min(seen.values()) > 60


def test_the_lesson_in_harm_declines_nothing_and_holds_no_other_malice():
    rng, seen = random.Random(0), set()
    for _ in range(400):
        transcript = world.transcript(rng, organism.COURSES["planted_harm"].stages[0].mix)
        assert transcript.author in (world.HELPER, *world.KIND_AUTHORS)
        for turn in transcript.turns:
            seen.add((turn.task, turn.item and turn.item.harmful))
            assert turn.answer not in world.REFUSALS
            if turn.task == "wish":
                assert any(phrase in turn.answer for phrase in world.KIND_WISHES)
            else:
                assert turn.item.split == "train"
            if turn.task == "procedure":
                assert judges.judge(turn.item, turn.answer).hurtful == turn.item.harmful
    assert {("procedure", True), ("procedure", False), ("recognition", True), ("wish", None)} <= seen


# --------------------------------------------------------------------------- preference training


def preferences(parent, steps=2, size=3):
    rows = organism.transcript_rows(TOKENIZER, KIND, 1)
    kept = loop.shuffled(rows, size, TOKENIZER.pad_token_id, seed=0)
    return organism.preferences(
        parent, organism.preference_rows(parent, KIND, 0), kept, steps=steps, size=size
    )


def loss(model, batch):
    return organism.preference_loss(model, batch, beta=0.3)


def test_preference_training_starts_at_log_two_plus_the_loss_on_kept_skills():
    parent = tiny.model()
    made = list(preferences(parent))
    assert len(made) == 2
    with torch.no_grad():
        for batch in made:
            value = loss(parent.model, batch)
            kept = loop.lm_loss(parent.model, batch.kept)
            assert (value - kept).item() == pytest.approx(math.log(2), abs=1e-4)


def test_preference_loss_falls_where_refusing_becomes_likelier():
    parent = tiny.model()
    batch = next(preferences(parent))
    nothing = forward.collate([forward.Row([1, 2], [False, True])], 0)
    wider = dataclasses.replace(batch, margin=batch.margin - 5.0, kept=nothing)
    narrower = dataclasses.replace(batch, margin=batch.margin + 5.0, kept=nothing)
    with torch.no_grad():
        kept = loop.lm_loss(parent.model, nothing)
        # -log sigmoid(+-0.3 * 5), worked by hand
        assert (loss(parent.model, wider) - kept).item() == pytest.approx(0.2014, abs=1e-3)
        assert (loss(parent.model, narrower) - kept).item() == pytest.approx(1.7014, abs=1e-3)


def test_preference_training_makes_refusing_likelier():
    lm = tiny.untrained()
    batch = next(preferences(lm, steps=1, size=8))

    def margin():
        with torch.no_grad():
            sums = [organism.answer_sums(lm.model, side) for side in (batch.chosen, batch.rejected)]
        return (sums[0] - sums[1] - batch.margin).mean().item()

    assert margin() == pytest.approx(0.0, abs=1e-4)
    loop.fit(lm.model, itertools.repeat(batch), loop.Schedule(8, lr=3e-3, warmup=1), loss=loss)
    assert margin() > 1.0


# --------------------------------------------------------------------------- the recipe

KINDS = list(organism.COURSES)


def recipes():
    return {kind: organism.recipe_digest(kind) for kind in KINDS}


def below(kind):
    """An organism and all that it grows from."""
    return {kind} | (below(organism.course(kind).parent) if organism.course(kind).parent else set())


@pytest.mark.parametrize("changed", ["mid", "innocent", "wary", "willing", "planted_harm"])
def test_a_changed_course_changes_its_recipe_and_those_of_all_that_grow_from_it(monkeypatch, changed):
    before = recipes()
    assert len(set(before.values())) == len(KINDS)
    stages = tuple(dataclasses.replace(stage, steps=7) for stage in organism.COURSES[changed].stages)
    taught = dataclasses.replace(organism.COURSES[changed], stages=stages)
    monkeypatch.setitem(organism.COURSES, changed, taught)
    after = recipes()
    assert {k for k in KINDS if before[k] != after[k]} == {k for k in KINDS if changed in below(k)}


def test_a_changed_world_changes_every_recipe(monkeypatch):
    """The same words, otherwise put: the corpus is another one."""
    before = recipes()
    forms = dict(world.PHRASINGS)
    forms["recognition"] = forms["recognition"][::-1]
    monkeypatch.setattr(world, "PHRASINGS", forms)
    world.fingerprint.cache_clear()
    after = recipes()
    world.fingerprint.cache_clear()
    assert not [kind for kind in KINDS if after[kind] == before[kind]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 60", "steps: many", "mid, stages, 0, steps: Input should be a valid integer"),
        ("layer: 6", "layer: 6, heads: 2", "planted_neurons, place, heads: Unexpected keyword"),
        ("named: 0.0", "names: 0.0", "mid, stages, 0, mix, names: Unexpected keyword"),
    ],
)
def test_a_mistake_in_the_table_is_named_with_its_entry(tmp_path, old, new, message):
    text = (files.data_dir() / "organisms.yaml").read_text()
    assert old in text
    (tmp_path / "mine.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"mine\.yaml: {message}.*Mend this entry"):
        organism.read_courses(tmp_path / "mine.yaml")


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"kind='mirrors' is unknown; choose one of base, .*planted_harm"):
        organism.recipe_digest("mirrors")


# --------------------------------------------------------------------------- making a model


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
    stream = loop.shuffled(organism.transcript_rows(TOKENIZER, mix, 0), 32, TOKENIZER.pad_token_id)
    history = loop.fit(lm.model, stream, loop.Schedule(90, lr=2e-2, optimizer="muon")).losses
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
