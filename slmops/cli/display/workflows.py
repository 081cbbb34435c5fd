"""How does `olive run` report what a workflow made?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.cli.display.built import recipe_line
from slmops.cli.display.figures import duration, number, size
from slmops.cli.display.layout import Page, beside, shell


def ran(page: Page, document: Mapping[str, Any]) -> None:
    """Write what came out, each pass with its time, the figures of a search, and what to type next."""
    if document.get("checked"):
        page.heading(f"{document.get('workflow', '')}: Olive would follow every key of it", "bold green")
        page.facts([("passes", ", ".join(f"{each['name']} ({each['type']})" for each in document.get("passes") or []))])
        page.warnings(document)
        page.next(f"slmops olive run {shell(document.get('workflow', ''))}")
        return
    out = document.get("artifact", "")
    page.heading(f"{document.get('kind', 'model')} written to {out}")
    page.facts(
        [
            ("target", " ".join(dict.fromkeys(str(document[key]) for key in ("device", "provider", "precision") if document.get(key)))),
            ("level", document.get("level")),
            ("recipe", recipe_line(document.get("recipe")) if document.get("recipe") else ""),
            ("size", size(document.get("size_bytes"))),
            *((name, number(value)) for name, value in (document.get("metrics") or {}).items()),
            ("time", duration(document.get("seconds"))),
            ("peak memory", size(document.get("peak_memory_bytes"))),
            ("log", document.get("log")),
        ]
    )
    runs = document.get("runs") or []
    if runs:
        page.table(("pass", "made", "time", "figures"), [_run(run) for run in runs], right=(2,), status=1)
    page.warnings(document)
    page.next(*_following(document, str(out)))


def _run(run: Mapping[str, Any]) -> tuple[str, ...]:
    figures = ", ".join(f"{name} {number(value)}" for name, value in (run.get("metrics") or {}).items())
    chosen = f"{figures} (taken)" if figures and run.get("best") else figures
    return str(run.get("type", "")), "yes" if run.get("made") else "no", duration(run.get("seconds")), chosen


def _following(document: Mapping[str, Any], out: str) -> list[str]:
    """Return the next commands for what was made."""
    kind = document.get("kind")
    if kind in ("export", "package"):
        return [f"slmops verify {shell(out)}", *([f"slmops bench {shell(out)}"] if document.get("level") == "executed" else [])]
    if kind == "adapter" and any(str(each["type"]).lower() == "qlora" for each in document.get("passes") or []):
        return []  # no merge: it learned on the base in nf4, and nothing in the folder says so
    if kind == "adapter":
        return [f"slmops merge {shell(out)} --base {shell(document.get('base') or 'MODEL')} -o {beside(Path(out).parent, 'merged')}"]
    if document.get("model_type", "").lower() == "hfmodel":
        return [f"slmops export {shell(out)} -o {beside(Path(out).parent, 'export')}"]
    return []
