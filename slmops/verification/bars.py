"""How close to PyTorch must a package of each precision be?"""

from __future__ import annotations

from dataclasses import dataclass

from slmops.config import VerifySettings


@dataclass(frozen=True)
class Bars:
    """The bars in force. Figures of the logits are over the supervised tokens of the user's own held-out rows."""

    kl: float | None
    """Highest mean KL(PyTorch || package), nats a token. None for fp32, which has sharper bars."""
    top1: float | None
    """Lowest share of tokens with the same most likely token. None for fp32: all but ties."""
    nmse: float | None
    """fp32: highest normalized mean square error of the logits."""
    difference: float | None
    """fp32: highest absolute difference of a logit; two logits nearer than twice this are a tie."""
    task_points: float
    """Most points (0 to 100) of the task metric below PyTorch's on the same rows."""
    overridden: tuple[str, ...] = ()
    """Those that the user set."""


# KL of int8 and int4: what llama.cpp's q8_0 (0.0014) and q4_0 (0.072) to q4_K_M (0.031) show on Llama-3-8B, rounded to
# one figure a precision. fp32: an export differs from PyTorch by the order of sums, NMSE 1.3e-12 and 5e-5 on logits to 25.
_BARS = {
    "fp32": Bars(None, None, 1e-10, 2e-4, 0.0),
    "fp16": Bars(1e-3, 0.99, None, None, 0.0),
    "bf16": Bars(1e-3, 0.99, None, None, 0.0),
    "int8": Bars(1e-2, 0.97, None, None, 0.5),
    "int4": Bars(5e-2, 0.92, None, None, 1.0),
}


def bars_for(precision: str, settings: VerifySettings) -> Bars:
    """Return the bars of a precision, with those that the user set in place of their defaults."""
    own = _BARS[precision]
    given = {
        "kl": settings.kl_bar,
        "top1": settings.top1_bar,
        "nmse": settings.nmse_bar,
        "difference": settings.difference_bar,
        "task_points": settings.task_bar,
    }
    chosen = {name: value if value is not None else getattr(own, name) for name, value in given.items()}
    return Bars(**chosen, overridden=tuple(name for name, value in given.items() if value is not None))
