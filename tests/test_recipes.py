"""Recipes by the size and precision of a model."""

import dataclasses

import pytest
import torch

from harmlens.models import forward
from harmlens.models import loading as models
from harmlens.training import recipes
from harmlens.training.finetune import Recipe


@pytest.fixture
def sft():
    return models.load("organism/sft", seed=0)


def test_a_small_model_has_the_recipe_that_is_given(sft):
    recipe = Recipe(steps=7, lr=5e-4, seed=3)
    assert recipes.small(sft) and recipes.suited(sft, recipe) is recipe


def test_others_have_adapters_and_the_same_steps(sft, monkeypatch):
    recipe = Recipe(steps=7, lr=5e-4, seed=3, batch_size=5)
    half = dataclasses.replace(sft, model=forward.clone(sft).model.half())
    assert not recipes.small(half)
    monkeypatch.setattr(recipes, "SMALL", 1000)
    for lm in (half, sft):
        found = recipes.suited(lm, recipe)
        assert (found.method, found.rank, found.alpha, found.lr) == ("lora", 128, 16, 2e-4)
        assert (found.steps, found.seed, found.batch_size) == (7, 3, 5)


def test_bfloat16_is_not_small_either(sft):
    assert not recipes.small(dataclasses.replace(sft, model=forward.clone(sft).model.to(torch.bfloat16)))


def test_no_room_for_a_copy(sft, monkeypatch):
    need = sum(p.numel() for p in sft.model.parameters()) * 4
    monkeypatch.setattr(memory, "free", lambda device: need)
    recipes.require_room(sft)
    monkeypatch.setattr(memory, "free", lambda device: need - 1)
    with pytest.raises(
        MemoryError, match=r"a copy of 'organism/sft-0' takes .* are free on cpu.*smaller model"
    ):
        recipes.require_room(sft)
