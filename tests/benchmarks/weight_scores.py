"""How fast weights are scored and selected, beside the released procedure and what the machine could do.

**Scores.** Both scores of the pruning paper, the signed one on harmful and the unsigned one on benign
answers, in one process, on the same model, examples and dtype, with one thread. :func:`released` is the
procedure of the paper's released code, written from its description: for each layer and each example one
forward and one backward pass, with gradients for this layer's linear weights only. Seconds are those of the
processor.

``max_rel_diff`` is the largest difference in any matrix over the matrix' largest score, between ours and the
released procedure with its loss taken in float64 from the model's logits. The model's own loss, in float32,
loses digits where the model is sure of its answer: ``max_rel_diff_own_loss`` is the difference from that, and
``against_float64`` says who is right: how far ours, the released procedure, and the released procedure with
the model's own loss (``released_own_loss``) are from scores of a float64 model, on a few examples. What is
timed is the procedure as released, with the model's own loss.

The floor is three forward passes' worth of operations (forward, back to the inputs, gradients of the
weights), of all tokens in all scored matrices and of the answers' tokens in the output head, at the rate at
which this machine multiplies large matrices.

**Memory.** A deep random model is made and scored in a process of its own. ``peak_over_floor`` is what that
process takes at most, over weights and accumulators; what the libraries take (after a run of a tiny model) is
taken off.

**Selection.** The set difference with the paper's p and q for a billion random scores, in matrices of a large
model's size, beside ``torch.topk`` and a full sort of a part of them.
"""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timing import best, matmul_rate
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from harmlens.asking import tasks
from harmlens.asking.source import source
from harmlens.models.forward import IGNORE, SMALL, LanguageModel, Row
from harmlens.training import organism
from harmlens.weights import attribution, masks
from harmlens.weights.scores import Scores, layer_of, matrices

BARS = {
    "attribution": {"ratio": 20, "max_rel_diff": 1e-4},
    "attribution_24l": {"ratio": 10, "max_rel_diff": 1e-4, "peak_over_floor": 1.25},
}
DEEP = {"layers": 24, "width": 512, "hidden": 1376, "heads": 8, "vocabulary": 1000}
DEEP_ROWS, LENGTH, ANSWER = 6, 40, 16
P, Q = 5e-5, 1e-5  # the paper's
MATRIX = (4096, 14336)  # of an 8-billion-parameter Llama
FEW = 8  # examples that are compared with float64


# --------------------------------------------------------------------------- models and examples


def random_model(
    *, layers: int, width: int, hidden: int, heads: int, vocabulary: int, **options: Any
) -> LanguageModel:
    """A Llama with random weights, allocated once; for token ids only."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, tie_word_embeddings=False, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return LanguageModel("random", LlamaForCausalLM(config).eval(), organism.tokenizer(), "random")


def random_rows(n: int, vocabulary: int, *, length: int = LENGTH, answer: int = ANSWER) -> list[Row]:
    """Examples of about one length, whose last tokens are the answer."""
    generator = torch.Generator().manual_seed(n)
    out = []
    for i in range(n):
        size = length - i % 3
        ids = torch.randint(vocabulary, (size,), generator=generator).tolist()
        out.append(Row(ids, [False] * (size - answer) + [True] * answer))
    return out


@dataclass(frozen=True)
class Case:
    """A model, the examples of the signed score, and those of the unsigned one."""

    lm: LanguageModel
    harmful: list[Row]
    benign: list[Row]

    def cut(self, n: int | None) -> Case:
        """At most n examples of each."""
        return replace(self, harmful=self.harmful[:n], benign=self.benign[:n])


def own_case(lm: LanguageModel, data: str, n: int | None) -> Case:
    """The examples that notebook 09 scores, at most n of each."""
    asked = source(lm, data)
    both = [asked.task(kind, n=asked.at_most(n or 412)) for kind in ("harmful", "benign")]
    return Case(lm, *(tasks.examples(lm, task, n=n or 412) for task in both))


def deep_case() -> Case:
    rows = random_rows(2 * DEEP_ROWS, DEEP["vocabulary"])
    return Case(random_model(**DEEP), rows[:DEEP_ROWS], rows[DEEP_ROWS:])


# --------------------------------------------------------------------------- both sides


def ours(case: Case) -> tuple[dict[str, Tensor], ...]:
    """Both scores of every matrix."""
    prune = attribution.prune_score(case.lm, case.harmful)
    return prune.values, attribution.preserve_score(case.lm, case.benign).values


def theirs(case: Case, *loss: Callable[..., Tensor]) -> tuple[dict[str, Tensor], ...]:
    """The same as :func:`ours` by the released procedure."""
    sides = ((case.harmful, "signed"), (case.benign, "unsigned"))
    return tuple(released(case.lm, rows, kind, *loss) for rows, kind in sides)


def own_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    return model(input_ids=ids, labels=labels, use_cache=False).loss


def wide_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """The same in float64; a model's own loss turns logits into float32 first."""
    logits = model(input_ids=ids, use_cache=False).logits.double()
    return cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=IGNORE)


