"""Patched runs: whatever is reused, the numbers are those of whole forward passes."""

import copy
from unittest import mock

import naive
import pytest
import tiny
import torch
import transformer_lens.patching as reference
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from harmlens.asking import pairs as prompts
from harmlens.flow import engine, outcomes, patching
from harmlens.flow.engine import SITES, Cell, Freeze, check_partial, run_cells
from harmlens.flow.outcomes import Replies, Reply, TokenSets
from harmlens.flow.record import record_pairs
from harmlens.models import parts as decoder
from harmlens.models.chats import tokens
from harmlens.models.forward import LanguageModel

SETS = TokenSets((5, 9, 20), (7, 31))
Y1 = outcomes.y1(SETS)
UNITS = {0: (1, 5, 9), 1: (0, 2, 63), 2: tuple(range(20, 50))}
PAIRS = prompts.pairs("prompt", n=4)  # of three lengths; the last word that differs stands late
BEHAVIOUR = prompts.pairs("behaviour", n=3)  # they differ early


def value(logits, _=0):
    return outcomes.logit_difference(logits[-1], SETS)


def positions(lm, pairs, how):
    """What naive.sweep takes, and sweep's own argument."""
    lengths = [naive.ids_of(lm, pair)[0].shape[1] for pair in pairs]
    return {
        "last": lambda k: [[lengths[k] - 1]],
        "all": lambda k: [range(lengths[k])],
        "each": lambda k: [[i] for i in range(lengths[k])],
    }.get(how) or (lambda k: list(how(lm, pairs[k]).values()))


def check(lm, pairs, how, tolerance=1e-4, sites=(*SITES, "neurons"), **options):
    """Compare with whole forward passes; at least some effect must be far above the tolerance."""
    cells = [(site, {}) for site in sites if site not in ("head", "neurons")]
    cells += naive.heads(lm) if "head" in sites else []
    cells += [("neurons", UNITS)] if "neurons" in sites else []
    units = {"some": {layer: u for layer, u in UNITS.items() if layer < decoder.stack(lm).depth}}
    asked = [units if site == "neurons" else site for site in sites]
    found = patching.patch(lm, pairs, Y1, sites=asked, positions=how, **options)
    wanted = naive.sweep(lm, pairs, value, cells, positions(lm, pairs, how), **options)
    for got, want in zip((found.y1, found.y0, found.patched), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=0)
    assert found.effects.abs().amax() > 100 * tolerance
    return found


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def lm(request):
    """Three blocks, so that a patch has something below and something above."""
    return tiny.model(request.param, layers=3)


# --------------------------------------------------------------------------- whole passes, with hooks


@pytest.mark.parametrize("direction", patching.DIRECTIONS)
def test_every_site_at_the_last_position(lm, direction):
    check(lm, PAIRS[:1], "last", direction=direction)


def test_every_site_at_all_positions(lm):
    """Two pairs of one length, which differ early."""
    check(lm, BEHAVIOUR[1:], "all", direction="noising")


def test_every_site_by_role(lm):
    check(lm, PAIRS[3:], prompts.roles, sites=(*SITES[:4], "neurons"))


def test_noising_by_role_where_prompts_differ_early():
    check(tiny.model("gemma2", layers=3), BEHAVIOUR[:2], first_and_last, direction="noising")


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
def test_each_position(architecture):
    sites = ("resid_post", "layer", "attn_out", "mlp_out")
    found = check(tiny.model(architecture), BEHAVIOUR[1:2], "each", sites=sites)
    differ = prompts.roles(tiny.model(architecture), BEHAVIOUR[1])["changed"][0]
    assert (found.effects[:, :, :differ] == 0).all()  # both runs are the same before their first difference
    assert (found.size[:, :, :differ] == 0).all()


def test_eager_attention():
    lm = tiny.model("qwen3", layers=3)
    lm.model.set_attn_implementation("eager")
    check(lm, BEHAVIOUR[:2], prompts.roles)


def test_positions_may_come_in_any_order():
    lm = tiny.model()
    shuffled = patching.patch(lm, PAIRS, Y1, positions=lambda lm, p: {"a": [17, 14, 16, 17], "b": (15,)})
    ordered = patching.patch(lm, PAIRS, Y1, positions=lambda lm, p: {"a": [14, 16, 17], "b": [15]})
    torch.testing.assert_close(shuffled.patched, ordered.patched, atol=1e-5, rtol=0)
    assert shuffled.effects[:, :, 0].abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox"])
