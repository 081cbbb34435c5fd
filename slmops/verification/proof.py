"""Does a package behave as its model did in PyTorch? What `slmops verify` does, stage by stage, until one fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops import artifact, progress
from slmops.artifact import Artifact
from slmops.config import VerifySettings, flat, load
from slmops.errors import BadArtifact, InvalidInput
from slmops.runtime import loading
from slmops.runtime.engines import ENGINES
from slmops.runtime.package import adapter_facts
from slmops.runtime.static_runner import StaticRunner
from slmops.verification import behaviour, surface, weights
from slmops.verification.adapters import check_adapters
from slmops.verification.bars import bars_for
from slmops.verification.self_test import check_self_test
from slmops.verification.stages import NAMES, Stage
from slmops.verification.subject import Subject, find_subject

EXECUTED, BUILT = "executed", "built; numerics by a float twin on the CPU"
COMPILED = "compiled; numerics by a stand-in for the NPU"


@dataclass(frozen=True)
class Verification:
    """The outcome of all stages that were run."""

    package: Path
    baseline: Path | None
    precision: str
    stages: tuple[Stage, ...]
    seconds: float
    warnings: tuple[str, ...] = ()
    level: str = EXECUTED
    """What ran: the package itself, or its float twin."""
    written: Path | None = None

    @property
    def failed_stage(self) -> str | None:
        """The first stage that failed, or None."""
        return next((stage.name for stage in self.stages if stage.status == "fail"), None)

    def document(self) -> dict[str, Any]:
        """Return the JSON document of `slmops verify`."""
        return {
            "command": "verify",
            "ok": self.failed_stage is None,
            "passed": self.failed_stage is None,
            "failed_stage": self.failed_stage,
            "conclusive": all(stage.status != "inconclusive" for stage in self.stages),
            "package": str(self.package),
            "baseline": str(self.baseline) if self.baseline else None,
            "precision": self.precision,
            "level": self.level,
            "stages": [stage.document() for stage in self.stages],
            "seconds": self.seconds,
            "warnings": list(self.warnings),
            **({"artifact": str(self.written), "kind": "verification"} if self.written else {}),
        }


def verify(package: str | Path, *, config: Any = None, **overrides: Any) -> Verification:
    """Prove that a package behaves as its model did in PyTorch, or name the first stage where it does not.

    Args:
        package: an export, or any folder that onnxruntime-genai or OpenVINO runs (then with `baseline`).
        config: YAML file or mapping of `VerifySettings`.
        overrides: single settings, such as `data="test.jsonl"`.

    Raises:
        BadArtifact: not an export, or its baseline is unknown, gone or changed.
        InvalidInput: a setting or the rows are wrong, or the package has no such adapter.
        Unavailable: PyTorch or the package's runtime is missing.
    """
    settings = load(VerifySettings, config, **overrides)
    started = time.perf_counter()
    folder = Path(package)
    if loading.kind_of(folder) != "export":
        raise BadArtifact(
            f"{folder} is not an export: there is no {' and no '.join(engine.marker for engine in ENGINES)} in it",
            "give the folder that `slmops export` wrote",
        )
    if settings.out is not None:
        artifact.refuse_occupied(settings.out, force=settings.force)
    found, edited = _manifest(folder)
    for name in (settings.adapter or ()) if edited is None else ():
        _require_adapter(folder, found, name)
    stages = [surface.check_files(found, edited)]
    subject, precision, level, warnings = None, "", EXECUTED, []
    if settings.self_test and stages[0].status != "fail":
        precision = str(found.manifest.facts.get("precision", "")) if found is not None else ""
        stages.append(check_self_test(folder, found, settings.adapter, settings.threads))
    elif stages[0].status != "fail":
        subject = find_subject(folder, found, settings)
        precision = subject.precision
        if subject.absence is not None:
            level = BUILT
            warnings.append(f"the package itself did not run ({subject.absence}): its figures are those of a float twin on the CPU")
        if isinstance(subject.candidate, StaticRunner):
            level = EXECUTED if subject.candidate.on_npu else COMPILED
            warnings.append(f"it ran on {subject.candidate.ran_on}")
        stages += _run(subject, warnings)
    baseline = subject.baseline if subject else None
    result = Verification(folder, baseline, precision, tuple(stages), round(time.perf_counter() - started, 3), tuple(warnings), level)
    return _written(result, settings) if settings.out is not None else result


def _run(subject: Subject, warnings: list[str]) -> list[Stage]:
    """Run the stages after `files`; stop at the first that fails."""
    bars = bars_for(subject.precision, subject.settings)
    checks: dict[str, Callable[[], Stage]] = {
        "tokenizer": lambda: surface.check_tokenizer(subject),
        "template": lambda: surface.check_template(subject),
        "stop_tokens": lambda: surface.check_stop_tokens(subject),
        "graph": lambda: weights.check_graph(subject),
        "logits": lambda: behaviour.check_logits(subject, bars),
        "text": lambda: behaviour.check_text(subject, bars),
        "retention": lambda: behaviour.check_retention(subject),
        "adapters": lambda: check_adapters(subject, bars),
        "self_test": lambda: _self_test(subject),
    }
    stages = []
    for name in NAMES[1:]:
        stage = checks[name]()
        progress.say(f"{stage.name}: {stage.status}")
        stages.append(stage)
        if stage.status == "inconclusive":
            warnings.append(f"{name}: not proven, {stage.explanation}")
        if stage.status == "fail":
            break
    if bars.overridden:
        warnings.append(f"bars set by hand: {', '.join(bars.overridden)}")
    subject.close()
    return stages


def _self_test(subject: Subject) -> Stage:
    if subject.absence is not None:
        return Stage("self_test", "skipped", "its answers are the float twin's: a machine with the provider compares its own with them")
    return check_self_test(subject.package, subject.found, subject.settings.adapter, subject.threads)


def _require_adapter(folder: Path, found: Artifact | None, name: str) -> None:
    """Raise InvalidInput where a folder has no such adapter: nothing would be proven of it."""
    if found is None:
        raise InvalidInput(f"adapter: {folder} is not a package with adapters", "leave --adapter out")
    adapter_facts(found, name)


def _manifest(folder: Path) -> tuple[Artifact | None, str | None]:
    """Return the package's artefact, and what is wrong with its manifest, which is a changed file like any other."""
    try:
        return artifact.find(folder), None
    except BadArtifact as error:
        return None, error.message


def _written(result: Verification, settings: VerifySettings) -> Verification:
    """Write the verification as an artefact."""
    from dataclasses import replace

    assert settings.out is not None
    with artifact.create(settings.out, kind="verification", command="verify", config=flat(settings), force=settings.force) as draft:
        draft.add_input("package", result.package)
        draft.warnings = list(result.warnings)
        draft.facts = {key: value for key, value in result.document().items() if key in ("passed", "failed_stage", "precision", "level")}
        artifact.write_json(draft.folder / "verification.json", result.document())
    return replace(result, written=draft.done().path)
