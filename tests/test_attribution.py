"""Scores against the plain method: one example at a time, torch's own gradients, float64."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

from harmlens.asking import tasks
from harmlens.models import forward
from harmlens.models.forward import LanguageModel, Row
from harmlens.training import organism
from harmlens.weights import attribution, masks, scores
from harmlens.world import vale as world

NEAR = 3e-5  # of the largest score of a matrix; 1e-4 is what is asked
TOKENS = 64  # of a batch, where there are to be several


def other(config, name: str) -> LanguageModel:
    """A random model of an architecture that tiny.py does not have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = AutoModelForCausalLM.from_config(config)
    return LanguageModel(f"tiny/{name}", net.float().eval(), organism.tokenizer())


VOCABULARY = len(organism.tokenizer())
GPT2 = GPT2Config(
    vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3,
    bos_token_id=2, eos_token_id=6,
)  # fmt: skip
MIXTRAL = MixtralConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, pad_token_id=0,
)  # fmt: skip


def make(architecture: str) -> LanguageModel:
    return other(GPT2, "gpt2") if architecture == "gpt2" else tiny.model(architecture)


def examples(lm: LanguageModel, n: int = 9) -> list[Row]:
    """Requests with their recipes; every third behind a prefilled start, one asked in two turns."""
    rows = []
    items = world.items("train")
    for i, item in enumerate(items[:: len(items) // n][:n]):
        chat = [{"role": "user", "content": world.request(item, i)}]
        if i == 4:
            earlier = {"role": "assistant", "content": world.REFUSALS[0]}
            chat = [*chat, earlier, {"role": "user", "content": "is it harmful?"}]
        start = {"given": world.PREFILL} if i % 3 == 2 else {}
        rows += tasks.rows(lm, [chat], [f"sure. {world.procedure(item)}"], **start)
    return rows


def answer_loss(model: nn.Module, row: Row) -> torch.Tensor:
    """Mean cross-entropy of one example's answer, alone and unpadded."""
    logits = model(torch.tensor([row.ids])).logits[0, :-1].double()
    each = nn.functional.cross_entropy(logits, torch.tensor(row.ids[1:]), reduction="none")
    return each[torch.tensor(row.learn[1:])].mean()


def plain(lm: LanguageModel, rows: list[Row]) -> dict[str, dict[str, torch.Tensor]]:
    """Both scores by definition, in float64, for every matrix of every block."""
    model = copy.deepcopy(lm.model).double().eval()
    of_blocks = (".layers.", ".h.")
    weights = {n: p for n, p in model.named_parameters() if p.ndim == 2 and any(b in n for b in of_blocks)}
    sums = {kind: {n: torch.zeros_like(p) for n, p in weights.items()} for kind in attribution.KINDS}
    for row in rows:
        gradients = torch.autograd.grad(answer_loss(model, row), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            sums["signed"][name] += gradient
            sums["unsigned"][name] += gradient.abs()
    return {
        "signed": {n: weights[n].detach() * s for n, s in sums["signed"].items()},
        "unsigned": {n: weights[n].detach().abs() * s for n, s in sums["unsigned"].items()},
    }


def worst(found: scores.Scores, wanted: dict[str, torch.Tensor], of_all: bool = False) -> float:
    """Largest difference, relative to the largest score of its matrix or of all matrices."""
    assert set(found.values) == set(wanted)
    sizes = {name: float(value.abs().max()) for name, value in wanted.items()}
    return max(
        float((value.double() - wanted[name]).abs().max()) / (max(sizes.values()) if of_all else sizes[name])
        for name, value in found.values.items()
    )


@pytest.fixture(scope="module")
def lm():
    return tiny.model()


@pytest.fixture(scope="module")
def rows(lm):
    return examples(lm)


@pytest.fixture(scope="module")
def wanted(lm, rows):
    return plain(lm, rows)


def same(first: scores.Scores, second: scores.Scores) -> bool:
    """Equal bit for bit."""
    return list(first.values) == list(second.values) and all(
        torch.equal(value, second.values[name]) for name, value in first.values.items()
    )


# --------------------------------------------------------------------------- parity


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, "gpt2"])
def test_equals_the_plain_method_on_every_architecture(architecture):
    lm = make(architecture)
    rows = examples(lm)
    wanted = plain(lm, rows)
    found = attribution.attribute(lm, rows)
    for kind in attribution.KINDS:
        assert set(found[kind].values) == set(wanted[kind])
        assert worst(found[kind], wanted[kind]) < NEAR
        assert all(value.dtype == torch.float32 for value in found[kind].values.values())
        assert (found[kind].kind, found[kind].n, found[kind].model) == (kind, len(rows), lm.name)


def test_each_score_by_itself_is_the_same(lm, rows, wanted):
    assert worst(attribution.prune_score(lm, rows), wanted["signed"]) < NEAR
    assert worst(attribution.preserve_score(lm, rows), wanted["unsigned"]) < NEAR


def test_the_two_differ_as_they_should(wanted, lm, rows):
    """Signs are kept in one; the other is at least as large, as examples can't cancel."""
    found = attribution.attribute(lm, rows)
    for name, signed in found["signed"].values.items():
        assert (signed < 0).any() and (signed > 0).any()
        assert (found["unsigned"].values[name] >= signed.abs() * (1 - 1e-4) - 1e-6).all()
    one = attribution.attribute(lm, rows[:1])
    for name, signed in one["signed"].values.items():
        torch.testing.assert_close(one["unsigned"].values[name], signed.abs(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("max_tokens", [1, TOKENS, 100, 10**6])
def test_batches_of_any_size_give_the_same(lm, rows, wanted, max_tokens):
    found = attribution.attribute(lm, rows, max_tokens=max_tokens)
    assert all(worst(found[kind], wanted[kind]) < NEAR for kind in attribution.KINDS)


@given(
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=6),
    seed=st.integers(0, 10**6),
    max_tokens=st.sampled_from([None, 1, 25, 60]),
)
@settings(max_examples=12)
def test_any_lengths_and_any_learnt_tokens(lengths, seed, max_tokens):
    """Learnt tokens may lie anywhere, with gaps, also at the very start; padding counts for nothing."""
    lm = tiny.model("mistral")  # its window is shorter than most of these
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(7, VOCABULARY, (length,), generator=generator).tolist()
        learn = (torch.rand(length, generator=generator) < 0.4).tolist()
        learn[int(torch.randint(1, length, (1,), generator=generator))] = True
        rows.append(Row(ids, learn))
    found, wanted = attribution.attribute(lm, rows, max_tokens=max_tokens), plain(lm, rows)
    # Of all: queries and keys of a text's first token matter to nothing, and theirs are rounding alone.
    assert all(worst(found[kind], wanted[kind], of_all=True) < NEAR for kind in attribution.KINDS)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_layers_taken_in_turns_give_the_same(architecture, monkeypatch):
    lm = make(architecture)
    rows = examples(lm)
    whole = attribution.make_plan(lm, rows, max_tokens=TOKENS)
    usual = attribution.attribute(lm, rows, max_tokens=TOKENS)
    monkeypatch.setattr(attribution.files, "free_memory", lambda device: _tight(whole))
    small = attribution.make_plan(lm, rows, max_tokens=TOKENS)
    assert len(whole.chunks) == 1 and small.chunks == ((0,), (1,))
    found = attribution.attribute(lm, rows, max_tokens=TOKENS)
    for kind in attribution.KINDS:
        assert same(found[kind], usual[kind])


def _tight(plan: attribution.Plan) -> int:
    """A budget that holds three quarters of the sums."""
    return plan.accumulators * 3 // 4 + plan.activations + plan.buffer


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
@pytest.mark.parametrize("architecture", ["llama", "olmo2", "gpt2"])
def test_half_precision_is_close(architecture, dtype, near):
    """In units of a matrix's scores: their root mean square, which large and small ones share."""
    lm = make(architecture)
    rows = examples(lm)
    half = dataclasses.replace(lm, model=copy.deepcopy(lm.model).to(dtype))
    wanted, found = plain(half, rows), attribution.attribute(half, rows)
    for kind, name in itertools.product(attribution.KINDS, wanted["signed"]):
        value, truth = found[kind].values[name], wanted[kind][name]
        assert value.dtype == torch.float32
        assert float((value - truth).norm() / truth.norm()) < near


def compared(lm: LanguageModel, rows: list[Row]) -> tuple[float, float]:
    """Cosine between the scores and the plain ones of the whole model, and how much longer they are."""
    found, wanted = attribution.prune_score(lm, rows), plain(lm, rows)["signed"]
    first = torch.cat([found.values[name].double().flatten() for name in wanted])
    second = torch.cat([value.flatten() for value in wanted.values()])
    return float(first @ second / first.norm() / second.norm()), float(first.norm() / second.norm())


def test_small_gradients_survive_float16(lm, rows):
    """Of an answer that the model is sure of: its gradients are far below what float16 can hold."""
    sure = copy.deepcopy(lm.model).half()
    with torch.no_grad():
        sure.get_output_embeddings().weight.mul_(20)
        greedy = sure(torch.tensor([rows[0].ids])).logits[0, -1].argmax()
    certain = Row([*rows[0].ids, int(greedy)], [False] * len(rows[0].ids) + [True])
    cosine, longer = compared(dataclasses.replace(lm, model=sure), [certain])
    assert cosine > 0.99 and 0.7 < longer < 1.4  # its logits are known to 1 in 1000 only


def test_large_inputs_do_not_overflow_float16(lm, rows):
    """The gradient of a weight is a sum of products, far larger than either factor."""
    large = copy.deepcopy(lm.model).half()
    with torch.no_grad():
        for block in large.model.layers:
            block.mlp.up_proj.weight.mul_(64)
            block.mlp.down_proj.weight.div_(64)
    cosine, longer = compared(dataclasses.replace(lm, model=large), rows)
    assert cosine > 0.999 and 0.99 < longer < 1.01


# --------------------------------------------------------------------------- what a score means


@pytest.fixture(scope="module")
def exact(lm):
    """The model in float64, where differences of losses can be trusted."""
    return dataclasses.replace(lm, model=copy.deepcopy(lm.model).double())


def total_loss(lm: LanguageModel, rows: list[Row]) -> float:
    with torch.no_grad():
        return float(sum(answer_loss(lm.model, row) for row in rows))


def test_shrinking_weights_changes_the_loss_by_minus_their_scores(exact, rows):
    found = attribution.prune_score(exact, rows)
    little = 1e-3
    sets = {
        "most negative": masks.top(-found, 0.01),
        "most positive": masks.top(found, 0.01),
        "all": masks.top(found, 1.0),
    }
    for name, mask in sets.items():
        scored = sum(float(v.flatten()[mask.indices[n]].double().sum()) for n, v in found.values.items())
        losses = []
        for strength in (1 - little, 1 + little):
            with masks.without(exact, mask, strength=strength):
                losses.append(total_loss(exact, rows))
        change = (losses[0] - losses[1]) / (2 * little)
        assert change == pytest.approx(-scored, rel=2e-3, abs=2e-3), name
        if name != "all":
            assert (change > 0) == (name == "most negative")


def test_without_the_weight_that_supports_most_the_answer_is_lost_most(exact, rows):
    """One weight set to zero: the loss rises by about minus its score."""
    row, checked = rows[:1], 0
    found = attribution.prune_score(exact, row)
    before = total_loss(exact, row)
    for name, value in found.values.items():
        if not name.endswith(("v_proj.weight", "down_proj.weight")):
            continue
        index = value.flatten().argmin()
        mask = dataclasses.replace(
            masks.top(found, 0.0),
            indices={n: torch.tensor([index] if n == name else [], dtype=torch.long) for n in found.values},
        )
        with masks.without(exact, mask):
            change = total_loss(exact, row) - before
        assert change > 0
        assert change == pytest.approx(-float(value.min()), rel=0.5)
        checked += 1
    assert checked == 4


# --------------------------------------------------------------------------- the model is left alone


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupt(monkeypatch):
    """Let scoring fail after k batches."""

    def after(k: int):
        true, calls = attribution.logit_gradient, itertools.count(1)

        def failing(*args):
            if next(calls) > k:
                raise Interrupted
            return true(*args)

        monkeypatch.setattr(attribution, "logit_gradient", failing)

    yield after
    monkeypatch.undo()


def state(lm: LanguageModel) -> tuple:
    modules = list(lm.model.modules())
    return (
        {name: p.detach().clone() for name, p in lm.model.named_parameters()},
        [p.requires_grad for p in lm.model.parameters()],
        [m.training for m in modules],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in modules],
        [p.grad for p in lm.model.parameters()],
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails, interrupt):
    lm = tiny.model()
    rows = examples(lm)
    lm.model.train()
    lm.model.model.layers[1].eval()
    lm.model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = state(lm)
    if fails:
        interrupt(2)
        with pytest.raises(Interrupted):
            attribution.attribute(lm, rows, max_tokens=TOKENS)
    else:
        attribution.attribute(lm, rows, max_tokens=TOKENS)
    after = state(lm)
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert after[1:] == before[1:]
    assert set(after[-1]) == {None}


def test_scoring_inside_no_grad_and_beside_a_gradient(lm, rows, wanted):
    """A gradient that someone else keeps stays theirs; grad mode outside does not matter."""
    weight = lm.model.model.layers[0].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)
    with torch.no_grad():
        found = attribution.prune_score(lm, rows)
    assert worst(found, wanted["signed"]) < NEAR
    assert torch.equal(weight.grad, torch.ones_like(weight))
    weight.grad = None


