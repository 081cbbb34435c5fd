"""Where are a decoder's layers, and in each the attention and the MLP? By structure first, by name last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from slmops.errors import Unavailable

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn")


def decoder_layers(model: Any) -> tuple[Any, list[Any]]:
    """Return the module that holds the decoder's layers, and the layers in order.

    Raises:
        Unavailable: there is no list of as many layers as the config tells.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    for module in model.modules():
        for child in module.children():
            if type(child).__name__ == "ModuleList" and len(child) == count:
                return module, list(child)
    raise Unavailable(
        f"a {type(model).__name__} keeps its layers where slmops does not find them", "use --method lora, which needs linear layers alone"
    )


def sublayers(model: Any) -> Iterator[Any]:
    """Yield the attention and the MLP of each layer, in order.

    Raises:
        Unavailable: a layer has them under names that slmops does not know.
    """
    for layer in decoder_layers(model)[1]:
        for names in (_ATTENTION, _MLP):
            found = next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
            if found is None:
                has = ", ".join(name for name, _ in layer.named_children())
                raise Unavailable(f"a layer of {type(model).__name__} has no {names[0]}: it has {has}", "use --method lora")
            yield found


def norms(model: Any) -> Iterator[Any]:
    """Yield the normalizations around the blocks, and the last one; not those of queries and keys."""
    parent, layers = decoder_layers(model)
    for owner in (*layers, parent):
        yield from (child for child in owner.children() if type(child).__name__.endswith("Norm"))


def replaced(output: Any, hidden: Any) -> Any:
    """Return a block's output, a tensor or a tuple that begins with it, with another tensor in place."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def hidden_of(output: Any) -> Any:
    """Return the hidden representation in a block's output."""
    return output[0] if isinstance(output, tuple) else output
