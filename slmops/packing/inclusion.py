"""How does one adapter get into a package? Examined against the base first, then written as a file of the graph's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops import artifact
from slmops.artifact import Artifact
from slmops.data import Interface
from slmops.errors import BadArtifact, InvalidInput
from slmops.graph import carrying
from slmops.graph.lora import A, Slot
from slmops.packing import pairs
from slmops.runtime import adapter_files, hugging_face, quantized_base
from slmops.runtime.loading import interface_of
from slmops.verification import self_test

ADAPTERS = "adapters"


@dataclass(frozen=True)
class Candidate:
    """An adapter that may go into a package."""

    name: str
    path: Path
    config: dict[str, Any]
    interface: Interface
    prompts: list[list[int]]
    """Ids of a few prompts of its validation rows, for the self-test; empty where it has none."""
    warnings: tuple[str, ...]
    quantized_base: str | None
    """Hash of the quantized weights that it was trained on; None: it was trained on the float base."""


def examine(name: str, path: Path, base_folder: Path, base: str) -> Candidate:
    """Read an adapter, and refuse what the package's graph cannot carry.

    Args:
        name: in the package.
        path: PEFT folder.
        base_folder: the package's base model.
        base: its fingerprint.

    Raises:
        Unavailable: it does more than a pair of matrices a layer.
        BadArtifact: not an adapter, changed, or trained on another base.
    """
    config = hugging_face.read_adapter_config(path)
    found = artifact.checked(path, "adapter", "give the folder that `slmops finetune` wrote")
    carrying.refuse_uncarried(path, config, hugging_face.parameter_shapes(path), hugging_face.parameter_shapes(base_folder))
    warnings = []
    recorded = found.manifest.input("base") if found is not None else None
    if recorded is None:
        warnings.append(f"{name}: nothing says which base it was trained on; only its shapes were checked")
    elif recorded.sha256 != base:
        raise BadArtifact(
            f"{path} was trained on another base than {base_folder}", "pack it with its own base, or train it again on this one"
        )
    if found is not None and found.manifest.facts.get("method") == "qlora":
        warnings.append(f"{name}: it was trained around a base in nf4, and runs on another here: `slmops verify` says what that costs")
    quantized = found.manifest.input("quantized_base") if found is not None else None
    interface = interface_of(path, found) if found is not None else interface_of(base_folder, artifact.find(base_folder))
    prompts = self_test.prompts_of(path, base_folder, interface)
    return Candidate(name, path, config, interface, prompts, tuple(warnings), quantized.sha256 if quantized is not None else None)


def include(folder: Path, candidate: Candidate, slots: Sequence[Slot], base: str) -> dict[str, Any]:
    """Write an adapter's file into a package; return what the manifest says of it.

    Raises:
        Unavailable: it adapts a layer that the graph computes without adapters.
        BadArtifact: its shapes are not the base's.
    """
    read = pairs.read_pairs(candidate.path, candidate.config)
    tensors = pairs.graph_tensors(read, slots, candidate.path)
    file = _free(folder / ADAPTERS, candidate.name)
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    adapter_files.write_adapter(temporary, tensors)
    temporary.replace(file)
    ranks = sorted({pair.a.shape[0] for pair in read.values()})
    return {
        "file": str(file.relative_to(folder)),
        "base": base,
        "quantized_base": candidate.quantized_base,
        "ranks": ranks,
        "targets": sorted({name.split(".")[-2] for name in read}),
        "layers": sum(name.endswith(A) for name in tensors),
        "parameters": sum(pair.a.size + pair.b.size for pair in read.values()),
        "size_bytes": file.stat().st_size,
        "interface": candidate.interface.model_dump(mode="json"),
    }


def common_stops(interface: Interface, candidates: Sequence[Candidate]) -> list[int]:
    """Return the stop tokens that the base and all adapters share, in the base's order.

    Raises:
        InvalidInput: there is none: the runtime would run on, or break off answers of another adapter.
    """
    shared = [token for token in interface.stop_token_ids if all(token in c.interface.stop_token_ids for c in candidates)]
    if not shared and candidates:
        shared = [t for t in candidates[0].interface.stop_token_ids if all(t in c.interface.stop_token_ids for c in candidates)]
    if candidates and not shared:
        shown = "; ".join(f"{c.name} {list(c.interface.stop_token_ids)}" for c in candidates)
        raise InvalidInput(f"the adapters share no stop token ({shown})", "train them with one --stop-token, or make a package of each")
    return shared


def refuse_other_grids(candidates: Sequence[Candidate], folder: Path, model: Path) -> None:
    """Raise BadArtifact where an adapter was trained around other quantized weights than those of the folder's graph.

    Args:
        candidates: those trained with `--quantized-base` are looked at.
        folder: with the graph.
        model: the base, in float.
    """
    trained = [candidate for candidate in candidates if candidate.quantized_base is not None]
    if not trained:
        return
    own = quantized_base.weights_hash(quantized_base.read_weights(folder, model))
    for candidate in trained:
        if candidate.quantized_base != own:
            raise BadArtifact(
                f"{candidate.name} was trained around other quantized weights than this package has",
                "pack it with the export that it was trained on: slmops pack EXPORT --adapter ...",
            )


def refuse_other_stops(found: Artifact, candidates: Sequence[Candidate]) -> None:
    """Raise InvalidInput where an adapter does not stop at the tokens at which a package's runtime stops."""
    import json

    content = json.loads((found.path / "genai_config.json").read_text(encoding="utf-8"))["model"]["eos_token_id"]
    stops = content if isinstance(content, list) else [content]
    for candidate in candidates:
        if not set(stops) <= set(candidate.interface.stop_token_ids):
            raise InvalidInput(
                f"{candidate.name} stops at {list(candidate.interface.stop_token_ids)}, and the package's runtime at {stops}",
                "train it with the package's stop token, or pack all of them anew",
            )


def files_of(facts: dict[str, Any]) -> list[str]:
    """Return the files that an adapter has in a package."""
    stem = facts["file"].removesuffix(adapter_files.SUFFIX)
    return [facts["file"], f"{stem}.self_test.json"]


def sweep(folder: Path) -> None:
    """Remove what an interrupted change left among a package's adapters: files that its manifest does not know."""
    known = artifact.load(folder).manifest.files
    for file in (folder / ADAPTERS).glob("*"):
        if str(file.relative_to(folder)) not in known:
            file.unlink()


def size_bytes(folder: Path) -> int:
    """Return the size of a package's graphs, weights and adapters."""
    return sum(file.stat().st_size for pattern in ("*.onnx", "*.data", f"*{adapter_files.SUFFIX}") for file in folder.rglob(pattern))


def _free(folder: Path, name: str) -> Path:
    """Return a file that is not there yet: the one that an adapter replaces is the package's until the manifest says otherwise."""
    file, number = folder / f"{name}{adapter_files.SUFFIX}", 1
    while file.exists():
        number += 1
        file = folder / f"{name}.{number}{adapter_files.SUFFIX}"
    return file
