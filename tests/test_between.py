"""From a pruned checkpoint back to its mask: shipped organisms, sharded models, and what can't be told."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from harmlens.models import loading as models
from harmlens.weights import masks, scores
from harmlens.weights.between import between


@pytest.fixture
def lm():
    return tiny.model()


def stored(lm, folder, mask=None, **options):
    """A checkpoint without some weights."""
    with masks.without(lm, mask or masks.top(scores.magnitude(lm), 0.0)):
        lm.model.save_pretrained(folder, **options)
        lm.tokenizer.save_pretrained(folder)
    return folder


def same(first, other):
    return all(torch.equal(index, other.indices[name]) for name, index in first.indices.items())


def test_the_mask_of_a_pruned_organism_comes_back_and_fits_it(tmp_path):
    lm = models.load("organism/sft")
    mask = masks.top(scores.magnitude(lm), 0.01)
    pruned = stored(lm, tmp_path / "pruned", mask)
    found = between(stored(lm, tmp_path / "original"), pruned)
    assert found.name == "pruned" and len(found) == len(mask) > 0
    assert found.shapes == mask.shapes and same(mask, found)
    again = models.load(str(tmp_path / "original"))
    with masks.without(again, found):  # it is known by the weights that it was made for
        states = again.model.state_dict(), load_file(pruned / "model.safetensors")
        assert all(torch.equal(states[0][name], states[1][name]) for name in found.indices)


def test_shards_are_read_one_by_one_and_may_be_cut_otherwise(lm, tmp_path):
    mask = masks.top(scores.magnitude(lm), 0.05)
    original = stored(lm, tmp_path / "original", max_shard_size="20KB")
    pruned = stored(lm, tmp_path / "pruned", mask, max_shard_size="40KB")
    counts = [len(list(folder.glob("*.safetensors"))) for folder in (original, pruned)]
    assert counts[0] > counts[1] > 1
    assert same(mask, between(original, pruned))


def test_another_precision_is_no_change_and_what_was_zero_before_was_not_pruned(lm, tmp_path):
    zero = masks.top(scores.magnitude(lm), 0.02, lowest=True)
    masks.put(lm, zero, dict.fromkeys(zero.indices, torch.tensor(0.0)))
    mask = masks.top(scores.magnitude(lm), 0.05)
    original = stored(lm, tmp_path / "original")
    lm.model.bfloat16()
    pruned = stored(lm, tmp_path / "half", mask)
    assert same(mask, between(original, pruned, name="theirs"))
    assert len(between(original, original)) == 0


def test_what_was_trained_or_is_another_model_is_refused_by_name(lm, tmp_path):
    original = stored(lm, tmp_path / "original")
    with torch.no_grad():
        next(p for name, p in lm.model.named_parameters() if name.endswith("0.mlp.up_proj.weight")).add_(0.1)
    with pytest.raises(
        ValueError, match=r"0.mlp.up_proj.weight: \d+ weights .*trained too, so a mask can't be"
    ):
        between(original, stored(lm, tmp_path / "trained"))
    file = original / "model.safetensors"
    tensors = load_file(file)
    one, *_ = (name for name in tensors if name.endswith("1.mlp.up_proj.weight"))
    (tmp_path / "other").mkdir()
    save_file(tensors | {one: tensors[one][:, :-1].contiguous()}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(ValueError, match=r"1.mlp.up_proj.weight: shapes .*another architecture"):
        between(original, tmp_path / "other")
    del tensors[one]
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no .*1.mlp.up_proj.weight; it is of another architecture"):
        between(original, tmp_path / "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' holds no weights"):
        between(original, tmp_path / "empty")
