"""The decoder stack of any model: parts found by structure, recorded, and run in parts."""

import naive
import pytest
import tiny
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GPT2Config,
    GraniteConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
)

from harmlens.asking import pairs as prompts
from harmlens.flow import engine, outcomes, patching
from harmlens.flow.outcomes import TokenSets
from harmlens.flow.record import record_run
from harmlens.models import parts as decoder
from harmlens.models.forward import LanguageModel

PAIRS = prompts.pairs("prompt", n=2)
Y1 = outcomes.y1(TokenSets((5, 9, 20), (7, 31)))


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def lm(request):
    return tiny.model(request.param, layers=3)


def other(config) -> LanguageModel:
    """A random model of an architecture with a trait of its own."""
    torch.manual_seed(0)
    return LanguageModel(
        "tiny/other", AutoModelForCausalLM.from_config(config).eval(), tiny.model().tokenizer
    )


def small(made, **options):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
    return made(vocab_size=370, **{**shape, **options})


def rows(lm, n=3):
    return torch.cat([naive.ids_of(lm, pair)[0] for pair in prompts.pairs("behaviour", n=12)[1:3]])[:n]


# --------------------------------------------------------------------------- parts


def test_parts_are_those_known_by_name(lm):
    parts, net = decoder.stack(lm), naive.Naive(lm)
    assert list(parts.blocks) == net.blocks and parts.depth == 3 and parts.width == 32
    assert [decoder.attention(block) for block in parts.blocks] == net.attention
    assert [decoder.mlp(block) for block in parts.blocks] == net.mlp
    assert [decoder.projection(module) for module in net.attention] == net.out
    assert [decoder.projection(module) for module in net.mlp] == net.down
    assert decoder.projection_weight(net.mlp[0]).shape == (32, 64)


def test_gpt2_stores_its_weights_the_other_way_round():
    lm = other(GPT2Config(vocab_size=370, n_embd=32, n_layer=2, n_head=4, n_inner=48))
    block = decoder.stack(lm).blocks[0]
    weight = decoder.projection_weight(decoder.mlp(block))
    assert weight.shape == (32, 48)
    hidden = torch.randn(5, 48)
    torch.testing.assert_close(
        hidden @ weight.T + block.mlp.c_proj.bias, block.mlp.c_proj(hidden), atol=1e-5, rtol=0
    )


def test_a_mixture_of_experts_has_no_output_projection():
    """Its router is a matrix too, but writes nothing."""
    lm = other(small(MixtralConfig, intermediate_size=48, num_key_value_heads=2, num_local_experts=4))
    with pytest.raises(ValueError, match=r"SparseMoeBlock has no single output projection.*attn_out"):
        patching.patch(lm, PAIRS, Y1, sites={"a": {0: [1]}})


@pytest.mark.parametrize(
    "config",
    [
        small(MixtralConfig, intermediate_size=48, num_key_value_heads=2, num_local_experts=4),
        GPT2Config(vocab_size=370, n_embd=32, n_layer=2, n_head=4, n_inner=48, initializer_range=0.3),
        small(CohereConfig, intermediate_size=48, num_key_value_heads=2, logit_scale=0.25),
        small(GraniteConfig, intermediate_size=48, logits_scaling=4.0, residual_multiplier=0.5),
    ],
    ids=lambda c: c.model_type,
)
def test_models_with_traits_of_their_own(config):
    """Mixtures of experts, learned positions, logits that are scaled, branches that are scaled."""
    lm = other(config)
    found = patching.patch(lm, PAIRS, Y1, sites="resid_post", positions="all")
    torch.testing.assert_close(found.at("resid_post"), found.total.expand(2, -1), atol=1e-4, rtol=0)
    sites = ("resid_post", "layer", "attn_out", "mlp_out")
    last = patching.patch(lm, PAIRS, Y1, sites=sites)
    for k, pair in enumerate(PAIRS):
        ids = naive.ids_of(lm, pair)
        for got, row in ((last.y1[k], ids[0]), (last.y0[k], ids[1])):
            torch.testing.assert_close(got, Y1.value(lm.model(row).logits[:, -1, Y1.ids])[0])
    torch.testing.assert_close(last.at("resid_post")[-1], last.total, atol=1e-4, rtol=0)
    assert (last.effects != 0).flatten(1).any(1).all()


