"""How fast can this machine read its memory? The ceiling of decoding, which reads every weight once a token.

Method: one thread a core reads its own part of an array far larger than the caches (a bitwise OR over 64-bit words, of
which numpy's vectorized loop does several a cycle, so that memory is what it waits for), several passes, the fastest
counts. That is the read part of STREAM (McCalpin 1995); what is written is not counted, as decoding writes next to nothing.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from slmops import environment

_ARRAY_BYTES = 512 * 2**20
_PASSES_AT_LEAST = 3


def measure_bandwidth(*, threads: int | None = None, seconds: float = 0.7) -> float:
    """Measure the memory bandwidth that reading reaches, in bytes a second.

    Args:
        threads: threads that read at once (default: one a usable core).
        seconds: how long to repeat; filling the array takes about as long again.

    Raises:
        Unavailable: numpy is not installed.
    """
    np = environment.require("numpy", "to measure memory bandwidth")
    threads = threads or environment.usable_cores()
    available = environment.memory_bytes()[1] or _ARRAY_BYTES * 4
    size = min(_ARRAY_BYTES, available // 4)
    parts = np.array_split(np.ones(size // 8, dtype=np.uint64), threads)
    fastest = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        passes, end = 0, time.perf_counter() + seconds
        while passes < _PASSES_AT_LEAST or time.perf_counter() < end:
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            fastest = min(fastest, time.perf_counter() - start)
            passes += 1
    return size / fastest
