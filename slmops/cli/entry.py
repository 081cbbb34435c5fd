"""How does a command end? Every way out leads through here: an exit code, one line with a hint, and no traceback."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

import click

from slmops.cli.commands import root
from slmops.cli.session import DEBUG
from slmops.environment import collect_seldom, process_index
from slmops.errors import InvalidInput, RunFailed, SlmopsError, Unavailable

INTERRUPTED = 130


class Interrupted(SlmopsError):
    """The user pressed Ctrl-C."""

    exit_code = INTERRUPTED


class _Bug(SlmopsError):
    """An exception that slmops did not foresee."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code (README, "Exit codes")."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    asked = set(words[: words.index("--")] if "--" in words else words)
    started = time.perf_counter()
    collect_seldom()
    try:
        code = root.main(words, prog_name="slmops", standalone_mode=False, obj=DEBUG if "--debug" in asked else None)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except (Exception, KeyboardInterrupt) as error:  # the outermost door: nothing may leave as a traceback
        if "--debug" in asked and not isinstance(error, (click.ClickException, click.Abort)):
            import traceback

            traceback.print_exception(error)
        problem = as_slmops_error(error)
        if isinstance(problem, Interrupted) and _command(words) == "finetune":
            problem = Interrupted("interrupted; the same command with --resume goes on from the last checkpoint, if there was one")
        if process_index() and problem.exit_code != RunFailed.exit_code:
            sys.exit(problem.exit_code)  # the first process of the launcher says the same
        if "--json" in asked and not process_index():
            _write_error(problem, _command(words), time.perf_counter() - started)
        _say(problem)
        sys.exit(problem.exit_code)


def as_slmops_error(error: BaseException) -> SlmopsError:
    """Return any exception as one with a message, a hint and an exit code."""
    if isinstance(error, SlmopsError):
        return error
    if isinstance(error, click.ClickException):
        return _usage(error)
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return Interrupted("interrupted")
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("slmops"):
        return _missing(error)
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return RunFailed("out of memory", "use a smaller batch, shorter rows or a smaller model, or close other programs")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunFailed(f"the disk is full{_at(error)}", "free some space or write elsewhere with -o")
    if isinstance(error, OSError) and error.strerror:
        return RunFailed(f"{error.strerror}{_at(error)}", "check the path and its permissions")
    what = " ".join(str(error).split())[:500]
    return _Bug(
        f"{type(error).__name__}: {what}" if what else type(error).__name__,
        "this is a bug in slmops; run again with --debug for the traceback",
    )


def _usage(error: click.ClickException) -> InvalidInput:
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context is not None else "slmops"
    return InvalidInput(error.format_message().rstrip("."), f"see `{path} --help`")


def _missing(error: ModuleNotFoundError) -> SlmopsError:
    from slmops.environment import PROVIDED_BY

    name = (error.name or "a module").split(".")[0]
    distribution, extra = PROVIDED_BY.get(name, (name, "train"))
    return Unavailable(f"{distribution} is not installed, and this command needs it", f"pip install 'slmops[{extra}]'")


def _is_out_of_memory(error: BaseException) -> bool:
    """Torch raises RuntimeError for it, with one of these texts."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def _at(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""


def _command(words: Sequence[str]) -> str:
    """Return the command's name out of the command line, for an error that came before it was known."""
    names = [word for word in words if not word.startswith("-")]
    if not names or names[0] not in root.entries:
        return ""
    from slmops.cli.commands import GROUPS

    return " ".join(names[:2]) if len(names) > 1 and names[1] in GROUPS.get(names[0], {}) else names[0]


def _write_error(problem: SlmopsError, command: str, seconds: float) -> None:
    from slmops.cli.streams import write_document

    document = {"command": command, "ok": False, "error": problem.document(), "warnings": [], "seconds": round(seconds, 3)}
    write_document(document, sys.stdout)


def _say(problem: SlmopsError) -> None:
    lead = "" if isinstance(problem, Interrupted) else "error: "
    click.echo(f"{lead}{problem.message}", err=True)
    if problem.hint:
        click.echo(f"hint: {problem.hint}", err=True)
