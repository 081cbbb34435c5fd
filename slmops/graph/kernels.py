"""Does a provider have a kernel for every node of a graph, in the types that the node has? Told from tables, without the provider.

A node that no kernel takes is given to the CPU by onnxruntime without a word, and what it reads and writes is copied there
and back at every token. For the few nodes that count tokens (integers: the attention mask's sums and shapes) that is how
every provider works; for one that computes with floats it is an error here.

Sources of the tables, which hold the operators that decoders are made of, with the float types of each:
CUDA and DirectML: onnxruntime, docs/OperatorKernels.md at commit 001d12d2623f (2026), opsets 21 and 22.
WebGPU: onnxruntime, core/providers/webgpu/webgpu_execution_provider.cc (003f772b21ab) and
contrib_ops/webgpu/webgpu_contrib_kernels.cc (01671d9c4e01); its float types are float32 and float16.
TensorRT-RTX: onnx-tensorrt, docs/operators.md of TensorRT 10.15; the operators that are onnxruntime's own, by the importers of
the parser that onnxruntime-ep-nv-tensorrt-rtx-cu13 0.5.0 brings (libtensorrt_onnxparser_rtx 1.7.1), whose types nobody lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slmops.graph.element_types import element_types, is_float
from slmops.graph.linears import Model, Node
from slmops.targets import Target

_MICROSOFT = "com.microsoft"
_LETTERS = {"FLOAT": "f", "FLOAT16": "h", "BFLOAT16": "b"}
_NAMES = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}


def _kernels(onnx: dict[str, str], microsoft: dict[str, str]) -> dict[tuple[str, str], str]:
    """Return (domain, operator) -> letters of its float types (f: float32, h: float16, b: bfloat16)."""
    return {
        (domain, name): letters
        for domain, groups in (("", onnx), (_MICROSOFT, microsoft))
        for letters, names in groups.items()
        for name in names.split()
    }


_KERNELS = {
    "cuda": _kernels(
        {
            "fhb": "Add Cast Concat ConstantOfShape Div Erf Exp Expand Flatten Gather GatherElements Gelu Gemm Identity "
            "LayerNormalization MatMul Max Min Mod Mul Neg Pow ReduceSum Relu Reshape ScatterElements ScatterND Shape Sigmoid Sign "
            "SimplifiedLayerNormalization Slice Softmax Split Sqrt Squeeze Sub Sum Tanh Tile Transpose Trilu Unsqueeze Where",
            "fh": "Ceil Clip Cos CumSum Equal Floor Greater GreaterOrEqual Less LessOrEqual Log LogSoftmax Reciprocal ReduceMax "
            "ReduceMean ReduceMin Round Sin Softplus TopK",
            "f": "Range",
        },
        {
            "fhb": "BiasGelu FastGelu FusedMatMul GatherBlockQuantized Gelu MatMulNBits MultiHeadAttention QuickGelu RotaryEmbedding "
            "SkipLayerNormalization SkipSimplifiedLayerNormalization",
            "hb": "GroupQueryAttention",
        },
    ),
    "dml": _kernels(
        {
            "fh": "Add Cast Ceil Clip Concat ConstantOfShape Cos CumSum Div Equal Erf Exp Expand Flatten Floor Gather GatherElements "
            "Gemm Greater GreaterOrEqual Identity LayerNormalization Less LessOrEqual Log LogSoftmax MatMul Max Min Mod Mul Neg "
            "Reciprocal ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape Round ScatterElements ScatterND Shape Sigmoid Sign "
            "SimplifiedLayerNormalization Sin Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Trilu "
            "Unsqueeze Where",
            "f": "Range",
        },
        {
            "fh": "BiasGelu FastGelu FusedMatMul Gelu GroupQueryAttention MatMulNBits MultiHeadAttention QuickGelu RotaryEmbedding "
            "SkipLayerNormalization SkipSimplifiedLayerNormalization"
        },
    ),
    "webgpu": _kernels(
        {
            "fh": "Add Cast Ceil Clip Concat Cos CumSum Div Equal Erf Exp Expand Flatten Floor Gather GatherElements Gelu Gemm Greater "
            "GreaterOrEqual LayerNormalization Less LessOrEqual Log MatMul Mul Neg Pow Reciprocal ReduceMax ReduceMean ReduceMin "
            "ReduceSum Relu Reshape Shape Sigmoid SimplifiedLayerNormalization Sin Slice Softmax Split Sqrt Squeeze Sub Tanh Tile "
            "Transpose Unsqueeze Where",
            "f": "Range",
        },
        {
            "fh": "BiasGelu FastGelu GatherBlockQuantized Gelu GroupQueryAttention MatMulNBits MultiHeadAttention QuickGelu "
            "RotaryEmbedding SkipLayerNormalization SkipSimplifiedLayerNormalization"
        },
    ),
    "trt-rtx": _kernels(
        {
            "fhb": "Add Cast Ceil Clip Concat ConstantOfShape Cos CumSum Div Equal Erf Exp Expand Flatten Floor Gather GatherElements "
            "GatherND Gelu Gemm Greater GreaterOrEqual Identity LayerNormalization Less LessOrEqual Log LogSoftmax MatMul Max Min "
            "Mod Mul Neg Pow Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape RMSNormalization "
            "RotaryEmbedding Round ScatterElements ScatterND Shape Sigmoid Sign SimplifiedLayerNormalization Sin Slice Softmax Softplus "
            "Split Sqrt Squeeze Sub Sum "
            "Tanh Tile TopK Transpose Trilu Unsqueeze Where"
        },
        {"fhb": "RotaryEmbedding SkipSimplifiedLayerNormalization", "hb": "GroupQueryAttention MatMulNBits MultiHeadAttention"},
    ),
}
# What slmops checks a graph for; of every other provider onnxruntime itself is asked (the CPU runs the graph).
PROVIDERS = tuple(_KERNELS)
# Their float inputs may differ in type: a weight beside its scales, a norm's scale, an exponent.
_MIXED = frozenset({"Cast", "GatherBlockQuantized", "LayerNormalization", "Pow", "SimplifiedLayerNormalization"})
_PRODUCTS = frozenset({"Gemm", "GroupQueryAttention", "MatMul", "MatMulNBits", "MultiHeadAttention"})


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a graph will run, by the tables."""

    provider: int
    host: int
    """Nodes of integers only, which onnxruntime may leave on the CPU."""


