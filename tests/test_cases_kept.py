"""What is kept never comes back for another model, and no file mixes what two runs wrote."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import time

import pytest
import tiny
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from harmlens.evidence import results
from harmlens.evidence.stats import Estimate
from harmlens.flow import directions, interventions
from harmlens.judging import completions, graders
from harmlens.keep import digests, remember
from harmlens.keep.files import data_dir
from harmlens.models import forward
from harmlens.models import loading as models
from harmlens.models.chats import Prompt
from harmlens.models.forward import Row
from harmlens.weights import attribution
from harmlens.world import vale as world

ANSWERS = {"max_new_tokens": 4, "progress": False}


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    for name in ("CACHE", "BUILD", "RESULTS"):
        monkeypatch.setenv(f"HARMLENS_{name}", str(tmp_path / name.lower()))


@pytest.fixture
def lm():
    return tiny.model()


def asked(n=3):
    items = world.items("evaluation")
    return [Prompt(({"role": "user", "content": world.request(items[7 * i], i)},)) for i in range(n)]


def vector(seed=0):
    return torch.randn(32, generator=torch.Generator().manual_seed(seed)) * 4


# --------------------------------------------------------------------------- one digest of a model


def by_hand(lm, kind, where, function, **options):
    module = lm.model.get_submodule(where)
    return getattr(module, f"register_{kind}")(function, **options)


class Steerer:
    def __init__(self, dose):
        self.dose = dose

    def __call__(self, module, args, output):
        return output * self.dose

    def method(self, module, args, output):
        return output * self.dose


def double(module, args, output):
    return output * FACTOR


FACTOR = 2.0


def closure(dose):
    return lambda module, args, output: output + dose


def with_default(module, args, output, dose=3.0):
    return output * dose


def wrapped_forward(module, dose):
    true = module.forward
    module.forward = lambda *args, **options: true(*args, **options) * dose


class Doubled(nn.Module):
    def __init__(self, inner, dose):
        super().__init__()
        self.inner, self.dose = inner, dose

    def forward(self, *args, **options):
        return self.inner(*args, **options) * self.dose


def adapter(lm):
    config = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(config, lm.model)


def rotate(lm):
    lm.model.model.rotary_emb.inv_freq.mul_(0.5)


def columns(lm):
    weight = lm.model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data[:, torch.randperm(32, generator=torch.Generator().manual_seed(0))]


def shuffle(lm):
    weight = lm.model.model.layers[1].mlp.down_proj.weight.data
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(0))
    weight.copy_(weight.flatten()[order].view_as(weight))


MLP = "model.layers.1.mlp"
# Every one makes another model of it, in place.
CHANGES = {
    "a weight": lambda lm: lm.model.model.norm.weight.data[3:4].add_(1e-3),
    "shuffled weights": shuffle,
    "permuted columns": columns,
    "half precision": lambda lm: lm.model.to(torch.bfloat16),
    "a buffer that isn't saved": rotate,
    "rope": lambda lm: lm.model.config.rope_parameters.update(rope_theta=5e5),
    "norm": lambda lm: setattr(lm.model.config, "rms_norm_eps", 0.1),
    "a setting of a module": lambda lm: setattr(lm.model.model.layers[0].self_attn, "scaling", 0.1),
    "end marks": lambda lm: setattr(lm.model.generation_config, "eos_token_id", [1, 7]),
    "template": lambda lm: setattr(lm.tokenizer, "chat_template", "{{ messages[0].content }}"),
    "added tokens": lambda lm: lm.tokenizer.add_tokens(["<new>"]),
    "dropout": lambda lm: lm.model.train(),
    "an adapter": adapter,
    "hook with a closure": lambda lm: by_hand(lm, "forward_hook", MLP, closure(1.0)),
    "hook with another closure": lambda lm: by_hand(lm, "forward_hook", MLP, closure(2.0)),
    "hook elsewhere": lambda lm: by_hand(lm, "forward_hook", "model.layers.0.mlp", closure(2.0)),
    "hook with a tensor": lambda lm: by_hand(lm, "forward_hook", MLP, closure(torch.ones(32))),
    "hook with a global": lambda lm: by_hand(lm, "forward_hook", MLP, double),
    "hook with a default": lambda lm: by_hand(lm, "forward_hook", MLP, with_default),
    "partial": lambda lm: by_hand(lm, "forward_hook", MLP, functools.partial(with_default, dose=4.0)),
    "an object as hook": lambda lm: by_hand(lm, "forward_hook", MLP, Steerer(2.0)),
    "another object": lambda lm: by_hand(lm, "forward_hook", MLP, Steerer(3.0)),
    "a method as hook": lambda lm: by_hand(lm, "forward_hook", MLP, Steerer(2.0).method),
    "pre-hook": lambda lm: by_hand(lm, "forward_pre_hook", MLP, lambda m, args: (args[0] * 2,)),
    "another pre-hook": lambda lm: by_hand(lm, "forward_pre_hook", MLP, lambda m, args: (args[0] * 3,)),
    "a forward of its own": lambda lm: wrapped_forward(lm.model.get_submodule(MLP), 2.0),
    "another forward": lambda lm: wrapped_forward(lm.model.get_submodule(MLP), 3.0),
    "a module around a module": lambda lm: lm.model.set_submodule(
        MLP, Doubled(lm.model.get_submodule(MLP), 2.0)
    ),
}


def test_h13_every_change_of_what_a_model_does_changes_its_digest():
    found = {"nothing": digests.digest(tiny.model())}
    for name, change in CHANGES.items():
        lm = tiny.model()
        with torch.no_grad():
            change(lm)
        found[name] = digests.digest(lm)
        assert digests.digest(lm) == found[name], name
    assert len(set(found.values())) == len(found), "two of them are taken for one"


def test_h13_an_adapter_that_is_switched_off_is_another_model(lm):
    adapter(lm)
    on = digests.digest(lm)
    for module in lm.model.modules():
        if hasattr(module, "lora_A"):
            module.enable_adapters(False)
    assert digests.digest(lm) != on


def test_a_hook_on_all_modules_counts(lm):
    plain = digests.digest(lm)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert digests.digest(lm) != plain
    finally:
        handle.remove()
    assert digests.digest(lm) == plain


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_use_loading_and_copies_leave_the_digest_alone(architecture, tmp_path):
    lm = tiny.model(architecture)
    before = digests.model_state(lm)
    forward.generate(lm, ["hello there", "a"], max_new_tokens=3)
    lm.model(torch.tensor([[1, 2, 3]]), output_hidden_states=True, output_attentions=True)
    lm.model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    lm.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    lm.model.train().eval()
    with directions.ablated(lm, vector()):
        pass
    assert digests.model_state(lm) == before
    assert digests.model_state(forward.clone(lm)) == before
    for name in ("one", "two"):
        lm.model.save_pretrained(tmp_path / name)
        lm.tokenizer.save_pretrained(tmp_path / name)
    one, two = (models.load(str(tmp_path / name)) for name in ("one", "two"))
    assert digests.digest(one) == digests.digest(two)
    assert digests.model_state(one)["weights"] == before["weights"]


def test_h1_a_hook_that_cannot_be_told_is_refused_with_the_remedy(lm, tmp_path):
    holds = object()
    hook = lambda module, args, output: output if holds else None  # noqa: E731
    handle = by_hand(lm, "forward_hook", MLP, hook)
    for kept in (
        lambda: completions.complete(lm, asked(), **ANSWERS),
        lambda: attribution.prune_score(lm, rows(), folder=tmp_path / "scores"),
        lambda: remember("count", functools.partial(count, lm)),
    ):
        with pytest.raises(
            TypeError, match=r"hook stands on model.layers.1.mlp.*Remove the hook, or say.*depends_on"
        ):
            kept()
    hook.depends_on = "nothing, dose 1"
    named = digests.digest(lm)
    hook.depends_on = "nothing, dose 2"
    assert digests.digest(lm) != named
    handle.remove()


# --------------------------------------------------------------------------- steering, and everything kept


def count(lm):
    return forward.last_logits(lm, ["hello"])[0, :5].numpy()


def rows():
    ids = [[2, 9, 11, 40, 7, 8], [2, 30, 31, 5, 9, 3, 8]]
    return [Row(some, [i > 2 for i in range(len(some))]) for some in ids]


def steered(lm):
    """Context managers that change what a model does, not its weights."""
    return {
        "ablated": lambda: directions.ablated(lm, vector()),
        "ablated elsewhere": lambda: directions.ablated(lm, vector(1)),
        "added": lambda: directions.added(lm, directions.Direction(vector(), 1)),
        "added twice": lambda: directions.added(lm, directions.Direction(vector(), 1), dose=2.0),
        "scaled": lambda: interventions.overwriting(
            lm, {0: range(64)}, interventions.scale(0.0), where="both"
        ),
        "scaled less": lambda: interventions.overwriting(
            lm, {0: range(64)}, interventions.scale(0.5), where="both"
        ),
        "in answers": lambda: interventions.overwriting(
            lm, {0: range(64)}, interventions.scale(0.0), where="prompt"
        ),
    }


def test_h1_a_steered_model_gets_its_own_answers(lm):
    plain = completions.complete(lm, asked(), **ANSWERS)
    files = {"plain": plain}
    for name, within in steered(lm).items():
        with within():
            files[name] = completions.complete(lm, asked(), **ANSWERS)
            direct = forward.generate(lm, [p.render(lm) for p in asked()], max_new_tokens=4)
            assert [one.answer for one in completions.completed(files[name])] == direct
            assert completions.complete(lm, asked(), **ANSWERS) == files[name], "asked twice"
            with pytest.raises(ValueError, match=r"other settings: hooks was"):
                completions.complete(lm, asked(), file=plain, **ANSWERS)
    assert len(set(files.values())) == len(files)
    assert completions.complete(lm, asked(), **ANSWERS) == plain


def test_h1_runs_and_scores_of_a_steered_model_are_its_own(lm, tmp_path):
    plain = remember(lm, functools.partial(count, lm))
    with directions.added(lm, directions.Direction(vector(), 1)):
        found = remember(lm, functools.partial(count, lm))
        assert abs(found - plain).max() > 1e-3 and (found == count(lm)).all()
        steered = attribution.prune_score(lm, rows(), folder=tmp_path)
    for name, value in attribution.prune_score(lm, rows(), folder=tmp_path).values.items():
        assert not torch.equal(value, steered.values[name])


def test_h13_shuffled_weights_are_scored_anew(lm, tmp_path):
    scored = attribution.prune_score(lm, rows(), folder=tmp_path)
    for change in (shuffle, columns):
        changed = tiny.model()
        change(changed)
        found, fresh = (attribution.prune_score(changed, rows(), folder=f) for f in (tmp_path, None))
        for name, value in fresh.values.items():
            assert torch.equal(found.values[name], value)
        assert any(not torch.equal(found.values[name], value) for name, value in scored.values.items())


# --------------------------------------------------------------------------- files: order, processes, crashes


def test_h10_answers_come_in_the_order_of_the_last_call(lm, tmp_path):
    a, b, g = asked(3)
    file = tmp_path / "answers.jsonl"
    for some in ([a, b], [g, a, b], [b, g, a]):
        completions.complete(lm, some, file=file, **ANSWERS)
        found = completions.completed(file)
        assert [one.request for one in found] == [p.messages[-1]["content"] for p in some]
        assert [one.index for one in found] == list(range(len(some)))
        assert [one.answer for one in found] == forward.generate(
            lm, [p.render(lm) for p in some], max_new_tokens=4
        )


def test_h11_an_answer_that_is_there_twice_is_read_once(lm, tmp_path):
    file = completions.complete(lm, asked(), file=tmp_path / "answers.jsonl", **ANSWERS)
    once, text = completions.completed(file), file.read_text()
    file.write_text(text + text)
    assert completions.completed(file) == once
    completions.complete(lm, asked(), file=file, **ANSWERS)
    assert completions.completed(file) == once


def test_h11_files_that_were_put_together_are_refused(lm, tmp_path):
    one = completions.complete(lm, asked(), file=tmp_path / "one.jsonl", **ANSWERS)
    other = completions.complete(tiny.model(seed=1), asked(), file=tmp_path / "other.jsonl", **ANSWERS)
    more = completions.complete(lm, asked(5)[3:], file=tmp_path / "more.jsonl", **ANSWERS)
    for second, message in (
        (other, "line 4 of 'both.jsonl' is a second answer"),
        (more, "two answers in one place"),
    ):
        both = tmp_path / "both.jsonl"
        both.write_text(one.read_text() + second.read_text())
        with pytest.raises(ValueError, match=message):
            completions.completed(both)


def process(function):
    """Another process, which begins as a copy of this one."""

    def run():
        torch.set_num_threads(1)  # threads do not survive the copying
        function()

    return multiprocessing.get_context("fork").Process(target=run)


def test_h11_two_processes_on_one_file_answer_and_grade_once(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(completions, "AT_ONCE", 2)
    file, start = tmp_path / "a.jsonl", multiprocessing.get_context("fork").Barrier(2)

    def slow(requests, answers):
        time.sleep(0.05)
        return [0.5] * len(answers)

    def both():
        start.wait(60)
        completions.complete(lm, asked(24), file=file, batch_size=2, **ANSWERS)
        start.wait(60)
        graders.grade_file(file, graders.Grader("slow", slow, dict))

    running = [process(both), process(both)]
    for one in running:
        one.start()
    for one in running:
        one.join(60)
        assert one.exitcode == 0
    assert len(file.read_text().splitlines()) == 24
    found = completions.completed(file)
    assert [one.request for one in found] == [p.messages[-1]["content"] for p in asked(24)]
    direct = forward.generate(lm, [p.render(lm) for p in asked(24)], max_new_tokens=4)
    assert [one.answer for one in found] == direct
    (grades,) = tmp_path.glob("*.grades.jsonl")
    assert len(grades.read_text().splitlines()) == 24 == len(graders.read_grades(grades))


def test_h11_a_killed_process_leaves_what_it_had_and_holds_nobody_up(lm, tmp_path):
    file, killed = tmp_path / "a.jsonl", []

    def hook(module, args, output):
        if killed and file.is_file() and len(file.read_text().splitlines()) == 3:
            with file.open("a") as out:
                out.write('{"id": "half a l')
            os._exit(9)

    def dies():
        killed.append(True)
        completions.complete(lm, asked(6), file=file, batch_size=1, **ANSWERS)

    hook.depends_on = "nothing"
    lm.model.register_forward_hook(hook)
    one = process(dies)
    one.start()
    one.join(60)
    assert one.exitcode == 9
    before = completions.completed(file)
    assert len(before) == 3
    completions.complete(lm, asked(6), file=file, batch_size=1, **ANSWERS)
    found = completions.completed(file)
    assert len(found) == 6 and all(answer in found for answer in before)


def test_h11_grades_of_answers_that_came_back_are_theirs(lm, tmp_path):
    """Answers made anew, and later the first ones again: each is read with its own grade."""
    by_words = graders.Grader("words", lambda r, answers: [len(a) % 7 / 7 for a in answers], dict)
    made = [
        completions.complete(tiny.model(seed=s), asked(), file=tmp_path / f"{s}.jsonl", **ANSWERS)
        for s in (0, 1)
    ]
    file = tmp_path / "a.jsonl"
    for one in (*made, made[0]):
        file.write_text(one.read_text())
        grades = graders.read_grades(graders.grade_file(file, by_words))
        for answer in completions.completed(file):
            assert grades[answer.id] == by_words([answer.request], [answer.answer])[0]


@pytest.mark.parametrize(
    "kept",
    [
        lambda lm: completions.complete(lm, asked(), **ANSWERS),
        lambda lm: remember(lm, functools.partial(count, lm)),
        lambda lm: results.record("V4", **good()),
    ],
)
def test_a_folder_that_takes_no_files_is_named_with_the_remedy(lm, tmp_path, monkeypatch, kept):
    (tmp_path / "file").touch()
    for name in ("CACHE", "BUILD", "RESULTS"):
        monkeypatch.setenv(f"HARMLENS_{name}", str(tmp_path / "file" / "below"))
    with pytest.raises(PermissionError, match=r"nothing can be written in .*HARMLENS_CACHE .*HARMLENS_BUILD"):
        kept(lm)


# --------------------------------------------------------------------------- results


def good(value=0.4, low=0.3, high=0.5, **changes):
    return {"effect": Estimate(value, low, high, 108), "model": "organism/sft", **changes}


def other(value, **changes):
    return good(value, value, value, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two folders of one name with different models in them."""
    home = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        folder = home / f"run{seed}" / "final"
        lm = tiny.model(seed=seed)
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
    return [home / f"run{seed}" / "final" for seed in (1, 2)]


