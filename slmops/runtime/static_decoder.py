"""How is a graph of fixed shapes asked: a prompt in padded pieces, then one token a run, with a cache of fixed length?

Two graphs (`slmops.graph.static`): `prefill.onnx` takes T tokens, `decode.onnx` takes one. Both write into one cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from slmops.errors import RunFailed, Unavailable

PREFILL, DECODE, PORTABLE = "prefill.onnx", "decode.onnx", "portable"
PAST_LENGTH, TOTAL_LENGTH = "past_seq_len", "total_seq_len"
Cache = dict[str, np.ndarray]
"""Past keys and values by the name of the graph's input, each (1, heads, capacity, head size)."""


class StaticDecoder:
    """The two graphs of an export, opened when they are first needed.

    Args:
        opened: gives the session of a graph by its file name.
        pad_token_id: what fills a piece of a prompt.
    """

    def __init__(self, opened: Callable[[str], Any], pad_token_id: int) -> None:
        self._opened, self._pad = opened, pad_token_id
        self._sessions: dict[str, Any] = {}

    @property
    def tokens(self) -> int:
        """Tokens of a run of the prefill graph."""
        return int(self._inputs(PREFILL)["input_ids"].shape[1])

    def empty(self) -> Cache:
        """Return an empty cache."""
        inputs = self._inputs(PREFILL)
        return {name: np.zeros(value.shape, np.float32) for name, value in inputs.items() if name.startswith("past_key_values.")}

    def prefill(self, ids: Sequence[int], cache: Cache) -> tuple[np.ndarray, Cache]:
        """Put a whole prompt into an empty cache; return the logits of all its tokens, (tokens, vocabulary), and the cache."""
        rows, size = [], self.tokens
        for start in range(0, len(ids), size):
            piece = ids[start : start + size]
            padded = [*piece, *[self._pad] * (size - len(piece))]
            logits, cache = self._run(PREFILL, padded, start + size - 1, cache)
            rows.append(logits[: len(piece)])
        return np.concatenate(rows), cache

    def step(self, token: int, position: int, cache: Cache) -> tuple[np.ndarray, Cache]:
        """Add one token at a position; return the logits of the next, (vocabulary,), and the cache."""
        logits, cache = self._run(DECODE, [token], position, cache)
        return logits[0], cache

    def load(self) -> None:
        """Open both graphs."""
        self._inputs(PREFILL)
        self._inputs(DECODE)

    def close(self) -> None:
        """Free the sessions."""
        self._sessions.clear()

    def _run(self, name: str, ids: Sequence[int], last: int, cache: Cache) -> tuple[np.ndarray, Cache]:
        """Run a graph whose last token stands at a position."""
        inputs = self._inputs(name)
        capacity = next(iter(cache.values())).shape[2]
        feeds = {**cache, "input_ids": np.array([ids], np.int32), PAST_LENGTH: np.array([[last]], np.int32)}
        feeds[TOTAL_LENGTH] = np.array([capacity], np.int32)
        session = self._sessions[name]
        names = [value.name for value in session.get_outputs()]
        try:
            outputs = session.run(names, {key: value for key, value in feeds.items() if key in inputs})
        except Exception as error:  # the binding's own classes derive from Exception alone
            if not isinstance(error, RuntimeError) and not type(error).__module__.startswith("onnxruntime"):
                raise
            raise RunFailed(f"{name} failed: {str(error).splitlines()[0][:300]}", "export the model again") from error
        found = dict(zip(names, outputs, strict=True))
        logits = found.pop("logits")[0].astype(np.float32, copy=False)
        return logits, {key.replace("present.", "past_key_values.", 1): value for key, value in found.items()}

    def _inputs(self, name: str) -> dict[str, Any]:
        if name not in self._sessions:
            self._sessions[name] = self._opened(name)
        inputs = {value.name: value for value in self._sessions[name].get_inputs()}
        dynamic = [key for key, value in inputs.items() if not all(isinstance(size, int) for size in value.shape)]
        if dynamic or "input_ids" not in inputs or PAST_LENGTH not in inputs:
            what = f"its {dynamic[0]} has no fixed shape" if dynamic else f"it takes no {PAST_LENGTH}"
            raise Unavailable(f"{name} is not a graph of fixed shapes: {what}", "export the model again with --device npu --provider qnn")
        return inputs
