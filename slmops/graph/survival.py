"""How much of a fine-tune is left in quantized weights? One layer's share, and the share of all layers together.

With D what the fine-tune changed in float, p = <W_quantized - W_base, D> / <D, D>: 1 when the fine-tune is there, 0 when it
is gone, 1.5 when it was scaled so. Rounding to a grid of step s is an error of variance s^2 / 12 a weight; its product with
D gives p a standard deviation of s / sqrt(12) / ||D||, small because D has thousands of entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Share:
    """How much of the fine-tune is in one layer of the package."""

    layer: str
    product: float
    """<W_package - W_base, D>"""
    energy: float
    """<D, D>"""
    noise: float
    """Standard deviation that rounding gives p."""

    @property
    def p(self) -> float:
        """1: all of the fine-tune; 0: none."""
        return self.product / self.energy


def share_of(layer: str, stored: np.ndarray, before: np.ndarray, after: np.ndarray, steps: np.ndarray | None) -> Share | None:
    """Measure a layer's share.

    Args:
        layer: its name.
        stored: what the package multiplies with, (outputs, inputs).
        before: the weights of the base in float.
        after: those of the fine-tune.
        steps: of the grid that `stored` lies on, (outputs, blocks); None where it is float.

    Returns:
        The share; None for a layer that the fine-tune did not change.
    """
    delta = after - before
    energy = float(np.vdot(delta, delta))
    if not energy > 0:
        return None
    noise = float(np.sqrt((steps**2).mean() / 12) / math.sqrt(energy)) if steps is not None else 0.0
    return Share(layer, float(np.vdot(stored - before, delta)), energy, noise)


def pooled(shares: Sequence[Share]) -> tuple[float, float]:
    """Return p and its noise over several layers, each by the energy of its delta."""
    energy = sum(share.energy for share in shares)
    noise = math.sqrt(sum((share.noise * share.energy) ** 2 for share in shares))
    return sum(share.product for share in shares) / energy, noise / energy
