"""The refusal direction: read, chosen, projected out, added."""

from __future__ import annotations

import copy
import dataclasses

import lecture
import pytest
import tiny
import torch
from naive import Naive

from harmlens.flow import directions, interventions, outcomes
from harmlens.flow.directions import Direction
from harmlens.flow.outcomes import TokenSets
from harmlens.models import forward
from harmlens.models import parts as decoder
from harmlens.models.chats import tokens
from harmlens.world import vale as world

Y1 = outcomes.y1(TokenSets((20, 21, 22), (30, 31)))
WIDTH = tiny.SHAPE.width
PAGE = lecture.defined("17")  # how a direction is chosen is the notebook's own


@pytest.fixture(scope="module")
def lm():
    return tiny.model()


@pytest.fixture(scope="module")
def texts(lm):
    """Plain requests, which all end as the template does."""
    items = world.items("evaluation")[::30]
    return [lm.render(world.request(item, i)) for i, item in enumerate(items)]


def vector(seed=0):
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def component(value, direction):
    """Largest part of a stream along a direction."""
    return (value.float() @ (direction / direction.norm())).abs().max()


# --------------------------------------------------------------------------- finding


def test_a_candidate_is_a_difference_of_means(lm, texts):
    found = directions.mean_differences(lm, texts[:3], texts[3:], positions=[-2, -1])
    at = {(d.depth, d.position): d.vector for d in found}
    streams = interventions.states(lm, texts, positions=[-2, -1])
    assert max(depth for depth, _ in at) == 1  # two blocks; what stands behind the last is left out
    torch.testing.assert_close(at[1, -1], streams[:3, 1, 1].mean(0) - streams[3:, 1, 1].mean(0))
    assert (0, -1) not in at  # the same token everywhere: no difference


def test_the_shared_end_is_what_the_template_writes(lm):
    ends = [lm.render("is it red ?"), lm.render("who sells a powder")]
    assert directions.shared_end(lm, ends) == [-2, -1]
    assert directions.shared_end(lm, ends, most=1) == [-1]
    with pytest.raises(ValueError, match="texts end in different tokens"):
        directions.shared_end(lm, ["powder", "ledger"])


def test_shuffled_directions_hold_nothing_of_the_difference_between_the_sides(lm, texts):
    like = directions.mean_differences(lm, texts[:1], texts[1:2])[0]
    # All texts of a side alike: what is left of a difference of halves is nothing.
    streams = interventions.states(lm, texts)[:, like.depth, 0]
    none = PAGE.shuffled_like(like, [streams[:1].repeat(4, 1), streams[1:2].repeat(4, 1)], 0)
    assert none.vector.norm() < 1e-5 * like.vector.norm()
    a, b = (PAGE.shuffled_like(like, [streams[:4], streams[3:]], draw).vector for draw in range(2))
    assert not torch.equal(a, b) and a.norm() > 0
    assert abs(a @ like.unit) < 1e-5 * like.vector.norm()


def page(lm):
    """Notebook 17 with one model, of two layers."""
    return lecture.defined("17", lm=lm, y1=Y1, last=1)


def test_only_texts_that_behave_as_expected_are_kept(lm, texts):
    values = outcomes.logit_difference(forward.last_logits(lm, texts), TokenSets((20, 21, 22), (30, 31)))
    for refused in (True, False):
        wanted = [t for t, v in zip(texts, values.tolist(), strict=True) if (v < 0) == refused]
        if len(wanted) > 1:
            assert page(lm).behaving(texts, refused) == wanted
        with pytest.raises(AssertionError, match="are needed; give more requests"):
            page(lm).behaving(texts[:1], refused)


# --------------------------------------------------------------------------- removing


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_nothing_of_the_direction_is_left_anywhere_in_the_stream(architecture):
    lm = tiny.model(architecture)
    ids = torch.tensor([tokens(lm.tokenizer, tiny.texts(lm)[0])])
    before = Naive(lm).record(ids)
    d = vector()
    assert component(before["resid_post"][0], d) > 0.1
    seen = []
    # What the norm in front of the MLP reads is the stream between attention and MLP, wherever there is one.
    blocks = decoder.blocks(lm)
    middle = [m for b in blocks for n, m in b.named_children() if n in ("pre_feedforward_layernorm",)] or [
        b.post_attention_layernorm for b in blocks if architecture in ("llama", "qwen2", "mistral")
    ]
    with directions.ablated(lm, d):
        hooks = [m.register_forward_pre_hook(lambda _, x: seen.append(x[0])) for m in middle]
        streams = interventions.states(lm, tiny.texts(lm), positions=[-4, -1])
        for hook in hooks:
            hook.remove()
    assert component(streams, d) < 1e-4
    for value in seen:
        assert component(value, d) < 1e-4
    assert torch.equal(Naive(lm).record(ids)["logits"], before["logits"])  # no hook was left behind


