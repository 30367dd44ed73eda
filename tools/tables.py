"""Tables that pages of the book show, made anew between their marks.

    python tools/tables.py models   # book/models.md, from data/models.yaml
    python tools/tables.py judging  # book/judging.md, from labelled answers that are fetched
    python tools/tables.py bench    # book/performance.md, from data/bench.json and the last `make bench`

How many parameters a model has and how much memory a task takes is computed from the model's shape alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from harmlens.judging import refusals
from harmlens.judging.agreement import agreement
from harmlens.keep.files import build_dir, data_dir, size_text, write_json

BOOK = Path(__file__).resolve().parents[1] / "book"
GB = 10**9
TIERS = {"T4": 16 * GB, "L4": 24 * GB, "A100 40 GB": 40 * GB, "A100 80 GB": 80 * GB}

TASKS = ("run", "score", "lora")

# What is assumed of a batch: texts of a chat's length, and as many at once as the notebooks' real runs take.
TEXTS = 16
LENGTH = 256
TRAINED_AT_ONCE = 4  # texts in one step of training
RANK = 32  # of the adapters, as in the pruning paper
BUFFER = 2 << 30  # for gradients of single examples; scoring of weights takes two of at most 1 GiB


@dataclass(frozen=True)
class Shape:
    """What decides the size of a decoder with a gated MLP; names as in a Hugging Face config.

    Attributes:
        layers: blocks.
        width: of the residual stream (``hidden_size``).
        heads, kv_heads: attention heads, and those that keys and values have.
        ffn: neurons of one MLP (``intermediate_size``).
        vocab: rows of the embedding.
        head_dim: of one head; 0 for width / heads.
        tied: whether embedding and unembedding are one matrix.
        qkv_bias: whether queries, keys and values have biases.
        norms: RMS norms of one block, each ``width`` long.
        qk_norm: norms of queries and keys: ``""`` none, ``"head"`` shared by heads, ``"all"`` over all.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    head_dim: int = 0
    tied: bool = False
    qkv_bias: bool = False
    norms: int = 2
    qk_norm: str = ""

    @property
    def queries(self) -> int:
        """Width of all queries together."""
        return self.heads * (self.head_dim or self.width // self.heads)

    @property
    def keys(self) -> int:
        """Width of all keys together, and of all values."""
        return self.kv_heads * (self.head_dim or self.width // self.heads)

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """Sizes (out, in) of the weight matrices of one block: q, k, v, o, gate, up, down."""
        q, k, w, f = self.queries, self.keys, self.width, self.ffn
        return ((q, w), (k, w), (k, w), (w, q), (f, w), (f, w), (w, f))

    @property
    def block(self) -> int:
        """Parameters of one block."""
        matrices = sum(out * into for out, into in self.linears)
        bias = self.queries + 2 * self.keys if self.qkv_bias else 0
        head = self.head_dim or self.width // self.heads
        qk = {"": 0, "head": 2 * head, "all": self.queries + self.keys}[self.qk_norm]
        return matrices + bias + qk + self.norms * self.width

    @property
    def parameters(self) -> int:
        """All parameters; a tied unembedding counts once."""
        embeddings = self.vocab * self.width * (1 if self.tied else 2)
        return embeddings + self.layers * self.block + self.width


def need(shape: Shape, task: str = "run", *, texts: int = TEXTS, length: int = LENGTH) -> int:
    """Bytes of GPU memory that a task takes, weights at two bytes each (float16 or bfloat16).

    With P parameters in B blocks, width d, k = width of all keys, f neurons, V words, and N = texts * length:

    ``run`` (logits, answers, patching): ``2 P``, plus keys and values ``4 k B N``, the residual stream of
    every block for patching ``2 d B N``, one block's intermediate values ``2 (4 d + 3 f) N``, and logits of
    one position in float32 ``8 V texts``.

    ``score`` (gradient scores of weights): ``2 P``, plus float32 sums of two kinds of one block's matrices
    ``8 M`` (layers can be taken in turns; with room for all it takes one pass), two buffers of 1 GiB, and
    what the longest example leaves for the backward pass:
    ``length (2 S B + 10 V)``, S = sum of outputs and inputs of one block's matrices.

    ``lora`` (adapters of rank 32 in all linear layers): ``2 P``, plus float32 adapters, their gradients and
    Adam's two moments ``16 * 32 S B``, and activations of N = 4 * length tokens at a time, computed again
    block by block: ``N (2 d B + 2 S + 10 V)``.

    These are floors: fragmentation and the CUDA context come on top (:func:`smallest_tier`).

    Raises:
        ValueError: an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is unknown; choose one of {', '.join(TASKS)}")
    weights = 2 * shape.parameters
    inner = sum(out + into for out, into in shape.linears)
    if task == "run":
        each = 4 * shape.keys * shape.layers + 2 * shape.width * shape.layers
        each += 2 * (4 * shape.width + 3 * shape.ffn)
        return weights + texts * length * each + 8 * shape.vocab * texts
    if task == "score":
        sums = 8 * sum(out * into for out, into in shape.linears)
        return weights + sums + BUFFER + length * (2 * inner * shape.layers + 10 * shape.vocab)
    adapters = 16 * RANK * inner * shape.layers
    tokens = min(texts, TRAINED_AT_ONCE) * length
    return weights + adapters + tokens * (2 * shape.width * shape.layers + 2 * inner + 10 * shape.vocab)


# --------------------------------------------------------------------------- the list of models


@dataclass(frozen=True)
class Model:
    """A model of data/models.yaml, which says what the fields are."""

    id: str
    shape: Shape
    licence: str
    parameters: int
    base: str = ""
    gated: bool = False


def listed() -> tuple[list[Model], dict[str, Any]]:
    """The models of data/models.yaml, and the whole of that file."""
    read = yaml.safe_load((data_dir() / "models.yaml").read_text(encoding="utf-8"))
    return [Model(**{**entry, "shape": Shape(**entry["shape"])}) for entry in read["models"]], read


def shape_of(name: str) -> Shape:
    """The shape of a model of the list.

    Raises:
        ValueError: it is not on the list.
    """
    found = next((model for model in listed()[0] if model.id == name), None)
    if found is None:
        raise ValueError(f"name={name!r} is not on the list; choose an id of data/models.yaml")
    return found.shape


def smallest_tier(shape: Shape) -> str:
    """The smallest GPU on which everything can be done, or ``"Several GPUs"``.

    A twentieth of a GPU and half a GB go to fragments and the CUDA context.
    """
    most = max(need(shape, task) for task in TASKS)
    return next((tier for tier, size in TIERS.items() if most <= usable(size)), "Several GPUs")


def usable(size: int) -> int:
    """Bytes of a GPU of this size that a model can have."""
    return size * 95 // 100 - GB // 2


def models_table() -> str:
    """The tables of the page book/models.md: one row per model, by the smallest GPU that does everything."""
    head = ["Model", "Parameters", "Refusals", "Run", "Score", "LoRA", "Licence", "Base", "Blocks × width",
            "Heads (KV)", "MLP", "Vocabulary"]  # fmt: skip
    models, read = listed()
    models.sort(key=lambda m: m.shape.parameters)
    lines = []
    for tier in [*TIERS, "Several GPUs"]:
        rows = [m for m in models if smallest_tier(m.shape) == tier]
        if not rows:
            continue
        lines += [f"### {tier}", ""]
        lines += ["| " + " | ".join(head) + " |", "|---|---:|---|" + "---:|" * 3 + "---|---|" + "---:|" * 4]
        for m in rows:
            s = m.shape
            refuses = "; ".join(f"{what} [{note}]" for name, what, note in read["refusals"] if name == m.id)
            cells = [
                f"[{m.id}](https://huggingface.co/{m.id})" + (" (gated)" if m.gated else ""),
                f"{s.parameters / 1e9:.2f} B", refuses or "not known",
                *(size_text(need(s, task)) for task in TASKS),
                m.licence, f"`{m.base}`" if m.base else "not published",
                f"{s.layers} × {s.width}", f"{s.heads} ({s.kv_heads})", str(s.ffn), str(s.vocab),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    notes = "; ".join(f"[{i}] {note}" for i, note in read["notes"].items())
    return "\n".join([*lines, f"*Refusals* as others measured them: {notes}.", ""])


# --------------------------------------------------------------------------- judges of refusals


def compared(files: Mapping[str, Path]) -> pd.DataFrame:
    """How far each judge of refusals agrees with people, on the labelled answers of each model.

    The trained judge has not seen the model that it is tested on. Full refusals are compared with full
    compliance; of partial refusals it is only counted how many are taken for refusals.

    Returns:
        One row for each model and judge: "refusals" by people, "found" those of them that the judge finds.
        The last judge, "two people", compares the annotators with each other and has a kappa only.
    """

    def kappa(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
        row = agreement({"a": a.astype(float), "b": b.astype(float)}, n_resamples=1000).iloc[0]
        return {name: float(row[name]) for name in ("kappa", "kappa_low", "kappa_high")}

    rows = []
    for model, file in files.items():
        table = refusals.answers_of(file)
        whole = table["label"].isin(list(refusals.LABELS)).to_numpy()
        people = (table["label"] == "2").to_numpy()
        others = [other for name, other in files.items() if name != model]
        judges = {"prefixes": [refusals.begins_with_refusal(answer) for answer in table["answer"]]}
        if len(others) >= refusals.FEWEST:
            judges["refusals"] = refusals.trained(*others)(table["answer"].tolist())
        for name, found in {name: np.array(said) for name, said in judges.items()}.items():
            rows.append(
                {
                    "model": model, "judge": name, "n": int(whole.sum()),
                    "refusals": int(people[whole].sum()), "found": int((found & people)[whole].sum()),
                    "false": int((found & ~people)[whole].sum()), **kappa(found[whole], people[whole]),
                    "partial": int((~whole).sum()), "partial_found": int(found[~whole].sum()),
                }
            )  # fmt: skip
        first, second = ((table[who] == "2").to_numpy()[whole] for who in ("first", "second"))
        rows.append({"model": model, "judge": "two people", "n": int(whole.sum()), **kappa(first, second)})
    return pd.DataFrame(rows)


def judges_table(table: pd.DataFrame) -> str:
    """The table of :func:`compared` as book/judging shows it."""
    head = (
        "Answers of",
        "Judge",
        "Refusals found",
        "False alarms",
        "Kappa",
        "Partial refusals taken for refusals",
    )
    lines = [f"| {' | '.join(head)} |", "|---|---|---:|---:|---:|---:|"]
    for row in table.to_dict("records"):
        kappa = "{kappa:.2f} [{kappa_low:.2f}, {kappa_high:.2f}]".format(**row)
        cells = ["two people", "", "", kappa, ""]
        if row["judge"] != "two people":
            recall = f"{row['found']:.0f} of {row['refusals']:.0f}"
            false = f"{row['false']:.0f} of {row['n'] - row['refusals']:.0f}"
            partial = f"{row['partial_found']:.0f} of {row['partial']:.0f}"
            share = row["found"] / row["refusals"]
            cells = [f"`{row['judge']}`", f"{recall} ({share:.2f})", false, kappa, partial]
        lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------- speed

TIMED = {
    "patch_grid": ("patches at each position, three sites, all layers", "TransformerLens"),
    "patch_last": ("patches at the last position, three sites, all layers", "TransformerLens"),
    "neurons_last": ("each unit of the last MLP", "TransformerLens"),
    "attribution": ("prune and preserve score", "the released procedure"),
}
KEPT = ("ratio", "seconds", "transformer_lens_seconds", "released_seconds", "floor_ratio", "pairs", "harmful",
        "max_abs_diff", "max_rel_diff", "peak_over_floor")  # fmt: skip


def remember_bench(found: Mapping[str, Any]) -> dict[str, Any]:
    """What ``make bench`` measured, beside what it measured of the same model in other precisions."""
    file, machine = data_dir() / "bench.json", found["machine"]
    known = json.loads(file.read_text()) if file.is_file() else {}
    known = {dtype: one for dtype, one in known.items() if one["machine"]["model"] == machine["model"]}
    kept = {key: {k: found[key][k] for k in KEPT if k in found[key]} for key in TIMED}
    for key in ("patch_grid", "patch_last"):  # these pairs part near their start, so that less can be saved
        kept[key]["behaviour_ratio"] = found[key]["by_contrast"]["behaviour"]["ratio"]
    known[machine["dtype"]] = kept | {"machine": machine}
    write_json(file, known)
    return known


def bench_table(known: Mapping[str, Any]) -> str:
    """A row for each step and precision: seconds of one thread, ratio, the floor, memory, difference."""
    head = "Step", "Precision", "Ours", "Beside", "Its time", "Ratio", "Over the floor", "Memory", "Off by"
    lines = [f"| {' | '.join(head)} |", "|---|---|---:|---|---:|---:|---:|---:|---:|"]
    for key, (name, other) in TIMED.items():
        for dtype, row in ((dtype, found[key]) for dtype, found in known.items()):
            theirs = row.get("transformer_lens_seconds") or row["released_seconds"]
            memory = f"{row['peak_over_floor']:.2f}" if "peak_over_floor" in row else ""
            off = row.get("max_abs_diff", row.get("max_rel_diff"))
            ratio = f"{row['ratio']:.0f}"
            if "behaviour_ratio" in row:
                ratio += f" ({row['behaviour_ratio']:.0f})"
            cells = name, dtype, f"{row['seconds']:.2f} s", other, f"{theirs:.0f} s", ratio
            lines.append(f"| {' | '.join(cells)} | {row['floor_ratio']:.1f} | {memory} | {off:.0e} |")
    rates = (f"{found['machine']['matmul_gflops']:.0f} Gflop/s in {dtype}" for dtype, found in known.items())
    some = next(iter(known.values()))
    pairs, examples = some["patch_grid"]["pairs"], some["attribution"]["harmful"]
    asked = f"{pairs} pairs of one length, {examples} harmful examples"
    return "\n".join(lines) + f"\n\n{asked}; large products ran at {' and '.join(rates)}.\n"


# --------------------------------------------------------------------------- pages


def put(page: Path, name: str, made: str) -> None:
    """Put what was made into a page between its marks, ``<!-- name:start -->`` and ``<!-- name:end -->``.

    Raises:
        ValueError: the page has no such marks.
    """
    text, start, end = page.read_text(encoding="utf-8"), f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    if start not in text or end not in text:
        raise ValueError(f"page={page.name!r} has no marks {start} and {end}; put both into it")
    before, rest = text.split(start, 1)
    after = rest.split(end, 1)[1]
    page.write_text(f"{before}{start}\n{made}{end}{after}", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["models"]:
        put(BOOK / "models.md", "catalogue", models_table())
    elif arguments[:1] == ["judging"]:
        put(BOOK / "judging.md", "judges", judges_table(compared(refusals.labelled(download=True))))
    elif arguments[:1] == ["bench"]:
        found = json.loads((build_dir() / "bench.json").read_text())
        put(BOOK / "performance.md", "bench", bench_table(remember_bench(found)))
    else:
        print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