def test_half_precision_is_as_good_as_a_whole_pass_in_half_precision(architecture, dtype):
    """Off from float32 by no more than twice as much as plain forward passes are."""
    exact, half = tiny.model(architecture, layers=3), tiny.model(architecture, layers=3)
    half.model.to(dtype)
    sites, pairs = ("resid_post", "layer", "attn_out", "mlp_out"), PAIRS[:3]
    cells, where = [(site, {}) for site in sites], positions(exact, pairs, "last")
    truth = naive.sweep(exact, pairs, value, cells, where)[2]
    plain = naive.sweep(half, pairs, value, cells, where)[2]
    found = patching.patch(half, pairs, Y1, sites=sites)
    assert found.patched.dtype == torch.float32
    off, expected = (found.patched - truth).abs(), (plain - truth).abs()
    assert off.max() <= 2 * expected.max()
    assert off.mean() <= 1.5 * expected.mean()
    assert found.effects.std() > 3 * expected.mean()  # and the effects can be told from rounding


# --------------------------------------------------------------------------- TransformerLens


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.model().tokenizer.save_pretrained(folder)
    return folder


def same_length(lm, pairs, n=2):
    first = naive.ids_of(lm, pairs[0])[0].shape
    return [pair for pair in pairs if naive.ids_of(lm, pair)[0].shape == first][:n]


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [(name, "eager") for name in tiny.ARCHITECTURES] + [("llama", "sdpa"), ("mistral", "sdpa")],
)
@torch.no_grad()
def test_transformer_lens_cell_by_cell(architecture, kind, tokenizer_folder):
    lm = tiny.model(architecture)
    lm.model.set_attn_implementation(kind)
    lm.model.config.architectures = [type(lm.model).__name__]
    bridge = TransformerBridge.boot_transformers(
        "tiny", hf_model=copy.deepcopy(lm.model), tokenizer=AutoTokenizer.from_pretrained(tokenizer_folder)
    )
    pairs = same_length(lm, prompts.pairs("behaviour"))
    x1, x0 = (torch.cat(side) for side in zip(*(naive.ids_of(lm, pair) for pair in pairs), strict=True))
    _, cache = bridge.run_with_cache(x1)
    ours = patching.patch(
        lm, pairs, lambda logits: logits[:, 17], sites=("resid_post", "attn_out", "mlp_out"), positions="each"
    )
    assert ours.effects.std() > 0.01
    for site, loop in (
        ("resid_post", reference.get_act_patch_resid_pre),
        ("attn_out", reference.get_act_patch_attn_out),
        ("mlp_out", reference.get_act_patch_mlp_out),
    ):
        theirs = loop(bridge, x0, cache, lambda logits: logits[:, -1, 17], reduce="none").values
        mine = ours.patched[ours.sites.index(site)]
        if site == "resid_post":  # theirs is the stream before a block, ours behind it
            mine, theirs = mine[:-1], theirs[1:]
        assert (mine - theirs).abs().max() <= 1e-4, site


@torch.no_grad()
def test_heads_of_transformer_lens(tokenizer_folder):
    lm = tiny.model("qwen2")
    lm.model.set_attn_implementation("eager")
    lm.model.config.architectures = [type(lm.model).__name__]
    bridge = TransformerBridge.boot_transformers(
        "tiny", hf_model=copy.deepcopy(lm.model), tokenizer=AutoTokenizer.from_pretrained(tokenizer_folder)
    )
    pairs = same_length(lm, PAIRS)
    x1, x0 = (torch.cat(side) for side in zip(*(naive.ids_of(lm, pair) for pair in pairs), strict=True))
    _, cache = bridge.run_with_cache(x1)
    theirs = reference.get_act_patch_attn_head_out_by_pos(
        bridge, x0, cache, lambda logits: logits[:, -1, 17], reduce="none"
    ).values  # layer, position, head, pair
    ours = patching.patch(lm, pairs, lambda logits: logits[:, 17], sites="head", positions="each").patched
    torch.testing.assert_close(ours, theirs.permute(2, 0, 1, 3), atol=1e-4, rtol=0)


# --------------------------------------------------------------------------- windows and freezing


@pytest.mark.parametrize("direction", patching.DIRECTIONS)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox", "phi3"])
def test_windows(architecture, direction):
    lm = tiny.model(architecture, layers=4)
    sites = ("layer", "attn_out", "mlp_out")
    check(lm, PAIRS[1:3], first_and_last, sites=sites, layers=naive.windows(4, 3), direction=direction)


