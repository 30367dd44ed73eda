"""How many parameters a model has and how much memory a task takes, from the model's shape alone.

Introduced in book/models ("Models").
"""

from __future__ import annotations

from dataclasses import dataclass

TASKS = ("run", "score", "lora")

# What is assumed of a batch: texts of a chat's length, and as many at once as the notebooks' real runs take.
TEXTS = 16
LENGTH = 256
TRAINED_AT_ONCE = 4  # texts in one step of training
RANK = 32  # of the adapters, as in the pruning paper
BUFFER = 2 << 30  # for gradients of single examples; harmlens.weights.scoring takes two of at most 1 GiB


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

    These are floors: fragmentation and the CUDA context come on top (see :func:`models.catalogue.fits`).

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


def most(shape: Shape) -> int:
    """Bytes that the greediest task takes."""
    return max(need(shape, task) for task in TASKS)
