"""How is a model run? A Runner for each engine, and `open_model` for whatever is behind a path."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmops.runtime.generation import generate as generate
    from slmops.runtime.loading import Loaded as Loaded
    from slmops.runtime.loading import open_model as open_model
    from slmops.runtime.package import Package as Package
    from slmops.runtime.runner import Runner as Runner
    from slmops.runtime.runner import Sampling as Sampling
    from slmops.runtime.runner import Timing as Timing

_PLACES = {
    "Loaded": "loading",
    "Package": "package",
    "Runner": "runner",
    "Sampling": "runner",
    "Timing": "runner",
    "generate": "generation",
    "open_model": "loading",
}

__all__ = [*_PLACES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"slmops.runtime.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'slmops.runtime' has no attribute '{name}'")
