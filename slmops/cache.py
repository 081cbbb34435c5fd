"""Where does slmops keep what it would otherwise find out again? In the user's cache, which anybody may empty."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path | None:
    """Return the folder for one kind of thing, which need not exist; None where there is no home.

    Under `XDG_CACHE_HOME`, which its specification lets nobody follow where it is relative, or `~/.cache`.
    """
    asked = Path(os.environ.get("XDG_CACHE_HOME") or "")
    try:
        return (asked if asked.is_absolute() else Path.home() / ".cache") / "slmops" / name
    except RuntimeError:
        return None
