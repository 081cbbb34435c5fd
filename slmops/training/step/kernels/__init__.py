"""What is computed between the matrix products of a step, and with what? PyTorch's operators, or one pass of our own for each piece.

A small model's step is made of many short operators: a norm is eight, positions and attention forty, each of which goes through all its numbers
and costs a call. On a processor the pieces are written in C++ (`kernels.cpp`), compiled once for each machine with the compiler that is there,
and held against PyTorch's operators on random numbers before they are used. Without a compiler PyTorch's operators do the same work.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from slmops.compiling import NotCompiled, library, switched_off
from slmops.training.step.kernels.compiled import CompiledKernels, disagreement, fits
from slmops.training.step.kernels.plain import PLAIN, Attention, Kernels

__all__ = ["PLAIN", "Attention", "Kernels", "kernels_for", "why_not_compiled"]

SOURCE, FLAG = Path(__file__).with_name("kernels.cpp"), "-fopenmp"


def kernels_for(like: torch.Tensor, *widths: int) -> Kernels:
    """Return what computes with tensors on the device and in the precision of one, of these widths."""
    return _found()[0] if fits(like, *widths) else PLAIN


def why_not_compiled() -> str | None:
    """Say why a processor computes with PyTorch's operators; None where it does not, or was told to."""
    return _found()[1]


@cache
def _found() -> tuple[Kernels, str | None]:
    if switched_off():
        return PLAIN, None
    try:
        kernels = CompiledKernels(library(SOURCE, FLAG))
    except (NotCompiled, AttributeError) as error:
        return PLAIN, str(error)
    reason = disagreement(kernels)
    return (kernels, None) if reason is None else (PLAIN, reason)
