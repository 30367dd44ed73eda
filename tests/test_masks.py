"""Sets of weights: the algebra of sets, what chance gives, control sets, files."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmlens.weights import masks, pruning, scores
from harmlens.weights.masks import Mask

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


@given(any_sets, any_sets, any_sets)
def test_masks_are_sets(first, second, third):
    first, second, third = of(**first), of(**second), of(**third)
    a, b, c = map(pairs, (first, second, third))
    assert pairs(first & second) == a & b
    assert pairs(first | second) == a | b
    assert pairs(first - second) == a - b
    assert len(first) == len(a) and first.share == pytest.approx(len(a) / 42)
    assert masks.jaccard(first, second) == pytest.approx(len(a & b) / len(a | b) if a | b else 0)
    assert masks.jaccard(first, second) == masks.jaccard(second, first)
    together = [first, second, third]
    assert pairs(masks.union(together)) == a | b | c
    assert pairs(masks.intersection(together)) == a & b & c
    assert pairs(masks.intersection(together, at_least=2)) == (a & b) | (a & c) | (b & c)
    assert pairs(masks.intersection([first])) == a


def test_names_of_combined_masks():
    first, second = of(a={1}).called("harm"), of(a={2}).called("facts")
    assert [(first & second).name, (first | second).name, (first - second).name] == [
        "harm & facts", "harm | facts", "harm - facts"
    ]  # fmt: skip
    assert masks.union([first, second]).name == "union"
    assert masks.intersection([first, second]).name == "in 2 of 2"


def test_shares_of_layers_modules_and_matrices():
    mask = of(a={0, 1, 2, 3}, b={5}, c={1, 2, 3})
    assert mask.numel == 42 and len(mask) == 8
    assert mask.shares() == {0: 4 / 20, 1: 4 / 22}
    assert mask.shares(scores.module_of) == {"up": 7 / 30, "q": 1 / 12}
    assert mask.shares(str) == dict(zip(SHAPES, (4 / 20, 1 / 12, 3 / 10), strict=True))


def test_masks_of_different_matrices_are_not_put_together():
    first, other = of(a={1}), Mask({"w": torch.tensor([0])}, {"w": (1, 2)}, "other")
    for combine in (
        lambda: first & other,
        lambda: first | other,
        lambda: first - other,
        lambda: masks.jaccard(first, other),
        lambda: masks.chance_jaccard(first, other),
        lambda: masks.union([first, other]),
        lambda: masks.random_like(first, within=other),
        lambda: masks.random_like(first, spare=other),
    ):
        with pytest.raises(ValueError, match="'m' and 'other': these are of different matrices"):
            combine()
    with pytest.raises(ValueError, match="masks is empty"):
        masks.intersection([])


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


@given(any_sets, any_sets, any_sets, st.integers(0, 1000))
def test_random_sets_of_the_same_make(mask, within, spare, seed):
    mask, within, spare = of(**mask), of(**within), of(**spare)
    drawn = masks.random_like(mask, seed=seed)
    assert {n: len(i) for n, i in drawn.indices.items()} == {n: len(i) for n, i in mask.indices.items()}
    assert pairs(drawn) == pairs(masks.random_like(mask, seed=seed))
    pool = pairs(within) - pairs(spare)
    enough = all(sum(n == name for n, _ in pool) >= len(index) for name, index in mask.indices.items())
    if enough:
        inside = masks.random_like(mask, seed=seed, within=within, spare=spare)
        assert pairs(inside) <= pool and len(inside) == len(mask)
    else:
        with pytest.raises(ValueError, match=r"weights are to be drawn from"):
            masks.random_like(mask, seed=seed, within=within, spare=spare)


def test_every_weight_is_drawn_about_equally_often():
    mask = of(a=set(range(5)))
    counts = torch.zeros(20)
    for seed in range(400):
        counts[masks.random_like(mask, seed=seed).indices["layers.0.mlp.up.weight"]] += 1
    assert counts.min() > 60 and counts.max() < 140  # 100 expected, four standard deviations are 35


@pytest.fixture(scope="module")
def lm():
    return tiny.model()


def test_sets_of_the_same_sizes(lm):
    """Of the largest weights, matched ones are nearly as large; random ones are not."""
    mask = pruning.top(scores.magnitude(lm), 0.05, name="large")
    matched = masks.magnitude_like(mask, lm, seed=1, near=5)
    assert len(matched & mask) == 0
    values = scores.magnitude(lm).values
    for name, index in mask.indices.items():
        size = values[name].flatten()
        assert len(matched.indices[name]) == len(index)
        assert size[matched.indices[name]].mean() > 0.7 * size[index].mean()
        assert size[masks.random_like(mask).indices[name]].mean() < 0.6 * size[index].mean()


def test_matched_weights_of_middling_size_lie_next_to_theirs(lm):
    values = scores.magnitude(lm).values
    mask = masks.random_like(pruning.top(scores.magnitude(lm), 0.02), seed=3)
    matched = masks.magnitude_like(mask, lm, seed=0)
    for name, index in mask.indices.items():
        rank = values[name].flatten().argsort().argsort().float()
        first, second = rank[index].sort().values, rank[matched.indices[name]].sort().values
        assert (first - second).abs().max() <= 20 + 2 * len(index)
        assert len(matched.indices[name].unique()) == len(index)
    again, other = masks.magnitude_like(mask, lm, seed=0), masks.magnitude_like(mask, lm, seed=1)
    assert masks.jaccard(again, matched) == 1 and masks.jaccard(other, matched) < 1


def test_more_than_half_can_not_be_matched(lm):
    mask = pruning.top(scores.magnitude(lm), 0.6)
    with pytest.raises(ValueError, match=r"\d+ weights are to be matched by \d+ others"):
        masks.magnitude_like(mask, lm)
    # All others are taken where there are just as many.
    half = pruning.top(scores.magnitude(lm), 0.5)
    rest = masks.magnitude_like(half, lm)
    assert len(half | rest) == half.numel


def test_sizes_of_another_model_are_refused(lm):
    mask = pruning.top(scores.magnitude(tiny.model("gpt_neox")), 0.1)
    with pytest.raises(ValueError, match="does not fit 'tiny/llama'"):
        masks.magnitude_like(mask, lm)


# --------------------------------------------------------------------------- files


@given(any_sets)
def test_saved_and_loaded(chosen):
    mask = of(**chosen)
    with tempfile.TemporaryDirectory() as folder:
        mask.save(Path(folder) / "new" / "mask.safetensors")
        loaded = masks.load(Path(folder) / "new" / "mask.safetensors")
    assert pairs(loaded) == pairs(mask)
    assert dataclasses.replace(loaded, indices={}) == dataclasses.replace(mask, indices={})


def test_matrices_keep_their_order(tmp_path):
    """Ten blocks and more: a file has its tensors in the order of the alphabet."""
    names = [f"layers.{i}.{m}.weight" for i, m in itertools.product(range(12), ("q", "b"))]
    mask = Mask({n: torch.tensor([1]) for n in names}, dict.fromkeys(names, (2, 2)))
    mask.save(tmp_path / "mask")
    assert list(masks.load(tmp_path / "mask").indices) == names
    assert list(masks.load(tmp_path / "mask").shares()) == list(range(12))


def test_the_same_mask_gives_the_same_file(tmp_path):
    mask = of(a={1, 2}, c={3})
    for name in ("one", "two"):
        mask.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("kind", ["missing", "cut", "text", "scores"])
def test_damaged_files(kind, tmp_path):
    file = tmp_path / "mask.safetensors"
    of(a={1, 2}).save(file)
    if kind == "missing":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif kind == "text":
        file.write_text("weights")
    else:
        scores.Scores("signed", {"w": torch.ones(1)}, "m", "r").save(file)
    with pytest.raises(ValueError, match=r"file='.*mask.safetensors' holds no mask; save one with Mask.save"):
        masks.load(file)


def test_values_are_read_and_put_back_exactly():
    lm = tiny.model()
    before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    mask = pruning.top(scores.magnitude(lm), 0.05)
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
