"""How is a Hugging Face model made into an OpenVINO IR, and its weights stored? optimum-intel and nncf, with a recipe that fits.

nncf takes one group size for all matrices of a pass and fails on one that it does not divide (optimum-intel's own choice of
128 on 192 channels), so the group is chosen from the widths of the model's matrices, by the rule of `slmops.graph.recipes`.

Measured on the SNIPS intent fine-tune of stories3m (192 wide), 300 validation rows, 700 test rows, and a neutral text:

| recipe of 4 bits                       | MB   | KL     | KL, neutral | exact match (PyTorch 0.9786) |
| -------------------------------------- | ---- | ------ | ----------- | ---------------------------- |
| groups of 32, zero points, q k v in 8  | 2.33 | 1.6e-4 | 0.35        | 0.9786                       |
| groups of 32, zero points              | 2.17 | 2.6e-4 | 0.45        | 0.9800                       |
| groups of 32, symmetric                | 2.14 | 2.8e-4 | 0.59        | 0.9786                       |
| groups of 64, zero points              | 2.08 | 1.2e-3 | 0.58        | 0.9800                       |
| a scale a row, symmetric               | 2.01 | 6.5e-4 | 0.89        | 0.9786                       |
| groups of 32, embedding and head too   | 1.83 | 3.0e-4 | 0.59        | 0.9786                       |

In 8 bits: zero points 3.0e-6 and 0.005, symmetric 6.6e-6 and 0.006.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slmops import environment, progress
from slmops.errors import InvalidInput, RunFailed, Unavailable, raise_if_killed
from slmops.graph.building import bounded_copy
from slmops.graph.ir import ROW, is_matrix, kind_of
from slmops.graph.recipes import block_by_rule

_FRAGILE = ("q_proj", "k_proj", "v_proj", "qkv_proj")
_WHOLE_ROW = -1
# OpenVINO's guide for its NPU (docs.openvino.ai, "OpenVINO GenAI on NPU"): symmetric, groups of 128, or a scale a row.
_NPU_GROUP = 128
# What every plugin reads from the IR itself (`runtime_options`), and what has to be given at load (openvino 2026.4, CPU plugin).
_CACHE = "KV_CACHE_PRECISION"
# The CPU plugin computes in bf16 where the processor has it: logits 0.5 off on one machine, and not on the next.
_FLOAT_OPTIONS = {"EXECUTION_MODE_HINT": "ACCURACY"}
_CPU_OPTIONS = {"INFERENCE_PRECISION_HINT": "f32"}


@dataclass(frozen=True)
class IrRecipe:
    """How the weights of an IR are stored, and how it is to be computed."""

    name: str
    passes: tuple[dict[str, Any], ...]
    """Of nncf, in order: `mode`, `group_size`, `backup` and the patterns to `leave` as they are."""
    half: bool
    """Float weights are stored in 16 bits."""
    layers: dict[str, dict[str, Any]]
    """By kind of layer: `bits` and `block_size`; empty where weights are float."""
    cache: str
    """Type of keys and values."""
    properties: dict[str, str]
    """What the device is told at load."""

    def document(self) -> dict[str, Any]:
        """Return the recipe as manifests hold it."""
        bits = min((layer["bits"] for layer in self.layers.values()), default=16 if self.half else 32)
        options: dict[str, Any] = {"bits": bits, "cache": self.cache, "properties": self.properties}
        if self.layers:
            options |= {"layers": self.layers, "zero_points": self.passes[0]["mode"].endswith("_asym")}
        return {"id": self.name, "options": options}


def ir_recipe(precision: str, device: str, shapes: Mapping[str, tuple[int, ...]], group_size: int | None = None) -> IrRecipe:
    """Return the recipe of a precision for a model of these shapes.

    Args:
        precision: fp32, fp16, int8 or int4.
        device: cpu, gpu or npu.
        shapes: of the model's parameters.
        group_size: of 4-bit matrices, as asked for; None: by rule.

    Raises:
        InvalidInput: a group size that does not divide a matrix, or of a precision that has none.
    """
    name = f"openvino-{device}-{precision}"
    properties = (_FLOAT_OPTIONS if precision in ("fp32", "fp16") else _CPU_OPTIONS) if device == "cpu" else {}
    cache = "f32" if precision == "fp32" else "f16"
    if precision in ("fp32", "fp16"):
        return IrRecipe(name, (), precision == "fp16", {}, cache, properties)
    symmetric = device == "npu"
    eight = dict.fromkeys(_kinds(shapes), {"bits": 8, "block_size": ROW})
    whole = {"mode": "int8_sym" if symmetric else "int8_asym", "leave": []}
    if precision == "int8":
        if group_size is not None:
            raise InvalidInput("block_size: OpenVINO stores 8-bit weights with one scale a row", "leave --block-size out")
        return IrRecipe(name, (whole,), False, eight, cache, properties)
    fragile = () if symmetric else _FRAGILE
    group = group_of(shapes, fragile, group_size, device)
    four = {"bits": 4, "block_size": group if group > 0 else ROW}
    leave = [rf".*[./]({'|'.join(fragile)})/.*"] if fragile else []
    passes = [{"mode": f"int4_{'sym' if symmetric else 'asym'}", "group_size": group, "backup": whole["mode"], "leave": leave}]
    if fragile:
        passes.append(whole)
    # nncf keeps the embedding and the head in 8 bits.
    layers = {kind: layer if kind in (*fragile, "embed_tokens", "lm_head") else four for kind, layer in eight.items()}
    return IrRecipe(name, tuple(passes), False, layers, cache, properties)


def _kinds(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    return list(dict.fromkeys(kind_of(name) for name in shapes if is_matrix(name, shapes)))


def group_of(shapes: Mapping[str, tuple[int, ...]], fragile: tuple[str, ...], asked: int | None, device: str) -> int:
    """Return the group size of a model's 4-bit matrices: it divides the inputs of all of them; -1: a scale a row.

    Raises:
        InvalidInput: the one asked for does not divide, or none does.
    """
    others = (*fragile, "embed_tokens", "lm_head")
    widths = {name: shape[1] for name, shape in shapes.items() if is_matrix(name, shapes) and kind_of(name) not in others}
    if asked is not None:
        odd = next((name for name, width in widths.items() if width % asked), None)
        if odd is not None:
            best = group_of(shapes, fragile, None, device)
            hint = "or leave it out: the rule never pads"
            raise InvalidInput(
                f"block_size: {asked} does not divide the {widths[odd]} inputs of {odd.removesuffix('.weight')}",
                f"use {best}, {hint}" if best > 0 else f"leave --block-size out: {device} takes a scale a row of this model",
            )
        return asked
    if device == "npu":
        return _WHOLE_ROW if any(width % _NPU_GROUP for width in widths.values()) else _NPU_GROUP
    group = min((block_by_rule(width, 4) for width in widths.values()), default=_WHOLE_ROW)
    return group if all(width % group == 0 for width in widths.values()) else 16


def build_ir(model: Path, out: Path, *, recipe: IrRecipe, device: str, context_tokens: int) -> str:
    """Write the IR of a model, and of its tokenizer, into a folder.

    Args:
        model: Hugging Face folder.
        out: folder that is there.
        recipe: of the weights.
        device: as OpenVINO names it: CPU, GPU, NPU.
        context_tokens: longest sequence.

    Returns:
        Why there is no IR of the tokenizer; empty where there is one.

    Raises:
        Unavailable: a library of the extra `openvino` does not fit torch.
        RunFailed: optimum-intel or nncf failed.
    """
    info = [(["slmops", "device"], device), (["runtime_options", _CACHE], recipe.cache)]
    info += [(["slmops", "properties", name], value) for name, value in recipe.properties.items()]
    with TemporaryDirectory(prefix="slmops-ir-") as scratch, progress.task("build the IR"):
        request = {
            "model": str(bounded_copy(model, Path(scratch) / "model", context_tokens)),
            "out": str(out.resolve()),
            "passes": list(recipe.passes),
            "half": recipe.half,
            "info": info,
        }
        path = Path(scratch) / "request.json"
        path.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "slmops.graph.ir_process", str(path)]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    raise_if_killed("the export", done.returncode, "close other programs or use a machine with more memory")
    if done.returncode != 0:
        raise _failure(done.returncode, done.stderr or done.stdout)
    reason = out / "tokenizer_error.txt"
    why = reason.read_text(encoding="utf-8") if reason.is_file() else ""
    reason.unlink(missing_ok=True)
    return why


def require_libraries() -> None:
    """Raise Unavailable where a library that builds OpenVINO exports is missing here."""
    if missing := environment.missing_for_openvino():
        verb = "is" if len(missing) == 1 else "are"
        text = f"{', '.join(missing)} {verb} not installed; needed to build an OpenVINO export"
        raise Unavailable(text, environment.how_to_install("openvino"))


def _failure(code: int, output: str) -> RunFailed | Unavailable:
    lines = [line.strip() for line in output.splitlines() if line.strip() and "it/s]" not in line]
    if any("torchvision" in line for line in lines):
        return Unavailable(
            "torchvision is made for another build of torch, and breaks transformers' models",
            "pip uninstall -y torchvision: nothing here needs it",
        )
    return RunFailed(
        f"optimum-intel could not write the IR: {lines[-1][:300] if lines else f'exit code {code}'}",
        "check that the model folder is whole and that optimum-intel knows its architecture",
    )
