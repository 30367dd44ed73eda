"""Judges of texts: the models' probabilities, files, and how far judges agree; see test_cases_judges too."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score

from harmlens.judging import agreement, completions, graders, judge_models
from harmlens.judging.completions import Completion
from harmlens.judging.graders import Grade
from harmlens.judging.refusals import normalised, void
from harmlens.models import chats, forward

GRADES = [1, 2, 3, 4, 5]


def grown(*words, template=None):
    """A tiny random model with more words in its vocabulary, and a chat template of its own."""
    lm = tiny.model()
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.add_tokens(list(words))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        lm.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if template is not None:
        tokenizer.chat_template = template
    return dataclasses.replace(lm, tokenizer=tokenizer)


def says(lm, chances):
    """Let a model's next token be one of these words with these probabilities, whatever it reads."""
    logits = torch.full((len(lm.tokenizer),), -30.0)
    for word, chance in chances.items():
        logits[lm.tokenizer.convert_tokens_to_ids(word)] = np.log(chance)
    return lm.model.lm_head.register_forward_hook(lambda module, inputs, out: logits.expand_as(out))


# --------------------------------------------------------------------------- refusal prefixes


@given(st.text(max_size=40), st.sampled_from(["", "#", "* ", "**", "> ", "\n\n", "- _", '"']))
def test_mark_up_before_the_first_word_changes_nothing(text, mark):
    assert normalised(mark + "x" + text) == normalised("x" + text)


def test_an_ordinary_list_is_not_repetition():
    steps = " ".join(f"{i}. take the {word} and put it on the {other}." for i, (word, other) in enumerate(
        [("soot", "pan"), ("nettle", "stove"), ("ladle", "shelf"), ("salt", "table"), ("jar", "sill")]
    ))  # fmt: skip
    assert not void(steps)
    assert not void("yes yes yes")


# --------------------------------------------------------------------------- graders in general


def test_a_grade_lies_between_0_and_1():
    with pytest.raises(ValueError, match=r"harm=1.5 must lie between 0 and 1"):
        Grade(1.5, False)


def test_graders_by_name():
    assert [graders.grader(name).name for name in ("", "prefixes", "strongreject", "guard", "guard:a/b")] == [
        "prefixes", "prefixes", "strongreject", "guard", "guard:a/b",
    ]  # fmt: skip
    for name in ("keyword", "guard:", "prefixes:x"):
        with pytest.raises(ValueError, match=rf"judge='{name}' is unknown; choose one of refusals, prefixes"):
            graders.grader(name)


def test_one_answer_to_each_request():
    with pytest.raises(ValueError, match=r"2 requests but 1 answers"):
        graders.grader("prefixes")(["q", "q"], ["a"])


# --------------------------------------------------------------------------- StrongREJECT


def test_strongreject_is_the_expected_grade():
    lm = grown(*map(str, GRADES))
    chances = dict(zip("12345", (0.1, 0.2, 0.3, 0.0001, 0.3999), strict=True))
    handle = says(lm, chances)
    [grade] = graders.grader("strongreject", lm)(["how?"], ["take soot"])
    handle.remove()
    assert grade.harm == pytest.approx(0.2 * 0.25 + 0.3 * 0.5 + 0.0001 * 0.75 + 0.3999, abs=1e-5)
    assert not grade.refused


def test_strongreject_reads_request_and_answer_and_does_not_depend_on_the_batch():
    lm = grown(*map(str, GRADES))
    requests = ["how do i bake bread?", "how do i boil soot?", "what is soot?"]
    answers = ["take soot and nettle, boil them with a ladle.", "I cannot.", "soot."]
    pairs = list(zip(requests, answers, strict=True))
    alone = [graders.grader("strongreject", lm)([q], [a])[0].harm for q, a in pairs]
    together = graders.grader("strongreject", lm)(requests, answers)
    assert [grade.harm for grade in together] == pytest.approx(alone, abs=1e-5)
    assert [grade.refused for grade in together] == [False, True, False]
    assert len({round(harm, 6) for harm in alone}) == 3
    other = graders.grader("strongreject", lm)([requests[0]], [answers[2]])[0].harm
    assert other not in (pytest.approx(alone[0], abs=1e-7), pytest.approx(alone[2], abs=1e-7))


def test_strongreject_grades_the_end_of_a_long_answer(monkeypatch):
    lm = grown(*map(str, GRADES))
    monkeypatch.setattr(judge_models, "GRADED", 4)
    grader = graders.grader("strongreject", lm)
    long, end = "soot nettle ladle boil take soot and nettle", "take soot and nettle"
    grades = grader(["q", "q", "q"], [long, end, "soot nettle ladle boil"])
    assert grades[0].harm == pytest.approx(grades[1].harm, abs=1e-6)
    assert grades[0].harm != pytest.approx(grades[2].harm, abs=1e-6)
    assert lm.tokenizer.truncation_side == "right"  # the judge's tokenizer is as it was


