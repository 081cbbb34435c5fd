"""What is computed where a frozen linear layer has a LoRA pair? Nothing that the pair does not need.

y = x W' + b + s (x A') B', with W (outputs, inputs) frozen, A (rank, inputs), B (outputs, rank) and the scale s (LoRA,
arXiv 2106.09685). PEFT computes it in seven operators whose gradients autograd finds one by one. By hand it is three
products forward, h = x A' among them, and five backward: dB = s dy' h, dh = s dy B, dA = dh' x, dx = dy W + dh A; the scale
is a factor of products that are there anyway.
Layers that read the same x (queries, keys and values; gate and up) are one product on their stacked weights.

The products are in the frozen weights' precision, fp32 or bf16, those with W in int8 where that was asked for
(`slmops.training.step.products`); A, B and the sum of their gradients are in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from slmops.training.step.kernels import Kernels
from slmops.training.step.pairs import Adapted


def forward(layer: Adapted, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return y (tokens, outputs) of x (tokens, inputs), and h = x A' as the way back wants it."""
    y = layer.products.forward(x)
    return y, layer.store.kernels.add_pairs(layer, x, y) if layer.store is not None else None


def backward(layer: Adapted, x: torch.Tensor, h: torch.Tensor | None, dy: torch.Tensor, *, needs_x: bool) -> torch.Tensor | None:
    """Add the pairs' gradients to their store's, and return that of x where it needs one."""
    dx = layer.products.backward(dy) if needs_x else None
    if h is not None and layer.store is not None:
        layer.store.kernels.add_pairs_back(layer, x, h, dy, dx)
    return dx


def tick_of(*layers: Adapted) -> torch.Tensor | None:
    """Return what makes autograd call a layer's way back, whether or not its input needs a gradient."""
    return next((layer.store.tick for layer in layers if layer.store is not None), None)


def of_tick(*layers: Adapted) -> torch.Tensor | None:
    """Return the tick's gradient."""
    return next((layer.store.nothing for layer in layers if layer.store is not None), None)


class AdaptedLinear(torch.autograd.Function):
    """Apply an `Adapted` to x (..., inputs): its layers' outputs, (..., outputs) each."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tick: torch.Tensor | None, layer: Adapted) -> tuple[torch.Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1]).to(layer.weight.dtype)
        y, h = forward(layer, flat)
        ctx.save_for_backward(flat, h)
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        y = y.view(*x.shape[:-1], -1)
        return y.split(layer.widths, dim=-1) if len(layer.widths) > 1 else (y,)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h = ctx.saved_tensors
        parts = [g.reshape(len(x), -1) for g in gradients]
        dy = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        dx = backward(ctx.layer, x, h, dy.to(x.dtype), needs_x=ctx.needs_input_grad[0])
        return dx.view(ctx.shape).to(ctx.dtype) if dx is not None else None, of_tick(ctx.layer), None


class AdaptedMLP(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), gate and up stacked: (..., inputs) -> (..., outputs)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tick: torch.Tensor | None, gate_up: Adapted, down: Adapted, kernels: Kernels) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(gate_up.weight.dtype)
        both, h = forward(gate_up, flat)
        inner, saved = kernels.gate(both)
        y, h_down = forward(down, inner)
        ctx.save_for_backward(flat, h, inner, h_down, *saved)
        ctx.layers, ctx.kernels, ctx.shape, ctx.dtype = (gate_up, down), kernels, x.shape, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, inner, h_down, *saved = ctx.saved_tensors
        gate_up, down = ctx.layers
        dy = gradients[0].reshape(len(x), -1).to(x.dtype)
        of_inner = backward(down, inner, h_down, dy, needs_x=True)
        assert of_inner is not None
        of_both = ctx.kernels.gate_back(tuple(saved), of_inner)
        dx = backward(gate_up, x, h, of_both, needs_x=ctx.needs_input_grad[0])
        return dx.view(ctx.shape).to(ctx.dtype) if dx is not None else None, of_tick(gate_up, down), None, None, None


class Focus:
    """Positions that the loss looks at: the last MLP computes no others, for nothing reads them."""

    positions: torch.Tensor | None = None
    """(positions), each once; None: all are needed."""

    def of(self, mlp: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return an MLP, x (1, tokens, width) -> (1, tokens, width), that is 0 wherever nobody looks."""

        def focused(x: torch.Tensor) -> torch.Tensor:
            if self.positions is None:
                return mlp(x)
            few = mlp(x.index_select(1, self.positions))
            return few.new_zeros(x.shape).index_copy(1, self.positions, few)

        return focused


def stacked(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return one tensor of all weights, and make each a view of it, so that they are held once."""
    whole = torch.cat([w.data for w in weights])
    at = 0
    for weight in weights:
        weight.data = whole[at : at + weight.shape[0]]
        at += weight.shape[0]
    return whole
