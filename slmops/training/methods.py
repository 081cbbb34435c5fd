"""What is trained, and what stays frozen? Loads the base and puts the method's adapter on it (PEFT)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from slmops import environment
from slmops.config import MethodSettings
from slmops.errors import BadArtifact, InvalidInput, Unavailable
from slmops.runtime import hugging_face, quantized_base
from slmops.runtime.quantized_base import QuantizedBase

if TYPE_CHECKING:
    from torch import nn

# Peak learning rate of LoRA by the base's parameters. Small bases need larger steps: 1e-3 is what 3 M to 50 M learn
# SNIPS with, 2e-4 is the LoRA default of TRL and of "LoRA Without Regret" (Thinking Machines, 2025) near 1 B.
_LEARNING_RATES = ((50e6, 1e-3), (500e6, 5e-4), (float("inf"), 2e-4))


def default_learning_rate(parameters: int) -> float:
    """Return the peak learning rate for a base of so many parameters."""
    return next(rate for bound, rate in _LEARNING_RATES if parameters <= bound)


def load_base(folder: Path, *, quantized: bool, precision: str, package: QuantizedBase | None = None) -> nn.Module:
    """Load the base model as the method wants it.

    Args:
        folder: Hugging Face folder with safetensors.
        quantized: hold the linear layers in nf4.
        precision: "auto" (bf16 on a GPU; fp32 on a CPU, and for a package's weights, which bf16 would round), "fp32" or "bf16".
        package: take its dequantized weights in place of the folder's.
    """
    torch = environment.require("torch", "to train")
    if package is not None:
        return quantized_base.load_dequantized(folder, package, precision="fp32" if precision == "auto" else precision)
    chosen = precision if precision != "auto" else "bf16" if torch.cuda.is_available() else "fp32"
    return hugging_face.load_model(folder, precision=chosen, nf4=quantized)


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


def attach_adapter(model: nn.Module, settings: MethodSettings) -> nn.Module:
    """Freeze the base and add the method's trainable weights.

    Raises:
        InvalidInput: a name in `target_modules` is no linear layer of this model.
    """
    peft = environment.require("peft", "to train an adapter")
    if settings.method == "qlora":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = settings.target_modules
    if targets is not None:
        refuse_unknown_targets(model, targets)
    config = peft.LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,
        lora_dropout=settings.lora_dropout,
        target_modules=targets if targets is not None else "all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


def refuse_unknown_targets(model: nn.Module, targets: list[str]) -> None:
    """Raise InvalidInput when a target names no linear layer (PEFT stays silent when another of the list matches)."""
    # GPT-2's linear layers are transformers' Conv1D, which names its inputs `nx`.
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "in_features") or hasattr(module, "nx")}
    unknown = [name for name in targets if name.rsplit(".", 1)[-1] not in linear]
    if unknown:
        raise InvalidInput(f"target_modules: this model has no linear layer {', '.join(unknown)}", f"it has {', '.join(sorted(linear))}")


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
