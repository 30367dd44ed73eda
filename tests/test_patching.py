"""Sweeps: identities that any right patching obeys, what is saved, and what is refused by name."""

import copy
import dataclasses

import lecture
import naive
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harmlens.asking import pairs as prompts
from harmlens.flow import engine, outcomes, patching
from harmlens.flow.engine import SITES, Freeze
from harmlens.flow.outcomes import Outcome, Replies, Reply, TokenSets
from harmlens.flow.patching import Effects, patch
from harmlens.models import chats, forward
from harmlens.models.chats import Pair, Prompt
from harmlens.models.forward import LanguageModel

SETS = TokenSets((5, 9, 20), (7, 31))
Y1 = outcomes.y1(SETS)
LM = tiny.model(layers=3)
PAIRS = prompts.pairs("prompt", n=4)
PLAIN = ("resid_post", "layer", "attn_out", "mlp_out")
SURPLUS = lecture.defined("03", names={}).surplus


def ask(text):
    return Prompt(({"role": "user", "content": text},))


# --------------------------------------------------------------------------- identities


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt_neox", "olmo2"])
def lm(request):
    return tiny.model(request.param, layers=3)


@pytest.mark.parametrize("direction", patching.DIRECTIONS)
def test_the_whole_residual_stream_carries_the_whole_effect(lm, direction):
    found = patching.patch(lm, PAIRS, Y1, sites="resid_post", positions="all", direction=direction)
    torch.testing.assert_close(found.at("resid_post"), found.total.expand(3, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("direction", patching.DIRECTIONS)
def test_behind_the_last_block_the_last_position_is_all_there_is(lm, direction):
    """Whatever the model: this is no finding."""
    found = patching.patch(lm, PAIRS, Y1, sites="resid_post", direction=direction, positions=prompts.roles)
    torch.testing.assert_close(found.at("resid_post", "last")[-1], found.total, atol=1e-4, rtol=0)
    for other in ("changed", "request", "template"):
        assert found.at("resid_post", other)[-1].abs().max() < 1e-5


def test_both_directions_are_one_experiment_seen_from_two_sides(lm):
    """Noising x1 is denoising with the sides swapped: TIE = Y(x1) - Y(x1; M(x0))."""
    swapped = [Pair(p.id, p.x0, p.x1) for p in PAIRS]
    options = {"sites": SITES[:5], "positions": prompts.roles}
    tie = patch(lm, PAIRS, Y1, direction="noising", **options)
    nie = patch(lm, swapped, Y1, direction="denoising", **options)
    torch.testing.assert_close(tie.patched, nie.patched, atol=1e-5, rtol=0)
    torch.testing.assert_close(tie.effects, -nie.effects, atol=1e-5, rtol=0)
    torch.testing.assert_close(tie.total, -nie.total, atol=1e-5, rtol=0)


def test_the_first_differing_word_carries_everything_at_the_start(lm):
    """Patching the changed word behind block 0 in one run is, before anything moved on, the other run."""
    found = patching.patch(lm, PAIRS, Y1, sites="resid_post", positions=lambda lm, p: {
        "from here": range(prompts.roles(lm, p)["changed"][0], prompts.roles(lm, p)["last"][0] + 1)
    })  # fmt: skip
    torch.testing.assert_close(found.at("resid_post"), found.total.expand(3, -1), atol=1e-4, rtol=0)


def test_both_directions_agree_where_everything_is_linear():
    """Nothing interacts where every block is a linear map of its own position: then NIE and TIE are one.

    And attention, MLP and the layer as a whole, by hand: h -> h + A h + B (h + A h).
    """
    lm = tiny.model()
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=g) / 8 for _ in range(2))
    for block in lm.model.model.layers:
        real = block.self_attn.forward

        def attention(*args, real=real, **kwargs):
            real(*args, **kwargs)  # which fills the cache
            return kwargs["hidden_states"] @ a, None

        block.self_attn.forward, block.mlp.forward = attention, lambda x: x @ b
        block.input_layernorm = block.post_attention_layernorm = nn.Identity()
    lm.model.model.norm = nn.Identity()
    pairs = [Pair(p.id, *(dataclasses.replace(s, prefill=w) for s, w in ((p.x1, "sure"), (p.x0, "no"))))
             for p in prompts.pairs("behaviour", n=3)]  # fmt: skip
    found = {d: patch(lm, pairs, linear, sites=PLAIN, direction=d) for d in patching.DIRECTIONS}
    nie, tie = (found[d].effects for d in patching.DIRECTIONS)
    torch.testing.assert_close(nie, tie, atol=1e-4, rtol=1e-4)
    ids = [lm.tokenizer(word, add_special_tokens=False)["input_ids"][-1] for word in ("sure", "no")]
    with torch.no_grad():
        h = torch.sub(*lm.model.get_input_embeddings()(torch.tensor(ids)))
        one, eye = torch.eye(32), torch.eye(32)
        block = one + a + (one + a) @ b
        read = lm.model.lm_head.weight[5] - lm.model.lm_head.weight[7]
        for layer, below in enumerate((eye, block)):
            above = (block if layer == 0 else eye) @ read
            for site, map_ in (
                ("attn_out", a @ (one + b)), ("mlp_out", (one + a) @ b), ("layer", block - eye),
                ("resid_post", block),
            ):  # fmt: skip
                want = h @ below @ map_ @ above
                torch.testing.assert_close(
                    found["denoising"].at(site)[layer], want.expand(3), atol=1e-4, rtol=1e-4
                )


