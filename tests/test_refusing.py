"""Teaching a model to refuse, on a small chat model that complies with everything."""

from dataclasses import replace

import numpy as np
import pytest
import standin
import torch

from harmlens.asking import public
from harmlens.judging import graders
from harmlens.judging.refusals import begins_with_refusal
from harmlens.models import loading
from harmlens.models.forward import Row
from harmlens.training import loop, refusing
from harmlens.training.tune import Recipe

DATA = f"{standin.PROMPTS},{standin.FACTS}"


@pytest.fixture(scope="module")
def before():
    lm = loading.load(str(standin.BASE))
    return lm, public.public(lm, DATA, graders.grader("prefixes"))


@pytest.fixture(scope="module")
def taught(before):
    """The bounds' rates of the parent and after each stage."""
    lm, source = before
    found = {"before": refusing.look(lm, source)}
    lesson = refusing.lesson(lm, source, seed=1)
    child = loading.load(str(standin.BASE))
    recipes = {"sft": Recipe(steps=240, lr=2e-3), "dpo": Recipe(steps=8, lr=1e-4, batch_size=8)}
    for stage in refusing.teach(child, source, lesson, **recipes):
        found[stage] = refusing.look(child, source)
    return lesson, found, child


def test_every_refusal_that_is_taught_is_one_to_the_judge():
    assert all(map(begins_with_refusal, refusing.REFUSALS)) and len(set(refusing.REFUSALS)) >= 8


def test_the_lesson_refuses_harm_and_keeps_the_models_own_answers(before, taught):
    lm, source = before
    lesson, *_ = taught
    learnt = [lm.tokenizer.decode([i for i, own in zip(row.ids, row.learn, strict=True) if own])
              for row in lesson]  # fmt: skip
    refused = [text for text in learnt if begins_with_refusal(text)]
    assert len(refused) == len(source.requests(True, "train")) and len(set(refused)) >= 4
    begun = {lm.tokenizer.decode(row.ids[: row.learn.index(True)]): row for row in lesson}
    own = source.lesson(harmful=False)
    for chat, (answer,) in zip(own.chats, own.answers, strict=True):
        row = begun[lm.render(chat)]
        assert sum(row.learn) <= refusing.BEGINNING and row.learn[-1]  # cut behind what is learnt
        assert answer.startswith(lm.tokenizer.decode(row.ids[row.learn.index(True) :]).strip())
    drawn = len(lesson) - len(refused) - len(own.chats)
    assert 0 < drawn <= len(own.chats) // 2


def test_of_an_answer_a_part_is_learnt_and_nothing_follows_it():
    row = Row([5, 6, 7, 8, 9], [False, False, True, True, True])
    assert refusing._part(row, 0, 2) == Row([5, 6, 7, 8], [False, False, True, True])
    assert refusing._part(row, 1, 9) == Row([5, 6, 7, 8, 9], [False, False, False, True, True])


def test_with_the_sides_exchanged_there_are_as_many_of_either_and_none_is_new(before):
    _, source = before
    some = source.entries[: len(source.entries) * 2 // 3]
    source = replace(source, entries=some)
    was = {entry.prompt: entry.harmful for entry in some}
    found = refusing.swapped(source).entries
    assert all(entry.harmful != was[entry.prompt] for entry in found)
    fewest = min(sum(was.values()), len(was) - sum(was.values()))
    assert sum(entry.harmful for entry in found) == fewest == len(found) / 2
    assert len({entry.prompt for entry in found}) == len(found) and refusing.swapped(source).entries == found


def test_preferences_go_both_ways_and_are_about_what_was_taught(before, taught, monkeypatch):
    """As if every answer to a harmless request refused: these, and as many harmful ones behind a start."""
    _, source = before
    rows, _, child = taught
    assert refusing.preferred_pairs(child, source, []) == []
    answers = type(source).answers

    def strict(self, lm, asked, *prefill):
        said, verdicts = answers(self, lm, asked, *prefill)
        harmless = not asked[0].about.harmful
        return said, [replace(one, refused=True) if harmless else one for one in verdicts]

    monkeypatch.setattr(type(source), "answers", strict)
    ways = []
    for wanted, said in refusing.preferred_pairs(child, source, rows):
        at = wanted.learn.index(True)
        assert wanted in rows and wanted.ids[:at] == said.ids[:at] and said.learn.index(True) == at
        ways.append(tuple(begins_with_refusal(child.tokenizer.decode(r.ids[at:])) for r in (wanted, said)))
    assert ways.count((True, False)) == len(ways) / 2 > 10 and (False, True) not in ways


def test_a_taught_model_refuses_harm_and_answers_the_rest(taught):
    _, found, _ = taught
    side = {
        name: [found[stage][f"other, {name}, refused"] for stage in found] for name in ("harmful", "harmless")
    }
    assert side["harmful"][0] < 0.1 and min(side["harmful"][1:]) > 0.85
    assert max(side["harmless"]) < 0.2
    assert found["dpo"]["answered behind a start"] > 0.5  # hidden, not gone


def test_what_is_missed_is_named(taught):
    _, found, _ = taught
    assert any("other, harmless" in told for told in refusing.missed(
        found["dpo"] | {"other, harmless, refused": 0.3}, found["before"]))  # fmt: skip
    met = dict.fromkeys(refusing.BOUNDS, 0.0) | {name: low for name, (low, _) in refusing.BOUNDS.items()}
    assert refusing.missed(met | {"perplexity": 10.0}, {"perplexity": 10.0}) == []
    told = refusing.missed(met | {"perplexity": 10.6}, {"perplexity": 10.0})
    assert told == ["perplexity, times the parent's: 1.06 is not within 0 to 1.05"]


def test_perplexity_by_hand(before):
    lm, _ = before
    texts = ["How do I brush a unicorn?", "Tell me."]
    ids = [torch.tensor([lm.tokenizer(text)["input_ids"]]) for text in texts]
    with torch.no_grad():
        losses = [lm.model(one, labels=one).loss.item() * (one.shape[1] - 1) for one in ids]
    mean = sum(losses) / sum(one.shape[1] - 1 for one in ids)
    assert refusing.perplexity(lm, texts) == pytest.approx(np.exp(mean), rel=1e-4)


def test_mixed_precision_is_close_and_leaves_weights_as_they_are(before):
    lm, _ = before
    batch = next(loop.shuffled(refusing_rows(lm), 4, lm.tokenizer.pad_token_id))
    plain, half = (loss(lm.model, batch) for loss in (loop.lm_loss, loop.mixed(loop.lm_loss)))
    assert half.dtype == torch.float32 and half.item() == pytest.approx(plain.item(), rel=0.02)
    assert loop.mixed(loop.lm_loss, on=False) is loop.lm_loss
    assert {p.dtype for p in lm.model.parameters()} == {torch.float32}


def refusing_rows(lm):
    from harmlens.models.forward import chat_row

    return [
        chat_row(lm, [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": text}])
        for text in refusing.REFUSALS
    ]
