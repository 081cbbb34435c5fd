"""Which adapters can a graph carry as runtime inputs, and what becomes of the others?

A graph carries pairs: y + (x A) B'. That is all of a LoRA whose scale is a number: any rank, any layers, ranks and
alphas of their own (rank_pattern, alpha_pattern), rsLoRA. Whatever else an adapter does would be lost without a word,
so an adapter is carried only when everything that its configuration says is known to be carried.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slmops.errors import Unavailable

# Settings of PEFT 0.21's LoraConfig that leave the adapter a pair A, B and a scale, whatever their value.
_CARRIED = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_CARRIED_INITS = (True, False, "gaussian", "eva", "orthogonal")
# What the others do, in words; one that is not here is named as it is.
_REASONS = {
    "use_dora": "DoRA rescales the whole weight: what it changes is no pair",
    "lora_bias": "its B has a bias",
    "bias": "it trained the biases of the base",
    "modules_to_save": "it holds whole layers of its own ({value})",
    "trainable_token_indices": "it changes rows of the embedding",
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it adapts parameters that are no linear layer ({value})",
    "alora_invocation_tokens": "it is off until certain tokens come (aLoRA)",
    "loftq_config": "it was made with another base (LoftQ)",
    "init_lora_weights": "its initialization ({value}) takes a part out of the base",
    "fan_in_fan_out": "its layers hold their weights transposed",
}
# PEFT types whose effect lies in the weights, so that a merged model has it.
_IN_THE_WEIGHTS = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT")


def refuse_uncarried(adapter: Path, config: dict[str, Any]) -> None:
    """Raise Unavailable where an adapter does more than pairs can, with what to do instead.

    Args:
        adapter: the PEFT folder.
        config: its `adapter_config.json`.
    """
    kind = config.get("peft_type")
    reasons = uncarried(config)
    if not reasons:
        return
    if kind in _IN_THE_WEIGHTS and not config.get("alora_invocation_tokens"):
        way = f"give it a package of its own: slmops merge {adapter} -o MERGED, then slmops export MERGED -o PACKAGE"
    else:
        way = "train it again with --method lora; this one runs in PyTorch only"
    raise Unavailable(f"{adapter} cannot be switched at run time: {'; '.join(reasons)}", way)


def uncarried(config: dict[str, Any]) -> list[str]:
    """Say what of an adapter pairs cannot carry; nothing where they carry it all."""
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"its type is {kind}, and only LoRA is a pair of matrices beside a layer"]
    reasons = []
    for key, value in config.items():
        harmless = (
            not value or key in _CARRIED or (key == "init_lora_weights" and value in _CARRIED_INITS) or (key == "bias" and value == "none")
        )
        if not harmless:
            reasons.append(_REASONS.get(key, f"{key} is {{value}}, which slmops does not know").format(value=value))
    return reasons
