"""How does long work look while it goes on? Bars on a terminal, a line now and then elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from slmops.progress import Sink, Task

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LINE_EVERY_SECONDS = 10.0
_LINES_APART_SECONDS = 1.0
_LINE_EVERY_SHARE = 0.1


@contextmanager
def watcher(*, quiet: bool, stream: TextIO | None = None) -> Iterator[Sink]:
    """Give the sink that fits where stderr leads: nothing, bars, or lines."""
    stream = stream or sys.stderr
    if quiet or stream is None:  # a service may have no stderr at all
        yield Quiet()
    elif stream.isatty():
        bars = Bars(stream)
        try:
            yield bars
        finally:
            bars.stop()
    else:
        yield Lines(stream)


@dataclass
class Work:
    """One task: how far it is, and its latest figures."""

    label: str
    total: int | None
    unit: str
    owner: Lines | Bars | None = None
    done: int = 0
    fields: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=lambda: time.monotonic())
    told: float = 0.0
    told_share: float = 0.0
    handle: TaskID | None = None

    def advance(self, steps: int = 1, **fields: float | int | str) -> None:
        """Count `steps` units as done and keep the latest figures."""
        self.done += steps
        self.fields.update(fields)
        if self.owner is not None:
            self.owner.moved(self)

    @property
    def counted(self) -> str:
        """`40/204 steps`."""
        count = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        return f"{count} {self.unit}".strip()

    @property
    def figures(self) -> str:
        """`loss=0.31  tokens/s=1,204`."""
        return "  ".join(f"{_spoken(name)}={_figure(value)}" for name, value in self.fields.items())

    def line(self, *parts: str) -> str:
        """`label: part, part`."""
        return f"{self.label}: " + ", ".join(part for part in parts if part)

    @property
    def ending(self) -> str:
        """The line that stays once the task is over."""
        seconds = f"{time.monotonic() - self.started:.1f} s"
        if self.total is not None and self.done < self.total:
            return self.line(f"ended at {self.counted}", self.figures, seconds)
        return self.line(self.counted if self.done else "done", self.figures, seconds)


class Quiet:
    """Shows nothing."""

    def start(self, label: str, total: int | None, unit: str) -> Task:
        """Begin a task that nobody watches."""
        return Work(label, total, unit)

    def finish(self, task: Task) -> None:
        """End it."""

    def say(self, line: str) -> None:
        """Keep silent."""


class Lines:
    """Plain lines: at the start, about every tenth or ten seconds, and at the end."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def start(self, label: str, total: int | None, unit: str) -> Task:
        """Begin a task with a line."""
        work = Work(label, total, unit, owner=self, told=time.monotonic())
        self._write(work.line(f"{total:,} {unit}".strip() if total is not None else "started"))
        return work

    def moved(self, work: Work) -> None:
        """Write a line when enough has happened since the last one."""
        now = time.monotonic()
        share = work.done / work.total if work.total else 0.0
        due = now - work.told >= _LINE_EVERY_SECONDS
        tenth = share - work.told_share >= _LINE_EVERY_SHARE and now - work.told >= _LINES_APART_SECONDS
        if (due or tenth) and work.done != work.total:
            left = f"{_clock((now - work.started) * (1 - share) / share)} left" if share else ""
            self._write(work.line(work.counted, work.figures, left))
            work.told, work.told_share = now, share

    def finish(self, task: Task) -> None:
        """End a task with a line."""
        if isinstance(task, Work):
            self._write(task.ending)

    def say(self, line: str) -> None:
        """Write the line."""
        self._write(line)

    def _write(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()


class Bars:
    """Bars that move, each replaced by a line once its task is over."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.progress: Progress | None = None
        self.open = 0

    def start(self, label: str, total: int | None, unit: str) -> Task:
        """Begin a task with a bar."""
        if self.progress is None:
            self.progress = _bars(self.stream)
            self.progress.start()
        work = Work(label, total, unit, owner=self)
        work.handle = self.progress.add_task(_escaped(label), total=total, counted=work.counted, figures="")
        self.open += 1
        return work

    def moved(self, work: Work) -> None:
        """Move the bar."""
        if self.progress is not None and work.handle is not None:
            self.progress.update(work.handle, completed=work.done, counted=work.counted, figures=work.figures)

    def finish(self, task: Task) -> None:
        """Replace the bar by a line."""
        if not isinstance(task, Work) or task.handle is None or self.progress is None:
            return
        self.progress.remove_task(task.handle)
        task.handle = None
        self.open -= 1
        self.say(task.ending)
        if not self.open:
            self.stop()

    def say(self, line: str) -> None:
        """Write a line above the bars."""
        if self.progress is None:
            self.stream.write(line + "\n")
        else:
            self.progress.console.print(line, markup=False, highlight=False)

    def stop(self) -> None:
        """Take the bars away."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def _bars(stream: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[counted]}"),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeRemainingColumn(),
        console=Console(file=stream),
        transient=True,
        # Libraries' own prints are sent to stderr already (`slmops.cli.streams`).
        redirect_stdout=False,
        redirect_stderr=True,
    )


def _spoken(name: str) -> str:
    return name.replace("_per_second", "/s").replace("_", " ")


def _figure(value: float | int | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
