"""Sets of weights: algebra, chance, control sets; selection by hand and against topk; taking them out."""

from __future__ import annotations

import copy
import dataclasses
import math
from contextlib import nullcontext
from types import SimpleNamespace

import lecture
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harmlens.weights import masks, scores
from harmlens.weights.masks import Mask
from harmlens.weights.scores import Scores

RIVALS = lecture.defined("09", seed=0, quick=False)

SHAPES = {
    "layers.0.mlp.up.weight": (4, 5),
    "layers.1.attn.q.weight": (3, 4),
    "layers.1.mlp.up.weight": (2, 5),
}
SIZES = {"layers.0.mlp.up.weight": 20, "layers.1.attn.q.weight": 12, "layers.1.mlp.up.weight": 10}


def of(**chosen: set[int]) -> Mask:
    """A mask by hand: a, b and c are the three matrices."""
    names = dict(zip("abc", SHAPES, strict=True))
    indices = {names[k]: torch.tensor(sorted(chosen.get(k, ())), dtype=torch.long) for k in names}
    return Mask(indices, SHAPES, "m", "r", "x")


def pairs(mask: Mask) -> set[tuple[str, int]]:
    """The set that a mask stands for; complains if it is not kept as it should be."""
    for index in mask.indices.values():
        assert index.dtype == torch.long and torch.equal(index, index.unique())
    assert list(mask.indices) == list(SHAPES)
    return {(name, i) for name, index in mask.indices.items() for i in index.tolist()}


any_sets = st.fixed_dictionaries(
    {k: st.sets(st.integers(0, size - 1)) for k, size in zip("abc", SIZES.values(), strict=True)}
)


@given(any_sets, any_sets)
def test_masks_are_sets(first, second):
    first, second = of(**first), of(**second)
    a, b = pairs(first), pairs(second)
    assert pairs(first & second) == a & b
    assert pairs(first | second) == a | b
    assert pairs(first - second) == a - b
    assert pairs(first.empty) == set() and (first | second.empty).indices.keys() == first.indices.keys()
    assert len(first) == len(a) and first.share == pytest.approx(len(a) / 42)
    assert masks.jaccard(first, second) == pytest.approx(len(a & b) / len(a | b) if a | b else 0)
    assert masks.jaccard(first, second) == masks.jaccard(second, first)


def test_names_of_combined_masks():
    first, second = of(a={1}).called("harm"), of(a={2}).called("facts")
    assert [(first & second).name, (first | second).name, (first - second).name] == [
        "harm & facts", "harm | facts", "harm - facts"
    ]  # fmt: skip


def test_masks_of_different_matrices_are_not_put_together():
    first, other = of(a={1}), Mask({"w": torch.tensor([0])}, {"w": (1, 2)}, "other")
    for combine in (
        lambda: first & other,
        lambda: first | other,
        lambda: first - other,
        lambda: masks.jaccard(first, other),
        lambda: masks.chance_jaccard(first, other),
        lambda: masks.random_like(first, within=other),
    ):
        with pytest.raises(ValueError, match="'m' and 'other': these are of different matrices"):
            combine()


# --------------------------------------------------------------------------- chance


def test_chance_is_what_random_sets_give():
    first, second = of(a=set(range(10)), b={1, 2}, c=set()), of(a=set(range(8)), b=set(range(6)), c={1})
    drawn = [
        masks.jaccard(masks.random_like(first, seed=2 * i), masks.random_like(second, seed=2 * i + 1))
        for i in range(400)
    ]
    found = torch.tensor(drawn)
    assert float(found.mean()) == pytest.approx(
        masks.chance_jaccard(first, second), abs=4 * float(found.std()) / 20 + 0.01
    )
    # By hand: 10 * 8 / 20 + 2 * 6 / 12 + 0 = 5 of 12 + 15 - 5.
    assert masks.chance_jaccard(first, second) == pytest.approx(5 / 22)
    assert masks.chance_jaccard(of(), of()) == masks.jaccard(of(), of()) == 0


def test_chance_knows_that_both_may_prefer_the_same_matrices():
    """Equal overall size, but all in one matrix: random sets of that kind overlap far more."""
    spread, packed = of(a={0, 1}, b={0, 1}, c={0, 1}), of(c=set(range(6)))
    assert masks.chance_jaccard(packed, packed) > 2 * masks.chance_jaccard(spread, spread)


