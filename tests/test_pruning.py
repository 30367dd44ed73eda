"""Selection and removal of weights: worked by hand, against torch.topk, and back again bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harmlens.weights import masks, pruning, scores
from harmlens.weights.scores import Scores


def scored(kind: str = "signed", **values) -> Scores:
    return Scores(kind, {name: torch.tensor(v, dtype=torch.float32) for name, v in values.items()}, "m", "r")


def chosen(mask: masks.Mask) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in mask.indices.items()}


# --------------------------------------------------------------------------- the convention


def test_the_convention_by_hand():
    """One matrix of 2 x 3, two examples.

    W = [[ 2, -1,  3],     gradients of the loss, example a:    example b:
         [-2,  4,  1]]         [[-1,  1,  0],                       [[-1, -2, 1],
                                [ 2, -1,  3]]                        [ 1,  1, 0]]

    prune    = W * (a + b):       a + b     = [[-2, -1, 1], [3, 0, 3]]
             = [[-4,  1,  3],     the lowest, -6 and -4, support the answers: there the loss rises
                [-6,  0,  3]]     without the weight
    preserve = |W| * (|a| + |b|): |a| + |b| = [[2, 3, 1], [3, 2, 3]]
             = [[ 4,  3,  3],
                [ 6,  8,  3]]

    q = 1/3 takes 2 of 6: Q = {numbers 3 and 0}. p = 1/3 spares 2 of 6: P = {4 (8), 3 (6)}.
    Q without P = {0}.
    """
    weight = torch.tensor([[2.0, -1, 3], [-2, 4, 1]])
    first = torch.tensor([[-1.0, 1, 0], [2, -1, 3]])
    second = torch.tensor([[-1.0, -2, 1], [1, 1, 0]])
    prune = scored(w=(weight * (first + second)).tolist())
    preserve = scored("unsigned", w=(weight.abs() * (first.abs() + second.abs())).tolist())
    assert prune.values["w"].tolist() == [[-4, 1, 3], [-6, 0, 3]]
    assert preserve.values["w"].tolist() == [[4, 3, 3], [6, 8, 3]]
    assert chosen(pruning.select(prune, q=1 / 3)) == {"w": [0, 3]}
    assert chosen(pruning.top(preserve, 1 / 3)) == {"w": [3, 4]}
    assert chosen(pruning.select(prune, preserve, q=1 / 3, p=1 / 3)) == {"w": [0]}
    # Rows by themselves: the lowest third of (-4, 1, 3) and of (-6, 0, 3), without 0 and 4.
    assert chosen(pruning.select(prune, preserve, q=1 / 3, p=1 / 3, scope="row")) == {"w": [3]}


# --------------------------------------------------------------------------- how many


SOME = scored(a=[[5.0, 1, 3], [2, 6, 4]], b=[[9.0, 8, 7, 10]])


@pytest.mark.parametrize(
    ("scope", "share", "expected"),
    [
        ("matrix", 0.5, {"a": [0, 4, 5], "b": [0, 3]}),
        ("row", 0.5, {"a": [0, 4], "b": [0, 3]}),
        ("global", 0.5, {"a": [4], "b": [0, 1, 2, 3]}),
        ("matrix", 0.2, {"a": [4], "b": [3]}),  # floor(0.8) is 0 for b: one is taken
        ("row", 0.1, {"a": [0, 4], "b": [3]}),
        ("global", 0.01, {"a": [], "b": [3]}),
        ("matrix", 0.0, {"a": [], "b": []}),
        ("row", 0.0, {"a": [], "b": []}),
        ("global", 0.0, {"a": [], "b": []}),
        ("matrix", 1.0, {"a": [0, 1, 2, 3, 4, 5], "b": [0, 1, 2, 3]}),
        ("row", 1.0, {"a": [0, 1, 2, 3, 4, 5], "b": [0, 1, 2, 3]}),
        ("global", 1.0, {"a": [0, 1, 2, 3, 4, 5], "b": [0, 1, 2, 3]}),
    ],
)
def test_how_many_are_taken(scope, share, expected):
    mask = pruning.top(SOME, share, scope=scope, name="some")
    assert chosen(mask) == expected
    assert (mask.model, mask.revision, mask.name) == ("m", "r", "some")
    assert mask.shapes == {"a": (2, 3), "b": (1, 4)}


@pytest.mark.parametrize("scope", pruning.SCOPES)
def test_the_rule_for_shares_that_come_to_none(scope):
    none = pruning.top(SOME, 0.01, scope=scope, at_least=0)
    assert len(none) == 0
    three = pruning.top(SOME, 0.01, scope=scope, at_least=3)
    assert len(three) == {"matrix": 6, "row": 9, "global": 3}[scope]
    everything = pruning.top(SOME, 0.01, scope=scope, at_least=100)  # no more than there are
    assert len(everything) == 10


def test_a_share_that_is_exact_on_paper_is_not_rounded_down():
    """0.29 * 100 is 28.999999999999996."""
    assert len(pruning.top(scored(w=[list(range(100))]), 0.29)) == 29


def test_selecting_all_and_sparing_all():
    preserve = scored("unsigned", a=[[1.0, 2, 3], [4, 5, 6]], b=[[1.0, 2, 3, 4]])
    assert len(pruning.select(SOME, preserve, q=1.0, p=0.0)) == 10
    assert len(pruning.select(SOME, preserve, q=0.0, p=0.0)) == 0
    assert len(pruning.select(SOME, preserve, q=1.0, p=1.0)) == 0
    # What is left of everything is what p does not spare.
    rest = pruning.select(SOME, preserve, q=1.0, p=0.5)
    assert chosen(rest) == {"a": [0, 1, 2], "b": [0, 1]}


@pytest.mark.parametrize("scope", pruning.SCOPES)
def test_the_second_slice_follows_the_first(scope):
    values = {n: torch.randperm(s[0] * s[1], generator=torch.Generator().manual_seed(0)).float().view(s)
              for n, s in (("a", (7, 30)), ("b", (5, 40)))}  # fmt: skip
    given_ = Scores("signed", values, "m", "r")
    first, second = (pruning.top(given_, 0.1, scope=scope, skip=skip) for skip in (0.0, 0.1))
    assert len(first & second) == 0
    assert {n: len(i) for n, i in first.indices.items()} == {
        n: len(i) for n, i in second.indices.items()
    } or (scope == "global" and len(first) == len(second))
    both = pruning.top(given_, 0.2, scope=scope)
    assert chosen(first | second) == chosen(both)


@pytest.mark.parametrize("scope", pruning.SCOPES)
@pytest.mark.parametrize("share", [0.001, 0.015, 0.3, 0.7])
def test_the_second_slice_of_equal_scores_has_the_right_size(scope, share):
    """Ties must not let a weight of the first slice in, nor change the size; nor may rounding."""
    ties = Scores("signed", {"a": torch.zeros(10, 30), "b": torch.ones(5, 40).bernoulli(0.5)}, "m", "r")
    first, second = (pruning.top(ties, share, scope=scope, skip=skip) for skip in (0.0, share))
    assert len(first & second) == 0
    assert len(second) == min(len(first), 500 - len(first))


@given(
    size=st.integers(1, 60),
    k=st.integers(0, 60),
    kinds=st.integers(1, 6),
    sample=st.sampled_from([2, 5, 50_000]),
    seed=st.integers(0, 10**6),
)
def test_largest_equals_topk(size, k, kinds, sample, seed):
    """With few different values there are ties; with a small sample the bound is a guess."""
    k = min(k, size)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, kinds, (size,), generator=generator).float()
    if kinds == 6:
        values = torch.randn(size, generator=generator)
    _check_largest(values, k, sample)


def _check_largest(values: torch.Tensor, k: int, sample: int = 50_000) -> None:
    index = pruning.largest(values, k, sample=sample)
    assert len(index) == k and torch.equal(index, index.unique())  # rising, each once
    assert torch.equal(values[index].sort().values, values.topk(k).values.sort().values)


@pytest.mark.parametrize("k", [1, 10, 999, 50_000, 149_999, 250_000, 299_999, 300_000])
@pytest.mark.parametrize(
    "kind", ["normal", "constant", "ties", "one high", "sorted", "heavy tail", "at steps"]
)
def test_largest_equals_topk_where_a_sample_is_taken(kind, k):
    n, generator = 300_000, torch.Generator().manual_seed(0)
    normal = torch.randn(n, generator=generator)
    values = {
        "normal": normal,
        "constant": torch.zeros(n),
        "ties": (normal * 2).round(),
        "one high": torch.zeros(n).index_fill(0, torch.tensor([n // 2]), 1.0),
        "sorted": torch.arange(n).float(),
        "heavy tail": normal.exp().pow(9),
        "at steps": torch.where(torch.arange(n) % 6 == 0, 9.0, 0.0) + normal / 9,  # all that the sample sees
    }[kind]
    _check_largest(values, k, 2000)


@given(shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4),
       share=st.floats(0, 1), seed=st.integers(0, 10**6))  # fmt: skip
@settings(max_examples=40)
def test_global_selection_is_topk_of_everything(shapes, share, seed):
    generator = torch.Generator().manual_seed(seed)
    values = {str(i): torch.randn(*shape, generator=generator) for i, shape in enumerate(shapes)}
    mask = pruning.top(Scores("signed", values, "m", "r"), share, scope="global", at_least=0)
    whole = torch.cat([v.flatten() for v in values.values()])
    k = math.floor(share * len(whole) + 1e-9)
    taken = torch.cat([values[n].flatten()[i] for n, i in mask.indices.items()])
    assert torch.equal(taken.sort().values, whole.topk(k).values.sort().values)


def test_selection_under_any_scope_is_a_set_difference():
    generator = torch.Generator().manual_seed(0)
    values = [{n: torch.randn(8, 16, generator=generator) for n in "ab"} for _ in range(2)]
    prune, preserve = Scores("signed", values[0], "m", "r"), Scores("unsigned", values[1], "m", "r").abs()
    for scope in pruning.SCOPES:
        mask = pruning.select(prune, preserve, q=0.3, p=0.2, scope=scope, name="x")
        taken = pruning.top(pruning.negated(prune), 0.3, scope=scope)
        spared = pruning.top(preserve, 0.2, scope=scope)
        assert chosen(mask) == chosen(taken - spared) and mask.name == "x"
        assert 0 < len(mask) < len(taken)


def test_as_many_as_another_set():
    generator = torch.Generator().manual_seed(0)
    values = [{n: torch.randn(8, 16, generator=generator) for n in "ab"} for _ in range(3)]
    prune, preserve, other = (Scores("signed", v, "m", "r") for v in values)
    mask = pruning.select(prune, preserve.abs(), q=0.1, p=0.2)
    same = pruning.same_size(mask, other, preserve.abs(), p=0.2)
    assert {n: len(i) for n, i in same.indices.items()} == {n: len(i) for n, i in mask.indices.items()}
    assert len(same & pruning.top(preserve.abs(), 0.2)) == 0
    # Of one's own scores it is the set itself, and then the next in line.
    assert chosen(pruning.same_size(mask, prune, preserve.abs(), p=0.2)) == chosen(mask)
    following = pruning.same_size(mask, prune, preserve.abs(), p=0.2, skip=mask)
    assert len(following) == len(mask) and len(following & mask) == 0
    for name, index in following.indices.items():
        worst_taken = prune.values[name].flatten()[mask.indices[name]].max()
        assert (prune.values[name].flatten()[index] >= worst_taken).all()


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_shares_outside_0_to_1(value):
    for options, name in (({"q": value}, "q"), ({"q": 0.1, "p": value}, "p")):
        with pytest.raises(ValueError, match=rf"{name}={value} must be a share between 0 and 1"):
            pruning.select(SOME, SOME.abs(), **options)
    with pytest.raises(ValueError, match=r"skip=.* must be a share"):
        pruning.top(SOME, 0.1, skip=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite(value):
    broken = scored(a=[[5.0, 1, value], [2, 6, 4]], b=[[9.0, 8, 7, 10]])
    for prune, preserve in ((broken, SOME), (SOME, broken)):
        with pytest.raises(ValueError, match="the scores of a are not all finite"):
            pruning.select(prune, preserve, q=0.1, p=0.1)


def test_other_mistakes():
    with pytest.raises(ValueError, match="scope='layer' is unknown; choose one of matrix, row, global"):
        pruning.select(SOME, q=0.1, scope="layer")
    with pytest.raises(ValueError, match="but preserve is None"):
        pruning.select(SOME, q=0.1, p=0.1)
    with pytest.raises(ValueError, match="these are of different matrices"):
        pruning.select(SOME, scored(a=[[1.0]]), q=0.1, p=0.1)


# --------------------------------------------------------------------------- taking out and putting back


def copied(lm):
    return {name: p.detach().clone() for name, p in lm.model.named_parameters()}


def unchanged(lm, before):
    return all(
        torch.equal(p.detach().view(torch.uint8), before[name].view(torch.uint8))
        for name, p in lm.model.named_parameters()
    )


@pytest.fixture(scope="module")
def lm():
    return tiny.model()


@pytest.fixture(scope="module")
def mask(lm):
    return pruning.top(scores.random(lm), 0.1, name="mine")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, -1.0, 3.0, "mean"])
def test_weights_are_changed_and_come_back_bit_for_bit(lm, mask, dtype, strength):
    lm = dataclasses.replace(lm, model=copy.deepcopy(lm.model).to(dtype))
    before = copied(lm)
    with pruning.pruned(lm, mask, strength=strength) as inside:
        assert inside is lm
        for name, parameter in lm.model.named_parameters():
            flat, was = parameter.detach().flatten(), before[name].flatten()
            expected = was.clone()
            if name in mask.indices:
                index = mask.indices[name]
                mean = was.double().mean()
                expected[index] = mean.to(dtype) if strength == "mean" else was[index] * strength
            torch.testing.assert_close(flat, expected, rtol=1e-2 if strength == "mean" else 0, atol=1e-4)
            if name not in mask.indices:
                assert torch.equal(flat, was)
    assert unchanged(lm, before)


def test_they_come_back_after_an_exception(lm, mask):
    before = copied(lm)
    with pytest.raises(KeyError), pruning.pruned(lm, mask):
        assert not unchanged(lm, before)
        raise KeyError
    assert unchanged(lm, before)


def test_they_come_back_after_an_exception_while_they_are_taken_out(lm, mask, monkeypatch):
    before, last = copied(lm), list(mask.indices)[-1]
    broken = dataclasses.replace(mask, indices={**mask.indices, last: mask.indices[last].float()})
    with pytest.raises(IndexError), pruning.pruned(lm, broken):
        pass
    assert unchanged(lm, before)


def test_within_one_another(lm, mask):
    other = pruning.top(scores.random(lm, seed=1), 0.3)
    assert len(mask & other)
    before = copied(lm)
    with pruning.pruned(lm, mask, strength=0.5):
        between = copied(lm)
        with pruning.pruned(lm, other, strength="mean"), pruning.pruned(lm, other):
            assert pruning.zeros(lm) >= other.share
        assert unchanged(lm, between)
    assert unchanged(lm, before)


def test_zeros_and_what_they_do(lm, mask):
    ids = torch.arange(7, 40)[None]
    with torch.no_grad():
        usual = lm.model(ids).logits
        assert pruning.zeros(lm) == 0
        with pruning.pruned(lm, mask):
            assert pruning.zeros(lm) == pytest.approx(mask.share)
            assert pruning.zeros(lm, layers=[1]) == pytest.approx(mask.shares()[1])
            assert (lm.model(ids).logits - usual).abs().max() > 0.1
        assert torch.equal(lm.model(ids).logits, usual)


def test_gradients_and_flags_stay(lm, mask):
    weight = lm.model.get_parameter(next(iter(mask.indices)))
    with pruning.pruned(lm, mask):
        assert weight.requires_grad and weight.is_leaf and weight.grad is None
        assert lm.model.get_parameter(next(iter(mask.indices))) is weight


@pytest.mark.parametrize("strength", ["median", math.nan, math.inf])
def test_unknown_strengths(lm, mask, strength):
    before = copied(lm)
    with pytest.raises(ValueError, match=r"strength=.* must be a finite number, or 'mean'"):
        pruning.pruned(lm, mask, strength=strength).__enter__()
    assert unchanged(lm, before)


@pytest.mark.parametrize("wrong", ["architecture", "depth", "width", "index", "negative", "weights"])
def test_a_mask_of_another_model_is_refused_before_the_model_is_touched(lm, mask, wrong):
    first = next(iter(mask.indices))
    message = "was made for 'tiny/.*' and does not fit 'tiny/"
    if wrong == "architecture":
        mask = pruning.top(scores.random(tiny.model("gpt_neox")), 0.1)
    elif wrong == "depth":
        mask = pruning.top(scores.random(tiny.model(layers=3)), 0.1)
    elif wrong == "width":
        mask = dataclasses.replace(mask, shapes={**mask.shapes, first: (32, 33)})
    elif wrong in ("index", "negative"):
        number = 32 * 32 if wrong == "index" else -1
        mask = dataclasses.replace(mask, indices={**mask.indices, first: torch.tensor([number])})
        message = "names weights that .* does not have; it is damaged"
    else:
        lm = dataclasses.replace(lm, revision="other")
        message = "whose weights are not those of 'tiny/llama'; say elsewhere=True"
    before = copied(lm)
    with pytest.raises(ValueError, match=message):
        pruning.pruned(lm, mask).__enter__()
    assert unchanged(lm, before)


def test_a_mask_of_other_weights_can_be_meant(mask):
    child = dataclasses.replace(tiny.model(seed=3), revision="child")
    before = copied(child)
    with pruning.pruned(child, mask, elsewhere=True):
        assert pruning.zeros(child) == pytest.approx(mask.share)
    assert unchanged(child, before)