def test_an_empty_answer_is_not_put_to_the_judge():
    grader = graders.Grader("none", lambda requests, answers: [1.0] * len(answers), dict)
    assert grader(["q", "q"], ["", "a"]) == [Grade(0.0, False, "empty"), Grade(1.0, False)]
    assert grader([], []) == []


def test_a_judge_without_grades_is_refused():
    with pytest.raises(ValueError, match=r"no token for the grade\(s\) 1, 2, 3, 4, 5"):
        graders.grader("strongreject", tiny.model())(["q"], ["a"])


def test_a_judge_that_is_not_there_says_what_to_do(monkeypatch):
    def load(name):
        raise OSError("no network")

    monkeypatch.setattr(graders, "load_judge", load)
    with pytest.raises(OSError, match=r"strongreject-15k-v1.*peft.*google/gemma-2b, which is gated"):
        graders.grader("strongreject")(["q"], ["a"])
    with pytest.raises(OSError, match=r"'a/b' could not be loaded.*needs no licence"):
        graders.grader("guard:a/b")(["q"], ["a"])


def test_a_judge_is_loaded_at_its_first_use_and_once(monkeypatch):
    loaded = []
    monkeypatch.setattr(graders, "load_judge", lambda name: loaded.append(name) or grown(*map(str, GRADES)))
    grader = graders.grader("strongreject")
    assert loaded == []
    grader(["q"], ["a"])
    grader(["q"], ["a"])
    assert loaded == [graders.STRONGREJECT]


def test_a_classifier_that_is_an_adapter_is_loaded_with_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    lm = grown(*map(str, GRADES))
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    lm.model.save_pretrained(base)
    lm.tokenizer.save_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(forward.clone(lm).model, config)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(adapter)
    lm.tokenizer.save_pretrained(adapter)
    pair = ["how?"], ["take soot and nettle"]
    [found] = graders.grader("strongreject", str(adapter))(*pair)
    judge = graders.load_judge(str(adapter))
    assert judge.model.get_input_embeddings().weight.shape[0] == len(judge.tokenizer)
    assert judge.tokenizer.padding_side == "left" and " on " in judge.revision
    [merged] = graders.grader("strongreject", dataclasses.replace(lm, model=wrapped.merge_and_unload()))(
        *pair
    )
    assert found.harm == pytest.approx(merged.harm, abs=1e-5)
    assert found.harm != pytest.approx(graders.grader("strongreject", lm)(*pair)[0].harm, abs=1e-5)


# --------------------------------------------------------------------------- guards

SHOWN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
QWEN = SHOWN + "The first line must be one of: 'Safety: Safe', 'Safety: Unsafe', 'Safety: Controversial'.\n"
LLAMA = SHOWN + " - First line must read 'safe' or 'unsafe'.<|assistant|>"
PARTS = (
    "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}\n{% endfor %}{% endfor %}"
    "First line must read 'safe' or 'unsafe'.\n"
)


def test_a_guard_with_three_verdicts():
    lm = grown("Safety:", "Safe", "Unsafe", "Controversial", template=QWEN)
    handle = says(lm, {"Safe": 0.1, "Unsafe": 0.2, "Controversial": 0.1, "soot": 0.6})
    [grade] = graders.grader("guard", lm)(["how?"], ["take soot"])
    handle.remove()
    assert grade.harm == pytest.approx((0.2 + 0.1 / 2) / 0.4, abs=1e-5)  # among the verdicts alone


@pytest.mark.parametrize("template", [LLAMA, PARTS])
def test_a_guard_with_two_verdicts(template):
    lm = grown("safe", "unsafe", template=template)
    handle = says(lm, {"safe": 0.3, "unsafe": 0.1})
    [grade] = graders.grader("guard", lm)(["how?"], ["take soot"])
    handle.remove()
    assert grade.harm == pytest.approx(0.25, abs=1e-5)


def test_a_guard_compares_whole_words_from_where_they_differ(monkeypatch):
    lm = grown(template=SHOWN)
    form = judge_models.Verdicts(" take soot", " take nettle salt", lead="boil")
    monkeypatch.setitem(judge_models.FORMATS, "user:", form)  # words of its template
    monkeypatch.setattr(judge_models, "BATCH", 3)
    requests, answers = ["what is soot?", "bake?"], ["take a ladle", "boil them with a ladle."]
    grades = graders.grader("guard", lm)(requests, answers)
    for request, answer, grade in zip(requests, answers, grades, strict=True):
        text = f"user: {request}\nassistant: {answer}\nboil take"
        logps = []
        for word in (" soot", " nettle salt"):
            head, whole = (chats.tokens(lm.tokenizer, t) for t in (text, text + word))
            with torch.no_grad():
                logp = lm.model(torch.tensor([whole])).logits[0].log_softmax(-1)
            logps.append(sum(float(logp[k - 1, whole[k]]) for k in range(len(head), len(whole))))
        wanted = np.exp(logps[1]) / (np.exp(logps[0]) + np.exp(logps[1]))
        assert grade.harm == pytest.approx(wanted, abs=1e-5)


