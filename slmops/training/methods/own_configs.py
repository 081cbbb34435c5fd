"""How do the methods that PEFT lacks begin? The whole model, bottleneck layers, BitFit, LoReFT (`slmops.runtime.native`)."""

from __future__ import annotations

from typing import Any

from slmops.config import MethodSettings
from slmops.graph.carrying import OWN_TYPE
from slmops.runtime import native


def whole(model: Any, settings: MethodSettings) -> Any:
    """Train every parameter."""
    return model.requires_grad_(True)


def bottleneck(model: Any, settings: MethodSettings) -> Any:
    """Add bottleneck layers (`slmops.runtime.native.bottleneck`)."""
    return native.attach_own(model, {OWN_TYPE: "BOTTLENECK", "size": settings.bottleneck_size})


def bitfit(model: Any, settings: MethodSettings) -> Any:
    """Train the biases (`slmops.runtime.native.biases`)."""
    return native.attach_own(model, {OWN_TYPE: "BITFIT"})


def loreft(model: Any, settings: MethodSettings) -> Any:
    """Add low-rank edits of the hidden representations (`slmops.runtime.native.representation`)."""
    return native.attach_own(model, {OWN_TYPE: "LOREFT", "rank": settings.reft_rank, "positions": settings.reft_positions})
