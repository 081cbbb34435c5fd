"""From a model to a folder that runs on the device: what does `slmops export` do?

Everything that can be known before weights are loaded is checked first (`preflight`). Then the builder's float graph
is quantized by the target's recipe, written as twins (all logits for the proof, the last token's for the device),
read back and checked against what was asked, and run.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slmops import artifact, environment, progress, targets
from slmops.artifact import Artifact, Draft
from slmops.config import ExportSettings, flat, load
from slmops.data import Interface, choose_interface
from slmops.data.tokenizer_files import copy_tokenizer
from slmops.errors import RunFailed, Unavailable
from slmops.graph import checking
from slmops.graph.recipes import Recipe, recipe_for
from slmops.graph.shapes import DEFAULT_POSITIONS, Shape, read_shape, refuse_unrunnable
from slmops.runtime import hugging_face
from slmops.verification import self_test

# Peak memory of the builder's process and of the quantizer, over the model's float32 bytes (measured: 135 M shape 2.2).
_MEMORY_FACTOR = 2.5
# Of each matrix, for the look at the fine-tune before it is quantized: enough for figures within some percent.
_PLANNED_ROWS = 64


def export(model: str | Path, *, out: str | Path, config: Any = None, **overrides: Any) -> Artifact:
    """Export a model for a device.

    Args:
        model: a Hugging Face folder, an artefact of kind "model", or an adapter (merged first).
        out: the export folder to write.
        config: YAML file or mapping of `ExportSettings`.
        overrides: single settings, such as `precision="int8"`.

    Raises:
        Unavailable: the target, the architecture or its shape is not supported here; a library is missing.
        InvalidInput: a setting does not fit the model.
        BadArtifact: the model has no safe weights, or `out` is occupied.
        RunFailed: the builder failed, or the graph that it wrote is not the one asked for.
    """
    settings = load(ExportSettings, config, **overrides)
    source, out = Path(model), Path(out)
    artifact.refuse_occupied(out, force=settings.force)
    target = targets.find(settings.device, settings.provider, settings.precision)
    recipe = recipe_for(settings.precision, settings.block_size)
    if (source / "adapter_config.json").is_file():
        return _export_adapter(source, out, settings)
    found = artifact.checked(source, "model", "export the folder that `slmops merge` wrote")
    shape = preflight(artifact.require_model(source), out)
    with artifact.create(out, kind="export", command="export", config=flat(settings), force=settings.force) as draft:
        interface = choose_bounded_interface(source, found, shape, settings.max_length_tokens, draft)
        _foretell(draft, source, found, settings)
        write_export(draft, source, interface, target, recipe)
        run_once(draft.folder, interface)
        # Of a merged model its adapter has the validation rows, a model that was trained as a whole has them itself.
        tuned = (found.find("adapter") or source) if found is not None else None
        prompts = self_test.prompts_of(tuned, source, interface) if tuned is not None else []
        self_test.record(draft.folder, draft.interface, draft.facts, {"": prompts})
    return draft.done()


def preflight(model: Path, out: Path) -> Shape:
    """Refuse what cannot work, before any weight is loaded.

    Raises:
        Unavailable: the builder does not know the architecture, or the runtime cannot run its shape.
        RunFailed: too little memory or disk.
    """
    shape = read_shape(model)
    refuse_unrunnable(shape)
    float32_bytes = 4 * hugging_face.parameter_count(model)
    needed, (_, available) = round(_MEMORY_FACTOR * float32_bytes), environment.memory_bytes()
    if available and needed > available:
        raise RunFailed(
            f"the export needs about {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are available",
            "close other programs or use a larger machine",
        )
    environment.need_disk(out.parent, 2 * float32_bytes, "the export")
    return shape


def _export_adapter(adapter: Path, out: Path, settings: ExportSettings) -> Artifact:
    """Merge an adapter beside the export first, so that the package has its baseline."""
    from slmops.adapters import merge  # same layer: an adapter folder is a model too

    merged = out.parent / f"{out.name}.merged"
    progress.say(f"{adapter} is an adapter: merging it into its base first, as {merged}")
    merge(adapter, out=merged, force=True)
    return export(merged, out=out, config=flat(settings))


def _foretell(draft: Draft, source: Path, found: Artifact | None, settings: ExportSettings) -> None:
    """Warn where little of a fine-tune that was merged will be left in the quantized weights (`slmops merge --plan`)."""
    from slmops.adapters.planning import FINE, plan_model

    base = found.find("base") if found is not None else None
    recipe = recipe_for(settings.precision, settings.block_size)  # one of its own: a recipe remembers what it was asked
    if base is None or not base.is_dir() or not recipe.bits:
        return
    plan = plan_model(source, base, recipe, most_rows=_PLANNED_ROWS)
    if plan is not None and plan.advice != FINE:
        draft.warn(f"{plan.advice}: {plan.reason}")


def choose_bounded_interface(source: Path, found: Artifact | None, shape: Shape, asked: int | None, draft: Draft) -> Interface:
    """Return the interface that came with the model, or choose one, with the export's bound on the length.

    Args:
        source: the model's folder.
        found: its artefact.
        shape: of the model.
        asked: longest prompt and answer together, as the user wants it.
        draft: takes the warnings.
    """
    limit = min(asked or DEFAULT_POSITIONS, shape.positions)
    if found is not None and found.manifest.interface is not None:
        interface = Interface.model_validate(found.manifest.interface)
    else:
        interface, warnings = choose_interface(source, [], max_length_tokens=limit)
        for warning in warnings:
            draft.warn(warning)
    if asked and asked > shape.positions:
        draft.warn(f"max_length_tokens: {asked} is more than the model's {shape.positions} positions; bounded to them")
    return interface.model_copy(update={"max_length_tokens": limit})


def write_export(draft: Draft, source: Path, interface: Interface, target: targets.Target, recipe: Recipe) -> None:
    """Write graphs, runtime config and tokenizer of a model into a draft, with their facts.

    Raises:
        RunFailed: the builder failed, or the graph that it wrote is not the one asked for.
    """
    from slmops.graph import building, linears, rewriting

    with TemporaryDirectory(prefix="slmops-export-") as scratch:
        built = Path(scratch) / "float"
        building.build(
            source,
            built,
            precision="fp32",
            provider="cpu",
            context_tokens=interface.max_length_tokens,
            options={"fuse_mlp_gate_up": "true"},
        )
        graph = linears.load_graph(built / rewriting.MAIN)
        if recipe.bits:
            rewriting.quantize_graph(graph, recipe.scheme)
        rewriting.save_twins(graph, draft.folder)
        _write_runtime_config(built / "genai_config.json", draft.folder / "genai_config.json", interface)
    copy_tokenizer(source, draft.folder)
    problems = checking.problems(draft.folder, recipe.document()["options"])
    if problems:
        raise RunFailed(f"the graph is not the one asked for: {'; '.join(problems)}", "report the model's architecture and this message")
    draft.add_input("baseline", source)
    draft.interface = interface.model_dump(mode="json")
    graphs = [file for file in draft.folder.iterdir() if file.suffix in (".onnx", ".data")]
    draft.facts = {
        "device": target.device,
        "provider": target.provider,
        "precision": target.precision,
        "recipe": recipe.document(),
        "size_bytes": sum(file.stat().st_size for file in graphs),
        "bytes_per_parameter": round(sum(file.stat().st_size for file in graphs) / hugging_face.parameter_count(source), 4),
        "level": "executed",
        "max_length_tokens": interface.max_length_tokens,
    }


def _write_runtime_config(source: Path, path: Path, interface: Interface) -> None:
    """Write `genai_config.json` with our stop tokens and length in place of the builder's guesses."""
    content = json.loads(source.read_text(encoding="utf-8"))
    model, search = content["model"], content["search"]
    stops = list(interface.stop_token_ids)
    model["eos_token_id"] = stops if len(stops) != 1 else stops[0]
    model["context_length"] = interface.max_length_tokens
    search["max_length"] = interface.max_length_tokens
    search["do_sample"] = False
    artifact.write_json(path, content)


def run_once(folder: Path, interface: Interface) -> None:
    """Generate a few tokens with the runtime, so that `executed` is true.

    Raises:
        Unavailable: the runtime cannot run the graph.
    """
    from slmops.runtime.genai_runner import GenaiRunner

    runner = GenaiRunner(folder, threads=environment.usable_cores())
    try:
        runner.time([interface.bos_token_id or 0, 1, 2], new_tokens=2)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise Unavailable(
            f"the graph was built, and onnxruntime cannot run it: {reason}", "take a model of another architecture or shape"
        ) from error
    finally:
        runner.close()
