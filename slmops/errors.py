"""What can go wrong, and with which exit code and next step does the user learn of it?

Every error that a user can cause or meet is one of these. The message says what, where and which value;
the hint says what to do next. Exit codes are part of the command-line contract (README, "Exit codes").
"""

from __future__ import annotations


class SlmopsError(Exception):
    """Base of all errors that slmops raises on purpose.

    Args:
        message: what happened, where, with which value; one line.
        hint: the next action of the user; one line, may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def document(self) -> dict[str, object]:
        """Return the error as the `error` object of the JSON contract."""
        return {"exit_code": self.exit_code, "message": self.message, "hint": self.hint}


class RunFailed(SlmopsError):
    """The work itself failed: training diverged, no model came out, the disk is full."""

    exit_code = 1


# Exit codes of a process that signal 9 ended, as Python and as a shell give them: the system's way of finding memory.
_KILLED = (-9, 137)


def raise_if_killed(what: str, code: int, hint: str) -> None:
    """Raise RunFailed where a process that works for slmops was killed.

    Args:
        what: that was, for the message.
        code: of its exit.
        hint: what takes less memory.
    """
    if code in _KILLED:
        raise RunFailed(f"{what} was stopped by the system, most likely for lack of memory", hint)


class InvalidInput(SlmopsError):
    """A flag, field, template or data row is wrong."""

    exit_code = 2


class Unavailable(SlmopsError):
    """A package, device, operator or architecture is not available here; the hint names the nearest that is."""

    exit_code = 3


class BadArtifact(SlmopsError):
    """A folder is incomplete, changed, of the wrong kind or for another base, or an output folder is not empty."""

    exit_code = 4


class GateFailed(SlmopsError):
    """A stage of `verify`, or another gate, was not met."""

    exit_code = 5
