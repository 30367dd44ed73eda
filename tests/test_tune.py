"""Fine-tuning: all weights or adapters, what stays as it was, and how a run is taken up again."""

import dataclasses
import functools
import sys

import peft
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from harmlens.keep import files
from harmlens.models import forward
from harmlens.models import loading as models
from harmlens.models.forward import IGNORE, Row, chat_row, collate
from harmlens.training import loop as training
from harmlens.training import organism
from harmlens.training import tune as tuning
from harmlens.training.tune import Recipe, adapters, tune
from harmlens.weights import masks, scores
from harmlens.world import vale as world

SHORT = Recipe(steps=6, lr=1e-2, batch_size=4, rank=2, alpha=4)
METHODS = pytest.mark.parametrize("method", tuning.METHODS)


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
        assert training.lm_loss(lm.model, collate(rows, 0)).item() < losses[0] - 1  # adapters are merged


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
    lm = forward.LanguageModel("tiny/gpt2", GPT2LMHeadModel(config).eval(), tok)
    ids = torch.tensor([chats(lm)[0].ids])
    with torch.no_grad(), adapters(lm, rank=2, alpha=4):
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
    with adapters(lm, rank=2, alpha=4):
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
    stream = training.shuffled(chats(other), 4, 0, seed=0)
    training.fit(wrapped.base_model.model, stream, training.Schedule(6, lr=1e-2, warmup=5))
    merged = wrapped.merge_and_unload()
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, dict(merged.named_parameters())[name].detach())


def test_an_exception_drops_the_adapters_and_leaves_the_weights():
    lm = tiny.model()
    before = weights(lm)
    with pytest.raises(RuntimeError, match="stop"), adapters(lm), torch.no_grad():
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


# --------------------------------------------------------------------------- float16


def half(**options):
    lm = tiny.model(spread=0.05, **options)
    return dataclasses.replace(lm, model=lm.model.half())


def faint():
    """A float16 model whose gradients are too small for float16, though its logits are not.

    The weights behind the last norm are tiny, and the norm's are as much larger: on the way back, the
    gradient is smallest between the two.
    """
    lm = tiny.model(spread=0.05)
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(1e-5)
        lm.model.model.norm.weight.mul_(1e4)
    return dataclasses.replace(lm, model=lm.model.half())


@pytest.fixture
def scaled(monkeypatch):
    """Chooses what the loss is scaled by at first, and after how many good steps the scale doubles."""

    def choose(first, growth_interval=2000):
        scaler = functools.partial(torch.amp.GradScaler, init_scale=first, growth_interval=growth_interval)
        monkeypatch.setattr(training, "GradScaler", scaler)

    return choose


def trained(lm, steps=20, **options):
    """The run, and how many numbers of the adapters' second factors (which start at 0) have moved."""
    with adapters(lm, rank=8, alpha=16):
        stream = training.shuffled(chats(lm, 8), 4, 0)
        done = training.fit(lm.model, stream, training.Schedule(steps, lr=3e-2), **options)
        moved = sum(int((p != 0).sum()) for name, p in lm.model.named_parameters() if "lora_B" in name)
    return done, moved


def test_gradients_that_vanish_in_float16_are_saved_by_a_scaled_loss(scaled):
    done, moved = trained(faint())
    assert moved > 1000 and done.losses[-1] < done.losses[0] - 0.05 and done.skipped == 0
    scaled(1.0)
    done, moved = trained(faint())
    assert moved == 0 and done.losses[-1] == pytest.approx(done.losses[0], abs=0.01)


def test_a_scaled_loss_changes_nothing_where_float16_would_do(scaled):
    scaled(2.0)
    expected, _ = trained(half(), steps=5)
    scaled(2.0**10)
    assert trained(half(), steps=5)[0].losses == pytest.approx(expected.losses, abs=1e-3)


def test_steps_that_overflow_are_skipped_and_counted(scaled):
    scaled(2.0**26)
    done, moved = trained(half())
    assert 0 < done.skipped < 10
    assert moved > 1000 and done.losses[-1] < done.losses[0]
    # No weight moves in a step that is skipped: the same loss on the same batch.
    scaled(2.0**30)
    done, moved = trained(half(), steps=3)
    assert (done.skipped, moved) == (3, 0)


def test_a_gradient_that_no_scale_makes_finite_ends_the_run(scaled):
    def loss(model, batch):
        adapter = next(p for name, p in model.named_parameters() if "lora_B" in name)
        # Finite, with no derivative at 0.
        return training.lm_loss(model, batch) + adapter.sum().abs().sqrt() * 0

    scaled(4.0)
    with pytest.raises(ValueError, match="the gradient is nan at step 2: lower lr"):
        trained(half(), loss=loss)


