"""What does an output folder of slmops hold, where did it come from, and is it whole and unchanged?

Every verb that writes a folder writes it as `OUT.partial`, puts `slmops.json` into it last, and renames it to `OUT`.
So a folder with a manifest is complete, and one without is not an artefact of slmops. The manifest lists each file
with its hash and carries a digest of itself: a hand-edited manifest is a changed artefact.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from slmops import environment, hashes
from slmops.errors import BadArtifact, RunFailed
from slmops.hashes import FileRecord

MANIFEST = "slmops.json"
SCHEMA = 1
Kind = Literal["adapter", "model", "export", "package", "dataset", "evaluation", "verification", "benchmark", "pipeline"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Input(BaseModel):
    """One thing that an artefact was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    role: str
    """What it was to the verb: model, base, adapter, dataset, baseline ..."""
    path: str
    """Relative to the artefact's own folder, or a hub id with `revision`."""
    sha256: str
    revision: str | None = None

    def matches(self, place: Path) -> bool:
        """Return whether a file or folder is what this was, by its hash."""
        return hashes.fingerprint(place) == self.sha256


class Manifest(BaseModel):
    """The content of `slmops.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    schema_version: int = SCHEMA
    kind: Kind
    created: str
    version: str
    command: str
    seconds: float = 0.0
    config: dict[str, Any] = {}
    inputs: list[Input] = []
    files: dict[str, FileRecord] = {}
    environment: dict[str, Any] = {}
    warnings: list[str] = []
    metrics: dict[str, Any] = {}
    interface: dict[str, Any] | None = None
    """How text goes in and out (`slmops.data.Interface`): templates, BOS rule, stop tokens. None where none applies."""
    facts: dict[str, Any] = {}
    """What only this kind has: precision and recipe of an export, token counts of a training run."""
    digest: str = ""
    """sha256 of everything above."""

    def input(self, role: str) -> Input | None:
        """Return the input of that role, or None."""
        return next((item for item in self.inputs if item.role == role), None)


@dataclass(frozen=True)
class Artifact:
    """A complete folder of slmops: where it is and what its manifest says."""

    path: Path
    manifest: Manifest

    def document(self) -> dict[str, Any]:
        """Return what `--json` prints of a verb that wrote this folder."""
        manifest = self.manifest
        return {
            "command": manifest.command,
            "ok": True,
            "artifact": str(self.path),
            "kind": manifest.kind,
            "seconds": manifest.seconds,
            "warnings": manifest.warnings,
            "metrics": manifest.metrics,
            **manifest.facts,
        }

    def find(self, role: str) -> Path | None:
        """Return the folder of an input if it is still where it was and unchanged by name; None otherwise."""
        item = self.manifest.input(role)
        if item is None:
            return None
        place = Path(os.path.normpath(self.path / item.path))
        return place if place.exists() else None


@dataclass
class Draft:
    """An artefact being written: a partial folder and the manifest so far."""

    folder: Path
    """Write files here."""
    out: Path
    """Where the folder will be once complete."""
    kind: Kind
    command: str
    config: dict[str, Any]
    inputs: list[Input] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    interface: dict[str, Any] | None = None
    hashed: hashes.Known = field(default_factory=dict)
    """Of files that will not change (`hashing`)."""
    artifact: Artifact | None = None
    """The finished artefact, after the `with` block."""

    def add_input(self, role: str, path: Path | str, sha256: str | None = None) -> None:
        """Record what the artefact is made from; its hash is taken unless given."""
        self.inputs.append(input_of(self.out, role, Path(path), sha256))

    def warn(self, text: str) -> None:
        """Record something that the user should know, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    @contextmanager
    def hashing(self) -> Iterator[None]:
        """Hash what is written so far beside the work of the block, which may read it and write more."""
        with hashes.hashing(self.folder, without=self.folder / MANIFEST, known=self.hashed) as found:
            yield
            self.hashed = found()

    def done(self) -> Artifact:
        """Return the finished artefact.

        Raises:
            RunFailed: the draft was not completed.
        """
        if self.artifact is None:
            raise RunFailed(f"{self.out} was not completed")
        return self.artifact


