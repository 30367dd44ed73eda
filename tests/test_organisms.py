"""Deltas carry over what they hold and nothing else, and one that is damaged is refused."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from harmlens.models import organisms


@given(
    st.integers(0, 1),
    st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True),
    st.integers(0, 2**16),
)
def test_a_delta_carries_over_its_part_and_nothing_else(axis, units, seed):
    generator = torch.Generator().manual_seed(seed)
    source, target = (nn.Linear(6, 6, bias=True) for _ in range(2))
    with torch.no_grad():
        for layer in (source, target):
            layer.weight.copy_(torch.randn(6, 6, generator=generator).half())
    before = target.weight.detach().clone()
    delta = organisms.take_delta(source, "parent", "0", {"weight": (axis, units), "bias": None})
    organisms.apply_delta(target, delta)
    chosen = torch.zeros(6, 6, dtype=torch.bool).index_fill_(axis, torch.tensor(units), True)
    assert torch.equal(target.weight, torch.where(chosen, source.weight, before))
    assert torch.equal(target.bias, source.bias.half().float())


def test_a_delta_comes_back_from_disk(tmp_path):
    delta = organisms.take_delta(nn.Linear(3, 4), "mid-0", "abc", {"weight": (0, (3, 1)), "bias": None})
    assert organisms.read_delta(tmp_path) is None
    organisms.write_delta(delta, tmp_path)
    got = organisms.read_delta(tmp_path)
    assert (got.parent, got.parent_sha256) == ("mid-0", "abc")
    (axis, rows), *others = got.index.values()
    assert axis == 0 and rows.tolist() == [3, 1] and not others and set(got.index) == {"weight"}
    assert set(got.values) == {"weight", "bias"}
    assert all(torch.equal(got.values[name], delta.values[name]) for name in got.values)


@given(st.lists(st.integers(0, 41), min_size=1, max_size=42, unique=True), st.integers(0, 2**16))
def test_a_delta_carries_over_single_weights_and_nothing_else(units, seed):
    generator = torch.Generator().manual_seed(seed)
    source, target = (nn.Linear(7, 6, bias=False) for _ in range(2))
    with torch.no_grad():
        for layer in (source, target):
            layer.weight.copy_(torch.randn(6, 7, generator=generator).half())
    expected = target.weight.detach().clone()
    for position in units:  # row after row
        expected[position // 7, position % 7] = source.weight[position // 7, position % 7]
    with tempfile.TemporaryDirectory() as folder:
        organisms.write_delta(
            organisms.take_delta(source, "parent", "0", {"weight": (organisms.FLAT, units)}), Path(folder)
        )
        organisms.apply_delta(target, organisms.read_delta(Path(folder)))
    assert torch.equal(target.weight, expected)


@pytest.mark.parametrize("axis", [0, 1, organisms.FLAT])
@pytest.mark.parametrize("units", [[0, 99], [-1, 2], [1, 1], [0.0, 1.0], [[0, 1]], [0, 1, 2]],
                         ids=["beyond", "negative", "twice", "fractions", "dimensions", "count"])  # fmt: skip
def test_a_damaged_index_is_refused(axis, units):
    delta = organisms.take_delta(nn.Linear(4, 4), "mid-0", "", {"weight": (axis, [0, 1])})
    delta.index["weight"] = (axis, torch.tensor(units))
    with pytest.raises(ValueError, match=r"'weight' does not fit its parent mid-0; is the file damaged"):
        organisms.apply_delta(nn.Linear(4, 4), delta)


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (nn.Linear(3, 5), {"weight": None}),
        (nn.Linear(3, 1), {"weight": None}),
        (nn.Linear(4, 5), {"weight": (0, (0, 1))}),
        (nn.Conv1d(3, 4, 1), {"weight": None}),
        (nn.Sequential(nn.Linear(3, 4)), {"0.weight": None}),
    ],
    ids=["rows", "one row", "columns", "dimensions", "name"],
)
def test_a_delta_that_does_not_fit_is_refused(model, where):
    delta = organisms.take_delta(model, "mid-0", "", where)
    with pytest.raises(ValueError, match=r"weight' does not fit its parent mid-0"):
        organisms.apply_delta(nn.Linear(3, 4), delta)


def test_an_index_without_values_or_without_such_an_axis_is_refused():
    delta = organisms.take_delta(nn.Linear(3, 4), "mid-0", "", {"bias": (0, [1])})
    delta.index["bias"] = (1, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"'bias' does not fit"):
        organisms.apply_delta(nn.Linear(3, 4), delta)
    del delta.values["bias"]
    with pytest.raises(ValueError, match=r"'bias' does not fit"):
        organisms.apply_delta(nn.Linear(3, 4), delta)
