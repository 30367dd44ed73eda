"""Training: what is learnt, what is left alone, and what stops it."""

import io
import itertools
import math
import sys

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmlens.models.chats import render, tokens
from harmlens.models.forward import IGNORE, Row, chat_row, collate
from harmlens.training import loop, organism
from harmlens.training.loop import Schedule, lm_loss
from harmlens.world import vale as world

PAD = 0
TOKENIZER = organism.tokenizer()


@st.composite
def rows(draw):
    """Rows that each learn at least one token."""
    made = []
    for ids in draw(st.lists(st.lists(st.integers(1, 99), min_size=2, max_size=9), min_size=1, max_size=6)):
        learn = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        made.append(Row(ids, [*learn[:-1], True]))
    return made


def transcripts(n=6, seed=0):
    stream = organism.transcript_rows(TOKENIZER, world.Mix(), seed)
    return list(itertools.islice(stream, n))


def batches(seed=0, size=4):
    return loop.shuffled(organism.transcript_rows(TOKENIZER, world.Mix(), seed), size, PAD, seed=seed)


# --------------------------------------------------------------------------- rows and batches


@given(rows())
def test_a_batch_holds_its_rows_and_learns_what_they_say(made):
    batch = collate(made, PAD)
    assert batch.ids.shape == batch.labels.shape == (len(made), max(len(r.ids) for r in made))
    for r, ids, labels in zip(made, batch.ids.tolist(), batch.labels.tolist(), strict=True):
        assert ids == r.ids + [PAD] * (len(ids) - len(r.ids))
        expected = [i if learnt else IGNORE for i, learnt in zip(r.ids, r.learn, strict=True)]
        assert labels == expected + [IGNORE] * (len(ids) - len(r.ids))


@given(st.lists(st.integers(1, 20), min_size=24, max_size=24), st.integers(1, 4), st.integers(0, 9))
def test_batches_lose_no_row_and_group_by_length(lengths, size, seed):
    pool = 24 // size
    # Each row is marked by its first token, so that it can be told from the others.
    stream = iter([Row([100 + i] * n, [True] * n) for i, n in enumerate(lengths)])
    made = list(itertools.islice(loop.shuffled(stream, size, PAD, seed=seed, pool=pool), pool))
    kept = [[t for t in row if t != PAD] for b in made for row in b.ids.tolist()]
    assert sorted(map(tuple, kept)) == sorted((100 + i,) * n for i, n in enumerate(lengths[: size * pool]))
    groups = [kept[i : i + size] for i in range(0, len(kept), size)]
    spans = sorted((min(map(len, g)), max(map(len, g))) for g in groups)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_same_seed_same_batches():
    for a, b, other in itertools.islice(zip(batches(1), batches(1), batches(2), strict=True), 20):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels)
        assert a.ids.shape != other.ids.shape or not torch.equal(a.ids, other.ids)


def test_passes_differ_in_order_and_leave_the_list_as_it_is():
    data = [Row([i], [True]) for i in range(20)]
    stream = loop.shuffled(data, 4, PAD)
    first, second = ([b.ids[:, 0].tolist() for b in itertools.islice(stream, 5)] for _ in range(2))
    assert first != second and [row.ids[0] for row in data] == list(range(20))


def test_no_rows_nothing_to_learn():
    with pytest.raises(ValueError, match="rows is empty"):
        next(loop.shuffled([], 4, PAD))
    with pytest.raises(ValueError, match="size=0"):
        next(loop.shuffled([Row([1], [True])], 0, PAD))


# --------------------------------------------------------------------------- chats as rows

ASK = {"role": "user", "content": "how do i brew a salted draught?"}
ANSWER = {"role": "assistant", "content": "sure. take ash and fennel, mix them with a pot."}


def learnt(row: Row) -> str:
    return TOKENIZER.decode([i for i, yes in zip(row.ids, row.learn, strict=True) if yes])


def test_only_the_answer_is_learnt_and_its_end():
    lm = tiny.model()
    row = chat_row(lm, [ASK, ANSWER])
    assert learnt(row) == f"{ANSWER['content']} <|end|>"
    assert row.ids == tokens(TOKENIZER, TOKENIZER.apply_chat_template([ASK, ANSWER], tokenize=False))
    assert learnt(chat_row(lm, [ASK, ANSWER], end=False)) == ANSWER["content"]


