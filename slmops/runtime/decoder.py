"""How is a decoder graph asked for logits, batched and exactly?

The graph is driven through onnxruntime itself: onnxruntime-genai 0.18's Generator holds at most 32 rows, answers wrongly
and silently for a padded batch of a graph with a pruned head, and takes a pad token for a trailing token of a prompt.
The kernels are the same, and so are the logits, bit for bit.

Two rules keep a row's answer the same whatever stands beside it. Every prompt is prefilled alone: neither padding nor
neighbours can change it. And a prefill is never cut so that its last piece is one token: MatMulNBits answers one-token
runs by another kernel (int4: logits up to 0.5 away).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

from slmops import environment
from slmops.errors import BadArtifact, RunFailed, Unavailable
from slmops.graph.lora import ADAPTER
from slmops.graph.rewriting import FAST
from slmops.runtime import adapter_files, operators
from slmops.runtime.providers import open_session, provider_of
from slmops.targets import Target

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": np.uint16,  # numpy has no bfloat16, and nobody looks into a cache
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}
_BFLOAT16 = 16  # of onnx.TensorProto.DataType


class Cache:
    """Keys and values of a batch, each (rows, heads, capacity, head size), written in place by the graph."""

    def __init__(self, decoder: Decoder, rows: int, capacity: int) -> None:
        self.arrays = [np.zeros((rows, heads, capacity, size), dtype) for heads, size, dtype in decoder.cache_shapes]

    def keep(self, rows: np.ndarray) -> None:
        """Drop all rows but these."""
        self.arrays = [array[rows] for array in self.arrays]

    def row(self, index: int) -> list[np.ndarray]:
        """Return contiguous views of one row: the graph writes through them."""
        return [array[index : index + 1] for array in self.arrays]


class Decoder:
    """One ONNX decoder graph: its session, the names of its inputs, the shape of its cache.

    Args:
        folder: a folder that onnxruntime-genai runs.
        config: its `genai_config.json`.
        filename: the graph to load.
        threads: for its operators.

    Raises:
        BadArtifact: the graph cannot be loaded or does not fit the config.
        Unavailable: its provider is not here, or it was built without shared cache buffers.
    """

    def __init__(self, folder: Path, config: dict[str, Any], filename: str, threads: int) -> None:
        details = config["model"]["decoder"]
        if not config["search"].get("past_present_share_buffer", False):
            raise Unavailable(f"{folder} does not share its cache buffers (no GroupQueryAttention)", "export it again with slmops")
        self.session = _session(folder / filename, threads, provider_of(config))
        inputs = {value.name: value for value in self.session.get_inputs()}
        outputs = {value.name: value for value in self.session.get_outputs()}
        self.has_positions = "position_ids" in inputs
        layers = details["num_hidden_layers"]
        self.past = [details["inputs"][key] % i for i in range(layers) for key in ("past_key_names", "past_value_names")]
        self.present = [details["outputs"][key] % i for i in range(layers) for key in ("present_key_names", "present_value_names")]
        missing = {*self.past, "input_ids", "attention_mask"} - set(inputs)
        unknown = set(inputs) - {*self.past, "input_ids", "attention_mask", "position_ids"}
        if missing or unknown or "logits" not in outputs:
            names = ", ".join(sorted(missing | unknown)[:3]) or "logits"
            raise BadArtifact(f"{folder / filename} does not fit its genai_config.json: {names}", "export the model again")
        self.cache_shapes = [
            (
                _size(inputs[name].shape[1], details["num_key_value_heads"]),
                _size(inputs[name].shape[3], details["head_size"]),
                _DTYPES[inputs[name].type],
            )
            for name in self.past
        ]
        self.vocabulary = _size(outputs["logits"].shape[2], config["model"]["vocab_size"])
        self.last_only = outputs["logits"].shape[1] == 1
        self.adapter_widths: dict[str, int] = {value.name: value.shape[0] for value in self.session.get_overridable_initializers()}
        """The first dimension of each tensor that an adapter may bring; none where the graph takes no adapters."""
        self.takes_packed = list(self.adapter_widths) == [ADAPTER]
        """It takes an adapter as one input, for our operator, which checks it."""
        self._adapter: dict[str, Any] = {}

    def with_adapter(self, tensors: Mapping[str, np.ndarray]) -> Decoder:
        """Return this decoder with an adapter's tensors in its inputs: the same session, and none of the tensors copied.

        Raises:
            BadArtifact: a tensor is no input of the graph, or has another shape; onnxruntime would say nothing.
        """
        ort = environment.require("onnxruntime", "to run a package")
        wrong = adapter_files.problems(tensors, self.adapter_widths) if not self.takes_packed else []
        if wrong:
            raise BadArtifact(f"the adapter does not fit the graph: {'; '.join(wrong[:3])}", "pack the adapter again")
        adapted = copy(self)
        adapted._adapter = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}
        return adapted

    def run(self, ids: np.ndarray, ends: np.ndarray, cache: list[np.ndarray]) -> np.ndarray:
        """Run the graph once.

        Args:
            ids: (rows, tokens) new tokens.
            ends: (rows,) how many tokens each row holds afterwards.
            cache: of `Cache`, written in place.

        Returns:
            Logits (rows, tokens or 1, vocabulary), float32.
        """
        ort = environment.require("onnxruntime", "to run a package")
        mask = (np.arange(int(ends.max()))[None] < ends[:, None]).astype(np.int64)  # GroupQueryAttention reads the sum of each row
        binding = self.session.io_binding()
        for past, present, array in zip(self.past, self.present, cache, strict=True):
            value = _value(ort, array)  # on a CPU no copy: the array's own memory
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        for name, value in self._adapter.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, np.int64))
        binding.bind_cpu_input("attention_mask", mask)
        if self.has_positions:
            positions = ends[:, None] - ids.shape[1] + np.arange(ids.shape[1])[None]
            binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions, np.int64))
        binding.bind_output("logits", "cpu")
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # the binding's own classes derive from Exception alone
            if not isinstance(error, RuntimeError) and not type(error).__module__.startswith("onnxruntime"):
                raise
            raise RunFailed(f"the graph failed: {_first_line(error)}", "export the model again; `slmops verify` names the stage") from error
        return binding.get_outputs()[-1].numpy().astype(np.float32, copy=False)  # bound last, so it is last

    def prefill(self, ids: Sequence[int], cache: list[np.ndarray], piece_tokens: int) -> np.ndarray:
        """Put a whole prompt into a one-row cache; return the logits of its last token, (vocabulary,)."""
        logits = np.empty(0)
        for start, end in pieces(len(ids), piece_tokens):
            logits = self.run(np.array([ids[start:end]]), np.array([end]), cache)
        return logits[0, -1]


def pieces(length: int, limit: int) -> list[tuple[int, int]]:
    """Cut `length` tokens into even pieces of at most `limit`; none has one token unless the whole has."""
    edges = np.linspace(0, length, -(-length // max(limit, 3)) + 1).astype(int)
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def greedy(logits: np.ndarray) -> np.ndarray:
    """Return the ids (...) of the highest of logits (..., vocabulary), the lowest id among equals.

    Raises:
        RunFailed: a logit is not finite (onnxruntime-genai would answer 0).
    """
    best = logits.argmax(-1)
    if not np.isfinite(np.take_along_axis(logits, best[..., None], -1)).all():
        raise RunFailed("the model gives logits that are not finite", "its files are damaged or its numbers overflow; export it again")
    return best


def _value(ort: Any, array: np.ndarray) -> Any:
    if array.dtype == np.uint16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def _session(path: Path, threads: int, target: Target | None) -> Any:
    ort = environment.require("onnxruntime", "to run a package")
    if not path.is_file():
        raise BadArtifact(f"{path} is missing", "export the model again, or copy the folder again")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions; without this they are printed as well
    options.intra_op_num_threads = threads
    if path.name == FAST:
        operators.register(options)
    try:
        return open_session(str(path), options, target)
    except Exception as error:  # the binding's own classes (Fail, InvalidGraph ...) derive from Exception alone
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise BadArtifact(
            f"onnxruntime cannot load {path}: {_first_line(error)}", "export the model again, or copy the folder again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300]


def _size(dimension: Any, default: int) -> int:
    return dimension if isinstance(dimension, int) else int(default)
