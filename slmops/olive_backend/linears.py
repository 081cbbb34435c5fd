"""Which linear layers can an adapter sit on? Read from the model's config, without loading a weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slmops import environment
from slmops.errors import BadArtifact, InvalidInput


def linear_layers(base: Path) -> list[str]:
    """Return the full names of a model's linear layers but the head: what PEFT calls "all-linear".

    Raises:
        BadArtifact: the config is of no model that transformers knows.
    """
    torch = environment.require("torch", "to train")
    transformers = environment.require("transformers", "to train")
    from transformers.pytorch_utils import Conv1D

    try:
        config = transformers.AutoConfig.from_pretrained(str(base), trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):  # shapes only
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadArtifact(f"{base} is no causal language model that transformers can load: {reason}", "check its config.json") from None
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head]


def choose_targets(layers: Sequence[str], asked: Sequence[str] | None, *, quantized: bool) -> list[str]:
    """Return the names that Olive is told to adapt; None asks for every kind of linear layer.

    Args:
        layers: full names of the linear layers.
        asked: names as PEFT takes them: the end of a full name, at a dot.
        quantized: Olive's QLoRA pass takes every 4-bit layer, whatever it is told (`lora.py`, QLoRA.get_quant_model).

    Raises:
        InvalidInput: a name fits no layer, or QLoRA is to leave layers out.
    """
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))
    if asked is None:
        return kinds
    unknown = [name for name in asked if not adapted(layers, [name])]
    if unknown or not asked:
        raise InvalidInput(f"target_modules: this model has no linear layer {', '.join(unknown)}", f"it has {', '.join(kinds)}")
    left_out = [name for name in layers if name not in adapted(layers, asked)]
    if quantized and left_out:
        raise InvalidInput(
            f"target_modules {', '.join(asked)}: Olive's QLoRA pass adapts every linear layer, and these leave out {left_out[0]}",
            "leave target_modules out, or use --engine peft",
        )
    return list(asked)


def adapted(layers: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Return the layers whose names end in a target."""
    return [name for name in layers if any(name == target or name.endswith(f".{target}") for target in targets)]
