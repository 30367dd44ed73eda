"""The whole way of the book on random models of many architectures, with an everyday tokenizer and template.

A model is written to a folder and loaded from there, as a reader's own would be. What it says is nonsense, so
a made-up grader decides what counts as refusal; what is checked are identities that hold of any model.
"""

from __future__ import annotations

import functools
import zlib
from pathlib import Path

import pytest
import standin
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from harmlens.asking import datasets, public, tasks
from harmlens.asking import pairs as prompts
from harmlens.asking.public import PREFILLS, Public
from harmlens.flow import interventions, neurons, outcomes, patching
from harmlens.flow.engine import Freeze
from harmlens.judging import completions, graders
from harmlens.judging.graders import Grade
from harmlens.models import chats, forward
from harmlens.models import loading as models
from harmlens.models.forward import LanguageModel
from harmlens.training import tune
from harmlens.weights import attribution, frontier, masks
from harmlens.weights.masks import Mask

ARCHITECTURES = (*tiny.ARCHITECTURES, "gpt2")
DTYPES = (torch.float32, torch.bfloat16)
BEHIND_A_NORM = {"gemma2", "gemma3", "olmo2"}  # a norm stands behind the MLP: no closed form
HARMFUL_VERBS = tuple(harmful for _, harmful, _ in standin.VERBS)
LAYERS, WIDTH, HIDDEN = 2, 32, 64
MODULES = ("mlp_out", "attn_out")


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(standin.FOLDER)


def config(architecture: str):
    tok = tokenizer()
    common = {"vocab_size": len(tok), "initializer_range": 0.3, "tie_word_embeddings": False}
    ends = {"pad_token_id": tok.pad_token_id, "bos_token_id": None, "eos_token_id": tok.eos_token_id}
    if architecture == "gpt2":
        return GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=256, **common, **ends)
    made, extra = tiny.CONFIGS[architecture]
    return made(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=256, **common, **ends, **extra,
    )  # fmt: skip


def random_model(architecture: str) -> torch.nn.Module:
    """Random, but it writes whole words: strewn bytes are not what a tokenizer makes of any text."""
    tok = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = AutoModelForCausalLM.from_config(config(architecture))
    words = [tok.decode([i]) for i in range(len(tok))]
    silent = [i for i, word in enumerate(words) if not (word[:1] == " " and word[1:].isalpha())]
    with torch.no_grad():
        net.get_output_embeddings().weight[silent] = 0
    return net


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, tmp_path_factory):
    where = tmp_path_factory.mktemp("models") / request.param
    random_model(request.param).save_pretrained(where)
    tokenizer().save_pretrained(where)
    return where


@functools.cache
def loaded(folder: Path, dtype: torch.dtype) -> LanguageModel:
    return models.load(str(folder), dtype=dtype)


@pytest.fixture(scope="module", params=DTYPES, ids=["float32", "bfloat16"])
def lm(request, folder) -> LanguageModel:
    return loaded(folder, request.param)


