"""From a base and its adapters to one package, and from one package to the next: what does `slmops pack` do?

A package is an export of the base with two graphs more (adapters as optional inputs), one small file per adapter, and a
self-test for each of them. Adding and removing an adapter touches its own files and the manifest, never the base; the
manifest is replaced last, so that a package is what it was until it is what it should be.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops import artifact, hashes, progress, targets
from slmops.artifact import Artifact, Draft
from slmops.config import PackSettings, flat, load
from slmops.data import Interface
from slmops.errors import BadArtifact, InvalidInput, RunFailed, Unavailable
from slmops.exporting import choose_bounded_interface, eos_token_id, preflight, write_export
from slmops.graph import checking
from slmops.graph.linears import load_graph
from slmops.graph.lora import Slot, save_adapted_twins, save_fast_twin, slots
from slmops.graph.recipes import recipe_for
from slmops.graph.rewriting import ADAPTED, DATA, FULL
from slmops.packing import inclusion
from slmops.runtime import hugging_face
from slmops.verification import self_test

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
# Where our operator pays: a base of fewer bytes has layers that are done before it matters, and a float one keeps adapters in float.
_FAST_PRECISIONS, _FAST_BYTES = ("int4", "int8"), 32 << 20
_BASE = "base"  # as in `verify --data base=FILE` and in every report


def pack(source: str | Path, *, config: Any = None, **overrides: Any) -> Artifact:
    """Make a package of a base and adapters, or change the adapters of a package in place.

    Args:
        source: the base as a Hugging Face folder or an export of it (then `out` names the package to write), or a package.
        config: YAML file or mapping of `PackSettings`.
        overrides: single settings, such as `adapter=["intent=runs/intent"]`.

    Raises:
        InvalidInput: a setting is wrong, or a name is taken or unknown.
        Unavailable: an adapter does what a graph cannot carry, or the target or architecture is not supported here.
        BadArtifact: an adapter of another base, an input that was changed, or `out` is occupied.
        RunFailed: the builder failed, or the graph that it wrote is not the one asked for.
    """
    settings = load(PackSettings, config, **overrides)
    folder = Path(source)
    named = named_adapters(settings.adapter)
    found = artifact.find(folder) if folder.is_dir() else None
    if found is not None and found.manifest.kind == "package":
        return _change(found, named, settings)
    return _assemble(folder, named, settings)


def named_adapters(texts: list[str] | None) -> dict[str, Path]:
    """Read adapters as they are typed, `NAME=PATH`.

    Raises:
        InvalidInput: no name, one that is no file name, or the same twice.
    """
    result: dict[str, Path] = {}
    for text in texts or ():
        name, _, path = text.partition("=")
        if not path or not _NAME.fullmatch(name):
            raise InvalidInput(
                f"adapter: {text!r} is not NAME=PATH", "write --adapter intent=runs/intent (letters, digits, . _ - in the name)"
            )
        if name == _BASE:
            raise InvalidInput(f"adapter: {_BASE} is what the package without an adapter is called", "choose another name")
        if name in result:
            raise InvalidInput(f"adapter: the name {name} is given twice", "give each adapter a name of its own")
        result[name] = Path(path)
    return result


def _assemble(source: Path, named: dict[str, Path], settings: PackSettings) -> Artifact:
    """Export a base, or take an export of it, and put adapters on it."""
    if settings.remove:
        raise InvalidInput(f"remove: {source} is not a package", "give the package to take adapters out of")
    if settings.out is None:
        raise InvalidInput("out: nothing says where the package goes", "give a folder with -o")
    artifact.refuse_occupied(settings.out, force=settings.force)
    found = artifact.find(source) if source.is_dir() else None
    exported = found if found is not None and found.manifest.kind == "export" else None
    if exported is not None:
        _refuse_unlike(exported, settings)
    model = _model_of(exported) if exported is not None else source
    asked = exported.manifest.facts if exported is not None else settings.model_dump()
    target = targets.find(asked["device"], asked["provider"], asked["precision"])
    _refuse_without_adapters(target)
    recipe = recipe_for(settings.precision, settings.block_size)
    model_found = artifact.checked(model, "model", "give the base model that the adapters were trained on, or an export of it")
    shape = preflight(artifact.require_model(model), settings.out, recipe.bits)
    base = hashes.fingerprint(model)
    candidates = [inclusion.examine(name, path, model, base) for name, path in named.items()]
    config = {key: value for key, value in flat(settings).items() if key != "out"}
    with artifact.create(settings.out, kind="package", command="pack", config=config, force=settings.force) as draft:
        if exported is not None:
            _copy_export(draft, exported, model)
        else:
            draft.interface = choose_bounded_interface(model, model_found, shape, settings.max_length_tokens, draft).model_dump(mode="json")
            write_export(draft, model, Interface.model_validate(draft.interface), target, recipe)
        interface = Interface.model_validate(draft.interface)
        inclusion.refuse_other_grids(candidates, draft.folder, model)
        stops = inclusion.common_stops(interface, candidates)
        pairs = _let_take_adapters(draft, hugging_face.parameter_shapes(model))
        _configure_runtime(draft.folder / "genai_config.json", stops)
        draft.facts |= {
            "base": base,
            "slots": {pair.name: [pair.inputs, pair.outputs] for pair in pairs},
            "adapters": {c.name: inclusion.include(draft.folder, c, pairs, base) for c in candidates},
        }
        draft.facts["size_bytes"] = inclusion.size_bytes(draft.folder)
        for candidate in candidates:
            draft.add_input(f"adapter {candidate.name}", candidate.path)
            for warning in candidate.warnings:
                draft.warn(warning)
        self_test.record(draft.folder, draft.interface, draft.facts, {c.name: c.prompts for c in candidates})
    return draft.done()


def _let_take_adapters(draft: Draft, shapes: Mapping[str, tuple[int, ...]]) -> list[Slot]:
    """Write the graphs that take adapters, one for our operator among them where it pays; return the slots."""
    with progress.task("let the graph take adapters"):
        pairs = save_adapted_twins(draft.folder, shapes)
        if draft.facts["precision"] in _FAST_PRECISIONS and (draft.folder / DATA).stat().st_size >= _FAST_BYTES:
            draft.facts["fast_layers"] = save_fast_twin(draft.folder, shapes)
    problems = checking.adapter_problems(draft.folder)
    fast = [name for layer in draft.facts.get("fast_layers", []) for name, _ in layer]
    if fast and fast != [pair.name for pair in pairs]:
        problems.append("the graph for our operator has other slots than the one that any onnxruntime runs")
    if problems:
        raise RunFailed(f"the graph with adapters is not as it should be: {'; '.join(problems)}", "report the model's architecture")
    return pairs


def _refuse_without_adapters(target: targets.Target) -> None:
    if target.runtime_adapters:
        return
    place = f"--device {target.device} --provider {target.provider} --precision {target.precision}"
    raise Unavailable(f"{target.name} takes no adapters at run time", f"slmops merge them, then slmops export MERGED {place}")


def _refuse_unlike(exported: Artifact, settings: PackSettings) -> None:
    """Raise InvalidInput where a setting asks for another export than the one that is given."""
    for name in ("device", "provider", "precision", "block_size", "max_length_tokens"):
        wanted = getattr(settings, name)
        held = exported.manifest.facts.get(name, exported.manifest.config.get(name))
        if name in settings.model_fields_set and wanted is not None and wanted != held:
            raise InvalidInput(f"{name}: {exported.path} has {held}, and {wanted} was asked for", "leave it out, or pack the model itself")


def _model_of(exported: Artifact) -> Path:
    """Return the model that an export was made of, seen to be that one.

    Raises:
        BadArtifact: the export was changed, or its model is gone or another.
    """
    artifact.check(exported)
    recorded, place = exported.manifest.input("baseline"), exported.find("baseline")
    if recorded is None or place is None or not recorded.matches(place):
        raise BadArtifact(
            f"the model that {exported.path} was made of is not at {_recorded(exported)}", "put it back there, or pack the model itself"
        )
    return place


def _copy_export(draft: Draft, exported: Artifact, model: Path) -> None:
    """Take graphs, weights and facts of an export as they are: whatever its recipe was, it is kept."""
    for name in exported.manifest.files:
        if name != self_test.FILE:
            shutil.copyfile(exported.path / name, draft.folder / name)
    draft.add_input("baseline", model)
    draft.add_input("export", exported.path)
    draft.interface = exported.manifest.interface
    draft.facts = dict(exported.manifest.facts)


def _change(found: Artifact, named: dict[str, Path], settings: PackSettings) -> Artifact:
    """Add adapters to a package and remove others, in place: new files first, the manifest, then the old files.

    Raises:
        InvalidInput: nothing to change, a name that is taken (without `force`) or unknown.
    """
    artifact.check(found)
    removed = list(settings.remove or ())
    if settings.out is not None:
        raise InvalidInput(f"out: {found.path} is a package, which is changed in place", "leave -o out, or copy the folder first")
    if not named and not removed:
        raise InvalidInput(
            f"adapter: nothing to do with {found.path}", "put one in with --adapter NAME=PATH, or take one out with --remove NAME"
        )
    held = found.manifest.facts["adapters"]
    for name in removed:
        if name not in held:
            raise InvalidInput(f"remove: {found.path} has no adapter {name}", f"it has {', '.join(held) or 'none'}")
    taken = [name for name in named if name in held and name not in removed]
    if taken and not settings.force:
        raise InvalidInput(f"adapter: {found.path} has an adapter {taken[0]} already", "choose another name, or replace it with --force")
    place = found.find("baseline")
    if named and place is None:
        raise BadArtifact(f"the base model of {found.path} is no longer at {_recorded(found)}", "put it back there, or pack anew")
    return _rewrite(found, named, {*removed, *taken}, place)


def _rewrite(found: Artifact, named: dict[str, Path], dropped: set[str], base_folder: Path | None) -> Artifact:
    facts = found.manifest.facts
    candidates = [inclusion.examine(name, path, base_folder, facts["base"]) for name, path in named.items() if base_folder is not None]
    inclusion.refuse_other_stops(found, candidates)
    if base_folder is not None:
        inclusion.refuse_other_grids(candidates, found.path, base_folder)
    inclusion.sweep(found.path)  # of a change that was interrupted
    obsolete = [found.path / file for name in dropped for file in inclusion.files_of(facts["adapters"][name])]
    adapters = {name: held for name, held in facts["adapters"].items() if name not in dropped}
    try:
        if base_folder is not None and candidates:
            pairs = slots(load_graph(found.path / FULL), hugging_face.parameter_shapes(base_folder))
            adapters |= {c.name: inclusion.include(found.path, c, pairs, facts["base"]) for c in candidates}
            self_test.record(found.path, found.manifest.interface, facts | {"adapters": adapters}, {c.name: c.prompts for c in candidates})
        changed = _sealed(found, candidates, dropped, adapters, obsolete)
    except BaseException:
        inclusion.sweep(found.path)
        raise
    for file in obsolete:
        file.unlink(missing_ok=True)
    return changed


def _sealed(
    found: Artifact, candidates: list[inclusion.Candidate], dropped: set[str], adapters: dict[str, Any], obsolete: list[Path]
) -> Artifact:
    """Write the manifest of a package whose adapters have changed."""
    roles = {f"adapter {name}" for name in dropped}
    inputs = [item for item in found.manifest.inputs if item.role not in roles]
    inputs += [artifact.input_of(found.path, f"adapter {c.name}", c.path) for c in candidates]
    outdated = tuple(f"{name}: " for name in dropped)
    warnings = [line for line in found.manifest.warnings if not line.startswith(outdated)]
    warnings += [line for c in candidates for line in c.warnings]
    size = inclusion.size_bytes(found.path) - sum(
        held["size_bytes"] for name, held in found.manifest.facts["adapters"].items() if name in dropped
    )
    facts = {**found.manifest.facts, "adapters": adapters, "size_bytes": size}
    return artifact.seal(found.path, without=obsolete, facts=facts, inputs=inputs, warnings=warnings)


def _configure_runtime(path: Path, stops: list[int]) -> None:
    """Name the graph that takes adapters, and the stop tokens that the base and all adapters share.

    onnxruntime-genai ends at its config's tokens whatever adapter is on; the others of an adapter are slmops's to stop at.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["decoder"]["filename"] = ADAPTED
    content["model"]["eos_token_id"] = eos_token_id(stops)
    artifact.write_json(path, content)


def _recorded(found: Artifact) -> str:
    item = found.manifest.input("baseline")
    return item.path if item is not None else "(unknown)"
