"""How does text go into a model and come out? The part of a fine-tune that is not weights, and that must travel with it.

An `Interface` is decided once, when a model is fine-tuned, and kept in the manifest of every artefact after it. With
it, the ids of a row are the same in training, in PyTorch, and on a device that has only the `tokenizers` library.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Interface(BaseModel):
    """Templates, BOS rule, stop tokens and length of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    prompt_template: str | None = None
    """Template over the columns of a row; None: the row's own format (chat, prompt and completion, plain text)."""
    completion_template: str | None = None
    chat_template: str | None = None
    """Jinja source of the tokenizer's chat template; None where it has none."""
    train_on: Literal["completion", "all"] = "completion"
    bos_token_id: int | None = None
    """Put before every sequence; None: nothing is. A chat template writes its own BOS, or none."""
    stop_token_ids: tuple[int, ...] = ()
    """Each ends an answer. The first is the one that training appends to a completion."""
    stop_reason: str = ""
    """Why these stop tokens, in one line."""
    max_length_tokens: int = 1024
    """Longest sequence, prompt and answer together."""
