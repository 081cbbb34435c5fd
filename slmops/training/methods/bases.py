"""Which weights are under the adapter? The model's own, in float or in nf4, or those of an export or package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from slmops.config import MethodSettings
from slmops.errors import BadArtifact, InvalidInput, Unavailable
from slmops.runtime import hugging_face, quantized_base
from slmops.runtime.quantized_base import QuantizedBase

if TYPE_CHECKING:
    from torch import nn


def load_base(folder: Path, *, quantized: bool, precision: str, package: QuantizedBase | None = None) -> nn.Module:
    """Load the base model as the method wants it.

    Args:
        folder: Hugging Face folder with safetensors.
        quantized: hold the linear layers in nf4.
        precision: "fp32" or "bf16" (`slmops.training.precision`).
        package: take its dequantized weights in place of the folder's.
    """
    if package is not None:
        return quantized_base.load_dequantized(folder, package, precision=precision)
    return hugging_face.load_model(folder, precision=precision, nf4=quantized)


def find_quantized_base(base: Path, settings: MethodSettings) -> QuantizedBase | None:
    """Return the export or package to train on, checked; None where the model's own weights are the base.

    Raises:
        InvalidInput: with qlora, which quantizes the base by itself.
        Unavailable: with Olive's engine.
        BadArtifact: it is no export or package of this model.
    """
    if settings.quantized_base is None:
        return None
    if settings.method == "qlora":
        raise InvalidInput(
            f"quantized_base: {settings.quantized_base} is a quantized base already, and qlora would put another in its place",
            "leave --method out (lora trains on the weights of --quantized-base), or leave --quantized-base out",
        )
    if settings.engine == "olive":
        raise Unavailable(
            "engine olive: Olive's pass loads the model from its folder and cannot be given other weights (quantized_base)",
            "use --engine peft",
        )
    return quantized_base.find_quantized_base(settings.quantized_base, base)


def refuse_unsupported(folder: Path) -> None:
    """Refuse a model that is no causal language model before its weights are loaded.

    Raises:
        Unavailable: another kind of model.
        BadArtifact: its config cannot be read.
    """
    try:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["(none named)"]
    except (ValueError, AttributeError) as error:
        raise BadArtifact(f"{folder / 'config.json'} does not describe a model: {error}", "download or copy the model again") from None
    if not any("CausalLM" in name or "LMHead" in name for name in architectures):
        raise Unavailable(f"{folder} is a {architectures[0]}, and slmops fine-tunes causal language models", "give a ...ForCausalLM model")
