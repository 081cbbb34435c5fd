"""How does an export for a Qualcomm NPU run? Its compiled graphs by the plugin, or, without it, the plain graphs on the CPU.

On which of them an answer rests is in `ran_on`: nothing here claims an NPU that was not there. A file whose weights are
stored once for both graphs ends the process of a machine without an NPU (onnxruntime-qnn 2.7 on x86-64), so there the plain
graphs are compiled anew, in memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slmops import artifact, socs
from slmops.errors import BadArtifact, Unavailable
from slmops.runtime import qnn_plugin
from slmops.runtime.asking import LONGER_EXPORT, check_ids
from slmops.runtime.decoder import greedy
from slmops.runtime.runner import Sampling, Timing
from slmops.runtime.static_decoder import PORTABLE, StaticDecoder

Way = Literal["compiled", "compiled anew", "plain"]


class StaticRunner:
    """An export of fixed shapes; implements `Runner`.

    Args:
        folder: of `slmops export --device npu --provider qnn`.
        threads: of what runs on the CPU.
        way: `compiled`: the files that ship; `compiled anew`: the plain graphs, compiled in memory; `plain`: those on
            onnxruntime's CPU provider. None: the first of them that this machine can do.
        facts: of its manifest; None: read there.

    Raises:
        BadArtifact: a file is missing or cannot be loaded.
        Unavailable: the plugin is needed and not installed.
    """

    engine = "qnn"

    def __init__(self, folder: Path, threads: int, *, way: Way | None = None, facts: dict[str, Any] | None = None) -> None:
        self.folder, self.threads = folder, threads
        self._facts = artifact.load(folder, kinds=("export",)).manifest.facts if facts is None else facts
        try:
            config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
            self.max_length_tokens, self.vocabulary = int(config["search"]["max_length"]), int(config["model"]["vocab_size"])
            pad = int(config["model"]["pad_token_id"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadArtifact(f"{folder} has no genai_config.json that can be used: {error!r}", "export the model again") from error
        self.way: Way = way or self._usual_way()
        self.decoder = StaticDecoder(self._open, pad)

    @property
    def on_npu(self) -> bool:
        """The compiled files run on an NPU."""
        return self.way == "compiled" and qnn_plugin.has_npu()

    @cached_property
    def ran_on(self) -> str:
        """What computed, in words."""
        if self.way == "plain":
            return "onnxruntime's CPU provider, on the plain graphs: not the compiled files, and no NPU"
        what = "the compiled files" if self.way == "compiled" else "the plain graphs, compiled anew in memory"
        return f"{what}, on {qnn_plugin.place()}"

    def logits(self, rows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield the logits of each row: see `Runner`."""
        for row in rows:
            self._check(row, 0)
            yield self.decoder.prefill(row, self.decoder.empty())[0]

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_token_ids: Sequence[int], batch_size: int = 32
    ) -> Iterator[list[int]]:
        """Yield the greedy answer to each prompt, one after the other: see `Runner`. A graph of fixed shapes has one row."""
        for ids in prompts:
            yield list(self.stream(ids, max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids))

    def stream(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop_token_ids: Sequence[int], sampling: Sampling | None = None
    ) -> Iterator[int]:
        """Yield one answer's tokens as they come: see `Runner`."""
        self._check(prompt, 1)
        chosen = sampling or Sampling()
        random = np.random.default_rng(chosen.seed)
        logits, cache = self.decoder.prefill(prompt, self.decoder.empty())
        row, count = logits[-1], min(max_new_tokens, self.max_length_tokens - len(prompt))
        for number in range(count):
            token = choose(row, chosen, random)
            if token in stop_token_ids:
                return
            yield token
            if number + 1 < count:
                row, cache = self.decoder.step(token, len(prompt) + number, cache)

    def time(self, prompt: Sequence[int], *, new_tokens: int) -> Timing:
        """Generate exactly `new_tokens` and time each: see `Runner`."""
        if len(prompt) + new_tokens > self.max_length_tokens:
            raise self._too_long(f"{len(prompt)} prompt and {new_tokens} new tokens do not fit")
        start = time.perf_counter()
        logits, cache = self.decoder.prefill(prompt, self.decoder.empty())
        token = int(greedy(logits[-1:])[0])
        first = last = time.perf_counter()
        steps = []
        for number in range(new_tokens - 1):
            row, cache = self.decoder.step(token, len(prompt) + number, cache)
            token = int(greedy(row[None])[0])
            now = time.perf_counter()
            steps.append(now - last)
            last = now
        return Timing(first - start, tuple(steps))

    def next_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits of the token after `ids`, (vocabulary,)."""
        return next(self.logits([ids]))[-1]

    def greedy_logits(self, ids: Sequence[int], count: int) -> Iterator[np.ndarray]:
        """Yield the logits after `ids`, then after each most likely token, by the decode graph: see `ExportRunner`."""
        self._check(ids, count)
        logits, cache = self.decoder.prefill(ids, self.decoder.empty())
        last = logits[-1]
        yield last
        for number in range(count - 1):
            last, cache = self.decoder.step(int(greedy(last)), len(ids) + number, cache)
            yield last

    def prepare(self) -> None:
        """Load both graphs: see `Runner`."""
        self.decoder.load()

    def close(self) -> None:
        """Free the sessions."""
        self.decoder.close()

    def _usual_way(self) -> Way:
        if not qnn_plugin.installed():
            return "plain"
        return "compiled anew" if self._facts.get("weights_once") and not qnn_plugin.has_npu() else "compiled"

    def _open(self, name: str) -> Any:
        plain = self.folder / PORTABLE / name
        if self.way == "plain":
            return qnn_plugin.open_on_cpu(plain, self.threads)
        soc = socs.find(self._facts.get("soc", {}).get("name"))
        return qnn_plugin.open_session(plain if self.way == "compiled anew" else self.folder / name, soc, self.threads)

    def _check(self, ids: Sequence[int], new_tokens: int) -> None:
        if len(ids) + new_tokens > self.max_length_tokens:
            raise self._too_long(f"a prompt of {len(ids)} tokens does not fit")
        check_ids(ids, self.vocabulary)

    def _too_long(self, what: str) -> Unavailable:
        return Unavailable(
            f"{what} the package's cache, which holds {self.max_length_tokens} tokens and cannot grow",
            LONGER_EXPORT,
        )


def choose(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """Return the next token: greedy at temperature 0, else drawn from the top_k most likely and of those from the top_p share.

    Args:
        logits: (vocabulary,).
        sampling: how to choose.
        random: where draws come from.
    """
    if sampling.temperature <= 0:
        return int(greedy(logits[None])[0])
    order = np.argsort(-logits, kind="stable")[: sampling.top_k or len(logits)]
    scaled = logits[order].astype(np.float64) / sampling.temperature
    shares = np.exp(scaled - scaled[0])
    shares /= shares.sum()
    kept = order[: int(np.searchsorted(np.cumsum(shares), sampling.top_p)) + 1]
    shares = shares[: len(kept)]
    return int(random.choice(kept, p=shares / shares.sum()))
