"""Which parts of a model are computed another way while it trains? Those that compute the same, as a check on each shows.

Nothing is rewritten that is not recognized: a layer of a kind that these modules do not know keeps its own forward.
What is recognized by its form is held against its own forward on random input before it is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from slmops.training.step.attention import WINDOWS
from slmops.training.step.block import AdaptedAttention
from slmops.training.step.kernels import Attention, kernels_for
from slmops.training.step.lora import AdaptedLinear, AdaptedMLP, Focus, stacked, tick_of
from slmops.training.step.norms import FrozenRMSNorm
from slmops.training.step.pairs import Adapted, Pair, PairStore, kernels_of
from slmops.training.step.rows import KEY, Rows

_QKV, _OUT = ("q_proj", "k_proj", "v_proj"), "o_proj"
_GATED, _DOWN = ("gate_proj", "up_proj"), "down_proj"
# Largest error, relative to the largest output, that the order of sums and the precision make.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass
class Patched:
    """What is computed another way."""

    store: PairStore | None = None
    """All LoRA pairs that are; None where there is none."""
    layers: list[Adapted] = field(default_factory=list)
    """All that are computed by hand."""
    attentions: list[tuple[nn.Module, Adapted, Adapted]] = field(default_factory=list)
    """Attention layers whose projections could be one block with their attention: the layer, q, k and v, and the output."""
    focus: Focus = field(default_factory=Focus)
    """Of the last MLP."""
    kinds: dict[str, int] = field(default_factory=dict)
    """How many parts of each kind."""
    left: list[str] = field(default_factory=list)
    """Adapted layers that keep PEFT's forward."""

    def count(self, kind: str) -> None:
        """Count one more part of a kind."""
        self.kinds[kind] = self.kinds.get(kind, 0) + 1


def speed_up(model: nn.Module) -> Patched:
    """Replace, in place, the forwards of frozen and LoRA-adapted linear layers, gated MLPs and frozen RMSNorms.

    Args:
        model: a model of transformers, wrapped by PEFT or not, on the device and in the precision that it trains in.
    """
    patched, read, done = Patched(), [], set()
    for name, module in list(model.named_modules()):
        if id(module) in done:
            continue
        for names, last in ((_QKV, _OUT), (_GATED, _DOWN)):
            found = _group(module, names, last)
            if found is not None:
                read.append((module, names, last, *found))
                done |= {id(x) for part in (*names, last) for x in getattr(module, part).modules()}
        if type(module).__name__.endswith("RMSNorm") and _replace_norm(module):
            patched.count("norms")
        elif _is_adapted(module) and id(module) not in done:
            layer = _read([module])
            if layer is None:
                patched.left.append(name)
            else:
                read.append((module, (), "", layer, None))
    patched.layers = [layer for _, _, _, *both in read for layer in both if layer is not None]
    if any(layer.pairs for layer in patched.layers):
        patched.store = PairStore(patched.layers, kernels_of(patched.layers))
        patched.store.begin()
    for module, names, last, first, second in read:
        _replace(patched, module, names, last, first, second)
    mlps = [module for module, names, *_ in read if names == _GATED]
    if mlps and patched.kinds.get("mlps") == len(mlps):
        mlps[-1].forward = patched.focus.of(mlps[-1].forward)  # type: ignore[method-assign]
    return patched


def fuse_attention(patched: Patched) -> None:
    """Replace the forwards of attention layers that are of the common form; they run on joined rows only."""
    for module, qkv, out in patched.attentions:
        forward = _attention_of(module, qkv, out)
        if forward is not None:
            module.forward = forward  # type: ignore[method-assign]
            patched.count("attentions")


def _replace(patched: Patched, module: Any, names: tuple[str, ...], last: str, first: Adapted, second: Adapted | None) -> None:
    if second is None:
        module.forward = _alone(first)
        patched.count("linears")
        return
    if names == _GATED and _replace_mlp(module, first, second):
        patched.count("mlps")
        return
    _replace_together([getattr(module, name) for name in names], first)
    getattr(module, last).forward = _alone(second)
    patched.count("linears")
    patched.count("linears")
    if names == _QKV:
        patched.attentions.append((module, first, second))


