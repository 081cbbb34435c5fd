"""Had the benchmark the processor for itself? What other programs took of it while rounds ran.

An engine whose threads wait for each other at every layer loses far more than the share that others take: a baseline of
PyTorch with two threads on two busy cores decodes ten times slower, and a ratio against it says nothing.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

BUSY = 0.10
"""A share of the usable cores above this, taken by others, makes figures doubtful."""
_STAT = Path("/proc/stat")


class Watch:
    """Counts the processor time of everybody from its making on; Linux only, elsewhere it sees nothing."""

    def __init__(self) -> None:
        self._wall, self._busy, self._own = time.monotonic(), _busy_seconds(), time.process_time()

    def share_of_others(self, known_seconds: float) -> float:
        """Return the share of the usable cores that others took, 0 to 1.

        Args:
            known_seconds: processor time of the benchmark's other processes meanwhile.
        """
        now, cores = _busy_seconds(), len(_cores())
        if self._busy is None or now is None or not cores:
            return 0.0
        ours = known_seconds + time.process_time() - self._own
        return max(0.0, (now - self._busy - ours) / (cores * max(1e-9, time.monotonic() - self._wall)))


def _busy_seconds() -> float | None:
    """Return the seconds that the usable cores have worked, for whomever, since the machine was started.

    From user, nice, system, irq, softirq and steal (time that a virtual machine's host gave to others); proc(5).
    """
    if not _STAT.is_file():
        return None
    names = {f"cpu{core}" for core in _cores()}
    rows = [line.split() for line in _STAT.read_text().splitlines()]
    ticks = sum(sum(map(int, row[1:4])) + sum(map(int, row[6:9])) for row in rows if row[0] in names)
    return ticks / os.sysconf("SC_CLK_TCK")


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
