"""Which nodes and weights of a decoder graph did an NPU's compiler take, and which stay on the CPU?

Read off the graph that ships: what the compiler took stands there as EPContext nodes, everything else stands as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.graph.linears import Model, Node, load_graph

CONTEXT = "EPContext"
COMPATIBILITY = "ep_compatibility_info.QNNExecutionProvider"
# Why the QNN plugin 2.7 leaves an operator to the CPU, in its own words or the specification's.
_REASONS = {
    "GatherBlockQuantized": "the plugin takes a quantized embedding on Adreno GPUs only, with 4 bits and without zero points",
    "GroupQueryAttention": "the HTP backend has it for the newest chips only",
}
_SHAPING = ("Reshape", "Transpose")
_UNKNOWN = "the plugin does not say"


def placement(plain: Path, compiled: Path) -> dict[str, Any]:
    """Compare a compiled graph with the one that it was compiled from.

    Args:
        plain: graph before the compiler.
        compiled: graph that ships.

    Returns:
        `nodes` and `nodes_on_npu`, `weight_bytes_on_npu` and `_on_cpu`, the NPU's share of either, `contexts` (parts that the
        NPU runs without a break) and `on_cpu`: operator -> count, bytes of its weights and the reason.
    """
    before, after = load_graph(plain), load_graph(compiled)
    nodes, left = list(before.graph), [node for node in after.graph if node.op_type != CONTEXT]
    names = {node.name for node in left}
    taken = _weight_bytes(before, [node for node in nodes if node.name not in names])
    kept = _weight_bytes(after, left)
    on_cpu: dict[str, dict[str, Any]] = {}
    for operator, count in sorted(Counter(node.op_type for node in left).items()):
        own = [node for node in left if node.op_type == operator]
        on_cpu[operator] = {"nodes": count, "weight_bytes": _weight_bytes(after, own), "reason": _REASONS.get(operator, _UNKNOWN)}
    return {
        "nodes": len(nodes),
        "nodes_on_npu": len(nodes) - len(left),
        "node_share": round((len(nodes) - len(left)) / len(nodes), 4),
        "weight_bytes_on_npu": taken,
        "weight_bytes_on_cpu": kept,
        "weight_share": round(taken / (taken + kept), 4),
        "contexts": sum(node.op_type == CONTEXT for node in after.graph),
        "on_cpu": on_cpu,
    }


def compiled_for(compiled: Path) -> tuple[int, int] | None:
    """Return (soc_model, htp_arch) that a compiled graph says of itself; None where it says nothing.

    The plugin writes `v2:6:2.51.0:5.51.0:73:60:0:0` (onnxruntime-qnn 2.7): backend and SDK versions, then architecture and chip.
    """
    stated = load_graph(compiled).metadata_props.get(COMPATIBILITY, "").split(":")
    if len(stated) < 6 or not (stated[4].isdigit() and stated[5].isdigit()):
        return None
    return int(stated[5]), int(stated[4])


def compiled_problems(plain: Path, compiled: Path, facts: Mapping[str, Any]) -> list[str]:
    """Say where a compiled graph is not what a manifest's facts (`soc`, `placement`) say of it."""
    soc, found = facts["soc"], compiled_for(compiled)
    if found != (soc["soc_model"], soc["htp_arch"]):
        what = "no chip that can be told" if found is None else f"soc_model {found[0]}, htp_arch {found[1]}"
        return [f"it is compiled for {what}, and the package says {soc['name']} ({soc['soc_model']}, {soc['htp_arch']})"]
    stated, seen = facts["placement"][compiled.stem], placement(plain, compiled)
    return [f"{key} is {seen[key]}, and the manifest says {stated[key]}" for key in ("nodes", "nodes_on_npu") if seen[key] != stated[key]]


def _weight_bytes(model: Model, nodes: list[Node]) -> int:
    """Return the bytes of what a graph brings for some nodes, each tensor once.

    A weight that only changes its shape on the way (a tied embedding's) belongs to who uses it; a table that an embedding on
    the CPU and a head on the NPU share is stored on either side, and counts on either.
    """
    names = set()
    for node in nodes:
        for value in node.inputs if node.op_type not in _SHAPING else ():
            while value is not None and (producer := value.producer()) is not None and producer.op_type in _SHAPING:
                value = producer.inputs[0]
            names.add(value.name if value is not None else "")
    tensors = [value.const_value for name, value in model.graph.initializers.items() if name in names]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