def test_h21_two_folders_of_one_name_are_two_models(runs):
    paths = [
        results.record("V4", **other(v, model=str(folder)))
        for v, folder in zip((0.2, 0.9), runs, strict=True)
    ]
    assert paths[0] != paths[1] and all(path.is_file() for path in paths)
    for value, folder in zip((0.2, 0.9), runs, strict=True):
        (row,) = [row for row in results.scorecard(model=str(folder)) if row["id"] == "V4"]
        assert row["value"] == value and row["model"].startswith("final@")
        assert (
            str(folder.parent)
            not in (results.results_dir() / f"final-{row['model'][6:]}" / "run-0" / "V4.json").read_text()
        )
    again = results.record("V4", **other(0.3, model=str(runs[0])))  # the same weights, measured again
    assert again == paths[0] and len(list(again.parent.iterdir())) == 1


def test_h21_a_folder_trained_anew_is_another_model(runs, tmp_path):
    folder = tmp_path / "final"
    shutil.copytree(runs[0], folder)
    first = results.record("V4", **other(0.2, model=str(folder)))
    shutil.copytree(runs[1], folder, dirs_exist_ok=True)
    assert results.record("V4", **other(0.9, model=str(folder))) != first
    assert {one.effect.value for one in results.load_measurements([results.results_dir()])} == {0.2, 0.9}


