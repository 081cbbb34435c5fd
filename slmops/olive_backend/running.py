"""What does `slmops olive run` do? A workflow is checked to the last key, run by Olive in a process of its own, and held against what it left behind.

Olive ends with exit code 0 after most failures. Here no model is an error, with Olive's own line about it.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slmops import artifact, environment, progress
from slmops.config import RunWorkflowSettings, load
from slmops.errors import BadArtifact, InvalidInput, RunFailed, SlmopsError, Unavailable, raise_if_killed
from slmops.olive_backend.process import LOG, last_error, run_module, whole_lines
from slmops.olive_backend.requirements import require_olive
from slmops.olive_backend.workflow_file import cache_warnings, output_folder, read_workflow

_PREVIOUS = "previous"
# Files by which Olive's own output folders are known (olive 0.13, engine.py).
_TRACES = ("model_config.json", "run_history.txt", "footprint.json", LOG)
_TOLD = re.compile(
    r"\[(INFO|WARNING|ERROR)\] \[[^]]*\] (Running pass .+|Pass .+ finished in .+|Step \d+ with .+|Input model evaluation results.*)"
)
_ERRORS: dict[int, type[SlmopsError]] = {error.exit_code: error for error in (RunFailed, InvalidInput, Unavailable, BadArtifact)}
_ON_NF4 = (
    "it learned on the base in nf4, and a plain PEFT folder does not say so: `slmops merge` would put it on the base in float; "
    "`slmops finetune --method qlora --engine olive` keeps it in its manifest"
)


@dataclass(frozen=True)
class WorkflowRun:
    """What a workflow made, or, where it was only checked, what it would run."""

    workflow: Path
    out: Path
    result: dict[str, Any]
    checked_only: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def made(self) -> Path:
        """The folder that a next command takes: Olive puts adapters and Hugging Face models beside its own files."""
        for key in ("adapter_path", "model_path"):
            if self.result.get(key):
                place = Path(self.result[key])
                return place if place.is_dir() else place.parent
        return self.out

    @property
    def _quantized(self) -> bool:
        return any(each["type"].lower() == "qlora" for each in self.result["passes"])

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        common = {"workflow": str(self.workflow), "passes": self.result["passes"], "warnings": self.warnings}
        if self.checked_only:
            return {"checked": True, **common}
        found = artifact.find(self.made)
        adapter = self.result.get("adapter_path")
        kind = found.manifest.kind if found else "adapter" if adapter else "model"
        facts = found.manifest.facts if found else {}
        warnings = [*self.warnings, *(found.manifest.warnings if found else []), *([_ON_NF4] if adapter and self._quantized else [])]
        return {
            **{key: facts[key] for key in ("device", "provider", "precision", "level", "size_bytes", "recipe") if key in facts},
            "artifact": _near(self.made),
            "kind": kind,
            "base": _near(Path(self.result["model_path"])) if adapter else None,
            **common,
            "warnings": warnings,
            "model_type": self.result["model_type"],
            "metrics": self.result["metrics"],
            "runs": self.result["runs"],
            "peak_memory_bytes": self.result["peak_memory_bytes"],
            "log": _near(self.out / LOG),
        }


def run_workflow(workflow: str | Path, *, config: Any = None, **overrides: Any) -> WorkflowRun:
    """Run a workflow of Olive's; relative paths in it count from the working directory, as in `olive run`.

    Args:
        workflow: JSON file; passes of Olive's and of slmops.
        config: YAML file or mapping of `RunWorkflowSettings`.
        overrides: single settings, such as `check=True`.

    Raises:
        InvalidInput: no such file, a key or pass that Olive would drop or refuse, or a setting that a pass of ours refuses.
        Unavailable: Olive is missing, or what a pass of ours needs.
        BadArtifact: the workflow's output folder is not empty.
        RunFailed: Olive failed, or made no model.
    """
    settings = load(RunWorkflowSettings, config, **overrides)
    path = Path(workflow)
    require_olive("to run a workflow")
    content = read_workflow(path)
    out = output_folder(content, path)
    if not settings.check:
        _require_free(out, force=settings.force)
    warnings = cache_warnings(content)
    with TemporaryDirectory(prefix="slmops-olive-", dir=_parent(out)) as scratch:
        work = Path(scratch)
        (work / "tmp").mkdir()
        if not settings.check and out.is_dir():
            out.rename(work / _PREVIOUS)
        request = {"workflow": str(path), "check": settings.check}
        (work / "request.json").write_text(json.dumps(request), encoding="utf-8")
        label = "check the workflow" if settings.check else f"run {path.name}"
        try:
            result = _judge(work, _execute(work, settings.threads or environment.usable_cores(), label), path, out)
        except BaseException as error:  # whatever it is, what lay there before must not go with the scratch folder
            if not settings.check:
                _restore(work, out, keep_log=isinstance(error, RunFailed))
            raise
        if not settings.check:
            shutil.copyfile(work / LOG, out / LOG)
    return WorkflowRun(path, out, result, settings.check, warnings)


def _require_free(out: Path, *, force: bool) -> None:
    """Refuse an output folder that may not be replaced: Olive writes into whatever lies there.

    Raises:
        BadArtifact: it is not empty, and nothing allows to replace it.
    """
    if out.is_file():
        raise BadArtifact(f"output_dir {out} is a file", "choose another in the workflow")
    if not out.is_dir() or {file.name for file in out.iterdir()} <= {LOG}:  # the log of a run that failed
        return
    if not force:
        raise BadArtifact(f"output_dir {out} is not empty", "choose another in the workflow, or replace it with --force")
    if not any((out / name).is_file() for name in (*_TRACES, artifact.MANIFEST)):
        raise BadArtifact(
            f"output_dir {out} is not empty and was not written by Olive: --force leaves it alone", "choose another in the workflow"
        )


def _restore(work: Path, out: Path, *, keep_log: bool) -> None:
    """Put back what lay in the output folder before a run that failed, with that run's log."""
    shutil.rmtree(out, ignore_errors=True)
    if (work / _PREVIOUS).is_dir():
        (work / _PREVIOUS).rename(out)
    if keep_log:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(work / LOG, out / LOG)


