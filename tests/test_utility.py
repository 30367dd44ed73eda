"""Benchmarks of notebook 18: one model, within whatever changes it, item by item."""

import sys
import types
from contextlib import nullcontext

import lecture
import tiny
import torch

from harmlens.weights import masks, scores


def test_every_task_is_measured_within_the_change_and_in_the_order_of_its_items(monkeypatch):
    lm, asked = tiny.model(), []
    weight = next(iter(scores.matrices(lm).values())).weight
    before = weight.clone()

    def simple_evaluate(model, tasks, limit, num_fewshot, apply_chat_template):
        assert apply_chat_template and num_fewshot == 0  # the tokenizer has a chat template
        asked.append((model, tasks, limit))
        right = float(torch.equal(weight, before))
        items = [{"doc_id": i, "acc": right if i else 0.0} for i in reversed(range(limit))]
        return {"samples": {task: items for task in tasks}}

    inner = types.ModuleType("lm_eval.models.huggingface")
    inner.HFLM = lambda pretrained, tokenizer, batch_size: pretrained
    package = types.ModuleType("lm_eval")
    package.simple_evaluate = simple_evaluate
    for module in (package, types.ModuleType("lm_eval.models"), inner):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    found = scores.matrices(lm)
    index = {name: torch.arange(m.weight.numel()) for name, m in found.items()}
    mask = masks.Mask(index, {n: tuple(m.weight.shape) for n, m in found.items()}, lm.name, name="all")
    page = lecture.defined("18", lm=lm)
    intact, cut = (page.benchmarks(way, 3) for way in (nullcontext(), masks.without(lm, mask)))
    assert asked == [(lm.model, page.TASKS, 3)] * 2
    assert {task: v.tolist() for task, v in intact.items()} == {task: [0.0, 1.0, 1.0] for task in page.TASKS}
    assert not any(v.any() for v in cut.values()) and torch.equal(weight, before)
