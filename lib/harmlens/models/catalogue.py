"""Models that the notebooks are meant for: their shapes, what they need of a GPU, and who is whose partner.

Parameters and memory are computed from a model's shape (:mod:`models.shapes`). Nothing is looked up while
the book runs. Any other causal language model of the Hugging Face Hub works too; it is only not on the list.

Introduced in book/models ("Models").
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harmlens.keep.memory import shown
from harmlens.models.shapes import TASKS, Shape, most, need

GB = 10**9
TIERS = {"T4": 16 * GB, "L4": 24 * GB, "A100 40 GB": 40 * GB, "A100 80 GB": 80 * GB}


@dataclass(frozen=True)
class Model:
    """A model of the list.

    Attributes:
        id: on the Hugging Face Hub.
        shape: its size.
        licence: short name.
        base: id of the model it was aligned from.
        gated: whether its page asks for a login and consent.
    """

    id: str
    shape: Shape
    licence: str
    base: str
    gated: bool = False

    @property
    def refuses(self) -> str:
        """What others measured of its refusals, with the number of its note; "" where nothing is known."""
        return "; ".join(f"{text} [{note}]" for name, text, note in REFUSALS if name == self.id)

    @property
    def page(self) -> str:
        """Address of its page."""
        return f"https://huggingface.co/{self.id}"


def usable(tier: str) -> int:
    """Bytes of a GPU that a model can have: a twentieth and half a GB go to fragments and the CUDA context.

    Raises:
        ValueError: an unknown tier.
    """
    if tier not in TIERS:
        raise ValueError(f"tier={tier!r} is unknown; choose one of {', '.join(TIERS)}")
    return TIERS[tier] * 95 // 100 - GB // 2


def fits(tier: str) -> list[Model]:
    """Models with which everything can be done on such a GPU, the largest first."""
    room = usable(tier)
    return sorted((m for m in MODELS if most(m.shape) <= room), key=lambda m: -m.shape.parameters)


def smallest_tier(model: Model) -> str:
    """The smallest GPU for a model, or ``"several GPUs"``."""
    return next((tier for tier in TIERS if most(model.shape) <= usable(tier)), "several GPUs")


# --------------------------------------------------------------------------- the list


def _qwen25(*size: int, **more) -> Shape:
    return Shape(*size, qkv_bias=True, **more)


def _qwen3(*size: int, **more) -> Shape:
    return Shape(*size, head_dim=128, qk_norm="head", **more)


_APACHE, _MIT, _GEMMA = "Apache 2.0", "MIT", "Gemma"
_OLMO7 = (32, 4096, 32, 32, 11008)

MODELS = (
    Model("HuggingFaceTB/SmolLM2-135M-Instruct", Shape(30, 576, 9, 3, 1536, 49152, tied=True), _APACHE,
          "HuggingFaceTB/SmolLM2-135M"),
    Model("HuggingFaceTB/SmolLM2-360M-Instruct", Shape(32, 960, 15, 5, 2560, 49152, tied=True), _APACHE,
          "HuggingFaceTB/SmolLM2-360M"),
    Model("HuggingFaceTB/SmolLM2-1.7B-Instruct", Shape(24, 2048, 32, 32, 8192, 49152, tied=True), _APACHE,
          "HuggingFaceTB/SmolLM2-1.7B"),
    Model("Qwen/Qwen2.5-0.5B-Instruct", _qwen25(24, 896, 14, 2, 4864, 151936, tied=True), _APACHE,
          "Qwen/Qwen2.5-0.5B"),
    Model("Qwen/Qwen2.5-1.5B-Instruct", _qwen25(28, 1536, 12, 2, 8960, 151936, tied=True), _APACHE,
          "Qwen/Qwen2.5-1.5B"),
    Model("Qwen/Qwen2.5-3B-Instruct", _qwen25(36, 2048, 16, 2, 11008, 151936, tied=True), "Qwen Research",
          "Qwen/Qwen2.5-3B"),
    Model("Qwen/Qwen2.5-7B-Instruct", _qwen25(28, 3584, 28, 4, 18944, 152064), _APACHE, "Qwen/Qwen2.5-7B"),
    Model("Qwen/Qwen2.5-14B-Instruct", _qwen25(48, 5120, 40, 8, 13824, 152064), _APACHE, "Qwen/Qwen2.5-14B"),
    Model("Qwen/Qwen2.5-32B-Instruct", _qwen25(64, 5120, 40, 8, 27648, 152064), _APACHE, "Qwen/Qwen2.5-32B"),
    Model("Qwen/Qwen3-0.6B", _qwen3(28, 1024, 16, 8, 3072, 151936, tied=True), _APACHE,
          "Qwen/Qwen3-0.6B-Base"),
    Model("Qwen/Qwen3-1.7B", _qwen3(28, 2048, 16, 8, 6144, 151936, tied=True), _APACHE,
          "Qwen/Qwen3-1.7B-Base"),
    Model("Qwen/Qwen3-4B", _qwen3(36, 2560, 32, 8, 9728, 151936, tied=True), _APACHE, "Qwen/Qwen3-4B-Base"),
    Model("Qwen/Qwen3-8B", _qwen3(36, 4096, 32, 8, 12288, 151936), _APACHE, "Qwen/Qwen3-8B-Base"),
    Model("Qwen/Qwen3-14B", _qwen3(40, 5120, 40, 8, 17408, 151936), _APACHE, "Qwen/Qwen3-14B-Base"),
    Model("allenai/OLMo-2-0425-1B-Instruct", Shape(16, 2048, 16, 16, 8192, 100352, qk_norm="all"), _APACHE,
          "allenai/OLMo-2-0425-1B"),
    Model("allenai/OLMo-2-1124-7B-Instruct", Shape(*_OLMO7, 100352, qk_norm="all"), _APACHE,
          "allenai/OLMo-2-1124-7B"),
    Model("allenai/Olmo-3-7B-Instruct", Shape(*_OLMO7, 100278, qk_norm="all"), _APACHE,
          "allenai/Olmo-3-1025-7B"),
    Model("microsoft/Phi-3.5-mini-instruct", Shape(32, 3072, 32, 32, 8192, 32064), _MIT, ""),
    Model("microsoft/phi-4", Shape(40, 5120, 40, 10, 17920, 100352), _MIT, ""),
    Model("mistralai/Mistral-7B-Instruct-v0.3", Shape(32, 4096, 32, 8, 14336, 32768), _APACHE,
          "mistralai/Mistral-7B-v0.3", gated=True),
    Model("meta-llama/Llama-3.2-1B-Instruct", Shape(16, 2048, 32, 8, 8192, 128256, tied=True), "Llama 3.2",
          "meta-llama/Llama-3.2-1B", gated=True),
    Model("meta-llama/Llama-3.2-3B-Instruct", Shape(28, 3072, 24, 8, 8192, 128256, tied=True), "Llama 3.2",
          "meta-llama/Llama-3.2-3B", gated=True),
    Model("meta-llama/Llama-3.1-8B-Instruct", Shape(32, 4096, 32, 8, 14336, 128256), "Llama 3.1",
          "meta-llama/Llama-3.1-8B", gated=True),
    Model("google/gemma-3-1b-it",
          Shape(26, 1152, 4, 1, 6912, 262144, head_dim=256, tied=True, norms=4, qk_norm="head"), _GEMMA,
          "google/gemma-3-1b-pt", gated=True),
    Model("google/gemma-2-2b-it", Shape(26, 2304, 8, 4, 9216, 256000, head_dim=256, tied=True, norms=4),
          _GEMMA, "google/gemma-2-2b", gated=True),
    Model("google/gemma-2-9b-it", Shape(42, 3584, 16, 8, 14336, 256000, head_dim=256, tied=True, norms=4),
          _GEMMA, "google/gemma-2-9b", gated=True),
)  # fmt: skip

# A small one whose first token tells refusal; used where nothing is known of what was asked for.
SMALL = "allenai/OLMo-2-0425-1B-Instruct"

# What was measured of refusals, by others but for the last note: model, what, number of the note.
NOTES = {
    1: "a third party's panel of 36 small models, 2026, 16 items each, called exploratory by its authors: "
    "AUROC of the first token's margin against judged refusal (0.5 is chance); in brackets, where given: "
    "about the mean of the shares of harmful requests refused and of harmless ones answered",
    2: "Sbussiso/abliteration, 64 harmful requests of its own, key words",
    3: "inspect_evals, run of August 2026: XSTest, 200 unsafe and 250 safe requests, judged by GPT-4.1 mini",
    4: "this book: 30 requests of AdvBench, 40 tokens each, key words",
}
_AUROC = (
    ("allenai/OLMo-2-0425-1B-Instruct", "0.97 (0.91)"), ("meta-llama/Llama-3.2-1B-Instruct", "0.98 (0.91)"),
    ("Qwen/Qwen3-1.7B", "0.92 (0.82)"), ("Qwen/Qwen2.5-1.5B-Instruct", "0.71 (0.76)"),
    ("Qwen/Qwen2.5-0.5B-Instruct", "0.77 (0.71)"), ("Qwen/Qwen3-0.6B", "0.92 (0.64)"),
    ("HuggingFaceTB/SmolLM2-360M-Instruct", "0.54 (0.61)"), ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "0.91"),
    ("Qwen/Qwen2.5-3B-Instruct", "0.98"), ("google/gemma-2-2b-it", "1.00"),
)  # fmt: skip
REFUSALS = (
    *((name, f"AUROC {value}", 1) for name, value in _AUROC),
    ("Qwen/Qwen2.5-0.5B-Instruct", "87.5 % refused", 2),
    ("Qwen/Qwen2.5-1.5B-Instruct", "98.4 % refused", 2),
    ("Qwen/Qwen2.5-7B-Instruct", "93.8 % refused", 2),
    ("Qwen/Qwen2.5-7B-Instruct", "82 % of unsafe, 4.8 % of safe refused", 3),
    ("meta-llama/Llama-3.1-8B-Instruct", "96.5 % of unsafe, 8 % of safe refused", 3),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "0 % refused", 4),
)

# Ladders with more than two rungs. OLMo 3: pretraining, midtraining and long context are branches of one
# repository; its main branch is the end of the third.
_OLMO3 = "allenai/Olmo-3-1025-7B"
LADDERS = (
    {
        "base": f"{_OLMO3}@stage1-step1413814",
        "mid": f"{_OLMO3}@stage2-step47684",
        "long": _OLMO3,
        "sft": "allenai/Olmo-3-7B-Instruct-SFT",
        "dpo": "allenai/Olmo-3-7B-Instruct-DPO",
        "rl": "allenai/Olmo-3-7B-Instruct",
    },
    {
        "base": "allenai/OLMo-2-1124-7B",
        "sft": "allenai/OLMo-2-1124-7B-SFT",
        "dpo": "allenai/OLMo-2-1124-7B-DPO",
        "rl": "allenai/OLMo-2-1124-7B-Instruct",
    },
)


def find(name: str) -> Model | None:
    """The model of the list with this id; a base or another rung stands for its aligned partner.

    A revision after ``@`` doesn't matter, nor does the case of letters (the Hub doesn't mind it either).
    """
    wanted = name.split("@")[0].lower()
    for model in MODELS:
        names = {model.id, model.base, *(rung.split("@")[0] for rung in ladder(model.id).values())}
        if wanted in {n.lower() for n in names if n}:
            return model
    return None


def ladder(name: str) -> dict[str, str]:
    """The published stages of a model's training, first to last: stage -> name to load it by.

    ``base``, ``mid`` (after midtraining), ``long`` (after long-context training), ``sft``, ``dpo`` and ``rl``
    where the makers published them all; ``base`` and ``aligned`` where they published two; nothing for a
    model that is not on the list.

    >>> ladder("Qwen/Qwen2.5-1.5B-Instruct")
    {'base': 'Qwen/Qwen2.5-1.5B', 'aligned': 'Qwen/Qwen2.5-1.5B-Instruct'}
    """
    wanted = name.split("@")[0].lower()
    for rungs in LADDERS:
        if wanted in {rung.split("@")[0].lower() for rung in rungs.values()}:
            return dict(rungs)
    for model in MODELS:
        if model.base and wanted in {model.id.lower(), model.base.lower()}:
            return {"base": model.base, "aligned": model.id}
    return {}


def partners(name: str) -> dict[str, str]:
    """The base and the aligned partner of a model; empty if none are known.

    >>> partners("allenai/Olmo-3-1025-7B")
    {'base': 'allenai/Olmo-3-1025-7B', 'aligned': 'allenai/Olmo-3-7B-Instruct'}
    """
    model = find(name)
    return {"base": model.base, "aligned": model.id} if model and model.base else {}


def smaller(room: int, task: str = "run") -> list[str]:
    """Ids of ungated models with which a task takes no more than so many bytes, the largest first."""
    found = [m for m in MODELS if not m.gated and need(m.shape, task) <= room]
    return [m.id for m in sorted(found, key=lambda m: -m.shape.parameters)]


def ungated(name: str) -> str:
    """The ungated model whose size is nearest to that of a model; a small one if its size isn't known."""
    model = find(name)
    if model is None:
        return SMALL
    size = model.shape.parameters
    free = [m for m in MODELS if not m.gated]
    return min(free, key=lambda m: abs(m.shape.parameters - size)).id


