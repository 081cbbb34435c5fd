"""Which nodes and weights of a decoder graph did an NPU's compiler take, and which stay on the CPU?

Read off the graph that ships: what the compiler took stands there as EPContext nodes, everything else stands as it was.
"""

from __future__ import annotations

from collections import Counter
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
_UNKNOWN = "the plugin does not say"


def placement(plain: Path, compiled: Path) -> dict[str, Any]:
    """Compare a compiled graph with the one that it was compiled from.

    Args:
        plain: graph before the compiler.
        compiled: graph that ships.

    Returns:
        `nodes` and `nodes_on_npu`, `weight_bytes` and `weight_bytes_on_npu` with their shares, `contexts` (parts that the
        NPU runs without a break) and `on_cpu`: operator -> count, bytes of its weights and the reason.
    """
    before, after = load_graph(plain), load_graph(compiled)
    left = [node for node in after.graph if node.op_type != CONTEXT]
    nodes = len(list(before.graph))
    total, kept = _weight_bytes(before, list(before.graph)), _weight_bytes(after, left)
    on_cpu: dict[str, dict[str, Any]] = {}
    for operator, count in sorted(Counter(node.op_type for node in left).items()):
        own = [node for node in left if node.op_type == operator]
        on_cpu[operator] = {"nodes": count, "weight_bytes": _weight_bytes(after, own), "reason": _REASONS.get(operator, _UNKNOWN)}
    return {
        "nodes": nodes,
        "nodes_on_npu": nodes - len(left),
        "node_share": round((nodes - len(left)) / nodes, 4),
        "weight_bytes": total,
        "weight_bytes_on_npu": total - kept,
        "weight_share": round((total - kept) / total, 4),
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


def _weight_bytes(model: Model, nodes: list[Node]) -> int:
    """Return the bytes of the matrices that some nodes use: what a graph brings, each once."""
    used = {value.name for node in nodes for value in node.inputs if value is not None}
    # A tied embedding's codes come through a Reshape.
    for node in model.graph:
        if node.op_type in ("Reshape", "Transpose") and any(value.name in used for value in node.outputs):
            used.add(node.inputs[0].name)
    tensors = [value.const_value for name, value in model.graph.initializers.items() if name in used]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