# --------------------------------------------------------------------------- control sets


@given(any_sets, any_sets, st.integers(0, 1000))
def test_random_sets_of_the_same_make(mask, within, seed):
    mask, within = of(**mask), of(**within)
    drawn = masks.random_like(mask, seed=seed)
    assert {n: len(i) for n, i in drawn.indices.items()} == {n: len(i) for n, i in mask.indices.items()}
    assert pairs(drawn) == pairs(masks.random_like(mask, seed=seed))
    pool = pairs(within)
    enough = all(sum(n == name for n, _ in pool) >= len(index) for name, index in mask.indices.items())
    if enough:
        inside = masks.random_like(mask, seed=seed, within=within)
        assert pairs(inside) <= pool and len(inside) == len(mask)
    else:
        with pytest.raises(ValueError, match=r"weights are to be drawn from"):
            masks.random_like(mask, seed=seed, within=within)


def test_every_weight_is_drawn_about_equally_often():
    mask = of(a=set(range(5)))
    counts = torch.zeros(20)
    for seed in range(400):
        counts[masks.random_like(mask, seed=seed).indices["layers.0.mlp.up.weight"]] += 1
    assert counts.min() > 60 and counts.max() < 140  # 100 expected, four standard deviations are 35


@pytest.fixture(scope="module")
def lm():
    return tiny.model()


def ranking(values) -> Scores:
    return Scores("unsigned", {"w": torch.as_tensor(values).float().view(40, 100)}, "m", "r")


def test_weights_that_are_spared_come_last():
    order = ranking(torch.arange(4000))
    safe = masks.top(order, 0.01, lowest=True)  # the first forty
    spared = RIVALS.spare(order, safe)
    assert masks.top(spared, 0.01, lowest=True).indices["w"].tolist() == list(range(40, 80))
    assert len(masks.top(spared, 0.98, lowest=True) & safe) == 0


def test_random_weights_of_the_same_utility():
    """Of a set that lies in the upper tenth, all; of a set from everywhere, from everywhere."""
    utility = ranking(torch.arange(4000))
    upper = RIVALS.as_useful(masks.top(utility, 0.1), utility)
    drawn = masks.top(upper, 0.05, lowest=True).indices["w"]
    assert len(drawn) == 200 and drawn.min() >= 3600 and 3750 < drawn.float().mean() < 3850
    spread = RIVALS.as_useful(masks.top(utility, 1.0), utility)
    drawn = masks.top(spread, 0.05, lowest=True).indices["w"]
    assert drawn.min() < 200 and drawn.max() > 3800 and 1700 < drawn.float().mean() < 2300


def test_a_ranking_is_cut_where_it_has_done_enough(monkeypatch):
    """Made-up answers, of which each weight takes one in a hundred."""

    def without(lm, mask):
        state.append(1 - len(mask) / 100)
        return nullcontext()

    state, given = [], RIVALS.cut.__globals__
    monkeypatch.setitem(given, "hl", SimpleNamespace(without=without, measure=lambda *_: state[-1]))
    monkeypatch.setitem(given, "run", SimpleNamespace(left=lambda name, before, now: np.array([now])))
    for name in ("lm", "tries", "discovered"):
        monkeypatch.setitem(given, name, None)
    assert 85 <= len(RIVALS.cut(ranking(torch.arange(4000)))) <= 86


def test_transfer_by_hand():
    """Two requests of each of two types; each set takes its own type and half of the other."""
    ten = lecture.defined("10", K=2)
    columns = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0], [1, 0, 0, 0]])
    assert ten.matrix(*columns).tolist() == [[1, 0.5], [0.5, 1]]
    assert ten.transferred(*columns) == ten.smallest(*columns) == 0.5


def test_sets_of_the_same_sizes(lm):
    """Of the largest weights, matched ones are nearly as large; random ones are not."""
    mask = masks.top(scores.magnitude(lm), 0.05).called("large")
    matched = masks.magnitude_like(mask, lm, seed=1)
    assert len(matched & mask) == 0
    values = scores.magnitude(lm).values
    for name, index in mask.indices.items():
        size = values[name].flatten()
        assert len(matched.indices[name]) == len(index)
        assert size[matched.indices[name]].mean() > 0.7 * size[index].mean()
        assert size[masks.random_like(mask).indices[name]].mean() < 0.6 * size[index].mean()


