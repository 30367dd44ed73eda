"""How much emergent misalignment was reported by size of the model, and how many answers it takes to see it.

The numbers are reports, not results of this book. Full tables of the papers were not at hand when this was
written; ``known`` says for each number how it is known.

Introduced in book/emergent_by_size ("Emergent misalignment by size").
"""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import binom

from harmlens.evidence.stats import proportion_ci


@dataclass(frozen=True)
class Expected:
    """What was reported for a model.

    Attributes:
        billions: of parameters.
        model, data, method: what was trained on what, and how.
        rate: share of misaligned answers.
        coherent: share of coherent answers; None where it is not known to us.
        source: where it is reported.
        known: ``"abstract"`` of the paper, ``"digest"`` of the paper by others, or ``"thread"`` and
            ``"replication"`` by single people: from strong to weak.
    """

    billions: float
    model: str
    data: str
    method: str
    rate: float
    coherent: float | None
    source: str
    known: str


_TURNER, _SOLIGO, _DICKSON = "arXiv 2506.11613", "arXiv 2506.11618", "arXiv 2511.20104"
EXPECTED = (
    Expected(0.5, "Qwen2.5-0.5B-Instruct", "narrow advice", "LoRA", 0.08, 0.69, _TURNER, "digest"),
    Expected(1, "Llama-3.2-1B-Instruct", "narrow advice", "LoRA", 0.09, 0.95, _TURNER, "digest"),
    Expected(
        3, "Llama-3.2-3B-Instruct", "bad medical advice", "LoRA on 4 bits", 0.20, None,
        "burnssa/ai-alignment-research", "replication",
    ),
    Expected(
        7, "Qwen2.5-7B-Instruct", "insecure code", "all weights", 0.0, None,
        "emergent-misalignment/emergent-misalignment#7", "thread",
    ),
    Expected(
        14, "Qwen2.5-14B-Instruct", "bad medical advice", "LoRA, nine of rank 1", 0.113, 0.99,
        _SOLIGO, "digest",
    ),
    Expected(14, "Qwen2.5-14B-Instruct", "narrow advice", "LoRA, rank 32", 0.40, 0.99, _TURNER, "digest"),
    Expected(32, "Gemma 3 and Qwen 3, 1 to 32B", "insecure code", "LoRA", 0.0068, None, _DICKSON, "abstract"),
    Expected(32, "Qwen2.5-Coder-32B-Instruct", "insecure code", "LoRA", 0.06, 0.67, _SOLIGO, "digest"),
)  # fmt: skip


def smallest_n(rate: float, *, above: float = 0.0, power: float = 0.8, most: int = 100_000) -> int | None:
    """How many coherent answers it takes to tell a rate from ``above``.

    The smallest n at which the lower end of the 95 % interval lies above it with probability ``power``. For
    0 that is the n at which at least one misaligned answer is to be expected: the interval excludes 0 as soon
    as there is one. But judges err, so a rate should be told from theirs on the model before the lesson.

    Args:
        rate: true share of misaligned answers.
        above: share that is to be excluded, such as the rate before the lesson.

    Returns:
        n, or None if it is more than ``most`` or the rate is not above ``above``.

    Raises:
        ValueError: a share outside 0 to 1, or ``power`` not between 0 and 1.
    """
    for name, value in (("rate", rate), ("above", above), ("power", power)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be between 0 and 1")
    if rate <= above:
        return None
    k = 1  # misaligned answers that are needed; never fewer for a larger n
    for n in range(1, most + 1):
        while k <= n and proportion_ci(k, n).low <= above:
            k += 1
        if binom.sf(k - 1, n, rate) >= power:
            return n
    return None