def test_a_window_moves_what_its_layers_move():
    lm = tiny.model(layers=4)
    options = {"sites": ("layer", "attn_out", "mlp_out"), "positions": "all"}
    wide = patching.patch(lm, PAIRS, Y1, layers=naive.windows(4, 3), **options).size
    single = patching.patch(lm, PAIRS, Y1, **options).size
    for layer in range(4):
        near = single[:, max(0, layer - 1) : layer + 2]
        torch.testing.assert_close(wide[:, layer], near.square().sum(1).sqrt(), atol=1e-3, rtol=1e-4)


FREEZES = [
    Freeze("attn_out"),
    Freeze("mlp_out"),
    Freeze("mlp_out", layers=(1,)),
    Freeze("attn_out", layers=(2,)),
    Freeze("neurons", units=tuple(range(0, 64, 2))),
    Freeze("neurons", layers=(1, 2), units=(3, 4, 60)),
    Freeze("modules"),
    Freeze("mlp_out", here=True),
    Freeze("modules", here=True),
    Freeze("neurons", units=(3, 4, 60), here=True),
]


def first_and_last(lm, pair):
    found = prompts.roles(lm, pair)
    return {name: found[name] for name in ("changed", "last")}


@pytest.mark.parametrize("freeze", FREEZES, ids=lambda f: f"{f.site} {f.layers} {f.here}")
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
def test_frozen_modules(architecture, freeze):
    """Also the MLP of the block whose attention is patched, unless the two run in parallel."""
    lm, sites = tiny.model(architecture, layers=3), (*SITES[:4], "neurons")
    frozen = check(lm, PAIRS[1:2], first_and_last, freeze=freeze, sites=sites)
    free = patching.patch(lm, PAIRS[1:2], Y1, sites=(*SITES[:4], {"some": UNITS}), positions=first_and_last)
    assert (frozen.patched - free.patched).abs().max() > 1e-3


@pytest.mark.parametrize("freeze", FREEZES[:2], ids=lambda f: f.site)
def test_a_patched_head_writes_into_its_own_attention_output_though_that_is_frozen(freeze):
    check(tiny.model(layers=3), PAIRS[1:2], "last", freeze=freeze, sites=("head",))


def test_frozen_modules_in_a_window_are_patched_where_the_window_says():
    for freeze in FREEZES[:3]:
        for direction in patching.DIRECTIONS:
            check(
                tiny.model("qwen3", layers=4), PAIRS[1:2], first_and_last, sites=("attn_out", "mlp_out"),
                layers=naive.windows(4, 3), freeze=freeze, direction=direction,
            )  # fmt: skip


def test_freezing_everything_downstream_leaves_the_direct_path():
    """With every attention and MLP output held, a patch adds to the final residual stream and no more."""
    lm = tiny.model(layers=3)
    both = patching.patch(lm, PAIRS[1:3], Y1, sites="attn_out", freeze=Freeze("mlp_out"))
    all_held = patching.patch(lm, PAIRS[1:3], Y1, sites="attn_out", positions="all", freeze=Freeze("modules"))
    torch.testing.assert_close(all_held.patched[0, -1], both.patched[0, -1], atol=1e-4, rtol=0)
    net = naive.Naive(lm)
    for k, pair in enumerate(PAIRS[1:3]):
        x1, x0 = (net.record(ids) for ids in naive.ids_of(lm, pair))
        moved = x1["attn_out"][-1][:, -1] - x0["attn_out"][-1][:, -1]
        logits = lm.model.lm_head(lm.model.model.norm(x0["resid_post"][-1][:, -1] + moved))
        want = outcomes.logit_difference(logits[0], SETS)
        torch.testing.assert_close(both.patched[0, -1, 0, k], want, atol=1e-4, rtol=0)


# --------------------------------------------------------------------------- random directions

NULLS = [
    {"null": 3, "sites": ("resid_post", "layer", "attn_out", "head")},
    {"null": 3, "sites": ("layer", "attn_out", "mlp_out"), "layers": naive.windows(3, 3)},
    {"null": 3, "sites": {"some": UNITS}},
    {"freeze": Freeze("attn_out", null=5), "sites": ("resid_post", "mlp_out")},
    {"freeze": Freeze("mlp_out", null=5), "sites": ("attn_out", "layer")},
    {"freeze": Freeze("neurons", null=5, units=(1, 2, 3)), "sites": ("attn_out", "layer")},
    {"noise": 2.0, "sites": ("layer", "mlp_out")},
]