def _group(module: nn.Module, names: tuple[str, ...], last: str) -> tuple[Adapted, Adapted] | None:
    """Return the layers of these names that read one input, as one, and the one behind them."""
    parts = dict(module.named_children())
    if not all(name in parts for name in (*names, last)):
        return None
    first, second = _read([parts[name] for name in names]), _read([parts[last]])
    return (first, second) if first is not None and second is not None else None


def _read(modules: list[nn.Module]) -> Adapted | None:
    """Return linear layers that read the same input as one; None where one does more than a product and a LoRA pair."""
    linears = [_linear_of(module) for module in modules]
    found = [linear for linear in linears if linear is not None]
    pairs, at = [], 0
    for module, linear in zip(modules, linears, strict=True):
        if linear is None:
            return None
        pair = _pair_of(module, slice(at, at + linear.out_features))
        if pair is False:
            return None
        pairs += [pair] if isinstance(pair, Pair) else []
        at += linear.out_features
    alike = {(x.in_features, x.weight.dtype, x.weight.device, x.bias is None) for x in found}
    if len(alike) > 1 or any(p.requires_grad for x in found for p in x.parameters()):
        return None
    weight = stacked([x.weight for x in found]) if len(found) > 1 else found[0].weight.data
    bias = None if found[0].bias is None else torch.cat([x.bias.data for x in found])
    return Adapted(weight, bias, tuple(x.out_features for x in found), pairs)


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def _linear_of(module: nn.Module) -> nn.Linear | None:
    """Return the frozen layer under an adapted one, or the layer itself; None where it is no plain linear layer."""
    inner: Any = module.get_base_layer() if _is_adapted(module) else module  # type: ignore[operator]
    return inner if type(inner) is nn.Linear and not _hooked(inner) and not _hooked(module) else None


def _pair_of(module: Any, outputs: slice) -> Pair | None | bool:
    """Return a layer's pair; None where it has none; False where PEFT does more than y + s B A x."""
    if not _is_adapted(module):
        return None
    active = list(module.active_adapters)
    if len(active) != 1 or module.merged or module.disable_adapters or getattr(module, "fan_in_fan_out", False):
        return False
    name = active[0]
    if name not in module.lora_A:
        return None
    down, up, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    plain = type(down) is nn.Linear and type(up) is nn.Linear and down.bias is None and up.bias is None
    drops = not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0
    trained = plain and down.weight.requires_grad and up.weight.requires_grad  # AdaLoRA's A and B are parameters themselves
    if not plain or drops or not trained or name in getattr(module, "lora_variant", {}):
        return False
    a, b = cast(nn.Parameter, down.weight), cast(nn.Parameter, up.weight)
    return Pair(a, b, float(module.scaling[name]), outputs)


def _alone(layer: Adapted) -> Callable[..., torch.Tensor]:
    return lambda x, *args, **kwargs: AdaptedLinear.apply(x, tick_of(layer), layer)[0]


def _replace_together(modules: list[nn.Module], layer: Adapted) -> None:
    """Let layers that are called with the same input, one after the other, be one product."""
    waiting: dict[Any, torch.Tensor] = {}

    def forward_of(place: int) -> Callable[..., torch.Tensor]:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if waiting.get("input") is not x or place not in waiting:
                waiting.clear()
                waiting.update(enumerate(AdaptedLinear.apply(x, tick_of(layer), layer)))  # type: ignore[arg-type]
                waiting["input"] = x
            answer = waiting.pop(place)
            if len(waiting) == 1:
                waiting.clear()  # all have been asked for: hold nothing
            return answer

        return forward

    for place, module in enumerate(modules):
        module.forward = forward_of(place)  # type: ignore[method-assign]