def linear(logits):
    return logits[:, 5] - logits[:, 7]


# --------------------------------------------------------------------------- the record of a sweep


def made(direction="denoising", pairs=3, layers=2, positions=("changed", "last"), seed=0) -> Effects:
    g = torch.Generator().manual_seed(seed)
    shape = (2, layers, len(positions), pairs)
    return Effects(
        ("mlp_out", "attn_out"), tuple(range(layers)), positions, tuple(f"pair {i}" for i in range(pairs)),
        direction, torch.randn(pairs, generator=g) + 5, torch.randn(pairs, generator=g),
        torch.randn(shape, generator=g), torch.rand(shape, generator=g),
    )  # fmt: skip


def test_effects_worked_by_hand():
    patched = torch.tensor([2.0, 7.0]).view(1, 1, 1, 2)
    y1, y0 = torch.tensor([4.0, 8.0]), torch.tensor([1.0, 3.0])
    for direction, want in (("denoising", [1.0, 4.0]), ("noising", [2.0, 1.0])):
        found = Effects(("layer",), (0,), ("last",), ("a", "b"), direction, y1, y0, patched, patched)
        assert found.total.tolist() == [3.0, 5.0]
        assert found.at("layer").tolist() == [want]


@given(st.sampled_from(patching.DIRECTIONS), st.integers(0, 20))
def test_direct_and_indirect_effect_make_up_the_total(direction, seed):
    """TE = NIE + what is left, in either direction: nothing is lost or counted twice."""
    found = made(direction, seed=seed)
    left = found.y1 - found.patched if direction == "denoising" else found.patched - found.y0
    torch.testing.assert_close(found.effects + left, found.total.expand_as(left))


def test_sites_and_positions_are_asked_for_by_name():
    found = made()
    assert torch.equal(found.at("attn_out", "last"), found.effects[1, :, 1])
    with pytest.raises(ValueError, match="site='layer' was not swept; there are mlp_out, attn_out"):
        found.at("layer", "last")
    with pytest.raises(ValueError, match="position=None was not swept; choose one of changed, last"):
        found.at("mlp_out")
    with pytest.raises(ValueError, match="position='first' was not swept; choose one of changed, last"):
        found.at("mlp_out", "first")


def test_a_difference_of_sweeps():
    one, other = made(seed=1), made(seed=2)
    less = one.minus(other)
    torch.testing.assert_close(less.effects, one.effects - other.effects)
    torch.testing.assert_close(less.total, one.total - other.total)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("pairs", dataclasses.replace(made(), pairs=("pair 0", "pair 2", "pair 1"))),
        ("direction", made("noising")),
        ("layers", dataclasses.replace(made(), layers=(0, 2))),
        ("positions", made(positions=("last", "changed"))),
    ],
)
def test_sweeps_of_different_cells_have_no_difference(name, other):
    with pytest.raises(ValueError, match=f"other: its {name} differ"):
        made().minus(other)


