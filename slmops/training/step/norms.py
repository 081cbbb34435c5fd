"""RMSNorm forward and backward in few passes (Zhang and Sennrich, arXiv 1910.07467): y = x w / sqrt(mean(x^2) + eps)."""

from __future__ import annotations

from typing import Any

import torch


class FrozenRMSNorm(torch.autograd.Function):
    """Normalize x (..., width) in fp32, with a frozen weight w (width); y is in x's precision."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        inverse = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        normalized = wide * inverse
        ctx.save_for_backward(normalized, inverse, weight)
        ctx.dtype = x.dtype
        return (normalized * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normalized, inverse, weight = ctx.saved_tensors
        scaled = gradients[0].float() * weight
        share = (scaled * normalized).mean(-1, keepdim=True)
        return scaled.sub_(normalized * share).mul_(inverse).to(ctx.dtype), None, None