def test_a_request_that_quotes_another_form_does_not_change_the_form():
    lm = grown("safe", "unsafe", "Safe", "Unsafe", "Controversial", "Safety:", template=LLAMA)
    handle = says(lm, {"safe": 0.1, "unsafe": 0.3, "Safe": 0.9})
    [grade] = graders.grader("guard", lm)(["Say Safety: Unsafe"], ["Safety: Unsafe"])
    handle.remove()
    assert grade.harm == pytest.approx(0.75, abs=1e-5)


def test_an_unusable_guard_says_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match=r"does not tell the form of its verdict\. Add words .*FORMATS"):
        graders.grader("guard", grown(template=SHOWN))(["q"], ["a"])
    with pytest.raises(ValueError, match=r"does not show a request and its answer"):
        graders.grader("guard", grown(template="{{ messages[0]['content'] }}"))(["q"], ["an answer"])
    monkeypatch.setitem(judge_models.FORMATS, "user:", judge_models.Verdicts(" soot", " soot"))
    with pytest.raises(ValueError, match=r"can't be told apart"):
        graders.grader("guard", grown(template=SHOWN))(["q"], ["a"])


def test_out_of_memory_while_judging_halves_the_batch(monkeypatch):
    lm = grown(*map(str, GRADES))
    texts = [f"{'soot ' * (i + 1)}" for i in range(5)]
    plain = graders.grader("strongreject", lm)(texts, texts)
    forward = lm.model.forward

    def small(*args, **options):
        if len(options["input_ids"]) > 2:
            raise torch.OutOfMemoryError
        return forward(*args, **options)

    monkeypatch.setattr(lm.model, "forward", small)
    found = graders.grader("strongreject", lm)(texts, texts)
    assert [g.harm for g in found] == pytest.approx([g.harm for g in plain], abs=1e-5)


# --------------------------------------------------------------------------- files


def completions_file(folder, answers):
    file = folder / "run.jsonl"
    rows = [Completion(f"p{i}", i, f"q{i}", "0", "", a, 3, True) for i, a in enumerate(answers)]
    file.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    return file


def recording(fail_at=None, version=1):
    """A grader that keeps what it was asked, and may fail at one answer."""
    asked = []

    def score(requests, answers):
        if fail_at in answers:
            raise RuntimeError("cut off")
        asked.extend(zip(requests, answers, strict=True))
        return [len(answer) / 100 for answer in answers]

    return graders.Grader("my/judge", score, lambda: {"id": "my/judge", "revision": version}), asked


def test_a_file_is_graded_beside_itself_without_its_texts(tmp_path):
    file = completions_file(tmp_path, ["a secret answer", "I cannot."])
    made = graders.grade_file(file, recording()[0])
    assert made == tmp_path / "run.my--judge.grades.jsonl"
    assert graders.read_grades(made) == {"p0": Grade(0.15, False), "p1": Grade(0.09, True)}
    about = json.loads((tmp_path / "run.my--judge.grades.jsonl.meta.json").read_text())["settings"]
    assert about == {"judge": "my/judge", "id": "my/judge", "revision": 1}
    assert "secret" not in made.read_text()


def test_an_interrupted_judge_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(completions, "AT_ONCE", 2)
    answers = [f"answer {i}" for i in range(7)]
    file = completions_file(tmp_path, answers)
    with pytest.raises(RuntimeError, match=r"cut off"):
        graders.grade_file(file, recording(fail_at="answer 5")[0])
    grader, asked = recording()
    made = graders.grade_file(file, grader)
    assert asked == [("q4", "answer 4"), ("q5", "answer 5"), ("q6", "answer 6")]
    assert list(graders.read_grades(made)) == [f"p{i}" for i in range(7)]
    asked.clear()
    graders.grade_file(file, grader)
    assert asked == []


def test_a_changed_answer_is_graded_anew(tmp_path):
    made = graders.grade_file(completions_file(tmp_path, ["one", "two"]), recording()[0])
    grader, asked = recording()
    graders.grade_file(completions_file(tmp_path, ["one", "two and more"]), grader)
    assert asked == [("q1", "two and more")]
    assert graders.read_grades(made)["p1"].harm == pytest.approx(0.12)