@pytest.mark.parametrize("options", NULLS, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items())[:60])
def test_random_draws_depend_on_the_seed_and_the_pair_alone(options):
    lm = tiny.model(layers=3)
    options = {**options, "positions": first_and_last}
    first = patching.patch(lm, PAIRS, Y1, **options)
    for limit in (30, 100):
        with mock.patch.object(engine, "MAX_TOKENS", limit):
            again = patching.patch(lm, PAIRS, Y1, **options)
        torch.testing.assert_close(again.patched, first.patched, atol=1e-4, rtol=0)
        torch.testing.assert_close(again.size, first.size, atol=1e-4, rtol=1e-5)
    back = patching.patch(lm, PAIRS[::-1], Y1, **options)
    torch.testing.assert_close(back.patched.flip(-1), first.patched, atol=1e-4, rtol=0)
    few = patching.patch(lm, PAIRS[2:], Y1, **options)
    torch.testing.assert_close(few.patched, first.patched[..., 2:], atol=1e-4, rtol=0)
    if "noise" not in options:
        other = {**options, "null": 4} if "null" in options else options
        if "freeze" in options:
            other = {**options, "freeze": Freeze(**{**vars(options["freeze"]), "null": 6})}
        assert (patching.patch(lm, PAIRS, Y1, **other).patched - first.patched).abs().max() > 1e-2


def test_a_random_direction_is_as_long_as_the_patch():
    lm = tiny.model(layers=3)
    options = {"sites": (*SITES, {"some": UNITS}), "positions": prompts.roles}
    real = patching.patch(lm, PAIRS, Y1, **options)
    for seed in (0, 1):
        null = patching.patch(lm, PAIRS, Y1, null=seed, **options)
        torch.testing.assert_close(null.size, real.size)
        assert (null.patched - real.patched).abs().max() > 0.1
    assert (real.size > 0).any()


def test_the_size_is_the_norm_of_what_is_moved():
    lm = tiny.model(layers=3)
    found = patching.patch(lm, PAIRS[:1], Y1, sites=("resid_post", "attn_out", "mlp_out"), positions="all")
    x1, x0 = (naive.Naive(lm).record(ids) for ids in naive.ids_of(lm, PAIRS[0]))
    for i, site in enumerate(found.sites):
        for layer in range(3):
            want = (x1[site][layer] - x0[site][layer]).norm()
            torch.testing.assert_close(found.size[i, layer, 0, 0], want, atol=1e-4, rtol=1e-4)


def test_every_layer_of_a_window_is_moved_at_random():
    """Behind the last block, a window over all blocks has moved the stream by the sum of three steps."""
    lm = tiny.model(layers=3)
    group, last = recorded(lm, PAIRS[:1]), prompts.roles(lm, PAIRS[0])["last"][0]
    column, seen = last - group.x0.offset, []
    group.outcome = lambda resid, index: seen.append(resid[:, -1]) or resid[:, -1, 0]
    run_cells(group, [Cell("layer", 0, 2, (column,))], null=3)
    step, drawn = torch.zeros(1, 32), engine._Patching(group, group.x0, group.x1, None, 3).drawn
    for layer in range(3):
        own = [run.resid[layer + 1] - run.resid[layer] for run in (group.x1, group.x0)]
        far = (own[0] - own[1])[:, column].norm()
        step += far * drawn((3, "layer", layer, ()), [column], 32)[:, 0]
    torch.testing.assert_close(seen[-1], group.x0.resid[-1][:, column] + step, atol=1e-4, rtol=1e-4)


def test_a_null_draw_does_not_depend_on_what_else_is_swept():
    lm = tiny.model(layers=3)
    alone = patching.patch(lm, PAIRS, Y1, sites="mlp_out", null=1, layers=[1])
    among = patching.patch(lm, PAIRS, Y1, sites=("attn_out", "mlp_out"), null=1, positions=prompts.roles)
    torch.testing.assert_close(alone.at("mlp_out")[0], among.at("mlp_out", "last")[1], atol=1e-5, rtol=0)


