"""Patching between two models: what differs is found exactly."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import tiny
import torch

from harmlens.asking import pairs as prompts
from harmlens.flow import outcomes, patching
from harmlens.models import forward

SETS = outcomes.TokenSets((20, 21), (30,))


@pytest.fixture(scope="module")
def lm():
    return tiny.model("llama")


@pytest.fixture(scope="module")
def chats():
    return [pair.x0 for pair in prompts.pairs("prompt", n=6)]


def changed(lm, part, layer=1):
    """The same model with one module's weights moved."""
    other = dataclasses.replace(lm, model=copy.deepcopy(lm.model))
    with torch.no_grad():
        for p in getattr(other.model.model.layers[layer], part).parameters():
            p += 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    return other


@pytest.mark.parametrize(("part", "site"), [("mlp", "mlp_out"), ("self_attn", "attn_out")])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_changed_module_carries_all_and_nothing_below_it_any(lm, chats, part, site, layer):
    source = changed(lm, part, layer)
    w = patching.across(lm, source, chats, outcomes.y1(SETS), sites=("mlp_out", "attn_out"))
    assert w.total.abs().min() > 1e-3
    torch.testing.assert_close(w.at(site)[layer], w.total, atol=1e-4, rtol=1e-4)
    for other in ("mlp_out", "attn_out"):
        for below in range(layer):
            assert w.at(other)[below].abs().max() < 1e-5


def test_outcomes_are_those_of_the_two_models(lm, chats):
    source = changed(lm, "mlp")
    w = patching.across(lm, source, chats, outcomes.y1(SETS), positions="last")
    for each, got in ((source, w.y1), (lm, w.y0)):
        logits = forward.last_logits(each, [chat.render(each) for chat in chats])
        torch.testing.assert_close(got, outcomes.logit_difference(logits, SETS), atol=1e-4, rtol=0)


def test_a_model_and_itself_differ_in_nothing(lm, chats):
    w = patching.across(lm, lm, chats, outcomes.y1(SETS), sites=patching.cells.SITES[:4])
    assert w.effects.abs().max() < 1e-4 and w.size.abs().max() < 1e-4


def test_models_of_another_shape_and_bad_input_are_refused(lm, chats):
    small = tiny.model("llama", seed=1)
    small.model.model.layers = small.model.model.layers[:1]
    small.model.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="shape"):
        patching.across(lm, small, chats, outcomes.y1(SETS))
    with pytest.raises(ValueError, match="positions"):
        patching.across(lm, lm, chats, outcomes.y1(SETS), positions="each")
    with pytest.raises(ValueError, match="chats"):
        patching.across(lm, lm, [], outcomes.y1(SETS))
