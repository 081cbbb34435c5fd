"""What does a run take from the machine? Processor, memory and GPU, measured along the way, in this process."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from slmops import environment

FIELDS = ("cpu_cores", "memory_bytes", "gpu_memory_bytes", "gpu_share")
"""What a point of the history has: cores in use since the point before, resident memory now, GPU memory (the most since the run
began) and the share of the last moments in which the GPU was busy."""


class Meter:
    """Reads what has been used since the last reading."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), _processor_seconds()
        self.process: Any = environment.require("psutil", "to measure memory").Process()

    def read(self) -> dict[str, float]:
        """Return the fields that this machine has."""
        wall, processor = time.perf_counter(), _processor_seconds()
        cores = (processor - self.processor) / max(wall - self.wall, 1e-9)
        self.wall, self.processor = wall, processor
        return {"cpu_cores": round(cores, 3), "memory_bytes": self.process.memory_info().rss, **_gpu()}


def summary(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return what a manifest records of a run: means of shares, peaks of memory."""
    found: dict[str, float] = {}
    for name in FIELDS:
        values = [entry[name] for entry in history if name in entry]
        if values and name.endswith("bytes"):
            found[name] = max(values)
        elif values:
            found[name] = round(sum(values) / len(values), 3)
    return found


def _processor_seconds() -> float:
    """Processor time of this process, all its threads together."""
    times = os.times()
    return times.user + times.system


def _gpu() -> dict[str, float]:
    torch = environment.require("torch", "to train")
    if not torch.cuda.is_available():
        return {}
    found: dict[str, float] = {"gpu_memory_bytes": torch.cuda.max_memory_allocated()}
    try:
        found["gpu_share"] = torch.cuda.utilization() / 100
    except (ModuleNotFoundError, RuntimeError):
        return found  # a probe: the driver's library (nvidia-ml-py) is not everywhere
    return found