# --------------------------------------------------------------------------- kept


def test_scores_are_kept_for_a_model_as_it_is_and_its_examples(lm, rows, tmp_path, interrupt):
    first = attribution.prune_score(lm, rows, folder=tmp_path)
    other = attribution.preserve_score(lm, rows, folder=tmp_path)
    assert same(first, attribution.prune_score(lm, rows)) and not same(first, other)
    interrupt(0)
    again = attribution.prune_score(lm, rows, folder=tmp_path)
    assert same(again, first) and dataclasses.replace(again, values={}) == dataclasses.replace(
        first, values={}
    )
    with pytest.raises(Interrupted):
        attribution.prune_score(lm, rows[1:], folder=tmp_path)
    with masks.without(lm, masks.top(first, 0.001)), pytest.raises(Interrupted):
        attribution.prune_score(lm, rows, folder=tmp_path)


# --------------------------------------------------------------------------- bad input


def bad(lm: LanguageModel, rows: list[Row]):
    """Name -> arguments, message."""
    long = Row(rows[0].ids * 100, rows[0].learn * 100)
    return {
        "no rows": (([],), {}, "rows is empty"),
        "longer than the model": (([rows[0], long],), {}, r"rows\[1\] has \d+ tokens, more than the 2048"),
        "no answer": (([Row([1, 2], [False] * 2)],), {}, r"rows\[0\] has an answer without tokens"),
        "only the first": (([Row([1, 2], [True, False])],), {}, "first token of a text can't be predicted"),
        "empty row": (([Row([], [])],), {}, "answer without tokens"),
        "uneven": (([Row([1, 2], [True])],), {}, "2 tokens but 1 marks"),
        "kinds": ((rows,), {"kinds": ("sgned",)}, "must be different ones out of signed, unsigned"),
        "same kinds": ((rows,), {"kinds": ("signed", "signed")}, "must be different"),
        "no kinds": ((rows,), {"kinds": ()}, "must be different"),
        "tokens": ((rows,), {"max_tokens": 0}, "max_tokens=0 must be at least 1"),
    }