def placement(model: Model) -> Placement:
    """Count the nodes that compute with floats, which are the provider's, and those of integers only."""
    types = element_types(model)
    floats = sum(bool(_floats(node, types)) for node in model.graph)
    return Placement(floats, sum(1 for _ in model.graph) - floats)


def kernel_problems(model: Model, target: Target) -> list[str]:
    """Say what of a graph the target's provider cannot run as it should, one line each.

    Checked are: an operator that the provider has no kernel for, or none in its types; floats of two types in one node;
    a product in another type than the target's; logits and cache in another type than the runtime expects.
    """
    table, types = _KERNELS[target.provider], element_types(model)
    lines: list[str] = []
    for node in model.graph:
        lines += _node_problems(node, types, table, target)
    return lines + _interface_problems(model, types, target)


def _node_problems(node: Node, types: dict[str, Any], table: dict[tuple[str, str], str], target: Target) -> list[str]:
    floats = _floats(node, types)
    if not floats or node.op_type == "Constant":  # a constant is no node of the session: it becomes a weight
        return []
    domain = "" if node.domain == "ai.onnx" else node.domain
    what = f"{node.name}: {f'{domain}.' if domain else ''}{node.op_type}"
    kernel = table.get((domain, node.op_type))
    if kernel is None:
        return [f"{what} has no kernel on {target.provider} that slmops knows of"]
    lines = [
        f"{what} has no {_named(name)} kernel on {target.provider}" for name in sorted(floats) if _LETTERS.get(name, "?") not in kernel
    ]
    given = {types[v.name].name for v in node.inputs if v is not None and is_float(types.get(v.name))}
    if len(given) > 1 and node.op_type not in _MIXED:
        lines.append(f"{what} takes {' and '.join(sorted(map(_named, given)))} at once")
    elif node.op_type in _PRODUCTS and given and target.float_type not in given:
        lines.append(f"{what} is computed in {_named(given.pop())}, and {_named(target.float_type)} was asked for")
    if target.provider == "dml" and node.op_type == "MatMulNBits":
        lines += _dml_problems(node, what)
    return lines


def _dml_problems(node: Node, what: str) -> list[str]:
    """DirectML reads 4-bit zero points as one packed tensor; the operator's definition pads each row to a whole byte.

    Source: onnxruntime, DmlOperatorMatMulNBits.cpp (171d61606f93), against docs/ContribOperators.md.
    """
    size = {name: int(node.attributes[name].as_int()) for name in ("K", "bits", "block_size")}
    blocks = -(-size["K"] // size["block_size"])
    if size["bits"] == 4 and blocks % 2 and len(node.inputs) > 3 and node.inputs[3] is not None:
        return [f"{what} has {blocks} blocks a row, and dml reads 4-bit zero points rightly for an even number only"]
    return []


def _interface_problems(model: Model, types: dict[str, Any], target: Target) -> list[str]:
    lines = []
    cache = [v for v in (*model.graph.inputs, *model.graph.outputs) if v.name.startswith(("past_key_values.", "present."))]
    # The builder keeps the logits of a bfloat16 model in float32 (onnxruntime-genai 0.18, make_outputs_init).
    wanted = {value.name: target.float_type for value in cache}
    wanted["logits"] = "FLOAT" if target.float_type == "BFLOAT16" else target.float_type
    declared = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    for name, expected in wanted.items():
        found, computed = declared.get(name), types.get(name)
        if found is None:
            lines.append(f"the graph has no {name} of a known type")
        elif found.name != expected:
            lines.append(f"{name} is {_named(found.name)}, and the runtime expects {_named(expected)}")
        elif computed is not None and computed.name != expected:
            lines.append(f"{name} is declared {_named(expected)} and computed in {_named(computed.name)}")
    return lines


def _floats(node: Node, types: dict[str, Any]) -> set[str]:
    """Return the names of the float types that a node reads or writes."""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    return {types[value.name].name for value in values if is_float(types.get(value.name))}


def _named(dtype: str) -> str:
    return _NAMES.get(dtype, dtype.lower())