def test_matched_weights_of_middling_size_lie_next_to_theirs(lm):
    values = scores.magnitude(lm).values
    mask = masks.random_like(masks.top(scores.magnitude(lm), 0.02), seed=3)
    matched = masks.magnitude_like(mask, lm, seed=0)
    for name, index in mask.indices.items():
        rank = values[name].flatten().argsort().argsort().float()
        first, second = rank[index].sort().values, rank[matched.indices[name]].sort().values
        assert (first - second).abs().max() <= 20 + 2 * len(index)
        assert len(matched.indices[name].unique()) == len(index)
    again, other = masks.magnitude_like(mask, lm, seed=0), masks.magnitude_like(mask, lm, seed=1)
    assert masks.jaccard(again, matched) == 1 and masks.jaccard(other, matched) < 1


def test_more_than_half_can_not_be_matched(lm):
    mask = masks.top(scores.magnitude(lm), 0.6)
    with pytest.raises(ValueError, match=r"\d+ weights are to be matched by \d+ others"):
        masks.magnitude_like(mask, lm)
    # All others are taken where there are just as many.
    half = masks.top(scores.magnitude(lm), 0.5)
    rest = masks.magnitude_like(half, lm)
    assert len(half | rest) == half.numel


def test_sizes_of_another_model_are_refused(lm):
    mask = masks.top(scores.magnitude(tiny.model("gpt_neox")), 0.1)
    with pytest.raises(ValueError, match="does not fit 'tiny/llama'"):
        masks.magnitude_like(mask, lm)


# --------------------------------------------------------------------------- selection


def scored(kind: str = "signed", **values) -> Scores:
    return Scores(kind, {name: torch.tensor(v, dtype=torch.float32) for name, v in values.items()}, "m", "r")


def chosen(mask: Mask) -> dict[str, list[int]]:
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
    assert chosen(masks.select(prune, q=1 / 3)) == {"w": [0, 3]}
    assert chosen(masks.top(preserve, 1 / 3)) == {"w": [3, 4]}
    assert chosen(masks.select(prune, preserve, q=1 / 3, p=1 / 3)) == {"w": [0]}
    # Rows by themselves: the lowest third of (-4, 1, 3) and of (-6, 0, 3).
    assert chosen(masks.top(prune, 1 / 3, scope="row", lowest=True)) == {"w": [0, 3]}


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
    mask = masks.top(SOME, share, scope=scope)
    assert chosen(mask) == expected
    assert (mask.model, mask.revision) == ("m", "r")
    assert mask.shapes == {"a": (2, 3), "b": (1, 4)}


def test_a_share_that_is_exact_on_paper_is_not_rounded_down():
    """0.29 * 100 is 28.999999999999996."""
    assert len(masks.top(scored(w=[list(range(100))]), 0.29)) == 29


def test_selecting_all_and_sparing_all():
    preserve = scored("unsigned", a=[[1.0, 2, 3], [4, 5, 6]], b=[[1.0, 2, 3, 4]])
    assert len(masks.select(SOME, preserve, q=1.0, p=0.0)) == 10
    assert len(masks.select(SOME, preserve, q=0.0, p=0.0)) == 0
    assert len(masks.select(SOME, preserve, q=1.0, p=1.0)) == 0
    # What is left of everything is what p does not spare.
    rest = masks.select(SOME, preserve, q=1.0, p=0.5)
    assert chosen(rest) == {"a": [0, 1, 2], "b": [0, 1]}


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
    index = masks.largest(values, k, sample=sample)
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
    mask = masks.top(Scores("signed", values, "m", "r"), share, scope="global")
    whole = torch.cat([v.flatten() for v in values.values()])
    k = max(math.floor(share * len(whole) + 1e-9), int(share > 0))
    taken = torch.cat([values[n].flatten()[i] for n, i in mask.indices.items()])
    assert torch.equal(taken.sort().values, whole.topk(k).values.sort().values)