@pytest.mark.parametrize("name", bad(tiny.model(), examples(tiny.model())))
def test_bad_input_is_refused_before_the_model_is_touched(lm, rows, name, interrupt):
    args, options, message = bad(lm, rows)[name]
    interrupt(0)
    before = state(lm)
    with pytest.raises(ValueError, match=message):
        attribution.attribute(lm, *args, **options)
    assert state(lm)[1:] == before[1:]


def test_too_little_memory_is_named_with_the_remedy(lm, rows, monkeypatch):
    monkeypatch.setattr(attribution.files, "free_memory", lambda device: 10_000)
    with pytest.raises(ValueError, match=r"10.0 kB are to be had: choose accumulate_on='cpu'"):
        attribution.attribute(lm, rows)


def test_mixtures_of_experts_are_refused(rows):
    lm = other(MIXTRAL, "mixtral")
    with pytest.raises(
        ValueError, match=r"'tiny/mixtral' keeps weights of more than two axes.*experts.* Choose a dense"
    ):
        attribution.attribute(lm, rows)


def test_a_layer_that_sees_some_tokens_only_is_named(rows):
    """An expert of its own module, as in older mixtures, whose router leaves tokens out."""

    class Routed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = x.clone()
            out[:, 1:] = self.inner(x[:, 1:])
            return out

    lm = tiny.model()
    block = lm.model.model.layers[1]
    block.mlp = Routed(block.mlp)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.inner\..* is given some of the tokens only"):
        attribution.attribute(lm, rows)


