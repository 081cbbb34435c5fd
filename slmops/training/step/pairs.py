"""Where do LoRA pairs live while they are trained? All in one parameter, so that nothing is done pair by pair.

A small model's step is bound by the number of operators, not by their work: 84 pairs cost 84 casts, 84 gradient norms,
84 accumulations. Here A and B of every layer are slices of one flat parameter: one product makes all pairs ready for the
products, in their precision, and one hands on the gradient of all. PEFT's own parameters become views of it, so that
PEFT saves and loads them as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from slmops.training.step.kernels import PLAIN, Kernels, kernels_for
from slmops.training.step.products import Plain, Products

# One product with zeros in it is faster than several small ones up to this size of B: 86 us in place of 108 for q, k and v of a layer
# 576 wide, 39 in place of 86 if 192 wide, but 167 in place of 141 for a gate and up of 3,072 outputs.
_LARGEST_BLOCK = 2**16


@dataclass
class Pair:
    """A and B of one linear layer, and what is made of them.

    Args:
        a: (rank, inputs).
        b: (outputs, rank).
        scale: s of y = x W' + s (x A') B'.
        outputs: the layer's place in the outputs of the layers that it is stacked with.
    """

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    outputs: slice
    ranks: slice = field(default_factory=lambda: slice(0))
    a_at: int = 0
    """Where A begins in the store's parameter."""
    b_at: int = 0
    up_gradient: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class Block:
    """B, in the precision of the products: of a pair, or of all pairs of stacked layers, each in its place and zeros elsewhere."""

    outputs: slice
    ranks: slice
    scale: float
    up: torch.Tensor
    """(outputs, rank)."""
    up_turned: torch.Tensor


@dataclass
class Adapted:
    """A frozen linear layer with its pair, or several that read the same input, stacked.

    Args:
        weight: (outputs, inputs); frozen.
        bias: (outputs), or None.
        widths: outputs of each layer.
        pairs: of those layers that have one.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    widths: tuple[int, ...]
    pairs: list[Pair]
    down: torch.Tensor | None = None
    """A of all pairs, stacked, (ranks, inputs), ready for the products; None without pairs."""
    down_turned: torch.Tensor | None = None
    """Its transpose: making a view anew at each step costs as much as a small product."""
    down_gradient: torch.Tensor | None = None
    blocks: list[Block] = field(default_factory=list)
    """B of all pairs: one for the layer, or one for each pair."""
    store: PairStore | None = None
    """None without pairs."""
    described: Any = None
    """What the kernels have told their library of the pairs."""
    products: Products = field(init=False)

    def __post_init__(self) -> None:
        self.products = Plain(self.weight, self.bias)


class PairStore:
    """All pairs of a model in one parameter.

    Args:
        layers: that hold them.
        kernels: that multiply with them.
    """

    def __init__(self, layers: Sequence[Adapted], kernels: Kernels) -> None:
        held = [layer for layer in layers if layer.pairs]
        self.kernels = kernels
        self.members = [x for layer in held for x in (*(p.a for p in layer.pairs), *(p.b for p in layer.pairs))]
        self.parameter = nn.Parameter(torch.cat([x.detach().flatten().float() for x in self.members]))
        wide = self.kernels.wide_pairs
        self.ready = self.parameter.data if wide else torch.zeros_like(self.parameter, dtype=held[0].weight.dtype).detach()
        self.gradient = torch.zeros_like(self.ready)
        self.tick: torch.Tensor | None = None
        self.nothing = torch.zeros((), device=self.parameter.device)
        self.copied: list[tuple[torch.Tensor, torch.Tensor, float]] = []
        """Where B of a pair stands among those of others, where it comes from, and a scale that is not the block's."""
        self._bind(held)

    def _bind(self, layers: Sequence[Adapted]) -> None:
        """Make the pairs' tensors slices of the flat ones."""
        at = 0
        for layer in layers:
            layer.store = self
            inputs = layer.weight.shape[1]
            rank = sum(p.a.shape[0] for p in layer.pairs)
            layer.down = self.ready[at : at + rank * inputs].view(rank, inputs)
            layer.down_turned = layer.down.t()
            layer.down_gradient = self.gradient[at : at + rank * inputs].view(rank, inputs)
            row = 0
            for pair in layer.pairs:
                pair.a_at = at
                pair.a.data = self.parameter.data[at : at + pair.a.numel()].view(pair.a.shape)
                pair.ranks = slice(row, row + pair.a.shape[0])
                row += pair.a.shape[0]
                at += pair.a.numel()
            ready: list[torch.Tensor] = []
            for pair in layer.pairs:
                pair.b_at = at
                pair.b.data = self.parameter.data[at : at + pair.b.numel()].view(pair.b.shape)
                ready.append(self.ready[at : at + pair.b.numel()].view(pair.b.shape))
                pair.up_gradient = self.gradient[at : at + pair.b.numel()].view(pair.b.shape)
                at += pair.b.numel()
                pair.a.requires_grad_(False)
                pair.b.requires_grad_(False)
            if not self.kernels.wide_pairs:
                self._stack(layer, ready)

    def _stack(self, layer: Adapted, ready: list[torch.Tensor]) -> None:
        """Make the blocks of a layer from B of its pairs, (outputs, rank) each."""
        outputs, ranks = layer.weight.shape[0], sum(b.shape[1] for b in ready)
        if len(ready) == 1 or outputs * ranks > _LARGEST_BLOCK:
            layer.blocks = [Block(p.outputs, p.ranks, p.scale, b, b.t()) for p, b in zip(layer.pairs, ready, strict=True)]
            return
        scale, whole = layer.pairs[0].scale, self.ready.new_zeros(outputs, ranks)
        for pair, b in zip(layer.pairs, ready, strict=True):
            self.copied.append((whole[pair.outputs, pair.ranks], b, pair.scale / scale))
        layer.blocks = [Block(slice(outputs), slice(ranks), scale, whole, whole.t())]

    def begin(self) -> None:
        """Make the pairs ready for one pass through the model."""
        with torch.no_grad():
            if not self.kernels.wide_pairs:
                self.ready.copy_(self.parameter)
            for place, b, scale in self.copied:
                place.copy_(b)
                if scale != 1.0:
                    place.mul_(scale)
        self.tick = _Tick.apply(self.parameter, self) if torch.is_grad_enabled() else None

    def take_gradient(self) -> torch.Tensor:
        """Return what the pass back has gathered, and empty it."""
        found = self.gradient.to(self.parameter.dtype, copy=True)
        self.gradient.zero_()
        return found

    def release(self) -> None:
        """Let PEFT's parameters stand for themselves again."""
        for member in self.members:
            member.data = member.data.clone()
            member.requires_grad_(True)


def kernels_of(layers: Sequence[Adapted]) -> Kernels:
    """Return what multiplies with the pairs of layers: one for all, as they stand in one parameter."""
    held = [layer for layer in layers if layer.pairs]
    found = [kernels_for(layer.weight, layer.weight.shape[1], *layer.widths) for layer in held]
    suited = all(each.suits(len(pair.a), layer.weight.dtype) for each, layer in zip(found, held, strict=True) for pair in layer.pairs)
    return found[0] if suited and all(each is found[0] for each in found) else PLAIN


class _Tick(torch.autograd.Function):
    """Stands before every layer with pairs, so that its way back comes last: when all gradients are gathered."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, store: PairStore) -> torch.Tensor:
        ctx.store = store
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.store.take_gradient(), None
