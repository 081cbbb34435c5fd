"""How does one command become several processes, and how do all of them end? `--processes N`, on this machine.

This process starts N workers, shows the progress of the first one and returns what it wrote. Ctrl-C, or one that fails, ends all
of them; a worker whose launcher is gone ends by itself. Many machines need a launcher of their own: `accelerate launch`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slmops import artifact, environment, errors, progress
from slmops.artifact import Artifact
from slmops.config import FinetuneSettings, flat
from slmops.errors import RunFailed, SlmopsError, Unavailable

_POLL_SECONDS = 0.1
# A worker that was asked to stop removes what it wrote first.
_PATIENCE_SECONDS = 10.0
_ROOT = Path(__file__).resolve().parents[2]
_KINDS = {kind.exit_code: kind for kind in (errors.RunFailed, errors.InvalidInput, errors.Unavailable, errors.BadArtifact)}


def launch(model: str | Path, data: str | Path | None, out: Path, settings: FinetuneSettings) -> Artifact:
    """Train with `settings.run.processes` workers on this machine.

    Raises:
        Unavailable: there are GPUs, and fewer than processes.
        SlmopsError: what the workers raise.
        RunFailed: a worker was stopped by the system.
    """
    count = settings.run.processes
    gpus = _gpu_count()
    if 0 < gpus < count:
        raise Unavailable(f"{count} processes on {gpus} GPUs: each needs one of its own", f"--processes {gpus}")
    with TemporaryDirectory(prefix="slmops-processes-") as scratch:
        work = Path(scratch)
        job = {"model": str(model), "data": None if data is None else str(data), "out": str(out), "settings": flat(settings, given=True)}
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        port = _free_port()
        workers = [_start(work, index, count, port, settings.run.threads, gpus) for index in range(count)]
        try:
            _follow(work, workers)
        finally:
            _end(workers)
        _raise_failure(work, workers)
    return artifact.load(out)


def _start(work: Path, index: int, count: int, port: int, threads: int | None, gpus: int) -> subprocess.Popen[bytes]:
    share = threads or max(1, environment.usable_cores() // count)
    team = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    own = {
        **{name: str(value) for name, value in team.items()},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(share),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-P", "-m", "slmops.training.worker", str(work), str(os.getpid())]
    with (work / f"worker-{index}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            env={**os.environ, **environment.NO_TELEMETRY, **own},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us: we end them, and in order
        )


def _follow(work: Path, workers: list[subprocess.Popen[bytes]]) -> None:
    """Show what the first worker does, until all have ended or one has failed."""
    replay = Replay()
    place = 0
    while True:
        codes = [worker.poll() for worker in workers]
        lines, place = read_lines(work / "events.jsonl", place)
        for line in lines:
            replay.show(json.loads(line))
        if all(code == 0 for code in codes) or any(code not in (None, 0) for code in codes):
            replay.close()
            return
        time.sleep(_POLL_SECONDS)


class Replay:
    """Gives the progress of another process to our own sink."""

    def __init__(self) -> None:
        self.open: dict[int, tuple[Any, progress.Task]] = {}

    def show(self, event: dict[str, Any]) -> None:
        """Do here what was done there."""
        if "say" in event:
            progress.say(event["say"])
        elif "start" in event:
            context = progress.task(event["start"], event["total"], event["unit"])
            self.open[event["task"]] = (context, context.__enter__())
        elif "steps" in event:
            self.open[event["task"]][1].advance(event["steps"], **event["fields"])
        elif "finish" in event:
            self.open.pop(event["finish"])[0].__exit__(None, None, None)

    def close(self) -> None:
        """End what the other process did not."""
        for context, _ in self.open.values():
            context.__exit__(None, None, None)
        self.open.clear()


def read_lines(path: Path, place: int) -> tuple[list[str], int]:
    """Return the whole lines behind `place`, and where they end."""
    if not path.is_file():
        return [], place
    with path.open("rb") as stream:
        stream.seek(place)
        content = stream.read()
    whole = content[: content.rfind(b"\n") + 1]
    return whole.decode().splitlines(), place + len(whole)


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    """End the workers that are left: the first is asked, so that it can clean up, the others are not."""
    for worker in workers[1:]:
        if worker.poll() is None:
            worker.kill()
    first = workers[0]
    if first.poll() is None:
        first.send_signal(signal.SIGINT)
        try:
            first.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            first.kill()
    for worker in workers:
        worker.wait()


def _raise_failure(work: Path, workers: list[subprocess.Popen[bytes]]) -> None:
    """Raise what went wrong, in the words of the worker that knows: one that lost its partner only says so."""
    if all(worker.returncode == 0 for worker in workers):
        return
    results = [work / f"error-{index}.json" for index in range(len(workers))]
    known = [json.loads(path.read_text(encoding="utf-8")) for path in results if path.is_file()]
    for problem in sorted(known, key=lambda problem: not problem["foreseen"]):
        if problem["foreseen"] or all(worker.returncode >= 0 for worker in workers):
            raise _KINDS.get(problem["exit_code"], RunFailed)(problem["message"], problem["hint"])
    lost = [index for index, worker in enumerate(workers) if worker.returncode in (-signal.SIGKILL, 137)]
    log = (work / f"worker-{(lost or [0])[0]}.log").read_text(encoding="utf-8", errors="replace").strip()
    last = log.splitlines()[-1][:300] if log else "it said nothing"
    raise RunFailed(
        f"process {(lost or [0])[0]} of {len(workers)} was stopped: {last}", "lack of memory? Use fewer processes or smaller batches"
    )


def error_document(error: BaseException) -> dict[str, Any]:
    """Return an exception as a worker hands it over."""
    if isinstance(error, SlmopsError):
        return {**error.document(), "foreseen": True}
    what = " ".join(str(error).split())[:500]
    return {
        "exit_code": 1,
        "message": f"{type(error).__name__}: {what}",
        "hint": "--processes 1 shows the traceback with --debug",
        "foreseen": False,
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _gpu_count() -> int:
    """Return how many GPUs there are; without loading torch where the system has none of NVIDIA's."""
    if not Path("/dev/nvidiactl").exists() and sys.platform == "linux":
        return 0
    return environment.require("torch", "to train").cuda.device_count()
