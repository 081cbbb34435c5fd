"""Is a written graph the one that was asked for? Its layers' bits, block sizes and kernels, its twin and its data file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slmops.graph import kernels
from slmops.graph.linears import HEAD, Linear, Model, embedding, linears, load_graph
from slmops.graph.lora import OPERATOR
from slmops.graph.rewriting import ADAPTED, FAST, FULL, MAIN
from slmops.graph.static import dynamic_dimensions
from slmops.targets import Target


def problems(folder: Path, options: dict[str, Any], target: Target | None = None) -> list[str]:
    """Compare an export's graphs with the options of its recipe, and with what its provider can run; return one line per difference.

    Args:
        folder: an export of slmops.
        options: `recipe.options` of its manifest.
        target: that it was made for; None: unknown, and not looked at.
    """
    main = load_graph(folder / MAIN)
    differences = recipe_problems(main, options)
    if (folder / FULL).is_file():
        differences += _twin_problems(main, load_graph(folder / FULL))
    if target is not None and target.provider in kernels.PROVIDERS:
        differences += kernels.kernel_problems(main, target)
        differences += [line for line in kernels.kernel_problems(load_graph(folder / FULL), target) if line not in differences]
        differences += _config_problems(folder / "genai_config.json", target)
    return differences


def recipe_problems(model: Model, options: dict[str, Any]) -> list[str]:
    """Compare the layers of one graph with the options of a recipe; return one line per difference."""
    table = embedding(model) if options.get("embedding") != "float" else None
    found = linears(model) + ([table] if table is not None else [])
    differences = [line for linear in found for line in _layer_problems(linear, options)]
    if not any(linear.name == HEAD for linear in found):
        differences.append(f"the graph has no {HEAD}")
    return differences


def static_problems(path: Path, options: dict[str, Any]) -> list[str]:
    """Say what is wrong with a graph of fixed shapes: a layer unlike the recipe, or a shape that is not fixed."""
    model = load_graph(path)
    return recipe_problems(model, options) + [f"{path.name}: {line} has no fixed shape" for line in dynamic_dimensions(model)]


def _config_problems(path: Path, target: Target) -> list[str]:
    """Say where the runtime's config names another provider than the target's, which would run it somewhere else."""
    try:
        options = json.loads(path.read_text(encoding="utf-8"))["model"]["decoder"]["session_options"]["provider_options"]
        named = [name for option in options for name in option]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{path.name} has no provider options that can be read: {error!r}"]
    if named != [target.config_name]:
        return [f"{path.name} names the providers {named}, and the target's is {target.config_name}"]
    return []


def adapter_problems(folder: Path) -> list[str]:
    """Say what is wrong with the graphs of a package that take adapters, one line each; they differ in nothing but the cut."""
    main, full = load_graph(folder / ADAPTED), load_graph(folder / FULL)
    lines = _twin_problems(main, full) + _twin_problems(load_graph(folder / MAIN), full)
    ours, theirs = _pair_inputs(main), _pair_inputs(full)
    lines += [f"{name} is an input of one graph only" for name in sorted({*ours} ^ {*theirs})]
    lines += [
        f"{name} is {ours[name]} wide in one graph and {theirs[name]} in the other"
        for name in ours
        if ours[name] != theirs.get(name, ours[name])
    ]
    if not ours:
        lines.append(f"{ADAPTED} takes no adapters")
    return lines + (_fast_problems(load_graph(folder / FAST), full) if (folder / FAST).is_file() else [])


def _fast_problems(fast: Model, full: Model) -> list[str]:
    """Say where the graph for our operator is not the same model, or leaves out a layer."""
    lines = [f"{FAST}: {line}" for line in _twin_problems(fast, full)]
    layers = [node.attributes["layer"].as_int() for node in fast.graph if node.op_type == OPERATOR]
    wanted = sum(linear.name != HEAD for linear in linears(fast))
    if layers != list(range(wanted)):
        lines.append(f"{FAST} takes an adapter for the layers {layers}, and has {wanted}")
    return lines


def _pair_inputs(model: Model) -> dict[str, int]:
    return {value.name: int(value.shape[0]) for value in model.graph.inputs if value.name in model.graph.initializers}


def _layer_problems(linear: Linear, options: dict[str, Any]) -> list[str]:
    bits = options["bits"]
    if bits in (16, 32):
        return [f"{linear.name} is quantized to {linear.scheme.bits} bits, and float was asked for"] if linear.scheme else []
    if linear.scheme is None:
        return [f"{linear.name} is float, and {bits} bits were asked for"]
    kind = linear.name.rsplit(".", 1)[-1]
    # A tied embedding lies on the head's tensors and has no entry of its own.
    wanted = options["layers"].get(kind) or options["layers"].get(HEAD, {})
    lines = []
    if (linear.scheme.bits, linear.scheme.block_size) != (wanted.get("bits"), wanted.get("block_size")):
        lines.append(
            f"{linear.name} has {linear.scheme.bits} bits in blocks of {linear.scheme.block_size}, and the recipe says "
            f"{wanted.get('bits')} in {wanted.get('block_size')}"
        )
    if linear.accuracy_level is not None and linear.accuracy_level != options["accuracy_level"]:
        lines.append(f"{linear.name} has accuracy level {linear.accuracy_level}, and the recipe says {options['accuracy_level']}")
    return lines


def _twin_problems(main: Model, full: Model) -> list[str]:
    """The twins must read the same tensors of the same file at the same place."""
    ours, theirs = _places(main), _places(full)
    lines = [f"the twin graph has no tensor {name}" for name in ours if name not in theirs and "last_token" not in name]
    lines += [f"{name} lies elsewhere in the twin graph" for name, place in ours.items() if name in theirs and place != theirs[name]]
    if len(list(linears(main))) != len(list(linears(full))):
        lines.append("the twin graph has another number of linear layers")
    return lines


def _places(model: Model) -> dict[str, tuple[Any, ...]]:
    """Return where each large initializer lies: (file, offset, length)."""
    import onnx_ir as ir

    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: (t.location, t.offset, t.length) for name, t in tensors.items() if isinstance(t, ir.ExternalTensor)}