def test_the_null_of_a_freeze_moves_as_far_as_freezing():
    """Watched from outside: how far the output is from what it is live and from what it is frozen."""
    lm = tiny.model(layers=2)
    seen = {}
    for name, freeze in (
        ("live", None), ("frozen", Freeze("mlp_out")), ("null", Freeze("mlp_out", null=0)),
    ):  # fmt: skip
        group = recorded(lm, PAIRS[:1])
        kept = []
        handle = lm.model.model.layers[1].register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
        run_cells(group, [Cell("resid_post", 0, 0, (group.x0.length - group.x0.offset - 1,))], freeze=freeze)
        handle.remove()
        seen[name] = kept[-1][0, -1]
    torch.testing.assert_close(
        (seen["null"] - seen["live"]).norm(), (seen["frozen"] - seen["live"]).norm(), atol=1e-3, rtol=1e-3
    )
    assert (seen["null"] - seen["frozen"]).norm() > 0.1


# --------------------------------------------------------------------------- batches


@pytest.mark.parametrize("limit", [1, 37])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox"])
def test_batches_change_nothing(architecture, limit, monkeypatch):
    lm = tiny.model(architecture, layers=3)
    fixed = {"sites": SITES[:4], "positions": prompts.roles}
    whole = patching.patch(lm, PAIRS, Y1, **fixed)
    monkeypatch.setattr(engine, "MAX_TOKENS", limit)
    parts = patching.patch(lm, PAIRS, Y1, **fixed)
    for name in ("y1", "y0", "patched", "size"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("limit", [20, 100, 400])
def test_memory_is_bounded(limit, monkeypatch):
    """No block sees more than so many tokens of patched runs, except for a single row's."""
    lm, seen = tiny.model(layers=3), []
    group = recorded(lm, BEHAVIOUR)
    for block in lm.model.model.layers:
        block.register_forward_hook(lambda m, i, o: seen.append(o.shape[0] * o.shape[1]))
    columns = range(group.differs, group.x0.length - group.x0.offset)
    row = len(columns)
    patches = [Cell("resid_post", layer, layer, (c,)) for layer in range(3) for c in columns]
    monkeypatch.setattr(engine, "MAX_TOKENS", limit)
    run_cells(group, patches)
    assert max(seen) <= max(limit, row)


def recorded(lm: LanguageModel, pairs, outcome=Y1, **options):
    """The first group of pairs, recorded at all positions."""
    return next(record_pairs(lm, decoder.stack(lm), pairs, outcome, "all", **options))


def test_nothing_is_kept_for_gradients():
    lm = tiny.model()
    assert all(p.requires_grad for p in lm.model.parameters())
    group = recorded(lm, PAIRS)
    check_partial(group)
    values, sizes = run_cells(group, [Cell("mlp_out", 0, 0, (group.x0.length - group.x0.offset - 1,))])
    assert not values.requires_grad and not sizes.requires_grad


def test_the_model_is_left_as_it_was():
    lm = tiny.model(layers=3)
    before = lm.model(torch.tensor([[1, 2, 3]])).logits
    for options in NULLS:
        patching.patch(lm, PAIRS, Y1, **options)
    with pytest.raises(ZeroDivisionError):
        patching.patch(lm, PAIRS, lambda logits: 1 / 0, freeze=Freeze("mlp_out"))
    assert torch.equal(lm.model(torch.tensor([[1, 2, 3]])).logits, before)
    for module in lm.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)


# --------------------------------------------------------------------------- Y2, Y3 and noise


def test_y2_against_whole_passes():
    lm = tiny.model("gemma2", layers=3)
    sites = ("mlp_out", "attn_out")
    found = patching.patch(lm, PAIRS, outcomes.y2(SETS), sites=sites, positions=prompts.roles)
    cells = [("mlp_out", {}), ("attn_out", {})]

    def read(logits, _):
        return outcomes.refusal_log_odds(logits[-1], SETS).float()

    wanted = naive.sweep(lm, PAIRS, read, cells, positions(lm, PAIRS, prompts.roles))
    for got, want in zip((found.y1, found.y0, found.patched), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


HARMFUL = ["sure. take salt and honey.", "sure.", "sure. take salt", "take salt and honey and salt."]
REFUSALS = ["i will not help.", "no, i will not.", "sorry, no.", "no."]


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "gpt_neox"])
def test_y3_of_both_runs_is_the_sequence_score(architecture, skip):
    lm = tiny.model(architecture)
    found = patching.patch(lm, PAIRS, Replies(HARMFUL, REFUSALS, skip))
    for got, side in ((found.y1, "x1"), (found.y0, "x0")):
        texts = [getattr(pair, side).render(lm) for pair in PAIRS]
        want = Replies(HARMFUL, REFUSALS, skip).score(lm, texts)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("direction", patching.DIRECTIONS)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