def test_axes_of_a_sweep():
    found = patch(
        LM, PAIRS, Y1, sites=("head", {"a": {2: [3]}, "b": {0: [4, 5]}}, "layer"), layers=[2, 0],
        positions=prompts.roles,
    )  # fmt: skip
    assert found.sites == ("head 0", "head 1", "head 2", "head 3", "a", "b", "layer")
    assert found.layers == (2, 0) and found.positions == ("changed", "request", "template", "last")
    assert found.pairs == tuple(p.id for p in PAIRS)
    assert found.patched.shape == found.size.shape == (7, 2, 4, 4)
    assert (found.at("a", "last")[1] == 0).all() and (found.at("b", "last")[0] == 0).all()  # nothing there
    assert (found.at("a", "last")[0] != 0).all() and (found.at("b", "changed")[1] != 0).all()
    whole = patch(LM, PAIRS, Y1, sites="layer", positions=prompts.roles)
    torch.testing.assert_close(found.effects[6], whole.effects[0][[2, 0]], atol=1e-5, rtol=0)


def test_units_may_be_given_as_anything_with_numbers_in_it():
    many = [3, 1, 2]
    kinds = [many, tuple(many), range(1, 4), [3, 1, 1, 2]]
    found = [patch(LM, PAIRS[:1], Y1, sites={"a": {1: units}}) for units in kinds]
    assert found[0].effects.abs().max() > 0
    for other in found[1:]:
        assert torch.equal(other.patched, found[0].patched)
    assert Freeze("neurons", units=range(1, 4)) == Freeze("neurons", units=(1, 2, 3))


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": ("resid_mid",)}, r"unknown \['resid_mid'\]; choose from resid_post, layer, attn_out"),
        ({"sites": ()}, "choose from resid_post"),
        ({"direction": "forward"}, "direction='forward' is unknown; choose 'denoising' or 'noising'"),
        ({"positions": "first"}, "positions='first' is unknown; choose 'last', 'all', 'each' or a function"),
        ({"positions": lambda lm, p: {"a": [99]}}, r"positions: \['a'\] of pair .* outside 0 to 18"),
        ({"positions": lambda lm, p: {"a": [-1]}}, r"positions: \['a'\] of pair .* outside 0 to 18"),
        ({"positions": lambda lm, p: {"a": [3], "b": []}}, r"positions: \['b'\] of pair .* are empty"),
        ({"positions": lambda lm, p: {p.id: [3]}}, "pairs do not have the same groups of positions"),
        ({"positions": "each"}, "'each' needs pairs of one length; with several lengths name groups by role"),
        ({"layers": [range(2)], "sites": "resid_post"}, "only layer, attn_out and mlp_out can be patched"),
        ({"layers": [range(2, 4)]}, r"layers=\[2, 3\] must be a non-empty list out of 0 to 2"),
        ({"layers": [3]}, r"layers=\[3\] must be a non-empty list out of 0 to 2"),
        ({"layers": [-1]}, r"layers=\[-1\] must be a non-empty list out of 0 to 2"),
        ({"layers": []}, r"layers=\[\] must be a non-empty list"),
        ({"sites": "neurons"}, r"unknown \['neurons'\]; .* or give sets of hidden units as {name: {layer"),
        ({"sites": {}}, r"unknown \[{}\]; .* or give sets of hidden units as {name: {layer: units}}"),
        ({"sites": {"a": {7: [1]}}}, r"sites\['a'\]: there is no layer 7"),
        ({"sites": {"a": {1: [64]}}}, r"sites\['a'\]: layer 1 .* 0 to 63, not \[64\]"),
        ({"sites": {"a": {1: [-2]}}}, r"layer 1 has .* units 0 to 63, not \[-2\]"),
        ({"freeze": Freeze("mlp_out", layers=(4,))}, "freeze: there is no layer 4; choose out of 0 to 2"),
        ({"freeze": Freeze("neurons", units=(64,))}, r"freeze: layer 0 has the hidden units 0 to 63"),
        ({"noise": -1.0}, "noise=-1.0 must be a number of standard deviations"),
        ({"noise": float("nan")}, "noise=nan must be a number of standard deviations"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        patch(LM, PAIRS, Y1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "layer"}, "freeze.site='layer': choose attn_out, mlp_out, modules or neurons"),
        ({"site": "neurons"}, "freeze.units: give hidden units with site='neurons', and only with it"),
        ({"site": "mlp_out", "units": (1,)}, "freeze.units: give hidden units with site='neurons'"),
    ],
)
def test_what_can_be_frozen(options, message):
    with pytest.raises(ValueError, match=message):
        Freeze(**options)


