"""Sweeps: identities that any right patching obeys, what is saved, and what is refused by name."""

import dataclasses
import json

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harmlens.asking import pairs as prompts
from harmlens.flow import outcomes, patching
from harmlens.flow.cells import SITES, Freeze
from harmlens.flow.outcomes import Outcome, Replies, Reply, TokenSets
from harmlens.flow.patching import Sweep, sweep
from harmlens.models.chats import Pair, Prompt
from harmlens.models.forward import LanguageModel

SETS = TokenSets((5, 9, 20), (7, 31))
Y1 = outcomes.y1(SETS)
LM = tiny.model(layers=3)
PAIRS = prompts.pairs("prompt", n=4)
PLAIN = ("resid_post", "layer", "attn_out", "mlp_out")


def ask(text):
    return Prompt(({"role": "user", "content": text},))


# --------------------------------------------------------------------------- identities


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt_neox", "olmo2"])
def lm(request):
    return tiny.model(request.param, layers=3)


@pytest.mark.parametrize("direction", patching.DIRECTIONS)
def test_the_whole_residual_stream_carries_the_whole_effect(lm, direction):
    found = patching.residual(lm, PAIRS, Y1, positions="all", direction=direction)
    torch.testing.assert_close(found.at("resid_post"), found.total.expand(3, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("direction", patching.DIRECTIONS)
def test_behind_the_last_block_the_last_position_is_all_there_is(lm, direction):
    """Whatever the model: this is no finding."""
    found = patching.residual(lm, PAIRS, Y1, direction=direction, positions=prompts.roles)
    torch.testing.assert_close(found.at("resid_post", "last")[-1], found.total, atol=1e-4, rtol=0)
    for other in ("changed", "request", "template"):
        assert found.at("resid_post", other)[-1].abs().max() < 1e-5


def test_both_directions_are_one_experiment_seen_from_two_sides(lm):
    """Noising x1 is denoising with the sides swapped: TIE = Y(x1) - Y(x1; M(x0))."""
    swapped = [Pair(p.id, p.x0, p.x1) for p in PAIRS]
    options = {"sites": SITES[:5], "positions": prompts.roles}
    tie = sweep(lm, PAIRS, Y1, direction="noising", **options)
    nie = sweep(lm, swapped, Y1, direction="denoising", **options)
    torch.testing.assert_close(tie.patched, nie.patched, atol=1e-5, rtol=0)
    torch.testing.assert_close(tie.effects, -nie.effects, atol=1e-5, rtol=0)
    torch.testing.assert_close(tie.total, -nie.total, atol=1e-5, rtol=0)


def test_the_first_differing_word_carries_everything_at_the_start(lm):
    """Patching the changed word behind block 0 in one run is, before anything moved on, the other run."""
    found = patching.residual(lm, PAIRS, Y1, positions=lambda lm, p: {
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
    found = {d: sweep(lm, pairs, linear, sites=PLAIN, direction=d) for d in patching.DIRECTIONS}
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


def made(direction="denoising", pairs=3, layers=2, positions=("changed", "last"), seed=0) -> Sweep:
    g = torch.Generator().manual_seed(seed)
    shape = (2, layers, len(positions), pairs)
    return Sweep(
        ("mlp_out", "attn_out"), tuple(range(layers)), positions, tuple(f"pair {i}" for i in range(pairs)),
        direction, torch.randn(pairs, generator=g) + 5, torch.randn(pairs, generator=g),
        torch.randn(shape, generator=g), torch.rand(shape, generator=g),
    )  # fmt: skip


def test_effects_worked_by_hand():
    patched = torch.tensor([2.0, 7.0]).view(1, 1, 1, 2)
    y1, y0 = torch.tensor([4.0, 8.0]), torch.tensor([1.0, 3.0])
    for direction, want in (("denoising", [1.0, 4.0]), ("noising", [2.0, 1.0])):
        found = Sweep(("layer",), (0,), ("last",), ("a", "b"), direction, y1, y0, patched, patched)
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
    with pytest.raises(ValueError, match="position: choose one of changed, last"):
        found.at("mlp_out")
    with pytest.raises(ValueError, match="position='first' was not swept; there are changed, last"):
        found.at("mlp_out", "first")


def test_the_table_has_a_row_for_each_patch():
    found = made()
    table = found.to_dataframe()
    assert len(table) == 2 * 2 * 2 * 3
    assert list(table) == ["site", "layer", "position", "pair", "effect", "patched", "size", "total"]
    row = table[
        (table.site == "attn_out")
        & (table.layer == 1)
        & (table.position == "last")
        & (table.pair == "pair 2")
    ]
    assert row.effect.item() == found.effects[1, 1, 1, 2].item()
    assert row["size"].item() == found.size[1, 1, 1, 2].item()
    assert row.total.item() == found.total[2].item()


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


def test_weak_pairs_are_left_out_by_name():
    found = dataclasses.replace(made(pairs=4), y1=torch.tensor([5.0, 0.1, 4.0, -6.0]), y0=torch.zeros(4))
    assert found.weak() == ["pair 1"]
    assert found.weak(floor=4.5) == ["pair 1", "pair 2"]
    with pytest.warns(UserWarning, match=r"1 of 4 pairs have \(nearly\) no total effect.*left out: pair 1$"):
        strong = found.strong()
    keep = [0, 2, 3]
    assert strong.pairs == ("pair 0", "pair 2", "pair 3") and strong.weak() == []
    assert torch.equal(strong.effects, found.effects[..., keep])
    assert torch.equal(strong.total, found.total[keep]) and torch.equal(strong.size, found.size[..., keep])


def test_without_weak_pairs_nothing_is_left_out(recwarn):
    found = dataclasses.replace(made(), y1=torch.tensor([5.0, 4.0, 6.0]), y0=torch.zeros(3))
    assert found.strong() is found and not recwarn.list


@pytest.mark.parametrize("total", [0.0, 1.0])
def test_without_any_total_effect_there_is_nothing_to_mediate(total):
    found = dataclasses.replace(made(), y1=torch.full((3,), total), y0=torch.zeros(3))
    with pytest.raises(ValueError, match="none of 3 has a total effect"):
        found.strong(floor=1.0)


def test_normalized_effects_are_ratios_of_means():
    found = dataclasses.replace(made(pairs=12), y1=torch.linspace(4, 6, 12), y0=torch.zeros(12))
    got = found.normalized("mlp_out", "last")
    for layer in range(2):
        want = found.effects[0, layer, 1].mean() / found.total.mean()
        assert got[layer].value == pytest.approx(want.item(), rel=1e-5)
        assert got[layer].low < got[layer].value < got[layer].high


def test_without_a_total_effect_there_is_no_ratio():
    found = dataclasses.replace(made(pairs=4), y1=torch.tensor([1.0, -1.0, 2.0, -2.0]), y0=torch.zeros(4))
    with pytest.raises(ValueError, match="can't be told from zero, so a ratio means nothing"):
        found.normalized("mlp_out", "last")


def test_axes_of_a_sweep():
    found = sweep(
        LM, PAIRS, Y1, sites=("head", "neurons", "layer"), layers=[2, 0], positions=prompts.roles,
        units={"a": {2: [3]}, "b": {0: [4, 5]}},
    )  # fmt: skip
    assert found.sites == ("head 0", "head 1", "head 2", "head 3", "a", "b", "layer")
    assert found.layers == (2, 0) and found.positions == ("changed", "request", "template", "last")
    assert found.pairs == tuple(p.id for p in PAIRS)
    assert found.patched.shape == found.size.shape == (7, 2, 4, 4)
    assert (found.at("a", "last")[1] == 0).all() and (found.at("b", "last")[0] == 0).all()  # nothing there
    assert (found.at("a", "last")[0] != 0).all() and (found.at("b", "changed")[1] != 0).all()
    whole = sweep(LM, PAIRS, Y1, sites=("layer",), positions=prompts.roles)
    torch.testing.assert_close(found.effects[6], whole.effects[0][[2, 0]], atol=1e-5, rtol=0)


def test_named_sweeps_are_sweeps():
    for name, sites in (
        ("layers", ("layer",)), ("modules", ("mlp_out", "attn_out")), ("residual", ("resid_post",)),
        ("heads", ("head",)),
    ):  # fmt: skip
        found = getattr(patching, name)(LM, PAIRS[:1], Y1, direction="noising")
        assert torch.equal(found.patched, sweep(LM, PAIRS[:1], Y1, sites=sites, direction="noising").patched)


def test_units_may_be_given_as_anything_with_numbers_in_it():
    many = [3, 1, 2]
    kinds = [many, tuple(many), range(1, 4), [3, 1, 1, 2]]
    found = [sweep(LM, PAIRS[:1], Y1, sites=("neurons",), units={"a": {1: units}}) for units in kinds]
    assert found[0].effects.abs().max() > 0
    for other in found[1:]:
        assert torch.equal(other.patched, found[0].patched)
    assert Freeze("neurons", units=range(1, 4)) == Freeze("neurons", units=(1, 2, 3))


# --------------------------------------------------------------------------- saved as they come


@pytest.fixture
def calls(monkeypatch):
    """Counts the recordings and the patched batches."""
    counted = {"record": 0, "run_cells": 0}
    for module, name in ((patching.runs.stack, "record"), (patching.cells, "run_cells")):
        real = getattr(module, name)

        def counting(*args, real=real, name=name, **options):
            counted[name] += 1
            return real(*args, **options)

        monkeypatch.setattr(module, name, counting)
    return counted


def test_nothing_is_run_again(tmp_path, calls):
    file = tmp_path / "new folder" / "sweep.jsonl"
    first = sweep(LM, PAIRS, Y1, sites=PLAIN, save=file)
    before = dict(calls)
    assert before["record"] == 3 and len(file.read_text().splitlines()) == 4
    again = sweep(LM, PAIRS, Y1, sites=PLAIN, save=file)
    assert calls == before
    for name in ("y1", "y0", "patched", "size"):
        assert torch.equal(getattr(again, name), getattr(first, name))
    assert (again.pairs, again.sites) == (first.pairs, first.sites)


def test_an_interrupted_sweep_keeps_what_is_done(tmp_path, calls, monkeypatch):
    file = tmp_path / "sweep.jsonl"
    whole = sweep(LM, PAIRS, Y1)
    real, n = patching.cells.run_cells, []

    def stops(*args, **options):
        n.append(1)
        if len(n) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(patching.cells, "run_cells", stops)
        sweep(LM, PAIRS, Y1, save=file, batch_size=1)
    done = [json.loads(line)["pair"] for line in file.read_text().splitlines()]
    assert len(done) == 2
    before = calls["run_cells"]
    found = sweep(LM, PAIRS, Y1, save=file, batch_size=1)
    assert calls["run_cells"] == before + 2
    torch.testing.assert_close(found.patched, whole.patched, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rest", ['{"key": "a', "\n", '{"key": 1}\n', "[]\n", "null\n", "\x00\x00"])
def test_a_line_that_was_cut_off_is_survived(tmp_path, calls, rest):
    file = tmp_path / "sweep.jsonl"
    first = sweep(LM, PAIRS, Y1, save=file)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + rest)
    before = calls["record"]
    again = sweep(LM, PAIRS, Y1, save=file)
    assert calls["record"] == before + 1
    torch.testing.assert_close(again.patched, first.patched, atol=1e-5, rtol=0)
    before = calls["record"]
    sweep(LM, PAIRS, Y1, save=file)  # and what was added behind it can be read
    assert calls["record"] == before


OTHERS = {
    "nothing": {},
    "layers": {"layers": [0, 1]},
    "as many cells": {"layers": [1, 0, 2]},
    "sites": {"sites": ("resid_post",)},
    "positions": {"positions": "all"},
    "direction": {"direction": "noising"},
    "window": {"window": 3},
    "null": {"null": 0},
    "another null": {"null": 1},
    "noise": {"noise": 1.0},
    "more noise": {"noise": 2.0},
    "freeze": {"freeze": Freeze("mlp_out")},
    "another freeze": {"freeze": Freeze("mlp_out", layers=(1,))},
    "units": {"sites": ("neurons",), "units": {"a": {0: range(40)}}},
    "other units": {"sites": ("neurons",), "units": {"a": {0: range(1, 41)}}},
    "tokens": {"outcome": outcomes.y1(TokenSets((5,), (7,)))},
    "as many other tokens": {"outcome": outcomes.y1(TokenSets((5, 9, 21), (7, 31)))},
    "Y2": {"outcome": outcomes.y2(SETS)},
    "Y2 of other tokens": {"outcome": outcomes.y2(TokenSets((5, 9, 20), (7,)))},
    "function": {"outcome": lambda logits: logits[:, 5]},
    "another function": {"outcome": lambda logits: logits[:, 6]},
    "reply": {"outcome": Reply(["sure. take"] * 2)},
    "end of the reply": {"outcome": Reply(["sure. take"] * 2, skip=1)},
    "another reply": {"outcome": Reply(["no. take"] * 2)},
    "two replies": {"outcome": Replies(["sure. take"] * 2, ["no."] * 2)},
    "seed of the model": {"lm": tiny.model(layers=3, seed=1)},
    "prompts": {"pairs": [Pair(p.id, p.x0, p.x1) for p in PAIRS[:2]]},
    "names": {"pairs": [Pair(a.id, b.x1, b.x0) for a, b in zip(PAIRS[:2], PAIRS[1::-1], strict=True)]},
}


def test_other_arguments_are_not_mixed_up(tmp_path):
    """All into one file, each then read from it: the same as without a file."""
    file = tmp_path / "sweep.jsonl"
    asked = {name: {"lm": LM, "pairs": PAIRS[:2], "outcome": Y1, **other} for name, other in OTHERS.items()}
    alone = {name: sweep(**options) for name, options in asked.items()}
    for _ in range(2):
        for name, options in asked.items():
            got = sweep(**options, save=file)
            assert torch.equal(got.patched, alone[name].patched), name
            assert got.pairs == alone[name].pairs


def test_a_model_that_was_changed_is_another_model(tmp_path):
    """Pruned or trained under its old name."""
    lm = tiny.model(layers=3)
    first = sweep(lm, PAIRS, Y1, save=tmp_path / "sweep.jsonl")
    with torch.no_grad():
        lm.model.model.layers[1].mlp.down_proj.weight[:, 7] = 0
    second = sweep(lm, PAIRS, Y1, save=tmp_path / "sweep.jsonl")
    assert torch.equal(second.patched, sweep(lm, PAIRS, Y1).patched)
    assert not torch.equal(second.patched, first.patched)


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
        ({"window": 2}, "window=2 must be an odd number"),
        ({"window": 0}, "window=0 must be an odd number"),
        ({"window": -1}, "window=-1 must be an odd number"),
        ({"window": 3, "sites": ("resid_post",)}, "window=3: only layer, attn_out and mlp_out"),
        ({"layers": [3]}, r"layers=\[3\] must be a non-empty list out of 0 to 2"),
        ({"layers": [-1]}, r"layers=\[-1\] must be a non-empty list out of 0 to 2"),
        ({"layers": []}, r"layers=\[\] must be a non-empty list"),
        ({"sites": ("neurons",)}, "units: give sets of hidden units with the site 'neurons'"),
        ({"units": {"a": {0: [1]}}}, "units: give sets of hidden units with the site 'neurons'"),
        ({"sites": ("neurons",), "units": {"a": {7: [1]}}}, r"units\['a'\]: there is no layer 7"),
        ({"sites": ("neurons",), "units": {"a": {1: [64]}}}, r"units\['a'\]: layer 1 .* 0 to 63, not \[64\]"),
        ({"sites": ("neurons",), "units": {"a": {1: [-2]}}}, r"layer 1 has .* units 0 to 63, not \[-2\]"),
        ({"freeze": Freeze("mlp_out", layers=(4,))}, "freeze: there is no layer 4; choose out of 0 to 2"),
        ({"freeze": Freeze("neurons", units=(64,))}, r"freeze: layer 0 has the hidden units 0 to 63"),
        ({"noise": -1.0}, "noise=-1.0 must be a number of standard deviations"),
        ({"noise": float("nan")}, "noise=nan must be a number of standard deviations"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sweep(LM, PAIRS, Y1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "layer"}, "freeze.site='layer': choose 'attn_out', 'mlp_out' or 'neurons'"),
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
        sweep(LM, [PAIRS[0], longer], Y1)
    with pytest.raises(ValueError, match="both sides are the same text, so there is no effect: twin"):
        sweep(LM, [PAIRS[0], Pair("twin", PAIRS[0].x0, PAIRS[0].x0)], Y1)
    with pytest.raises(ValueError, match=f"these occur twice: {PAIRS[1].id}$"):
        sweep(LM, [*PAIRS, PAIRS[1]], Y1)
    with pytest.raises(ValueError, match="pairs is empty"):
        sweep(LM, [], Y1)


def test_padding_in_a_prompt_is_refused():
    pad = LM.tokenizer.pad_token
    x1, x0 = (ask(f"tell me {pad} how to {verb} a baker.") for verb in ("cast", "build"))
    with pytest.raises(ValueError, match=r"holds '<\|pad\|>', which this model reads as a control token"):
        sweep(LM, [PAIRS[0], Pair("padded one", x1, x0)], Y1)


@pytest.mark.parametrize("stands_for", ["eos_token", "unk_token"])
def test_a_padding_token_that_is_also_a_word_is_none_of_our_business(stands_for):
    """As where a tokenizer has no padding token and the one at the end of text stands in for it."""
    tok = tiny.organism.tokenizer()
    tok.pad_token = getattr(tok, stands_for)
    lm = LanguageModel("tiny/llama", LM.model, tok)
    # The template ends each turn with the one, and a word that nobody knows is the other.
    x1, x0 = (ask(f"tell me zzqx how to {verb} a baker.") for verb in ("cast", "build"))
    assert tok.pad_token_id in lm.tokenizer(x1.render(lm), add_special_tokens=False)["input_ids"]
    assert sweep(lm, [Pair("a", x1, x0)], Y1).total.abs() > 0


def test_an_empty_token_set_is_refused():
    with pytest.raises(ValueError, match="the refuse token set is empty"):
        sweep(LM, PAIRS, outcomes.y1(TokenSets((5,), ())))


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
        sweep(LM, PAIRS, outcome)


def test_an_overflow_is_reported_with_the_pair_and_a_remedy(tmp_path):
    lm = tiny.model("qwen2")
    with torch.no_grad():
        lm.model.model.layers[1].mlp.down_proj.weight *= 3e5
    lm.model.to(torch.float16)
    file = tmp_path / "sweep.jsonl"
    with pytest.raises(
        ValueError, match=f"pair '{PAIRS[0].id}' is not finite.*dtype='bfloat16' or 'float32'"
    ):
        sweep(lm, PAIRS[:1], Y1, save=file)
    assert not file.exists()


def test_an_outcome_of_nan_is_reported():
    with pytest.raises(ValueError, match="is not finite"):
        sweep(LM, PAIRS, Outcome("broken", lambda logits: (logits[:, 0] - 1e9).log()))


def test_a_single_string_is_no_list_of_sites():
    with pytest.raises(ValueError, match="choose from resid_post"):
        sweep(LM, PAIRS, Y1, sites="layer")


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
    alone = sweep(LM, first, Y1, positions=lambda lm, p: {"some": sorted(where)}, **options)
    among = sweep(
        LM, first, Y1, positions=lambda lm, p: {"one": [16], "some": where, "all": range(19)},
        max_tokens=limit, **options,
    )  # fmt: skip
    torch.testing.assert_close(among.at(site, "some"), alone.at(site), atol=1e-4, rtol=0)
    if where == [18]:
        assert torch.equal(alone.patched, sweep(LM, first, Y1, **options).patched)
