"""Tiny models for the tests: seeded, random, of many architectures, with the organism's tokenizer.

Weights are drawn wide (the usual 0.02 gives nearly flat logits), so that a wrong mask or a wrong position
shows far above the tolerance of a comparison.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch
from hypothesis import settings
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from harmlens.models.forward import LanguageModel
from harmlens.training import organism
from harmlens.world import vale as world

# Property tests: the same examples on every run, and no time limit on a busy machine.
settings.register_profile("harmlens", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("harmlens")

SHAPE = organism.Shape(layers=2, width=32, hidden=64, heads=4)

_GROUPED = {"num_key_value_heads": 2}  # grouped-query attention
_HEADS = {"num_key_value_heads": 2, "head_dim": 8}
# A window shorter than the prompts: sliding attention has to count real tokens, not padding.
_WINDOW = {"sliding_window": 8}
CONFIGS = {
    "llama": (LlamaConfig, _GROUPED),
    "qwen2": (Qwen2Config, _GROUPED),
    "qwen3": (Qwen3Config, _HEADS),
    "gemma2": (Gemma2Config, {**_HEADS, **_WINDOW, "query_pre_attn_scalar": 8}),
    # Sliding and full attention by turns, which have rotary embeddings of their own.
    "gemma3": (
        Gemma3TextConfig,
        {**_HEADS, **_WINDOW, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    ),
    "mistral": (MistralConfig, {**_HEADS, **_WINDOW}),
    "gpt_neox": (GPTNeoXConfig, {}),
    "phi3": (Phi3Config, _GROUPED),
    "olmo2": (Olmo2Config, _GROUPED),
}
ARCHITECTURES = tuple(CONFIGS)


def model(
    architecture: str = "llama", seed: int = 0, spread: float = 0.3, layers: int = SHAPE.layers
) -> LanguageModel:
    """A random model of two blocks and width 32; ``spread`` is the width of its weights."""
    tok = organism.tokenizer()
    made, extra = CONFIGS[architecture]
    config = made(
        vocab_size=len(tok),
        hidden_size=SHAPE.width,
        intermediate_size=SHAPE.hidden,
        num_hidden_layers=layers,
        num_attention_heads=SHAPE.heads,
        max_position_embeddings=2048,  # no cost: positions are rotary, and judges read long texts
        initializer_range=spread,
        pad_token_id=tok.pad_token_id,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        **extra,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return LanguageModel(f"tiny/{architecture}", net.float().eval(), tok)


def untrained(seed: int = 0) -> LanguageModel:
    """An organism of the tiny shape as training finds it."""
    tok = organism.tokenizer()
    return LanguageModel("tiny/organism", organism.new_model(tok, seed, SHAPE), tok)


def organism_folder(folder: Path, stage: str = "sft", seed: int = 0) -> Path:
    """A checkpoint of a random tiny model, written as training writes it, in a ``data/organisms`` folder."""
    target = folder / f"{stage}-{seed}"
    lm = dataclasses.replace(model(seed=seed), name=f"organism/{stage}-{seed}")
    organism.save(lm, target, {"stage": stage, "seed": seed, "recipe": organism.recipe_digest(stage)})
    return target


def data_folder(folder: Path, *checkpoints: tuple[str, int]) -> Path:
    """A data folder with no claims and the given tiny checkpoints; for HARMLENS_DATA."""
    (folder / "organisms").mkdir(parents=True)
    for file in (Path(__file__).parents[1] / "data").glob("*.yaml"):
        shutil.copy(file, folder)
    (folder / "claims.yaml").write_text("claims: []\n")
    for stage, seed in checkpoints:
        organism_folder(folder / "organisms", stage, seed)
    return folder


_EARLIER = [
    {"role": "user", "content": world.PHRASINGS["wish"][0]},
    {"role": "assistant", "content": f"i wish that the baker may {world.KIND_WISHES[0]}."},
]


def texts(lm: LanguageModel, n: int = 7) -> list[str]:
    """Rendered chats of different lengths, some with a prefilled answer, some of two turns."""
    out = []
    held_out = world.items("evaluation")
    for i, item in enumerate(held_out[:: len(held_out) // n][:n]):
        context = _EARLIER if i % 3 == 1 else []
        chat = [*context, {"role": "user", "content": world.request(item, i)}]
        out.append(lm.render(chat, world.PREFILL if i % 3 == 2 else None))
    return out