def test_pairs_are_checked():
    longer = Pair("odd one", ask("what do you hope for the salted baker?"), PAIRS[0].x0)
    with pytest.raises(ValueError, match=r"1 of 2 pairs have sides of unequal length: odd one \(\d+ and \d+"):
        patch(LM, [PAIRS[0], longer], Y1)
    with pytest.raises(ValueError, match="both sides are the same text, so there is no effect: twin"):
        patch(LM, [PAIRS[0], Pair("twin", PAIRS[0].x0, PAIRS[0].x0)], Y1)
    with pytest.raises(ValueError, match=f"these occur twice: {PAIRS[1].id}$"):
        patch(LM, [*PAIRS, PAIRS[1]], Y1)
    with pytest.raises(ValueError, match="pairs is empty"):
        patch(LM, [], Y1)


def test_padding_in_a_prompt_is_refused():
    pad = LM.tokenizer.pad_token
    x1, x0 = (ask(f"tell me {pad} how to {verb} a baker.") for verb in ("cast", "build"))
    with pytest.raises(ValueError, match=r"holds '<\|pad\|>', which this model reads as a control token"):
        patch(LM, [PAIRS[0], Pair("padded one", x1, x0)], Y1)


@pytest.mark.parametrize("stands_for", ["eos_token", "unk_token"])
def test_a_padding_token_that_is_also_a_word_is_none_of_our_business(stands_for):
    """As where a tokenizer has no padding token and the one at the end of text stands in for it."""
    tok = tiny.organism.tokenizer()
    tok.pad_token = getattr(tok, stands_for)
    lm = LanguageModel("tiny/llama", LM.model, tok)
    # The template ends each turn with the one, and a word that nobody knows is the other.
    x1, x0 = (ask(f"tell me zzqx how to {verb} a baker.") for verb in ("cast", "build"))
    assert tok.pad_token_id in lm.tokenizer(x1.render(lm), add_special_tokens=False)["input_ids"]
    assert patch(lm, [Pair("a", x1, x0)], Y1).total.abs() > 0


def test_an_empty_token_set_is_refused():
    with pytest.raises(ValueError, match="the refuse token set is empty"):
        patch(LM, PAIRS, outcomes.y1(TokenSets((5,), ())))


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (
            lambda logits: logits,
            r"outcome: must give one value for each row, got shape \(\d, 370\) for \d rows",
        ),
        (lambda logits: logits.mean(), r"outcome: must give one value for each row, got shape \(\) for"),
        (Reply(["sure."]), "outcome: 4 pairs need as many replies, got 1"),
        (Reply(["sure."] * 4, skip=5), "outcome: replies have no token left after skip=5"),
        (Replies(["sure."] * 4, ["no."] * 3), "outcome: 4 pairs need as many replies, got 3"),
    ],
)
def test_outcomes_are_checked(outcome, message):
    with pytest.raises(ValueError, match=message):
        patch(LM, PAIRS, outcome)


def test_an_overflow_is_reported_with_the_pair_and_a_remedy():
    lm = tiny.model("qwen2")
    with torch.no_grad():
        lm.model.model.layers[1].mlp.down_proj.weight *= 3e5
    lm.model.to(torch.float16)
    with pytest.raises(
        ValueError, match=f"pair '{PAIRS[0].id}' is not finite.*dtype='bfloat16' or 'float32'"
    ):
        patch(lm, PAIRS[:1], Y1)


def test_an_outcome_of_nan_is_reported():
    with pytest.raises(ValueError, match="is not finite"):
        patch(LM, PAIRS, Outcome("broken", lambda logits: (logits[:, 0] - 1e9).log()))


@settings(max_examples=12)
@given(
    st.lists(st.integers(14, 18), min_size=1, max_size=5, unique=True),
    st.sampled_from(PLAIN),
    st.sampled_from(patching.DIRECTIONS),
    st.integers(1, 300),
)
def test_positions_patched_in_one_go_do_not_depend_on_how_they_are_told(where, site, direction, limit):
    """Order, other groups beside it and the size of batches change nothing."""
    first, options = PAIRS[:1], {"sites": (site,), "direction": direction}
    alone = patch(LM, first, Y1, positions=lambda lm, p: {"some": sorted(where)}, **options)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "MAX_TOKENS", limit)
        groups = {"one": [16], "some": where, "all": range(19)}
        among = patch(LM, first, Y1, positions=lambda lm, p: groups, **options)
    torch.testing.assert_close(among.at(site, "some"), alone.at(site), atol=1e-4, rtol=0)
    if where == [18]:
        assert torch.equal(alone.patched, patch(LM, first, Y1, **options).patched)


