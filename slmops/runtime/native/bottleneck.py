"""Bottleneck adapter layers: what do they compute, and where do they stand?

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751, section 2.1: after the projection
back to the model's width of the attention and of the feed-forward sub-layer, before the skip connection,

    h + U f(D h + d) + u,      D (size, width), U (width, size)

with f a nonlinearity (theirs, in the code that came with it: GELU) and the weights drawn from a normal distribution of
deviation 0.01 cut off at two deviations, so that training begins near the base. The parameters of the normalizations are trained
along, as there. f is what no weight of the base can say: such an adapter cannot be merged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from slmops.runtime.native.blocks import hidden_of, norms, replaced, sublayers

_DEVIATION = 0.01


class Bottleneck(nn.Module):
    """One adapter layer, (..., width) -> (..., width), float32."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=_DEVIATION, a=-2 * _DEVIATION, b=2 * _DEVIATION)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Add what passes the bottleneck."""
        return hidden + self.up(functional.gelu(self.down(hidden.float()))).to(hidden.dtype)


def add(model: Any, config: dict[str, Any]) -> None:
    """Put a bottleneck of `config["size"]` behind each attention and MLP; the normalizations are trained along."""
    width = model.config.get_text_config().hidden_size
    for block in sublayers(model):
        block.bottleneck = Bottleneck(width, config["size"]).to(next(block.parameters()).device)
        block.register_forward_hook(_through)
    for norm in norms(model):
        norm.requires_grad_(True)


def _through(block: Any, _: Any, output: Any) -> Any:
    return replaced(output, block.bottleneck(hidden_of(output)))
