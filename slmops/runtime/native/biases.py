"""BitFit: which biases are trained, and what of a model that has none?

Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", arXiv
2106.10199: all parameters are frozen but the biases, those of the linear layers and of the normalizations (section 3: b_q, b_k,
b_v, b_m1 to b_m3, b_LN1, b_LN2).

A model that has biases (GPT-2, Qwen2) trains those that it has. One without (Llama, Qwen3, Mistral) is given them, at zero, which
is the same function: at every linear layer where its architecture can have one by its config (`attention_bias`, `mlp_bias`), so
that the trained model is again one of that architecture, and merging is exact. Where it can have none, at every linear layer of
the decoder; those biases have no place in a model's folder, and the adapter cannot be merged. A normalization without a bias
(RMSNorm) is not given one: W (x + b) = W x + W b, so the biases of the linear layers that read it can do the same and more.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from slmops.errors import Unavailable
from slmops.runtime.native.blocks import decoder_layers

_SWITCHES = ("attention_bias", "mlp_bias")


def add(model: Any, config: dict[str, Any]) -> None:
    """Make the biases of a model trainable, and add them where it has none.

    `config` gains `added` (linear layers that were given a bias), `switches` (what to set in the model's config so that it has
    a place for them) and `without_place`.
    """
    own = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    if not own:
        config |= _choose(model) if "added" not in config else {}
        for name in config["added"]:
            linear: Any = _layer(model, name)
            linear.bias = nn.Parameter(torch.zeros(linear.weight.shape[0], dtype=linear.weight.dtype, device=linear.weight.device))
    for name, value in model.named_parameters():
        value.requires_grad_(name.endswith(".bias"))


def _choose(model: Any) -> dict[str, Any]:
    """Find where the architecture of a model without biases can have some."""
    from transformers import AutoModelForCausalLM

    switches = {name: True for name in _SWITCHES if getattr(model.config, name, None) is False}
    wanted = copy.deepcopy(model.config)
    for name in switches:
        setattr(wanted, name, True)
    with torch.device("meta"):
        names = [name for name, _ in AutoModelForCausalLM.from_config(wanted).named_parameters()]
    added = [name.removesuffix(".bias") for name in names if name.endswith(".bias")]
    if added:
        return {"added": added, "switches": switches, "without_place": False}
    layers = {id(module) for layer in decoder_layers(model)[1] for module in layer.modules() if isinstance(module, nn.Linear)}
    return {"added": [name for name, module in model.named_modules() if id(module) in layers], "switches": {}, "without_place": True}


def _layer(model: Any, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise Unavailable(f"this {type(model).__name__} has no layer {name}", "give the base that the adapter was trained on") from None