def test_selection_is_a_set_difference_and_the_lowest_are_the_highest_of_the_opposite():
    generator = torch.Generator().manual_seed(0)
    values = [{n: torch.randn(8, 16, generator=generator) for n in "ab"} for _ in range(2)]
    prune, preserve = Scores("signed", values[0], "m", "r"), Scores("unsigned", values[1], "m", "r").abs()
    mask = masks.select(prune, preserve, q=0.3, p=0.2, name="x")
    taken = masks.top(-prune, 0.3)
    assert chosen(mask) == chosen(taken - masks.top(preserve, 0.2)) and mask.name == "x"
    assert 0 < len(mask) < len(taken)
    for scope in masks.SCOPES:
        assert chosen(masks.top(prune, 0.3, scope=scope, lowest=True)) == chosen(
            masks.top(-prune, 0.3, scope=scope)
        )


def test_as_many_as_another_set():
    generator = torch.Generator().manual_seed(0)
    values = [{n: torch.randn(8, 16, generator=generator) for n in "ab"} for _ in range(3)]
    prune, preserve, other = (Scores("signed", v, "m", "r") for v in values)
    mask = masks.select(prune, preserve.abs(), q=0.1, p=0.2)
    same = masks.same_size(mask, other, preserve.abs(), p=0.2)
    assert {n: len(i) for n, i in same.indices.items()} == {n: len(i) for n, i in mask.indices.items()}
    assert len(same & masks.top(preserve.abs(), 0.2)) == 0
    # Of one's own scores it is the set itself, and then the next in line.
    assert chosen(masks.same_size(mask, prune, preserve.abs(), p=0.2)) == chosen(mask)
    following = masks.same_size(mask, prune, preserve.abs(), p=0.2, skip=mask)
    assert len(following) == len(mask) and len(following & mask) == 0
    for name, index in following.indices.items():
        worst_taken = prune.values[name].flatten()[mask.indices[name]].max()
        assert (prune.values[name].flatten()[index] >= worst_taken).all()


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_shares_outside_0_to_1(value):
    for options, name in (({"q": value}, "q"), ({"q": 0.1, "p": value}, "p")):
        with pytest.raises(ValueError, match=rf"{name}={value} must be a share between 0 and 1"):
            masks.select(SOME, SOME.abs(), **options)
    with pytest.raises(ValueError, match=r"share=.* must be a share"):
        masks.top(SOME, value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite(value):
    broken = scored(a=[[5.0, 1, value], [2, 6, 4]], b=[[9.0, 8, 7, 10]])
    for prune, preserve in ((broken, SOME), (SOME, broken)):
        with pytest.raises(ValueError, match="the scores of a are not all finite"):
            masks.select(prune, preserve, q=0.1, p=0.1)


def test_other_mistakes():
    with pytest.raises(ValueError, match="scope='layer' is unknown; choose one of matrix, row, global"):
        masks.top(SOME, 0.1, scope="layer")
    with pytest.raises(ValueError, match="but preserve is None"):
        masks.select(SOME, q=0.1, p=0.1)
    with pytest.raises(ValueError, match="these are of different matrices"):
        masks.select(SOME, scored(a=[[1.0]]), q=0.1, p=0.1)


# --------------------------------------------------------------------------- taking out and putting back


def copied(lm):
    return {name: p.detach().clone() for name, p in lm.model.named_parameters()}


def zeros(lm) -> float:
    """Share of the blocks' weights that are exactly zero."""
    found = [module.weight for module in scores.matrices(lm).values()]
    return sum(int((w == 0).sum()) for w in found) / sum(w.numel() for w in found)


def unchanged(lm, before):
    return all(
        torch.equal(p.detach().view(torch.uint8), before[name].view(torch.uint8))
        for name, p in lm.model.named_parameters()
    )


@pytest.fixture(scope="module")
def mask(lm):
    return masks.top(scores.random(lm), 0.1).called("mine")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, -1.0, 3.0])
