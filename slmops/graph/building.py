"""How is a Hugging Face model made into a decoder graph? By onnxruntime-genai's builder, in a process of its own.

Only its float graph is taken: the builder ignores options that it does not know (exit 0), pads blocks that do not
divide, stores an int8 head beside a float embedding, and writes a graph that does not load for zero points on a tied
embedding. What ships is made of the float graph by `slmops.graph.rewriting`.

Of the float graph only what the model's own files do not hold is written: its matrices are read there, one at a time,
when they are quantized or written. So any number of precisions is made of one build, in the memory of a few matrices.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import numpy as np

from slmops import environment, hashes, progress
from slmops.errors import RunFailed, raise_if_killed
from slmops.graph.ahead import quantizing
from slmops.graph.float_data import FloatData, turn
from slmops.graph.linears import Linear, Model, load_graph
from slmops.graph.recipes import Recipe
from slmops.graph.rewriting import look_up_in_head, quantize_graph
from slmops.graph.stored_weights import StoredWeights

_PROCESS = Path(__file__).with_name("builder_process.py")
Meanwhile = Callable[[Callable[[], bool]], object]
"""Work beside the builder; it is given a function that says whether the builder is still busy."""
_SHARED: ContextVar[Path | None] = ContextVar("_SHARED", default=None)
"""Where builds are kept that may be asked for again (`shared_builds`)."""


def build(
    model: Path,
    out: Path,
    *,
    precision: str,
    provider: str,
    context_tokens: int,
    options: dict[str, str] | None = None,
    sources: bool = False,
    meanwhile: Meanwhile | None = None,
) -> None:
    """Write the builder's folder for a model.

    Args:
        model: Hugging Face folder.
        out: folder to write: `model.onnx`, `model.onnx.data`, `genai_config.json` and the tokenizer.
        precision: as the builder names it: fp32, fp16, bf16.
        provider: as the builder names it: cpu, cuda ...
        context_tokens: longest sequence; the rotary tables are made for no more where the model's RoPE allows it.
        options: the builder's extra options.
        sources: leave out of a float graph what the model's files hold; `load_built` reads it there.
        meanwhile: called while the builder works, which keeps one core busy; it is given a function that says whether it still does.

    Raises:
        Unavailable: onnxruntime-genai or a library that its builder needs is missing.
        RunFailed: the builder failed or wrote no graph.
    """
    require_libraries()
    wish: dict[str, Any] = {"precision": precision, "provider": provider, "options": options or {}, "sources": sources}
    kept = _kept(model, context_tokens, wish)
    if kept is not None and kept.is_dir():
        shutil.copytree(kept, out)  # copies: onnx reads no file that has two names
        if meanwhile is not None:
            meanwhile(lambda: False)
        return
    with TemporaryDirectory(prefix="slmops-build-") as scratch, progress.task("build the graph"):
        source = bounded_copy(model, Path(scratch) / "model", context_tokens)
        request = {"model": str(source), "out": str(out.resolve()), "cache": str(Path(scratch) / "cache"), **wish}
        path = Path(scratch) / "request.json"
        path.write_text(json.dumps(request), encoding="utf-8")
        code, said = _run_beside([sys.executable, "-P", str(_PROCESS), str(path)], scratch, meanwhile)
    raise_if_killed("the model builder", code, "close other programs or use a machine with more memory")
    if code != 0 or not (out / "model.onnx").is_file():
        raise RunFailed(*_failure(code, said))
    if kept is not None:
        shutil.copytree(out, kept)


def build_for_cpu(
    model: Path, out: Path, recipe: Recipe, *, context_tokens: int, data: Path, meanwhile: Callable[[], None] = lambda: None
) -> tuple[Model, hashes.Known]:
    """Return the graph of a model for onnxruntime's CPU provider, by a recipe: most of the work is done while the builder works.

    Quantized matrices are in memory afterwards; float ones are in the data file, whose hash is returned too, unless the graph is not
    the one that was foreseen.

    Args and Raises: see `build`. `out` must stay while the graph is used.
        data: where `slmops.graph.rewriting.save_twins` will look for the data file.
    """

    def build_float(beside: Meanwhile) -> Model:
        ways = float_options(model)
        build(model, out, precision="fp32", provider="cpu", context_tokens=context_tokens, options=ways, sources=True, meanwhile=beside)
        return load_built(out, model)

    if not recipe.bits:
        with closing(FloatData(model, data)) as written:
            graph = build_float(lambda busy: (meanwhile(), written.work(busy)))
            hashed = written.give(graph)
        look_up_in_head(graph)
        return graph, hashed
    with quantizing(model, recipe.rule) as ahead:
        graph = build_float(lambda _: meanwhile())
        quantize_graph(graph, recipe.scheme, ahead=lambda linear, scheme: ahead.packed(parameters_of(graph, linear), scheme))
    return graph, {}


def require_libraries() -> None:
    """Raise Unavailable, with the line that installs it, where a library is missing that the builder needs."""
    for library in ("onnxruntime_genai", "torch", "transformers", "onnx", "onnx_ir"):
        if find_spec(library) is None:  # to import them takes seconds, in which the builder could work
            environment.require(library, "to build the graph")


def _run_beside(command: list[str], folder: str, meanwhile: Meanwhile | None) -> tuple[int, str]:
    """Run a process beside work of our own; return its exit code and what it said."""
    # To files: a pipe that nobody reads meanwhile would stop it.
    with TemporaryFile("w+", errors="replace") as output, TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(command, cwd=folder, stdout=output, stderr=errors) as process:
            try:
                if meanwhile is not None:
                    meanwhile(lambda: process.poll() is None)
                process.wait()
            except BaseException:
                process.kill()
                raise
        for file in (output, errors):
            file.seek(0)
        return process.returncode, errors.read() or output.read()


def float_options(model: Path) -> dict[str, str]:
    """Return the builder's options for the float graph of a model.

    gate and up are fused where the model has a gate. A cache for each layer's window alone is not asked for: onnxruntime 1.31
    refuses it where the window is longer than the cache of a prompt, and a batch of `slmops.runtime.decoder` has none.
    """
    gated = any(".gate_proj." in name or ".gate_up_proj." in name or ".shared_mlp." in name for name in StoredWeights(model))
    return {"windowed_kv_cache": "false", **({"fuse_mlp_gate_up": "true"} if gated else {})}


@contextmanager
def shared_builds() -> Iterator[None]:
    """Make equal builds within the block once: a float graph without its matrices is a few megabytes, for all precisions of a model."""
    with TemporaryDirectory(prefix="slmops-builds-") as folder:
        token = _SHARED.set(Path(folder))
        try:
            yield
        finally:
            _SHARED.reset(token)


def _kept(model: Path, context_tokens: int, wish: dict[str, Any]) -> Path | None:
    """Return where a build is kept, by all that it depends on; None outside of `shared_builds`."""
    folder = _SHARED.get()
    text = json.dumps([str(model.resolve()), context_tokens, wish], sort_keys=True)
    return folder / hashlib.sha256(text.encode()).hexdigest() if folder is not None else None


def load_built(built: Path, model: Path) -> Model:
    """Load a float graph that was built with `sources`: its matrices are those of the model's files, read when they are needed.

    Args:
        built: the builder's folder; it must stay while the graph is used.
        model: the Hugging Face folder that it was built of.

    Returns:
        The graph; a matrix is read anew each time it is asked for, and nothing keeps it.
    """
    graph = load_graph(built / "model.onnx")
    stored = StoredWeights(model)
    sources: dict[str, dict[str, Any]] = json.loads((built / "sources.json").read_text(encoding="utf-8"))
    for name, source in sources.items():
        value = graph.graph.initializers[name]
        value.meta["source"] = source
        value.const_value = _lazy(value.const_value, stored, source["parameters"], transposed=source["transposed"])
    return graph


def parameters_of(model: Model, linear: Linear) -> list[str]:
    """Return the parameters that a layer of a graph from `load_built` is the stack of, along its outputs; empty where it is none."""
    source = model.graph.initializers[linear.tensors[0]].meta.get("source")
    return source["parameters"] if source is not None and source["transposed"] != linear.outputs_first else []


def _lazy(place: Any, stored: StoredWeights, parameters: list[str], *, transposed: bool) -> Any:
    """Return a tensor of a graph whose content is parameters of a model's files, stacked along their outputs."""
    onnx_ir = environment.require("onnx_ir", "to read an ONNX graph")

    def read() -> Any:
        matrix = stored[parameters[0]] if len(parameters) == 1 else np.concatenate([stored[name] for name in parameters])
        matrix = matrix.astype(place.dtype.numpy(), copy=False)
        if transposed:
            matrix = turn(matrix, np.empty(matrix.shape[::-1], matrix.dtype))
        return onnx_ir.Tensor(matrix, dtype=place.dtype, name=place.name)

    return onnx_ir.LazyTensor(read, dtype=place.dtype, shape=place.shape, name=place.name)


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
    lines = [line.strip() for line in output.splitlines() if line.strip() and "it/s]" not in line]
    return (
        f"the model builder failed: {lines[-1] if lines else f'exit code {code}'}",
        "check that the model folder is whole and its architecture is listed by `slmops doctor`",
    )
