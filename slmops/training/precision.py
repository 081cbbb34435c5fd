"""In which precision are the frozen weights held and multiplied while an adapter is trained?"""

from __future__ import annotations

from slmops import environment
from slmops.config import MethodSettings
from slmops.errors import InvalidInput, Unavailable

# Methods whose base is frozen and which learn in fp32 beside it, and those of them whose layers `slmops.training.step` computes.
_BESIDE = ("lora", "rslora", "dora")
BY_HAND = ("lora", "rslora")


def choose_precision(asked: str, method: str, *, exact_base: bool, trains_base: bool) -> str:
    """Return "fp32", "bf16" or "int8".

    In bf16 a product takes half the time where the processor has instructions for it (AVX512-BF16 or AMX: 410 against 188
    GFLOP/s on two Zen 4 cores) and several times longer where it has none. In int8 it takes half of that, and its error is
    larger: it has to be asked for.

    Args:
        asked: "auto", "fp32", "bf16" or "int8".
        method: of the fine-tune.
        exact_base: the base's weights must stay as they are (`--quantized-base`): bf16 would round them.
        trains_base: some of its weights are trained: bf16 would lose small steps.
    """
    if asked != "auto":
        return asked
    torch = environment.require("torch", "to train")
    if exact_base or trains_base:
        return "fp32"
    if torch.cuda.is_available():
        return "bf16"
    return "bf16" if method in _BESIDE and _multiplies_bf16() else "fp32"


def held_in(precision: str) -> str:
    """Return the precision in which the frozen weights are held, "fp32" or "bf16": with "int8", that of all that is not in int8."""
    return ("bf16" if _multiplies_bf16() else "fp32") if precision == "int8" else precision


def check_int8(settings: MethodSettings) -> None:
    """Refuse to multiply in int8 where it would not be sooner, or not be what was asked for.

    Raises:
        InvalidInput: layers are not multiplied so with such a method or with dropout, or the base's weights must stay as they are.
        Unavailable: the processor has no instructions for it, or a GPU trains.
    """
    method = settings.method
    if method not in BY_HAND:
        raise InvalidInput(f"precision int8: method {method} computes its layers by itself", "use --method lora or rslora, or leave it out")
    if settings.lora_dropout:
        raise InvalidInput("precision int8: with lora_dropout PEFT computes the layers", "leave one of them out")
    if settings.quantized_base is not None:
        raise InvalidInput("precision int8 rounds the weights that quantized_base gives", "leave one of them out")
    torch = environment.require("torch", "to train")
    if torch.cuda.is_available():
        raise Unavailable("precision int8 is for processors, and here a GPU trains", "leave it out: a GPU multiplies in bf16")
    if not _multiplies_bytes():
        raise Unavailable("precision int8: this processor has no instructions for it (AVX512-VNNI or AVX-VNNI)", "leave it out")


def _multiplies_bf16() -> bool:
    """Tell whether this processor multiplies bf16 in hardware."""
    torch = environment.require("torch", "to train")
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)


def _multiplies_bytes() -> bool:
    """Tell whether this processor multiplies bytes in hardware, and sums them without overflow."""
    torch = environment.require("torch", "to train")
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_vnni", "avx_vnni"))