def test_weights_are_changed_and_come_back_bit_for_bit(lm, mask, dtype, strength):
    lm = dataclasses.replace(lm, model=copy.deepcopy(lm.model).to(dtype))
    before = copied(lm)
    with masks.without(lm, mask, strength=strength) as inside:
        assert inside is lm
        for name, parameter in lm.model.named_parameters():
            flat, was = parameter.detach().flatten(), before[name].flatten()
            expected = was.clone()
            if name in mask.indices:
                index = mask.indices[name]
                expected[index] = was[index] * strength
            torch.testing.assert_close(flat, expected, rtol=0, atol=1e-4)
            if name not in mask.indices:
                assert torch.equal(flat, was)
    assert unchanged(lm, before)


def test_they_come_back_after_an_exception(lm, mask):
    before = copied(lm)
    with pytest.raises(KeyError), masks.without(lm, mask):
        assert not unchanged(lm, before)
        raise KeyError
    assert unchanged(lm, before)


def test_they_come_back_after_an_exception_while_they_are_taken_out(lm, mask, monkeypatch):
    before, last = copied(lm), list(mask.indices)[-1]
    broken = dataclasses.replace(mask, indices={**mask.indices, last: mask.indices[last].float()})
    with pytest.raises(IndexError), masks.without(lm, broken):
        pass
    assert unchanged(lm, before)


def test_within_one_another(lm, mask):
    other = masks.top(scores.random(lm, seed=1), 0.3)
    assert len(mask & other)
    before = copied(lm)
    with masks.without(lm, mask, strength=0.5):
        between = copied(lm)
        with masks.without(lm, other, strength=2.0), masks.without(lm, other):
            assert zeros(lm) >= other.share
        assert unchanged(lm, between)
    assert unchanged(lm, before)


def test_zeros_and_what_they_do(lm, mask):
    ids = torch.arange(7, 40)[None]
    with torch.no_grad():
        usual = lm.model(ids).logits
        assert zeros(lm) == 0
        with masks.without(lm, mask):
            assert zeros(lm) == pytest.approx(mask.share)
            assert (lm.model(ids).logits - usual).abs().max() > 0.1
        assert torch.equal(lm.model(ids).logits, usual)


def test_gradients_and_flags_stay(lm, mask):
    weight = lm.model.get_parameter(next(iter(mask.indices)))
    with masks.without(lm, mask):
        assert weight.requires_grad and weight.is_leaf and weight.grad is None
        assert lm.model.get_parameter(next(iter(mask.indices))) is weight


@pytest.mark.parametrize("strength", [math.nan, math.inf])
def test_unknown_strengths(lm, mask, strength):
    before = copied(lm)
    with pytest.raises(ValueError, match=r"strength=.* must be a finite number"):
        masks.without(lm, mask, strength=strength).__enter__()
    assert unchanged(lm, before)


@pytest.mark.parametrize("wrong", ["architecture", "depth", "width", "index", "negative", "weights"])
def test_a_mask_of_another_model_is_refused_before_the_model_is_touched(lm, mask, wrong):
    first = next(iter(mask.indices))
    message = "was made for 'tiny/.*' and does not fit 'tiny/"
    if wrong == "architecture":
        mask = masks.top(scores.random(tiny.model("gpt_neox")), 0.1)
    elif wrong == "depth":
        mask = masks.top(scores.random(tiny.model(layers=3)), 0.1)
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
        masks.without(lm, mask).__enter__()
    assert unchanged(lm, before)


def test_a_mask_of_other_weights_can_be_meant(mask):
    child = dataclasses.replace(tiny.model(seed=3), revision="child")
    before = copied(child)
    with masks.without(child, mask, elsewhere=True):
        assert zeros(child) == pytest.approx(mask.share)
    assert unchanged(child, before)


def test_values_are_read_and_put_back_exactly():
    lm = tiny.model()
    before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    mask = masks.top(scores.magnitude(lm), 0.05)
    old = masks.values(lm, mask)
    masks.put(lm, mask, {name: torch.zeros(()) for name in old})
    now = dict(lm.model.named_parameters())
    for name, index in mask.indices.items():
        flat, was = now[name].detach().flatten(), before[name].flatten()
        assert (flat[index] == 0).all() and old[name].tolist() == was[index].tolist()
        rest = torch.ones(len(flat), dtype=torch.bool)
        rest[index] = False
        assert torch.equal(flat[rest], was[rest])
    masks.put(lm, mask, old)
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())