def test_h21_a_result_of_other_weights_is_put_aside_and_named():
    path = results.record("V4", **other(0.2, model="owner/model", revision="a" * 40))
    with pytest.warns(
        results.ResultFileWarning, match=r"measured on other weights; it is kept as 'V4.json.aaaaaaaa'"
    ):
        assert results.record("V4", **other(0.9, model="owner/model", revision="b" * 40)) == path
    kept = json.loads(path.with_name("V4.json.aaaaaaaa").read_text())
    assert kept["effect"]["value"] == 0.2
    (one,) = results.load_measurements([results.results_dir()])
    assert one.effect.value == 0.9


MET = {"exact harmful answers before": 0.9}
EDITS = {
    "effect": lambda c: c | {"effect": {"value": 0.9, "low": 0.85, "high": 0.95}},
    "one number": lambda c: c | {"effect": c["effect"] | {"value": 0.45}},
    "control": lambda c: c | {"control": {"name": "chance", "value": 0.0, "low": 0.0, "high": 0.0}},
    "n": lambda c: c | {"n": 1080},
    "run": lambda c: c | {"run": 1},
    "model": lambda c: c | {"model": "organism/dpo"},
    "note": lambda c: c | {"note": "on 1080 requests"},
}


@pytest.mark.parametrize("edit", EDITS)
def test_h32_an_edited_result_is_left_out_with_a_warning(edit):
    path = results.record("V4", **good())
    path.write_text(json.dumps(EDITS[edit](json.loads(path.read_text()))))
    with pytest.warns(
        results.ResultFileWarning,
        match=r"organism--sft/run-0/V4.json left out: was changed.*Run its notebook again",
    ):
        assert results.load_measurements([results.results_dir()]) == []