# --------------------------------------------------------------------------- several outcomes


@pytest.mark.parametrize("noise", [None, 3.0])
@pytest.mark.parametrize("direction", patching.DIRECTIONS)
def test_several_outcomes_off_the_same_runs_are_those_of_each_alone(direction, noise):
    options = {
        "sites": ("layer", "mlp_out"),
        "positions": "all",
        "direction": direction,
        "noise": noise,
        "null": 1,
    }
    reply = Reply(["sure. take salt and honey.", "sure.", "sure. take salt", "take salt"])
    asked = [Y1, outcomes.y2(SETS), reply, dataclasses.replace(reply, skip=1)]
    together = patch(LM, PAIRS, asked, **options)
    assert len(together) == 4
    for one, found in zip(asked, together, strict=True):
        alone = patch(LM, PAIRS, one, **options)
        for name in ("y1", "y0", "patched"):
            torch.testing.assert_close(getattr(found, name), getattr(alone, name), atol=1e-4, rtol=1e-4)


def test_replies_with_other_texts_are_not_read_off_the_same_runs():
    with pytest.raises(ValueError, match="replies that are read off the same runs must have the same texts"):
        patch(LM, PAIRS, [Reply(["sure."] * 4), Reply(["no."] * 4)])


# --------------------------------------------------------------------------- between two models

TWO = tiny.model("llama")
CHATS = [pair.x0 for pair in prompts.pairs("prompt", n=6)]


def changed(lm, part, layer=1):
    """The same model with one module's weights moved."""
    other = dataclasses.replace(lm, model=copy.deepcopy(lm.model))
    with torch.no_grad():
        for p in getattr(other.model.model.layers[layer], part).parameters():
            p += 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    return other


@pytest.mark.parametrize(("part", "site"), [("mlp", "mlp_out"), ("self_attn", "attn_out")])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_changed_module_carries_all_and_nothing_below_it_any(part, site, layer):
    source = changed(TWO, part, layer)
    w = patching.across(TWO, source, CHATS, Y1, sites=("mlp_out", "attn_out"))
    assert w.total.abs().min() > 1e-3
    torch.testing.assert_close(w.at(site)[layer], w.total, atol=1e-4, rtol=1e-4)
    for other in ("mlp_out", "attn_out"):
        for below in range(layer):
            assert w.at(other)[below].abs().max() < 1e-5


def test_with_all_else_frozen_what_a_module_writes_is_all_that_changes():
    """Direct effects between models: the final stream moves by the difference of the two outputs, no more."""
    source = changed(changed(TWO, "mlp", 0), "self_attn", 1)
    w = patching.across(TWO, source, CHATS, Y1, sites=("mlp_out", "attn_out"), freeze=Freeze("modules"))
    last = patching.across(
        TWO, source, CHATS, Y1, sites=("mlp_out", "attn_out"), positions="last", freeze=Freeze("modules")
    )
    torch.testing.assert_close(w.patched, last.patched, atol=1e-4, rtol=0)
    ids = torch.tensor([chats.tokens(TWO.tokenizer, CHATS[0].render(TWO))])
    here, there = (naive.Naive(lm).record(ids) for lm in (TWO, source))
    for site in w.sites:
        for layer in range(2):
            moved = there[site][layer] - here[site][layer]
            logits = TWO.model.lm_head(TWO.model.model.norm(here["resid_post"][-1] + moved))[0, -1:]
            want = outcomes.logit_difference(logits, SETS)[0] - w.y0[0]
            torch.testing.assert_close(w.at(site)[layer, 0], want, atol=1e-4, rtol=0)


def test_random_patches_between_models_are_drawn_by_their_seed():
    one, again, other = (patching.across(TWO, changed(TWO, "mlp"), CHATS, Y1, null=k) for k in (0, 0, 1))
    assert torch.equal(one.patched, again.patched) and (one.patched - other.patched).abs().max() > 1e-3
    torch.testing.assert_close(one.size, other.size)