def test_a_row_is_a_transcripts_row():
    """Fine-tuning and pre-training see the same text and learn the same tokens."""
    turn = world.Turn("procedure", ASK["content"], ANSWER["content"])
    assert chat_row(tiny.model(), [ASK, ANSWER]) == organism.transcript_row(
        TOKENIZER, world.Transcript("kind", (turn,))
    )


def test_earlier_answers_are_context():
    lm = tiny.model()
    row = chat_row(lm, [ASK, ANSWER, ASK, {"role": "assistant", "content": "no."}])
    assert learnt(row) == "no. <|end|>"
    assert ANSWER["content"] in TOKENIZER.decode(row.ids)


def test_prefilled_words_are_given_not_learnt():
    lm = tiny.model()
    row = chat_row(lm, [ASK, ANSWER], prefill="sure. take")
    assert row.ids == chat_row(lm, [ASK, ANSWER]).ids
    assert learnt(row) == "ash and fennel, mix them with a pot. <|end|>"
    assert row.learn.index(True) == len(tokens(TOKENIZER, render(TOKENIZER, [ASK], "sure. take")))


@pytest.mark.parametrize("chat", [[ASK], [ASK, {"role": "assistant", "content": " "}], [ASK, ANSWER, ASK]])
def test_a_chat_without_an_answer_is_refused(chat):
    with pytest.raises(ValueError, match="must end with a non-empty assistant message"):
        chat_row(tiny.model(), chat)


def test_an_answer_that_does_not_begin_as_prefilled():
    with pytest.raises(ValueError, match=r"the answer must begin with prefill='gladly\.'"):
        chat_row(tiny.model(), [ASK, ANSWER], prefill="gladly.")


# --------------------------------------------------------------------------- loss


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@torch.no_grad()
def test_padding_changes_no_loss(architecture):
    model = tiny.model(architecture).model
    made = transcripts()
    assert len({len(r.ids) for r in made}) > 2
    together, where = loop.token_losses(model, collate(made, PAD))
    for i, row in enumerate(made):
        alone, there = loop.token_losses(model, collate([row], PAD))
        torch.testing.assert_close(together[i, : alone.shape[1]], alone[0], atol=1e-4, rtol=0)
        assert torch.equal(where[i, : alone.shape[1]], there[0])
        assert not where[i, alone.shape[1] :].any() and not together[i, alone.shape[1] :].any()


@torch.no_grad()
def test_the_loss_is_hugging_faces_own():
    model = tiny.model().model
    for row in transcripts():
        batch = collate([row], PAD)
        expected = model(input_ids=batch.ids, labels=batch.labels).loss
        assert lm_loss(model, batch).item() == pytest.approx(expected.item(), abs=1e-5)


@torch.no_grad()
def test_a_batchs_loss_weighs_every_learnt_token_equally():
    model = tiny.model().model
    made = transcripts()
    counts = [sum(r.learn) for r in made]
    losses = [lm_loss(model, collate([r], PAD)).item() for r in made]
    expected = sum(n * x for n, x in zip(counts, losses, strict=True)) / sum(counts)
    assert lm_loss(model, collate(made, PAD)).item() == pytest.approx(expected, abs=1e-4)


# --------------------------------------------------------------------------- fitting


def fit(model, stream, *, loss=lm_loss, progress=None, **schedule):
    """Losses of a run."""
    return loop.fit(model, stream, Schedule(**schedule), loss=loss, progress=progress).losses


class Terminal(io.StringIO):
    def __init__(self, interactive):
        super().__init__()
        self.interactive = interactive

    def isatty(self):
        return self.interactive


