"""How does an OpenVINO export run? Logits and batched answers by infer requests, single answers by openvino-genai.

What a device runs is openvino-genai's LLMPipeline, so `stream` and `time` use it. `logits` and `generate` ask the same IR
through OpenVINO's own infer requests, which give the logits of every token; `verify` holds the two against each other.

The keys and values are state of a request (`ReadValue`, `Assign`): a reset forgets them, and `beam_idx` says which row of the
last step each row goes on with, so rows that are done leave a batch (optimum-intel 2.2, `exporters/openvino/stateful.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import numpy as np

from slmops import environment
from slmops.errors import BadArtifact, InvalidInput, RunFailed, Unavailable
from slmops.graph.ir import MODEL, read_ir, reason
from slmops.runtime.asking import check_ids, check_length, in_order
from slmops.runtime.decoder import greedy, pieces
from slmops.runtime.openvino_folder import device_of, length_of, properties_of
from slmops.runtime.runner import Sampling, Timing

_LOGITS_BYTES = 64 << 20  # of one piece of logits


class OpenvinoRunner:
    """An export that OpenVINO runs; implements `Runner`.

    Args:
        folder: holds `openvino_model.xml`, its weights and `generation_config.json`.
        threads: of the operators, on a CPU.

    Raises:
        BadArtifact: a file is missing or cannot be read.
        Unavailable: openvino is missing, or the device that the IR was made for.
    """

    engine = "openvino"

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self._openvino = environment.require("openvino", "to run an OpenVINO export")
        self._ir = read_ir(folder / MODEL)
        self.device, self.max_length_tokens = device_of(self._ir), length_of(folder)
        self.vocabulary = int(self._ir.output("logits").get_partial_shape()[2].get_length())
        self._inputs = {name for port in self._ir.inputs for name in port.get_names()}

    @property
    def is_here(self) -> bool:
        """OpenVINO finds the device on this machine."""
        return any(name.split(".")[0] == self.device for name in self._openvino.Core().available_devices)

    def logits(self, rows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield the logits of each row: see `Runner`. Each row runs alone, so nothing is padded."""
        for row in rows:
            self._check(row, 0)
            logits = np.empty((len(row), self.vocabulary), np.float32)
            for start, end in pieces(len(row), max(3, _LOGITS_BYTES // (4 * self.vocabulary))):
                logits[start:end] = self._run(np.array([row[start:end]]), end, None)[0]
            yield logits

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_token_ids: Sequence[int], batch_size: int = 32
    ) -> Iterator[list[int]]:
        """Yield the greedy answer to each prompt: see `Runner`. Prompts of one length run together, so nothing is padded."""
        by_length: dict[int, list[int]] = {}
        for i, ids in enumerate(prompts):
            self._check(ids, 1)
            by_length.setdefault(len(ids), []).append(i)
        batches = (same[at : at + batch_size] for _, same in sorted(by_length.items()) for at in range(0, len(same), batch_size))
        yield from in_order(self._batch(rows, prompts, max_new_tokens, frozenset(stop_token_ids)) for rows in batches)

    def stream(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop_token_ids: Sequence[int], sampling: Sampling | None = None
    ) -> Iterator[int]:
        """Yield one answer's tokens as they come: see `Runner`."""
        self._check(prompt, 1)
        chosen = sampling or Sampling()
        config = self._generation(min(max_new_tokens, self.max_length_tokens - len(prompt)))
        config.stop_token_ids = {int(token) for token in stop_token_ids}
        if chosen.temperature > 0:
            config.do_sample, config.temperature, config.top_p, config.rng_seed = True, chosen.temperature, chosen.top_p, chosen.seed
            config.top_k = chosen.top_k or self.vocabulary
        with self._tokens(prompt, config) as tokens:
            for token in tokens:
                if token in config.stop_token_ids:
                    return
                yield token

    def time(self, prompt: Sequence[int], *, new_tokens: int) -> Timing:
        """Generate exactly `new_tokens` and time each: see `Runner`."""
        if len(prompt) + new_tokens > self.max_length_tokens:
            raise InvalidInput(
                f"{len(prompt)} prompt and {new_tokens} new tokens do not fit the package's {self.max_length_tokens}",
                "give fewer --prompt-tokens or --new-tokens, or export with a larger --max-length-tokens",
            )
        config = self._generation(new_tokens)
        config.ignore_eos, config.min_new_tokens = True, new_tokens
        marks: list[float] = []
        streamer = self._streamer(lambda tokens: marks.extend([time.perf_counter()] * len(tokens)))
        ids = self._tensor(prompt)
        _ = self._pipeline
        start = time.perf_counter()
        self._ask(ids, config, streamer)
        if len(marks) != new_tokens:
            raise RunFailed(f"openvino-genai gave {len(marks)} tokens, and {new_tokens} were asked for", "measure with fewer --new-tokens")
        return Timing(marks[0] - start, tuple(float(seconds) for seconds in np.diff(marks)))

    def next_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits of the token after `ids`, (vocabulary,)."""
        return next(self.logits([ids]))[-1]

    def greedy_logits(self, ids: Sequence[int], count: int) -> Iterator[np.ndarray]:
        """Yield the logits after `ids`, then after each most likely token: see `ExportRunner`."""
        row = list(ids)
        for _ in range(count):
            logits = self.next_logits(row)
            yield logits
            row.append(int(greedy(logits)))

    def prepare(self) -> None:
        """Load the model as a device does: see `Runner`."""
        _ = self._pipeline

    def close(self) -> None:
        """Free the model."""
        for name in ("_request", "_pipeline", "_ir"):
            self.__dict__.pop(name, None)

    @cached_property
    def _request(self) -> Any:
        """An infer request of OpenVINO's own, with the state of one batch."""
        try:
            return self._openvino.Core().compile_model(self._ir, self.device, self._properties()).create_infer_request()
        except RuntimeError as error:
            raise self._refused(error) from error

    @cached_property
    def _pipeline(self) -> Any:
        """The model as openvino-genai loads it; token ids go in, so it needs no tokenizer."""
        genai = environment.require("openvino_genai", "to run an OpenVINO export as a device does")
        properties = self._properties()
        if self.device != "NPU":
            # Left alone, the pipeline keeps the prompts that it has seen, and a prompt timed twice costs a sixth of itself.
            properties["scheduler_config"] = genai.SchedulerConfig()
            properties["scheduler_config"].enable_prefix_caching = False
        try:
            return genai.LLMPipeline(str(self.folder), self.device, **properties)
        except RuntimeError as error:
            raise self._refused(error) from error

    def _properties(self) -> dict[str, Any]:
        """Return what the device is told beside what the IR says itself (`runtime_options`)."""
        return {**properties_of(self._ir), **({"INFERENCE_NUM_THREADS": self.threads} if self.device == "CPU" else {})}

    def _refused(self, error: RuntimeError) -> Unavailable | BadArtifact:
        if not self.is_here:
            found = self._openvino.Core().available_devices
            return Unavailable(
                f"{self.folder} is for OpenVINO's {self.device}, and this machine has {' and '.join(found) or 'no device'} only",
                f"run it where OpenVINO finds a {self.device} (its driver installed), or export for this machine with --device cpu --provider openvino",
            )
        return BadArtifact(f"OpenVINO cannot load {self.folder} on {self.device}: {reason(error)}", "export the model again")

    def _run(self, ids: np.ndarray, end: int, kept: np.ndarray | None) -> np.ndarray:
        """Run new tokens of a batch; return their logits (rows, tokens, vocabulary), valid until the next run.

        Args:
            ids: (rows, tokens), new ones.
            end: length of each row with them.
            kept: for each row, which row of the last step it goes on with; None: itself, or a new batch.
        """
        (rows, tokens), request = ids.shape, self._request
        if end == tokens:
            request.reset_state()
        given = {
            "input_ids": np.ascontiguousarray(ids, np.int64),
            "attention_mask": np.ones((rows, end), np.int64),
            "position_ids": np.tile(np.arange(end - tokens, end, dtype=np.int64), (rows, 1)),
            "beam_idx": np.arange(rows, dtype=np.int32) if kept is None else kept.astype(np.int32),
        }
        try:
            request.infer({name: array for name, array in given.items() if name in self._inputs})
        except RuntimeError as error:
            raise RunFailed(f"the model failed: {reason(error)}", "export the model again; `slmops verify` names the stage") from error
        return request.get_tensor("logits").data

    def _batch(
        self, chosen: Sequence[int], prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: frozenset[int]
    ) -> dict[int, list[int]]:
        """Answer prompts of one length together; rows that are done leave the batch."""
        rows = np.array(chosen)
        end = len(prompts[chosen[0]])
        answers: dict[int, list[int]] = {i: [] for i in chosen}
        tokens = greedy(self._run(np.array([prompts[i] for i in rows]), end, None)[:, -1])
        for count in range(1, min(max_new_tokens, self.max_length_tokens - end) + 1):
            kept = np.array([k for k, token in enumerate(tokens) if int(token) not in stops], int)
            rows, tokens = rows[kept], tokens[kept]
            for i, token in zip(rows, tokens, strict=True):
                answers[int(i)].append(int(token))
            if not len(rows) or count == min(max_new_tokens, self.max_length_tokens - end):
                break
            tokens = greedy(self._run(tokens[:, None], end + count, kept)[:, -1])
        return answers

    def _generation(self, new_tokens: int) -> Any:
        """Return a greedy config of openvino-genai's, with nothing of the folder's `generation_config.json`."""
        config = environment.require("openvino_genai", "to run an OpenVINO export as a device does").GenerationConfig()
        config.max_new_tokens, config.do_sample = new_tokens, False
        return config

    @contextmanager
    def _tokens(self, prompt: Sequence[int], config: Any) -> Iterator[Iterator[int]]:
        """Generate in a thread; give its tokens as they come, and end it when nobody wants more."""
        queue: SimpleQueue[int | BaseException | None] = SimpleQueue()
        unwanted = Event()
        ids, _ = self._tensor(prompt), self._pipeline

        def put(tokens: Sequence[int]) -> bool:
            for token in tokens:
                queue.put(token)
            return unwanted.is_set()

        def answer() -> None:
            try:
                self._ask(ids, config, self._streamer(put))
                queue.put(None)
            except BaseException as error:  # noqa: BLE001  raised again where the tokens are taken
                queue.put(error)

        def taken() -> Iterator[int]:
            while (item := queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item

        thread = Thread(target=answer, name="openvino-genai")
        thread.start()
        try:
            yield taken()
        finally:
            unwanted.set()
            thread.join()

    def _streamer(self, take: Any) -> Any:
        """Return a streamer that gives new tokens to `take`, and stops where that says true."""
        genai = environment.require("openvino_genai", "to run an OpenVINO export as a device does")

        class Streamer(genai.StreamerBase):
            def write(self, tokens: int | Sequence[int]) -> Any:
                stop = take([tokens] if isinstance(tokens, int) else list(tokens))
                return genai.StreamingStatus.CANCEL if stop else genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        return Streamer()

    def _ask(self, ids: Any, config: Any, streamer: Any) -> None:
        try:
            self._pipeline.generate(ids, config, streamer)
        except RuntimeError as error:
            raise RunFailed(f"openvino-genai failed: {reason(error)}", "export the model again; `slmops verify` names the stage") from error

    def _tensor(self, ids: Sequence[int]) -> Any:
        return self._openvino.Tensor(np.array([ids], np.int64))

    def _check(self, ids: Sequence[int], new_tokens: int) -> None:
        check_length(len(ids), new_tokens, self.max_length_tokens)
        check_ids(ids, self.vocabulary)