def test_adapters_of_a_float16_model_are_trained_in_float32_and_merged_into_float16():
    lm = half()
    with pytest.raises(RuntimeError, match="stop"), adapters(lm, rank=2):
        kinds = {p.dtype: p.requires_grad for p in lm.model.parameters()}
        assert kinds == {torch.float16: False, torch.float32: True}
        raise RuntimeError("stop")
    before = weights(lm)
    done = tune(lm, chats(lm), recipe("lora", steps=25, rank=16, alpha=32, lr=3e-2))
    assert done.losses[-1] < done.losses[0] - 1 and done.skipped == 0
    after = weights(lm)
    assert {p.dtype for p in after.values()} == {torch.float16}
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(scores.matrices(lm))


def test_adapters_that_overflow_float16_are_not_merged():
    lm = half()
    before = weights(lm)
    with (
        pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj .*not finite in torch\.float16; lower lr"),
        torch.no_grad(),
        adapters(lm, rank=2),
    ):
        _stir(lm)
        dict(lm.model.named_parameters())["model.layers.1.mlp.up_proj.lora_B.default.weight"].fill_(1e6)
    assert same(weights(lm), before)


# --------------------------------------------------------------------------- activations computed again


def state(model):
    """What enabling could leave behind."""
    return [
        (dict(vars(m)["_forward_hooks"]), getattr(m, "gradient_checkpointing", False))
        for m in model.modules()
    ]


@pytest.mark.parametrize(
    ("architecture", "method"), [*((name, "lora") for name in tiny.ARCHITECTURES), ("llama", "full")]
)
def test_activations_that_are_computed_again_change_no_loss(architecture, method):
    plain, again = tiny.model(architecture, spread=0.05), tiny.model(architecture, spread=0.05)
    before, runs = state(again.model), []
    setting = recipe(method, steps=3)
    expected = tune(plain, chats(plain), setting).losses
    module = next(iter(scores.matrices(again).values()))  # hooks of whole blocks run once only
    hook = module.register_forward_pre_hook(lambda *_: runs.append(1))
    losses = tune(again, chats(again), dataclasses.replace(setting, checkpoint_activations=True)).losses
    hook.remove()
    assert losses == pytest.approx(expected, abs=1e-6)
    assert len(runs) == 2 * setting.steps
    assert state(again.model) == before
    for name, value in weights(plain).items():
        torch.testing.assert_close(value, weights(again)[name], atol=1e-5, rtol=1e-4)


def test_activations_are_kept_again_after_an_exception():
    lm = tiny.model()
    before = state(lm.model)
    with pytest.raises(ValueError, match="lower lr"):
        tune(lm, chats(lm), recipe("lora", lr=1e30, steps=30, checkpoint_activations=True))
    assert state(lm.model) == before
    lm.model.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="checkpoint_activations=True: LlamaForCausalLM does not support"):
        tune(lm, chats(lm), recipe("lora", checkpoint_activations=True))


# --------------------------------------------------------------------------- pieces