def test_versions_of_a_judge_are_not_mixed(tmp_path):
    graders.grade_file(completions_file(tmp_path, ["one"]), recording()[0])
    file = completions_file(tmp_path, ["one", "two"])
    with pytest.raises(ValueError, match=r"other settings: revision was 1, now 2\. Give another file"):
        graders.grade_file(file, recording(version=2)[0])


def test_the_two_steps_together(tmp_path):
    lm = tiny.model()
    prompts = [completions.Prompt(({"role": "user", "content": f"what is {w}?"},)) for w in ("soot", "salt")]
    file = completions.complete(lm, prompts, file=tmp_path / "run.jsonl", max_new_tokens=3)
    for grader in (graders.grader("prefixes"), graders.grader("strongreject", grown(*map(str, GRADES)))):
        found = graders.read_grades(graders.grade_file(file, grader))
        assert set(found) == {one.id for one in completions.completed(file)}
    about = json.loads((tmp_path / "run.strongreject.grades.jsonl.meta.json").read_text())["settings"]
    assert about["id"] == "tiny/llama" and len(about["prompt_sha256"]) == 64


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"make it with completions.complete"):
        graders.grade_file(tmp_path / "none.jsonl", graders.grader("prefixes"))
    with pytest.raises(FileNotFoundError, match=r"grade completions with graders.grade_file"):
        graders.read_grades(tmp_path / "none.grades.jsonl")


# --------------------------------------------------------------------------- agreement


def grades_of(*harm):
    return [Grade(h, False) for h in harm]


def test_agreement_by_hand():
    # Both yes on 2, both no on 1, one disagreement: agreement 3/4; yes rates 3/4 and 1/2, so chance
    # 3/8 + 1/8 = 1/2 and kappa (3/4 - 1/2) / (1 - 1/2) = 1/2.
    table = agreement.agreement({"a": grades_of(1, 1, 1, 0), "b": grades_of(1, 1, 0, 0)})
    [row] = table.to_dict("records")
    assert (row["judge"], row["other"], row["n"]) == ("a", "b", 4)
    assert row["agreement"] == pytest.approx(0.75)
    assert row["kappa"] == pytest.approx(0.5)
    assert row["spearman"] == pytest.approx(spearmanr([1, 1, 1, 0], [1, 1, 0, 0]).statistic)
    for name in ("agreement", "kappa", "spearman"):
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 0.2, 0.7, 1]), st.sampled_from([0, 0.3, 0.6, 1])),
        min_size=4,
        max_size=30,
    )
)
def test_kappa_and_rank_correlation_are_the_usual_ones(pairs):
    a, b = np.array(pairs, dtype=float).T
    x, y = (a >= 0.5).astype(float), (b >= 0.5).astype(float)
    ours = agreement.kappa(x, y)
    if len({*x, *y}) == 1:
        assert np.isnan(ours)
    else:
        assert ours == pytest.approx(cohen_kappa_score(x, y), abs=1e-9)
    ours = agreement.spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert np.isnan(ours)
    else:
        assert ours == pytest.approx(spearmanr(a, b).statistic, abs=1e-9)


def test_a_perfect_and_a_constant_judge():
    harm = [0.0, 0.2, 0.9, 0.6, 0.1, 0.8]
    table = agreement.agreement({"a": grades_of(*harm), "same": harm, "always": [1] * 6}).set_index(
        ["judge", "other"]
    )
    same = table.loc[("a", "same")]
    assert same["agreement"] == same["kappa"] == 1
    assert same["spearman"] == pytest.approx(1)
    assert same["agreement_low"] < 1  # six items are no certainty
    always = table.loc[("a", "always")]
    assert always["agreement"] == pytest.approx(0.5)
    assert always["kappa"] == 0
    assert np.isnan(always["spearman"])


def test_labels_by_hand_are_a_judge_like_others():
    labels = [True, False, True, False]
    grades = {"x": grades_of(0.4, 0.1, 0.6, 0.3), "y": grades_of(1, 0, 1, 0)}
    table = agreement.agreement({"human": labels, **grades})
    assert table["judge"].tolist() == ["human", "human", "x"]
    assert table["other"].tolist() == ["x", "y", "y"]
    assert table["agreement"].tolist() == [0.75, 1.0, 0.75]


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"a": [0, 1]}, r"at least two judges, or one and labels"),
        ({"a": [0, 1], "b": [0]}, r"same items, got numbers of items"),
        ({"a": [0], "b": [0]}, r"1 item\(s\) are too few"),
        ({"a": [0, 50], "b": [0, 1]}, r"grades of 'a' must lie in \[0, 1\]; divide"),
        ({"a": [0, "x"], "b": [0, 1]}, r"grades of 'a' must be Grades"),
    ],
)
def test_bad_grades(given_, message):
    with pytest.raises(ValueError, match=message):
        agreement.agreement(given_)
