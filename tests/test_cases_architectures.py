"""Models whose blocks are unlike Llama's: patched as plain hooks patch them, or refused in the same words."""

import naive
import pytest
import tiny
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Exaone4Config,
    FalconConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeSharedConfig,
    Lfm2Config,
    MambaConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    Qwen2MoeConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from harmlens.asking import pairs as prompts
from harmlens.flow import directions, interventions, neurons, outcomes, patching
from harmlens.flow.outcomes import TokenSets
from harmlens.models import forward
from harmlens.models.forward import LanguageModel, Row
from harmlens.weights import attribution, scores

PAIRS = prompts.pairs("prompt", n=2)
Y1 = outcomes.y1(TokenSets((5, 9, 20), (7, 31)))
TOK = tiny.model().tokenizer
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": len(TOK), "max_position_embeddings": 256,
    "pad_token_id": TOK.pad_token_id, "bos_token_id": TOK.bos_token_id, "eos_token_id": TOK.eos_token_id,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
TURNS = ["sliding_attention", "full_attention", "sliding_attention"]
LINEAR = {
    **GROUPED, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip


def make(made, **options) -> LanguageModel:
    """A random model with wide weights, whatever its own initialisation."""
    config = made(**{**SHAPE, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = AutoModelForCausalLM.from_config(config).float().eval()
        for name, p in net.named_parameters():
            if p.ndim >= 2 and "embed" not in name:
                nn.init.normal_(p, std=0.2)
    return LanguageModel(f"tiny/{config.model_type}", net, TOK)


def read(logits, _):
    return Y1.value(logits[None, -1, list(Y1.ids)])[0]


def last(k):
    return [[naive.ids_of(LM, PAIRS[k])[0].shape[1] - 1]]


LM = tiny.model()


def same_as_hooks(lm, sites=("layer", "attn_out", "mlp_out", "resid_post"), **options):
    """A sweep at the last position is what whole runs with one hook each give."""
    found = patching.patch(lm, PAIRS, Y1, sites=sites, **options)
    y1, y0, patched = naive.sweep(lm, PAIRS, read, [(site, {}) for site in sites], last, **options)
    torch.testing.assert_close(found.y1, y1, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.y0, y0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.patched, patched, atol=1e-4, rtol=1e-4)
    assert (found.effects != 0).any()
    return found


# --------------------------------------------------------------------------- blocks that change in place

FALCONS = {
    "7B": {"parallel_attn": True, "multi_query": True},
    "40B": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "11B": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "one after the other": {"parallel_attn": False, "multi_query": False, "bias": True},
}


@pytest.fixture(scope="module", params=FALCONS)
def falcon(request):
    return make(FalconConfig, ffn_hidden_size=48, alibi=False, **FALCONS[request.param])


@pytest.mark.parametrize("options", [{}, {"direction": "noising"}], ids=str)
def test_h5_modules_of_blocks_that_add_in_place(falcon, options):
    same_as_hooks(falcon, **options)


def test_h5_windows_of_blocks_that_add_in_place(falcon):
    same_as_hooks(falcon, ("layer", "attn_out", "mlp_out"), layers=naive.windows(3, 3))


def test_h5_units_of_blocks_that_add_in_place(falcon):
    units = {layer: (1, 5) for layer in range(3)}
    found = patching.patch(falcon, PAIRS, Y1, sites={"some": units})
    _, y0, patched = naive.sweep(falcon, PAIRS, read, [("neurons", units)], last)
    torch.testing.assert_close(found.patched, patched, atol=1e-4, rtol=1e-4)
    single = neurons.last_layer(falcon, PAIRS, Y1)
    for unit in (0, 7, 47):
        _, _, patched = naive.sweep(falcon, PAIRS, read, [("neurons", {2: (unit,)})], last)
        torch.testing.assert_close(single.effects[:, unit], patched[0, -1, 0] - y0, atol=1e-4, rtol=1e-4)


def test_h5_a_first_mlp_that_reads_the_same_word_has_no_effect():
    """In a parallel block it reads the embedding alone, and the last word of both prompts is the same."""
    lm = make(FalconConfig, ffn_hidden_size=48, alibi=False, **FALCONS["7B"])
    found = patching.patch(lm, PAIRS, Y1, sites=("mlp_out", "attn_out"))
    assert found.at("mlp_out")[0].abs().max() < 1e-5 < found.at("attn_out")[0].abs().max()


def test_h5_what_a_layer_changes_in_place_is_scored_as_it_was():
    """Scores keep the inputs of layers: one written over afterwards is refused, not scored wrongly."""
    lm = tiny.model()
    for block in lm.model.model.layers:
        block.mlp.forward = lambda x, mlp=block.mlp: (
            mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)) + 0 * x.mul_(2)
        )
    with pytest.raises(RuntimeError, match=r"mlp\.\w+_proj.* was changed in place"):
        attribution.attribute(lm, [Row([1, 5, 9, 20], [False, False, True, True])])


# --------------------------------------------------------------------------- experts

MIXTURES = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4, **GROUPED}),
    "qwen3_moe": (Qwen3MoeConfig, {**EXPERTS, **GROUPED}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        {**EXPERTS, "shared_expert_intermediate_size": 24, "num_key_value_heads": 2},
    ),
    "olmoe": (OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (GptOssConfig, {"num_local_experts": 4, "layer_types": TURNS, "sliding_window": 8, **GROUPED}),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_h24_experts_are_patched_at_the_default_position(name):
    made, options = MIXTURES[name]
    same_as_hooks(make(made, **options))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_h24_experts_have_no_hidden_units_of_their_block(name):
    """The gate beside a shared expert is a matrix too, but writes nothing into the stream."""
    made, options = MIXTURES[name]
    lm = make(made, **options)
    for call in (
        lambda: neurons.last_layer(lm, PAIRS, Y1),
        lambda: interventions.activations(lm, ["a"], {0: [0]}),
    ):
        with pytest.raises(ValueError, match="has no single output projection, so it has no hidden units"):
            call()


# --------------------------------------------------------------------------- other right ones


@pytest.mark.parametrize(
    ("made", "options"),
    [
        (Olmo2Config, {"num_key_value_heads": 2}),
        (OlmoConfig, {"num_key_value_heads": 2}),
        (Gemma2Config, {**GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 8}),
        (GraniteConfig, {"num_key_value_heads": 2, "residual_multiplier": 0.22}),
        (Glm4Config, GROUPED),
        (Exaone4Config, {**GROUPED, "sliding_window": 8, "layer_types": TURNS}),
        (Gemma4TextConfig, {**GROUPED, "global_head_dim": 8, "hidden_size_per_layer_input": 0,
                            "layer_types": TURNS[:2] + TURNS[1:2], "sliding_window": 8}),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)  # fmt: skip
def test_t10_norms_and_scales_behind_modules(made, options):
    """Norms behind a module, norms without a gain, branches that are scaled."""
    lm = make(made, **options)
    for block in lm.model.model.layers:  # as trained ones are
        if hasattr(block, "layer_scalar"):
            block.layer_scalar.fill_(0.7)
    same_as_hooks(lm)


# --------------------------------------------------------------------------- refused

REFUSED = {
    "linear attention": (Qwen3_5TextConfig, LINEAR, r"have no attention module \(block 0: linear_attn, mlp"),
    "with experts": (
        Qwen3NextConfig, {**LINEAR, **EXPERTS}, r"have no attention module \(block 0: linear_attn, mlp",
    ),
    "convolutions": (
        Lfm2Config, {"num_key_value_heads": 2, "layer_types": ["full_attention", "conv", "conv"]},
        r"have no attention module \(block 1: conv, feed_forward",
    ),
    "state spaces": (MambaConfig, {"state_size": 4}, r"have no attention module \(block 0: norm, mixer"),
    "layer inputs": (
        Gemma4TextConfig, {**GROUPED, "global_head_dim": 8, "hidden_size_per_layer_input": 8,
                           "layer_types": TURNS[:2] + TURNS[1:2], "vocab_size_per_layer_input": len(TOK)},
        r"read more of a prompt than the stream \(per_layer_input\)",
    ),
    "bloom": (BloomConfig, {"n_layer": 3, "n_head": 4}, "have modules that give out the stream"),
    "mpt": (
        MptConfig, {"d_model": 32, "n_heads": 4, "n_layers": 3, "expansion_ratio": 2},
        "have modules that give out the stream",
    ),
    "no mlp": (
        OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}, r"have no MLP module \(block 0: self_attn",
    ),
    "two mlps": (
        GraniteMoeSharedConfig, {"num_local_experts": 4, "shared_intermediate_size": 16},
        "do more to the stream than attention and one MLP write",
    ),
}  # fmt: skip
WORDS = (
    r"^blocks of this model \(\w+\) {}.*\): patching and ablation can't be done; "
    r"probes, completions and tuning can$"
)


@pytest.mark.parametrize("name", REFUSED)
def test_t9_h26_blocks_that_cant_be_patched_are_refused_in_the_same_words(name):
    made, options, why = REFUSED[name]
    lm = make(made, **options)
    v = torch.ones(32)
    for call in (
        lambda: patching.patch(lm, PAIRS, Y1),
        lambda: patching.across(lm, lm, [PAIRS[0].x1], Y1),
        lambda: neurons.last_layer(lm, PAIRS, Y1),
        lambda: neurons.set_effects(lm, PAIRS, Y1, [[0]]),
        lambda: neurons.screen(lm, PAIRS, Y1),
        lambda: interventions.activations(lm, ["a"], {0: [0]}),
        lambda: interventions.overwriting(lm, {0: [0]}, interventions.scale(0.0)).__enter__(),
        lambda: directions.ablated(lm, v).__enter__(),
    ):
        with pytest.raises(ValueError, match=WORDS.format(why)):
            call()
    # What it says that can be done.
    texts = [pair.x1.render(lm) for pair in PAIRS]
    assert interventions.states(lm, texts, normed=True).shape == (2, 4, 1, 32)
    assert forward.last_logits(lm, texts).isfinite().all()
    assert len(forward.generate(lm, texts, max_new_tokens=2)) == 2


def test_t9_models_of_several_streams_are_named():
    """Nothing is read off one of them as if it were the stream."""
    lm = make(
        Gemma3nTextConfig, **GROUPED, hidden_size_per_layer_input=8, laurel_rank=4, sliding_window=8,
        layer_types=TURNS[:2] + TURNS[1:2], vocab_size_per_layer_input=len(TOK), num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * 3, altup_num_inputs=2,
    )  # fmt: skip
    texts = [pair.x1.render(lm) for pair in PAIRS]
    for call in (
        lambda: patching.patch(lm, PAIRS, Y1),
        lambda: interventions.activations(lm, ["a"], {0: [0]}),
        lambda: interventions.states(lm, texts),
        lambda: interventions.states(lm, texts, normed=True),
    ):
        with pytest.raises(ValueError, match=r"carry several streams side by side .*completions and tuning"):
            call()
    assert forward.last_logits(lm, texts).isfinite().all()
    assert len(forward.generate(lm, texts, max_new_tokens=2)) == 2


@pytest.mark.parametrize("name", ["linear attention", "convolutions", "bloom", "layer inputs"])
def test_t9_linear_layers_of_blocks_that_cant_be_patched_are_scored(name):
    made, options, _ = REFUSED[name]
    lm = make(made, **options)
    row = Row([1, 5, 9, 20, 31], [False, False, True, True, True])
    found = attribution.attribute(lm, [row], kinds=("signed",))["signed"].values
    logits = lm.model(torch.tensor([row.ids])).logits[0, 1:-1]
    loss = nn.functional.cross_entropy(logits, torch.tensor(row.ids[2:]))
    weights = dict(lm.model.named_parameters())
    wanted = torch.autograd.grad(loss, [weights[name] for name in found], allow_unused=True)
    top = max(float(value.abs().max()) for value in found.values())
    assert top > 0
    for (name, value), gradient in zip(found.items(), wanted, strict=True):
        want = torch.zeros_like(value) if gradient is None else weights[name] * gradient
        torch.testing.assert_close(value, want.detach(), atol=1e-4 * top, rtol=1e-3)


def test_t9_weights_that_cant_be_scored_are_named_with_what_holds_them():
    made, options, _ = REFUSED["with experts"]
    with pytest.raises(ValueError, match=r"mlp\.experts\.\w+ \(Qwen3NextExperts\); only linear layers"):
        scores.matrices(make(made, **options))


# --------------------------------------------------------------------------- under steering


@pytest.mark.parametrize("how", ["added", "ablated"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "falcon"])
def test_h29_a_sweep_of_a_steered_model_is_what_hooks_give(architecture, how):
    falcon = architecture == "falcon"
    lm = make(FalconConfig, alibi=False, **FALCONS["7B"]) if falcon else tiny.model(architecture, layers=3)
    v = torch.randn(32, generator=torch.Generator().manual_seed(1))
    plain = patching.patch(lm, PAIRS, Y1)
    with directions.added(lm, directions.Direction(v, 1)) if how == "added" else directions.ablated(lm, v):
        steered = same_as_hooks(lm)
        same_as_hooks(lm, ("layer", "attn_out", "mlp_out"), layers=naive.windows(3, 3))
    assert (steered.at("layer") - plain.at("layer")).abs().max() > 1e-3


def test_h29_hooks_under_which_blocks_cant_be_run_in_part_are_named():
    """Such as one that scales by the number of positions, or acts on the last word of a prompt only."""
    lm = tiny.model()
    patching.patch(lm, PAIRS, Y1)  # what was right without hooks is looked at again with them
    lm.model.model.layers[1].register_forward_pre_hook(
        lambda m, args: (args[0] * args[0].shape[1], *args[1:])
    )
    with pytest.raises(ValueError, match=r"carries hooks \(steering\?\) on model\.layers\.1,.*take them off"):
        patching.patch(lm, PAIRS, Y1)
    lm = tiny.model()
    with (
        interventions.overwriting(lm, {0: [1, 2, 3]}, interventions.scale(9.0), where="both"),
        pytest.raises(ValueError, match=r"carries hooks \(steering\?\) on model\.layers\.0\.mlp\.down_proj"),
    ):
        patching.patch(lm, PAIRS, Y1)
