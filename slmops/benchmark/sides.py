"""How are two models measured without disturbing each other? Each in a process of its own, one awake at a time.

Both stay loaded, so that their rounds can alternate. The one that waits is stopped by the system (SIGSTOP): an engine's
threads spin for a while after their work (onnxruntime's: 26 ms of processor time were seen), which the other would pay.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from slmops import errors
from slmops.errors import RunFailed, SlmopsError

_MODULE = "slmops.benchmark.worker"
_CAN_STOP = hasattr(signal, "SIGSTOP")


@dataclass(frozen=True)
class Model:
    """What one side measures."""

    role: str
    """`candidate` or `baseline`."""
    folder: Path
    threads: int
    precision: str = "fp32"
    """Of a PyTorch model in memory."""
    adapter: tuple[str, ...] = ()
    """Of a package: what is on, as it is typed: NAME or NAME=WEIGHT."""


@dataclass(frozen=True)
class Start:
    """How one fresh process got ready."""

    start_seconds: float
    """From the start of the process to a loaded model."""
    load_seconds: float
    """Of these, the loading of the model: the engine's libraries were imported before."""
    engine: str
    threads: int
    max_length_tokens: int
    bytes_per_token: int


class Side:
    """A process with one loaded model; asleep except while it is asked. Use as a context manager."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._errors = TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed in `close`
        # torch's threads are set when its model is loaded; OpenMP and MKL read theirs when they are.
        threads = {name: str(model.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        started = time.perf_counter()
        # A session of its own: Ctrl-C reaches us alone, and we end the workers. -P: nothing of the user's folder is imported.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env=dict(os.environ) | threads,
            start_new_session=True,
        )
        try:
            options = {"threads": model.threads, "precision": model.precision, "adapter": list(model.adapter)}
            reply = self.ask("load", folder=str(model.folder.resolve()), **options)
        except BaseException:
            self.close()
            raise
        reply.pop("import_seconds")
        self.start = Start(start_seconds=time.perf_counter() - started, **reply)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, task: str, /, on_progress: Callable[[int], None] | None = None, **arguments: Any) -> Any:
        """Wake the process, let it do one task, put it to sleep again and return its answer.

        Raises:
            SlmopsError: of the class that it raised there.
            RunFailed: the process ended.
        """
        with self._awake():
            try:
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps({"do": task, **arguments}) + "\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                raise self._crash() from None
            while True:
                message = self._read()
                if "progress" not in message:
                    break
                if on_progress is not None:
                    on_progress(message["progress"])
        if "error" in message:
            kind = getattr(errors, message["error"]["type"], SlmopsError)
            raise kind(f"{self.model.role}: {message['error']['message']}", message["error"]["hint"])
        return message["reply"]

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue  # a request that it did not read any more

    @contextmanager
    def _awake(self) -> Iterator[None]:
        self._signal("SIGCONT")
        try:
            yield
        finally:
            self._signal("SIGSTOP")

    def _signal(self, name: str) -> None:
        if _CAN_STOP and self._process.poll() is None:
            self._process.send_signal(getattr(signal, name))

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._crash()
        return json.loads(line)

    def _crash(self) -> RunFailed:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        what = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        hint = "too little memory? Close other programs, or measure a smaller model" if code == -9 else "see whether `slmops verify` passes"
        return RunFailed(f"the {self.model.role}'s process ({self.model.folder}) {what}: {lines[-1] if lines else 'it said nothing'}", hint)
