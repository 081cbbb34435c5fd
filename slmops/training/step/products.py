"""In which arithmetic is a frozen matrix multiplied? In its own precision, or in int8 where that is sooner and close enough.

Processors that multiply bytes (AVX512-VNNI, AVX-VNNI) do so twice as fast as bf16 and four times as fast as fp32. The recipe is
that of SwitchBack (arXiv 2304.13013) in its vector-wise form: a scale for each row of the weights and for each token, sums in int32, both for
the outputs and for the gradient of the inputs; what is learned, A and B, keeps its precision. How far a product is off depends
on how far a token's largest number stands out: each layer is tried on rows of the data, and one that is off too far keeps its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn import functional

from slmops.training.step.kernels import kernels_for
from slmops.training.step.kernels.plain import ZERO

BOUND = 0.05
"""Largest error of a product that int8 may make: normally distributed numbers give 0.011, gated and sparse ones 0.02 to 0.04."""
_TOKENS_COUNTED = 0.9
_SMALLEST = 1e-30


class Products(Protocol):
    """What a frozen layer computes: y = x W' + b, and on the way back dx = dy W."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y (tokens, outputs) of x (tokens, inputs)."""
        ...

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        """Return dx (tokens, inputs) of dy (tokens, outputs)."""
        ...


class Plain:
    """In the precision of the weights.

    Args:
        weight: (outputs, inputs).
        bias: (outputs), or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `Products`."""
        return functional.linear(x, self.weight, self.bias)

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        """See `Products`."""
        return dy @ self.weight


class Int8:
    """In int8, with results in the precision of what comes in; arguments as `Plain`'s. The weights are held twice more, a byte each."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.bias = bias
        self.matrix, self.turned = Int8Matrix(weight), Int8Matrix(weight.t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `Products`."""
        y = self.matrix.times(x)
        return y if self.bias is None else y.add_(self.bias)

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        """See `Products`."""
        return self.turned.times(dy)


class Tried(Plain):
    """In the precision of the weights, while int8 is tried beside it.

    Forward, a token's error is held against its distance from the median token, and nine tenths of the tokens count: a number that
    is large in all tokens, or a token that is large itself (the first one often is), would hide what the others lose. On the
    way back gradients are summed over tokens, and so are errors.

    Args:
        weight: (outputs, inputs).
        bias: (outputs), or None.
        widths: outputs of each layer that is stacked in it; the worst counts. None: it is one.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, widths: Sequence[int] | None = None) -> None:
        super().__init__(weight, bias)
        self.int8 = Int8(weight, bias)
        self.widths = list(widths) if widths is not None else [len(weight)]
        self.error: float | None = None
        """Largest relative error of a product so far; None: none was asked for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `Products`."""
        y = super().forward(x)
        for right, found in zip(y.float().split(self.widths, 1), self.int8.forward(x).float().split(self.widths, 1), strict=True):
            distances = (right - right.median(0).values).norm(dim=1)
            self._count(float(((found - right).norm(dim=1) / distances.clamp(min=_SMALLEST)).quantile(_TOKENS_COUNTED)))
        return y

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        """See `Products`."""
        dx = super().backward(dy)
        self._count(float((self.int8.backward(dy).float() - dx.float()).norm() / dx.float().norm().clamp(min=_SMALLEST)))
        return dx

    def _count(self, error: float) -> None:
        self.error = max(self.error or 0.0, error if math.isfinite(error) else math.inf)


class Int8Matrix:
    """A matrix W whose rows are held in int8 with a scale each, for products x W'.

    Args:
        matrix: (rows, columns).
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        self.kernels = kernels_for(matrix, *matrix.shape)
        codes, scales = self.kernels.quantize(matrix.contiguous())
        self.codes = torch.ops.onednn.qlinear_prepack(codes.bitwise_xor_(ZERO).view(torch.int8), None)
        self.scales = scales.flatten().float()
        self.zeros = torch.zeros(len(matrix), dtype=torch.int64)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W' (tokens, rows) of x (tokens, columns), in the precision of x."""
        codes, scales = self.kernels.quantize(x)
        y = torch.ops.onednn.qlinear_pointwise(codes, 1.0, ZERO, self.codes, self.scales, self.zeros, None, 1.0, 0, x.dtype, "none", [], "")
        return self.kernels.scale(y, scales)
