"""Can this architecture and shape be exported and run? Told from `config.json`, before any weight is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from slmops import targets
from slmops.errors import BadArtifact, Unavailable

DEFAULT_POSITIONS = 2048
_HEAD_DIM_MULTIPLE = 16


@dataclass(frozen=True)
class Shape:
    """What a model's config says of it, before any weight is loaded."""

    architecture: str
    head_dim: int
    positions: int


def read_shape(model: Path) -> Shape:
    """Read what preflight needs from `config.json`.

    Raises:
        Unavailable: the builder does not know the architecture.
        BadArtifact: the config is broken.
    """
    path = model / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        architecture = str(content["architectures"][0])
        targets.builder_class(architecture)  # first: the config of another family may lack all of the fields below
        text = content.get("text_config", content)
        head_dim = int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])
        return Shape(architecture, head_dim, int(text.get("max_position_embeddings") or DEFAULT_POSITIONS))
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise BadArtifact(f"{path} does not describe a decoder ({error!r})", "give a ...ForCausalLM model") from None


def refuse_unrunnable(shape: Shape) -> None:
    """Raise Unavailable where the runtime cannot run a shape that the builder writes."""
    if shape.head_dim % _HEAD_DIM_MULTIPLE:
        raise Unavailable(
            f"head_dim is {shape.head_dim}, and onnxruntime's attention with rotary embeddings runs multiples of {_HEAD_DIM_MULTIPLE} only",
            f"take a base whose hidden_size / num_attention_heads is a multiple of {_HEAD_DIM_MULTIPLE}; this one still fine-tunes, merges and evaluates in PyTorch",
        )
