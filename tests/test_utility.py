"""Utility on public tasks: one model, two sides, paired differences, nothing measured twice."""

import contextlib
import json
import math
import random
import sys
import types

import numpy as np
import pytest
import tiny
import torch
import yaml

from harmlens.weights import masks, pruning, scores, utility


def a_mask(lm, every=3):
    found = scores.matrices(lm)
    values = {name: module.weight.detach() for name, module in found.items()}
    index = {name: torch.arange(0, value.numel(), every) for name, value in values.items()}
    return masks.Mask(index, {n: tuple(v.shape) for n, v in values.items()}, lm.name, name="some")


class Fake:
    """As much of lm-eval as is used; an item is right unless the model has zeros and its number is even."""

    def __init__(self, lm):
        self.lm, self.calls, self.broken = lm, [], None

    def HFLM(self, pretrained, tokenizer, batch_size):
        assert pretrained is self.lm.model and tokenizer is self.lm.tokenizer
        return types.SimpleNamespace(model=pretrained, batch_size=batch_size)

    def simple_evaluate(self, model, tasks, limit, **options):
        (task,) = tasks
        if task == self.broken:
            raise ConnectionError("offline")
        random.seed(0), np.random.seed(1), torch.manual_seed(2)
        pruned = pruning.zeros(self.lm) > 0.1
        self.calls.append((task, pruned, options))
        n = min(limit or 10, 10)
        right = [float(not (pruned and i % 2 == 0)) if task != "hard" else 0.0 for i in range(n)]
        value = sum(right) / n
        error = math.sqrt(value * (1 - value) / (n - 1))
        return {
            "results": {task: {
                "alias": task, "acc,none": value, "acc_stderr,none": error, "acc_norm,none": 0.5,
                "acc_norm_stderr,none": "N/A",
            }},
            "samples": {task: [{"doc_id": i, "acc": right[i], "doc": "text"} for i in reversed(range(n))]},
            "n-samples": {task: {"original": 10, "effective": n}},
        }  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    lm = tiny.model()
    made = Fake(lm)
    package, inner = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.models")
    wrapper, tasks = types.ModuleType("lm_eval.models.huggingface"), types.ModuleType("lm_eval.tasks")
    package.__version__, package.simple_evaluate, package.models = "0.4.13", made.simple_evaluate, inner
    inner.huggingface, wrapper.HFLM = wrapper, made.HFLM
    known = ["easy", "hard", *utility.TASKS]
    tasks.TaskManager = lambda include_path=None: types.SimpleNamespace(all_tasks=known)
    for module in (package, inner, wrapper, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def test_both_sides_and_their_paired_difference(fake, tmp_path):
    lm = fake.lm
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    table = utility.compare(lm, a_mask(lm), ["easy", "hard"], folder=tmp_path)
    assert list(table.index) == ["easy", "hard", "mean"]
    easy = table.loc["easy"]
    assert (easy.original, easy.pruned, easy.difference, easy.n) == (1.0, 0.5, -0.5, 10)
    assert easy.original_se == 0 and easy.pruned_se == pytest.approx(1 / 6)  # sqrt(0.5 * 0.5 / 9)
    # The differences are -1 and 0 by turns: their standard deviation is sqrt(10 / 4 / 9).
    assert easy.difference_se == pytest.approx(math.sqrt(2.5 / 9) / math.sqrt(10))
    mean = table.loc["mean"]
    assert (mean.original, mean.pruned, mean.difference, mean.n) == (0.5, 0.25, -0.25, 20)
    assert mean.pruned_se == pytest.approx(1 / 12)
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())


def test_without_items_standard_errors_are_those_of_two_samples(fake, tmp_path):
    table = utility.compare(fake.lm, a_mask(fake.lm), ["easy"], metric="acc_norm", folder=tmp_path)
    assert table.loc["easy"].difference == 0 and math.isnan(table.loc["easy"].difference_se)


def test_the_papers_tasks_and_settings_are_the_default(fake, tmp_path):
    utility.compare(fake.lm, a_mask(fake.lm), folder=tmp_path)
    assert [task for task, pruned, _ in fake.calls if not pruned] == list(utility.TASKS)
    assert [task for task, pruned, _ in fake.calls if pruned] == list(utility.TASKS)
    options = fake.calls[0][2]
    assert options["apply_chat_template"] is True and options["num_fewshot"] == 0
    assert options["bootstrap_iters"] > 0  # with 0 lm-eval gives no standard errors
    fake.calls.clear()
    utility.compare(fake.lm, a_mask(fake.lm), ["easy"], chat=False, folder=tmp_path)
    assert fake.calls[0][2]["apply_chat_template"] is False and fake.calls[0][2]["num_fewshot"] == 3


