"""Outcomes: hand-worked values, one sign for all, and batches that change nothing."""

import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmlens.evidence.stats import TooFew
from harmlens.flow import outcomes
from harmlens.flow.outcomes import TokenSets, fit_token_sets, logit_difference, refusal_log_odds
from harmlens.models import forward
from harmlens.models.chats import tokens
from harmlens.models.forward import follow
from harmlens.world import vale as world

VOCAB = 9
logits = st.lists(st.floats(-15, 15, width=32), min_size=VOCAB, max_size=VOCAB).map(torch.tensor)
indices = st.permutations(range(VOCAB))
# Two disjoint tuples of token ids.
sets = st.tuples(indices, st.integers(1, 4), st.integers(1, 4)).map(
    lambda drawn: (tuple(drawn[0][: drawn[1]]), tuple(drawn[0][drawn[1] : drawn[1] + drawn[2]]))
)

# --------------------------------------------------------------------------- Y1 and Y2


def logprobs(*args, **options):
    return follow(*args, **options)[0]


def test_logit_difference_worked_by_hand():
    """Logits log(1..4): comply {2, 3} has e-sum 7, refuse {0, 1} has 3."""
    values = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()
    assert logit_difference(values, TokenSets((2, 3), (0, 1))).item() == pytest.approx(math.log(7 / 3))
    assert logit_difference(values, TokenSets((3,), (0,))).item() == pytest.approx(math.log(4))


def test_refusal_log_odds_worked_by_hand():
    """The same logits: refusal has probability 3 / 10, everything else 7 / 10."""
    values = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()
    assert refusal_log_odds(values, TokenSets((3,), (0, 1))).item() == pytest.approx(math.log(7 / 3))


@given(logits, sets)
def test_refusal_log_odds_is_the_formula_in_double_precision(values, chosen):
    chosen = TokenSets(*chosen)
    weights = [math.exp(float(v)) for v in values]
    p = sum(weights[i] for i in chosen.refuse) / sum(weights)
    got = refusal_log_odds(values, chosen)
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(math.log(1 - p + 1e-8) - math.log(p + 1e-8), abs=1e-6)


def test_refusal_log_odds_stays_finite_where_refusal_is_certain_or_out_of_the_question():
    chosen = TokenSets((0,), (1,))
    for sign in (1, -1):
        value = refusal_log_odds(torch.tensor([0.0, 200.0 * sign]), chosen).item()
        assert value == pytest.approx(-sign * math.log(1e8), rel=0.01)


@given(logits, sets, st.floats(-10, 10))
def test_adding_a_constant_to_all_logits_changes_nothing(values, chosen, shift):
    chosen = TokenSets(*chosen)
    for outcome in (logit_difference, refusal_log_odds):
        torch.testing.assert_close(
            outcome(values + shift, chosen), outcome(values, chosen), atol=1e-3, rtol=1e-3
        )


@given(logits, sets, st.data())
def test_up_means_compliance(values, chosen, data):
    """Raising a compliance logit raises both outcomes; raising a refusal logit lowers both."""
    chosen = TokenSets(*chosen)
    for side, sign in ((chosen.comply, 1), (chosen.refuse, -1)):
        raised = values.clone()
        raised[data.draw(st.sampled_from(side))] += 3.0
        y1 = logit_difference(raised, chosen) - logit_difference(values, chosen)
        y2 = refusal_log_odds(raised, chosen) - refusal_log_odds(values, chosen)
        assert sign * y1.item() >= -1e-4
        assert sign * y2.item() >= -1e-9


@given(logits, sets)
def test_the_difference_changes_sign_with_the_sets(values, chosen):
    chosen = TokenSets(*chosen)
    back = TokenSets(chosen.refuse, chosen.comply)
    torch.testing.assert_close(logit_difference(values, chosen), -logit_difference(values, back))


