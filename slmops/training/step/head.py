"""What is the loss, and how many logits does it take? Those of supervised positions, a chunk at a time.

Logits are the largest tensor of a small model's step: tokens x vocabulary. Only positions whose next token is counted
need any, and the gradient of a chunk's logits can go back to the hidden states at once, so that no more than one chunk
is ever held (as in Cut Cross-Entropy, arXiv 2411.09009, without its kernel).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from slmops.training.batches import IGNORED

_SMALLEST = 1e-30  # below it fp32 probabilities lose digits, and then are 0
CHUNK_LOGITS = 2**24
"""Logits held at once (64 MB in fp32); a chunk is at least 64 positions."""


class Head:
    """The part of a causal language model behind its last hidden state: projection, and what a family does after it.

    A family may scale or cap its logits (Granite, Gemma 2), so the head is the model's own forward, with hidden states
    put where its decoder would have computed them.

    Args:
        causal: a causal language model of transformers.
    """

    def __init__(self, causal: nn.Module) -> None:
        self.causal: Any = causal
        self.forward = causal.forward
        self.inner = getattr(causal, causal.base_model_prefix)  # pyright: ignore[reportCallIssue, reportArgumentType]
        self.vocabulary = int(causal.config.vocab_size)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        self.trains = any(p.requires_grad for p in causal.get_output_embeddings().parameters())  # pyright: ignore[reportCallIssue]

    @property
    def chunk(self) -> int:
        """Positions whose logits are held at once."""
        return max(64, CHUNK_LOGITS // self.vocabulary)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (positions, vocabulary) of hidden states (positions, width)."""
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Hidden  # GPT-2 asks for all of it

        hidden = hidden.to(self.causal.get_output_embeddings().weight.dtype)
        own = self.inner.__dict__.get("forward")
        self.inner.forward = lambda *_args, **_kwargs: Hidden(last_hidden_state=hidden[None])  # pyright: ignore[reportArgumentType]
        try:
            return self.forward(inputs_embeds=hidden[None], use_cache=False).logits[0]
        finally:
            if own is None:
                del self.inner.forward
            else:
                self.inner.forward = own


def summed_cross_entropy(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy, in nats, summed over positions.

    Args:
        head: of the model.
        hidden: (positions, width), the decoder's last.
        targets: (positions), the token that each should predict; -100: not counted.
    """
    if not torch.is_grad_enabled() or len(hidden) <= head.chunk:
        parts = zip(hidden.split(head.chunk), targets.split(head.chunk), strict=True)
        return torch.stack([_of(head, h, t) for h, t in parts]).sum()
    if head.trains:
        parts = zip(hidden.split(head.chunk), targets.split(head.chunk), strict=True)
        held = [checkpoint(_of, head, h, t, use_reentrant=False) for h, t in parts]
        return torch.stack(held).sum()  # pyright: ignore[reportArgumentType]
    return _Chunked.apply(hidden, targets, head)


def _of(head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return CrossEntropy.apply(head(hidden), targets)


class CrossEntropy(torch.autograd.Function):
    """Sum over positions of -log softmax(logits)[target], of logits (positions, vocabulary), in fp32; targets of -100 do not count.

    The library's writes the logits' size three times forward and three times back, this one each time once: the gradient,
    softmax(logits) less 1 at the target, is made where the probabilities lie. So it can be gone through backwards only once.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        probabilities = logits.float().softmax(-1)
        counted, wanted = targets != IGNORED, targets.clamp(min=0)
        likely = probabilities.gather(1, wanted[:, None])[:, 0]
        losses = -likely.log()
        rare = likely < _SMALLEST
        if rare.any():
            losses[rare] = functional.cross_entropy(logits[rare].float(), wanted[rare], reduction="none")
        ctx.save_for_backward(probabilities, wanted, counted)
        ctx.dtype = logits.dtype
        return losses[counted].sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        probabilities, wanted, counted = ctx.saved_tensors
        probabilities[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
        return probabilities.mul_((counted * gradients[0])[:, None]).to(ctx.dtype), None


class _Chunked(torch.autograd.Function):
    """Where the head is frozen, the gradient of the hidden states is found chunk by chunk on the way forward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
        total, found = hidden.new_zeros((), dtype=torch.float32), []
        for part, wanted in zip(hidden.split(head.chunk), targets.split(head.chunk), strict=True):
            with torch.enable_grad():
                alone = part.detach().requires_grad_()
                loss = _of(head, alone, wanted)
            found.append(torch.autograd.grad(loss, alone)[0])
            total += loss.detach()
        ctx.save_for_backward(torch.cat(found))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * gradients[0].to(of_hidden.dtype), None, None
