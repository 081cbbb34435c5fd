"""How do PEFT's methods begin? Each setting of ours as PEFT calls it, and defaults where PEFT's are not for this."""

from __future__ import annotations

from typing import Any

from slmops import environment
from slmops.config import MethodSettings
from slmops.errors import InvalidInput, Unavailable

# Where rsLoRA divides by the square root of the rank, alpha does not grow with it: 8 is lora's own scale of 2 at rank 16.
_RSLORA_ALPHA = 8.0
# AdaLoRA begins with half as many ranks again as are left at the end (Zhang et al. 2023, arXiv 2303.10512, section 4: 1.5 times).
_INITIAL_RANKS = 1.5


def lora(model: Any, settings: MethodSettings) -> Any:
    """Add LoRA."""
    return _with_lora(model, settings)


def qlora(model: Any, settings: MethodSettings) -> Any:
    """Add LoRA to a base in nf4."""
    peft = environment.require("peft", "to train an adapter")
    return _with_lora(peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), settings)


def dora(model: Any, settings: MethodSettings) -> Any:
    """Add DoRA."""
    return _with_lora(model, settings, use_dora=True)


def loha(model: Any, settings: MethodSettings) -> Any:
    """Add LoHa."""
    return _attach(model, "LoHaConfig", r=settings.lora_rank, alpha=_alpha(settings), **_targets(model, settings))


def lokr(model: Any, settings: MethodSettings) -> Any:
    """Add LoKr."""
    return _attach(model, "LoKrConfig", r=settings.lora_rank, alpha=_alpha(settings), **_targets(model, settings))


def rslora(model: Any, settings: MethodSettings) -> Any:
    """Add rsLoRA."""
    return _with_lora(model, settings, use_rslora=True, lora_alpha=settings.lora_alpha or _RSLORA_ALPHA)


def adalora(model: Any, settings: MethodSettings) -> Any:
    """Add AdaLoRA; its schedule is set when the number of steps is known (`slmops.training.methods.allocation`)."""
    initial = round(_INITIAL_RANKS * settings.lora_rank)
    shape = {"init_r": initial, "target_r": settings.lora_rank, "lora_alpha": settings.lora_alpha or 2 * initial}
    return _attach(model, "AdaLoraConfig", total_step=1_000_000, lora_dropout=settings.lora_dropout, **shape, **_targets(model, settings))


def ia3(model: Any, settings: MethodSettings) -> Any:
    """Add IA3 to keys, values and what enters the MLP's last layer, as the paper does.

    Raises:
        Unavailable: the model has them under other names, which PEFT does not know either.
    """
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if {"k_proj", "v_proj", "down_proj"} <= names:
        # PEFT scales queries in place of keys for some families (qwen2, gemma); the paper scales keys.
        return _attach(model, "IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    try:
        return _attach(model, "IA3Config")
    except ValueError as error:
        raise Unavailable(
            f"ia3 does not know where a {type(model).__name__} has its keys, values and MLP: {' '.join(str(error).split())}",
            "use --method lora, which finds linear layers by itself",
        ) from error


def prefix(model: Any, settings: MethodSettings) -> Any:
    """Add a prefix of keys and values, made by a network in training (Li and Liang 2021, section 4.3), kept without it."""
    width = settings.encoder_size or _width(model)
    return _prompted(
        _attach(model, "PrefixTuningConfig", num_virtual_tokens=settings.virtual_tokens, prefix_projection=True, encoder_hidden_size=width)
    )


def prompt(model: Any, settings: MethodSettings) -> Any:
    """Add a prompt of embeddings that begin as tokens of the vocabulary (Lester et al. 2021, section 3.2)."""
    return _prompted(_attach(model, "PromptTuningConfig", num_virtual_tokens=settings.virtual_tokens, prompt_tuning_init="SAMPLE_VOCAB"))


def p_tuning(model: Any, settings: MethodSettings) -> Any:
    """Add a prompt of embeddings that a small network makes in training, kept without it."""
    width = settings.encoder_size or _width(model)
    return _prompted(_attach(model, "PromptEncoderConfig", num_virtual_tokens=settings.virtual_tokens, encoder_hidden_size=width))


def refuse_unknown_targets(model: Any, targets: list[str]) -> None:
    """Raise InvalidInput when a target names no linear layer (PEFT stays silent when another of the list matches)."""
    # GPT-2's linear layers are transformers' Conv1D, which names its inputs `nx`.
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "in_features") or hasattr(module, "nx")}
    unknown = [name for name in targets if name.rsplit(".", 1)[-1] not in linear]
    if unknown:
        raise InvalidInput(f"target_modules: this model has no linear layer {', '.join(unknown)}", f"it has {', '.join(sorted(linear))}")


def _with_lora(model: Any, settings: MethodSettings, **more: Any) -> Any:
    scale = {"lora_alpha": _alpha(settings)}
    return _attach(
        model,
        "LoraConfig",
        **{"r": settings.lora_rank, "lora_dropout": settings.lora_dropout, **scale, **_targets(model, settings), **more},
    )


def _alpha(settings: MethodSettings) -> float:
    return settings.lora_alpha or 2 * settings.lora_rank


def _targets(model: Any, settings: MethodSettings) -> dict[str, Any]:
    if settings.target_modules is None:
        return {"target_modules": "all-linear"}
    refuse_unknown_targets(model, settings.target_modules)
    return {"target_modules": settings.target_modules}


def _attach(model: Any, kind: str, **settings: Any) -> Any:
    peft = environment.require("peft", "to train an adapter")
    # Of a base with a head that scores (a reward model's), PEFT trains and saves the head too.
    task = "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM"
    return peft.get_peft_model(model, getattr(peft, kind)(task_type=task, **settings))


def _prompted(model: Any) -> Any:
    from slmops.runtime.prompts import prompted

    return prompted(model)


def _width(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)
