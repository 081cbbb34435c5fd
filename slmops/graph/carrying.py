"""Which adapters can a graph carry as runtime inputs, and what becomes of the others?

A graph carries pairs: y + (x A) B'. That is all of a LoRA whose scale is a number: any rank, any layers, ranks and
alphas of their own (rank_pattern, alpha_pattern), rsLoRA. Whatever else an adapter does would be lost without a word,
so an adapter is carried only when everything that its configuration says is known to be carried.
"""

from __future__ import annotations

from collections.abc import Collection
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
OWN_TYPE = "slmops_type"
"""Names the kind of an adapter of slmops's own (`slmops.runtime.native`), where PEFT writes `peft_type`."""
# Types whose effect lies in the weights, so that a merged model has it: PEFT's, and BITFIT, which is ours.
IN_THE_WEIGHTS = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "BITFIT")
_BESIDE_THE_WEIGHTS = {
    "PREFIX_TUNING": "learned keys and values stand before each text, and no weight holds them",
    "PROMPT_TUNING": "learned positions stand before each text, and no weight holds them",
    "P_TUNING": "learned positions stand before each text, and no weight holds them",
    "BOTTLENECK": "its layers are not linear, and no weight of the base can do what they do",
    "LOREFT": "it edits what flows between the layers, past their skip connections, where the base has no weight",
}
# But for what one weight cannot say.
_NOT_IN_THE_WEIGHTS = {
    "alora_invocation_tokens": "it is off until certain tokens come (aLoRA)",
    "layer_replication": "layers that it repeats share one weight in the base and differ with it",
    "without_place": "the architecture of its base has no biases, and a model's folder no place for those that it added",
}
# PEFT takes the part out of the base again when it loads the adapter: the same one only where nothing is random or measured.
_REPEATABLE_INITS = (*_CARRIED_INITS, None, "pissa", "olora")
_ONLY_IN_PYTORCH = "train it again with --method lora; this one runs in PyTorch only"
_CONVERT = (
    "where it was trained, save it as a plain LoRA: save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL) of PEFT"
)


def refuse_uncarried(adapter: Path, config: dict[str, Any], tensors: Collection[str], parameters: Collection[str]) -> None:
    """Raise Unavailable where an adapter does more than pairs can, with what to do instead.

    Args:
        adapter: the PEFT folder.
        config: its `adapter_config.json`.
        tensors: names of its tensors.
        parameters: names of the base's.
    """
    reasons = uncarried(config)
    if not reasons:
        return
    refuse_unrepeatable(adapter, config)
    biases = [name.removeprefix("base_model.model.").replace(".lora_B.bias", ".bias") for name in tensors if name.endswith(".lora_B.bias")]
    if not not_in_weights(config) and all(name in parameters for name in biases):
        way = f"give it a package of its own: slmops merge {adapter} -o MERGED, then slmops export MERGED -o PACKAGE"
    else:
        way = _ONLY_IN_PYTORCH
    raise Unavailable(f"{adapter} cannot be switched at run time: {'; '.join(reasons)}", way)


def refuse_unmergeable(adapter: Path, config: dict[str, Any]) -> None:
    """Raise Unavailable where no weights can say what an adapter does.

    Args:
        adapter: the PEFT folder.
        config: its `adapter_config.json`.
    """
    kind = type_of(config)
    if kind not in IN_THE_WEIGHTS and kind not in _BESIDE_THE_WEIGHTS:
        raise Unavailable(f"adapters of type {kind} cannot be merged", f"these can: {', '.join(name.lower() for name in IN_THE_WEIGHTS)}")
    reasons = not_in_weights(config)
    if reasons:
        raise Unavailable(f"{adapter} cannot be merged: {'; '.join(reasons)}", _ONLY_IN_PYTORCH)


def type_of(config: dict[str, Any]) -> str | None:
    """Return the type of an adapter, PEFT's or slmops's own."""
    return config.get("peft_type") or config.get(OWN_TYPE)


def refuse_unrepeatable(adapter: Path, config: dict[str, Any]) -> None:
    """Raise Unavailable where PEFT would load an adapter on another base than it learned on, without a word.

    PiSSA by a randomized SVD (`pissa_niter_4`) is the case that was seen: the part that is taken out of the base is another
    one each time (NMSE of the logits 1 against the model that was saved, peft 0.21.2).
    """
    initialization = config.get("init_lora_weights")
    if config.get("peft_type") == "LORA" and initialization not in _REPEATABLE_INITS:
        raise Unavailable(f"{adapter} began as {initialization}, which takes a part out of the base that nobody can tell again", _CONVERT)


def not_in_weights(config: dict[str, Any]) -> list[str]:
    """Say what of an adapter no weights can say."""
    kind = type_of(config)
    if kind not in IN_THE_WEIGHTS:
        return [_BESIDE_THE_WEIGHTS.get(str(kind), f"its type is {kind}, which slmops cannot merge")]
    return [reason for key, reason in _NOT_IN_THE_WEIGHTS.items() if config.get(key)]


def uncarried(config: dict[str, Any]) -> list[str]:
    """Say what of an adapter pairs cannot carry; nothing where they carry it all."""
    kind = type_of(config)
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