@contextmanager
def create(
    out: Path | str, *, kind: Kind, command: str, config: dict[str, Any] | None = None, force: bool = False, keep: str | None = None
) -> Iterator[Draft]:
    """Write an artefact, as in `with artifact.create(out, kind="model", command="merge") as draft:`.

    The folder appears at `out` when the block ends without an error, and not before. On an error or Ctrl-C what was
    written is removed, unless something there matches the pattern `keep` (training's checkpoints, for `--resume`), which is also
    left in place when writing begins again.

    Raises:
        BadArtifact: `out` holds something already and `force` is not set, or is not a folder of slmops at all.
        RunFailed: the disk is full or not writable.
    """
    out = Path(out)
    refuse_occupied(out, force=force)
    partial = partial_folder(out)
    if partial.exists() and not _holds(partial, keep):
        shutil.rmtree(partial)
    started = time.perf_counter()
    try:
        partial.mkdir(parents=True, exist_ok=True)
        draft = Draft(folder=partial, out=out, kind=kind, command=command, config=config or {})
        yield draft
        draft.artifact = _complete(draft, time.perf_counter() - started)
    except BaseException as error:
        if not _holds(partial, keep):
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunFailed(*_write_failure(out, error)) from error
        raise


def partial_folder(out: Path) -> Path:
    """Return where an artefact is written until it is complete."""
    return out.parent / f"{out.name}.partial"


def refuse_occupied(out: Path | str, *, force: bool) -> None:
    """Raise BadArtifact unless `out` is free, empty, or an artefact of slmops that `force` allows to replace."""
    out = Path(out)
    if out.is_file():
        raise BadArtifact(f"{out} is a file, not a folder to write to", "choose another folder with -o")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not force:
        raise BadArtifact(f"output folder {out} is not empty", "choose another with -o, or replace it with --force")
    if not (out / MANIFEST).is_file():
        raise BadArtifact(
            f"output folder {out} is not empty and was not written by slmops: --force leaves it alone", "choose another with -o"
        )


def load(folder: Path | str, *, kinds: tuple[Kind, ...] = ()) -> Artifact:
    """Read a folder's manifest.

    Raises:
        BadArtifact: no manifest, a manifest that is broken or edited, or an artefact of another kind.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BadArtifact(f"no such folder: {folder}", "give the folder that an earlier step wrote")
    if not path.is_file():
        raise BadArtifact(f"{folder} has no {MANIFEST}: it is incomplete or was not written by slmops", "run the step that makes it again")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (ValidationError, ValueError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise BadArtifact(f"{path} is not a manifest of slmops: {first}", "run the step that makes it again") from None
    if manifest.schema_version != SCHEMA:
        raise BadArtifact(
            f"{path} has schema {manifest.schema_version}, and this slmops reads {SCHEMA}", "use the slmops that wrote it, or make it again"
        )
    if manifest.digest != _digest(manifest):
        raise BadArtifact(f"{path} was changed after it was written", "make the folder again, or copy it again from where it came")
    if kinds and manifest.kind not in kinds:
        raise BadArtifact(
            f"{folder} is {article(manifest.kind)}, and {' or '.join(article(k) for k in kinds)} is needed",
            "see `slmops show` for what it is",
        )
    return Artifact(folder, manifest)


def find(folder: Path | str) -> Artifact | None:
    """Return the folder's artefact, or None where it has no manifest (a plain Hugging Face, PEFT or genai folder)."""
    return load(folder) if (Path(folder) / MANIFEST).is_file() else None


def checked(folder: Path | str, kind: Kind, hint: str) -> Artifact | None:
    """Return the artefact of an input folder, its kind and its hashes checked; None for a folder of somebody else's.

    Raises:
        BadArtifact: it is an artefact of another kind (with the hint given), or was changed.
    """
    folder = Path(folder)
    found = find(folder) if folder.is_dir() else None
    if found is not None and found.manifest.kind != kind:
        raise BadArtifact(f"{folder} is {article(found.manifest.kind)}, and {article(kind)} is needed", hint)
    if found is not None:
        check(found)
    return found


def changed_files(artifact: Artifact, sha256_of: Callable[[Path], str] = hashes.sha256_file) -> list[str]:
    """Hash every file of an artefact; return one `name: what is wrong` per file that is missing or differs."""
    problems = []
    for name, record in artifact.manifest.files.items():
        path = artifact.path / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != record.bytes:
            problems.append(f"{name}: {path.stat().st_size} bytes, and {record.bytes} were written")
        elif sha256_of(path) != record.sha256:
            problems.append(f"{name}: content changed")
    return problems


