"""Has a step already been done with these inputs and these settings? Kept in `<out>/pipeline.json`.

A step's key is the hash of the verb, its settings, the content of its inputs and slmops's version. Content is told by
hashes of the files that decide what a model does, not by time or place: a fine-tune that was run again and gave the same
adapter leaves everything after it as it is.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slmops import __version__, artifact, environment, hashes
from slmops.config import flat
from slmops.data.tokenizer_files import TOKENIZER_FILES
from slmops.errors import BadArtifact, InvalidInput
from slmops.pipeline.plan import Plan, Reference, Step
from slmops.pipeline.verbs import DECIDED, VERBS

FILE = "pipeline.json"
_SCHEMA = 1
# Beside weights and configs: what text becomes, and how a runtime stops.
_DECIDING = (*TOKENIZER_FILES, "generation_config.json", "config.json", "adapter_config.json", "genai_config.json")
_WEIGHTS = (".safetensors", ".onnx", ".data", ".onnx_adapter")


@dataclass
class State:
    """The records of a pipeline's steps: name -> key, status (`running`, `done`, `failed`), digest, seconds."""

    path: Path
    steps: dict[str, dict[str, Any]]

    def begin(self, step: Step, key: str) -> None:
        """Record that a step has begun; the record stays so when the process is killed."""
        self._record(step, key=key, status="running", version=__version__)

    def end(self, step: Step, key: str, *, seconds: float, digest: str | None) -> None:
        """Record that a step has given its artefact or document."""
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        self._record(step, key=key, status="done", version=__version__, digest=digest, seconds=round(seconds, 3), finished=finished)

    def fail(self, step: Step, key: str) -> None:
        """Record that a step ended in an error: it starts anew the next time."""
        self._record(step, key=key, status="failed", version=__version__)

    def was_stopped(self, step: Step, key: str) -> bool:
        """Whether the same step, with the same key, had begun and was killed or interrupted."""
        record = self.steps.get(step.name, {})
        return record.get("status") == "running" and record.get("key") == key

    def is_done(self, step: Step, key: str) -> bool:
        """Whether the step was completed with this key."""
        record = self.steps.get(step.name, {})
        return record.get("status") == "done" and record.get("key") == key

    def _record(self, step: Step, **values: Any) -> None:
        self.steps[step.name] = {"verb": step.verb, **values}
        artifact.write_json(self.path, {"schema_version": _SCHEMA, "steps": self.steps})


def read_state(out: Path) -> State:
    """Read the state of a pipeline's output folder; empty where it has not run yet.

    Raises:
        BadArtifact: the file is broken, or of another schema.
    """
    path = out / FILE
    if not path.is_file():
        return State(path, {})
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] != _SCHEMA or not isinstance(content["steps"], dict):
            raise ValueError(f"schema {content['schema_version']}")
    except (ValueError, KeyError, TypeError) as error:
        raise BadArtifact(f"{path} is not the state of a pipeline ({error})", f"remove {out}, or give another `out`") from None
    return State(path, content["steps"])


def refuse_foreign(plan: Plan, steps: tuple[Step, ...], state: State) -> None:
    """Raise BadArtifact where a step would replace a folder that this pipeline did not write."""
    for step in steps:
        if VERBS[step.verb].makes is not None and step.name not in state.steps:
            folder = plan.out / step.name
            if folder.exists() and (folder.is_file() or any(folder.iterdir())):
                raise BadArtifact(f"{folder} is there already, and this pipeline did not write it", "give another `out`, or move it away")


def key_of(plan: Plan, step: Step) -> str:
    """Return the hash of all that decides what a step gives.

    Raises:
        BadArtifact: an input is incomplete or changed.
        InvalidInput: a file of an earlier step's that it did not write.
    """
    told_by_content = (*DECIDED, *step.inputs, *(role.partition(".")[0] for role in step.inputs))
    settings = {name: value for name, value in flat(step.settings).items() if name not in told_by_content}
    inputs = {role: _content(plan, reference) for role, reference in step.inputs.items()}
    # Timings of another machine are no timings of this one.
    machine = [environment.machine().processor, environment.usable_cores()] if step.verb == "bench" else None
    return _hash({"version": __version__, "verb": step.verb, "settings": settings, "inputs": inputs, "machine": machine})


def _content(plan: Plan, reference: Reference) -> str:
    place = plan.place(reference)
    if reference.file and not Path(place).is_file():
        raise InvalidInput(
            f"step {reference.step} wrote no file {reference.file}", f"see {plan.out / str(reference.step)} for what it wrote"
        )
    return content_of(place)


def content_of(place: str) -> str:
    """Return a hash of what a file, a folder or a hub id holds, as far as it decides results.

    Raises:
        BadArtifact: an artefact whose files are not those that were written.
    """
    path = Path(place)
    if not path.exists():
        return f"hub:{place}"  # its revision is recorded by the step that fetches it
    if path.is_file():
        return hashes.sha256_file(path)
    found = artifact.find(path)
    if found is None:
        names = sorted(file.name for file in path.iterdir() if file.is_file() and _decides(file.name))
        return _hash([hashes.fingerprint(path), {name: hashes.sha256_file(path / name) for name in names}])
    artifact.check(found)
    manifest = found.manifest
    if manifest.kind not in ("model", "adapter", "export", "package"):
        return manifest.digest
    return _hash(
        [
            manifest.interface,
            manifest.facts.get("adapters"),
            {name: record.sha256 for name, record in manifest.files.items() if _decides(name)},
        ]
    )


def _decides(name: str) -> bool:
    return name in _DECIDING or name.endswith(_WEIGHTS)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
