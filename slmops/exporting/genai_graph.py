"""The road of onnxruntime-genai: its builder's float graph, quantized by our recipe, written as twins and read back."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from slmops import artifact, environment, targets
from slmops.artifact import Draft
from slmops.config import ExportSettings
from slmops.data import Interface
from slmops.data.tokenizer_files import copy_tokenizer
from slmops.errors import RunFailed
from slmops.exporting.record import eos_token_id, export_facts, graph_bytes
from slmops.graph import checking
from slmops.graph.recipes import Recipe, recipe_for
from slmops.graph.shapes import Shape


def require(settings: ExportSettings) -> None:
    """Raise Unavailable for what this road lacks here."""
    from slmops.graph import building

    building.require_libraries()


def write(draft: Draft, source: Path, interface: Interface, target: targets.Target, settings: ExportSettings, shape: Shape) -> None:
    """Write an export, which its self-test will run: see `slmops.exporting.exporting`.

    Raises:
        RunFailed: the builder failed, or the graph that it wrote is not the one asked for.
    """
    write_export(draft, source, interface, target, recipe_for(settings.precision, settings.block_size))


def write_export(draft: Draft, source: Path, interface: Interface, target: targets.Target, recipe: Recipe) -> None:
    """Write graphs, runtime config and tokenizer of a model into a draft, with their facts.

    Raises:
        RunFailed: the builder failed, or the graph that it wrote is not the one asked for.
    """
    from slmops.graph import building, rewriting

    with TemporaryDirectory(prefix="slmops-export-") as scratch:
        built = Path(scratch) / "float"
        length, data = interface.max_length_tokens, draft.folder / rewriting.DATA
        graph, draft.hashed = building.build_for_cpu(
            source, built, recipe, context_tokens=length, data=data, meanwhile=lambda: _prepare(draft, source)
        )
        rewriting.save_twins(graph, draft.folder)
        write_runtime_config(built / "genai_config.json", draft.folder / "genai_config.json", interface)
    copy_tokenizer(source, draft.folder)
    problems = checking.problems(draft.folder, recipe.document()["options"])
    if problems:
        raise RunFailed(f"the graph is not the one asked for: {'; '.join(problems)}", "report the model's architecture and this message")
    draft.interface = interface.model_dump(mode="json")
    draft.facts = export_facts(target, recipe.document(), source, interface, graph_bytes(draft.folder), "executed")


def _prepare(draft: Draft, source: Path) -> None:
    """Do what else an export needs while the builder works: the model's fingerprint, and libraries that are slow to import."""
    draft.add_input("baseline", source)
    for library in ("onnx_ir", "onnxruntime", "onnxruntime_genai"):
        environment.require(library, "to write an export")


def write_runtime_config(source: Path, path: Path, interface: Interface) -> None:
    """Write `genai_config.json` with our stop tokens and length in place of the builder's guesses."""
    content = json.loads(source.read_text(encoding="utf-8"))
    model, search = content["model"], content["search"]
    model["eos_token_id"] = eos_token_id(interface.stop_token_ids)
    model["context_length"] = interface.max_length_tokens
    search["max_length"] = interface.max_length_tokens
    search["do_sample"] = False
    artifact.write_json(path, content)