def orthogonal(lm, direction):
    """The model with its writing weights made orthogonal to a direction."""
    unit, net = direction / direction.norm(), copy.deepcopy(lm.model)
    out = dataclasses.replace(lm, model=net)
    embedding = net.get_input_embeddings().weight.data
    embedding -= (embedding @ unit)[:, None] * unit
    for block in decoder.blocks(out):
        for part in (decoder.attention(block), decoder.mlp(block)):
            weight = decoder.projection(part).weight.data
            weight -= unit[:, None] * (unit @ weight)
    return out


def test_it_equals_making_the_weights_orthogonal(lm, texts):
    other = orthogonal(lm, vector())
    wanted = forward.last_logits(other, texts)
    with directions.ablated(lm, 7.0 * vector()):  # the length does not matter
        got = forward.last_logits(lm, texts)
        said = forward.generate(lm, texts, max_new_tokens=6)
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-3)
    assert said == forward.generate(other, texts, max_new_tokens=6)
    assert (got - forward.last_logits(lm, texts)).abs().max() > 0.1


def test_hooks_go_also_after_an_exception(lm, texts):
    before = forward.last_logits(lm, texts)
    for scene in (directions.ablated(lm, vector()), directions.added(lm, Direction(vector(), 1))):
        with pytest.raises(RuntimeError, match="stop"), scene:
            raise RuntimeError("stop")
    assert torch.equal(forward.last_logits(lm, texts), before)


def test_half_precision_stays_half_precision(texts):
    lm = tiny.model()
    lm.model.to(torch.bfloat16)
    with directions.ablated(lm, vector()), directions.added(lm, Direction(vector(), 1)):
        assert forward.last_logits(lm, texts).isfinite().all()
        assert interventions.states(lm, texts).isfinite().all()


# --------------------------------------------------------------------------- adding


def test_adding_moves_the_stream_by_the_vector_and_only_from_there_on(lm, texts):
    plain = interventions.states(lm, texts, positions=[-3, -1])
    with directions.added(lm, Direction(vector(), 1), dose=0.5):
        moved = interventions.states(lm, texts, positions=[-3, -1])
    torch.testing.assert_close(moved[:, 0], plain[:, 0])
    torch.testing.assert_close(moved[:, 1], plain[:, 1] + 0.5 * vector(), atol=1e-4, rtol=1e-4)
    with directions.added(lm, Direction(vector(), 1), dose=0.0):
        assert torch.equal(interventions.states(lm, texts, positions=[-3, -1]), plain)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(WIDTH + 1), "must have the model's width"),
        (torch.zeros(WIDTH), "longer than 0"),
        (torch.full((WIDTH,), torch.nan), "must be finite"),
    ],
)
def test_bad_vectors_are_refused(lm, wrong, message):
    with pytest.raises(ValueError, match=message), directions.ablated(lm, wrong):
        pass
    with pytest.raises(ValueError, match=message), directions.added(lm, Direction(wrong, 1)):
        pass


def test_a_depth_without_block_is_refused(lm):
    with pytest.raises(ValueError, match="no block at depth 2"), directions.added(lm, Direction(vector(), 2)):
        pass


# --------------------------------------------------------------------------- choosing


def test_a_trial_measures_what_it_says(lm, texts):
    refused, answered = texts[:3], texts[3:]
    found = directions.mean_differences(lm, refused, answered)
    [tried] = page(lm).trials(found, refused, answered, deepest=0.6)
    assert tried.direction.depth == 1
    with directions.ablated(lm, tried.direction.vector):
        logits = forward.last_logits(lm, refused)
        log_p = forward.last_logits(lm, answered).log_softmax(-1)
    with directions.added(lm, tried.direction):
        pushed = forward.last_logits(lm, answered)
    plain = forward.last_logits(lm, answered).log_softmax(-1)
    y1 = [
        float(outcomes.logit_difference(x, TokenSets((20, 21, 22), (30, 31))).mean())
        for x in (logits, pushed)
    ]
    assert (tried.removed, tried.added) == pytest.approx(y1, abs=1e-4)
    assert tried.shift == pytest.approx(float((plain.exp() * (plain - log_p)).sum(-1).mean()), abs=1e-4)
    assert page(lm).trials(found, refused, answered, deepest=0.4) == []


def test_the_choice_follows_the_rule():
    def trial(removed, added, shift):
        return PAGE.Trial(Direction(vector(), 1), removed, added, shift)

    good, harsh, mute, wild = trial(1, -1, 0.05), trial(3, -1, 0.5), trial(2, 1, 0.05), trial(9, 1, 9.0)
    assert PAGE.choose([harsh, good, mute, wild]) is good
    assert PAGE.choose([harsh, mute, wild]) is harsh  # adds refusal, if not gently
    assert PAGE.choose([mute, wild]) is mute  # gentle, if it does not add refusal
    assert PAGE.choose([wild]) is wild
