"""What does a workflow's file say that must be known before Olive starts? Where it writes, and what it would take from a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slmops.errors import InvalidInput


def read_workflow(path: Path) -> dict[str, Any]:
    """Return what a file holds, which is checked elsewhere (`slmops.olive_backend.validation`).

    Raises:
        InvalidInput: no such file, no JSON, or no mapping.
    """
    if not path.is_file():
        raise InvalidInput(f"no such file: {path}", "give the path of a workflow of Olive's (JSON)")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidInput(f"{path}{where}: broken JSON ({' '.join(str(error).split())})", "mend that line") from None
    if not isinstance(content, dict):
        raise InvalidInput(
            f"{path} holds a {type(content).__name__}, not a workflow", "a workflow is a mapping with input_model and passes"
        )
    return content


def _engine(content: dict[str, Any], key: str) -> Any:
    engine = content.get("engine")
    return content.get(key) or (engine.get(key) if isinstance(engine, dict) else None)


def output_folder(content: dict[str, Any], path: Path) -> Path:
    """Return the folder that Olive would write into.

    Raises:
        InvalidInput: it is none of its own, or one that Olive takes for a file.
    """
    given = _engine(content, "output_dir")
    if not given or not isinstance(given, str):
        raise InvalidInput(f"{path} says no output_dir, and Olive would write into this folder", 'add "output_dir": "out"')
    if Path(given).suffix:  # engine.py:199
        raise InvalidInput(f"output_dir {given}: Olive takes a name with a dot for a file", "choose a name without one")
    return Path(given)


def cache_warnings(content: dict[str, Any]) -> list[str]:
    """Say where results of an earlier run would be taken for this one's."""
    cache = Path(_engine(content, "cache_dir") or ".olive-cache")
    if cache.is_dir() and not _engine(content, "clean_cache"):
        return [
            f'results in {cache} are taken again where paths and settings are the same, whatever the files hold now: say "clean_cache": true'
        ]
    return []