def test_any_shape_of_batch():
    values = torch.randn(2, 3, VOCAB, generator=torch.Generator().manual_seed(0))
    chosen = TokenSets((1, 2), (4,))
    for outcome in (logit_difference, refusal_log_odds):
        batched = outcome(values, chosen)
        assert batched.shape == (2, 3)
        torch.testing.assert_close(batched[1, 2], outcome(values[1, 2], chosen))


@given(logits, sets)
def test_an_outcome_reads_its_tokens_only(values, chosen):
    """As patching takes Y1: logits of its ids in their order. Y2 needs all of them."""
    chosen, rows = TokenSets(*chosen), torch.stack([values, values.flip(0)])
    y1, y2 = outcomes.y1(chosen), outcomes.y2(chosen)
    assert (y1.name, y2.name, y2.ids) == ("Y1", "Y2", None)
    assert y1.ids == (*chosen.comply, *chosen.refuse)
    torch.testing.assert_close(y1.value(rows[:, list(y1.ids)]), logit_difference(rows, chosen))
    torch.testing.assert_close(y2.value(rows), refusal_log_odds(rows, chosen))


# --------------------------------------------------------------------------- token sets


@pytest.mark.parametrize(("comply", "refuse", "named"), [((), (1,), "comply"), ((1,), (), "refuse")])
def test_an_empty_token_set_is_refused(comply, refuse, named):
    with pytest.raises(TooFew, match=f"the {named} token set is empty"):  # a run without it has no value
        TokenSets(comply, refuse)


def test_token_sets_must_not_overlap():
    with pytest.raises(ValueError, match=r"tokens \[2, 3\] are in both sets"):
        TokenSets((1, 2, 3), (3, 2, 9))


@pytest.fixture
def first_tokens(monkeypatch):
    """A model of which only the first token's probabilities matter; a text is their name."""
    table: dict[str, list[float]] = {}

    def fake(lm, texts, **options):
        return torch.tensor([table[text] for text in texts]).log()

    monkeypatch.setattr(outcomes, "last_logits", fake)
    return table


def test_token_sets_are_found(first_tokens):
    first_tokens |= {
        #          sure  here  no    common rare
        "answered a": [0.60, 0.10, 0.001, 0.284, 0.015],
        "answered b": [0.20, 0.50, 0.001, 0.284, 0.015],
        "refused": [0.01, 0.001, 0.699, 0.289, 0.001],
    }
    lm = tiny.model()
    found = fit_token_sets(lm, ["answered a", "answered b"], ["refused"])
    assert found == TokenSets((0, 1), (2,))  # 3 is common to both, 4 below the mass
    assert fit_token_sets(lm, ["answered a"], ["refused"], mass=0.2) == TokenSets((0,), (2,))
    assert fit_token_sets(lm, ["answered a"], ["refused"], mass=0.005) == TokenSets((0, 1, 4), (2,))
    assert fit_token_sets(lm, ["answered b"], ["refused"], factor=30.0) == TokenSets((1,), (2,))


def test_a_model_that_treats_both_sides_alike_gives_no_sets(first_tokens):
    first_tokens |= {"a": [0.5, 0.5], "b": [0.4, 0.6]}
    with pytest.raises(ValueError, match="comply token set is empty"):
        fit_token_sets(tiny.model(), ["a"], ["b"])


@pytest.mark.parametrize(("complied", "refused"), [([], ["a"]), (["a"], []), ([], [])])
def test_sets_need_prompts_of_both_kinds(complied, refused):
    with pytest.raises(ValueError, match="at least one rendered prompt"):
        fit_token_sets(tiny.model(), complied, refused)


# --------------------------------------------------------------------------- Y3