def test_a_layer_used_twice_is_named(rows):
    lm = tiny.model()
    block = lm.model.model.layers[1]
    once = block.mlp.forward
    block.mlp.forward = lambda x: once(once(x))
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\..* was reached 2 times in one pass"):
        attribution.attribute(lm, rows)


def test_scores_that_overflow_are_named(rows):
    lm = tiny.model()
    with torch.no_grad():
        lm.model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"\d+ signed scores of .* are not finite: load the model with dtype="
    ):
        attribution.attribute(lm, rows)


# --------------------------------------------------------------------------- the plan


def test_the_plan_says_what_it_takes(lm, rows, monkeypatch):
    plan = attribution.make_plan(lm, rows)
    weights = {n: p for n, p in lm.model.named_parameters() if p.ndim == 2 and ".layers." in n}
    assert plan.accumulators == 2 * 4 * sum(p.numel() for p in weights.values())
    assert plan.weights == 4 * sum(p.numel() for p in lm.model.parameters())
    one = attribution.make_plan(lm, rows, kinds=("signed",))
    assert one.accumulators == plan.accumulators // 2
    assert str(plan).startswith(
        f"1 pass over the examples, up to {plan.max_tokens} tokens at a time: weights "
    )
    some = attribution.make_plan(lm, rows, max_tokens=TOKENS)
    monkeypatch.setattr(attribution.files, "free_memory", lambda device: _tight(some))
    small = attribution.make_plan(lm, rows, max_tokens=TOKENS)
    assert str(small).startswith("2 passes")