# --------------------------------------------------------------------------- records


@torch.no_grad()
def test_a_record_is_what_the_model_does(lm):
    ids = rows(lm)
    parts, plain = decoder.stack(lm), naive.Naive(lm).record(ids)
    run = record_run(parts, ids, details=("heads", "hidden"))
    assert 0 < run.offset < ids.shape[1] and run.length == ids.shape[1]
    for mine, theirs in (
        (run.resid[:-1], "before"), (run.resid[1:], "resid_post"), (run.attn, "attn_out"),
        (run.mlp, "mlp_out"), (run.heads, "head"), (run.hidden, "neurons"),
    ):  # fmt: skip
        assert len(mine) == 3
        for a, b in zip(mine, plain[theirs], strict=True):
            torch.testing.assert_close(a, b[:, run.offset :], atol=1e-4, rtol=1e-4)
    assert all(k.shape[-2] == ids.shape[1] for k, _ in run.kv)
    logits = decoder.readout(parts, run.resid[-1])
    torch.testing.assert_close(logits, plain["logits"][:, run.offset :], atol=1e-4, rtol=1e-4)
    chosen = decoder.readout(parts, run.resid[-1], ids=(31, 5))
    torch.testing.assert_close(chosen, logits[..., [31, 5]], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("back", [1, 2, 5])
def test_blocks_run_in_part_give_what_they_gave(lm, back):
    ids = rows(lm)
    parts = decoder.stack(lm)
    run = record_run(parts, ids)
    start = ids.shape[1] - back
    for layer in range(3):
        before = run.resid[layer][:, start - run.offset :].repeat(2, 1, 1)  # two copies of all rows
        after = run.resid[layer + 1][:, start - run.offset :].repeat(2, 1, 1)
        again = engine.run_block(parts, run, layer, before, start)
        torch.testing.assert_close(again, after, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_block_is_composed_of_its_modules(lm):
    parts = decoder.stack(lm)
    run = record_run(parts, rows(lm))
    for layer in range(3):
        given = {"attn": run.attn[layer][:, [1, 3]]}
        want = run.resid[layer + 1][:, [1, 3]]
        for more in ({}, {"mlp_out": run.mlp[layer][:, [1, 3]]}):
            got = engine.compose(parts, run, layer, run.resid[layer][:, [1, 3]], **given, **more)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_rows_of_a_record():
    lm = tiny.model()
    parts, ids = decoder.stack(lm), rows(lm)
    run = record_run(parts, ids, details=("heads",)).rows(slice(1, 2))
    alone = record_run(parts, ids[1:])  # of a single row only the last position is not common
    torch.testing.assert_close(run.resid[-1][:, -1:], alone.resid[-1], atol=1e-4, rtol=1e-4)
    assert {len(t) for t in (*run.resid, *run.heads, *run.attn, *run.mlp, *run.kv[0])} == {1}


@pytest.mark.parametrize(
    ("ids", "length"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2, 3], [1, 2, 3]], 2), ([[1, 2, 3], [4, 2, 3]], 0), ([[7]], 0)],
)
def test_the_common_prefix_leaves_the_last_position_out(ids, length):
    assert record_run(decoder.stack(tiny.model()), torch.tensor(ids)).offset == length


def test_a_stubbed_module_computes_nothing_and_comes_back():
    module = nn.Linear(2, 2)
    value = torch.ones(1, 2)
    with pytest.raises(RuntimeError, match="stop"), decoder.stubbed(module, value):
        assert module(torch.zeros(1, 2)) is value
        raise RuntimeError("stop")
    assert "forward" not in vars(module) and module(torch.zeros(1, 2)) is not value
    mine = module.forward = lambda x: x + 1  # as accelerate does
    with decoder.stubbed(module, value, outputs=3):
        assert module(torch.zeros(1, 2)) == (value, None, None)
    assert module.forward is mine


# --------------------------------------------------------------------------- what can't be patched


