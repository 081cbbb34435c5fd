"""What does a method leave behind: room for the text, the roads that are open to it, and the stop tokens of a whole model?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from slmops import artifact
from slmops.config import MethodSettings
from slmops.data import Interface
from slmops.errors import InvalidInput
from slmops.runtime import hugging_face
from slmops.runtime.roads import roads_of, roads_of_model
from slmops.training.methods.table import method_of

_LEAST_TEXT = 8


def leave_room(interface: Interface, base: Path, settings: MethodSettings) -> Interface:
    """Bound the text so that text and learned positions together fit into the model's.

    Raises:
        InvalidInput: hardly any room is left.
    """
    taken = settings.virtual_tokens if "virtual_tokens" in method_of(settings).settings else 0
    content = json.loads((base / "config.json").read_text(encoding="utf-8"))
    positions = content.get("text_config", content).get("max_position_embeddings") or content.get("n_positions")
    if not taken or not positions:
        return interface
    room = int(positions) - taken
    if room < _LEAST_TEXT:
        raise InvalidInput(f"virtual_tokens: {taken} leave {max(0, room)} of the model's {positions} positions to the text", "give fewer")
    return interface.model_copy(update={"max_length_tokens": min(interface.max_length_tokens, room)})


def find_roads(folder: Path, base: Path, settings: MethodSettings) -> dict[str, str]:
    """Return which of merge, pack and export are open to what was written to a folder (`slmops.runtime.roads`)."""
    if settings.method == "full":
        return roads_of_model(base)
    config = hugging_face.read_adapter_config(folder)
    return roads_of(config, base, method=settings.method, quantized=settings.quantized_base is not None)


def write_stops(folder: Path, stop_token_ids: Sequence[int]) -> None:
    """Write the stop tokens into a model's `generation_config.json`, so that other tools, which read only this, stop there too."""
    path = folder / "generation_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    artifact.write_json(path, content | {"eos_token_id": list(stop_token_ids)})