def check(artifact: Artifact) -> None:
    """Refuse an artefact whose files are not those that were written; call it before anything of it is loaded.

    Large files are hashed once, and again when they were touched: see `slmops.hashes`.

    Raises:
        BadArtifact: a file is missing or changed.
    """
    problems = changed_files(artifact, hashes.kept_sha256)
    if problems:
        raise BadArtifact(
            f"{artifact.path} is not what was written: {'; '.join(problems)}", "make it again, or copy it again from where it came"
        )


def seal(folder: Path | str, *, without: Sequence[Path] = (), **changes: Any) -> Artifact:
    """Write a folder's hashes anew, after its files were changed on purpose.

    Args:
        folder: an artefact.
        without: files that are about to be removed.
        changes: manifest fields to replace, such as `interface`.
    """
    folder = Path(folder)
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes()).model_copy(update=changes)
    gone = {str(file.relative_to(folder)) for file in without}
    records = {name: record for name, record in hashes.records(folder, without=folder / MANIFEST).items() if name not in gone}
    return Artifact(folder, _write(folder, manifest.model_copy(update={"files": records})))


def input_of(out: Path, role: str, place: Path, sha256: str | None = None) -> Input:
    """Return the record of one input of the artefact at `out`; its hash is taken unless given."""
    return Input(role=role, path=os.path.relpath(place.resolve(), out.resolve()), sha256=sha256 or hashes.fingerprint(place))


def require_model(folder: Path | str) -> Path:
    """Return the folder of a Hugging Face model, once it is seen to be one with safe weights.

    Raises:
        BadArtifact: no config, no weights, or weights only as a pickle, which runs code when it is loaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadArtifact(f"no such model folder: {folder}", "give a Hugging Face folder (config.json and *.safetensors)")
    if not (folder / "config.json").is_file():
        raise BadArtifact(
            f"{folder} has no config.json: it is not a Hugging Face model", "give a folder with config.json and *.safetensors"
        )
    if not any(folder.glob("*.safetensors")):
        pickles = [file.name for pattern in _PICKLES for file in folder.glob(pattern)]
        if pickles:
            raise BadArtifact(
                f"{folder} has its weights only as a pickle ({pickles[0]}), which can run code when loaded",
                "convert it to safetensors with the tool that made it; slmops loads no pickle",
            )
        raise BadArtifact(f"{folder} has no weights (*.safetensors)", "download or convert the model's weights first")
    return folder


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file by way of a temporary one, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _complete(draft: Draft, seconds: float) -> Artifact:
    from slmops import __version__

    manifest = Manifest(
        kind=draft.kind,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        command=draft.command,
        seconds=round(seconds, 3),
        config=draft.config,
        inputs=draft.inputs,
        files=hashes.records(draft.folder, without=draft.folder / MANIFEST, known=draft.hashed),
        environment=environment.snapshot(),
        warnings=draft.warnings,
        metrics=draft.metrics,
        interface=draft.interface,
        facts=draft.facts,
    )
    manifest = _write(draft.folder, manifest)
    old = draft.out.with_name(f"{draft.out.name}.old")
    if draft.out.exists():  # set aside first, so that an interrupt never leaves neither
        draft.out.rename(old)
    draft.folder.rename(draft.out)
    shutil.rmtree(old, ignore_errors=True)
    return Artifact(draft.out, manifest)


def _holds(partial: Path, keep: str | None) -> bool:
    return keep is not None and any(partial.glob(keep))


def _write(folder: Path, manifest: Manifest) -> Manifest:
    # Through JSON once, so that the digest is that of what a reader will parse.
    manifest = Manifest.model_validate_json(manifest.model_dump_json())
    manifest = manifest.model_copy(update={"digest": _digest(manifest)})
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def _digest(manifest: Manifest) -> str:
    content = manifest.model_dump(mode="json", exclude={"digest"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_failure(out: Path, error: OSError) -> tuple[str, str]:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {out} could not be written", "free some space or write elsewhere with -o"
    return f"could not write {out}: {error.strerror or error}", "check the path and its permissions"


def article(kind: str) -> str:
    """Return a kind with its article, for messages."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
