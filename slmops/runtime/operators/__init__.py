"""Which operator do we bring to onnxruntime, and where does it come from? All LoRA pairs of a layer, added to its product in one pass.

onnxruntime's own operators take two a pair and an input each for A and B: on a model of 100 M weights, whose layers are done in microseconds,
an adapter then costs a quarter of the decoding speed. A package of such a model has a second graph for its adapters (`model_adapters_fast.onnx`)
that calls `slmops.Lora`, with one input for a whole adapter, in half precision. It runs where this machine's compiler makes the operator, in
seconds, once; everywhere else, and in any other program that opens the package, the graph of onnxruntime's own operators does.
"""

from __future__ import annotations

import base64
import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from slmops import environment, progress
from slmops.compiling import NotCompiled, compiler, library, switched_off
from slmops.graph.lora import ADAPTER, A, B
from slmops.runtime.operators.packing import packed, rounded

SOURCE = Path(__file__).with_name("lora.cpp")
# A graph of one node, y = Lora(x, p, adapter), x, p and y (t, 16), layer 0 (IR 8, opset 17); a test makes it anew and compares.
ONE_NODE = base64.b64decode(
    "CAg6kQEKLgoBeAoBcAoHYWRhcHRlchIBeSIETG9yYSoMCgVsYXllchgAoAECOgZzbG1vcHMSAWdaFAoBeBIPCg0IARIJCgMSAXQKAggQWhQKAXASDwoNCAESCQoDEgF0"
    "CgIIEFoaCgdhZGFwdGVyEg8KDQgCEgkKBxIFYnl0ZXNiFAoBeRIPCg0IARIJCgMSAXQKAggQQgQKABARQgoKBnNsbW9wcxAB"
)
# Of the largest number: sums of 80 products in fp32, in another order.
_TOLERANCE = 1e-5


def register(options: Any) -> None:
    """Let an `onnxruntime.SessionOptions` find the operator; call where `library_name` has one."""
    name = library_name()
    if name is not None:
        options.register_custom_ops_library(name)


def library_name() -> str | None:
    """Return what the dynamic linker knows our library by, once it is in this process; None where this machine has none.

    A bare name: onnxruntime-genai 0.18 takes no path outside the package's folder, and what is loaded already is found by its name.
    """
    return _found()[0]


def why_not_compiled() -> str | None:
    """Say why adapters run on onnxruntime's own operators; None where they do not, or were told to."""
    return _found()[1]


@cache
def _found() -> tuple[str | None, str | None]:
    if switched_off():
        return None, None
    try:
        compiler()
    except NotCompiled as error:
        return None, str(error)  # as it is on most devices, and `slmops doctor` says so
    name = None
    try:
        found = library(SOURCE)
        name = Path(found._name).name
        ctypes.CDLL(name)
        reason = disagreement(found) or _refusal(name)
    except (NotCompiled, OSError) as error:
        reason = str(error)
    if reason is not None:
        progress.say(f"adapters run on onnxruntime's own operators, which takes longer: {reason}")
        return None, reason
    return name, None


def _refusal(name: str) -> str | None:
    """Say why onnxruntime does not run the operator, or what else it computes; None where it does."""
    ort = environment.require("onnxruntime", "to run a package")
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 2
    numbers = np.random.default_rng(0)
    x, product = (numbers.standard_normal((40, 16), np.float32) for _ in "xp")
    pair = rounded({"0" + side: numbers.standard_normal((16, 5), np.float32) for side in (A, B)})
    try:
        options.register_custom_ops_library(name)
        session = ort.InferenceSession(ONE_NODE, options, providers=["CPUExecutionProvider"])
        answer = session.run(None, {"x": x, "p": product, ADAPTER: packed(pair, [[("0", [16])]])})[0]
    except Exception as error:  # the binding's own classes derive from Exception alone
        return f"onnxruntime does not take the compiled operator ({str(error).splitlines()[0][:200]})"
    right = product + x.astype(np.float64) @ pair["0" + A] @ pair["0" + B].T
    off = float(np.abs(answer - right).max()) > _TOLERANCE * float(np.abs(right).max())
    return "onnxruntime computes something else with the compiled operator; please report it" if off else None


def disagreement(found: ctypes.CDLL) -> str | None:
    """Say that the library computes something else than numpy on random numbers; None where it does not."""
    numbers = np.random.default_rng(0)
    for tokens, inputs, outputs, rank in ((1, 80, 48, 16), (1, 37, 70, 13), (9, 37, 70, 13), (40, 80, 48, 32)):
        x, y = (numbers.standard_normal((tokens, width), np.float32) for width in (inputs, outputs))
        a, b = (numbers.standard_normal((width, rank), np.float32) for width in (inputs, outputs))
        pair = rounded({"0" + A: a, "0" + B: b})
        right = y + x.astype(np.float64) @ pair["0" + A] @ pair["0" + B].T
        wrong = multiply(found, packed(pair, [[("0", [outputs])]]), 0, x, y)
        if wrong or not float(np.abs(y - right).max()) <= _TOLERANCE * float(np.abs(right).max()):
            return f"the compiled operator is off ({wrong or 'other numbers'}); please report it"
    return None


def multiply(found: ctypes.CDLL, adapter: np.ndarray, layer: int, x: np.ndarray, y: np.ndarray) -> str | None:
    """Add what a layer's pairs make of x (tokens, inputs) to y (tokens, outputs), in place; return what is wrong with the adapter."""
    found.slmops_lora.restype = ctypes.c_char_p
    places = [ctypes.c_void_p(array.ctypes.data) for array in (x, y, adapter)]
    said = found.slmops_lora(*places, *(ctypes.c_int64(size) for size in (adapter.size, layer, *x.shape, y.shape[1])))
    return said.decode() if said is not None else None
