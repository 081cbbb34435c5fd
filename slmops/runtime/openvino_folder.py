"""What does an OpenVINO folder say of itself: its device, its numerics, its length, and do its tokenizer's IRs make the same tokens?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmops import environment
from slmops.data import Tokenizer

# Where slmops, or optimum, says how long a sequence may be, and the length of a folder that says nothing.
_LENGTHS, _DEFAULT_LENGTH = (("generation_config.json", "max_length"), ("config.json", "max_position_embeddings")), 2048
_NO_LENGTH = 20
"""transformers' default of `max_length`, in a config that says nothing."""


def device_of(ir: Any) -> str:
    """Return the device that slmops made an IR for, as OpenVINO names it; somebody else's runs on the CPU."""
    return _told(ir, ["slmops", "device"]) or "CPU"


def properties_of(ir: Any) -> dict[str, str]:
    """Return what the device is told at load beside the `runtime_options` that plugins read from the IR; empty for somebody else's."""
    names = ("EXECUTION_MODE_HINT", "INFERENCE_PRECISION_HINT")
    return {name: value for name in names if (value := _told(ir, ["slmops", "properties", name]))}


def length_of(folder: Path) -> int:
    """Return the longest sequence, prompt and answer together."""
    for name, key in _LENGTHS:
        length = _read(folder / name).get(key)
        if isinstance(length, int) and length > _NO_LENGTH:
            return length
    return _DEFAULT_LENGTH


def stop_tokens_of(folder: Path) -> tuple[int, ...]:
    """Return the tokens at which openvino-genai ends an answer by itself."""
    stops = _read(folder / "generation_config.json").get("eos_token_id")
    return tuple(stops) if isinstance(stops, list) else () if stops is None else (int(stops),)


def has_tokenizer(folder: Path) -> bool:
    """Tell whether the tokenizer is there as an IR."""
    return (folder / "openvino_tokenizer.xml").is_file()


def differing_texts(folder: Path, tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Return the texts that the tokenizer's IR makes other tokens of, none of them added."""
    genai = environment.require("openvino_genai", "to ask the tokenizer of an OpenVINO export")
    own = genai.Tokenizer(str(folder))
    return [
        text for text in texts if text and own.encode(text, add_special_tokens=False).input_ids.data[0].tolist() != tokenizer.encode(text)
    ]


def _told(ir: Any, path: list[str]) -> str:
    return str(ir.get_rt_info(path).value) if ir.has_rt_info(path) else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
