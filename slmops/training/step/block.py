"""A whole attention layer in one step: projections with their pairs, rotary positions (arXiv 2104.09864), attention, output.

For layers of the common form (Llama, Mistral, Qwen 2, Granite and their like): x -> q, k, v; q and k turned by their
position; softmax(scale q k') v within each row; -> output projection. Between the projections everything is in fp32.
"""

from __future__ import annotations

from typing import Any

import torch

from slmops.training.step import lora
from slmops.training.step.attention import causal_mask
from slmops.training.step.pairs import Adapted
from slmops.training.step.rows import Rows


class AdaptedAttention(torch.autograd.Function):
    """Attention of joined rows: x (1, tokens, inputs) -> (1, tokens, outputs).

    Inputs behind x: the tick; cosines and sines (longest, width) of the places in a row; the rows; stacked q, k, v and the output
    projection; the number of heads and of key heads; the scale of the scores; the sliding window or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        tick: torch.Tensor | None,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        rows: Rows,
        qkv: Adapted,
        out: Adapted,
        heads: tuple[int, int],
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(qkv.weight.dtype)
        y, h = lora.forward(qkv, flat)
        width = cosines.shape[-1]
        lines = rows.to_lines(y).float().view(len(rows.lengths), rows.longest, -1, width)
        turning = heads[0] + heads[1]
        turned = turn(lines[:, :, :turning], cosines, sines)
        q = heads_first(turned[:, :, : heads[0]], heads[1])
        k = heads_first(turned[:, :, heads[0] :], heads[1])
        v = heads_first(lines[:, :, turning:], heads[1])
        mask = causal_mask(rows.longest, heads[0] // heads[1], window, q.dtype, q.device)
        probabilities = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(-1)
        answer = tokens_first(torch.bmm(probabilities, v), len(rows.lengths), heads[0])
        answer = rows.from_lines(answer).to(out.weight.dtype)
        z, h_out = lora.forward(out, answer)
        ctx.save_for_backward(flat, h, q, k, v, probabilities, answer, h_out, cosines, sines)
        ctx.layers, ctx.rows, ctx.heads, ctx.scale, ctx.shape, ctx.dtype = (qkv, out), rows, heads, scale, x.shape, x.dtype
        return z.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, q, k, v, probabilities, answer, h_out, cosines, sines = ctx.saved_tensors
        (qkv, out), rows, heads = ctx.layers, ctx.rows, ctx.heads
        dz = gradients[0].reshape(len(x), -1).to(x.dtype)
        of_answer = lora.backward(out, answer, h_out, dz, needs_x=True)
        assert of_answer is not None
        count, longest, width = len(rows.lengths), rows.longest, q.shape[-1]
        lines = rows.gradient_to_lines(of_answer.float()).view(count, longest, heads[0], width)
        incoming = heads_first(lines, heads[1])
        of_all = torch.empty(count, longest, heads[0] + 2 * heads[1], width, dtype=q.dtype, device=q.device)
        of_value = torch.bmm(probabilities.transpose(1, 2), incoming)
        of_scores = torch.ops.aten._softmax_backward_data(torch.bmm(incoming, v.transpose(1, 2)), probabilities, -1, q.dtype)
        of_scores.mul_(ctx.scale)
        turning = heads[0] + heads[1]
        put_tokens_first(of_all[:, :, : heads[0]], torch.bmm(of_scores, k))
        put_tokens_first(of_all[:, :, heads[0] : turning], torch.bmm(of_scores.transpose(1, 2), q))
        put_tokens_first(of_all[:, :, turning:], of_value)
        of_all[:, :, :turning] = turn(of_all[:, :, :turning], cosines, -sines)
        dy = rows.gradient_from_lines(of_all.view(count, longest, -1).to(x.dtype))
        dx = lora.backward(qkv, x, h, dy, needs_x=ctx.needs_input_grad[0])
        found = dx.view(ctx.shape).to(ctx.dtype) if dx is not None else None
        return found, lora.of_tick(qkv, out), *(None,) * 8


def turn(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + width / 2) of x (rows, longest, heads, width) by its place's angle; minus sines turn it back."""
    half = x.shape[-1] // 2
    turned = x * cosines[:, None]
    turned[..., :half].addcmul_(x[..., half:], sines[:, None, :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sines[:, None, half:])
    return turned


def heads_first(x: torch.Tensor, key_heads: int) -> torch.Tensor:
    """(rows, longest, heads, width) -> (rows x key heads, heads / key heads x longest, width)."""
    count, longest, heads, width = x.shape
    if heads == key_heads:
        return x.transpose(1, 2).reshape(count * heads, longest, width)
    return x.unflatten(2, (key_heads, -1)).permute(0, 2, 3, 1, 4).reshape(count * key_heads, -1, width)


def tokens_first(x: torch.Tensor, count: int, heads: int) -> torch.Tensor:
    """The way back of `heads_first`: -> (rows, longest, heads x width)."""
    longest = x.shape[0] * x.shape[1] // (count * heads)
    return x.view(count, heads, longest, -1).transpose(1, 2).reshape(count, longest, -1)


def put_tokens_first(place: torch.Tensor, x: torch.Tensor) -> None:
    """Write the way back of `heads_first` to a place (rows, longest, heads, width)."""
    count, longest, heads, _ = place.shape
    place.copy_(x.view(count, heads, longest, -1).transpose(1, 2))
