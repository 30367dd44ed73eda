"""Generation with hidden units overwritten: does a set of neurons decide what the model goes on to say?

Two ways. :func:`overwriting` changes units by a fixed rule (scaled, set to zero or to a mean, drawn from
other prompts) in everything that is run within it. :func:`generate_patched` is *dynamic patching*: at every
step of generation the units take the values that another prompt's run gives on the same words so far.

Hidden units are those of :mod:`flow.neurons`. ``where`` says at which positions: on the ``"prompt"`` (its
last position, unless ``every_position`` is set), on the ``"answer"`` (each word that was generated, as it is
read), or on ``"both"``.

Introduced in notebook 06 ("The gate").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from harmlens.flow import partial
from harmlens.models import forward
from harmlens.models import parts as decoder
from harmlens.models.chats import tokens
from harmlens.models.forward import LanguageModel

WHERE = ("prompt", "answer", "both")
Units = Mapping[int, Sequence[int]]
Edit = Callable[[int, Tensor], Tensor]  # layer, values [row, pos, unit] -> new values


# --------------------------------------------------------------------------- edits


def scale(alpha: float) -> Edit:
    """Multiply by ``alpha``; 0 is zero ablation, 1 changes nothing."""
    return lambda layer, values: alpha * values


def toward(target: Mapping[int, Float[Tensor, " unit"]], dose: float = 1.0) -> Edit:
    """Move each unit to a target value: the whole way (dose 1), a part of it, or beyond.

    Args:
        target: layer -> one value for each of the layer's units, such as their mean over other prompts.
    """

    def edit(layer: int, values: Tensor) -> Tensor:
        if target[layer].shape != values.shape[-1:]:
            raise ValueError(
                f"target: layer {layer} has {values.shape[-1]} units to set, got {tuple(target[layer].shape)}"
            )
        return values + dose * (target[layer].to(values) - values)

    return edit


def resample(bank: Mapping[int, Float[Tensor, "prompt unit"]], *, seed: int = 0) -> Edit:
    """Values of prompts drawn at random from a bank (as :func:`activations` gives it), one for each row.

    All units of a row take the values of the same prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}

    def edit(layer: int, values: Tensor) -> Tensor:
        rows = bank[layer]
        # One draw for all layers of one forward pass; the first layer makes it.
        if layer == min(bank) or len(drawn.get("index", ())) != len(values):
            drawn["index"] = torch.randint(len(rows), (len(values),), generator=generator)
        return rows[drawn["index"]].to(values)[:, None].expand_as(values)

    edit.depends_on = (bank, seed)  # not on what was drawn last
    return edit


# --------------------------------------------------------------------------- reading and overwriting


