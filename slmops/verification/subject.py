"""What is verified, against what, on which rows? All of it from the lineage, unless the user says otherwise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slmops import artifact
from slmops.artifact import Artifact
from slmops.config import VerifySettings
from slmops.data import Corpus, Interface, Row, Tokenizer, encode_rows, read_rows, row_format_of
from slmops.errors import BadArtifact, InvalidInput
from slmops.runtime import loading
from slmops.runtime.genai_runner import FULL, GenaiRunner
from slmops.runtime.runner import Runner

_MOST_ROWS = 1000


@dataclass
class Subject:
    """A package beside its baseline. Models are loaded when a stage first needs them."""

    package: Path
    found: Artifact | None
    baseline: Path
    baseline_found: Artifact | None
    base: Path | None
    """The model before the fine-tune; None where it is unknown."""
    rows: list[Row]
    rows_from: str
    """Where the rows came from, for people; empty where there are none."""
    settings: VerifySettings

    @property
    def lost_base(self) -> str | None:
        """Where the model before the fine-tune was, if the lineage names one and it is no longer there."""
        recorded = self.baseline_found.manifest.input("base") if self.baseline_found is not None else None
        return recorded.path if recorded is not None and self.base is None else None

    @property
    def threads(self) -> int:
        """Threads of both sides."""
        return self.settings.threads or loading.default_threads(self.baseline)

    @cached_property
    def interface(self) -> Interface:
        """How text goes into the package and out of it; a folder of somebody else's states nothing, and is asked as its baseline is."""
        return loading.interface_of(self.package, self.found) if self.found is not None else self.baseline_interface

    @cached_property
    def baseline_interface(self) -> Interface:
        """How text goes into the baseline and out of it."""
        return loading.interface_of(self.baseline, self.baseline_found)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The baseline's tokenizer: the truth in every stage after `tokenizer`."""
        return Tokenizer.load(self.baseline)

    @cached_property
    def graph_path(self) -> Path:
        """The graph with all logits."""
        return (
            self.package / FULL if (self.package / FULL).is_file() else self.package / self.runtime_config["model"]["decoder"]["filename"]
        )

    @cached_property
    def runtime_config(self) -> dict[str, Any]:
        """The package's `genai_config.json`."""
        try:
            return json.loads((self.package / "genai_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadArtifact(f"{self.package} has no genai_config.json that can be read: {error}", "export the model again") from None

    @cached_property
    def candidate(self) -> GenaiRunner:
        """The package, running."""
        return GenaiRunner(self.package, self.threads)

    @cached_property
    def reference(self) -> Runner:
        """The baseline in PyTorch, float32."""
        return loading.open_model(self.baseline, threads=self.threads).runner

    @cached_property
    def corpus(self) -> Corpus:
        """The held-out rows as tokens, by the baseline's interface, bounded by what the package can hold; shortest first."""
        if not self.rows:
            return Corpus.empty()
        limit = min(self.baseline_interface.max_length_tokens, self.candidate.max_length_tokens)
        corpus = encode_rows(self.rows, self.tokenizer, self.baseline_interface.model_copy(update={"max_length_tokens": limit}))
        corpus.sequences.sort(key=lambda sequence: len(sequence.ids))
        return corpus

    @cached_property
    def precision(self) -> str:
        """The package's precision: from its manifest, or read off the graph."""
        if self.found is not None and "precision" in self.found.manifest.facts:
            return str(self.found.manifest.facts["precision"])
        from slmops.graph.linears import linears, load_graph

        graph = load_graph(self.graph_path)
        bits = [linear.scheme.bits for linear in linears(graph) if linear.scheme is not None]
        if bits:
            return f"int{min(bits)}"
        types = {str(value.dtype) for value in graph.graph.initializers.values() if value.shape is not None and len(value.shape) == 2}
        return "fp16" if "FLOAT16" in types else "bf16" if "BFLOAT16" in types else "fp32"

    def close(self) -> None:
        """Free what was loaded."""
        for name in ("candidate", "reference"):
            runner = self.__dict__.pop(name, None)
            if runner is not None:
                runner.close()


def find_subject(package: Path, found: Artifact | None, settings: VerifySettings) -> Subject:
    """Find the baseline, its base and the held-out rows of a package.

    Raises:
        BadArtifact: the baseline is unknown, gone, or not the one that the package was exported from.
        InvalidInput: the rows cannot be read.
    """
    baseline = _baseline(package, found, settings.baseline)
    baseline_found = artifact.find(baseline)
    base = _base(baseline_found, settings.base)
    rows, source = _rows(settings, baseline, baseline_found)
    return Subject(package, found, baseline, baseline_found, base, rows, source, settings)


def _baseline(package: Path, found: Artifact | None, given: str | None) -> Path:
    if given:
        artifact_of = Path(given)
        loading.kind_of(artifact_of)
        return artifact_of
    recorded = found.manifest.input("baseline") if found is not None else None
    if found is None or recorded is None:
        raise BadArtifact(f"{package} does not say which model it was exported from", "give that model with --baseline")
    place = found.find("baseline")
    if place is None:
        raise BadArtifact(f"the model that {package} was exported from is no longer at {recorded.path}", "give it with --baseline")
    if artifact.fingerprint(place) != recorded.sha256:
        raise BadArtifact(
            f"{place} is not the model that {package} was exported from: its hash differs",
            "export it again, or give the model with --baseline",
        )
    return place


def _base(baseline_found: Artifact | None, given: str | None) -> Path | None:
    """Return the model before the fine-tune, seen to be the one of the lineage; None where it is unknown or gone."""
    if given:
        if not Path(given).is_dir():
            raise BadArtifact(f"no such folder: {given}", "give the model before the fine-tune with --base")
        return Path(given)
    recorded = baseline_found.manifest.input("base") if baseline_found is not None else None
    place = baseline_found.find("base") if baseline_found is not None else None
    if place is not None and recorded is not None and artifact.fingerprint(place) != recorded.sha256:
        raise BadArtifact(f"{place} is not the model that was fine-tuned: its hash differs", "give that model with --base")
    return place


def _rows(settings: VerifySettings, baseline: Path, baseline_found: Artifact | None) -> tuple[list[Row], str]:
    limit = settings.max_rows or _MOST_ROWS
    if settings.data is not None:
        rows = read_rows(settings.data)
        return rows[:limit], str(settings.data)
    adapter = baseline_found.find("adapter") if baseline_found is not None else None
    adapter = baseline if baseline_found is not None and baseline_found.manifest.kind == "adapter" else adapter
    file = adapter / "validation.jsonl" if adapter is not None else None
    if file is None or not file.is_file() or not file.stat().st_size:
        return [], ""
    return read_rows(file)[:limit], f"the validation rows of {file.parent}"


def has_answers(subject: Subject) -> bool:
    """Tell whether the rows have a prompt and an expected answer, and not only text.

    Raises:
        InvalidInput: the rows do not fit the package's templates.
    """
    if not subject.rows:
        return False
    try:
        return row_format_of(subject.rows, subject.baseline_interface) != "text"
    except InvalidInput as error:
        raise InvalidInput(f"{subject.rows_from}: {error.message}", error.hint) from None
