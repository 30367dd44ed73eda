"""Activations read, and overwritten while a model runs or writes.

:func:`states` reads the residual stream, :func:`activations` hidden units (as in :mod:`flow.neurons`);
:func:`probe` asks what a straight cut through such values tells.
:func:`overwriting` changes units by a rule in everything that is run within it. :func:`generate_patched` is
*dynamic patching*: at every step of generation the units take the values that another prompt's run gives on
the same words so far.

Introduced in notebooks 00 ("A model organism of harm", reading) and 06 ("The gate", overwriting).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial as given
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor, nn

from harmlens.flow.engine import check_units, patchable
from harmlens.flow.record import shown
from harmlens.models import forward
from harmlens.models import parts as decoder
from harmlens.models.chats import tokens
from harmlens.models.forward import LanguageModel

WHERE = ("prompt", "answer", "both")
BATCH = 128  # texts that are run at once
Units = Mapping[int, Sequence[int]]
Edit = Callable[[int, Tensor], Tensor]  # layer, values [row, pos, unit] -> new values


@torch.no_grad()
def states(
    lm: LanguageModel,
    texts: Sequence[str],
    *,
    positions: Sequence[int] = (-1,),
    lengths: Sequence[int] | None = None,
    normed: bool = False,
    batch_size: int = BATCH,
) -> Float[Tensor, "text depth position width"]:
    """Residual stream of rendered texts in front of every block and behind the last one.

    Args:
        positions: counted from the end of each text.
        lengths: read each text as if it ended after so many of its tokens.
        normed: the last depth as the final norm leaves it, as in Hugging Face's ``hidden_states``.

    Returns:
        float32, on the CPU; blocks + 1 depths.

    Raises:
        ValueError: no texts, another number of lengths than of texts, a length or a position outside a text.
    """
    rows = _rows(lm, texts)
    if lengths is not None:
        if len(lengths) != len(rows):
            raise ValueError(f"lengths: give one to each text; got {len(lengths)} for {len(rows)} texts")
        wrong = [n for n, row in zip(lengths, rows, strict=True) if not 1 <= n <= len(row)]
        if wrong:
            raise ValueError(f"lengths {wrong[:5]} must lie between 1 and the number of the text's tokens")
        rows = [row[:n] for n, row in zip(lengths, rows, strict=True)]
    where, shortest = list(positions), min(map(len, rows))
    if not where or not all(-shortest <= p < 0 for p in where):
        raise ValueError(f"positions={where} must lie between -{shortest} and -1")
    kept: list[Tensor] = []

    def keep(value: Tensor) -> None:
        decoder.require_one_stream(lm.model, value)
        kept.append(value[:, where].float().cpu())

    blocks = decoder.blocks(lm)
    out: list[Any] = [None] * len(rows)
    with shown(keep, entering=blocks, leaving=[decoder.body(lm)[0] if normed else blocks[-1]]):
        for index, inputs in forward.padded(lm, rows, batch_size):
            kept.clear()
            lm.model(**inputs, logits_to_keep=1)
            for i, row in zip(index, torch.stack(kept, dim=1), strict=True):
                out[i] = row
    return torch.stack(out)


@torch.no_grad()
def summed_embeddings(lm: LanguageModel, texts: Sequence[str]) -> Float[Tensor, "text width"]:
    """Sum of the input embeddings of each text's tokens: all that a bag of words holds."""
    table = lm.model.get_input_embeddings().weight
    return torch.stack([table[row].sum(0).float().cpu() for row in _rows(lm, texts)])