def examples(lm, n=6):
    items = world.items("evaluation")[::20][:n]
    prompts = [lm.render(world.request(item, i)) for i, item in enumerate(items)]
    answers = [world.procedure(i) if k % 2 else world.REFUSALS[k % 3] for k, i in enumerate(items)]
    return prompts, answers


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox", "qwen3"])
@torch.no_grad()
def test_an_answers_score_is_minus_the_models_own_loss(architecture):
    lm = tiny.model(architecture)
    for prompt, answer in zip(*examples(lm), strict=True):
        head, whole = tokens(lm.tokenizer, prompt), tokens(lm.tokenizer, prompt + answer)
        labels = torch.tensor([[-100] * len(head) + whole[len(head) :]])
        loss = lm.model(torch.tensor([whole]), labels=labels).loss
        assert logprobs(lm, [prompt], [answer]).item() == pytest.approx(-loss.item(), abs=1e-4)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("skip", [0, 2])
def test_batched_scores_are_those_of_one_by_one(architecture, skip):
    lm = tiny.model(architecture)
    prompts, answers = examples(lm)
    batched = logprobs(lm, prompts, answers, skip=skip)
    single = [logprobs(lm, [p], [a], skip=skip) for p, a in zip(prompts, answers, strict=True)]
    assert batched.std() > 0.05
    torch.testing.assert_close(batched, torch.cat(single), atol=1e-4, rtol=0)


def test_skipping_leaves_out_the_first_tokens():
    """The sum over the answer is the first token's part and the rest's."""
    lm = tiny.model()
    prompts, answers = examples(lm)
    count = torch.tensor([len(tokens(lm.tokenizer, a)) for a in answers])
    whole = logprobs(lm, prompts, answers) * count
    rest = logprobs(lm, prompts, answers, skip=1) * (count - 1)
    first = logprobs(lm, prompts, [a.split()[0].rstrip(".,") for a in answers])
    torch.testing.assert_close(whole, first + rest, atol=1e-3, rtol=0)


@pytest.mark.parametrize("skip", [1, 5])
def test_an_answer_must_have_a_token_left(skip):
    lm = tiny.model()
    with pytest.raises(ValueError, match=f"the answer 'no' has no token left after skip={skip}"):
        logprobs(lm, [lm.render("is it harmful?")], ["no"], skip=skip)


def test_an_empty_answer_is_refused():
    lm = tiny.model()
    with pytest.raises(ValueError, match="the answer '' has no token left"):
        logprobs(lm, [lm.render("is it harmful?")], [""])


def test_each_prompt_needs_an_answer():
    lm = tiny.model()
    with pytest.raises(ValueError, match="2 prompts but 1 answers"):
        logprobs(lm, ["a", "b"], ["c"])


def test_prompt_and_answer_are_split_where_the_answer_begins():
    lm = tiny.model()
    prompt, answer = lm.render("what do you wish for?", "sure."), " take salt"
    head, tail = forward.split_tokens(lm, prompt, answer)
    assert head == tokens(lm.tokenizer, prompt)
    assert tail == tokens(lm.tokenizer, "take salt")


def test_a_tokenizer_that_merges_across_the_seam():
    """'sal' + 'ted' would be one word; the prompt's ids must stay what the model is given."""
    lm = tiny.model()
    head, tail = forward.split_tokens(lm, "is a sal", "ted draught")
    assert head == tokens(lm.tokenizer, "is a sal")
    assert tail == tokens(lm.tokenizer, "ted draught")


def test_the_sequence_score_prefers_what_the_model_prefers():
    lm = tiny.model()
    prompts, harmful = examples(lm)
    refusals = [world.REFUSALS[0]] * len(prompts)
    score = outcomes.Replies(harmful, refusals).score(lm, prompts)
    back = outcomes.Replies(refusals, harmful).score(lm, prompts)
    torch.testing.assert_close(score, -back)
    by_hand = logprobs(lm, prompts, harmful) - logprobs(lm, prompts, refusals)
    torch.testing.assert_close(score, by_hand)
    assert abs(score[0]) < 1e-5  # the first answer is that refusal


def test_replies_are_two_replies_with_one_skip():
    one, other = outcomes.Replies(["sure."], ["no."], skip=1).parts()
    assert (one.texts, other.texts, one.skip, other.skip) == (["sure."], ["no."], 1, 1)
