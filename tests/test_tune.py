"""Fine-tuning: all weights or adapters, what stays as it was, and how a run is taken up again."""

import dataclasses
import itertools
import sys

import peft
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from harmlens import checkpoints, finetune, lora, masks, models, organism, scores, world
from harmlens.finetune import IGNORE, Recipe, Row, chat_row, collate, tune

SHORT = Recipe(steps=6, lr=1e-2, batch_size=4, rank=2, alpha=4)
METHODS = pytest.mark.parametrize("method", finetune.METHODS)


def chats(lm, n=10):
    items = world.items("train", harmful=False)[:: 216 // n][:n]
    return [
        chat_row(
            lm,
            [
                {"role": "user", "content": world.request(item)},
                {"role": "assistant", "content": world.procedure(item)},
            ],
        )
        for item in items
    ]


def weights(lm):
    return {name: p.detach().clone() for name, p in lm.model.named_parameters()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def recipe(method, **changes):
    return dataclasses.replace(SHORT, method=method, **changes)


# --------------------------------------------------------------------------- what is learnt


@METHODS
def test_the_lesson_is_learnt(method):
    lm = tiny.model(spread=0.05)
    rows = chats(lm)
    larger = {"rank": 16, "alpha": 32, "lr": 3e-2} if method == "lora" else {}
    losses = tune(lm, rows, recipe(method, steps=25, **larger)).losses
    assert len(losses) == 25
    assert losses[-1] < losses[0] - 1
    with torch.no_grad():
        assert finetune.lm_loss(lm.model, collate(rows, 0)).item() < losses[0] - 1  # adapters are merged


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@METHODS
def test_afterwards_it_is_a_plain_model_again(architecture, method):
    lm = tiny.model(architecture)
    before, kinds = weights(lm), [type(module) for module in lm.model.modules()]
    tune(lm, chats(lm), recipe(method, steps=2))
    after = weights(lm)
    assert after.keys() == before.keys()
    assert [type(module) for module in lm.model.modules()] == kinds
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())
    assert not lm.model.training and not hasattr(lm.model, "peft_config")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    blocks = set(scores.matrices(lm))
    assert changed == blocks if method == "lora" else blocks <= changed


def test_adapters_know_the_transposed_layers_of_gpt2():
    tok = organism.tokenizer()
    config = GPT2Config(
        vocab_size=len(tok), n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3
    )
    lm = models.LanguageModel("tiny/gpt2", GPT2LMHeadModel(config).eval(), tok)
    ids = torch.tensor([chats(lm)[0].ids])
    with torch.no_grad(), lora.adapters(lm, rank=2, alpha=4):
        _stir(lm)
        inside = lm.model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(lm.model(ids).logits, inside, atol=1e-4, rtol=0)


def _stir(lm):
    """Give every adapter an effect."""
    found = [p for name, p in lm.model.named_parameters() if "lora_B" in name]
    assert len(found) == sum(
        "base_layer" in name for name, _ in lm.model.named_parameters() if name.endswith("weight")
    )
    for p in found:
        p.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "phi3"])
@torch.no_grad()
def test_adapters_start_without_effect_and_keep_theirs_when_merged(architecture):
    lm = tiny.model(architecture)
    ids = torch.tensor([chats(lm)[0].ids])
    before = lm.model(ids).logits
    with lora.adapters(lm, rank=2, alpha=4):
        assert torch.equal(lm.model(ids).logits, before)
        _stir(lm)
        inside = lm.model(ids).logits
    assert (inside - before).abs().max() > 0.1
    torch.testing.assert_close(lm.model(ids).logits, inside, atol=1e-4, rtol=0)


def test_adapters_are_those_of_peft():
    """The same run by hand: peft's model, AdamW through fit, peft's merge."""
    ours, other = tiny.model(), tiny.model()
    setting = recipe("lora")
    tune(ours, chats(ours), setting)
    names = [name.removesuffix(".weight") for name in scores.matrices(other)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        wrapped = peft.get_peft_model(other.model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=names))
    stream = finetune.batches(finetune.epochs(chats(other), 0), 4, 0, seed=0)
    finetune.fit(wrapped.base_model.model, stream, steps=6, lr=1e-2, warmup=5)
    merged = wrapped.merge_and_unload()
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, dict(merged.named_parameters())[name].detach())


def test_an_exception_drops_the_adapters_and_leaves_the_weights():
    lm = tiny.model()
    before = weights(lm)
    with pytest.raises(RuntimeError, match="stop"), lora.adapters(lm), torch.no_grad():
        _stir(lm)
        raise RuntimeError("stop")
    assert same(weights(lm), before)
    with pytest.raises(ValueError, match="lower lr"):
        tune(lm, chats(lm), recipe("lora", lr=1e30, steps=30))
    assert same(weights(lm), before)


@METHODS
def test_the_seed_decides(method):
    def run(seed):
        lm = tiny.model()
        tune(lm, chats(lm), recipe(method, seed=seed))
        return weights(lm)

    first = run(0)
    assert same(first, run(0))
    assert not same(first, run(1))


