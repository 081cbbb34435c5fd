"""A whole attention layer in one step: projections with their pairs, rotary positions, attention, output.

For layers of the common form (Llama, Mistral, Qwen 2, Granite and their like): x -> q, k, v; q and k turned by their
position; softmax(scale q k') v within each row; -> output projection. Between the projections everything is in fp32.
"""

from __future__ import annotations

from typing import Any

import torch

from slmops.training.step import lora
from slmops.training.step.kernels import Attention, Kernels
from slmops.training.step.pairs import Adapted


class AdaptedAttention(torch.autograd.Function):
    """Attention of joined rows: x (1, tokens, inputs) -> (1, tokens, outputs).

    Inputs behind x: the tick; how the tokens attend; stacked q, k, v and the output projection; what computes between them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, tick: torch.Tensor | None, how: Attention, qkv: Adapted, out: Adapted, kernels: Kernels
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(qkv.weight.dtype)
        y, h = lora.forward(qkv, flat)
        answer, saved = kernels.attend(y, how)
        z, h_out = lora.forward(out, answer)
        ctx.save_for_backward(flat, h, answer, h_out, *saved)
        ctx.layers, ctx.how, ctx.kernels, ctx.shape, ctx.dtype = (qkv, out), how, kernels, x.shape, x.dtype
        return z.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, answer, h_out, *saved = ctx.saved_tensors
        qkv, out = ctx.layers
        dz = gradients[0].reshape(len(x), -1).to(x.dtype)
        of_answer = lora.backward(out, answer, h_out, dz, needs_x=True)
        assert of_answer is not None
        dy = ctx.kernels.attend_back(ctx.how, tuple(saved), of_answer)
        dx = lora.backward(qkv, x, h, dy, needs_x=ctx.needs_input_grad[0])
        return dx.view(ctx.shape).to(ctx.dtype) if dx is not None else None, lora.of_tick(qkv, out), *(None,) * 4