def test_a_recurrent_model_is_refused():
    lm = other(MambaConfig(vocab_size=370, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(ValueError, match=r"have no attention module \(block 0: norm, mixer\)"):
        patching.patch(lm, PAIRS, Y1)


def test_a_model_without_a_list_of_blocks_is_refused():
    lm = tiny.model()
    lm.model.config.num_hidden_layers = 5
    with pytest.raises(
        ValueError, match=r"'tiny/llama' \(LlamaForCausalLM\) has no list of 5 decoder blocks"
    ):
        decoder.stack(lm)


def test_blocks_without_an_mlp_module_are_refused():
    lm = other(
        OPTConfig(
            vocab_size=370, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
            word_embed_proj_dim=32, max_position_embeddings=64,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"have no MLP module \(block 0: self_attn.*fc1"):
        patching.patch(lm, PAIRS, Y1)


@pytest.mark.parametrize("kind", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_no_full_mask_is_refused(kind):
    lm = tiny.model()
    lm.model.config._attn_implementation = kind
    with pytest.raises(ValueError, match=f"attn_implementation='{kind}'.*set_attn_implementation"):
        decoder.stack(lm)


def test_a_mask_of_another_kind_is_refused():
    lm = tiny.model()
    run = record_run(decoder.stack(lm), rows(lm))
    run.kwargs[0]["attention_mask"] = torch.ones(2, 5)
    with pytest.raises(ValueError, match=r"takes no full mask.*set_attn_implementation"):
        engine.run_block(decoder.stack(lm), run, 0, run.resid[0][:, -1:], run.length - 1)


@pytest.mark.parametrize("name", ["self_attn", "mlp"])
def test_a_hook_that_never_fires_is_reported(name, monkeypatch):
    """A block that calls its module's forward by itself, past all hooks."""
    lm = tiny.model()
    module = getattr(lm.model.model.layers[1], name)
    monkeypatch.setattr(type(module), "__call__", lambda self, *a, **k: self.forward(*a, **k))
    with pytest.raises(ValueError, match=r"blocks of this model .* since a hook never fired.*can't be done"):
        patching.patch(lm, PAIRS, Y1)


def test_an_output_projection_that_is_bypassed_is_reported(monkeypatch):
    lm = tiny.model()
    for block in lm.model.model.layers:
        down = block.mlp.down_proj
        monkeypatch.setattr(
            block.mlp, "forward", lambda x, down=down: down.forward(x[..., :1].expand(*x.shape[:-1], 64))
        )
    with pytest.raises(ValueError, match="a hook never fired"):
        patching.patch(lm, PAIRS, Y1, sites={"a": {0: [1]}})


def test_an_output_projection_that_does_not_write_the_output_is_reported(monkeypatch):
    """As in blocks whose attention adds the residual stream itself."""
    lm = tiny.model()
    for block in lm.model.model.layers:
        before = block.mlp.forward
        monkeypatch.setattr(block.mlp, "forward", lambda x, before=before: before(x) + x)
    assert patching.patch(lm, PAIRS, Y1, sites=("mlp_out", "attn_out")).effects.abs().max() > 0
    with pytest.raises(ValueError, match="LlamaMLP does not give out what its output projection writes"):
        patching.patch(lm, PAIRS, Y1, sites={"a": {0: [1]}})


def test_something_behind_the_final_norm_is_reported():
    lm = tiny.model()
    parts = decoder.stack(lm)

    def doubled(module, inputs, output):
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    lm.model.model.register_forward_hook(doubled)
    with pytest.raises(
        ValueError, match=r"carries hooks.* on model,.* are followed by more than the final norm"
    ):
        record_run(parts, rows(lm))


def test_partial_runs_that_do_not_reproduce_the_whole_are_reported():
    """A block that adds something which depends on how many positions it is given."""
    lm = tiny.model()
    lm.model.model.layers[1].register_forward_pre_hook(
        lambda m, args: (args[0] * args[0].shape[1], *args[1:])
    )
    with pytest.raises(ValueError, match=r"carries hooks \(steering\?\) on model.layers.1, and with them"):
        patching.patch(lm, prompts.pairs("behaviour", n=6), Y1, sites="resid_post")


def test_a_cache_that_is_not_used_as_recorded_is_reported():
    """A model that forgets what came before the suffix it is given."""
    lm = tiny.model()
    lm.model.model.register_forward_pre_hook(
        lambda m, args, kwargs: (
            args,
            {**kwargs, "position_ids": torch.arange(kwargs["input_ids"].shape[1])[None]},
        ),
        with_kwargs=True,
    )
    with pytest.raises(ValueError, match=r"carries hooks \(steering\?\) on model, and with them"):
        patching.patch(lm, PAIRS, Y1)