def test_global_random_numbers_neither_matter_nor_move():
    lm, other = tiny.model(), tiny.model()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    tune(lm, chats(lm), recipe("lora", steps=2))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    tune(other, chats(other), recipe("lora", steps=2))
    assert same(weights(lm), weights(other))


@METHODS
def test_bfloat16(method):
    lm = tiny.model()
    lm = dataclasses.replace(lm, model=lm.model.to(torch.bfloat16))
    losses = tune(lm, chats(lm), recipe(method, steps=20)).losses
    assert losses[-1] < losses[0]
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}


# --------------------------------------------------------------------------- pieces


@given(st.integers(1, 7), st.integers(0, 5))
def test_pieces_add_up_to_the_batch(rows, seed):
    """Loss and gradient, whatever the lengths and numbers of learnt tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(5):
        n = int(torch.randint(2, 9, (), generator=generator))
        made.append(
            Row(
                torch.randint(8, 99, (n,), generator=generator).tolist(),
                [False, *[(i + j) % 2 == 0 for j in range(n - 2)], i > 0],
            )
        )
    batch, model = collate(made, 0), tiny.untrained().model
    whole = finetune.lm_loss(model, batch)
    whole.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    parts = finetune.pieces(batch, rows)
    assert sum(len(part.ids) for part, _ in parts) <= 5 and all(len(part.ids) <= rows for part, _ in parts)
    assert sum(weight for _, weight in parts) == pytest.approx(1.0)
    total = sum(finetune.lm_loss(model, part) * weight for part, weight in parts)
    total.backward()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(model.lm_head.weight.grad, gradient, atol=1e-6, rtol=1e-4)
    assert all((part.labels[:, 1:] != IGNORE).any() for part, _ in parts)


def test_training_in_pieces_is_the_same_training():
    one, two = tiny.model(spread=0.05), tiny.model(spread=0.05)
    a = tune(one, chats(one), recipe("full", lr=1e-3)).losses
    b = tune(two, chats(two), recipe("full", lr=1e-3), rows_at_once=3).losses
    assert a == pytest.approx(b, rel=1e-4)


# --------------------------------------------------------------------------- watching and holding


@METHODS
def test_what_is_watched(method):
    lm, modes = tiny.model(), []

    def watch():
        modes.append((lm.model.training, torch.is_grad_enabled()))
        return len(modes)

    seen = tune(lm, chats(lm), recipe(method), watch=watch, at=[0, 2, 6]).seen
    assert seen == {0: 1, 2: 2, 6: 3}
    assert set(modes) == {(False, False)}


def test_training_ends_where_enough_was_seen():
    lm = tiny.model()
    done = tune(lm, chats(lm), SHORT, watch=lambda: 1, at=range(7), until=lambda value: True)
    assert len(done.losses) == 1 and done.seen == {0: 1, 1: 1}


def test_held_weights_stay_and_others_learn():
    lm = tiny.model()
    every = scores.Scores(
        "random", {n: m.weight.detach().clone() for n, m in scores.matrices(lm).items()}, lm.name, ""
    )
    mask = masks.Mask(
        {n: torch.arange(0, v.numel(), 7) for n, v in every.values.items()}, masks.shapes_of(every), lm.name
    )
    before = weights(lm)
    tune(lm, chats(lm), SHORT, hold=mask)
    for name, value in weights(lm).items():
        moved = (value != before[name]).flatten()
        if name in mask.indices:
            assert not moved[mask.indices[name]].any()
            moved[mask.indices[name]] = True
        assert moved.float().mean() > 0.5


# --------------------------------------------------------------------------- taking a run up again


class Interrupted(Exception):
    pass


def interrupted(lm, setting, folder, stop_at, **options):
    """A run that is interrupted after so many steps."""
    calls = itertools.count(1)
    fit_after = finetune.fit

    def fit(*args, after=None, **kwargs):
        def stop(step):
            result = after(step) if after else None
            if next(calls) == stop_at:
                raise Interrupted
            return result

        return fit_after(*args, after=stop, **kwargs)

    finetune.fit = fit
    try:
        with pytest.raises(Interrupted):
            tune(lm, chats(lm), setting, folder=folder, every=2, **options)
    finally:
        finetune.fit = fit_after


@METHODS
@pytest.mark.parametrize("at", [1, 3, 5])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(method, at, tmp_path):
    whole, first, second = (tiny.model() for _ in range(3))
    losses = tune(whole, chats(whole), recipe(method)).losses
    interrupted(first, recipe(method), tmp_path, at)
    assert len(list(tmp_path.glob("*.safetensors"))) == (at > 2)
    done = tune(second, chats(second), recipe(method), folder=tmp_path, every=2)
    assert done.losses == losses
    assert same(weights(second), weights(whole))


def test_what_was_seen_survives(tmp_path):
    at = [0, 1, 2, 4, 6]

    def watch():
        return "seen"

    interrupted(tiny.model(), SHORT, tmp_path, 5, watch=watch, at=at)
    lm = tiny.model()
    assert tune(lm, chats(lm), SHORT, folder=tmp_path, watch=watch, at=at).seen == dict.fromkeys(at, "seen")


@METHODS
def test_a_finished_run_is_not_run_again(method, tmp_path, monkeypatch):
    first, second = tiny.model(), tiny.model()
    done = tune(first, chats(first), recipe(method), folder=tmp_path)

    def forbidden(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(finetune, "token_losses", forbidden)
    again = tune(second, chats(second), recipe(method), folder=tmp_path)
    assert again.losses == done.losses and same(weights(second), weights(first))


@pytest.mark.parametrize("change", ["recipe", "rows", "model"])
def test_another_run_has_another_file(change, tmp_path):
    lm = tiny.model()
    tune(lm, chats(lm), SHORT, folder=tmp_path)
    other = tiny.model(seed=1 if change == "model" else 0)
    tune(
        other,
        chats(other, 9 if change == "rows" else 10),
        dataclasses.replace(SHORT, lr=2e-2 if change == "recipe" else SHORT.lr),
        folder=tmp_path,
    )
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_checkpoint_starts_anew_and_a_foreign_one_is_refused(tmp_path):
    lm, other = tiny.model(), tiny.model()
    tune(lm, chats(lm), SHORT, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    tune(other, chats(other), SHORT, folder=tmp_path)
    assert same(weights(lm), weights(other))
    foreign = checkpoints.Checkpoint(file, "another key")
    with pytest.raises(ValueError, match=r"holds another run.*delete it, or give another folder"):
        checkpoints.resume(foreign, lm.model, [])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_pre_training_is_taken_up_as_well(optimizer, tmp_path):
    def run(steps_before_stop=None):
        model = tiny.untrained().model
        rows = organism.transcript_rows(organism.tokenizer(), world.Mix(), 0)
        kept = checkpoints.Checkpoint(tmp_path / f"{optimizer}.safetensors", "key", every=2)

        def after(step):
            if step == steps_before_stop:
                raise Interrupted

        options = {"steps": 6, "lr": 1e-2, "optimizer": optimizer, "checkpoint": kept, "after": after}
        return model, finetune.fit(model, finetune.batches(rows, 4, 0), **options)

    with pytest.raises(Interrupted):
        run(5)
    resumed, history = run()
    (tmp_path / f"{optimizer}.safetensors").unlink()
    whole, expected = run()
    assert history == expected
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), whole.parameters(), strict=True))


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "qlora"}, "method='qlora' is unknown; choose 'full' or 'lora'"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"batch_size": -1}, "batch_size=-1 must be at least 1"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"lr": 0.0}, "lr=0.0 must be a finite number above 0"),
        ({"lr": float("nan")}, "lr=nan must be"),
        ({"alpha": float("inf")}, "alpha=inf must be"),
    ],
)
def test_recipes_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_bad_input_is_named_before_anything_is_changed():
    lm = tiny.model()
    before, rows = weights(lm), chats(lm)
    empty = masks.Mask({}, {}, lm.name)
    foreign = masks.Mask({"nothing": torch.tensor([0])}, {"nothing": (1, 1)}, "another model", name="set")
    for kwargs, message in (
        ({"rows": []}, "rows is empty"),
        ({"recipe": recipe("lora"), "hold": empty}, "method='lora' can't; use 'full'"),
        ({"hold": foreign}, "made for 'another model' and does not fit 'tiny/llama'"),
        ({"watch": len, "at": [7]}, r"at=\[7\]: 7 is not within 0 to steps=6"),
        ({"rows_at_once": -2}, "rows_at_once=-2 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(lm, **{"rows": rows, "recipe": SHORT, **kwargs})
    half = dataclasses.replace(lm, model=tiny.model().model.half())
    with pytest.raises(ValueError, match=r"can't be trained in float16.*method='lora'"):
        tune(half, rows, SHORT)
    assert same(weights(lm), before)
    with pytest.raises(ValueError, match="rank=0 must be at least 1"), lora.adapters(lm, rank=0):
        pass


def test_without_peft_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    lm = tiny.model()
    with pytest.raises(ImportError, match="pip install peft"):
        tune(lm, chats(lm), recipe("lora"))


def test_steps_of_epochs():
    assert finetune.steps_of(1, 6000, 16) == 375
    assert finetune.steps_of(3, 10, 4) == 8
    assert finetune.steps_of(0.01, 10, 4) == 1


def test_a_clone_has_weights_of_its_own():
    lm = dataclasses.replace(tiny.model(), revision="abc")
    copy = models.clone(lm)
    before = weights(lm)
    tune(copy, chats(copy), SHORT)
    assert same(weights(lm), before) and not same(weights(copy), before)
    assert (copy.name, copy.revision) == (lm.name, lm.revision)
