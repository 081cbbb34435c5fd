"""How does attention run on joined rows? Each row in a line of its own, causal, forward and backward by hand.

Rows of a fine-tune are short, and there the library's fused kernel loses: for 8 rows of 40 tokens, 6 heads of 32, torch
2.13's flash kernel takes 392 us forward and 514 us backward on two Zen 4 cores, three batched products and a softmax 129
and 165 us (its bf16 backward: 2,900 us). Longer rows go through `scaled_dot_product_attention`, which does not hold
the scores of a whole row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from slmops.training.step.rows import KEY, Rows

WINDOWS = "slmops_windows"
"""Name of a keyword with a list, to which each attention layer adds its sliding window: families keep it in different places."""
LONGEST_BY_HAND = 192
"""Rows up to this many tokens are attended by hand: scores of longer ones no longer fit into the cache."""


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
    if rows.longest <= LONGEST_BY_HAND and not dropout:
        return _RowAttention.apply(query, key, value, rows, scale, window), None
    return _library_attention(query, key, value, rows, scale, window, dropout), None


class _RowAttention(torch.autograd.Function):
    """softmax(scale Q K' + mask) V of each row. Queries that share a key head are stacked along the tokens."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scale: float, window: int | None
    ) -> torch.Tensor:
        heads, key_heads, width = query.shape[1], key.shape[1], query.shape[3]
        q, k, v = (_stacked(rows.to_lines(_tokens_first(x)), key_heads, width) for x in (query, key, value))
        mask = causal_mask(rows.longest, heads // key_heads, window, q.dtype, q.device)
        probabilities = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(-1)
        answer = torch.bmm(probabilities, v)
        ctx.save_for_backward(q, k, v, probabilities)
        ctx.rows, ctx.scale, ctx.heads = rows, scale, heads
        return rows.from_lines(_unstacked(answer, len(rows.lengths), rows.longest, heads)).view(1, rows.tokens, heads, width)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, probabilities = ctx.saved_tensors
        rows, scale, heads = ctx.rows, ctx.scale, ctx.heads
        key_heads, width = q.shape[0] // len(rows.lengths), q.shape[-1]
        incoming = _stacked(rows.gradient_to_lines(gradients[0].reshape(rows.tokens, heads * width)), key_heads, width)
        of_value = torch.bmm(probabilities.transpose(1, 2), incoming)
        of_scores = torch.ops.aten._softmax_backward_data(torch.bmm(incoming, v.transpose(1, 2)), probabilities, -1, q.dtype)
        of_query = torch.bmm(of_scores, k).mul_(scale)
        of_key = torch.bmm(of_scores.transpose(1, 2), q).mul_(scale)
        count = len(rows.lengths)
        found = ((of_query, heads), (of_key, key_heads), (of_value, key_heads))
        back = (
            rows.gradient_from_lines(_unstacked(x, count, rows.longest, n)).view(1, rows.tokens, n, width).transpose(1, 2) for x, n in found
        )
        return (*back, None, None, None)


def _tokens_first(x: torch.Tensor) -> torch.Tensor:
    """(1, heads, tokens, width) -> (tokens, heads x width)."""
    return x[0].transpose(0, 1).reshape(x.shape[2], -1)


def _stacked(lines: torch.Tensor, key_heads: int, width: int) -> torch.Tensor:
    """(rows, longest, heads x width) -> (rows x key heads, heads / key heads x longest, width)."""
    count, longest, _ = lines.shape
    return lines.view(count, longest, key_heads, -1, width).permute(0, 2, 3, 1, 4).reshape(count * key_heads, -1, width)


def _unstacked(x: torch.Tensor, count: int, longest: int, heads: int) -> torch.Tensor:
    """The way back of `_stacked`: -> (rows, longest, heads x width)."""
    return x.view(count, heads, longest, -1).transpose(1, 2).reshape(count, longest, -1)


@lru_cache(maxsize=256)
def causal_mask(longest: int, groups: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(groups x longest, longest): 0 where a token may look, minus infinity elsewhere."""
    return torch.zeros((), dtype=dtype, device=device).masked_fill(~_seen(longest, window, device), float("-inf")).repeat(groups, 1)


def _seen(longest: int, window: int | None, device: torch.device) -> torch.Tensor:
    place = torch.arange(longest, device=device)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _library_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scale: float, window: int | None, dropout: float
) -> torch.Tensor:
    count, heads, key_heads, width = len(rows.lengths), query.shape[1], key.shape[1], query.shape[3]
    lined = ((query, heads), (key, key_heads), (value, key_heads))
    q, k, v = (rows.to_lines(_tokens_first(x)).view(count, rows.longest, n, width).transpose(1, 2) for x, n in lined)
    if heads != key_heads:
        k, v = (x.repeat_interleave(heads // key_heads, dim=1) for x in (k, v))
    mask = _seen(rows.longest, window, q.device) if window is not None else None
    answer = functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scale)
    return rows.from_lines(answer.transpose(1, 2).reshape(count, rows.longest, -1)).view(1, rows.tokens, heads, width)