def probe(train: ArrayLike, labels: ArrayLike, test: ArrayLike, truth: ArrayLike) -> np.ndarray:
    """1 for each row of ``test`` that a linear probe gets right, fitted on standardised ``train``.

    A :class:`sklearn.linear_model.LogisticRegression`; its ValueError where the labels are all alike.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    fitted.fit(np.asarray(train), labels)
    return (fitted.predict(np.asarray(test)) == np.asarray(truth)).astype(float)


@torch.no_grad()
def activations(
    lm: LanguageModel, texts: Sequence[str], units: Units
) -> dict[int, Float[Tensor, "text unit"]]:
    """Values of hidden units at the last position of rendered texts: layer -> values on the CPU.

    Raises:
        ValueError: no texts, a layer or a unit that the model does not have.
    """
    rows = _rows(lm, texts)
    parts = _check(lm, units)
    out = {layer: torch.empty(len(rows), len(some)) for layer, some in units.items()}
    for index, inputs in forward.padded(lm, rows, BATCH):

        def read(layer: int, hidden: Tensor, index: list[int] = index) -> None:
            out[layer][index] = hidden[:, -1, list(units[layer])].float().cpu()

        with units_shown(parts, units, read):
            lm.model(**inputs, logits_to_keep=1)
    return out


def _rows(lm: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        raise ValueError("texts is empty: there is nothing to run")
    return [tokens(lm.tokenizer, text) for text in texts]


# --------------------------------------------------------------------------- overwriting


def scale(alpha: float) -> Edit:
    """Multiply by ``alpha``; 0 is zero ablation, 1 changes nothing."""
    return lambda layer, values: alpha * values


@contextmanager
def overwriting(
    lm: LanguageModel,
    units: Units,
    edit: Edit,
    *,
    where: str = "prompt",
    every_position: bool = False,
) -> Iterator[None]:
    """Within, hidden units of the model are changed by a rule, whoever runs it.

    Made for :func:`models.forward.generate`: prompts must be padded on the left, as there. A run of more than
    one position counts as a prompt, one of a single position as a word of the answer, as it is read.

    Args:
        edit: :func:`scale`, or any function of the layer and the values [row, pos, unit].
        where: ``"prompt"`` (its last position), ``"answer"`` (every word of it) or ``"both"``.
        every_position: change all positions of the prompt, not its last one only.

    Raises:
        ValueError: no units, a layer or a unit that the model does not have, an unknown ``where``.
        RuntimeError: at the end, if nothing was ever changed.

    >>> with overwriting(lm, {7: gate}, scale(0.0), where="both"):  # doctest: +SKIP
    ...     forward.generate(lm, texts)
    """
    with _overwritten(_check(lm, units), units, edit, where, every_position) as fired:
        yield
    if silent := sorted(set(units) - fired):
        raise RuntimeError(
            f"units of layers {silent} were never changed with where={where!r}: nothing ran there"
        )


@torch.no_grad()
def generate_patched(
    lm: LanguageModel,
    texts: Sequence[str],
    sources: Sequence[str],
    units: Units,
    *,
    where: str = "both",
    dose: float = 1.0,
    every_position: bool = False,
    of: Callable[[nn.Module], nn.Module] = decoder.mlp,
    max_new_tokens: int = 32,
) -> list[str]:
    """Greedy answers to rendered texts, with units taken at every step from the run on another text.

    The source run reads its own prompt and then the words that the *patched* run has written: at each step
    both stand at the same word of the same answer, and differ in the prompt alone.

    Args:
        texts, sources: as many of each; both sides of a pair have the same number of tokens.
        units, where, every_position: as for :func:`overwriting`.
        dose: 1 sets the source's values, 0 leaves everything as it is, 0.5 goes half the way.
        of: whose units; of :func:`models.parts.attention` they are the heads' outputs, side by side.

    Raises:
        ValueError: lists or pairs of unequal length; as :func:`overwriting`.
    """
    parts, out = _check(lm, units, of), [""] * len(texts)
    with _overwritten(parts, units, _from_second_half(dose), where, every_position, of):
        for index, rows in _side_by_side(lm, texts, sources, max_new_tokens):
            same = [lambda _, logits: logits[: len(logits) // 2].repeat(2, 1)]  # what the first half chooses
            new = forward.continued(lm, rows, max_new_tokens=max_new_tokens, processors=same)
            for i, row in zip(index, new[: len(index)], strict=True):
                out[i] = forward.words(lm, row, texts[i])
    return out


@torch.no_grad()
def patched_logits(
    lm: LanguageModel, texts: Sequence[str], sources: Sequence[str], units: Units, *, dose: float = 1.0
) -> Float[Tensor, "text vocab"]:
    """Next-token logits after rendered texts, patched on the prompt as in :func:`generate_patched`."""
    parts, out = _check(lm, units), [None] * len(texts)
    with _overwritten(parts, units, _from_second_half(dose), "prompt", False):
        for index, rows in _side_by_side(lm, texts, sources):
            logits = lm.model(**forward.inputs_of(lm, rows), use_cache=False, logits_to_keep=1).logits[:, -1]
            for i, row in zip(index, logits[: len(index)].float().cpu(), strict=True):
                out[i] = row
    return torch.stack(out)


def _from_second_half(dose: float) -> Edit:
    def edit(layer: int, values: Tensor) -> Tensor:
        own, source = values.chunk(2)
        return torch.cat([own + dose * (source - own), source])

    return edit


def _side_by_side(
    lm: LanguageModel, texts: Sequence[str], sources: Sequence[str], new: int = 0
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Batches: indices, and rows of ids with the texts in the first half, their sources behind."""
    if len(texts) != len(sources) or not texts:
        raise ValueError(f"sources: give one to each text; got {len(texts)} texts, {len(sources)} sources")
    rows = [[tokens(lm.tokenizer, t) for t in pair] for pair in zip(texts, sources, strict=True)]
    unequal = [i for i, (a, b) in enumerate(rows) if len(a) != len(b)]
    if unequal:
        raise ValueError(f"sources: texts {unequal[:5]} and their sources differ in their number of tokens")
    forward.require_room(lm, [row for pair in rows for row in pair], new=new)
    for index in forward.by_length([a for a, _ in rows], BATCH):
        yield index, [rows[i][side] for side in (0, 1) for i in index]


