"""Activation patching in the plainest way: one whole forward pass with hooks for each patch, nothing reused.

The reference for :mod:`harmlens.flow.patching`. Where the modules lie is written down here, not found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from harmlens.flow.engine import Freeze
from harmlens.models.chats import Pair, tokens
from harmlens.models.forward import LanguageModel

_NAMES = {
    "gpt_neox": ("attention", "dense", "mlp", "dense_4h_to_h"),
    "falcon": ("self_attention", "dense", "mlp", "dense_4h_to_h"),
}


class Naive:
    """A model whose modules are known by name, run as a whole."""

    def __init__(self, lm: LanguageModel) -> None:
        attention, out, mlp, down = _NAMES.get(
            lm.model.config.model_type, ("self_attn", "o_proj", "mlp", "down_proj")
        )
        self.model = lm.model
        base = lm.model.base_model
        self.blocks = list(base.h if hasattr(base, "h") else base.layers)
        self.attention = [getattr(block, attention) for block in self.blocks]
        self.out = [getattr(module, out) for module in self.attention]
        self.mlp = [getattr(block, mlp) for block in self.blocks]
        self.down = [getattr(module, down, None) for module in self.mlp]  # experts have none

    @torch.no_grad()
    def logits(self, ids: Tensor, hooks: Sequence[Any], noise: Tensor | None = None) -> Tensor:
        """Logits [row, pos, vocab]; the embeddings may be noised."""
        with ExitStack() as held:
            for handle in hooks:
                held.callback(handle.remove)
            if noise is not None:
                embed = self.model.get_input_embeddings()
                held.callback(embed.register_forward_hook(lambda m, i, o: o + noise.to(o)).remove)
            return self.model(ids, use_cache=False).logits.float()

    def record(self, ids: Tensor, noise: Tensor | None = None) -> dict[str, list[Tensor]]:
        """Every site of a run, and its logits."""
        kept: dict[str, list[Tensor]] = {
            name: [] for name in ("before", "resid_post", "attn_out", "mlp_out", "head", "neurons")
        }
        hooks = []
        for layer, block in enumerate(self.blocks):
            hooks.append(block.register_forward_hook(_both(kept), with_kwargs=True))
            hooks.append(self.attention[layer].register_forward_hook(_out(kept["attn_out"])))
            hooks.append(self.mlp[layer].register_forward_hook(_out(kept["mlp_out"])))
            for name, module in (("head", self.out[layer]), ("neurons", self.down[layer])):
                if module is not None:
                    hooks.append(
                        module.register_forward_pre_hook(lambda m, i, s=kept[name]: s.append(i[0].clone()))
                    )
        return {**kept, "logits": self.logits(ids, hooks, noise)}

    def patched(
        self,
        ids: Tensor,
        base: Mapping[str, Any],
        source: Mapping[str, Any],
        site: str,
        layers: Sequence[int],
        columns: Sequence[int],
        *,
        units: Sequence[int] = (),
        freeze: Freeze | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Logits of the run on ``ids``, with ``source``'s activations at one site, in these layers."""
        hooks = []
        # What a patch inside a module writes is that module's output: there, freezing begins behind it.
        inside = {"head": "attn_out", "neurons": "mlp_out"}.get(site)
        if freeze is not None:
            where = list(columns) if freeze.here else list(range(ids.shape[1]))
            modules = ("attn_out", "mlp_out") if freeze.site == "modules" else (freeze.site,)
            for layer, module in product(range(len(self.blocks)), modules):
                # Nothing in front of a patch is changed by it, so what is frozen there gives the same.
                held = freeze.layers is None or layer in freeze.layers
                if held and not (layer in layers and module == inside):
                    hooks.append(self._put(module, layer, where, freeze.units, base))
        hooks += [self._put(site, layer, list(columns), units, source) for layer in layers]
        return self.logits(ids, hooks, noise)

    def _put(self, site: str, layer: int, columns: list[int], units: Sequence[int], values: Any) -> Any:
        if site in ("head", "neurons"):
            module, new = (self.out if site == "head" else self.down)[layer], values[site][layer]

            def inner(_: nn.Module, inputs: tuple) -> tuple:
                hidden = inputs[0].clone()
                for unit in units:
                    hidden[:, columns, unit] = new[:, columns, unit]
                return (hidden,)

            return module.register_forward_pre_hook(inner)
        if site == "layer":
            own = (values["resid_post"][layer] - values["before"][layer])[:, columns]

            def contribution(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
                before = args[0] if args else kwargs["hidden_states"]
                return _with(output, columns, before[:, columns] + own)

            return self.blocks[layer].register_forward_hook(contribution, with_kwargs=True)
        module = {"resid_post": self.blocks, "attn_out": self.attention, "mlp_out": self.mlp}[site][layer]
        new = values[site][layer][:, columns]
        return module.register_forward_hook(lambda m, i, o: _with(o, columns, new))


def _with(output: Any, columns: list[int], new: Tensor) -> Any:
    changed = (output[0] if isinstance(output, tuple) else output).clone()
    changed[:, columns] = new
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _out(store: list[Tensor]) -> Callable:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        store.append((output[0] if isinstance(output, tuple) else output).clone())

    return hook


def _both(kept: dict[str, list[Tensor]]) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        kept["before"].append((args[0] if args else kwargs["hidden_states"]).clone())
        kept["resid_post"].append((output[0] if isinstance(output, tuple) else output).clone())

    return hook


# --------------------------------------------------------------------------- whole sweeps


def ids_of(lm: LanguageModel, pair: Pair, reply: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Token ids of both sides [1, pos], with a reply behind them (whose last token is not read)."""
    sides = (tokens(lm.tokenizer, side.render(lm)) for side in (pair.x1, pair.x0))
    return tuple(torch.tensor([[*side, *reply[:-1]]]) for side in sides)


def sweep(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    read: Callable[[Tensor, int], Tensor],
    cells: Sequence[tuple[str, Mapping[int, Sequence[int]]]],
    positions: Callable[[int], Sequence[Sequence[int]]],
    *,
    direction: str = "denoising",
    layers: Sequence[range] | None = None,
    freeze: Freeze | None = None,
    replies: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outcomes y1 [pair], y0 [pair] and of each patch [cell, layer, position, pair].

    Args:
        read: outcome of logits [pos, vocab], for the pair of this index.
        cells: sites, with the units of each layer where they have some.
        positions: groups of positions for the pair of this index.
        layers: what is patched at once; default: each layer on its own.
    """
    net = Naive(lm)
    together = windows(len(net.blocks), 1) if layers is None else layers
    y1, y0, patched = [], [], []
    for k, pair in enumerate(pairs):
        ids = ids_of(lm, pair, () if replies is None else replies[k])
        runs = [net.record(row) for row in ids]
        y1.append(read(runs[0]["logits"][0], k))
        y0.append(read(runs[1]["logits"][0], k))
        at, there = (1, 0) if direction == "denoising" else (0, 1)
        for site, units in cells:
            for near in together:
                for where in positions(k):
                    found = net.patched(
                        ids[at], runs[at], runs[there], site, near, where,
                        units=units.get(near[0], ()), freeze=freeze,
                    )  # fmt: skip
                    patched.append(read(found[0], k))
    shape = (len(pairs), len(cells), len(together), -1)
    return torch.stack(y1), torch.stack(y0), torch.stack(patched).reshape(shape).permute(1, 2, 3, 0)


def windows(depth: int, size: int) -> list[range]:
    """Neighbouring layers around each layer, cut off at the ends of the stack."""
    return [range(max(0, i - size // 2), min(depth, i + size // 2 + 1)) for i in range(depth)]


def heads(lm: LanguageModel) -> list[tuple[str, dict[int, range]]]:
    """The cells of all attention heads: each is a slice of the output projection's input."""
    net, count = Naive(lm), lm.model.config.num_attention_heads
    size = net.out[0].weight.shape[1] // count
    return [
        ("head", dict.fromkeys(range(len(net.blocks)), range(h * size, (h + 1) * size))) for h in range(count)
    ]