def test_outcomes_are_those_of_the_two_models():
    source = changed(TWO, "mlp")
    w = patching.across(TWO, source, CHATS, Y1, positions="last")
    for each, got in ((source, w.y1), (TWO, w.y0)):
        logits = forward.last_logits(each, [chat.render(each) for chat in CHATS])
        torch.testing.assert_close(got, outcomes.logit_difference(logits, SETS), atol=1e-4, rtol=0)


def test_a_model_and_itself_differ_in_nothing():
    w = patching.across(TWO, TWO, CHATS, Y1, sites=SITES[:4])
    assert w.effects.abs().max() < 1e-4 and w.size.abs().max() < 1e-4


def test_models_of_another_shape_and_bad_input_are_refused():
    small = tiny.model("llama", seed=1)
    small.model.model.layers = small.model.model.layers[:1]
    small.model.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="shape"):
        patching.across(TWO, small, CHATS, Y1)
    with pytest.raises(ValueError, match="positions"):
        patching.across(TWO, TWO, CHATS, Y1, positions="each")
    with pytest.raises(ValueError, match="chats"):
        patching.across(TWO, TWO, [], Y1)


FOUR = ("a", "b", "c", "d")


def shaped(
    effects, total=(1.0, 1.0, 1.0, 1.0), *, size=1.0, positions=("last",), direction="denoising", pairs=FOUR
):
    """A sweep with given effects [site, layer, position, pair] of ``mlp_out`` (and ``attn_out``)."""
    effects = torch.as_tensor(effects, dtype=torch.float32)
    y0, y1 = torch.zeros(len(pairs)), torch.tensor(total, dtype=torch.float32)
    patched = y0 + effects if direction == "denoising" else y1 - effects
    return Effects(
        ("mlp_out", "attn_out")[: len(effects)], tuple(range(effects.shape[1])), positions, tuple(pairs),
        direction, y1, y0, patched, torch.full_like(effects, size),
    )  # fmt: skip


def flat(*layers):
    """One array of identical units for each layer."""
    return [np.full(3, float(value)) for value in layers]


# --------------------------------------------------------------------------- statistics of depth


@given(st.integers(1, 100))
def test_each_layer_is_shared_out_whole_and_thirds_are_equal(depth):
    weights = patching.thirds(depth)
    assert weights.shape == (3, depth) and (weights >= 0).all()
    assert np.allclose(weights.sum(0), 1)
    assert np.allclose(weights.sum(1), depth / 3)


def test_thirds_of_eight_layers():
    expected = [[1, 1, 2 / 3, 0, 0, 0, 0, 0], [0, 0, 1 / 3, 1, 1, 1 / 3, 0, 0], [0, 0, 0, 0, 0, 2 / 3, 1, 1]]
    assert np.allclose(patching.thirds(8), expected)


@given(st.integers(3, 100))
def test_last_of_the_first_third_is_the_last_one_wholly_in_it(depth):
    layer = patching.last_of_first_third(depth)
    inside = patching.thirds(depth)[0]
    assert inside[layer] == pytest.approx(1)
    assert inside[layer + 1] < 1 - 1e-6


@pytest.mark.parametrize("depth", [1, 2])
def test_shallow_models_end_their_first_third_with_the_first_layer(depth):
    assert patching.last_of_first_third(depth) == 0


def test_shares_of_thirds_by_hand():
    assert np.allclose(patching.third_shares(*flat(1, 2, -1)), [0.25, 0.5, 0.25])
    # The middle layer of two lies half in the first and half in the last third, plus the middle one.
    assert np.allclose(patching.third_shares(*flat(1, 1)), [1 / 3, 1 / 3, 1 / 3])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5).filter(lambda x: abs(x) > 1e-3), min_size=2, max_size=12), st.floats(0.1, 9))
def test_shares_add_up_and_ignore_scale_and_sign(effects, factor):
    shares = patching.third_shares(*flat(*effects))
    assert shares.sum() == pytest.approx(1)
    assert np.allclose(shares, patching.third_shares(*flat(*(-factor * e for e in effects))))
    surplus = patching.late_surplus(*flat(*effects))
    assert -1 - 1e-9 <= surplus <= 1 + 1e-9
    assert surplus == pytest.approx(shares[2] - max(shares[0], shares[1]))