@torch.no_grad()
def activations(
    lm: LanguageModel, texts: Sequence[str], units: Units, *, batch_size: int = 128
) -> dict[int, Float[Tensor, "text unit"]]:
    """Values of hidden units at the last position of rendered texts: layer -> values on the CPU.

    Raises:
        ValueError: no texts, a layer or a unit that the model does not have.
    """
    if not texts:
        raise ValueError("texts is empty: there is nothing to run")
    parts = _check(lm, units)
    rows = [tokens(lm.tokenizer, text) for text in texts]
    out = {layer: torch.empty(len(rows), len(some)) for layer, some in units.items()}
    for index, inputs in forward.padded(lm, rows, batch_size):

        def read(layer: int, hidden: Tensor, index: list[int] = index) -> None:
            out[layer][index] = hidden[:, -1, list(units[layer])].float().cpu()

        with _hooked(parts, units, read):
            lm.model(**inputs, logits_to_keep=1)
    return out


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

    Made for :func:`models.forward.generate`; a run of more than one position counts as a prompt, one of a
    single position as a word of the answer. Prompts must be padded on the left, as there.

    Args:
        units: layer -> units of its MLP.
        edit: :func:`scale`, :func:`toward`, :func:`resample`, or any function of the layer and the values.
        where: ``"prompt"``, ``"answer"`` or ``"both"``.
        every_position: change all positions of the prompt, not its last one only.

    Raises:
        ValueError: no units, a layer or a unit that the model does not have, an unknown ``where``.
        RuntimeError: at the end, if nothing was ever changed.

    >>> with overwriting(lm, {7: gate}, scale(0.0), where="both"):  # doctest: +SKIP
    ...     forward.generate(lm, texts)
    """
    parts = _check(lm, units)
    if where not in WHERE:
        raise ValueError(f"where={where!r} is unknown; choose {', '.join(WHERE)}")
    fired = []

    def change(layer: int, hidden: Tensor) -> Tensor | None:
        prompt = hidden.shape[1] > 1
        if where != "both" and prompt != (where == "prompt"):
            return None
        fired.append(layer)
        at = slice(None) if every_position else slice(-1, None)
        new, some = hidden.clone(), list(units[layer])
        new[:, at, some] = edit(layer, hidden[:, at, some]).to(hidden.dtype)
        return new

    change.depends_on = (edit, where, every_position, units)  # not on what was changed last
    with _hooked(parts, units, change):
        yield
    if set(fired) != set(units):
        silent = sorted(set(units) - set(fired))
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
    max_new_tokens: int = 32,
    batch_size: int = 128,
) -> list[str]:
    """Greedy answers to rendered texts, with units taken at every step from the run on another text.

    The source run reads its own prompt and then the words that the *patched* run has written: at each step
    both stand at the same word of the same answer, and differ in the prompt alone.

    Args:
        texts, sources: as many of each; both sides of a pair have the same number of tokens.
        units: layer -> units of its MLP.
        where: ``"prompt"``, ``"answer"`` or ``"both"``.
        dose: 1 sets the source's values, 0 leaves everything as it is, 0.5 goes half the way.
        every_position: patch all positions of the prompt, not its last one only.

    Returns:
        The new words of each text, as :func:`models.forward.generate` gives them.

    Raises:
        ValueError: lists or pairs of unequal length, no units, a layer or a unit that does not exist, an
            unknown ``where``.
    """
    out = [""] * len(texts)
    state = {"prompt": True}
    with _patching(
        lm, texts, sources, units, where, dose, every_position, state, batch_size, max_new_tokens
    ) as batches:
        for index, inputs in batches:
            for i, new in zip(index, _greedy(lm, inputs, max_new_tokens, state), strict=True):
                out[i] = forward.words(lm, new, texts[i])
    return out


@torch.no_grad()
def patched_logits(
    lm: LanguageModel,
    texts: Sequence[str],
    sources: Sequence[str],
    units: Units,
    *,
    dose: float = 1.0,
    every_position: bool = False,
    batch_size: int = 128,
) -> Float[Tensor, "text vocab"]:
    """Next-token logits after rendered texts, patched on the prompt as :func:`generate_patched` patches it.

    Returns:
        float32, on the CPU.
    """
    out: list[Any] = [None] * len(texts)
    state = {"prompt": True}
    with _patching(lm, texts, sources, units, "prompt", dose, every_position, state, batch_size) as batches:
        for index, inputs in batches:
            logits = lm.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
            for i, row in zip(index, logits[: len(index)].float().cpu(), strict=True):
                out[i] = row
    return torch.stack(out)


@contextmanager
def _patching(
    lm: LanguageModel, texts: Sequence[str], sources: Sequence[str], units: Units, where: str, dose: float,
    every_position: bool, state: dict[str, bool], batch_size: int, new: int = 0,
) -> Iterator[Iterator[tuple[list[int], dict[str, Any]]]]:  # fmt: skip
    """Batches: indices, and the model's arguments with the texts in the first half, their sources behind.

    Within, units of the first half move towards those of the second.
    """
    parts = _check(lm, units)
    if where not in WHERE:
        raise ValueError(f"where={where!r} is unknown; choose {', '.join(WHERE)}")
    if len(texts) != len(sources) or not texts:
        raise ValueError(f"sources: give one to each text; got {len(texts)} texts, {len(sources)} sources")
    rows = [[tokens(lm.tokenizer, t) for t in pair] for pair in zip(texts, sources, strict=True)]
    unequal = [i for i, (a, b) in enumerate(rows) if len(a) != len(b)]
    if unequal:
        raise ValueError(f"sources: texts {unequal[:5]} and their sources differ in their number of tokens")
    forward.require_room(lm, [row for pair in rows for row in pair], new=new)

    def change(layer: int, hidden: Tensor) -> Tensor | None:
        if where != "both" and state["prompt"] != (where == "prompt"):
            return None
        n, some = len(hidden) // 2, list(units[layer])
        at = slice(None) if every_position else slice(-1, None)
        new, own = hidden.clone(), hidden[:n, at, some]
        new[:n, at, some] = own + dose * (hidden[n:, at, some] - own)
        return new

    def batches() -> Iterator[tuple[list[int], dict[str, Any]]]:
        for index in forward.by_length([a for a, _ in rows], batch_size):
            both = [rows[i][side] for side in (0, 1) for i in index]
            ids, mask = forward.pad_left(both, lm.tokenizer.pad_token_id, lm.device)
            yield index, {"input_ids": ids, "attention_mask": mask, "position_ids": forward.positions(mask)}

    with _hooked(parts, units, change):
        yield batches()


def _greedy(
    lm: LanguageModel, inputs: dict[str, Any], max_new_tokens: int, state: dict[str, bool]
) -> list[list[int]]:
    """Likeliest words after the rows of the first half; the second half reads the same words."""
    ids, mask, positions = (inputs[name] for name in ("input_ids", "attention_mask", "position_ids"))
    n = len(ids) // 2
    ends = forward.stops(lm)
    rows, done, cache = [[] for _ in range(n)], [False] * n, None
    for _ in range(max_new_tokens):
        state["prompt"] = cache is None
        out = lm.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache, best = out.past_key_values, out.logits[:n, -1].argmax(-1)
        for row, token in enumerate(best.tolist()):
            if not done[row]:
                rows[row].append(token)
                done[row] = token in ends
        if all(done):
            break
        ids = best.repeat(2)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return rows


# --------------------------------------------------------------------------- hooks and checks


@contextmanager
def _hooked(
    parts: decoder.Stack, units: Units, function: Callable[[int, Tensor], Tensor | None]
) -> Iterator[None]:
    """Show the hidden units of some layers to a function, which may give back others."""

    def hook(layer: int) -> Callable:
        def run(_: Any, inputs: tuple) -> tuple | None:
            new = function(layer, inputs[0])
            return None if new is None else (new, *inputs[1:])

        return run

    with ExitStack() as held:
        for layer in units:
            linear = decoder.projection(decoder.mlp(parts.blocks[layer]))
            held.callback(linear.register_forward_pre_hook(hook(layer)).remove)
        yield


def _check(lm: LanguageModel, units: Units) -> decoder.Stack:
    parts = partial.patchable(lm, in_part=False)
    if not units or not all(len(some) for some in units.values()):
        raise ValueError("units: give at least one unit for each layer, as {layer: [unit, ...]}")
    for layer, some in units.items():
        if not 0 <= layer < parts.depth:
            raise ValueError(f"units: there is no layer {layer}; choose 0 to {parts.depth - 1}")
        count = decoder.projection_weight(decoder.mlp(parts.blocks[layer])).shape[1]
        outside = [u for u in some if not 0 <= u < count]
        if outside:
            raise ValueError(f"units: layer {layer} has units 0 to {count - 1}, not {outside[:5]}")
    return parts
