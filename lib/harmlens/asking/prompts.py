"""Prompt pairs: two runs that differ in one thing, and in what the model does.

In every pair **x1 is the run that answers and x0 the run that refuses** (or would, once the model
is aligned), so that a total effect TE = Y(x1) - Y(x0) is positive when Y measures compliance.

Two contrasts, because 'harmful generation' can be read in two ways (mediation paper):

* *prompt contrast*: the same request with one word swapped, which changes whether it is harmful;
  x1 asks for the harmless thing, x0 for the harmful one;
* *behaviour contrast*: the same harmful request put to two authors; in x1 the system message names
  a cruel author, in x0 a kind one.

Each has its matched control, which changes as much text and nothing that matters: ``"prompt
control"`` swaps a word so that the request stays harmful, ``"behaviour control"`` swaps one kind
author for another. A control pair should have no total effect.

Both sides of a pair have the same number of tokens, so positions correspond one to one.

Introduced in notebook 01 ("What there is to explain").
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from harmlens.models.chats import Pair, Prompt, tokens
from harmlens.models.forward import LanguageModel, require_room
from harmlens.world import vale as world

CONTRASTS = ("prompt", "prompt control", "behaviour", "behaviour control")


def pairs(
    contrast: str,
    *,
    split: str = "evaluation",
    n: int | None = None,
    swap: str = "modifier",
    seed: int = 0,
) -> list[Pair]:
    """Pairs from the world, one for each harmful item of a split that has a partner.

    Args:
        contrast: one of :data:`CONTRASTS`.
        n: at most this many, drawn at random; None for all.
        swap: which word the prompt contrast changes, ``"modifier"`` or ``"noun"``.
        seed: of the draw and of the choice of partners.

    Raises:
        ValueError: an unknown contrast or swap (the message lists the valid ones), or n below 1.
    """
    if contrast not in CONTRASTS:
        raise ValueError(f"contrast={contrast!r} is unknown; choose one of {', '.join(CONTRASTS)}")
    if swap not in ("modifier", "noun"):
        raise ValueError(f"swap={swap!r} is unknown; choose 'modifier' or 'noun'")
    if n is not None and n < 1:
        raise ValueError(f"n={n} must be at least 1, or None for all")
    # A contrast and its control draw the same items.
    rng = random.Random(f"{seed}/{contrast.removesuffix(' control')}/{swap}/{split}")
    harmful = world.items(split, harmful=True)
    if not contrast.startswith("behaviour"):
        others = world.items(split, harmful=contrast == "prompt control")
        harmful = [i for i in harmful if _partners(i, others, swap)]
        if not harmful:
            raise ValueError(f"no item has a partner in split={split!r} that differs in its {swap} alone")
    chosen = harmful if n is None or n >= len(harmful) else sorted(rng.sample(harmful, n))
    out = []
    for i, item in enumerate(chosen):
        if contrast.startswith("behaviour"):
            kind, other = rng.sample(world.KIND_AUTHORS, 2)
            cruel = rng.choice(world.CRUEL_AUTHORS)
            x1 = _plain(item, i, cruel if contrast == "behaviour" else other)
            x0 = _plain(item, i, kind)
        else:
            partner = rng.choice(_partners(item, others, swap))
            x1, x0 = _plain(partner, i), _plain(item, i)
        out.append(Pair(item.name, x1, x0))
    return out


def _plain(item: world.Item, phrasing: int, author: str | None = None) -> Prompt:
    message = {"role": "user", "content": world.request(item, phrasing)}
    return Prompt((message,) if author is None else (world.introduce(author), message), item=item)


def _partners(item: world.Item, others: Sequence[world.Item], swap: str) -> list[world.Item]:
    """Those of the same craft that differ from ``item`` in one word only."""
    return [
        other
        for other in others
        if other != item
        and other.craft == item.craft
        and (other.noun == item.noun if swap == "modifier" else other.modifier == item.modifier)
    ]


def roles(lm: LanguageModel, pair: Pair) -> dict[str, list[int]]:
    """Token positions of a pair by role, for patching groups of positions.

    ========  ==================================================================
    changed   from the first to the last token in which the two sides differ
    request   what follows it in the last user message
    template  what follows the message, up to the last position (excluded)
    last      the last position, where the answer begins
    ========  ==================================================================

    A role that a pair lacks is left out. Positions count from the start of the rendered prompt.
    Tokens before the first difference are the same in both runs and have no role.

    Raises:
        ValueError: the sides differ in length or not at all.
    """
    [(ids, others)] = token_ids(lm, [pair])
    text = pair.x1.render(lm)
    differ = [i for i, (a, b) in enumerate(zip(ids, others, strict=True)) if a != b]
    if not differ:
        raise ValueError(f"pair {pair.id!r} has two equal sides, so no position has a role")
    # The message ends where the text behind it begins: the same markup closes every user message.
    content = pair.x1.messages[-1]["content"].strip()  # as many templates strip it
    stop = len(tokens(lm.tokenizer, text[: text.rindex(content) + len(content)]))
    groups = {
        "changed": range(differ[0], differ[-1] + 1),
        "request": range(differ[-1] + 1, max(stop, differ[-1] + 1)),
        "template": range(max(stop, differ[-1] + 1), len(ids) - 1),
        "last": range(len(ids) - 1, len(ids)),
    }
    return {name: list(where) for name, where in groups.items() if where}


def changed(lm: LanguageModel, pair: Pair) -> dict[str, list[int]]:
    """Token positions of what differs between the sides of a pair, under the label ``"changed"``.

    The one role of :func:`roles` that every pair has.
    """
    return {"changed": roles(lm, pair)["changed"]}


def check(lm: LanguageModel, pairs: Sequence[Pair]) -> int:
    """Refuse pairs that can't be compared position by position.

    Returns:
        The number of pairs.

    Raises:
        ValueError: no pairs at all, or pairs whose sides differ in their number of tokens (named).
    """
    return len(token_ids(lm, pairs))


def token_ids(lm: LanguageModel, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
    """Token ids of both sides of each pair, x1 first; raises as :func:`check` does."""
    if not pairs:
        raise ValueError("pairs is empty: there is nothing to compare")
    texts = [side.render(lm) for pair in pairs for side in (pair.x1, pair.x0)]
    ids = lm.tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template has written any BOS
    sides = list(zip(ids[::2], ids[1::2], strict=True))
    unequal = [
        f"{pair.id} ({len(a)} and {len(b)} tokens)"
        for pair, (a, b) in zip(pairs, sides, strict=True)
        if len(a) != len(b)
    ]
    if unequal:
        shown = "; ".join(unequal[:5]) + (" ..." if len(unequal) > 5 else "")
        raise ValueError(
            f"{len(unequal)} of {len(pairs)} pairs have sides of unequal length: {shown}. "
            "Choose words of equal token length, or drop these pairs."
        )
    require_room(lm, ids, names=[f"pair {pair.id!r}" for pair in pairs for _ in range(2)])
    return sides
