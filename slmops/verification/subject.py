"""What is verified, against what, on which rows? All of it from the lineage, unless the user says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from slmops import artifact, progress, targets
from slmops.artifact import Artifact
from slmops.config import VerifySettings
from slmops.data import NOT_COUNTED, Corpus, Encoded, Interface, Row, Tokenizer, encode_rows, read_rows, row_format_of
from slmops.errors import BadArtifact, InvalidInput
from slmops.graph.float_twin import write_float_twin
from slmops.runtime import loading, providers
from slmops.runtime.engines import engine_of, open_export
from slmops.runtime.genai_runner import GenaiRunner
from slmops.runtime.package import Package, adapter_names, interface_with
from slmops.runtime.providers import provider_of
from slmops.runtime.runner import ExportRunner, Runner, Sampling
from slmops.targets import Target
from slmops.verification.stored import Stored, StoredGraph, stored_of
from slmops.verification.texts import OPENINGS

_MOST_ROWS = 1000
# Where an NPU is computed on a CPU, a row takes seconds.
_MOST_ROWS_EMULATED = 24
_OWN_TEXTS, _OWN_TOKENS = 10, 64


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
    adapter: str | None = None
    """Of a package: the adapter that is proven; None: its base."""
    opened: Package | None = None
    """The package, loaded once for its base and all adapters."""
    scratch: TemporaryDirectory[str] | None = None
    """Where the float twin lies, while there is one."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the package's adapters."""
        return adapter_names(self.found) if self.found is not None else ()

    @property
    def lost_base(self) -> str | None:
        """Where the model before the fine-tune was, if the lineage names one and it is no longer there."""
        recorded = self.baseline_found.manifest.input("base") if self.baseline_found is not None else None
        return recorded.path if recorded is not None and self.base is None else None

    @property
    def threads(self) -> int:
        """Threads of both sides."""
        return self.settings.threads or loading.default_threads(self.baseline)

    @property
    def is_plain_base(self) -> bool:
        """This is the base of a package with adapters, which nobody gave rows for."""
        return self.adapter is None and bool(self.adapters) and not self.rows

    @cached_property
    def interface(self) -> Interface:
        """How text goes into the package and out of it; a folder of somebody else's states nothing, and is asked as its baseline is."""
        return interface_with(self.found, self.adapter) if self.found is not None else self.baseline_interface

    @cached_property
    def baseline_interface(self) -> Interface:
        """How text goes into the baseline and out of it."""
        return loading.interface_of(self.baseline, self.baseline_found)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The baseline's tokenizer: the truth in every stage after `tokenizer`."""
        own = (self.baseline / "tokenizer.json").is_file() or self.base is None
        return Tokenizer.load(self.baseline if own or self.base is None else self.base)

    @cached_property
    def stored(self) -> Stored:
        """What the package stores."""
        return stored_of(self.package)

    @property
    def graph_path(self) -> Path:
        """Of a package that onnxruntime-genai runs: the graph with all logits."""
        return StoredGraph(self.package).path

    @cached_property
    def absence(self) -> str | None:
        """Why the package cannot run here and its float twin does in its place; None where it can."""
        engine = engine_of(self.package)
        if engine is None or engine.name != "genai":
            return None
        target = provider_of(StoredGraph(self.package).config)
        return providers.absence(target.ort_provider) if target is not None else None

    @cached_property
    def target(self) -> Target | None:
        """The target that the package was made for, as its manifest says; None for a folder of somebody else's."""
        facts = self.found.manifest.facts if self.found is not None else {}
        return targets.find(facts["device"], facts["provider"], facts["precision"]) if "provider" in facts else None

    @cached_property
    def candidate(self) -> ExportRunner:
        """The package, running, with the adapter on; where its provider is not here, its float twin on the CPU."""
        if self.absence is not None:
            self.scratch = TemporaryDirectory(prefix="slmops-twin-")
            with progress.task("write the float twin"):
                return GenaiRunner(write_float_twin(self.package, Path(self.scratch.name)), self.threads)
        return self.opened.runner(self.adapter) if self.opened is not None else open_export(self.package, self.threads)

    @property
    def genai_candidate(self) -> GenaiRunner:
        """The same, where onnxruntime-genai runs it."""
        assert isinstance(self.candidate, GenaiRunner)
        return self.candidate

    @cached_property
    def reference(self) -> Runner:
        """The baseline in PyTorch, float32."""
        return loading.open_model(self.baseline, threads=self.threads).runner

    @cached_property
    def corpus(self) -> Corpus:
        """The held-out rows as tokens, by the baseline's interface, bounded by what the package can hold; shortest first.

        The base of a package was trained on no rows of the user's: without any, it is asked what it writes itself.
        """
        limit = min(self.baseline_interface.max_length_tokens, self.candidate.max_length_tokens)
        interface = self.baseline_interface.model_copy(update={"max_length_tokens": limit})
        if not self.rows:
            return Corpus(self._own_text(interface)) if self.is_plain_base else Corpus.empty()
        corpus = encode_rows(self.rows, self.tokenizer, interface)
        corpus.sequences.sort(key=lambda sequence: len(sequence.ids))
        return corpus

    def _own_text(self, interface: Interface) -> list[Encoded]:
        """Return text that the model writes in PyTorch, every token of it counted, shortest first.

        No text of ours would do: the arithmetic of 8-bit activations costs twice as much where a model is at a loss
        (twin KL of stories3m in int4: 1.6e-3 on its own stories, 3.2e-3 on a text about machines).
        """
        start = [interface.bos_token_id if interface.bos_token_id is not None else self.tokenizer.encode(OPENINGS[0])[0]]
        length = min(_OWN_TOKENS, interface.max_length_tokens - len(start))
        texts = []
        with progress.task("write text with the base", total=_OWN_TEXTS) as task:
            for seed in range(_OWN_TEXTS):
                sampling = Sampling(temperature=1.0, seed=seed)
                ids = list(self.reference.stream(start, max_new_tokens=length, stop_token_ids=interface.stop_token_ids, sampling=sampling))
                if ids:
                    texts.append(Encoded([*start, *ids], [NOT_COUNTED] * len(start) + ids, len(start)))
                task.advance()
        return sorted(texts, key=lambda text: len(text.ids))

    @cached_property
    def precision(self) -> str:
        """The package's precision: from its manifest, or read off the graph."""
        if self.found is not None and "precision" in self.found.manifest.facts:
            return str(self.found.manifest.facts["precision"])
        return self.stored.precision

    def close(self) -> None:
        """Free what was loaded."""
        for name in ("candidate", "reference"):
            runner = self.__dict__.pop(name, None)
            if runner is not None:
                runner.close()
        if self.scratch is not None:
            self.scratch.cleanup()
            self.scratch = None


