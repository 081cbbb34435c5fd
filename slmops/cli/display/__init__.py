"""How does a result look to a person? Each command's document as text and tables; `render` finds the right one.

Only the document is read (the `--json` contract of the README), and a key that is missing is left out: what people see
and what programs get cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, TextIO

# command -> module and function here; imported when it is needed.
_RENDERERS = {
    "bench": "measured:bench",
    "data inspect": "datasets:inspected",
    "data prepare": "datasets:prepared",
    "doctor": "machines:diagnosis",
    "evaluate": "measured:evaluation",
    "export": "built:exported",
    "finetune": "built:finetuned",
    "merge": "merges:merged",
    "olive run": "workflows:ran",
    "pack": "built:packed",
    "quickstart": "roads:demo",
    "run": "roads:pipeline",
    "show": "origins:lineage",
    "verify": "measured:verification",
}


def render(command: str, document: Mapping[str, Any], stream: TextIO) -> None:
    """Write a command's result to `stream`, coloured where that is a terminal."""
    from rich.console import Console

    from slmops.cli.display.layout import Page

    page = Page(Console(file=stream, highlight=False, emoji=False, markup=False))
    place = _RENDERERS.get(command)
    if place is None:
        page.facts([(key, value) for key, value in document.items() if not isinstance(value, (Mapping, list))])
        page.warnings(document)
        return
    module, _, function = place.partition(":")
    getattr(import_module(f"slmops.cli.display.{module}"), function)(page, document)
