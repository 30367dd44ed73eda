"""Linear read-outs: what can be told from a model's activations, and from its words alone.

A probe shows that information *is there*, not that the model uses it; the patching notebooks ask
the second question. Probes are scikit-learn's logistic regression on standardised features, fitted
on the training items and scored on held-out ones.

Introduced in notebook 00 ("A model organism of harm").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from harmlens.models import parts as decoder
from harmlens.models.chats import Message, tokens
from harmlens.models.forward import LanguageModel, padded


@torch.no_grad()
def hidden_states(
    lm: LanguageModel, texts: Sequence[str], *, lengths: Sequence[int] | None = None, batch_size: int = 128
) -> Float[Tensor, "text depth width"]:
    """Residual stream at the last token of each rendered text, float32 on the CPU.

    Depth 0 is the embedding, depth l the output of block l (the last one before the final norm
    in models that hand it out so; Hugging Face normalises it in most).

    Args:
        lengths: read each text at the last of so many of its first tokens, as :func:`places` gives them.
            In a causal model nothing that follows changes what is there.

    Raises:
        ValueError: no texts, as many lengths as texts are not given, or a length that a text does not have.
    """
    if not texts:
        raise ValueError("texts is empty: there is nothing to run")
    rows = [tokens(lm.tokenizer, text) for text in texts]
    if lengths is not None:
        if len(lengths) != len(rows):
            raise ValueError(f"lengths: give one to each text; got {len(lengths)} for {len(rows)} texts")
        wrong = [n for n, row in zip(lengths, rows, strict=True) if not 1 <= n <= len(row)]
        if wrong:
            raise ValueError(f"lengths {wrong[:5]} must lie between 1 and the number of the text's tokens")
        rows = [row[:n] for n, row in zip(lengths, rows, strict=True)]
    out: list[Tensor | None] = [None] * len(rows)
    for index, inputs in padded(lm, rows, batch_size):
        # Logits of all positions would take far more memory than the states.
        states = lm.model(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states
        decoder.require_one_stream(lm.model, states[0])
        for i, row in zip(index, torch.stack([s[:, -1].float().cpu() for s in states], dim=1), strict=True):
            out[i] = row
    return torch.stack(out)


def up_to(lm: LanguageModel, chat: str | Sequence[Message], words: str) -> str:
    """A rendered chat, cut behind the last place where ``words`` stand.

    In a causal model the states at the last token of what is left are those of the whole text, since
    nothing that follows can change them. So :func:`hidden_states` of it reads the chat at these words.

    Raises:
        ValueError: the words do not stand there, or a token reaches beyond their end.
    """
    text = lm.render(chat)
    if not words or words not in text:
        raise ValueError(f"words={words!r} do not stand in the rendered chat {text!r}")
    part = text[: text.rindex(words) + len(words)]
    ids = tokens(lm.tokenizer, part)
    if tokens(lm.tokenizer, text)[: len(ids)] != ids:
        raise ValueError(f"words={words!r} end inside a token; give words that end where a token ends")
    return part


def places(lm: LanguageModel, chat: str | Sequence[Message]) -> dict[str, int]:
    """Number of tokens of a rendered chat up to places that every chat template has, that place included.

    ==============  ===============================================================
    last word       the last token of the user's message
    end of message  the first token of the markup behind it
    last position   the last token, where the answer begins
    ==============  ===============================================================

    Where a template writes one token behind the message, or none, places fall together.
    """
    text = lm.render(chat)
    content = (chat if isinstance(chat, str) else chat[-1]["content"]).strip()  # as many templates strip it
    said = len(tokens(lm.tokenizer, text[: text.rindex(content) + len(content)]))
    whole = len(tokens(lm.tokenizer, text))
    return {"last word": min(said, whole), "end of message": min(said + 1, whole), "last position": whole}


@torch.no_grad()
def summed_embeddings(lm: LanguageModel, texts: Sequence[str]) -> Float[Tensor, "text width"]:
    """Sum of the input embeddings of each text's tokens: all that a bag of words holds."""
    if not texts:
        raise ValueError("texts is empty: there is nothing to sum")
    table = lm.model.get_input_embeddings().weight
    return torch.stack([table[tokens(lm.tokenizer, text)].sum(0).float().cpu() for text in texts])


def probe(
    train: Float[Tensor, "item feature"] | np.ndarray,
    labels: Sequence[bool],
    test: Float[Tensor, "item2 feature"] | np.ndarray,
    truth: Sequence[bool],
    *,
    strength: float = 1.0,
) -> np.ndarray:
    """Fit a linear probe on ``train`` and score it on ``test``: 1 for each item it gets right.

    Args:
        strength: inverse strength of the L2 penalty (scikit-learn's ``C``).

    Raises:
        ValueError: labels of one class only, or as many labels as rows are not given.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(train) != len(labels) or len(test) != len(truth):
        raise ValueError("give one label to each row of train, and one truth to each row of test")
    if len(set(labels)) < 2:
        raise ValueError("labels hold one class only; a probe needs both")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
    model.fit(np.asarray(train), np.asarray(labels, dtype=int))
    return (model.predict(np.asarray(test)) == np.asarray(truth, dtype=int)).astype(float)
