"""What runs in each process of `--processes N`? `python -P -m slmops.training.worker WORK LAUNCHER`, with the job in WORK.

The first worker tells its progress through `events.jsonl`; each tells what went wrong through `error-INDEX.json`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from slmops import environment, progress
from slmops.training.launching import error_document

INTERRUPTED = 130


class Relay:
    """A sink of progress that writes each event as a line."""

    def __init__(self, path: Path) -> None:
        self.path, self.tasks = path, 0

    def write(self, event: dict[str, Any]) -> None:
        """Append an event."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(event) + "\n")

    def start(self, label: str, total: int | None, unit: str) -> Step:
        """Begin a task."""
        self.tasks += 1
        self.write({"start": label, "total": total, "unit": unit, "task": self.tasks})
        return Step(self, self.tasks)

    def finish(self, task: Any) -> None:
        """End a task."""
        self.write({"finish": task.number})

    def say(self, line: str) -> None:
        """Pass a line on."""
        self.write({"say": line})


class Step:
    """One task of a `Relay`."""

    def __init__(self, relay: Relay, number: int) -> None:
        self.relay, self.number = relay, number

    def advance(self, steps: int = 1, **fields: float | int | str) -> None:
        """Count units as done."""
        self.relay.write({"steps": steps, "fields": fields, "task": self.number})


def end_with(launcher: int) -> None:
    """End this process when its launcher is gone: nobody waits for it any more, and nobody else would end it."""

    def look() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def main(work: Path, launcher: int) -> int:
    """Train."""
    environment.collect_seldom()
    end_with(launcher)
    index = int(os.environ["RANK"])
    job = json.loads((work / "job.json").read_text(encoding="utf-8"))
    try:
        from slmops.training import finetune

        with progress.watch(Relay(work / "events.jsonl")) if index == 0 else nullcontext():
            finetune(job["model"], job["data"], out=job["out"], config=job["settings"])
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # the outermost door of this process: the launcher tells
        traceback.print_exc()
        (work / f"error-{index}.json").write_text(json.dumps(error_document(error)), encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
