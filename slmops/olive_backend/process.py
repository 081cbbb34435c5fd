"""How is Olive run, and how do we learn that it failed? In a process of its own, held against what it left behind.

Olive logs most failures and ends with exit code 0, so its word is not taken: there must be a model, the last step, and
a finite loss at each.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops import environment, progress
from slmops.errors import RunFailed, raise_if_killed
from slmops.olive_backend.worker import REFUSED

LOG = "olive.log"
_POLL_SECONDS = 0.2
_ROOT = Path(__file__).resolve().parents[2]
_RAISED = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\w*: .+")


@dataclass(frozen=True)
class Outcome:
    """What Olive's process left behind."""

    adapter: Path
    history: list[dict[str, Any]]
    steps: int
    loop_seconds: float
    peak_memory_bytes: int


def execute(work: Path, steps: int, *, cuda: bool, threads: int) -> Outcome:
    """Run the workflow that lies in `work`.

    Args:
        work: folder with `workflow.json`; Olive's cache, log and output go there too.
        steps: how many optimizer steps it must make.
        cuda: let it see the GPUs.
        threads: of its operators.

    Raises:
        RunFailed: Olive failed, made no model, stopped early, or its loss is not finite.
    """
    (work / "tmp").mkdir()
    events, place, history = work / "events.jsonl", 0, []
    with progress.task("finetune with Olive", total=steps, unit="steps") as task:

        def follow() -> None:
            nonlocal place
            lines, place = whole_lines(events, place)
            for event in map(json.loads, lines):
                if "loss" in event:
                    task.advance(1, loss=round(event["loss"], 4))
                history.append(event)

        code = run_module("slmops.olive_backend.worker", work, follow, folder=work, cuda=cuda, threads=threads)
    return judge(work, code, history, steps)


def run_module(module: str, work: Path, follow: Callable[[], None], *, folder: Path | None, cuda: bool, threads: int) -> int:
    """Run a module in Olive's process, with its log in `work`; return its exit code.

    Args:
        module: run with `work` as its argument.
        work: folder of the process's own files.
        follow: called several times a second, and once more when the process has ended.
        folder: where it runs; None: the user's.
        cuda: let it see the GPUs.
        threads: of its operators.
    """
    with (work / LOG).open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(work)],
            cwd=folder,
            env=child_environment(work, cuda=cuda, threads=threads),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us: we end it, and say so
        )
        try:
            ended = False
            while not ended:
                ended = process.poll() is not None
                follow()
                if not ended:
                    try:
                        process.wait(_POLL_SECONDS)
                    except subprocess.TimeoutExpired:
                        continue
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return process.returncode


def child_environment(work: Path, *, cuda: bool, threads: int) -> dict[str, str]:
    """Return the environment of Olive's process: caches of its own, no telemetry, no network."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    extra = {
        **environment.NO_TELEMETRY,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(work / "cached_rows"),
        "TMPDIR": str(work / "tmp"),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": path,
    }
    return {**os.environ, **extra} if cuda else {**os.environ, **extra, "CUDA_VISIBLE_DEVICES": ""}


def judge(work: Path, code: int, history: list[dict[str, Any]], steps: int) -> Outcome:
    """Return the outcome of a process that has ended.

    Raises:
        RunFailed: it is not the training that was asked for.
    """
    log = (work / LOG).read_text(encoding="utf-8", errors="replace")
    losses = [entry for entry in history if "loss" in entry]
    for entry in losses:
        if not math.isfinite(entry["loss"]):
            raise RunFailed(
                f"training diverged: the loss is {entry['loss']} at step {entry['step']}", "lower --learning-rate, or check the data"
            )
    raise_if_killed("Olive", code, "use a smaller --batch-size or a smaller model")
    if code == REFUSED:
        raise RunFailed(
            f"this Olive does not take the workflow that slmops writes: {last_error(log)}",
            "pip install 'slmops[olive]' brings the tested version",
        )
    path = work / "result.json"
    if code != 0 or not path.is_file():
        raise RunFailed(f"Olive made no adapter: {last_error(log)}", "--engine peft trains without Olive")
    result = json.loads(path.read_text(encoding="utf-8"))
    ended = next((event for event in history if "ended_at" in event), {"ended_at": 0, "seconds": 0.0})
    if ended["ended_at"] != steps or not losses:
        raise RunFailed(f"Olive stopped at step {ended['ended_at']} of {steps}: {last_error(log)}", "--engine peft trains without Olive")
    if result["not_finite"]:
        raise RunFailed(
            f"training diverged: {result['not_finite'][0]} holds values that are no numbers", "lower --learning-rate, or check the data"
        )
    return Outcome(Path(result["adapter"]), losses, steps, ended["seconds"], result["peak_memory_bytes"])


def last_error(log: str) -> str:
    """Return the line of a log that says what went wrong: the last exception, or the last line there is."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    raised = [line for line in lines if _RAISED.match(line)]
    logged = [line for line in lines if "[ERROR]" in line or "[CRITICAL]" in line]
    return (raised or logged or lines or ["it wrote nothing"])[-1][:300]


def whole_lines(path: Path, place: int) -> tuple[list[bytes], int]:
    """Return the whole lines of a growing file behind `place`, and where they end."""
    if not path.is_file():
        return [], place
    with path.open("rb") as stream:
        stream.seek(place)
        content = stream.read()
    whole = content[: content.rfind(b"\n") + 1]
    return whole.splitlines(), place + len(whole)
