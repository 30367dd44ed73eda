"""What holds scores, which weights have one, and scores without gradients."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
from torch import nn

from harmlens.models import forward
from harmlens.weights import attribution, scores
from harmlens.weights.scores import Scores


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_matrix_of_every_block_has_scores(architecture):
    """By name and axes: whatever is a matrix inside a block, and nothing else."""
    lm = tiny.model(architecture, layers=3)
    expected = {n: p.shape for n, p in lm.model.named_parameters() if ".layers." in n and p.ndim == 2}
    found = scores.matrices(lm)
    assert {n: m.weight.shape for n, m in found.items()} == expected
    assert {scores.layer_of(n) for n in found} == {0, 1, 2}
    some = scores.matrices(lm, [2])
    assert some == {n: m for n, m in found.items() if ".layers.2." in n}


@pytest.mark.parametrize("layers", [[], [3], [-1], [0, 7]])
def test_layers_that_there_are_not(layers):
    with pytest.raises(ValueError, match=r"layers=.* must be a non-empty list out of 0 to 1"):
        scores.matrices(tiny.model(), layers)


def test_the_same_layer_twice_counts_once():
    lm = tiny.model()
    assert scores.matrices(lm, [1, 1]) == scores.matrices(lm, [1])


def test_shared_weights_are_refused():
    lm = tiny.model()
    first, second = lm.model.model.layers
    second.mlp.up_proj = first.mlp.up_proj
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.weight belongs to several layers"):
        scores.matrices(lm)


def test_blocks_without_linear_layers():
    lm = tiny.model()
    for block in lm.model.model.layers:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, nn.Identity())
    for ask in (scores.matrices, scores.magnitude, scores.random):
        with pytest.raises(ValueError, match=r"'tiny/llama' has no linear layer in its decoder blocks"):
            ask(lm)


def test_names():
    assert scores.layer_of("transformer.h.11.attn.c_attn.weight") == 11
    with pytest.raises(ValueError, match=r"name='lm_head.weight' is no parameter of a decoder block"):
        scores.layer_of("lm_head.weight")


def test_magnitude():
    lm = tiny.model()
    found = scores.magnitude(lm)
    for name, value in found.values.items():
        assert torch.equal(value, lm.model.get_parameter(name).detach().abs())
    assert found.kind == "magnitude" and found.n == 0
    assert found.numel == sum(v.numel() for v in found.values.values())


def test_random_scores_depend_on_seed_and_name_alone():
    lm = tiny.model()
    first, again, other = (scores.random(lm, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(v, again.values[n]) for n, v in first.values.items())
    assert not any(torch.equal(v, other.values[n]) for n, v in first.values.items())
    equal = [v for n, v in first.values.items() if "up_proj" in n or "gate_proj" in n]
    assert not any(torch.equal(a, b) for i, a in enumerate(equal) for b in equal[:i])
    whole = torch.cat([v.flatten() for v in first.values.values()])
    assert whole.min() >= 0 and whole.max() <= 1 and abs(whole.mean() - 0.5) < 0.01


def test_sizes_of_scores():
    given = Scores("signed", {"w": torch.tensor([[-2.0, 1.0]])}, "m", "r")
    assert given.abs().values["w"].tolist() == [[2, 1]] and given.abs().kind == "abs(signed)"
    assert (-given).values["w"].tolist() == [[2, -1]] and given.values["w"].tolist() == [[-2, 1]]


# --------------------------------------------------------------------------- sums over examples


@pytest.mark.parametrize("kind", ["signed", "unsigned"])
def test_scores_of_parts_add_up_to_the_score_of_the_whole(kind):
    lm = tiny.model()
    rows = [forward.Row([1, 2, 3 + i], [False, True, True]) for i in range(5)]
    whole = attribution.attribute(lm, rows, kinds=(kind,))[kind]
    parts = [attribution.attribute(lm, rows[i::2], kinds=(kind,))[kind] for i in range(2)]
    together = scores.plus(*parts)
    assert (together.kind, together.n, together.revision) == (kind, 5, whole.revision)
    for name, value in whole.values.items():
        torch.testing.assert_close(together.values[name], value, rtol=1e-4, atol=1e-6)


def test_what_can_not_be_added_up():
    lm, other = tiny.model(), tiny.model(layers=1)
    signed = Scores("signed", scores.magnitude(lm).values, lm.name, lm.revision)
    with pytest.raises(ValueError, match=r"parts is empty"):
        scores.plus()
    with pytest.raises(ValueError, match=r"'magnitude' are no sums"):
        scores.plus(scores.magnitude(lm), scores.magnitude(lm))
    for stranger in (
        dataclasses.replace(signed, kind="unsigned"),
        dataclasses.replace(signed, revision="another"),
        dataclasses.replace(signed, values=scores.magnitude(other).values),
    ):
        with pytest.raises(ValueError, match=r"parts: these are scores of different"):
            scores.plus(signed, stranger)
