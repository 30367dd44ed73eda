"""The least time that each step of the notebooks can take on a GPU, by counting operations and bytes.

No exact method can do with fewer operations and bytes than are counted here, and no GPU does more of
them in a second than its data sheet says. So a measured time divided by its floor says how much there is to
gain. The floor is no forecast: real programs stay above it, often several times.

Counted are matrix products, a multiplication and an addition being two operations. Weights take two bytes
each and are too large to stay on the chip from one pass to the next. Activations are not counted as bytes.

With width d, B blocks, w = width of all queries, k = width of all keys, f neurons, V words, M = weights of
one block's matrices, and P' = parameters without an untied input embedding, which is only looked up:

* **A token at position t in one block**: ``2 M`` operations for the matrices, ``4 w (t + 1)`` for attention,
  since it looks at itself and what lies before.
* **The last block**: where no logits are read, only keys and values are needed: ``4 k d`` for a token.
* **Logits of one position**: ``2 d V``, or ``2 d`` for each word of an outcome that reads a few.

Introduced in book/performance ("Performance").
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harmlens.keep.files import size_text
from harmlens.models import hub

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from tables import GB, Shape, need, put, shape_of, usable

SITES = 3  # of a sweep: a layer's own contribution, its MLP, its attention


@dataclass(frozen=True)
class Machine:
    """A GPU as its data sheet has it.

    Attributes:
        flops: operations per second of dense half-precision matrix products.
        bandwidth: bytes per second from its memory.
        memory: bytes.
        marks: words that a GPU of this kind has in the name that torch gives it.
    """

    flops: float
    bandwidth: float
    memory: int
    marks: frozenset[str] = frozenset()


# From the makers' data sheets: float16 on a T4, bfloat16 elsewhere, without sparsity; never measured here.
MACHINES = {
    "T4": Machine(65e12, 320e9, 16 * GB, frozenset({"T4"})),
    "L4": Machine(121e12, 300e9, 24 * GB, frozenset({"L4"})),
    "A100 40 GB": Machine(312e12, 1555e9, 40 * GB, frozenset({"A100", "40GB"})),
    "A100 80 GB": Machine(312e12, 2039e9, 80 * GB, frozenset({"A100", "SXM4", "80GB"})),
    "H100 SXM": Machine(989e12, 3350e9, 80 * GB, frozenset({"H100", "HBM3"})),
}


@dataclass(frozen=True)
class Work:
    """What has to be done: arithmetic operations, and bytes that come from or go to the GPU's memory."""

    flops: float
    bytes: float = 0.0

    def seconds(self, machine: Machine) -> float:
        """The longer of both, as if arithmetic and memory worked at the same time and at full speed."""
        return max(self.flops / machine.flops, self.bytes / machine.bandwidth)


@dataclass(frozen=True)
class Step:
    """One step of the pipeline.

    Attributes:
        title: what it does, for people.
        phases: works that have to follow each other.
        need: bytes of GPU memory it takes; see :func:`tables.need`.
    """

    title: str
    phases: tuple[Work, ...]
    need: int

    def seconds(self, machine: Machine) -> float:
        """Least seconds on a machine: phases one after the other."""
        return sum(work.seconds(machine) for work in self.phases)


