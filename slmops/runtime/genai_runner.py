"""How does an export run? Logits and batched answers straight from the graph, single answers by onnxruntime-genai.

What a device runs is onnxruntime-genai's Generator, so `stream` and `time` use it. `logits` and `generate` ask the same
graph through `slmops.runtime.decoder`, exactly and in batches; `verify` holds the two against each other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from slmops import environment
from slmops.errors import InvalidInput
from slmops.graph.rewriting import FULL
from slmops.runtime.asking import check_ids, check_length, in_order
from slmops.runtime.decoder import Cache, Decoder, greedy, pieces
from slmops.runtime.runner import Sampling, Timing
from slmops.runtime.sessions import ActiveAdapter, Sessions

_LOGITS_BYTES = 64 << 20  # of one piece of logits
_CACHE_BYTES = 256 << 20  # of the keys and values of one batch


class GenaiRunner:
    """An export, or any folder that onnxruntime-genai runs on the CPU; implements `Runner`.

    Args:
        folder: holds `genai_config.json`, the graph and its data.
        threads: of the operators.
        sessions: shared with other runners of the folder; None: its own.
        adapter: what is on while it runs; None: nothing, the base.

    Raises:
        BadArtifact: a file is missing or cannot be loaded.
        Unavailable: onnxruntime-genai is missing, or the folder is for another provider.
    """

    engine = "genai"

    def __init__(self, folder: Path, threads: int, *, sessions: Sessions | None = None, adapter: ActiveAdapter | None = None) -> None:
        self.folder, self.threads = folder, threads
        self._sessions = sessions or Sessions(folder, threads)
        self._shared = sessions is not None
        self._adapter = adapter
        self.config = self._sessions.config
        self.max_length_tokens, self.vocabulary = self._sessions.max_length_tokens, self._sessions.vocabulary
        self._main_name = self._sessions.filename(adapted=adapter is not None)

    def logits(self, rows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield the logits of each row: see `Runner`."""
        for row in rows:
            self._check(row, 0)
            if self._full is None:
                yield self._logits_by_token(row)
                continue
            cache = Cache(self._full, 1, len(row))
            logits = np.empty((len(row), self._full.vocabulary), np.float32)  # once: a long row of a large vocabulary is a gigabyte
            for start, end in pieces(len(row), self._piece_tokens):
                logits[start:end] = self._full.run(np.array([row[start:end]]), np.array([end]), cache.arrays)[0]
            yield logits

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_token_ids: Sequence[int], batch_size: int = 32
    ) -> Iterator[list[int]]:
        """Yield the greedy answer to each prompt: see `Runner`. Computed shortest first; given back in order."""
        for ids in prompts:
            self._check(ids, 1)
        batches = self._batches(prompts, max_new_tokens, batch_size)
        yield from in_order(self._batch(rows, prompts, max_new_tokens, frozenset(stop_token_ids)) for rows in batches)

    def stream(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop_token_ids: Sequence[int], sampling: Sampling | None = None
    ) -> Iterator[int]:
        """Yield one answer's tokens as they come: see `Runner`."""
        self._check(prompt, 1)
        chosen = sampling or Sampling()
        length = min(len(prompt) + max_new_tokens, self.max_length_tokens)
        options: dict[str, Any] = {"max_length": length, "do_sample": chosen.temperature > 0}
        if chosen.temperature > 0:
            options |= {"temperature": chosen.temperature, "top_p": chosen.top_p, "random_seed": chosen.seed}
            options["top_k"] = chosen.top_k or self.vocabulary
        generator = self._generator(options)
        generator.append_tokens(np.asarray(prompt, np.int32))
        for _ in range(length - len(prompt)):
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in stop_token_ids:
                return
            yield token
            if generator.is_done():
                return

    def time(self, prompt: Sequence[int], *, new_tokens: int) -> Timing:
        """Generate exactly `new_tokens` and time each: see `Runner`."""
        length = len(prompt) + new_tokens
        if length > self.max_length_tokens:
            raise InvalidInput(
                f"{len(prompt)} prompt and {new_tokens} new tokens do not fit the package's {self.max_length_tokens}",
                "give fewer --prompt-tokens or --new-tokens, or export with a larger --max-length-tokens",
            )
        generator = self._generator({"max_length": length, "min_length": length, "do_sample": False})
        ids = np.asarray(prompt, np.int32)
        start = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        first = last = time.perf_counter()
        steps = []
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
            now = time.perf_counter()
            steps.append(now - last)
            last = now
        return Timing(first - start, tuple(steps))

    @property
    def shipped(self) -> Decoder:
        """The graph that a device runs: `model.onnx`."""
        return self._decoder

    def next_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits of the token after `ids`, (vocabulary,), by the graph that ships."""
        self._check(ids, 0)
        return self._decoder.prefill(ids, Cache(self._decoder, 1, len(ids)).arrays, self._piece_tokens)

    def greedy_logits(self, ids: Sequence[int], count: int) -> Iterator[np.ndarray]:
        """Yield the logits after `ids`, then after each most likely token, by onnxruntime-genai: see `ExportRunner`."""
        self._check(ids, count)
        generator = self._generator({"max_length": len(ids) + count, "do_sample": False})
        part = list(ids)
        for _ in range(count):
            generator.append_tokens(np.asarray(part, np.int32))
            logits = np.array(generator.get_logits(), np.float32).reshape(-1, self.vocabulary)[-1]
            yield logits
            part = [int(greedy(logits))]

    @property
    def graph(self) -> str:
        """The file of the graph that runs."""
        return self._main_name

    def portable_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return what `next_logits` does, by the graph of onnxruntime's own operators, which every machine runs."""
        self._check(ids, 0)
        decoder = self._adapted(self._sessions.decoder(self._sessions.configured))
        return decoder.prefill(ids, Cache(decoder, 1, len(ids)).arrays, self._piece_tokens)

    def runtime_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return what `next_logits` does, of onnxruntime-genai's own Generator, which a device runs."""
        return next(self.greedy_logits(ids, 1))

    def prepare(self) -> None:
        """Load the model as a device does: see `Runner`."""
        _ = self._model

    def close(self) -> None:
        """Free the sessions, unless other runners share them."""
        for name in ("_decoder", "_full"):
            self.__dict__.pop(name, None)
        if not self._shared:
            self._sessions.close()

    @cached_property
    def _decoder(self) -> Decoder:
        return self._adapted(self._sessions.decoder(self._main_name))

    @cached_property
    def _full(self) -> Decoder | None:
        """The graph with all logits: the twin, or the main graph where it has them; None where neither has."""
        if (self.folder / FULL).is_file():
            return self._adapted(self._sessions.decoder(FULL))
        return None if self._decoder.last_only else self._decoder

    @property
    def _model(self) -> Any:
        return self._sessions.model(self._main_name)

    def _adapted(self, decoder: Decoder) -> Decoder:
        return decoder if self._adapter is None else decoder.with_adapter(self._adapter.tensors(packed=decoder.takes_packed))

    @property
    def _piece_tokens(self) -> int:
        return max(3, _LOGITS_BYTES // (4 * self.vocabulary))

    def _generator(self, options: dict[str, Any]) -> Any:
        og = environment.require("onnxruntime_genai", "to run a package")
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(**options)
        generator = og.Generator(self._model, parameters)
        if (
            self._adapter is not None
        ):  # before the prompt: afterwards the runtime takes it without a word, and the cache holds the base's values
            self._adapter.activate(generator, self._model)
        return generator

    def _logits_by_token(self, row: Sequence[int]) -> np.ndarray:
        """Teacher-force a graph that gives the last token's logits only, a token at a time."""
        cache = Cache(self._decoder, 1, len(row))
        steps = [self._decoder.run(np.array([[token]]), np.array([i + 1]), cache.arrays)[0] for i, token in enumerate(row)]
        return np.concatenate(steps)

    def _batch(
        self, chosen: Sequence[int], prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: frozenset[int]
    ) -> dict[int, list[int]]:
        """Answer some prompts: each is prefilled alone, then they step together, and finished rows leave the batch."""
        rows = np.array(chosen)
        lengths = np.array([len(prompts[i]) for i in rows])
        # A row ends where the package's length does, whatever stands beside it.
        room = self.max_length_tokens - lengths
        cache = Cache(self._decoder, len(rows), min(int(lengths.max()) + max_new_tokens, self.max_length_tokens))
        tokens = greedy(np.stack([self._decoder.prefill(prompts[i], cache.row(k), self._piece_tokens) for k, i in enumerate(rows)]))
        answers: dict[int, list[int]] = {i: [] for i in chosen}
        alive = np.ones(len(rows), bool)
        for count in range(1, max_new_tokens + 1):
            for k in np.flatnonzero(alive):
                alive[k] = int(tokens[k]) not in stops
                if alive[k]:
                    answers[int(rows[k])].append(int(tokens[k]))
                    alive[k] = count < room[k]
            if count == max_new_tokens or not alive.any():
                break
            if alive.sum() <= 0.75 * len(rows):  # a finished row costs as much as any other
                keep = np.flatnonzero(alive)
                cache.keep(keep)
                rows, lengths, tokens, alive, room = rows[keep], lengths[keep], tokens[keep], alive[keep], room[keep]
            ends = np.minimum(lengths + count, self.max_length_tokens)  # a finished row still in the batch writes over its own end
            tokens = greedy(self._decoder.run(tokens[:, None], ends, cache.arrays)[:, -1])
        return answers

    def _batches(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int) -> Iterator[list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        while order:
            rows = order[: self._fitting(order, prompts, max_new_tokens, batch_size)]
            order = order[len(rows) :]
            yield rows

    def _fitting(self, order: list[int], prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int) -> int:
        """Return how many of the next rows (sorted by length) fit one batch's cache."""
        per_token = sum(heads * size * np.dtype(dtype).itemsize for heads, size, dtype in self._decoder.cache_shapes)
        count = 0
        for i in order[:batch_size]:
            if count and (count + 1) * (len(prompts[i]) + max_new_tokens) * per_token > _CACHE_BYTES:
                break
            count += 1
        return count

    def _check(self, ids: Sequence[int], new_tokens: int) -> None:
        check_length(len(ids), new_tokens, self.max_length_tokens)
        check_ids(ids, self.vocabulary)
