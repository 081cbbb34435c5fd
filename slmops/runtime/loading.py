"""What is behind a path, and how is it loaded to run? Model, adapter, export, package: each with its tokenizer and interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slmops import artifact, environment
from slmops.artifact import Artifact
from slmops.data import Interface, Tokenizer, choose_interface
from slmops.errors import BadArtifact, InvalidInput
from slmops.runtime.engines import ENGINES, engine_of, open_export, weights_bytes
from slmops.runtime.package import Package, Selection, interface_with
from slmops.runtime.runner import Runner


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run, and how text goes in and out of it."""

    runner: Runner
    tokenizer: Tokenizer
    interface: Interface
    artifact: Artifact | None
    """None for a folder that slmops did not write."""
    kind: str
    """`export`, `adapter` or `model`."""


def kind_of(folder: Path) -> str:
    """Say what a folder is by its files: `export` (an engine runs it), `adapter` (PEFT) or `model` (Hugging Face).

    Raises:
        BadArtifact: none of the three, or no such folder.
    """
    if not folder.is_dir():
        raise BadArtifact(f"no such folder: {folder}", "give the folder of a model, adapter or export")
    if engine_of(folder) is not None:  # first: an OpenVINO export has a config.json too
        return "export"
    for name, kind in (("adapter_config.json", "adapter"), ("config.json", "model")):
        if (folder / name).is_file():
            return kind
    markers = " or ".join(engine.marker for engine in ENGINES)
    raise BadArtifact(f"{folder} holds no model, adapter or export", f"give a folder with config.json, adapter_config.json, {markers}")


def parse_selection(texts: Sequence[str] | None) -> dict[str, float]:
    """Read adapters of a package as they are typed: `NAME`, or `NAME=WEIGHT`.

    Raises:
        InvalidInput: a weight that is no number, or a name twice.
    """
    weights: dict[str, float] = {}
    for text in texts or ():
        name, has_weight, weight = text.partition("=")
        try:
            value = float(weight) if has_weight else 1.0
        except ValueError:
            raise InvalidInput(f"adapter: {text} has no number after the =", "write NAME, or NAME=0.7") from None
        if name in weights:
            raise InvalidInput(f"adapter: {name} is named twice", "name each once, with its weight")
        weights[name] = value
    return weights


def open_model(
    folder: Path | str,
    *,
    threads: int | None = None,
    base_only: bool = False,
    precision: str = "fp32",
    adapter: Selection = None,
) -> Loaded:
    """Load what is behind a path.

    An artefact is checked against its hashes before anything of it is loaded.

    Args:
        folder: of an export, a model or an adapter (base and adapter are loaded, unmerged).
        threads: of the engine; None: by the size of the weights (`default_threads`).
        base_only: of an adapter, its base alone, with the adapter's interface.
        precision: of a PyTorch model: fp32 or bf16.
        adapter: of a package, the adapter to turn on: a name, or weights by name; None: its base.

    Raises:
        BadArtifact: incomplete, changed, or not a model.
        Unavailable: the engine is not installed.
        InvalidInput: the folder has no such adapter.
    """
    folder = Path(folder)
    runner = open_runner(folder, threads=threads, base_only=base_only, precision=precision, adapter=adapter)
    found = artifact.find(folder)
    interface = interface_with(found, adapter) if found is not None and adapter else interface_of(folder, found)
    return Loaded(runner, Tokenizer.load(_tokenizer_folder(folder, runner)), interface, found, kind_of(folder))


def open_runner(
    folder: Path | str,
    *,
    threads: int | None = None,
    base_only: bool = False,
    precision: str = "fp32",
    adapter: Selection = None,
) -> Runner:
    """Load what runs of a path, without tokenizer and interface: see `open_model`."""
    folder = Path(folder)
    kind = kind_of(folder)
    found = artifact.find(folder)
    if adapter:
        if found is None or found.manifest.kind != "package":
            raise InvalidInput(f"adapter: {folder} is not a package with adapters", "leave --adapter out, or `slmops pack` one")
        return Package(folder, threads=threads).runner(adapter)
    if found is not None:
        artifact.check(found)
    count = threads or default_threads(folder)
    return open_export(folder, count) if kind == "export" else _torch(folder, kind, found, count, base_only, precision)


def default_threads(folder: Path) -> int:
    """Return how many threads a folder's model runs with unless somebody says otherwise."""
    kind = kind_of(folder)
    place = folder
    if kind == "adapter":
        from slmops.runtime import hugging_face

        place = hugging_face.find_base(folder, artifact.find(folder), hugging_face.read_adapter_config(folder))
    size = weights_bytes(place) if kind == "export" else sum(file.stat().st_size for file in place.glob("*.safetensors"))
    return environment.threads_for(size)


def interface_of(folder: Path, found: Artifact | None) -> Interface:
    """Return the interface that travels with a folder, or what can be told from a folder of somebody else's."""
    if found is not None and found.manifest.interface is not None:
        return Interface.model_validate(found.manifest.interface)
    return choose_interface(folder, [])[0]


def _torch(folder: Path, kind: str, found: Artifact | None, threads: int, base_only: bool, precision: str) -> Runner:
    from slmops.runtime import hugging_face
    from slmops.runtime.torch_runner import TorchRunner

    if kind == "model":
        return TorchRunner(hugging_face.load_model(artifact.require_model(folder), precision=precision), folder, threads)
    details = hugging_face.read_adapter_config(folder)
    base = hugging_face.find_base(folder, found, details)
    if base_only:
        return TorchRunner(hugging_face.load_base_of(base, folder, precision=precision), base, threads)
    return TorchRunner(hugging_face.load_adapted(base, folder, precision=precision), folder, threads)


def _tokenizer_folder(folder: Path, runner: Runner) -> Path:
    """A PEFT folder of somebody else's may come without a tokenizer: its base has one."""
    return folder if (folder / "tokenizer.json").is_file() or runner.engine != "torch" else Path(getattr(runner, "folder", folder))