@pytest.fixture(scope="module")
def exact(folder) -> LanguageModel:
    """In float32, where half precision would add time and say nothing new."""
    return loaded(folder, torch.float32)


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """Eight tokens of an answer say as much here as two dozen, in less time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(public, "TOKENS", 8)
        yield


def made_up(requests, answers):
    """Refuses what asks for harm, unless its answer has begun; and one in eight answers, whatever it is."""
    out = []
    for request, answer in zip(requests, answers, strict=True):
        asks = any(verb in request for verb in HARMFUL_VERBS) and "Explain" not in request
        refused = (asks and not answer.startswith(PREFILLS[0])) or zlib.crc32(answer.encode()) % 8 == 0
        out.append(Grade(0.0 if refused else 1.0, refused))
    return out


GRADER = graders.Grader("made up", lambda requests, answers: [1.0] * len(answers), dict)
made_up.name = "made up"


ENTRIES = datasets.entries(str(standin.PROMPTS))
FACTS = datasets.entries(str(standin.FACTS))


@functools.cache
def source_of(folder: Path, dtype: torch.dtype) -> Public:
    return Public(loaded(folder, dtype), tuple(ENTRIES), made_up, tuple(FACTS), "prompts.csv")


@pytest.fixture(scope="module")
def source(folder, lm) -> Public:
    return source_of(folder, lm.model.dtype)


@pytest.fixture(scope="module")
def exact_source(folder) -> Public:
    return source_of(folder, torch.float32)


@pytest.fixture(scope="module")
def pairs(exact_source) -> list[chats.Pair]:
    """The same for both precisions: only the tokenizer has a say in them."""
    return exact_source.pairs("prompt", n=4)


@pytest.fixture(scope="module")
def y1(exact, pairs) -> outcomes.Outcome:
    """Tokens far apart in what the sides make of them; any two sets would do."""
    sides = [[getattr(pair, side).render(exact) for pair in pairs] for side in ("x1", "x0")]
    one, other = (forward.last_logits(exact, texts).mean(0) for texts in sides)
    order = (one - other).argsort().tolist()
    return outcomes.y1(outcomes.TokenSets(tuple(order[-2:]), tuple(order[:2])))


def near(got: torch.Tensor, wanted: torch.Tensor, lm: LanguageModel) -> None:
    """Equal as far as the precision carries, which is coarse by the size of the logits."""
    scale = max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(got, wanted, atol=forward.tolerance(lm) * scale, rtol=0)


# --------------------------------------------------------------------------- pairs and patching


@pytest.mark.parametrize("contrast", prompts.CONTRASTS)
def test_pairs_of_every_contrast_have_sides_of_equal_length(exact, exact_source, contrast):
    found = exact_source.pairs(contrast)
    assert len(prompts.token_ids(exact, found)) == len(found) >= 20


def test_both_sides_differ_in_the_outcome(exact, pairs, y1):
    """Otherwise nothing below would mean anything."""
    total = patching.patch(exact, pairs, y1).total
    assert total.mean() > 0.1  # a pair may have none: its words lie outside the window of some models


@pytest.mark.parametrize("direction", patching.DIRECTIONS)
def test_patching_everything_gives_the_total_effect(lm, pairs, y1, direction):
    found = patching.patch(lm, pairs, y1, sites="resid_post", positions="all", direction=direction)
    near(found.at("resid_post"), found.total.expand(LAYERS, -1), lm)


def test_replies_are_scored_alike_with_and_without_patching(lm, source, pairs):
    harmful, refusals = source.replies([pair.x0 for pair in pairs])
    replies = outcomes.Replies(harmful, refusals)
    found = patching.patch(lm, pairs, replies, sites="resid_post", layers=[0])
    near(found.y1, replies.score(lm, [pair.x1.render(lm) for pair in pairs]), lm)


def test_a_run_patched_with_itself_is_unchanged(exact, pairs, y1):
    chats = [pair.x0 for pair in pairs]
    sites = ("layer", "attn_out", "mlp_out", "resid_post", "head")
    found = patching.across(exact, exact, chats, y1, sites=sites)
    assert torch.equal(found.y1, found.y0)
    near(found.effects, torch.zeros_like(found.effects), exact)
    assert found.size.abs().max() == 0


def test_before_the_first_difference_there_is_nothing_to_patch(exact, pairs, y1):
    before = {"before": range(4)}
    found = patching.patch(exact, pairs, y1, sites=MODULES, positions=lambda lm, pair: before)
    assert found.effects.abs().max() == 0


def test_severed_paths(exact, pairs, y1):
    """Behind the last layer's MLP nothing can react; behind the first layer's, attention or MLP does."""
    free = patching.patch(exact, pairs, y1, sites=MODULES, positions="all")
    moved = 0.0
    for site in ("mlp_out", "attn_out"):
        cut = patching.patch(exact, pairs, y1, sites=MODULES, positions="all", freeze=Freeze(site))
        near(cut.at("mlp_out")[-1], free.at("mlp_out")[-1], exact)
        moved += float((cut.at("mlp_out")[0] - free.at("mlp_out")[0]).abs().max())
    assert moved > 10 * forward.tolerance(exact)


def test_units_of_the_last_mlp(lm, pairs, y1):
    found = neurons.last_layer(lm, pairs, y1)
    architecture = lm.name.rsplit("/", 1)[1]
    assert found.method == ("patching" if architecture in BEHIND_A_NORM else "closed form")
    some = (0, 5, HIDDEN - 1)
    units = {str(u): {LAYERS - 1: [u]} for u in some}
    real = patching.patch(lm, pairs, y1, sites=units, layers=[LAYERS - 1])
    near(found.effects[:, list(some)].T, real.effects[:, 0, 0], lm)
    whole = patching.patch(lm, pairs, y1, sites="mlp_out", layers=[LAYERS - 1])
    order = torch.randperm(len(found.labels), generator=torch.Generator().manual_seed(0)).tolist()
    grown = neurons.set_effects(lm, pairs, y1, {k: order[:k] for k in (0, len(order))})
    near(grown.effects[:, 0], torch.zeros(len(pairs)), lm)
    near(grown.effects[:, -1], whole.at("mlp_out")[0], lm)


def test_units_set_to_what_they_are_change_no_word(exact, pairs):
    texts = [pair.x0.render(exact) for pair in pairs]
    plain = forward.generate(exact, texts, max_new_tokens=6)
    units = {layer: list(range(HIDDEN)) for layer in range(LAYERS)}
    with interventions.overwriting(exact, units, interventions.scale(1.0), where="both"):
        assert forward.generate(exact, texts, max_new_tokens=6) == plain
    with interventions.overwriting(exact, units, interventions.scale(0.0), where="both"):
        assert forward.generate(exact, texts, max_new_tokens=6) != plain


# --------------------------------------------------------------------------- generation


def test_greedy_answers_are_those_of_transformers(lm, folder, source):
    """Nothing of this package: the template, the tokens and the generation are those of transformers."""
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=lm.model.dtype).eval()
    tok = AutoTokenizer.from_pretrained(folder)
    asked = source.requests(True, n=2)
    found = forward.generate(lm, [p.render(lm) for p in asked], max_new_tokens=6, batch_size=1)
    for prompt, answer in zip(asked, found, strict=True):
        inputs = tok.apply_chat_template(
            list(prompt.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = net.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=tok.pad_token_id)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert tok.decode(new, skip_special_tokens=True).strip() == answer != ""


def test_batched_is_single(lm, source):
    asked = [*source.requests(True, n=3), *source.requests(False, n=3)]
    texts = [p.render(lm) for p in asked]
    assert len({len(chats.tokens(lm.tokenizer, text)) for text in texts}) > 1  # so there is padding
    near(forward.last_logits(lm, texts), forward.last_logits(lm, texts, batch_size=1), lm)
    if lm.model.dtype == torch.float32:  # otherwise a near tie may fall either way
        one_by_one = forward.generate(lm, texts, max_new_tokens=6, batch_size=1)
        assert forward.generate(lm, texts, max_new_tokens=6) == one_by_one


def test_completions_are_written_and_graded(exact, exact_source, tmp_path):
    asked = exact_source.requests(True, n=4)
    file = completions.complete(
        exact, asked, file=tmp_path / "said.jsonl", max_new_tokens=6, batch_size=1, progress=False
    )
    said = completions.completed(file)
    plain = forward.generate(exact, [p.render(exact) for p in asked], max_new_tokens=6, batch_size=1)
    assert [one.answer for one in said] == plain
    grades = graders.read_grades(graders.grade_file(file, GRADER))
    assert [grades[one.id].harm for one in said] == [1.0] * 4


# --------------------------------------------------------------------------- own answers, scores, pruning


@pytest.fixture(scope="module")
def suite(source) -> dict[str, tasks.Task]:
    return source.exam(n=6)


def test_a_model_still_says_what_it_said(lm, suite):
    sizes = {name: len(task) for name, task in suite.items()}
    full = {"suppressed": 6, "refusal": 6, "served": 6, "recognition": 12, "explanation": 12, "facts": 12}
    # In half precision another batch may tip a near tie: an answer that is lost so is left out, or not exact.
    sure = lm.model.dtype == torch.float32
    assert sizes == (full if sure else {**full, "explanation": sizes["explanation"]})
    assert sizes["explanation"] >= (12 if sure else 6)
    for name in ("suppressed", "refusal", "served", "explanation"):
        assert tasks.measure(lm, suite[name]).exact.mean() >= (1 if sure else 0.7), name


@pytest.fixture(scope="module")
def found(lm, source) -> frontier.Found:
    return frontier.find_weights(lm, source, n=6, pq=(0.05, 0.05))


def test_scores_add_up_over_examples(exact, exact_source):
    rows = tasks.examples(exact, exact_source.task("harmful", n=4), n=4)
    whole = attribution.prune_score(exact, rows).values
    name = next(iter(whole))
    whole = whole[name]
    parts = [attribution.prune_score(exact, [row]).values[name] for row in rows]
    off = (torch.stack(parts).sum(0) - whole).abs().max()
    assert off < 1e-4 * whole.abs().max()


def test_what_is_selected(lm, found):
    spared = masks.top(found.preserve, found.p)
    taken = masks.top(found.prune, found.q, lowest=True)
    assert 0 < len(found.mask) < len(taken)
    assert len(found.mask & spared) == 0 and len(found.mask - taken) == 0
    assert set(found.mask.indices) == set(found.prune.values) == set(found.preserve.values)
    # Every linear layer of every block, and nothing else.
    blocks = [name for name in found.mask.indices if any(b in name for b in (".layers.", ".h."))]
    assert len(blocks) == len(found.mask.indices) >= 4 * LAYERS


def snapshot(lm: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in lm.model.state_dict().items()}


def unchanged(lm: LanguageModel, before: dict[str, torch.Tensor]) -> bool:
    now = lm.model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in now)


def test_pruning_takes_what_carries_the_answers_and_gives_it_back(lm, suite, found):
    before, marks = snapshot(lm), tasks.measure(lm, suite["suppressed"])
    with masks.without(lm, found.mask):
        after = tasks.measure(lm, suite["suppressed"])
        weights = dict(lm.model.named_parameters())
        for name, index in found.mask.indices.items():
            assert (weights[name].view(-1)[index] == 0).all()
    assert after.loss.mean() > marks.loss.mean()
    assert unchanged(lm, before)
    again = tasks.measure(lm, suite["suppressed"])
    assert (again.loss == marks.loss).all()


def test_pruning_nothing_changes_nothing(lm, suite, found):
    mask = found.mask
    nothing = Mask({n: i[:0] for n, i in mask.indices.items()}, mask.shapes, mask.model, mask.revision)
    marks = tasks.measure(lm, suite["served"])
    with masks.without(lm, nothing):
        assert (tasks.measure(lm, suite["served"]).loss == marks.loss).all()


# --------------------------------------------------------------------------- fine-tuning


def test_adapters_teach_and_leave_a_plain_model(lm, source):
    pytest.importorskip("peft")
    pupil = forward.clone(lm)
    chats = [p.messages for p in source.requests(True, "train", n=8)]
    rows = tasks.rows(lm, chats, [standin.REFUSAL] * len(chats), end=True)
    names = {name: type(module) for name, module in pupil.model.named_modules()}
    recipe = tune.Recipe(method="lora", steps=8, lr=1e-2, batch_size=8, rank=4, alpha=8, warmup=1)
    tuned = tune.tune(pupil, rows, recipe)
    assert {name: type(module) for name, module in pupil.model.named_modules()} == names
    assert tuned.losses[-1] < 0.95 * tuned.losses[0]
    texts = [lm.render(chat) for chat in chats]
    refusal = [standin.REFUSAL] * len(chats)
    taught, plain = (forward.follow(m, texts, refusal)[0].mean() for m in (pupil, lm))
    assert taught > plain  # so the adapters were merged
    assert pupil.model.dtype == lm.model.dtype