def _parent(out: Path) -> Path:
    """Return the nearest folder above that is there: what Olive writes meanwhile goes beside the output, not into a small /tmp."""
    return next(place for place in out.resolve().parents if place.is_dir())


def _execute(work: Path, threads: int, label: str) -> int:
    """Run Olive's process in the user's folder, telling what its log says about passes; return its exit code."""
    place = 0

    def tell() -> None:
        nonlocal place
        lines, place = whole_lines(work / LOG, place)
        for line in lines:
            told = _TOLD.search(line.decode("utf-8", errors="replace"))
            if told:
                progress.say(told[2])

    with progress.task(label):
        return run_module("slmops.olive_backend.run_process", work, tell, folder=None, cuda=True, threads=threads)


def _judge(work: Path, code: int, path: Path, out: Path) -> dict[str, Any]:
    """Return what the process made.

    Raises:
        SlmopsError: as in its process, where the error was one of ours.
        RunFailed: Olive failed, or made no model.
    """
    log = (work / LOG).read_text(encoding="utf-8", errors="replace")
    if (work / "error.json").is_file():
        error = json.loads((work / "error.json").read_text(encoding="utf-8"))
        raise _ERRORS.get(error["exit_code"], RunFailed)(error["message"], error["hint"])
    raise_if_killed("Olive", code, "use a smaller model or batch")
    if code != 0 or not (work / "result.json").is_file():
        raise RunFailed(f"Olive made no model of {path}: {last_error(log)}", f"its whole log is {_near(out / LOG)}")
    return json.loads((work / "result.json").read_text(encoding="utf-8"))


def _near(path: Path) -> str:
    """Return a path as people type it: relative where it lies below this folder."""
    place, here = path.resolve(), Path.cwd()
    return str(place.relative_to(here) if place.is_relative_to(here) else place)
