"""Which kinds of adapters are slmops's own, and how are they put on a model, written and read?

What PEFT has is PEFT's. What it lacks is here: bottleneck layers, BitFit, LoReFT. Each lies in a folder like one of PEFT's:
`adapter_config.json`, with `slmops_type` in place of `peft_type`, and `adapter_model.safetensors`, whose tensors have the names
of the adapted model's parameters. The model stays the class that it is: parts are added to it, hooks run them.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from slmops.errors import BadArtifact
from slmops.graph.carrying import OWN_TYPE

# Type -> module here; each has `add(model, config)`.
_KINDS = {"BOTTLENECK": "bottleneck", "BITFIT": "biases", "LOREFT": "representation"}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_own(config: dict[str, Any]) -> bool:
    """Tell whether a folder's `adapter_config.json` is of a kind of slmops's own."""
    return OWN_TYPE in config


def attach_own(model: Any, config: dict[str, Any]) -> Any:
    """Freeze a model and add an adapter of slmops's own to it, in place, as training begins with it.

    Args:
        model: a causal language model, in memory.
        config: `slmops_type`, and the settings of that kind; what the kind finds out of the model is added to it.

    Raises:
        Unavailable: the model has no place for it.
        BadArtifact: a kind that this slmops does not know.
    """
    module = _KINDS.get(config[OWN_TYPE])
    if module is None:
        raise BadArtifact(f"adapters of type {config[OWN_TYPE]} are not known to this slmops", "use the slmops that wrote it")
    model.requires_grad_(False)
    import_module(f"slmops.runtime.native.{module}").add(model, config)
    model.slmops_adapter = config
    return model


def save_own(model: Any, folder: Path) -> None:
    """Write the adapter on a model: its config, and the tensors that are trained."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    base = {"base_model_name_or_path": getattr(model, "name_or_path", None)}
    (folder / CONFIG).write_text(json.dumps(base | model.slmops_adapter, indent=2) + "\n", encoding="utf-8")
    save_file({name: value.detach().cpu().contiguous() for name, value in trained(model).items()}, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes for the owner only


def load_own(model: Any, folder: Path, config: dict[str, Any], base: Path) -> Any:
    """Put the adapter of a folder on a model, in place.

    Raises:
        BadArtifact: a tensor has no place in this base, is missing, or has the wrong shape.
    """
    import torch
    from safetensors.torch import load_file

    attach_own(model, dict(config))
    places, stored = trained(model), load_file(folder / WEIGHTS)
    wrong = sorted(set(places) ^ set(stored)) or sorted(name for name in places if places[name].shape != stored[name].shape)
    if wrong:
        state = "lacks its place" if wrong[0] in stored and wrong[0] not in places else "is missing or has another shape"
        raise BadArtifact(f"{folder} does not fit {base}: {wrong[0]} {state}", "give the base that it was trained on with --base")
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(stored[name])
    return model.requires_grad_(False).eval()


def trained(model: Any) -> dict[str, Any]:
    """Return the parameters that are trained, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def fold_own(model: Any) -> Any:
    """Return a model whose adapter is already in its weights (BitFit), so that its config says so too."""
    for name, value in (model.slmops_adapter.get("switches") or {}).items():
        setattr(model.config, name, value)
    return model
