"""What happens around every command? Progress is shown, the result becomes one document, and that is shown."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TextIO

import click

from slmops import environment, progress

GATE_NOT_MET = 5
DEBUG = "debug"
"""What click carries to a command that was called with `--debug`."""


@dataclass
class Session:
    """One command in progress, for a body that writes its result as it comes."""

    stdout: TextIO
    as_json: bool
    streamed: bool = False
    """The body has written its result already; only `--json` still needs the document."""


def perform(command: str, work: Callable[[], Any], *, as_json: bool, quiet: bool) -> None:
    """Run a command's body and show what it returns.

    Args:
        command: the command's name, with its group.
        work: returns an object with `.document()`, or the document itself.
        as_json: write the document instead of text.
        quiet: show no progress.

    Raises:
        click.exceptions.Exit: the result says `passed: false` (exit code 5).
    """
    from slmops.cli.bars import watcher
    from slmops.cli.streams import libraries_quiet, results_only

    started = time.perf_counter()
    context = click.get_current_context()
    with results_only() as stdout, nullcontext() if context.obj is DEBUG else libraries_quiet():
        context.obj = session = Session(stdout, as_json)
        follows = environment.process_index() > 0
        with watcher(quiet=quiet or follows) as sink, progress.watch(sink):
            result = work()
        document = completed(result, command, time.perf_counter() - started)
        if not follows:
            show(document, command, session)
    if document.get("passed") is False:
        raise click.exceptions.Exit(GATE_NOT_MET)


def completed(result: Any, command: str, seconds: float) -> dict[str, Any]:
    """Return a result's document with the keys that every command has."""
    document = result if isinstance(result, dict) else result.document()
    common = {"ok": document.get("passed") is not False, "warnings": [], "seconds": round(seconds, 3)}
    # A verb that calls another returns a document that names the other: the command typed is what is told.
    return {"command": command, **common, **{key: value for key, value in document.items() if key != "command"}}


def show(document: dict[str, Any], command: str, session: Session) -> None:
    """Show a document: as JSON, or as tables for people."""
    if session.as_json:
        from slmops.cli.streams import write_document

        write_document(document, session.stdout)
    elif not session.streamed:
        from slmops.cli.display import render

        render(command, document, session.stdout)
