"""Which methods are there, what does each train, which settings has it, and with which learning rate does it begin?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slmops.config import MethodSettings
from slmops.errors import InvalidInput
from slmops.training.methods import own_configs, peft_configs

# Peak learning rate of LoRA by the base's parameters. Small bases need larger steps: 1e-3 is what 3 M to 50 M learn
# SNIPS with, 2e-4 is the LoRA default of TRL and of "LoRA Without Regret" (Thinking Machines, 2025) near 1 B.
_LEARNING_RATES = ((50e6, 1e-3), (500e6, 5e-4), (float("inf"), 2e-4))
_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "target_modules")
_WITHOUT_DROPOUT = ("lora_rank", "lora_alpha", "target_modules")
# What every method has.
_SHARED = ("method", "engine")
_OLIVE = ("lora", "qlora", "dora", "loha", "lokr")


@dataclass(frozen=True)
class Method:
    """One way to fine-tune."""

    name: str
    summary: str
    """What is trained, in a line."""
    source: str
    """The paper."""
    settings: tuple[str, ...]
    """Settings of `MethodSettings` that it has; any other is refused."""
    rate: float
    """Its learning rate over LoRA's (measured: docs/methods.md)."""
    attach: Callable[[Any, MethodSettings], Any]
    """Freeze a base in memory and add what is trained."""
    trains_base: bool = False
    """Parameters of the base's own are trained."""


METHODS = {
    method.name: method
    for method in (
        Method("full", "every weight; what comes out is a model", "", (), 0.3, own_configs.whole, trains_base=True),
        Method("lora", "a low-rank pair beside each linear layer", "arXiv 2106.09685", (*_LORA, "quantized_base"), 1, peft_configs.lora),
        Method("qlora", "lora, around a base held in 4 bits (nf4)", "arXiv 2305.14314", (*_LORA, "quantized_base"), 1, peft_configs.qlora),
        Method("dora", "lora's direction, and the length of each weight's rows", "arXiv 2402.09353", _LORA, 1, peft_configs.dora),
        Method(
            "rslora",
            "lora, scaled by the square root of the rank: for high ranks",
            "arXiv 2312.03732",
            (*_LORA, "quantized_base"),
            1,
            peft_configs.rslora,
        ),
        Method(
            "adalora",
            "lora, its ranks moved in training to the layers that need them",
            "arXiv 2303.10512",
            _LORA,
            5,
            peft_configs.adalora,
        ),
        Method(
            "loha", "the product, element by element, of two low-rank matrices", "arXiv 2108.06098", _WITHOUT_DROPOUT, 3, peft_configs.loha
        ),
        Method(
            "lokr", "the Kronecker product of a small matrix and a low-rank one", "arXiv 2309.14859", _WITHOUT_DROPOUT, 3, peft_configs.lokr
        ),
        Method("ia3", "one factor for each key, value and MLP channel", "arXiv 2205.05638", (), 100, peft_configs.ia3),
        Method(
            "prefix",
            "keys and values before each text, in every layer",
            "arXiv 2101.00190",
            ("virtual_tokens", "encoder_size"),
            3,
            peft_configs.prefix,
        ),
        Method("prompt", "embeddings before each text", "arXiv 2104.08691", ("virtual_tokens",), 100, peft_configs.prompt),
        Method(
            "p-tuning",
            "embeddings before each text, made by a small network",
            "arXiv 2103.10385",
            ("virtual_tokens", "encoder_size"),
            10,
            peft_configs.p_tuning,
        ),
        Method(
            "bottleneck",
            "a narrow layer behind each attention and MLP, and the normalizations",
            "arXiv 1902.00751",
            ("bottleneck_size",),
            2,
            own_configs.bottleneck,
            trains_base=True,
        ),
        Method("bitfit", "the biases", "arXiv 2106.10199", (), 10, own_configs.bitfit, trains_base=True),
        Method(
            "loreft",
            "an edit of few dimensions of the hidden representation, after each layer",
            "arXiv 2404.03592",
            ("reft_rank", "reft_positions"),
            5,
            own_configs.loreft,
        ),
    )
}


def method_of(settings: MethodSettings) -> Method:
    """Return the method that is asked for."""
    return METHODS[settings.method]


def default_learning_rate(parameters: int, method: str = "lora") -> float:
    """Return the peak learning rate of a method for a base of so many parameters."""
    return METHODS[method].rate * next(rate for bound, rate in _LEARNING_RATES if parameters <= bound)


def attach_adapter(model: Any, settings: MethodSettings) -> Any:
    """Freeze a base and add the method's trainable weights.

    Raises:
        InvalidInput: a name in `target_modules` is no linear layer of this model.
        Unavailable: the architecture has no place for it.
    """
    return method_of(settings).attach(model, settings)


def callbacks_for(settings: MethodSettings, model: Any) -> list[Any]:
    """Return the Trainer's callbacks that a method needs."""
    if settings.method != "adalora":
        return []
    from slmops.training.methods.allocation import RankAllocation

    return [RankAllocation(model)]


def refuse_foreign(settings: MethodSettings) -> None:
    """Refuse what a method does not have: settings of other methods, the other engine.

    Raises:
        InvalidInput: naming all of them.
    """
    method = method_of(settings)
    given = [name for name in settings.model_fields_set if getattr(settings, name) is not None]
    foreign = [name for name in MethodSettings.model_fields if name in given and name not in (*_SHARED, *method.settings)]
    if foreign:
        own = ", ".join(f"--{name.replace('_', '-')}" for name in method.settings if name != "quantized_base") or "no settings of its own"
        holders = "; ".join(f"{name} belongs to {', '.join(_holders(name))}" for name in foreign)
        raise InvalidInput(f"{', '.join(foreign)}: {method.name} has no such setting ({holders})", f"{method.name} has {own}")
    if settings.engine == "olive" and method.name not in _OLIVE:
        raise InvalidInput(f"engine olive: Olive's engine trains {' and '.join(_OLIVE)}, and not {method.name}", "use --engine peft")


def without_foreign(settings: MethodSettings, values: dict[str, Any]) -> dict[str, Any]:
    """Return settings, flat, without those that the method does not have: what a manifest keeps can be given again."""
    own = (*_SHARED, *method_of(settings).settings)
    return {name: value for name, value in values.items() if name in own or name not in MethodSettings.model_fields}


def _holders(name: str) -> list[str]:
    return [method.name for method in METHODS.values() if name in method.settings and (method.name, name) != ("qlora", "quantized_base")]