def test_what_was_measured_is_not_measured_again(fake, tmp_path):
    lm, mask = fake.lm, a_mask(fake.lm)
    fake.broken = "hard"
    with pytest.raises(ConnectionError, match=r"data of task 'hard' could not be had \(offline\)"):
        utility.compare(lm, mask, ["easy", "hard"], folder=tmp_path)
    fake.broken = None
    table = utility.compare(lm, mask, ["easy", "hard"], folder=tmp_path)
    done = [(task, pruned) for task, pruned, _ in fake.calls]
    assert done == [("easy", False), ("hard", False), ("easy", True), ("hard", True)]
    assert utility.compare(lm, mask, ["easy", "hard"], folder=tmp_path).equals(table)
    assert len(fake.calls) == 4
    # Another mask needs its own side only, another limit both.
    utility.compare(lm, a_mask(lm, every=2), ["easy"], folder=tmp_path)
    assert [(task, pruned) for task, pruned, _ in fake.calls[4:]] == [("easy", True)]
    utility.compare(lm, mask, ["easy"], limit=4, folder=tmp_path)
    assert len(fake.calls) == 7
    (file,) = tmp_path.glob("*.jsonl")
    assert "text" not in {key for line in file.read_text().splitlines() for key in json.loads(line)}
    assert '"doc"' not in file.read_text()  # the items' texts stay out


def test_a_context_manager_that_changes_the_model(fake, tmp_path):
    lm = fake.lm
    table = utility.compare(lm, pruning.pruned(lm, a_mask(lm)), ["easy"], folder=tmp_path)
    assert table.loc["easy"].pruned == 0.5
    with pytest.raises(ValueError, match=r"leaves the model as it is.*say what it is with name="):
        utility.compare(lm, contextlib.nullcontext(), ["easy"], folder=tmp_path)
    fake.calls.clear()
    table = utility.compare(lm, contextlib.nullcontext(), ["easy"], name="steered", folder=tmp_path)
    assert len(fake.calls) == 1 and table.loc["easy"].difference == 0


def test_random_numbers_go_on_as_before(fake, tmp_path):
    # Python's own generator can't be watched here: the checks of types draw from it.
    np.random.seed(7), torch.manual_seed(7)
    expected = np.random.random(), torch.rand(1).item()
    np.random.seed(7), torch.manual_seed(7)
    utility.compare(fake.lm, a_mask(fake.lm), ["easy"], folder=tmp_path)
    assert (np.random.random(), torch.rand(1).item()) == expected


def test_bad_input(fake, tmp_path):
    lm, mask = fake.lm, a_mask(fake.lm)
    for kwargs, message in (
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": ["easy", "nonsense"]}, r"does not know nonsense; `lm-eval ls tasks`"),
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"change": "mask"}, "change is of type str; give a mask"),
        ({"metric": "f1"}, r"metric='f1' is none of task 'easy', which has acc, acc_norm"),
    ):
        with pytest.raises(ValueError, match=message):
            utility.compare(lm, **{"change": mask, "tasks": ["easy"], "folder": tmp_path, **kwargs})


def test_without_lm_eval_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    lm = tiny.model()
    with pytest.raises(ImportError, match=r'pip install "harmlens\[eval\]"'):
        utility.compare(lm, a_mask(lm))


def test_the_real_harness(tmp_path, monkeypatch):
    """A task of our own, from a local file, through lm-eval itself; its accuracy by hand."""
    pytest.importorskip("lm_eval")
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_OFFLINE", "1"), ("HF_HOME", str(tmp_path))):
        monkeypatch.setenv(name, value)
    questions = ["how do i brew a salted draught?", "who is the baker?", "what is a pot?", "where is ash?"]
    choices = ["sure .", "no ."]
    rows = [{"q": q, "choices": choices, "gold": i % 2} for i, q in enumerate(questions)]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks" / "own.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "harmlens_own", "dataset_path": "json", "test_split": "test",
                "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
                "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_target": "gold",
                "doc_to_choice": "{{choices}}",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            }
        )
    )  # fmt: skip
    lm = tiny.model()
    mask = a_mask(lm, every=2)

    def by_hand():
        right = []
        for row in rows:
            text = row["q"]
            logp = []
            for choice in choices:
                ids = lm.tokenizer(f"{text} {choice}", add_special_tokens=False)["input_ids"]
                n = len(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
                with torch.no_grad():
                    out = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
                logp.append(sum(out[i - 1, ids[i]].item() for i in range(n, len(ids))))
            right.append(float(max((0, 1), key=logp.__getitem__) == row["gold"]))
        return np.array(right)

    expected = by_hand()
    with pruning.pruned(lm, mask):
        changed = by_hand()
    options = {"shots": 0, "chat": False, "include_path": tmp_path / "tasks", "folder": tmp_path / "out"}
    row = utility.compare(lm, mask, ["harmlens_own"], **options).loc["harmlens_own"]
    assert (row.original, row.pruned, row.n) == (expected.mean(), changed.mean(), 4)
    assert row.original_se == pytest.approx(expected.std(ddof=1) / 2)
    assert row.difference_se == pytest.approx((changed - expected).std(ddof=1) / 2)
    assert lm.tokenizer.padding_side == "left" and not lm.model.training
    assert utility.compare(lm, mask, ["harmlens_own"], **{**options, "chat": True}).loc["mean"].n == 4
