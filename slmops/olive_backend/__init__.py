"""How does Olive do the training, and is a workflow of Olive's what it seems? The only importer of olive.

`train_adapter` runs Olive's LoRA or QLoRA pass on token rows; `problems` and `validate` find every key of a workflow
that Olive would drop without a word; `run_workflow` runs one, with the passes of `slmops.olive_passes` in it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmops.olive_backend.adapter import OliveRun as OliveRun
    from slmops.olive_backend.adapter import train_adapter as train_adapter
    from slmops.olive_backend.running import run_workflow as run_workflow
    from slmops.olive_backend.validation import problems as problems
    from slmops.olive_backend.validation import validate as validate

_PLACES = {"OliveRun": "adapter", "train_adapter": "adapter", "problems": "validation", "run_workflow": "running", "validate": "validation"}

__all__ = [*_PLACES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"slmops.olive_backend.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'slmops.olive_backend' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
