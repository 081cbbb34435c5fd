"""How is a graph of fixed shapes asked: a prompt in padded pieces, then one token a run, with a cache of fixed length?

Two graphs (`slmops.graph.static`): `prefill.onnx` takes T tokens, `decode.onnx` takes one. Both write into one cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slmops.errors import RunFailed, Unavailable
from slmops.graph.static import PAST_LENGTH, TOTAL_LENGTH

PREFILL, DECODE, PORTABLE = "prefill.onnx", "decode.onnx", "portable"
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
        self._graphs: dict[str, _Graph] = {}

    @property
    def tokens(self) -> int:
        """Tokens of a run of the prefill graph."""
        return int(self._graph(PREFILL).inputs["input_ids"][1])

    def empty(self) -> Cache:
        """Return an empty cache."""
        inputs = self._graph(PREFILL).inputs
        return {name: np.zeros(shape, np.float32) for name, shape in inputs.items() if name.startswith("past_key_values.")}

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
        self._graph(PREFILL)
        self._graph(DECODE)

    def close(self) -> None:
        """Free the sessions."""
        self._graphs.clear()

    def _run(self, name: str, ids: Sequence[int], last: int, cache: Cache) -> tuple[np.ndarray, Cache]:
        """Run a graph whose last token stands at a position."""
        graph = self._graph(name)
        capacity = next(iter(cache.values())).shape[2]
        feeds = {**cache, "input_ids": np.array([ids], np.int32), PAST_LENGTH: np.array([[last]], np.int32)}
        feeds[TOTAL_LENGTH] = np.array([capacity], np.int32)
        try:
            outputs = graph.session.run(graph.outputs, {key: value for key, value in feeds.items() if key in graph.inputs})
        except Exception as error:  # the binding's own classes derive from Exception alone
            if not isinstance(error, RuntimeError) and not type(error).__module__.startswith("onnxruntime"):
                raise
            raise RunFailed(f"{name} failed: {str(error).splitlines()[0][:300]}", "export the model again") from error
        found = dict(zip(graph.outputs, outputs, strict=True))
        logits = found.pop("logits")[0].astype(np.float32, copy=False)
        return logits, {key.replace("present.", "past_key_values.", 1): value for key, value in found.items()}

    def _graph(self, name: str) -> _Graph:
        if name not in self._graphs:
            self._graphs[name] = _graph_of(name, self._opened(name))
        return self._graphs[name]


@dataclass(frozen=True)
class _Graph:
    """A graph that is open, with what it takes and gives: asked once, not at every token."""

    session: Any
    inputs: dict[str, list[int]]
    """Name -> shape."""
    outputs: list[str]


def _graph_of(name: str, session: Any) -> _Graph:
    inputs = {value.name: value.shape for value in session.get_inputs()}
    dynamic = [key for key, shape in inputs.items() if not all(isinstance(size, int) for size in shape)]
    if dynamic or "input_ids" not in inputs or PAST_LENGTH not in inputs:
        what = f"its {dynamic[0]} has no fixed shape" if dynamic else f"it takes no {PAST_LENGTH}"
        raise Unavailable(f"{name} is not a graph of fixed shapes: {what}", "export the model again with --device npu --provider qnn")
    return _Graph(session, inputs, [value.name for value in session.get_outputs()])
