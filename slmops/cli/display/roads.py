"""How do `run` and `quickstart` report the steps of a pipeline?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmops.cli.display import measured
from slmops.cli.display.figures import duration
from slmops.cli.display.layout import Page


def pipeline(page: Page, document: Mapping[str, Any]) -> None:
    """Write each step with its status, time and folder, and where the run stopped."""
    steps = document.get("steps") or []
    rows = [_step(step) for step in steps]
    page.table(("step", "command", "status", "time", "result"), rows, right=(3,), status=2)
    page.text()
    failed = document.get("failed_step")
    if document.get("passed") is False or failed:
        page.heading(f"stopped{f' at step {failed}' if failed else ''}: its gate was not met", "bold red")
    else:
        page.heading(f"all steps done in {duration(document.get('seconds'))}", "bold green")
    page.warnings(document)


def demo(page: Page, document: Mapping[str, Any]) -> None:
    """Write the steps, the benchmark's table, an answer, and what to type for one's own model and data."""
    pipeline(page, document)
    if document.get("bench"):
        page.text()
        measured.bench(page, document["bench"])
    sample = document.get("sample") or {}
    answers = [(f"with {name}", text) for name, text in (document.get("answers") or {}).items()]
    page.facts([("prompt", sample.get("prompt")), ("answer", sample.get("text")), *answers])
    if commands := document.get("next"):
        page.next(*commands)


def _step(step: Mapping[str, Any]) -> tuple[str, ...]:
    result = step.get("artifact") or step.get("out") or step.get("reason") or ""
    time = duration(step["seconds"]) if step.get("seconds") is not None else ""
    return str(step.get("name", "")), str(step.get("command", "")), str(step.get("status", "")), time, str(result)
