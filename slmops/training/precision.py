"""In which precision are the frozen weights multiplied while an adapter is trained?"""

from __future__ import annotations

from slmops import environment

# Methods whose base is frozen and which learn in fp32 beside it.
_BESIDE = ("lora", "rslora", "dora")


def choose_precision(asked: str, method: str, *, exact_base: bool, trains_base: bool) -> str:
    """Return "fp32" or "bf16".

    In bf16 a product takes half the time where the processor has instructions for it (AVX512-BF16 or AMX: 410 against 188
    GFLOP/s on two Zen 4 cores) and several times longer where it has none.

    Args:
        asked: "auto", "fp32" or "bf16".
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


def _multiplies_bf16() -> bool:
    """Tell whether this processor multiplies bf16 in hardware."""
    torch = environment.require("torch", "to train")
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)