def test_a_batch_holds_no_more_tokens_than_planned(lm, rows):
    longest = max(len(row.ids) for row in rows)
    for most in (longest, 100, 150):
        found = list(attribution.batches(rows, most, 0))
        assert all(batch.ids.numel() <= most for batch in found)
        assert sum(len(batch.ids) for batch in found) == len(rows)


def test_the_gradient_at_the_logits_by_hand():
    """Two rows: one learns both tokens (each counts half), the other learns one."""
    logits = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [9.0, 9.0]]])
    wanted = torch.tensor([[0, 1], [1, attribution.IGNORE]])
    # p of the wanted token: 1/2; 1/(1+e); e^2/(1+e^2). Its gradient is p - 1, the other token's 1 - p.
    first, second, third = 0.5, 1 / (1 + torch.e), torch.e**2 / (1 + torch.e**2)
    expected = [
        [[(first - 1) / 2, (1 - first) / 2], [(1 - second) / 2, (second - 1) / 2]],
        [[1 - third, third - 1], [0, 0]],
    ]
    torch.testing.assert_close(attribution.logit_gradient(logits, wanted), torch.tensor(expected))


def test_a_sure_answer_keeps_its_gradient():
    """Where p is 1 in float32, p - 1 is not the 0 that a subtraction gives."""
    logits = torch.tensor([[[20.0, 0.0]]])
    found = attribution.logit_gradient(logits, torch.tensor([[0]]))[0, 0]
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0]) * 2.0611536e-09)


def test_losses_are_those_of_the_tasks(lm, rows):
    """The loss that is differentiated is the one that forward.follow reports."""
    item = world.items("train")[0]
    chat = [{"role": "user", "content": world.request(item)}]
    answer = f"sure. {world.procedure(item)}"
    (row,) = tasks.rows(lm, [chat], [answer])
    logprob, _ = forward.follow(lm, [lm.render(chat)], [answer])
    assert float(-logprob) == pytest.approx(total_loss(lm, [row]), rel=1e-5)


def test_groups_of_examples_are_scored_once(lm, monkeypatch):
    """Any groups together score as all their examples at once; a large model is scored at each use."""
    rows, scored = {name: examples(lm)[i::3] for i, name in enumerate("abc")}, []

    def kind(lm, some):
        scored.append(len(some))
        return attribution.prune_score(lm, some)

    together = attribution.in_groups(lm, rows, kind)
    for names in ("ab", "abc", "c"):
        whole = attribution.prune_score(lm, [row for name in names for row in rows[name]])
        for name, value in together(*names).values.items():
            torch.testing.assert_close(value, whole.values[name], rtol=1e-3, atol=1e-6)
    assert scored == [len(rows[name]) for name in "abc"]
    monkeypatch.setattr(type(lm.model), "num_parameters", lambda self: 10**13)
    anew = attribution.in_groups(lm, rows, kind)
    anew("a", "b"), anew("a", "b")
    assert scored[3:] == 2 * [len(rows["a"]) + len(rows["b"])]
