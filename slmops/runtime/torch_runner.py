"""How does the PyTorch model run, as the reference that a package is held against?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops import environment
from slmops.errors import InvalidInput, RunFailed
from slmops.runtime.asking import in_order
from slmops.runtime.runner import Sampling, Timing

if TYPE_CHECKING:
    from torch import Tensor, nn

_LOGITS_BYTES = 128 << 20  # of the logits that are held at once


class TorchRunner:
    """A transformers model in memory; implements `Runner`.

    Args:
        model: a causal language model, base and adapter or merged, in eval mode.
        folder: where it came from.
        threads: of torch, for the whole process.
        max_length_tokens: longest sequence; None: the model's positions.
    """

    engine = "torch"

    def __init__(self, model: nn.Module, folder: Path, threads: int, max_length_tokens: int | None = None) -> None:
        torch = environment.require("torch", "to run a PyTorch model")
        torch.set_num_threads(threads)
        self.model, self.folder, self.threads = model.eval(), folder, threads
        details: Any = model.config
        self.vocabulary = int(details.vocab_size)
        # Learned positions before the text (prompt methods) take some of the model's.
        positions = int(getattr(details, "max_position_embeddings", 0) or 2048) - int(getattr(model, "virtual_tokens", 0))
        self.max_length_tokens = max_length_tokens or positions

    def logits(self, rows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield the logits of each row: see `Runner`. Rows of one length run together, so nothing is padded."""
        torch = environment.require("torch", "to run a PyTorch model")
        for start, end in self._windows(rows):
            some, done = rows[start:end], {}
            for batch in self._equal_lengths(some, 1 << 30):
                with torch.inference_mode():
                    out = self.model(input_ids=torch.tensor([list(some[i]) for i in batch]), use_cache=False).logits.float().numpy()
                done |= {i: out[k] for k, i in enumerate(batch)}
            yield from (done[i] for i in range(len(some)))

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_token_ids: Sequence[int], batch_size: int = 32
    ) -> Iterator[list[int]]:
        """Yield the greedy answer to each prompt: see `Runner`. Prompts of one length run together, with the KV cache."""
        stops = frozenset(stop_token_ids)
        batches = self._equal_lengths(prompts, 1 << 30, batch_size)
        yield from in_order(self._batch(batch, prompts, max_new_tokens, stops) for batch in batches)

    def stream(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop_token_ids: Sequence[int], sampling: Sampling | None = None
    ) -> Iterator[int]:
        """Yield one answer's tokens as they come: see `Runner`."""
        torch = environment.require("torch", "to run a PyTorch model")
        chosen = sampling or Sampling()
        generator = torch.Generator().manual_seed(chosen.seed)
        ids, cache = torch.tensor([list(prompt)]), None
        for _ in range(max_new_tokens):
            logits, cache = self._step(ids, cache)
            token = _choose(logits[0], chosen, generator)
            if token in stop_token_ids:
                return
            yield token
            ids = torch.tensor([[token]])

    def time(self, prompt: Sequence[int], *, new_tokens: int) -> Timing:
        """Generate exactly `new_tokens` and time each: see `Runner`."""
        torch = environment.require("torch", "to run a PyTorch model")
        ids, cache = torch.tensor([list(prompt)]), None
        marks = [time.perf_counter()]
        for _ in range(new_tokens):
            logits, cache = self._step(ids, cache)
            ids = logits.argmax(-1, keepdim=True)
            marks.append(time.perf_counter())
        seconds = np.diff(marks)
        return Timing(float(seconds[0]), tuple(float(x) for x in seconds[1:]))

    def prepare(self) -> None:
        """Do nothing, the model is in memory: see `Runner`."""

    def close(self) -> None:
        """Free the model."""
        self.__dict__.pop("model", None)

    def _step(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Run new tokens; return the last one's logits (rows, vocabulary) and the cache."""
        torch = environment.require("torch", "to run a PyTorch model")
        with torch.inference_mode():
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float(), out.past_key_values

    def _batch(
        self, batch: list[int], prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: frozenset[int]
    ) -> dict[int, list[int]]:
        torch = environment.require("torch", "to run a PyTorch model")
        room = min(max_new_tokens, self.max_length_tokens - len(prompts[batch[0]]))
        answers: dict[int, list[int]] = {i: [] for i in batch}
        alive = set(batch)
        ids, cache = torch.tensor([list(prompts[i]) for i in batch]), None
        for _ in range(room):
            logits, cache = self._step(ids, cache)
            if not bool(torch.isfinite(logits).all()):
                raise RunFailed(f"{self.folder} gives logits that are not finite", "its weights are damaged, or its training diverged")
            ids = logits.argmax(-1, keepdim=True)
            for i, token in zip(batch, ids[:, 0].tolist(), strict=True):
                if i in alive and token not in stops:
                    answers[i].append(token)
                else:
                    alive.discard(i)
            if not alive:
                break
        return answers

    def _windows(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
        """Cut the rows, in order, into runs whose logits are at most `_LOGITS_BYTES`, or one row."""
        start, tokens = 0, 0
        for i, row in enumerate(rows):
            if i > start and 4 * self.vocabulary * (tokens + len(row)) > _LOGITS_BYTES:
                yield start, i
                start, tokens = i, 0
            tokens += len(row)
        if len(rows) > start:
            yield start, len(rows)

    def _equal_lengths(self, rows: Sequence[Sequence[int]], tokens: int, batch_size: int = 64) -> Iterator[list[int]]:
        """Yield batches of row numbers of one length, at most `batch_size` rows and about `tokens` tokens each."""
        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            if not 0 < len(row) <= self.max_length_tokens:
                raise InvalidInput(f"a row has {len(row)} tokens, and the model takes 1 to {self.max_length_tokens}", "shorten it")
            by_length.setdefault(len(row), []).append(i)
        for length, numbers in sorted(by_length.items()):
            size = max(1, min(batch_size, tokens // length))
            yield from (numbers[at : at + size] for at in range(0, len(numbers), size))


def _choose(logits: Tensor, sampling: Sampling, generator: Any) -> int:
    torch = environment.require("torch", "to run a PyTorch model")
    if sampling.temperature <= 0:
        return int(logits.argmax())
    values, order = (logits / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    kept = values.cumsum(0) - values < sampling.top_p
    if sampling.top_k:
        kept &= torch.arange(len(values)) < sampling.top_k
    return int(order[torch.multinomial(values * kept, 1, generator=generator)])
