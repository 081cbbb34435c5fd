"""From a model to a folder that runs on the device: what does `slmops export` do?

Everything that can be known before weights are loaded is checked first (`preflight`). Then the writer of the target's
road makes the folder, reads it back, checks it against what was asked and takes it as far as this machine can: its facts
say to which level. A road is a module with `require(settings)`, which raises what can be known before any work, and
`write(draft, source, interface, target, settings, shape)`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from slmops import artifact, progress, targets
from slmops.artifact import Artifact, Draft
from slmops.config import ExportSettings, flat, load
from slmops.errors import BadArtifact, InvalidInput
from slmops.exporting import gpu_graph
from slmops.exporting.preflight import choose_bounded_interface, preflight
from slmops.graph.building import shared_builds
from slmops.graph.recipes import recipe_for
from slmops.targets import Road, Target
from slmops.verification import self_test

# Imported when they are needed: each road has libraries of its own.
_ROADS: dict[Road, str] = {
    "genai": "slmops.exporting.genai_graph",
    "genai-gpu": "slmops.exporting.gpu_graph",
    "qnn": "slmops.exporting.qnn",
    "openvino": "slmops.exporting.openvino",
}

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
    if "," in settings.precision:
        raise InvalidInput(f"precision: {settings.precision} are several exports", "name one, or use slmops.exports")
    source, out = Path(model), Path(out)
    artifact.refuse_occupied(out, force=settings.force)
    target = targets.find(settings.device, settings.provider, settings.precision)
    recipe = recipe_for(settings.precision, settings.block_size, target.provider)  # a block size that no kernel takes is refused here
    _refuse_settings_of_others(settings, target)
    road = _road(target.road)
    if (source / "adapter_config.json").is_file():
        return _export_adapter(source, out, settings)
    found = artifact.checked(source, "model", "export the folder that `slmops merge` wrote")
    shape = preflight(artifact.require_model(source), out, recipe.bits if target.road == "genai" else None)
    road.require(settings)
    with artifact.create(out, kind="export", command="export", config=flat(settings), force=settings.force) as draft:
        interface = choose_bounded_interface(source, found, shape, settings.max_length_tokens, draft)
        _foretell(draft, source, found, settings)
        road.write(draft, source, interface, target, settings, shape)
        # Of a merged model its adapter has the validation rows, a model that was trained as a whole has them itself.
        tuned = (found.find("adapter") or source) if found is not None else None
        prompts = self_test.prompts_of(tuned, source, interface) if tuned is not None else []
        if draft.facts["level"] == "executed":  # a self-test is what was computed here
            with draft.hashing():
                self_test.record(draft.folder, draft.interface, draft.facts, {"": prompts})
        elif target.road == "genai-gpu":
            gpu_graph.record_on_twin(draft, {"": prompts})
    return draft.done()


@dataclass(frozen=True)
class Exports:
    """Exports of one model, one a precision."""

    artifacts: tuple[Artifact, ...]
    out: Path

    def document(self) -> dict[str, Any]:
        """Return the JSON form: of one export its own, of several theirs by precision."""
        documents = [made.document() for made in self.artifacts]
        if len(documents) == 1:
            return documents[0]
        warnings = [line for document in documents for line in document["warnings"]]
        each = {str(document["precision"]): document for document in documents}
        return {
            "artifact": str(self.out),
            "kind": "exports",
            "precision": ",".join(each),
            "exports": each,
            "warnings": list(dict.fromkeys(warnings)),
        }


def exports(model: str | Path, *, out: str | Path, config: Any = None, **overrides: Any) -> Exports:
    """Export a model in one precision to `out`, or in several to `out`/PRECISION each, of one build of its graph.

    Args and Raises: see `export`. Each is an export like any other; those before one that failed stay.
    """
    settings = load(ExportSettings, config, **overrides)
    names = settings.precision.split(",")
    places = [Path(out) / name for name in names] if len(names) > 1 else [Path(out)]
    for name, place in zip(names, places, strict=True):  # what is wrong with the last is said before the first is made
        artifact.refuse_occupied(place, force=settings.force)
        targets.find(settings.device, settings.provider, name)
    if len(names) > 1 and (Path(out) / artifact.MANIFEST).is_file():
        raise BadArtifact(f"{out} is an artefact itself", "several exports need a folder of their own")
    source = Path(model)
    if len(names) > 1 and (source / "adapter_config.json").is_file():
        source = _merged(source, Path(out) / "merged")
    with shared_builds() if len(names) > 1 else nullcontext():
        wish = flat(settings)
        made = tuple(export(source, out=place, config={**wish, "precision": name}) for name, place in zip(names, places, strict=True))
    return Exports(made, Path(out))


def _refuse_settings_of_others(settings: ExportSettings, target: Target) -> None:
    """Raise InvalidInput for a setting that would be ignored."""
    given = [name for name in ("soc", "prefill_tokens", "weights_once") if getattr(settings, name)]
    if given and target.road != "qnn":
        raise InvalidInput(f"{', '.join(given)}: only for --device npu --provider qnn, and the target is {target.name}", "leave it out")


def _road(name: Road) -> Any:
    """Return the module of a road; its `write` fills the draft's folder, inputs, interface and facts (`level` among them)."""
    return import_module(_ROADS[name])


def _export_adapter(adapter: Path, out: Path, settings: ExportSettings) -> Artifact:
    """Merge an adapter beside the export first, so that the package has its baseline."""
    return export(_merged(adapter, out.parent / f"{out.name}.merged"), out=out, config=flat(settings))


def _merged(adapter: Path, place: Path) -> Path:
    from slmops.adapters import merge  # same layer: an adapter folder is a model too

    progress.say(f"{adapter} is an adapter: merging it into its base first, as {place}")
    merge(adapter, out=place, force=True)
    return place


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
