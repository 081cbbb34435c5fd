"""Can this architecture and shape be exported and run? Told from `config.json`, before any weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops import targets
from slmops.errors import BadArtifact, Unavailable

DEFAULT_POSITIONS = 2048
_HEAD_DIM_MULTIPLE = 16
# Kinds of RoPE that were held against PyTorch (`benchmarks/families.py`), and in which architectures; None: in all. The builder
# (onnxruntime-genai 0.18) computes another one for yarn than transformers does, and stops with an error at the rest.
_ROPES: dict[str, tuple[str, ...] | None] = {
    "default": None,
    "linear": None,
    "llama3": ("LlamaForCausalLM",),
    "longrope": ("Phi3ForCausalLM",),
    "su": ("Phi3ForCausalLM",),  # longrope, as older configs call it
    "yarn": ("GptOssForCausalLM",),
}


@dataclass(frozen=True)
class Shape:
    """What a model's config says of it, before any weight is loaded."""

    architecture: str
    head_dim: int
    positions: int
    obstacle: str = ""
    """What of it the builder gets wrong; empty where nothing is known."""


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
        positions = int(text.get("max_position_embeddings") or DEFAULT_POSITIONS)
        return Shape(architecture, head_dim, positions, _obstacle(architecture, text))
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise BadArtifact(f"{path} does not describe a decoder ({error!r})", "give a ...ForCausalLM model") from None


def refuse_unrunnable(shape: Shape) -> None:
    """Raise Unavailable where the runtime cannot run a shape that the builder writes."""
    if shape.head_dim % _HEAD_DIM_MULTIPLE:
        raise Unavailable(
            f"head_dim is {shape.head_dim}, and onnxruntime's attention with rotary embeddings runs multiples of {_HEAD_DIM_MULTIPLE} only",
            f"take a base whose hidden_size / num_attention_heads is a multiple of {_HEAD_DIM_MULTIPLE}; this one still fine-tunes, merges and evaluates in PyTorch",
        )
    if shape.obstacle:
        raise Unavailable(
            f"{shape.architecture} cannot be exported: {shape.obstacle}",
            "take a base without it, or of another family; this one still fine-tunes, merges and evaluates in PyTorch",
        )


def _obstacle(architecture: str, text: Mapping[str, Any]) -> str:
    for kind in _rope_kinds(text.get("rope_parameters") or text.get("rope_scaling") or {}):
        known = _ROPES.get(kind, ())
        if known is not None and architecture not in known:
            return f"the model builder does not compute its RoPE ({kind}) as PyTorch does"
    if architecture == "GraniteMoeHybridForCausalLM":
        states = any("attention" not in str(kind) for kind in text.get("layer_types") or text.get("layers_block_type") or ())
        if states or text.get("num_local_experts") or text.get("position_embedding_type") != "rope":
            return "of this family only dense models with attention and RoPE in every layer were seen to come out right"
    return ""


def _rope_kinds(table: Any) -> Iterator[str]:
    """Yield the kinds of RoPE of a config, which has one table, or one for each kind of layer."""
    if not isinstance(table, Mapping):
        return
    nested = [value for value in table.values() if isinstance(value, Mapping)]
    for one in nested or [table]:
        yield str(one.get("rope_type") or one.get("type") or "default")