@contextmanager
def _overwritten(
    parts: decoder.Stack, units: Units, edit: Edit, where: str, every_position: bool, of: Any = decoder.mlp
) -> Iterator[set[int]]:
    """Within, units are changed by a rule; the layers in which that happened are added to the set."""
    if where not in WHERE:
        raise ValueError(f"where={where!r} is unknown; choose {', '.join(WHERE)}")
    fired: set[int] = set()

    def change(layer: int, hidden: Tensor) -> Tensor | None:
        prompt = hidden.shape[1] > 1
        if where != "both" and prompt != (where == "prompt"):
            return None
        fired.add(layer)
        at = slice(None) if every_position else slice(-1, None)
        new, some = hidden.clone(), list(units[layer])
        new[:, at, some] = edit(layer, hidden[:, at, some]).to(hidden.dtype)
        return new

    change.depends_on = (edit, where, every_position, units)  # not on what was changed last
    with units_shown(parts, units, change, of):
        yield fired


@contextmanager
def units_shown(
    parts: decoder.Stack,
    layers: Iterable[int],
    function: Callable[[int, Tensor], Tensor | None],
    of: Callable[[nn.Module], nn.Module] = decoder.mlp,
) -> Iterator[None]:
    """Within, show what enters the last projection of a layer's MLP to a function, as :func:`shown` does."""
    with ExitStack() as held:
        for layer in layers:
            linear = decoder.projection(of(parts.blocks[layer]))
            held.enter_context(shown(given(function, layer), entering=[linear]))
        yield


def _check(lm: LanguageModel, units: Units, of: Any = decoder.mlp) -> decoder.Stack:
    parts = patchable(lm, in_part=False)
    if not units or not all(len(some) for some in units.values()):
        raise ValueError("units: give at least one unit for each layer, as {layer: [unit, ...]}")
    for layer, some in units.items():
        check_units(parts, "units", layer, some, of)
    return parts
