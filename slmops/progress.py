"""How does long work tell whoever watches how far it is?

Library code opens a `task`; what becomes of it is decided by the sink that the caller installed (`watch`). Without a
sink nothing happens: library functions never print. The command line installs one that draws bars on a terminal and
plain lines elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Task(Protocol):
    """One piece of long work."""

    def advance(self, steps: int = 1, **fields: float | int | str) -> None:
        """Count `steps` units as done; `fields` are figures to show beside the bar, such as loss=0.31."""
        ...


class Sink(Protocol):
    """Where progress goes."""

    def start(self, label: str, total: int | None, unit: str) -> Task:
        """Begin a task of `total` units (None: unknown)."""
        ...

    def finish(self, task: Task) -> None:
        """End a task, whether it was completed or not."""
        ...

    def say(self, line: str) -> None:
        """Show one line about what happens now, such as a decision and its reason."""
        ...


class _Silent:
    def advance(self, steps: int = 1, **fields: float | int | str) -> None:
        pass

    def start(self, label: str, total: int | None, unit: str) -> Task:
        return self

    def finish(self, task: Task) -> None:
        pass

    def say(self, line: str) -> None:
        pass


_SILENT = _Silent()
_sink: ContextVar[Sink | None] = ContextVar("slmops_progress", default=None)


@contextmanager
def watch(sink: Sink) -> Iterator[None]:
    """Send the progress of everything inside the `with` block to `sink`."""
    token = _sink.set(sink)
    try:
        yield
    finally:
        _sink.reset(token)


@contextmanager
def task(label: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
    """Report a piece of long work: open one with `with`, call `advance` on it as units are done."""
    sink = _sink.get() or _SILENT
    started = sink.start(label, total, unit)
    try:
        yield started
    finally:
        sink.finish(started)


def say(line: str) -> None:
    """Report one decision or finding while work goes on."""
    (_sink.get() or _SILENT).say(line)
