"""Where did this folder come from, step by step? Its manifest, those of its inputs, and theirs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops import artifact
from slmops.errors import BadArtifact

_DEEPEST = 20


@dataclass(frozen=True)
class Origin:
    """One input of an artefact, and where that came from in turn."""

    role: str
    path: str
    state: str
    """`ok`; `gone` where nothing is there now; `changed` where its manifest was edited; `plain` where it has none."""
    artifact: artifact.Artifact | None
    inputs: tuple[Origin, ...] = ()

    def document(self) -> dict[str, Any]:
        """Return the JSON form, a tree."""
        manifest = self.artifact.manifest if self.artifact else None
        return {
            "role": self.role,
            "path": self.path,
            "state": self.state,
            "kind": manifest.kind if manifest else None,
            "command": manifest.command if manifest else None,
            "created": manifest.created if manifest else None,
            "inputs": [origin.document() for origin in self.inputs],
        }


@dataclass(frozen=True)
class Lineage:
    """A folder of slmops with everything that led to it."""

    artifact: artifact.Artifact
    missing: tuple[str, ...]
    """Files that the manifest lists and the folder lacks, or that have another size now."""
    inputs: tuple[Origin, ...]

    def document(self) -> dict[str, Any]:
        """Return what `slmops show --json` prints."""
        manifest = self.artifact.manifest
        return {
            "command": "show",
            "ok": not self.missing,
            "warnings": [f"{name}: missing or of another size than was written" for name in self.missing],
            "artifact": str(self.artifact.path),
            "kind": manifest.kind,
            "size_bytes": sum(record.bytes for record in manifest.files.values()),
            "manifest": manifest.model_dump(mode="json"),
            "lineage": [origin.document() for origin in self.inputs],
        }


def show(path: Path | str) -> Lineage:
    """Return a folder's manifest and lineage (`slmops show`). Sizes are compared; hashes are `verify`'s business.

    Raises:
        BadArtifact: no such folder, no manifest, or a manifest that was edited.
    """
    found = artifact.load(path)
    missing = tuple(name for name, record in found.manifest.files.items() if _size(found.path / name) != record.bytes)
    return Lineage(found, missing, _origins(found, _DEEPEST))


def _origins(child: artifact.Artifact, depth: int) -> tuple[Origin, ...]:
    if not depth:
        return ()
    return tuple(_origin(child, item, depth) for item in child.manifest.inputs)


def _origin(child: artifact.Artifact, item: artifact.Input, depth: int) -> Origin:
    place = child.find(item.role)
    if place is None:
        return Origin(item.role, item.path, "plain" if item.revision else "gone", None)
    if not (place / artifact.MANIFEST).is_file():
        return Origin(item.role, str(place), "plain", None)
    try:
        parent = artifact.load(place)
    except BadArtifact:
        return Origin(item.role, str(place), "changed", None)
    return Origin(item.role, str(place), "ok", parent, _origins(parent, depth - 1))


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
