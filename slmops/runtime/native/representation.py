"""LoReFT: how is a hidden representation edited, and at which tokens?

Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", arXiv 2404.03592, equation 2: after a layer,

    h + R' (W h + b - R h),      R (rank, width) with orthonormal rows, W (rank, width), b (rank)

so that within the subspace that R spans the representation becomes W h + b, and outside of it stays what it was. R is the Q of the
QR decomposition of a free matrix, which keeps its rows orthonormal at every step. W begins as R and b as zero: training begins
at the base.

The paper edits the first p and the last s tokens of the prompt. A model sees tokens, and not where among them a prompt ends: of a
prompt with its answer behind it (as losses and `verify` see it) the last tokens are others than of the prompt alone. So slmops edits
the first N tokens of a row (`--reft-positions N`, the paper's p), or all of them, which means the same in training, scoring
and generation, with and without a KV cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slmops.runtime.native.blocks import decoder_layers, hidden_of, replaced


class LowRankEdit(nn.Module):
    """The edit after one layer, (..., width) -> (..., width), float32."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.free = nn.Parameter(nn.init.orthogonal_(torch.empty(width, rank)))
        self.source = nn.Linear(width, rank)
        with torch.no_grad():
            self.source.weight.copy_(self.rotation)
            self.source.bias.zero_()

    @property
    def rotation(self) -> torch.Tensor:
        """R, (rank, width), rows orthonormal."""
        return torch.linalg.qr(self.free)[0].T

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Edit every representation."""
        rotation, values = self.rotation, hidden.float()
        return hidden + ((self.source(values) - values @ rotation.T) @ rotation).to(hidden.dtype)


def add(model: Any, config: dict[str, Any]) -> None:
    """Put an edit of `config["rank"]` behind each layer, for the first `config["positions"]` tokens of a row (None: for all)."""
    width = model.config.get_text_config().hidden_size
    edited = Edited(config["positions"])
    body, layers = decoder_layers(model)
    body.register_forward_pre_hook(edited.look, with_kwargs=True)
    for layer in layers:
        layer.edit = LowRankEdit(width, config["rank"]).to(next(layer.parameters()).device)
        layer.register_forward_hook(edited.apply)


class Edited:
    """Which tokens of the batch at hand are edited."""

    def __init__(self, first: int | None) -> None:
        self.first = first
        self.where: torch.Tensor | None = None

    def look(self, _: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        """Find the tokens at the first positions of their rows, before the layers run; padding is none of them."""
        if self.first is None:
            return
        ids = given.get("input_ids", args[0] if args else None)
        ids = given["inputs_embeds"] if ids is None else ids
        cache, positions, mask = given.get("past_key_values"), given.get("position_ids"), given.get("attention_mask")
        if positions is None:
            before = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(before, before + ids.shape[1], device=ids.device)[None]
        self.where = positions < self.first
        if mask is not None and mask.dim() == 2:
            self.where = self.where & mask[:, -ids.shape[1] :].bool()

    def apply(self, layer: Any, _: Any, output: Any) -> Any:
        """Edit a layer's output at those tokens."""
        hidden = hidden_of(output)
        if self.first is None:
            return replaced(output, layer.edit(hidden))
        assert self.where is not None
        return replaced(output, torch.where(self.where[..., None], layer.edit(hidden), hidden))