def released(
    lm: LanguageModel, rows: Sequence[Row], kind: str, loss: Callable[..., Tensor] = wide_loss
) -> dict[str, Tensor]:
    """One layer's gradients at a time, one example at a time."""
    layers: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, module in matrices(lm).items():
        layers[layer_of(name)][name] = module.weight
    sums = {}
    lm.model.requires_grad_(False)
    for weights in layers.values():
        sums |= {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for weight in weights.values():
            weight.requires_grad_(True)
        for row in rows:
            ids = torch.tensor([row.ids])
            labels = torch.where(torch.tensor([row.learn]), ids, IGNORE)
            loss(lm.model, ids, labels).backward()
            for name, weight in weights.items():
                sums[name] += weight.grad if kind == "signed" else weight.grad.abs()
                weight.grad = None
        for name, weight in weights.items():
            weight.requires_grad_(False)
            sums[name] *= weight if kind == "signed" else weight.abs()
    return sums


def difference(found: Sequence[dict[str, Tensor]], expected: Sequence[dict[str, Tensor]]) -> float:
    """Largest difference in any matrix, over the matrix' largest score."""
    return max(
        ((mine[name] - value).abs().max() / value.abs().max()).item()
        for mine, other in zip(found, expected, strict=True)
        for name, value in other.items()
    )


def against_float64(case: Case) -> dict[str, float]:
    few = case.cut(FEW)
    wide = replace(few, lm=replace(few.lm, model=copy.deepcopy(few.lm.model).double()))
    exact = theirs(wide)
    sides = {"ours": ours(few), "released": theirs(few), "released_own_loss": theirs(few, own_loss)}
    return {name: difference(found, exact) for name, found in sides.items()}


def operations(case: Case) -> float:
    """Of one forward pass over all examples; a multiplication and an addition are two."""
    block = sum(module.weight.numel() for module in matrices(case.lm).values())
    head = case.lm.model.get_output_embeddings().weight.numel()
    rows = case.harmful + case.benign
    return 2.0 * sum(len(row.ids) * block + sum(row.learn) * head for row in rows)


def compare(case: Case, rate: float, repeats: int) -> dict[str, Any]:
    seconds, found = best(partial(ours, case), repeats, partial(ours, case.cut(2)))
    # One run: it takes so long that noise averages out, and a slow first call counts little.
    reference, literal = best(partial(theirs, case, own_loss), 1, partial(theirs, case.cut(1), own_loss))
    floor = 3 * operations(case) / rate
    return {
        "ratio": reference / seconds,
        "max_rel_diff": difference(found, theirs(case)),
        "max_rel_diff_own_loss": difference(found, literal),
        "floor_ratio": seconds / floor,
        "seconds": seconds,
        "floor_seconds": floor,
        "released_seconds": reference,
        "harmful": len(case.harmful),
        "benign": len(case.benign),
        "tokens": sum(len(row.ids) for row in case.harmful + case.benign),
        "layers": case.lm.model.config.num_hidden_layers,
    }


# --------------------------------------------------------------------------- memory


def peak(kinds: Sequence[str], shape: dict[str, int], n: int) -> dict[str, int]:
    """Bytes taken at most while a model is made and scored, in this process: use a fresh one."""
    tiny = random_model(layers=1, width=16, hidden=16, heads=2, vocabulary=16)
    attribution.attribute(tiny, random_rows(2, 16), kinds=kinds)
    gc.collect()
    before = resident()
    lm = random_model(**shape)
    made = resident() - before
    attribution.attribute(lm, random_rows(n, shape["vocabulary"]), kinds=kinds)
    # The kernel's own high-water mark: ru_maxrss of a child starts at what its parent holds. It never falls,
    # so it must not have been higher before the model was made.
    most = resident("VmHWM") - before
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    scored = 4 * len(kinds) * sum(module.weight.numel() for module in matrices(lm).values())
    return {"peak": most, "made": made, "weights": weights, "accumulators": scored}


def resident(what: str = "VmRSS") -> int:
    """Bytes of this process that are in memory now, or were at most (VmHWM)."""
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def shape_of(lm: LanguageModel) -> dict[str, int]:
    """What :func:`random_model` takes, of a model of the Llama kind."""
    c = lm.model.config
    return {
        "layers": c.num_hidden_layers, "width": c.hidden_size, "hidden": c.intermediate_size,
        "heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads,
        "vocabulary": c.vocab_size,
    }  # fmt: skip


def peaks(shape: dict[str, int]) -> dict[str, Any]:
    """What a fresh process takes for each score alone and for both, and the most of it over the floor."""
    out = {}
    for kinds in (("signed",), ("unsigned",), ("signed", "unsigned")):
        given = json.dumps({"kinds": kinds, "shape": shape, "n": 2 * DEEP_ROWS})
        command = [sys.executable, __file__, given]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        out["+".join(kinds)] = json.loads(done.stdout.splitlines()[-1])
    over = [one["peak"] / (one["weights"] + one["accumulators"]) for one in out.values()]
    return {"peak_over_floor": max(over), "memory": out}


# --------------------------------------------------------------------------- selection


def selection(count: int, repeats: int) -> dict[str, Any]:
    """Time per weight of the set difference, and of what would do it plainly, on fewer weights."""
    shape = MATRIX if count >= MATRIX[0] * MATRIX[1] else (1, count)
    torch.manual_seed(0)
    # The same two matrices over and over: only the time counts.
    values = [torch.randn(shape) for _ in range(2)]
    kinds = (("signed", values[0]), ("unsigned", values[1].abs()))
    prune, preserve = (Scores(kind, {"weight": value}, "random", "random") for kind, value in kinds)
    size = values[0].numel()
    times = -(-count // size)

    def all_matrices() -> list:
        return [masks.select(prune, preserve, p=P, q=Q) for _ in range(times)]

    def one_matrix() -> Any:
        return masks.select(prune, preserve, p=P, q=Q)

    seconds, found = best(all_matrices, max(1, repeats // 4), one_matrix)
    part = values[0].flatten()[: 1 << 24]
    k, keep = int(Q * len(part)) or 1, int(P * len(part)) or 1
    other = preserve.values["weight"].flatten()[: len(part)]
    plain, _ = best(lambda: (part.topk(k, largest=False), other.topk(keep)), 1)
    full, _ = best(lambda: (part.sort(), other.sort()), 1, lambda: None)
    return {
        "ns_per_weight": 1e9 * seconds / (times * size),
        "topk_ns_per_weight": 1e9 * plain / len(part),
        "sort_ns_per_weight": 1e9 * full / len(part),
        "weights": times * size,
        "compared_on": len(part),
        "selected": sum(map(len, found)),
        "seconds": seconds,
    }


# --------------------------------------------------------------------------- all of it


def measure(case: Case, rate: float, *, weights: int = 10**9, repeats: int = 8) -> dict[str, Any]:
    """The entries ``attribution``, ``attribution_24l`` and ``select`` of ``bench.json``."""
    out = {"attribution": compare(case, rate, repeats) | {"against_float64": against_float64(case)}}
    if case.lm.model.num_parameters() > SMALL:  # else the libraries take more
        out["attribution"] |= peaks(shape_of(case.lm))
    gc.collect()
    out["attribution_24l"] = compare(
        deep_case(), matmul_rate((1024, 1024, 1024)), max(1, repeats // 2)
    ) | peaks(DEEP)
    out["select"] = selection(weights, repeats)
    return out


def table(found: dict[str, Any]) -> str:
    heads = (
        ("ours", 9),
        ("released", 9),
        ("ratio", 8),
        ("bar", 6),
        ("memory", 9),
        ("floor x", 9),
        ("diff", 10),
    )
    lines = [" " * 26 + "".join(f"{head:>{width}}" for head, width in heads)]
    for key, bars in BARS.items():
        row = found[key]
        over = f"{row['peak_over_floor']:8.2f}x" if "peak_over_floor" in row else " " * 9
        lines.append(
            f"{key:26}{row['seconds']:8.3f}s{row['released_seconds']:8.2f}s{row['ratio']:8.1f}{bars['ratio']:6}"
            f"{over}{row['floor_ratio']:9.1f}{row['max_rel_diff']:10.1e}"
        )
    row, exact = found["select"], found["attribution"]["against_float64"]
    off = ", ".join(f"{name.replace('_', ' ')} {value:.1e}" for name, value in exact.items())
    lines.append(f"  off from float64: {off}")
    lines.append(
        f"select: {row['ns_per_weight']:.2f} ns per weight ({row['weights']:.1e} weights); torch.topk "
        f"{row['topk_ns_per_weight']:.1f}, sorting {row['sort_ns_per_weight']:.0f}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(peak(**json.loads(sys.argv[1]))))