@dataclass(frozen=True)
class Sizes:
    """How much is asked of a model; by default about as much as notebook 18 asks.

    Attributes:
        texts: prompts that are run and answered, and pairs that are patched.
        tokens: of a prompt.
        shared: tokens before the first one at which both sides of a pair differ.
        common: tokens at the start that all prompts have in common.
        answer: tokens of an answer, generated or learnt.
        examples: answers that weights are scored on.
        batch: texts in one step of training.
        rank: of the adapters.
        ids: tokens whose logits the outcome reads.
    """

    texts: int = 40
    tokens: int = 64
    shared: int = 32
    common: int = 0
    answer: int = 64
    examples: int = 128
    batch: int = 8
    rank: int = 32
    ids: int = 8

    def __post_init__(self) -> None:
        for name in ("texts", "tokens", "answer", "examples", "batch", "rank", "ids"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.common <= self.shared < self.tokens:
            raise ValueError(
                f"shared={self.shared} must lie from common={self.common} (0 or more) to below "
                f"tokens={self.tokens}; choose a smaller one, or longer prompts"
            )


# --------------------------------------------------------------------------- counting


def weight_bytes(shape: Shape) -> int:
    """Bytes of the weights that one pass reads: ``2 P'``."""
    return 2 * (shape.parameters - (0 if shape.tied else shape.vocab * shape.width))


def _matrices(shape: Shape) -> int:
    """M: weights of one block's matrices."""
    return sum(out * into for out, into in shape.linears)


def _run(
    shape: Shape,
    rows: Sequence[int],
    *,
    start: int = 0,
    layers: int | None = None,
    read: int = 1,
    cost: Callable[[int, int], int] = lambda out, into: out * into,
) -> tuple[float, float]:
    """Operations of matrices and of attention for some rows in the topmost blocks.

    Args:
        rows: how many at each position from ``start`` on.
        layers: how many blocks; None for all.
        read: last positions whose logits are read.
        cost: multiply-adds of one token in a matrix [out, in].
    """
    depth = shape.layers if layers is None else layers
    if depth == 0:
        return 0.0, 0.0
    each = [cost(out, into) for out, into in shape.linears]
    whole, keys = sum(each), each[1] + each[2]
    looks = [4 * shape.queries * n * (start + i + 1) for i, n in enumerate(rows)]
    products = 2 * ((depth - 1) * whole + keys) * sum(rows) + 2 * (whole - keys) * sum(rows[-read:])
    return float(products), float((depth - 1) * sum(looks) + sum(looks[-read:]))


def forward(shape: Shape, texts: int, tokens: int, *, read: int = 1) -> Work:
    """A pass over texts of one length: every token in every block, logits of the last ``read`` positions.

    Operations ``texts [tokens (2 M (B - 1) + 4 k d) + read (2 M - 4 k d) + attention + 2 d V read]``; bytes
    ``2 P'``. Texts are taken to differ from the first token on.
    """
    products, attention = _run(shape, [texts] * tokens, read=read)
    return Work(products + attention + 2.0 * shape.width * shape.vocab * texts * read, weight_bytes(shape))


def token(shape: Shape, texts: int, before: int) -> Work:
    """One more token for each text, behind ``before`` others whose keys and values are kept.

    Operations ``texts [B (2 M + 4 w (before + 1)) + 2 d V]``; bytes ``2 P'``, and ``4 k B`` for each token
    that is looked back at. As long as texts are few, reading the weights takes longest.
    """
    looks = 4 * shape.queries * (before + 1)
    each = shape.layers * (2 * _matrices(shape) + looks) + 2 * shape.width * shape.vocab
    return Work(float(texts * each), weight_bytes(shape) + 4.0 * shape.keys * shape.layers * texts * before)


def both_runs(shape: Shape, sizes: Sizes) -> tuple[float, float]:
    """Operations of matrices and attention for both sides of all pairs; equal beginnings are run once."""
    rows = [1] * sizes.common + [sizes.texts] * (sizes.shared - sizes.common)
    return _run(shape, [*rows, *[2 * sizes.texts] * (sizes.tokens - sizes.shared)])


def patch(shape: Shape, sizes: Sizes) -> Work:
    """A sweep of three sites (layer, MLP, attention) in all blocks, all positions at once.

    Both runs of each pair; then for each cell the positions from the first difference on, in the blocks
    above the patch only. To a patch of attention the same block's MLP reacts: ``6 f d`` for each token (in
    the last block, for the last one). The outcome reads ``ids`` words. Bytes ``2 P'``.
    """
    n, behind = sizes.texts, sizes.tokens - sizes.shared
    above = (_run(shape, [n] * behind, start=sizes.shared, layers=k) for k in range(shape.layers))
    cells = SITES * sum(products + attention for products, attention in above)
    mlp = 6.0 * shape.ffn * shape.width * n * ((shape.layers - 1) * behind + 1)
    read = 2.0 * shape.width * sizes.ids * n * (SITES * shape.layers + 2)
    return Work(sum(both_runs(shape, sizes)) + cells + mlp + read, weight_bytes(shape))


def neurons(shape: Shape, sizes: Sizes) -> Work:
    """Every hidden unit of the last MLP at the last position, in closed form.

    Both runs of each pair; then ``2 f d (ids + 1 + texts)``: what each unit writes to the words that are
    read, the length of what it writes, and its product with each pair's residual stream. Bytes ``2 P'``.
    """
    form = 2.0 * shape.ffn * shape.width * (sizes.ids + 1 + sizes.texts)
    return Work(sum(both_runs(shape, sizes)) + form, weight_bytes(shape))


def score(shape: Shape, examples: int, tokens: int, answer: int) -> Work:
    """One kind of score of all block weights, in one pass over examples of ``tokens`` with an answer.

    The last token is only predicted. Matrices three times: forward, gradient of the input, and the outer
    product that is the gradient of the weight. Attention three times: forward, and twice as much backward.
    Logits of the answer twice. The gradient at the input of the first block's queries, keys and values is
    not needed. Bytes: weights in both passes, ``4 P'``, and float32 sums, ``4 M B``.
    """
    products, attention = _run(shape, [examples] * (tokens - 1), read=answer)
    head = 2.0 * shape.width * shape.vocab * examples * answer
    flops = 3 * products - _first(shape, examples, tokens - 1, answer) + 3 * attention + 2 * head
    return Work(flops, 2 * weight_bytes(shape) + 4.0 * _matrices(shape) * shape.layers)


def _first(shape: Shape, texts: int, tokens: int, read: int) -> float:
    """Operations of the first block's queries, keys and values."""
    asked = tokens if shape.layers > 1 else read
    return 2.0 * shape.width * texts * (2 * shape.keys * tokens + shape.queries * asked)


def select(shape: Shape) -> Work:
    """The set difference: both float32 scores of ``M B`` weights are read once, ``8 M B`` bytes."""
    return Work(0.0, 8.0 * _matrices(shape) * shape.layers)


def lora_step(shape: Shape, texts: int, tokens: int, answer: int, rank: int = 32) -> Work:
    """One step of training adapters in all linear layers of the blocks.

    As :func:`score` without outer products of weights: matrices twice. Adapters three times, ``2 rank (out +
    in)`` for each matrix and token. Nothing is computed again to save memory. Bytes: weights in both passes,
    ``4 P'``; adapters and Adam's two moments in float32, read and written: 24 for each parameter.
    """
    rows = [texts] * (tokens - 1)
    products, attention = _run(shape, rows, read=answer)
    low, _ = _run(shape, rows, read=answer, cost=lambda out, into: rank * (out + into))
    head = 2.0 * shape.width * shape.vocab * texts * answer
    # Nor is the gradient that the first block's adapters of queries, keys and values would pass on.
    unneeded = _first(shape, texts, tokens - 1, answer) + 6.0 * rank * shape.width * texts * (tokens - 1)
    inner = sum(out + into for out, into in shape.linears)
    flops = 2 * products + 3 * attention + 3 * low - unneeded + 2 * head
    return Work(flops, 2 * weight_bytes(shape) + 24.0 * rank * inner * shape.layers)


def steps(shape: Shape, sizes: Sizes = Sizes()) -> dict[str, Step]:
    """All steps by name, in the order of notebook 18."""
    n, long = sizes.texts, sizes.tokens + sizes.answer
    run = need(shape, "run", texts=n, length=sizes.tokens)
    answers = need(shape, "run", texts=n, length=long)
    once = forward(shape, n, sizes.tokens)
    later = [token(shape, n, before) for before in range(sizes.tokens, long - 1)]
    scored = score(shape, sizes.examples, long, sizes.answer)
    kept = 2 * shape.parameters + 8 * _matrices(shape) * shape.layers  # the model lies there too
    scoring = need(shape, "score", length=long)
    return {
        "forward": Step(f"logits of {n} prompts", (once,), run),
        "generate": Step(f"{sizes.answer} tokens for {n} prompts", (once, *later), answers),
        "patch": Step(f"sweep of {n} pairs, {SITES} sites, all layers", (patch(shape, sizes),), run),
        "neurons": Step(f"all units of the last MLP, {n} pairs", (neurons(shape, sizes),), run),
        "prune_score": Step(f"prune score, {sizes.examples} examples", (scored,), scoring),
        "preserve_score": Step(f"preserve score, {sizes.examples} examples", (scored,), scoring),
        "select": Step("set difference of both scores", (select(shape),), kept),
        "lora": Step(
            f"one LoRA step, {sizes.batch} texts",
            (lora_step(shape, sizes.batch, long, sizes.answer, sizes.rank),),
            need(shape, "lora", texts=sizes.batch, length=long),
        ),
    }


def known(device: str) -> str | None:
    """Which of :data:`MACHINES` a GPU is, by the name that torch gives it; None if it is none of them.

    >>> known("NVIDIA A100-SXM4-40GB")
    'A100 40 GB'
    """
    words = set(re.split(r"[\s-]+", device))
    return next((name for name, machine in MACHINES.items() if machine.marks <= words), None)


# --------------------------------------------------------------------------- the page

SHOWN = (hub.SMALL, "Qwen/Qwen3-8B")


def brief(seconds: float) -> str:
    """A time for people, two digits.

    >>> brief(0.01234), brief(3.21)
    ('12 ms', '3.2 s')
    """
    for value, unit in ((seconds, "s"), (seconds * 1e3, "ms"), (seconds * 1e6, "µs")):
        if value >= 0.995 or unit == "µs":
            break
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"


def markdown(names: Sequence[str] = SHOWN, sizes: Sizes = Sizes()) -> str:
    """The tables of the page book/performance.md: a row for each step, a column for each machine.

    Raises:
        ValueError: a model that is not on the list of data/models.yaml.
    """
    lines = []
    for name in names:
        shape = shape_of(name)
        lines += [f"### The shape of {name}, {shape.parameters / 1e9:.1f} billion parameters", ""]
        lines += ["| Step | What | Memory | " + " | ".join(MACHINES) + " |"]
        lines += ["|---|---|---:|" + "---:|" * len(MACHINES)]
        for key, step in steps(shape, sizes).items():
            cells = [_cell(shape, step, machine) for machine in MACHINES.values()]
            lines.append(f"| `{key}` | {step.title} | {size_text(step.need)} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(shape: Shape, step: Step, machine: Machine) -> str:
    room = usable(machine.memory)
    if 2 * shape.parameters > room:
        return "too big"
    if step.need > room:  # scores that don't fit lie in host memory, where the GPU's speed says nothing
        return "host memory" if step.phases[0].flops == 0 else "too big"
    return brief(step.seconds(machine))


if __name__ == "__main__":
    put(Path(sys.argv[1]), "floors", markdown())
