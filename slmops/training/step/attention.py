"""How does attention run on joined rows? Each row for itself, causal, forward and backward by hand.

Rows of a fine-tune are short, and there the library's fused kernel loses. Longer ones go through `scaled_dot_product_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from slmops.training.step.kernels import Attention, Kernels, kernels_for
from slmops.training.step.kernels.plain import seen
from slmops.training.step.rows import KEY, Rows

WINDOWS = "slmops_windows"
"""Name of a keyword with a list, to which each attention layer adds its sliding window: families keep it in different places."""


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each row; in the form of transformers' attention functions.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, width).
        key: (1, key heads, tokens, width); key heads divide heads.
        value: as key.
        attention_mask: unused: rows are causal, and told apart by their lengths.
        scaling: of the scores; default 1 / sqrt(width).
        dropout: on the probabilities.
        sliding_window: a token sees so many tokens, itself included; None: all before it.
        others: of the model's forward; the rows under `KEY`, and perhaps a list under `WINDOWS`.

    Returns:
        (1, tokens, heads, width), and None for the probabilities.
    """
    rows: Rows = others[KEY]
    others.get(WINDOWS, []).append(sliding_window)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    value = value.to(query.dtype)
    window = sliding_window if sliding_window is not None and sliding_window < rows.longest else None
    kernels = kernels_for(query, query.shape[-1])
    if rows.longest > kernels.longest_row or dropout:
        return _library_attention(query, key, value, rows, scale, window, dropout), None
    y = _tokens_first(torch.cat([query, key, value], dim=1))
    answer = _RowAttention.apply(y, Attention(rows, (query.shape[1], key.shape[1]), scale, window), kernels)
    return answer.view(1, rows.tokens, query.shape[1], -1), None


class _RowAttention(torch.autograd.Function):
    """Attention of queries, keys and values, stacked (tokens, heads x width)."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, how: Attention, kernels: Kernels) -> torch.Tensor:
        answer, saved = kernels.attend(y, how)
        ctx.save_for_backward(*saved)
        ctx.how, ctx.kernels = how, kernels
        return answer

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.kernels.attend_back(ctx.how, ctx.saved_tensors, gradients[0]), None, None


def _tokens_first(x: torch.Tensor) -> torch.Tensor:
    """(1, heads, tokens, width) -> (tokens, heads x width)."""
    return x[0].transpose(0, 1).reshape(x.shape[2], -1)


def _library_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scale: float, window: int | None, dropout: float
) -> torch.Tensor:
    count, heads, key_heads, width = len(rows.lengths), query.shape[1], key.shape[1], query.shape[3]
    lined = ((query, heads), (key, key_heads), (value, key_heads))
    q, k, v = (rows.to_lines(_tokens_first(x)).view(count, rows.longest, n, width).transpose(1, 2) for x, n in lined)
    if heads != key_heads:
        k, v = (x.repeat_interleave(heads // key_heads, dim=1) for x in (k, v))
    mask = seen(rows.longest, window, q.device) if window is not None else None
    answer = functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scale)
    return rows.from_lines(answer.transpose(1, 2).reshape(count, rows.longest, -1)).view(1, rows.tokens, heads, width)