def _replace_mlp(module: nn.Module, first: Adapted, second: Adapted) -> bool:
    if [name for name, _ in module.named_children() if name not in (*_GATED, _DOWN, "act_fn", "activation_fn")]:
        return False

    kernels = kernels_for(first.weight, *first.widths)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return AdaptedMLP.apply(x, tick_of(first, second), first, second, kernels)

    if not _same(module, forward, first.weight.shape[1], first.weight):
        return False
    module.forward = forward  # type: ignore[method-assign]
    return True


def _replace_norm(module: Any) -> bool:
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.requires_grad or not isinstance(epsilon, float) or weight.ndim != 1:
        return False
    held, kernels = weight.data, kernels_for(weight, len(weight))

    def forward(x: torch.Tensor) -> torch.Tensor:
        return FrozenRMSNorm.apply(x, held, epsilon, kernels)

    if not _same(module, forward, len(held), held):
        return False
    module.forward = forward
    return True


def _attention_of(module: Any, qkv: Adapted, out: Adapted) -> Callable[..., Any] | None:
    """Return a forward for an attention layer of the common form; None where it is of another."""
    width, config = getattr(module, "head_dim", None), getattr(module, "config", None)
    children = {name for name, _ in module.named_children()}
    if not isinstance(width, int) or config is None or children - {*_QKV, _OUT} or len(qkv.widths) != 3 or qkv.widths[1] != qkv.widths[2]:
        return None
    heads = (qkv.widths[0] // width, qkv.widths[1] // width)
    scale, windows = getattr(module, "scaling", width**-0.5), []
    own, kernels = module.forward, kernels_for(qkv.weight, width)

    def forward(hidden_states: torch.Tensor, position_embeddings: Any = None, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs.get(KEY)
        drops = module.training and getattr(module, "attention_dropout", 0.0)
        if rows is None or rows.longest > kernels.longest_row or drops or position_embeddings is None:
            return own(hidden_states, position_embeddings, *args, **kwargs)
        cosines, sines = (x[0].index_select(0, rows.longest_tokens).float() for x in position_embeddings)
        if cosines.shape[-1] != width:  # a part of each head is turned
            return own(hidden_states, position_embeddings, *args, **kwargs)
        window = windows[0] if windows else None
        seen = window if window is not None and window < rows.longest else None
        how = Attention(rows, heads, scale, seen, (cosines, sines))
        z = AdaptedAttention.apply(hidden_states, tick_of(qkv, out), how, qkv, out, kernels)
        return z, None

    return forward if _same_attention(own, forward, qkv.weight, width, windows) else None


@torch.no_grad()
def _same_attention(
    own: Callable[..., Any], forward: Callable[..., Any], like: torch.Tensor, width: int, windows: list[int | None]
) -> bool:
    """Tell whether a forward gives what an attention layer's own gives, and find the window that it uses."""
    generator = torch.Generator().manual_seed(0)
    rows = Rows([7, 4]).to(like.device)
    x = torch.randn(1, rows.tokens, like.shape[1], generator=generator).to(like.device)
    angles = rows.positions()[:, None] * torch.rand(width // 2, generator=generator)
    turns = tuple(t(torch.cat([angles, angles], dim=-1))[None].to(like.device) for t in (torch.cos, torch.sin))
    try:
        expected = own(x, turns, None, **{KEY: rows, WINDOWS: windows})[0]
        return _close(expected, forward(x, turns, None, **{KEY: rows})[0], like.dtype)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False


@torch.no_grad()
def _same(module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], width: int, like: torch.Tensor) -> bool:
    """Tell whether a forward gives what a module's own gives, on random input."""
    x = torch.randn(1, 5, width, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    return not _hooked(module) and _close(module(x), forward(x), like.dtype)


def _close(own: torch.Tensor, ours: torch.Tensor, dtype: torch.dtype) -> bool:
    bound = _TOLERANCE.get(dtype, 5e-2) * float(own.float().abs().max()) + 1e-8
    return own.shape == ours.shape and bool((own.float() - ours.float()).abs().max() <= bound)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