# --------------------------------------------------------------------------- the page


def markdown(models: Sequence[Model] = MODELS) -> str:
    """The table of the page book/models.md: one row per model, by the smallest GPU that does everything."""
    head = ["Model", "Parameters", "Refusals", "Run", "Score", "LoRA", "Licence", "Base", "Blocks × width",
            "Heads (KV)", "MLP", "Vocabulary"]  # fmt: skip
    lines = []
    for tier in [*TIERS, "several GPUs"]:
        rows = [m for m in sorted(models, key=lambda m: m.shape.parameters) if smallest_tier(m) == tier]
        if not rows:
            continue
        lines += [f"### {tier}" if tier in TIERS else "### Several GPUs", ""]
        lines += ["| " + " | ".join(head) + " |", "|---|---:|---|" + "---:|" * 3 + "---|---|" + "---:|" * 4]
        for m in rows:
            s = m.shape
            cells = [
                f"[{m.id}]({m.page})" + (" (gated)" if m.gated else ""),
                f"{s.parameters / 1e9:.2f} B", m.refuses or "not known",
                *(shown(need(s, task)) for task in TASKS),
                m.licence, f"`{m.base}`" if m.base else "not published",
                f"{s.layers} × {s.width}", f"{s.heads} ({s.kv_heads})", str(s.ffn), str(s.vocab),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    used = {note for m in models for name, _, note in REFUSALS if name == m.id}
    lines += [
        f"*Refusals* as others measured them: {'; '.join(f'[{i}] {NOTES[i]}' for i in sorted(used))}.",
        "",
    ]
    return "\n".join(lines)


def write(page: Path, made: str | None = None, name: str = "catalogue") -> None:
    """Put what was made, by default the table, into a page between its marks.

    Args:
        name: of the marks, ``<!-- name:start -->`` and ``<!-- name:end -->``.

    Raises:
        ValueError: the page has no such marks.
    """
    text, start, end = page.read_text(encoding="utf-8"), f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    if start not in text or end not in text:
        raise ValueError(f"page={page.name!r} has no marks {start} and {end}; put both into it")
    before, rest = text.split(start, 1)
    after = rest.split(end, 1)[1]
    page.write_text(f"{before}{start}\n{markdown() if made is None else made}{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