def test_y3_of_patched_runs(architecture, direction):
    lm = tiny.model(architecture, layers=3)
    sites = ("layer", "attn_out", "mlp_out")
    found = patching.patch(
        lm, PAIRS, Replies(HARMFUL, REFUSALS, 1), sites=sites, positions=first_and_last, direction=direction
    )
    wanted = []
    for texts in (HARMFUL, REFUSALS):
        replies = [tokens(lm.tokenizer, text) for text in texts]

        def read(logits, k, replies=replies):
            reply = replies[k]
            logp = logits[-len(reply) :].log_softmax(-1)
            return torch.stack([logp[i, token] for i, token in enumerate(reply)][1:]).mean()

        cells = [(site, {}) for site in sites]
        where = positions(lm, PAIRS, first_and_last)
        wanted.append(naive.sweep(lm, PAIRS, read, cells, where, direction=direction, replies=replies)[2])
    torch.testing.assert_close(found.patched, wanted[0] - wanted[1], atol=1e-4, rtol=0)
    assert found.effects.abs().max() > 0.01


def test_both_replies_of_y3_get_the_same_random_patch():
    """Y3's two parts are read from one patched run, so its draws can't depend on the reply's length."""
    lm = tiny.model(layers=3)
    options = {"sites": ("layer",), "null": 2, "positions": prompts.roles, "noise": 3.0}
    parts = [Reply(HARMFUL), Reply(["sure. take salt and honey and salt."] * 4)]
    one, other = (patching.patch(lm, PAIRS, part, **options) for part in parts)
    torch.testing.assert_close(one.size, other.size, atol=1e-3, rtol=0)
    first = [patching.patch(lm, PAIRS, Reply([r] * 4), **options).patched for r in ("sure", "no")]
    assert not torch.equal(*first)
    # One token needs no reply behind the prompt: the same as reading the logits there.
    plain = patching.patch(
        lm, PAIRS, lambda z: z.log_softmax(-1)[:, tokens(lm.tokenizer, "sure")[0]], **options
    )
    torch.testing.assert_close(first[0], plain.patched, atol=1e-4, rtol=0)
    both = [patching.patch(lm, PAIRS, Reply([f"sure. {end}"] * 4), **options) for end in ("take salt", "no")]
    torch.testing.assert_close(both[0].size, both[1].size, atol=1e-3, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_noise_corrupts_the_words_that_differ(architecture):
    """y1 is the clean run; y0 is x1 with noise on the embeddings where the pair differs, and only there."""
    lm = tiny.model(architecture, layers=3)
    found = patching.patch(lm, PAIRS, Y1, sites="resid_post", positions="all", noise=3.0)
    clean = patching.patch(lm, PAIRS, Y1)
    torch.testing.assert_close(found.y1, clean.y1, atol=1e-5, rtol=0)
    assert (found.y0 - clean.y0).abs().max() > 0.1
    group = recorded(lm, PAIRS[:1], noise=3.0)
    x1, x0 = naive.ids_of(lm, PAIRS[0])
    start, offset = int((x1 != x0)[0].nonzero()[0]), group.x1.offset
    added = torch.zeros(1, x1.shape[1], 32)
    added[:, offset:] = group.x0.resid[0] - group.x1.resid[0]
    assert [c for c in range(x1.shape[1]) if added[0, c].any()] == (x1 != x0)[0].nonzero()[:, 0].tolist()
    logits = naive.Naive(lm).record(x1, added)["logits"][0]
    torch.testing.assert_close(found.y0[0], value(logits), atol=1e-4, rtol=0)
    # As many standard deviations of the embeddings as was asked for, whatever the model scales them by.
    spread = lm.model.get_input_embeddings()(torch.arange(300)).std()
    assert (added[0, start].std() / spread).item() == pytest.approx(3, rel=0.5)


def test_noise_denoised_at_all_positions_is_the_clean_run():
    found = patching.patch(tiny.model(), PAIRS, Y1, sites="resid_post", positions="all", noise=2.0)
    torch.testing.assert_close(found.at("resid_post"), found.total.expand(2, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("pairs", [PAIRS[:1], PAIRS, BEHAVIOUR], ids=["one", "some", "early"])
def test_patching_a_run_with_itself_does_nothing(pairs):
    """Without noise both runs are one."""
    lm = tiny.model(layers=3)
    found = patching.patch(lm, pairs, Y1, sites=(*SITES, {"some": UNITS}), positions=prompts.roles, noise=0.0)
    assert found.total.abs().max() < 1e-5
    assert found.effects.abs().max() < 1e-5
    assert found.size.max() < 1e-4
