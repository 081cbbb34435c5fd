"""What do repeated `NAME=VALUE` flags say, as a mapping?"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from slmops.errors import InvalidInput

_NAME = re.compile(r"^[A-Za-z0-9_][\w-]*$")


def named(setting: str, given: Sequence[str] | None, *, of: Collection[str] | None = None) -> dict[str, str]:
    """Return name -> value.

    Args:
        setting: for the messages.
        given: texts `NAME=VALUE`; a value may hold further `=`.
        of: names that there are; None: any.

    Raises:
        InvalidInput: no `=`, a bad name, a name twice, or one that is not among `of`.
    """
    found: dict[str, str] = {}
    for text in given or ():
        name, has_value, value = text.partition("=")
        if not has_value or not value or not _NAME.match(name):
            raise InvalidInput(
                f"{setting}: {text!r} is no NAME=VALUE (a name has letters, digits, - and _)", "write for example intent=train.jsonl"
            )
        if name in found:
            raise InvalidInput(f"{setting}: {name} is named twice", "name each once")
        if of is not None and name not in of:
            raise InvalidInput(f"{setting}: there is no task {name}", f"the tasks are {', '.join(of)}")
        found[name] = value
    return found