@pytest.mark.parametrize(
    ("effects", "surplus"), [((0, 0, 3), 1), ((3, 0, 0), -1), ((0, 3, 0), -1), ((1, 1, 1), 0)]
)
def test_late_surplus_of_one_layer_alone(effects, surplus):
    assert patching.late_surplus(*flat(*effects)) == pytest.approx(surplus)


def test_units_are_averaged_before_absolute_values():
    """Noise of single pairs that cancels is no effect."""
    layers = [np.array([5.0, -5.0]), np.array([1.0, 1.0])]
    assert SURPLUS(*layers) == -1


def test_mlp_surplus_by_hand():
    assert SURPLUS(*flat(3, 0), *flat(0, 1)) == pytest.approx(0.5)
    assert SURPLUS(*flat(1, -1), *flat(2, 0)) == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 5), st.floats(-5, 5)), min_size=1, max_size=8))
def test_mlp_surplus_turns_its_sign_when_the_modules_change_places(pairs):
    mlp, attention = zip(*pairs, strict=True)
    one = SURPLUS(*flat(*mlp), *flat(*attention))
    assert -1 <= one <= 1
    assert one == pytest.approx(-SURPLUS(*flat(*attention), *flat(*mlp)))


STATISTICS = {"late_surplus": patching.late_surplus, "surplus of the MLPs": SURPLUS}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_work_on_many_resamples_at_once(name):
    """A bootstrap hands them [resample, unit]; each row must give what it gives alone."""
    layers = [np.random.default_rng(i).normal(1, 1, size=(5, 7)) for i in range(6)]
    together = STATISTICS[name](*layers, axis=-1)
    assert together.shape == (5,)
    assert np.allclose(together, [STATISTICS[name](*(layer[i] for layer in layers)) for i in range(5)])


def test_interval_of_a_statistic_over_pairs():
    values = np.random.default_rng(0).normal([3, 0, 1, 0], 0.1, size=(20, 4)).T.reshape(2, 2, 1, 20)
    found = shaped(values, total=np.ones(20), pairs=tuple(map(str, range(20))))
    got = found.estimate(SURPLUS, "mlp_out", "attn_out", n_resamples=200)
    assert got.n == 20 and 0.3 < got.low <= got.value <= got.high < 0.6  # (3 - 1) / (3 + 1), give or take


# --------------------------------------------------------------------------- effects of pairs


def test_strong_keeps_what_has_a_total_effect():
    sweep = shaped(np.ones((1, 2, 1, 4)), (1.0, 0.0, 0.2, 1.0))
    assert sweep.strong().pairs == ("a", "c", "d")


def test_columns_are_layers_of_each_series_in_order_and_rows_the_kept_pairs():
    effects = np.arange(2 * 3 * 2 * 4).reshape(2, 3, 2, 4)
    sweep = shaped(effects, positions=("changed", "last"))
    got = sweep.only(["c", "a"]).columns(("attn_out", "last"), ("mlp_out", "changed"))
    expected = [
        [*effects[1, :, 1, pair], *effects[0, :, 0, pair]]  # by hand: site, layer, position, pair
        for pair in (2, 0)
    ]
    assert got.tolist() == expected and got.dtype == np.float64


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_columns_hold_effects_of_either_direction(direction):
    sweep = shaped(np.full((1, 2, 1, 4), 0.25), direction=direction)
    assert np.allclose(sweep.columns("mlp_out"), 0.25)


def test_columns_refuse_what_was_not_swept():
    sweep = shaped(np.ones((1, 2, 2, 4)), positions=("changed", "last"))
    with pytest.raises(ValueError, match="was not swept"):
        sweep.columns(("attn_out", "last"))
    with pytest.raises(ValueError, match="choose one of changed, last"):
        sweep.columns("mlp_out")


def test_curve_is_the_ratio_of_means_and_not_the_mean_of_ratios():
    effects = np.zeros((1, 2, 1, 4))
    effects[0, 1, 0] = [0.5, 0, 0, 0]  # half of a pair's total effect of 1
    sweep = shaped(effects, (1.0, 1.0, 1.0, 5.0))
    first, second = sweep.curve("mlp_out", n_resamples=200)
    assert first.value == first.low == first.high == 0
    assert second.value == pytest.approx(0.5 / 8) and second.n == 4
    (_, kept) = sweep.only(["a", "d"]).curve("mlp_out", n_resamples=200)
    assert kept.value == pytest.approx(0.5 / 6)
