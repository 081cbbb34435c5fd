"""Progress: lines where stderr is a file, bars where it is a terminal, nothing with --quiet."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest

from slmops import progress
from slmops.cli.bars import Lines, Quiet, Work, watcher


class Clock:
    """A clock that moves by half a second each time that it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 0.5
        return self.now


def test_lines_at_the_start_every_tenth_and_at_the_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("slmops.cli.bars.time", Clock())
    stream = io.StringIO()
    with progress.watch(Lines(stream)), progress.task("train", total=100, unit="steps") as steps:
        for step in range(100):
            steps.advance(loss=1 / (step + 1), tokens_per_second=12345.6)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "train: 100 steps"
    assert len(lines) == 11
    assert re.fullmatch(r"train: 10/100 steps, loss=0\.1  tokens/s=12,346, .* left", lines[1])
    assert lines[-1].startswith("train: 100/100 steps, loss=0.01  tokens/s=12,346, ")


def test_fast_work_is_two_lines():
    stream = io.StringIO()
    with progress.watch(Lines(stream)), progress.task("evaluate", total=500, unit="rows") as rows:
        for _ in range(500):
            rows.advance()
    assert len(stream.getvalue().splitlines()) == 2


def test_work_that_broke_off_says_how_far_it_came():
    stream = io.StringIO()
    with pytest.raises(ValueError, match="stop"), progress.watch(Lines(stream)), progress.task("train", total=10, unit="steps") as steps:
        steps.advance(4)
        raise ValueError("stop")
    assert "train: ended at 4/10 steps" in stream.getvalue()


def test_work_of_unknown_length():
    stream = io.StringIO()
    with progress.watch(Lines(stream)), progress.task("load"):
        progress.say("loading the model")
    first, said, last = stream.getvalue().splitlines()
    assert (first, said) == ("load: started", "loading the model")
    assert re.fullmatch(r"load: done, 0\.\d s", last)


def test_quiet_says_nothing():
    stream = io.StringIO()
    with watcher(quiet=True, stream=stream) as sink, progress.watch(sink), progress.task("train", total=3) as steps:
        steps.advance()
        progress.say("words")
    assert isinstance(sink, Quiet)
    assert stream.getvalue() == ""


def test_figures_are_written_for_people():
    work = Work("train", 10, "steps", fields={"loss": 0.0312345, "tokens_per_second": 1234.5, "phase": "warm-up"})
    assert work.figures == "loss=0.03123  tokens/s=1,234  phase=warm-up"


def test_bars_on_a_terminal_leave_one_line_a_task():
    code = """
import sys, time
from slmops import progress
from slmops.cli.bars import Bars, watcher
with watcher(quiet=False) as sink, progress.watch(sink):
    assert isinstance(sink, Bars)
    with progress.task("train [x]", total=20, unit="steps") as steps:
        for i in range(20):
            steps.advance(loss=0.5)
            time.sleep(0.02)
            if i == 10:
                progress.say("rank 16 [chosen]")
                with progress.task("validate", total=2, unit="rows") as rows:
                    rows.advance(2)
"""
    shown = on_terminal([sys.executable, "-c", code])
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "━" in plain
    for line in ("rank 16 [chosen]", "validate: 2/2 rows", "train [x]: 20/20 steps, loss=0.5"):
        assert plain.count(line) == 1


def on_terminal(command: list[str]) -> str:
    """Run a command with a terminal as its stderr; return what it shows there."""
    outer, inner = pty.openpty()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=inner, env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    )
    os.close(inner)
    shown = b""
    while True:
        try:
            piece = os.read(outer, 65536)
        except OSError:  # Linux: the other end was closed
            break
        if not piece:
            break
        shown += piece
    assert process.wait(30) == 0
    os.close(outer)
    return shown.decode()
