"""The road of onnxruntime-genai to a GPU: the builder's 16-bit graph for the provider, our rounding, checked without the GPU.

The builder writes another graph for each provider (DirectML wants its rotation apart, TensorRT-RTX its norms in parts), so
its graph for the provider is taken as it is; what is quantized in it is quantized by slmops, as for the CPU. A machine that
has the provider runs the result. One that has not looks every node up in the provider's table of kernels, and runs the
graph's float twin: the package is "built", and its self-test is what the twin answers.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slmops.artifact import Draft
from slmops.config import ExportSettings
from slmops.data import Interface
from slmops.data.tokenizer_files import copy_tokenizer
from slmops.errors import RunFailed, Unavailable
from slmops.exporting.genai_graph import require, write_runtime_config
from slmops.exporting.record import export_facts, graph_bytes
from slmops.graph import checking, kernels, linears
from slmops.graph.recipes import Recipe, recipe_for
from slmops.graph.rewriting import FULL, MAIN
from slmops.graph.shapes import Shape
from slmops.runtime import hugging_face
from slmops.runtime.providers import absence, load_problem
from slmops.targets import Level, Target

__all__ = ["record_on_twin", "require", "write"]  # what the road of onnxruntime-genai requires, this one does


def write(draft: Draft, source: Path, interface: Interface, target: Target, settings: ExportSettings, shape: Shape) -> None:
    """Write an export for a GPU: see `slmops.exporting.exporting`.

    Raises:
        RunFailed: the builder failed, or the graph that it wrote is not the one asked for, or none that the provider runs.
    """
    recipe = recipe_for(settings.precision, settings.block_size, target.provider)
    _write_graphs(draft.folder, source, interface, target, recipe)
    copy_tokenizer(source, draft.folder)
    problems = checking.problems(draft.folder, recipe.document()["options"], target)
    problems += [line for name in (MAIN, FULL) if (line := load_problem(draft.folder / name)) is not None]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise RunFailed(
            f"the graph is none that {target.provider} runs as asked: {'; '.join(problems[:3])}{more}",
            "report the model's architecture and this message; --device cpu may work",
        )
    missing = absence(target.ort_provider)
    if missing is not None:
        draft.warn(
            f"{target.provider} is not here ({missing}): checked against its kernels and run as a float twin on the CPU, not executed"
        )
    draft.add_input("baseline", source)
    draft.interface = interface.model_dump(mode="json")
    draft.facts = _facts(draft.folder, source, interface, target, recipe, "executed" if missing is None else "built")


def record_on_twin(draft: Draft, prompts: dict[str, list[list[int]]]) -> None:
    """Record the self-test of a package that cannot run here: what its float twin answers.

    Raises:
        Unavailable: onnxruntime cannot run the twin, nor therefore the graph.
    """
    from slmops.graph.float_twin import write_float_twin
    from slmops.verification import self_test

    with TemporaryDirectory(prefix="slmops-twin-") as scratch:
        twin = write_float_twin(draft.folder, Path(scratch))
        copy_tokenizer(draft.folder, twin)
        self_test.record(twin, draft.interface, draft.facts, prompts)
        shutil.copyfile(twin / self_test.FILE, draft.folder / self_test.FILE)


def _write_graphs(folder: Path, source: Path, interface: Interface, target: Target, recipe: Recipe) -> None:
    from slmops.graph import building, rewriting

    with TemporaryDirectory(prefix="slmops-export-") as scratch:
        built = Path(scratch) / "float"
        building.build(
            source,
            built,
            precision=target.builder_precision,
            provider=target.builder_provider,
            context_tokens=interface.max_length_tokens,
            # Norms of queries and keys inside the attention are kernels of CUDA and WebGPU alone: no twin could compute them.
            options=building.float_options(source) | {"fuse_qk_norm_gqa": "false"},
        )
        graph = linears.load_graph(built / rewriting.MAIN)
        _refuse_unknown_layers(graph, source, target)
        if recipe.bits:
            rewriting.quantize_graph(
                graph, recipe.scheme, accuracy_level=recipe.accuracy_level, quantized_embedding=recipe.quantized_embedding
            )
        rewriting.save_twins(graph, folder)
        write_runtime_config(built / "genai_config.json", folder / "genai_config.json", interface)


def _refuse_unknown_layers(graph: linears.Model, source: Path, target: Target) -> None:
    """Refuse a graph whose layers are none of the model's: what became of its weights could not be proven."""
    shapes = hugging_face.parameter_shapes(source)
    unknown = [linear.name for linear in linears.linears(graph) if not linears.parts(linear.name, shapes)]
    if unknown:
        raise Unavailable(
            f"the builder takes the model's layers apart for {target.provider} (its {unknown[0]} is none of the model's)",
            "slmops could not prove such a package; use another provider (`slmops doctor`)",
        )


def _facts(folder: Path, source: Path, interface: Interface, target: Target, recipe: Recipe, level: Level) -> dict[str, Any]:
    placed = kernels.placement(linears.load_graph(folder / MAIN))
    return {
        **export_facts(target, recipe.document(), source, interface, graph_bytes(folder), level),
        "checked": {"nodes_of_the_provider": placed.provider, "integer_nodes": placed.host, "executed": level == "executed"},
    }
