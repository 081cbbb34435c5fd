"""What does every road write down of an export, whatever runs it?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmops.data import Interface
from slmops.runtime import hugging_face
from slmops.targets import Level, Target


def export_facts(
    target: Target, recipe: dict[str, Any], source: Path, interface: Interface, size_bytes: int, level: Level
) -> dict[str, Any]:
    """Return the facts of an export's manifest that each road has.

    Args:
        target: that it was made for.
        recipe: its document.
        source: the model's folder.
        interface: of the export: its length is bounded.
        size_bytes: of what the device loads.
        level: that was reached.
    """
    return {
        "device": target.device,
        "provider": target.provider,
        "precision": target.precision,
        "recipe": recipe,
        "size_bytes": size_bytes,
        "bytes_per_parameter": round(size_bytes / hugging_face.parameter_count(source), 4),
        "level": level,
        "max_length_tokens": interface.max_length_tokens,
    }


def eos_token_id(stops: Sequence[int]) -> int | list[int]:
    """Return stop tokens as runtimes' configs hold them: one as a number, several as a list."""
    return stops[0] if len(stops) == 1 else list(stops)


def graph_bytes(folder: Path) -> int:
    """Return the size of an export's graphs and their data files."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".onnx", ".data"))
