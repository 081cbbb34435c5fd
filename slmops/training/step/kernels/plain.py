"""The pieces of a step between its matrix products, forward and backward, in PyTorch's operators: on any device, in any precision.

Each returns what its way back needs beside its answer; the way back gets that and the gradient of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from slmops.training.step.rows import Rows

if TYPE_CHECKING:
    from slmops.training.step.pairs import Adapted

LARGEST_CODE = 126
"""A scale is rounded to bf16, and the largest number must still not become 128."""
ZERO = 128
"""The code of 0: oneDNN has a fast kernel for activations without a sign alone."""
_SMALLEST = 1e-30
_ROUNDING = 1.5 * 2**23 + ZERO

Saved = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Attention:
    """How the tokens of joined rows attend: each to those before it in its row.

    Args:
        rows: of the batch.
        heads: of the queries, and of keys and values, which divide them.
        scale: of the scores.
        window: a token sees so many, itself included; None: all before it.
        turns: cosines and sines (longest, width) of the places in a row, by which queries and keys are turned (rotary positions,
            arXiv 2104.09864); None: they are not.
    """

    rows: Rows
    heads: tuple[int, int]
    scale: float
    window: int | None = None
    turns: tuple[torch.Tensor, torch.Tensor] | None = None

    def width(self, y: torch.Tensor) -> int:
        """Return the width of a head of stacked queries, keys and values."""
        return y.shape[-1] // (self.heads[0] + 2 * self.heads[1])


class Kernels:
    """PyTorch's operators."""

    name = "pytorch"
    longest_row = 192
    """Rows up to this many tokens are attended here; longer ones are sooner in the library's fused kernel."""
    holds_scores = True
    """For the way back: the probabilities of all queries and keys, in fp32."""

    wide_pairs = False
    """LoRA pairs are read where they are trained, in fp32; else a copy in the precision of the products is made for each pass."""

    def suits(self, rank: int, precision: torch.dtype) -> bool:
        """Tell whether products with pairs of a rank, in a precision, are best computed here."""
        return True

    def add_pairs(self, layer: Adapted, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add s (x A') B' of each of a layer's pairs, of which it has one at least, to y (tokens, outputs); return h for the way back.

        Args:
            layer: `slmops.training.step.pairs.Adapted`.
            x: (tokens, inputs).
            y: (tokens, outputs).
        """
        assert layer.down_turned is not None
        h = x.mm(layer.down_turned)
        for block in layer.blocks:
            y[:, block.outputs].addmm_(h[:, block.ranks], block.up_turned, alpha=block.scale)
        return h

    def add_pairs_back(self, layer: Adapted, x: torch.Tensor, h: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor | None) -> None:
        """Add the gradients of A and B to their store's, and that of x by way of them to dx, where there is one."""
        assert layer.down is not None
        assert layer.down_gradient is not None
        for pair in layer.pairs:
            pair.up_gradient.addmm_(dy[:, pair.outputs].t(), h[:, pair.ranks], alpha=pair.scale)
        dh = torch.empty_like(h)
        for block in layer.blocks:
            dh[:, block.ranks].addmm_(dy[:, block.outputs], block.up, beta=0, alpha=block.scale)
        layer.down_gradient.addmm_(dh.t(), x)
        if dx is not None:
            dx.addmm_(dh, layer.down)

    def normalize(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, Saved]:
        """Return y = x w / sqrt(mean(x^2) + eps) (RMSNorm, Zhang and Sennrich, arXiv 1910.07467), computed in fp32.

        Args:
            x: (..., width).
            weight: (width).
            epsilon: added to the mean.

        Returns:
            y (..., width) in the precision of the weight.
        """
        wide = x.float()
        inverse = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        normalized = wide * inverse
        return (normalized * weight).to(weight.dtype), (normalized, inverse, weight)

    def normalize_back(self, precision: torch.dtype, saved: Saved, of_y: torch.Tensor) -> torch.Tensor:
        """Return the gradient of x, in a precision, which is that of x."""
        normalized, inverse, weight = saved
        scaled = of_y.float() * weight
        share = (scaled * normalized).mean(-1, keepdim=True)
        return scaled.sub_(normalized * share).mul_(inverse).to(precision)

    def gate(self, both: torch.Tensor) -> tuple[torch.Tensor, Saved]:
        """Return silu(gate) * up (tokens, inner) of gate and up, stacked (tokens, 2 inner) (SwiGLU, arXiv 2002.05202)."""
        gate, up = both.chunk(2, dim=-1)
        active = functional.silu(gate)
        return active * up, (both, active)

    def gate_back(self, saved: Saved, of_inner: torch.Tensor) -> torch.Tensor:
        """Return the gradient of gate and up, stacked; that of the answer is overwritten."""
        both, active = saved
        gate, up = both.chunk(2, dim=-1)
        of_both = torch.empty_like(both)
        of_gate, of_up = of_both.chunk(2, dim=-1)
        torch.mul(of_inner, active, out=of_up)
        torch.ops.aten.silu_backward.grad_input(of_inner.mul_(up), gate, grad_input=of_gate)
        return of_both

    def attend(self, y: torch.Tensor, how: Attention) -> tuple[torch.Tensor, Saved]:
        """Return softmax(scale q k' + mask) v within each row.

        For 8 rows of 40 tokens, 6 heads of 32, torch 2.13's flash kernel takes 392 us forward and 514 us backward on two Zen 4 cores,
        three batched products and a softmax 129 and 165 us (its bf16 backward: 2,900 us).

        Args:
            y: queries, keys and values, stacked (tokens, heads x width).
            how: they attend.

        Returns:
            (tokens, query heads x width), in the precision of y; computed in fp32.
        """
        rows, (heads, key_heads), width = how.rows, how.heads, how.width(y)
        lines = rows.to_lines(y).float().view(len(rows.lengths), rows.longest, -1, width)
        turning = heads + key_heads
        turned = _turn(lines[:, :, :turning], *how.turns) if how.turns is not None else lines
        q, k = _heads_first(turned[:, :, :heads], key_heads), _heads_first(turned[:, :, heads:turning], key_heads)
        v = _heads_first(lines[:, :, turning:], key_heads)
        mask = causal_mask(rows.longest, heads // key_heads, how.window, q.dtype, q.device)
        probabilities = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=how.scale).softmax(-1)
        answer = _tokens_first(torch.bmm(probabilities, v), len(rows.lengths), heads)
        return rows.from_lines(answer).to(y.dtype), (q, k, v, probabilities)

    def attend_back(self, how: Attention, saved: Saved, of_answer: torch.Tensor) -> torch.Tensor:
        """Return the gradient of queries, keys and values, stacked."""
        q, k, v, probabilities = saved
        rows, (heads, key_heads), width = how.rows, how.heads, q.shape[-1]
        count, longest, turning = len(rows.lengths), rows.longest, heads + key_heads
        lines = rows.gradient_to_lines(of_answer.float()).view(count, longest, heads, width)
        incoming = _heads_first(lines, key_heads)
        of_all = torch.empty(count, longest, heads + 2 * key_heads, width, dtype=q.dtype, device=q.device)
        _put_tokens_first(of_all[:, :, turning:], torch.bmm(probabilities.transpose(1, 2), incoming))
        of_scores = torch.ops.aten._softmax_backward_data(torch.bmm(incoming, v.transpose(1, 2)), probabilities, -1, q.dtype)
        of_scores.mul_(how.scale)
        _put_tokens_first(of_all[:, :, :heads], torch.bmm(of_scores, k))
        _put_tokens_first(of_all[:, :, heads:turning], torch.bmm(of_scores.transpose(1, 2), q))
        if how.turns is not None:
            cosines, sines = how.turns
            of_all[:, :, :turning] = _turn(of_all[:, :, :turning], cosines, -sines)
        return rows.gradient_from_lines(of_all.view(count, longest, -1).to(of_answer.dtype))

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes from 0 to 255 (rows, columns) and scales (rows, 1), in the precision of x, which is about scales x (codes - 128)."""
        sizes = x.abs()
        # Numbers without a sign are ordered as their bits are, and integers are compared four times as fast.
        largest = sizes.view(torch.int16).amax(1, keepdim=True).view(x.dtype) if x.dtype == torch.bfloat16 else sizes.amax(1, keepdim=True)
        scales = largest.mul_(1 / LARGEST_CODE).clamp_(min=_SMALLEST)
        wide = sizes.copy_(x) if x.dtype == torch.float32 else x.float()
        # Beyond 2^23 a float is an integer: its last byte is the code, rounded.
        return wide.mul_(scales.float().reciprocal()).add_(_ROUNDING).view(torch.int32).to(torch.uint8), scales

    def scale(self, y: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return y (rows, columns), each row times its scale (rows, 1), in place."""
        return y.mul_(scales)


PLAIN = Kernels()


@lru_cache(maxsize=256)
def causal_mask(longest: int, groups: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(groups x longest, longest): 0 where a token may look, minus infinity elsewhere."""
    return torch.zeros((), dtype=dtype, device=device).masked_fill(~seen(longest, window, device), float("-inf")).repeat(groups, 1)


def seen(longest: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(longest, longest): which tokens each one looks at."""
    place = torch.arange(longest, device=device)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _turn(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + width / 2) of x (rows, longest, heads, width) by its place's angle; minus sines turn it back."""
    half = x.shape[-1] // 2
    turned = x * cosines[:, None]
    turned[..., :half].addcmul_(x[..., half:], sines[:, None, :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sines[:, None, half:])
    return turned


def _heads_first(x: torch.Tensor, key_heads: int) -> torch.Tensor:
    """(rows, longest, heads, width) -> (rows x key heads, heads / key heads x longest, width)."""
    count, longest, heads, width = x.shape
    if heads == key_heads:
        return x.transpose(1, 2).reshape(count * heads, longest, width)
    return x.unflatten(2, (key_heads, -1)).permute(0, 2, 3, 1, 4).reshape(count * key_heads, -1, width)


def _tokens_first(x: torch.Tensor, count: int, heads: int) -> torch.Tensor:
    """The way back of `_heads_first`: -> (rows, longest, heads x width)."""
    longest = x.shape[0] * x.shape[1] // (count * heads)
    return x.view(count, heads, longest, -1).transpose(1, 2).reshape(count, longest, -1)


def _put_tokens_first(place: torch.Tensor, x: torch.Tensor) -> None:
    """Write the way back of `_heads_first` to a place (rows, longest, heads, width)."""
    count, longest, heads, _ = place.shape
    place.copy_(x.view(count, heads, longest, -1).transpose(1, 2))
