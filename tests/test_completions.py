"""Answers come into a file as they are made, once each, and never into the repository."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from harmlens.judging import completions
from harmlens.keep import digests, files
from harmlens.models import forward
from harmlens.models.chats import Prompt
from harmlens.world import vale as world


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HARMLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def lm():
    return tiny.model()


def asked(n=6, prefill=None):
    items = world.items("evaluation")
    chats = [({"role": "user", "content": world.request(items[7 * i], i)},) for i in range(n)]
    return [Prompt(chat, prefill if i % 2 else None) for i, chat in enumerate(chats)]


def test_answers_are_those_of_generate(lm):
    prompts = asked()
    file = completions.complete(lm, prompts, max_new_tokens=5, batch_size=4)
    found = completions.completed(file)
    plain = forward.generate(lm, [p.render(lm) for p in prompts], max_new_tokens=5)
    assert [one.answer for one in found] == plain
    assert [one.request for one in found] == [p.messages[-1]["content"] for p in prompts]
    assert [one.index for one in found] == list(range(6))
    assert len({one.id for one in found}) == 6
    assert all(one.finished or one.n_tokens == 5 for one in found)


def test_a_prefilled_beginning_is_part_of_the_answer(lm):
    prompts = asked(4, prefill=world.PREFILL)
    found = completions.completed(completions.complete(lm, prompts, max_new_tokens=3))
    plain = forward.generate(lm, [p.render(lm) for p in prompts], max_new_tokens=3)
    assert [one.prefill for one in found] == ["", world.PREFILL] * 2
    assert found[1].answer == f"{world.PREFILL} {plain[1]}".strip()
    assert found[0].answer == plain[0]


def test_an_answer_that_ends_by_itself_is_told_from_one_that_is_cut(lm):
    end = lm.tokenizer.eos_token_id

    def only(token):
        def hook(module, inputs, output):
            output = torch.full_like(output, -9.0)
            output[..., token] = 9.0
            return output

        return lm.model.lm_head.register_forward_hook(hook)

    handle = only(end)
    ended = completions.completed(completions.complete(lm, asked(2), name="ended", max_new_tokens=4))
    handle.remove()
    handle = only(end + 20)
    cut = completions.completed(completions.complete(lm, asked(2), name="cut", max_new_tokens=4))
    handle.remove()
    assert [(one.finished, one.n_tokens, one.answer) for one in ended] == [(True, 1, "")] * 2
    assert [(one.finished, one.n_tokens) for one in cut] == [(False, 4)] * 2


def test_the_default_place_is_outside_the_repository_and_depends_on_what_is_done(lm, cache):
    file = completions.complete(lm, asked(2), max_new_tokens=2, name="plain")
    assert file.parent == cache.resolve() / "completions" / "tiny--llama"
    assert file.name.startswith("plain-")
    pruned = forward.clone(lm)
    with torch.no_grad():
        pruned.model.model.layers[0].mlp.down_proj.weight[0, 0] = 0
    others = [
        completions.complete(lm, asked(3), max_new_tokens=2, name="plain"),
        completions.complete(lm, asked(2), max_new_tokens=3, name="plain"),
        completions.complete(pruned, asked(2), max_new_tokens=2, name="plain"),
    ]
    assert len({file, *others}) == 4
    assert completions.complete(lm, asked(2), max_new_tokens=2, name="plain") == file


def test_provenance_stands_beside_the_file(lm, tmp_path):
    file = completions.complete(lm, asked(2), file=tmp_path / "a.jsonl", max_new_tokens=2)
    about = json.loads((tmp_path / "a.jsonl.meta.json").read_text())
    assert about["settings"]["max_new_tokens"] == 2
    assert about["provenance"]["lib_version"]
    assert about["provenance"]["model"]["id"] == "tiny/llama"
    assert str(tmp_path) not in (tmp_path / "a.jsonl.meta.json").read_text()
    assert file == (tmp_path / "a.jsonl").resolve()


def count_prompts(lm, monkeypatch, fail_after=None):
    """Count the prompts that are generated for; raise after so many batches."""
    generate, batches = lm.model.generate, []

    def counted(*args, **options):
        if fail_after is not None and len(batches) == fail_after:
            raise KeyboardInterrupt
        batches.append(len(options["input_ids"]))
        return generate(*args, **options)

    monkeypatch.setattr(lm.model, "generate", counted)
    return batches


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_interrupted_run_goes_on_where_it_stopped(lm, tmp_path, monkeypatch, temperature):
    options = {"max_new_tokens": 4, "batch_size": 2, "temperature": temperature, "progress": False}
    whole = completions.completed(completions.complete(lm, asked(), file=tmp_path / "whole.jsonl", **options))
    file = tmp_path / "part.jsonl"
    with monkeypatch.context() as patch:
        count_prompts(lm, patch, fail_after=2)
        with pytest.raises(KeyboardInterrupt):
            completions.complete(lm, asked(), file=file, **options)
    assert len(completions.completed(file)) == 4
    with monkeypatch.context() as patch:
        batches = count_prompts(lm, patch)
        completions.complete(lm, asked(), file=file, **options)
        assert batches == [2]
        completions.complete(lm, asked(), file=file, **options)
        assert batches == [2]
    assert completions.completed(file) == whole


def test_a_half_written_line_is_dropped_and_made_again(lm, tmp_path):
    file = completions.complete(lm, asked(4), file=tmp_path / "a.jsonl", max_new_tokens=3, batch_size=1)
    whole = file.read_bytes()
    file.write_bytes(whole[:-25])
    assert len(completions.completed(file)) == 3
    completions.complete(lm, asked(4), file=file, max_new_tokens=3, batch_size=1)
    assert file.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_named(lm, tmp_path):
    file = completions.complete(lm, asked(3), file=tmp_path / "a.jsonl", max_new_tokens=2)
    rows = file.read_text().splitlines()
    file.write_text("\n".join([rows[0], rows[1][:-9], rows[2], ""]))
    with pytest.raises(ValueError, match=r"line 2 of 'a.jsonl' is damaged .*Remove that line"):
        completions.completed(file)


def test_settings_are_not_mixed(lm, tmp_path):
    file = completions.complete(lm, asked(2), file=tmp_path / "a.jsonl", max_new_tokens=2)
    with pytest.raises(ValueError, match=r"other settings: max_new_tokens was 2, now 3\. Give another file"):
        completions.complete(lm, asked(2), file=file, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"weights was"):
        completions.complete(tiny.model(seed=1), asked(2), file=file, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"answers to 1 prompt\(s\) that are not among these"):
        completions.complete(lm, asked(2)[1:], file=file, max_new_tokens=2)
    (tmp_path / "a.jsonl.meta.json").unlink()
    with pytest.raises(ValueError, match=r"no readable 'a.jsonl.meta.json'"):
        completions.complete(lm, asked(2), file=file, max_new_tokens=2)


def test_more_prompts_may_be_added(lm, tmp_path, monkeypatch):
    file = completions.complete(lm, asked(2), file=tmp_path / "a.jsonl", max_new_tokens=2)
    batches = count_prompts(lm, monkeypatch)
    completions.complete(lm, asked(5), file=file, max_new_tokens=2)
    assert sum(batches) == 3
    assert len(completions.completed(file)) == 5


def test_the_same_prompt_twice_is_two_answers(lm):
    prompts = asked(1) * 4
    file = completions.complete(lm, prompts, max_new_tokens=8, temperature=1.0, batch_size=2)
    found = completions.completed(file)
    assert len({one.id for one in found}) == 4
    assert len({one.answer for one in found}) > 2  # no batch repeats the draws of another


@pytest.mark.parametrize("where", ["answers.jsonl", "data/answers.jsonl", "notebooks/../book/answers.jsonl"])
def test_no_file_inside_the_repository(lm, root, where):
    with pytest.raises(ValueError, match=r"lies inside the repository.*Leave file= out"):
        completions.complete(lm, asked(1), file=root / where)
    assert not (root / where).exists()


def test_the_cache_may_not_lie_in_the_repository_either(lm, root, monkeypatch):
    monkeypatch.setenv("HARMLENS_CACHE", str(root / "data"))
    with pytest.raises(ValueError, match=r"lies inside the repository"):
        completions.complete(lm, asked(1))


def test_the_build_folder_is_no_part_of_the_repository(root, monkeypatch):
    monkeypatch.delenv("HARMLENS_BUILD", raising=False)
    inside = files.build_dir() / "answers.jsonl"
    assert inside.is_relative_to(root)
    assert completions.outside_repository(inside) == inside


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, r"prompts is empty"),
        ({"temperature": -1}, r"temperature=-1 must be 0"),
        ({"max_new_tokens": 0}, r"max_new_tokens=0 must be at least 1"),
        ({"batch_size": 0}, r"batch_size=0 must be at least 1"),
    ],
)
def test_bad_input(lm, change, message):
    options = {"prompts": asked(2), "max_new_tokens": 4, **change}
    with pytest.raises(ValueError, match=message):
        completions.complete(lm, options.pop("prompts"), **options)


# --------------------------------------------------------------------------- memory


def test_out_of_memory_halves_the_batch_and_loses_nothing(lm, tmp_path, monkeypatch):
    generate, tried = lm.model.generate, []

    def small(*args, **options):
        tried.append(len(options["input_ids"]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("no more")
        return generate(*args, **options)

    plain = completions.completed(completions.complete(lm, asked(), max_new_tokens=3, name="plain"))
    monkeypatch.setattr(lm.model, "generate", small)
    found = completions.completed(
        completions.complete(lm, asked(), file=tmp_path / "a.jsonl", max_new_tokens=3)
    )
    assert found == plain
    assert tried == [6, 3, 2, 1, 2, 1]


def test_adaptive_keeps_to_the_smaller_size():
    sizes = []

    def run(index):
        sizes.append(len(index))
        if len(index) > 3:
            raise torch.OutOfMemoryError
        return [10 * i for i in index]

    batches = [list(range(8)), [], list(range(8, 16)), [16]]
    found = [
        pair
        for index, values in completions.adaptive(batches, run)
        for pair in zip(index, values, strict=True)
    ]
    assert found == [(i, 10 * i) for i in range(17)]
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 1]


def test_when_not_even_one_fits_the_remedy_is_named():
    def run(index):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError, match=r"one text at a time does not fit.*smaller model"):
        list(completions.adaptive([[0, 1, 2]], run))


def test_other_errors_are_not_swallowed():
    def run(index):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match=r"something else"):
        list(completions.adaptive([[0, 1]], run))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_sees_any_change_of_the_weights(lm, dtype):
    copy = forward.clone(lm)
    copy.model.to(dtype)
    first = digests.digest(copy)
    assert digests.digest(copy) == first
    weight = copy.model.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]]  # the same numbers elsewhere
    swapped = digests.digest(copy)
    with torch.no_grad():
        weight[3, 5] = 0
    assert len({first, swapped, digests.digest(copy)}) == 3


# --------------------------------------------------------------------------- reading and showing


def test_texts_are_shown_on_request_only(lm, capsys):
    one = completions.Completion("x", 0, "a question", "0", "", "an answer of words", 5, True)
    completions.show([one] * 5)
    shown = capsys.readouterr().out
    assert shown.count("x: 4 words, 5 tokens, ended by itself") == 3
    assert "an answer" not in shown and "a question" not in shown
    assert "reveal=True" in shown
    completions.show([one], reveal=True)
    assert "answer: an answer of words" in capsys.readouterr().out


def test_a_file_of_something_else_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file 'none.jsonl'; make it with completions.complete"):
        completions.completed(tmp_path / "none.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "x", "index": 0}\n')
    with pytest.raises(ValueError, match=r"line 1 of 'other.jsonl' is no completion: it lacks request"):
        completions.completed(other)