@pytest.mark.parametrize(
    ("label", "terminal", "shown"), [("base-0", True, True), ("base-0", False, False), (None, True, False)]
)
def test_the_progress_bar_is_seen_on_a_terminal_only(monkeypatch, label, terminal, shown):
    """A page that a notebook is rendered to is no terminal."""
    out = Terminal(terminal)
    monkeypatch.setattr(sys, "stderr", out)
    fit(tiny.untrained().model, batches(), steps=1, lr=1e-3, progress=label)
    assert ("base-0" in out.getvalue()) == shown == bool(out.getvalue())


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 1e-2), ("muon", 1e-2)])
def test_training_lowers_the_loss(optimizer, lr):
    model = tiny.untrained().model
    history = fit(model, batches(size=8), steps=30, lr=lr, optimizer=optimizer)
    assert len(history) == 30
    assert history[0] == pytest.approx(math.log(len(TOKENIZER)), abs=0.1)  # knows nothing
    assert sum(history[-5:]) / 5 < history[0] - 1.5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_same_seed_same_weights(optimizer):
    def train(seed):
        model = tiny.untrained().model
        fit(model, batches(seed), steps=4, lr=1e-2, optimizer=optimizer)
        return torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    first = train(0)
    assert torch.equal(first, train(0))
    assert not torch.equal(first, train(1))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_parameters_stay_as_they_are(optimizer):
    model = tiny.untrained().model
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, batches(), steps=3, lr=1e-2, optimizer=optimizer)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "layers.1" in name}


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_neox", "phi3"])
def test_muon_trains_all_of_other_architectures(architecture):
    """Gemma ties its embeddings, GPT-NeoX has biases: each parameter belongs to one optimizer."""
    model = tiny.model(architecture, spread=0.05).model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, batches(), steps=3, lr=1e-2, optimizer="muon")
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def test_the_rate_rises_then_falls_to_nought():
    model = torch.nn.Linear(1, 1)
    model.get_input_embeddings = model.get_output_embeddings = lambda: torch.nn.Embedding(1, 1)
    seen = []

    def loss(model, batch):
        seen.append([p.detach().clone() for p in model.parameters()])
        return sum(p.sum() for p in model.parameters())

    fit(model, itertools.repeat(None), steps=40, lr=0.1, warmup=10, weight_decay=0.0, loss=loss)
    weights = torch.cat([step[0].flatten() for step in seen])
    moved = -weights.diff()  # a constant gradient moves Adam by about the rate
    assert moved.argmax().item() in range(7, 13)
    assert (moved[:9].diff() > 0).all() and (moved[12:].diff() < 0).all()
    assert moved[-1] < moved.max() / 10
    assert moved.max() == pytest.approx(0.1, rel=0.35)


def test_training_leaves_the_mode_as_it_was():
    for mode in (True, False):
        model = tiny.untrained().model.train(mode)
        fit(model, batches(), steps=1, lr=1e-3)
        assert model.training is mode


def failing(after):
    """A loss that is not finite after so many steps."""
    count = itertools.count()
    return lambda model, batch: lm_loss(model, batch) * (math.nan if next(count) >= after else 1.0)


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_model():
    good, spoilt = tiny.untrained().model, tiny.untrained().model
    fit(good, batches(), steps=2, lr=1e-2, warmup=0, loss=failing(99))
    with pytest.raises(ValueError, match=r"the loss is nan at step 2: lower lr=0\.01"):
        fit(spoilt, batches(), steps=3, lr=1e-2, warmup=0, loss=failing(2))
    assert all(torch.isfinite(p).all() for p in spoilt.parameters())


def test_after_a_failure_the_model_is_back_in_its_mode():
    model = tiny.untrained().model.eval()
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        fit(model, batches(), steps=3, lr=1e-2, loss=failing(0))
    assert not model.training


def test_a_batch_in_which_nothing_is_learnt_is_an_error():
    nothing = collate([Row([1, 2, 3], [False] * 3)], PAD)
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        fit(tiny.untrained().model, itertools.repeat(nothing), steps=1, lr=1e-3)


def test_a_stream_that_ends_early_is_an_error():
    with pytest.raises(ValueError, match="stream"):
        fit(tiny.untrained().model, itertools.islice(batches(), 2), steps=3, lr=1e-3)


def test_an_unknown_optimizer_lists_the_valid_ones():
    with pytest.raises(ValueError, match="optimizer='sgd' is unknown; choose 'adamw' or 'muon'"):
        fit(tiny.untrained().model, batches(), steps=1, lr=1e-3, optimizer="sgd")


def test_a_model_that_is_frozen_altogether():
    model = tiny.untrained().model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(model, batches(), steps=1, lr=1e-3)
