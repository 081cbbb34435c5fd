"""RMSNorm with a frozen weight, forward and backward."""

from __future__ import annotations

from typing import Any

import torch

from slmops.training.step.kernels import Kernels


class FrozenRMSNorm(torch.autograd.Function):
    """Normalize x (..., width) with a frozen weight (width), whose precision y is in."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, kernels: Kernels) -> torch.Tensor:
        y, saved = kernels.normalize(x, weight, epsilon)
        ctx.save_for_backward(*saved)
        ctx.dtype, ctx.kernels = x.dtype, kernels
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.kernels.normalize_back(ctx.dtype, ctx.saved_tensors, gradients[0]), None, None, None