@pytest.mark.parametrize(
    ("claim", "changes", "message"),
    [
        ("V4", other(20.0), r"effect: 20 is no share, in 0 to 1. Is it in percent\?"),
        ("V4", {"control": ("chance", Estimate(20.0, 20.0, 20.0, 3))}, r"control: 20 is no share"),
        ("V4", other(-0.1), "no share"),
        ("C1", other(-1.5), "no difference of shares, in -1 to 1"),
        ("R1a", other(1.2, values=MET), "no relative drop"),
        ("R3b", other(1.2), "no Jaccard index"),
    ],
)
def test_h32_what_cannot_be_is_not_recorded(claim, changes, message):
    with pytest.raises(ValueError, match=message):
        results.record(claim, **good() | changes)
    assert not list(results.results_dir().rglob("*.json"))


def test_h32_shipped_results_and_unbounded_scales_are_taken():
    results.record("V5", **other(6.4, model="some/model"))
    results.record("R1a", **other(-3.0, model="some/model", values=MET))  # more than before
    found = results.load_measurements()
    assert len(found) == 2 + len(list((data_dir() / "results").rglob("*.json")))


@pytest.mark.parametrize("line", ["    reason: again\n", "    rule: {threshold: 0.9, threshold: 0.1}\n"])
def test_h32_a_key_given_twice_in_the_registry_is_refused(tmp_path, line):
    file = tmp_path / "claims.yaml"
    whole = (data_dir() / "claims.yaml").read_text().partition("\n# What was changed")[0]
    file.write_text(whole)
    assert results.load_claims(file)
    file.write_text(whole.rstrip("\n") + "\n" + line)
    with pytest.raises(ValueError, match=r"claims.yaml.*key '(reason|threshold)' is given twice"):
        results.load_claims(file)
