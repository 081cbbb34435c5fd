"""One side of a benchmark: a process that loads one model and does what it is told over a pipe, and nothing else.

Run as `python -m slmops.benchmark.worker`. Requests are JSON lines on stdin, {"do": NAME, ...}; each is answered by one
line on stdout: {"reply": ...}, or {"error": ...}. Lines {"progress": N} may come before. Whatever libraries print goes
to stderr. Token ids go in and figures come out: this process never sees text.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from slmops import environment, results
from slmops.data import Encoded
from slmops.errors import SlmopsError
from slmops.evaluation.losses import surprise, token_losses
from slmops.runtime.engines import engine_of, weights_bytes
from slmops.runtime.loading import kind_of, open_runner, parse_selection
from slmops.runtime.runner import Runner

_PR_SET_PDEATHSIG, _SIGKILL = 1, 9


class Worker:
    """The model of this process, and what can be asked of it."""

    def __init__(self, channel: TextIO) -> None:
        self.channel = channel
        self.runner: Runner | None = None

    def serve(self, requests: Iterator[str]) -> None:
        """Answer requests until there are no more."""
        tasks: dict[str, Callable[..., Any]] = {
            "load": self.load,
            "time": self.time,
            "usage": self.usage,
            "generate": self.generate,
            "losses": self.losses,
            "write_logits": self.write_logits,
            "compare_logits": self.compare_logits,
        }
        for line in requests:
            request = json.loads(line)
            try:
                self._send({"reply": tasks[request.pop("do")](**request)})
            except SlmopsError as error:
                self._send({"error": {"type": type(error).__name__, "message": error.message, "hint": error.hint}})

    def load(self, folder: str, threads: int, precision: str, adapter: list[str]) -> dict[str, Any]:
        """Load the model; its engine's libraries are imported first and timed apart."""
        started = time.perf_counter()
        _import_engine(Path(folder))
        imported = time.perf_counter()
        self.runner = open_runner(folder, threads=threads, precision=precision, adapter=parse_selection(adapter))
        self.runner.prepare()
        return {
            "import_seconds": imported - started,
            "load_seconds": time.perf_counter() - imported,
            "engine": self.runner.engine,
            "threads": self.runner.threads,
            "max_length_tokens": self.runner.max_length_tokens,
            "bytes_per_token": bytes_per_token(self.runner),
        }

    def time(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """Time one generation."""
        return asdict(self._loaded.time(prompt, new_tokens=new_tokens))

    def usage(self) -> dict[str, Any]:
        """Return what this process has used so far: its peak resident memory in bytes, and processor time."""
        return {"peak_memory_bytes": environment.peak_memory_bytes(), "processor_seconds": time.process_time()}

    def generate(self, prompts: list[list[int]], max_new_tokens: int, stop_token_ids: list[int]) -> list[list[int]]:
        """Answer prompts greedily; they come sorted by length, so that progress is steady."""
        answers = []
        for ids in self._loaded.generate(prompts, max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids):
            answers.append([int(i) for i in ids])
            self._send({"progress": 1})
        return answers

    def losses(self, sequences: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the loss of each sequence."""
        encoded = [Encoded(item["ids"], item["labels"], 0) for item in sequences]
        return [asdict(loss) for loss in token_losses(self._loaded, encoded)]

    def write_logits(self, ids: list[int], file: str) -> float:
        """Write the logits of one sequence for the other side to compare with; return its loss in nats."""
        logits = next(iter(self._loaded.logits([ids])))
        np.save(file, logits)
        return float(surprise(logits[:-1], np.array(ids[1:])).sum())

    def compare_logits(self, ids: list[int], file: str) -> dict[str, Any]:
        """Compare the logits of one sequence with those of the other side, the reference, position by position."""
        reference, logits = np.load(file, mmap_mode="r"), next(iter(self._loaded.logits([ids])))
        width = min(reference.shape[1], logits.shape[1])  # an embedding padded for speed has ids that no text has
        divergences, same = [], 0
        for start in range(0, len(ids), 64):
            theirs, ours = reference[start : start + 64, :width], logits[start : start + 64, :width]
            divergences += results.divergence(theirs, ours).tolist()
            same += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
        nats = float(surprise(logits[:-1], np.array(ids[1:])).sum())
        return {"divergences": divergences, "same_top": same, "nats": nats}

    @property
    def _loaded(self) -> Runner:
        if self.runner is None:
            raise SlmopsError("the worker was asked before its model was loaded")
        return self.runner

    def _send(self, message: dict[str, Any]) -> None:
        self.channel.write(json.dumps(message) + "\n")
        self.channel.flush()


def bytes_per_token(runner: Runner) -> int:
    """Return the bytes of weights that decoding one token reads.

    Of PyTorch: all parameters, but for an embedding that the head does not share (one row of it is read). Of an export:
    the file of the graph's weights, which holds a shared embedding once; a separate one is counted too, so the share of the
    bandwidth is at most that much too high.
    """
    model: Any = getattr(runner, "model", None)
    if model is not None:
        total = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        return total if head is None or head.weight is table else total - table.numel() * table.element_size()
    return weights_bytes(runner.folder) or (runner.folder / "model.onnx").stat().st_size


def _import_engine(folder: Path) -> None:
    kind, engine = kind_of(folder), engine_of(folder)
    if engine is not None:
        environment.require(engine.library, "to run a package")
        return
    environment.require("torch", "to run a PyTorch model")
    _ = environment.require("transformers", "to load a PyTorch model").AutoModelForCausalLM
    if kind == "adapter":
        environment.require("peft", "to load an adapter")


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends: one that is stopped (SIGSTOP) would stay for ever."""
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)


def main() -> None:
    """Serve stdin until it ends."""
    _die_with_parent()
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print to stdout must not stand between the answers
    Worker(channel).serve(iter(sys.stdin.readline, ""))


if __name__ == "__main__":
    main()
