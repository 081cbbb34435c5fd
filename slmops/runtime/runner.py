"""What can every loaded model do, whatever runs it?

The measures (`evaluation`, `verification`, `benchmark`) are written against this Protocol only. Token ids go in and
come out; text is the business of `slmops.data`, so that PyTorch and a package are asked the very same question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy: the token of the largest logit, the lowest id of a tie."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Timing:
    """One timed generation: seconds from the prompt to its first new token, and of each further token."""

    first_token_seconds: float
    token_seconds: tuple[float, ...]


class Runner(Protocol):
    """A loaded model on some engine."""

    engine: str
    """`torch`, `genai`, `openvino` ..."""
    folder: Path
    max_length_tokens: int
    """The most tokens (prompt and answer) that a sequence may have."""
    threads: int

    def logits(self, rows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield for each row, in order, its float32 logits, shaped (tokens, vocabulary); position t predicts token t+1.

        Memory is bounded by a batch, not by the number of rows.
        """
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_token_ids: Sequence[int], batch_size: int = 32
    ) -> Iterator[list[int]]:
        """Yield for each prompt, in order, the greedy continuation, up to and without the first stop token."""
        ...

    def stream(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop_token_ids: Sequence[int], sampling: Sampling | None = None
    ) -> Iterator[int]:
        """Yield the tokens of one continuation as they come, without the stop token."""
        ...

    def time(self, prompt: Sequence[int], *, new_tokens: int) -> Timing:
        """Generate exactly `new_tokens` greedy tokens, stop tokens ignored, and time each."""
        ...

    def prepare(self) -> None:
        """Load now what `stream` and `time` need; without it they load at their first use."""
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...


class ExportRunner(Runner, Protocol):
    """An exported model on the engine that a device runs."""

    vocabulary: int

    def next_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the float32 logits of the token after `ids`, (vocabulary,), by the graph that ships."""
        ...

    def greedy_logits(self, ids: Sequence[int], count: int) -> Iterator[np.ndarray]:
        """Yield the logits after `ids`, then after the most likely token, and so on: `count` times (vocabulary,), by the graph that ships."""
        ...