def find_subject(package: Path, found: Artifact | None, settings: VerifySettings) -> Subject:
    """Find the baseline, its base and the held-out rows of a package.

    Raises:
        BadArtifact: the baseline is unknown, gone, or not the one that the package was exported from.
        InvalidInput: the rows cannot be read.
    """
    baseline = _baseline(package, found, settings.baseline)
    baseline_found = artifact.find(baseline)
    base = _base(baseline_found, settings.base)
    rows, source = _rows(settings, found, baseline, baseline_found)
    opened = (
        Package(package, threads=settings.threads or loading.default_threads(baseline))
        if found is not None and adapter_names(found)
        else None
    )
    return Subject(package, found, baseline, baseline_found, base, rows, source, settings, opened=opened)


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
    if not recorded.matches(place):
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
    if place is not None and recorded is not None and not recorded.matches(place):
        raise BadArtifact(f"{place} is not the model that was fine-tuned: its hash differs", "give that model with --base")
    return place


def adapter_subject(base: Subject, name: str) -> Subject:
    """Return one adapter of a package beside its PEFT folder.

    Raises:
        BadArtifact: that folder is gone, or is not the one that was packed.
    """
    assert base.found is not None
    recorded, place = base.found.manifest.input(f"adapter {name}"), base.found.find(f"adapter {name}")
    if recorded is None or place is None:
        where = recorded.path if recorded is not None else "(nowhere)"
        raise BadArtifact(f"{name}: the adapter that was packed is no longer at {where}", "put it back there, or pack again")
    if not recorded.matches(place):
        raise BadArtifact(f"{name}: {place} is not the adapter that was packed: it was changed since", "pack it again")
    found = artifact.find(place)
    given = rows_given(base.found, base.settings).get(name)
    limit = base.settings.max_rows or _MOST_ROWS
    rows, source = (read_rows(given)[:limit], given) if given else _validation_rows(place, limit)
    return replace(base, baseline=place, baseline_found=found, base=base.baseline, rows=rows, rows_from=source, adapter=name)


def rows_given(found: Artifact | None, settings: VerifySettings) -> dict[str | None, str]:
    """Return the files of `data` by what they are for: an adapter's name, or None for the package itself (its base).

    Raises:
        InvalidInput: rows of a package with several adapters, and nothing says of which.
    """
    names = adapter_names(found) if found is not None else ()
    proven = settings.adapter or list(names)
    result: dict[str | None, str] = {}
    for text in settings.data or ():
        name, _, path = text.partition("=")
        if path and (name in names or name == "base"):
            result[None if name == "base" else name] = path
        elif not names:
            result[None] = text
        elif len(proven) == 1:
            result[proven[0]] = text
        else:
            raise InvalidInput(f"data: which adapter are the rows of {text} for?", f"write --data {names[0]}={text}")
    return result


def _rows(settings: VerifySettings, found: Artifact | None, baseline: Path, baseline_found: Artifact | None) -> tuple[list[Row], str]:
    emulated = found is not None and found.manifest.facts.get("provider") == "qnn"
    limit = settings.max_rows or (_MOST_ROWS_EMULATED if emulated else _MOST_ROWS)
    given = rows_given(found, settings).get(None)
    if given is not None:
        return read_rows(given)[:limit], given
    adapter = baseline_found.find("adapter") if baseline_found is not None else None
    # An adapter, and a model that was trained as a whole, bring their rows themselves.
    adapter = baseline if adapter is None and baseline_found is not None else adapter
    return _validation_rows(adapter, limit) if adapter is not None else ([], "")


def _validation_rows(adapter: Path, limit: int) -> tuple[list[Row], str]:
    file = adapter / "validation.jsonl"
    if not file.is_file() or not file.stat().st_size:
        return [], ""
    return read_rows(file)[:limit], f"the validation rows of {adapter}"


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