@settings(max_examples=15)
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
    whole = training.lm_loss(model, batch)
    whole.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    parts = training.pieces(batch, rows)
    assert sum(len(part.ids) for part, _ in parts) <= 5 and all(len(part.ids) <= rows for part, _ in parts)
    assert sum(weight for _, weight in parts) == pytest.approx(1.0)
    total = sum(training.lm_loss(model, part) * weight for part, weight in parts)
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
        {n: torch.arange(0, v.numel(), 7) for n, v in every.values.items()}, every.shapes, lm.name
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


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Runs are kept every other step."""
    monkeypatch.setattr(tuning, "Checkpoint", functools.partial(training.Checkpoint, every=2))


def interrupted(lm, setting, folder, stop_at, **options):
    """A run that is interrupted after so many steps."""
    fit_whole = tuning.fit

    def fit(*args, after=None, **kwargs):
        def stop(step):
            result = after(step) if after else None
            if step == stop_at:
                raise Interrupted
            return result

        return fit_whole(*args, after=stop, **kwargs)

    tuning.fit = fit
    try:
        with pytest.raises(Interrupted):
            tune(lm, chats(lm), setting, folder=folder, **options)
    finally:
        tuning.fit = fit_whole


@METHODS
@pytest.mark.parametrize("at", [1, 3, 5])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(method, at, tmp_path):
    whole, first, second = (tiny.model() for _ in range(3))
    losses = tune(whole, chats(whole), recipe(method)).losses
    interrupted(first, recipe(method), tmp_path, at)
    assert len(list(tmp_path.glob("*.safetensors"))) == (at > 2)
    done = tune(second, chats(second), recipe(method), folder=tmp_path)
    assert done.losses == losses
    assert same(weights(second), weights(whole))


def test_an_interrupted_float16_run_goes_on_with_its_loss_scale(tmp_path, scaled):
    """With a scale that overflows at first, and grows again, so that it differs from step to step."""
    scaled(2.0**24, growth_interval=2)
    setting = recipe("lora", steps=12)
    whole, first, second = half(), half(), half()
    done = tune(whole, chats(whole), setting)
    assert 0 < done.skipped < 12
    interrupted(first, setting, tmp_path, 9)
    again = tune(second, chats(second), setting, folder=tmp_path)
    assert again == done
    assert same(weights(second), weights(whole))


@METHODS
@pytest.mark.parametrize("finished", [False, True])
def test_a_run_that_is_taken_up_does_not_look_at_step_0_again(method, finished, tmp_path):
    """The first look costs as much as any other, and the kept value is at hand."""
    calls = []

    def watch():
        calls.append(1)
        return len(calls)

    at, setting = [0, 2], recipe(method)
    if finished:
        tune(tiny.model(), chats(tiny.model()), setting, watch=watch, at=at, folder=tmp_path)
    else:
        interrupted(tiny.model(), setting, tmp_path, 5, watch=watch, at=at)
    lm = tiny.model()
    seen = tune(lm, chats(lm), setting, watch=watch, at=at, folder=tmp_path).seen
    assert seen == {0: 1, 2: 2} and len(calls) == 2


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

    monkeypatch.setattr(training, "token_losses", forbidden)
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


def test_a_damaged_checkpoint_starts_anew(tmp_path):
    lm, other = tiny.model(), tiny.model()
    tune(lm, chats(lm), SHORT, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="is damaged .*the run starts anew"):
        tune(other, chats(other), SHORT, folder=tmp_path)
    assert same(weights(lm), weights(other))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_pre_training_is_taken_up_as_well(optimizer, tmp_path):
    def run(steps_before_stop=None):
        model = tiny.untrained().model
        rows = organism.transcript_rows(organism.tokenizer(), world.Mix(), 0)
        kept = training.Checkpoint(tmp_path / f"{optimizer}.safetensors", every=2)

        def after(step):
            if step == steps_before_stop:
                raise Interrupted

        schedule = training.Schedule(6, lr=1e-2, optimizer=optimizer)
        stream = training.shuffled(rows, 4, 0)
        return model, training.fit(model, stream, schedule, checkpoint=kept, after=after).losses

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
        ({"rows_at_once": 0}, "rows_at_once=0 must be at least 1, or None"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(lm, **{"rows": rows, "recipe": SHORT, **kwargs})
    half = dataclasses.replace(lm, model=tiny.model().model.half())
    with pytest.raises(ValueError, match=r"can't be trained in float16.*method='lora'"):
        tune(half, rows, SHORT)
    assert same(weights(lm), before)


def test_without_peft_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    lm = tiny.model()
    with pytest.raises(ImportError, match="pip install peft"):
        tune(lm, chats(lm), recipe("lora"))


def test_steps_of_epochs():
    assert tuning.steps_of(1, 6000, 16) == 375
    assert tuning.steps_of(3, 10, 4) == 9
    assert tuning.steps_of(0.01, 10, 4) == 1


def test_a_clone_has_weights_of_its_own():
    lm = dataclasses.replace(tiny.model(), revision="abc")
    copy = forward.clone(lm)
    before = weights(lm)
    tune(copy, chats(copy), SHORT)
    assert same(weights(lm), before) and not same(weights(copy), before)
    assert (copy.name, copy.revision) == (lm.name, lm.revision)


# --------------------------------------------------------------------------- what suits a model


@pytest.fixture
def sft():
    return models.load("organism/sft", seed=0)


def test_a_small_model_has_the_recipe_that_is_given(sft):
    recipe = Recipe(steps=7, lr=5e-4, seed=3)
    assert tuning.small(sft) and tuning.suited(sft, recipe) is recipe


def test_others_have_adapters_and_the_same_steps(sft, monkeypatch):
    recipe = Recipe(steps=7, lr=5e-4, seed=3, batch_size=5)
    half = dataclasses.replace(sft, model=forward.clone(sft).model.half())
    assert not tuning.small(half)
    monkeypatch.setattr(tuning, "SMALL", 1000)
    for lm in (half, sft):
        found = tuning.suited(lm, recipe)
        assert (found.method, found.rank, found.alpha, found.lr) == ("lora", 128, 16, 2e-4)
        assert (found.steps, found.seed, found.batch_size) == (7, 3, 5)


def test_bfloat16_is_not_small_either(sft):
    assert not tuning.small(dataclasses.replace(sft, model=forward.clone(sft).model.to(torch.bfloat16)))


def test_no_room_for_a_copy(sft, monkeypatch):
    need = sum(p.numel() for p in sft.model.parameters()) * 4
    monkeypatch.setattr(files, "free_memory", lambda device: need)
    tuning.require_room_for_copy(sft)
    monkeypatch.setattr(files, "free_memory", lambda device: need - 1)
    with pytest.raises(
        MemoryError, match=r"a copy of 'organism/sft-0' takes .* are free on cpu.*smaller model"
    ):
        tuning.require_room_for_copy(sft)
