"""How is a Hugging Face model made into a decoder graph? By onnxruntime-genai's builder, in a process of its own.

Only its float graph is taken: the builder ignores options that it does not know (exit 0), pads blocks that do not
divide, stores an int8 head beside a float embedding, and writes a graph that does not load for zero points on a tied
embedding. What ships is made of the float graph by `slmops.graph.rewriting`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slmops import environment, progress
from slmops.errors import RunFailed

_PROCESS = Path(__file__).with_name("builder_process.py")


def build(model: Path, out: Path, *, precision: str, provider: str, context_tokens: int, options: dict[str, str] | None = None) -> None:
    """Write the builder's folder for a model.

    Args:
        model: Hugging Face folder.
        out: folder to write: `model.onnx`, `model.onnx.data`, `genai_config.json` and the tokenizer.
        precision: as the builder names it: fp32, fp16, bf16.
        provider: as the builder names it: cpu, cuda ...
        context_tokens: longest sequence; the rotary tables are made for no more where the model's RoPE allows it.
        options: the builder's extra options.

    Raises:
        Unavailable: onnxruntime-genai or a library that its builder needs is missing.
        RunFailed: the builder failed or wrote no graph.
    """
    for library in ("onnxruntime_genai", "torch", "transformers", "onnx", "onnx_ir"):
        environment.require(library, "to build the graph")
    with TemporaryDirectory(prefix="slmops-build-") as scratch, progress.task("build the graph"):
        source = bounded_copy(model, Path(scratch) / "model", context_tokens)
        request = {
            "model": str(source),
            "out": str(out.resolve()),
            "precision": precision,
            "provider": provider,
            "cache": str(Path(scratch) / "cache"),
            "options": options or {},
        }
        path = Path(scratch) / "request.json"
        path.write_text(json.dumps(request), encoding="utf-8")
        done = subprocess.run([sys.executable, "-P", str(_PROCESS), str(path)], cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (out / "model.onnx").is_file():
        raise RunFailed(*_failure(done.returncode, done.stderr or done.stdout))


def bounded_copy(model: Path, place: Path, context_tokens: int) -> Path:
    """Return a folder of links to the model whose config says no more positions than are asked for.

    The rotary tables of a graph have a row for each position: 32,768 of them are 16 MB beside a 76 MB model. Types of
    RoPE whose angles depend on the number of positions keep theirs.
    """
    place.mkdir(parents=True)
    for file in model.iterdir():
        if file.is_file() and file.name != "config.json":
            (place / file.name).symlink_to(file.resolve())
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else "default"
    positions = config.get("max_position_embeddings")
    if kind == "default" and isinstance(positions, int) and positions > context_tokens:
        config["max_position_embeddings"] = context_tokens
        if config.get("original_max_position_embeddings") == positions:  # where they differ the builder takes Phi3 for one of long RoPE
            config["original_max_position_embeddings"] = context_tokens
    (place / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return place


def _failure(code: int, output: str) -> tuple[str, str]:
    if code in (-9, 137):
        return (
            "the model builder was stopped by the system, most likely for lack of memory",
            "close other programs or use a machine with more memory",
        )
    lines = [line.strip() for line in output.splitlines() if line.strip() and "it/s]" not in line]
    return (
        f"the model builder failed: {lines[-1] if lines else f'exit code {code}'}",
        "check that the model folder is whole and its architecture is listed by `slmops doctor`",
    )
