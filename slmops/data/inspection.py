"""What would a run train on? Rows token by token with their labels, lengths, and every loss, before anything is trained."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from slmops import artifact
from slmops import config as config_module
from slmops.config import InspectSettings
from slmops.data.choosing import choose_interface
from slmops.data.corpus import Corpus, encode_rows, repeats, row_format_of, warnings_of
from slmops.data.encoding import NOT_COUNTED, Encoded
from slmops.data.formats import empty_columns, question_and_answer
from slmops.data.interface import Interface
from slmops.data.rows import Row, columns_of, load_splits
from slmops.data.splitting import overlap
from slmops.data.tokenizer import Tokenizer
from slmops.errors import BadArtifact

_BINS = 10
_TEMPLATES = ("prompt_template", "completion_template")


@dataclass(frozen=True)
class Token:
    """One token of an example."""

    text: str
    """As the vocabulary has it; without a model, the text of the whole prompt or completion."""
    id: int | None
    supervised: bool
    """The loss counts it."""


@dataclass(frozen=True)
class Example:
    """One sequence as it would be trained on."""

    row: int
    """Number of its (first) row, from 1."""
    tokens: tuple[Token, ...]
    truncated: int = 0
    """So many tokens were cut off."""


@dataclass(frozen=True)
class Lengths:
    """How long the sequences are, in `unit`."""

    unit: str
    shortest: int
    median: float
    p95: float
    p99: float
    longest: int
    histogram: tuple[tuple[int, int, int], ...]
    """(from, to, count) a bin, both ends inclusive."""


@dataclass(frozen=True)
class Inspection:
    """What `slmops data inspect` found."""

    data: str
    model: str | None
    counts: dict[str, Any]
    """Rows, format, tokens, truncated, duplicates, contradictions, empty_fields; see `Corpus.document`."""
    columns: tuple[str, ...]
    lengths: Lengths
    examples: tuple[Example, ...]
    validation_rows: int | None
    overlap: int | None
    """Validation rows whose question stands in the data too; None where there are no validation rows."""
    interface: Interface
    warnings: tuple[str, ...]
    seconds: float

    def document(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "command": "data inspect",
            "ok": True,
            "warnings": list(self.warnings),
            "seconds": self.seconds,
            "data": self.data,
            "model": self.model,
            **self.counts,
            "columns": list(self.columns),
            "lengths": asdict(self.lengths),
            "validation_rows": self.validation_rows,
            "overlap": self.overlap,
            "interface": self.interface.model_dump(mode="json"),
            "examples": [asdict(example) for example in self.examples],
        }


def inspect_data(data: str | Path, *, config: Path | str | Mapping[str, Any] | None = None, **overrides: Any) -> Inspection:
    """Show what a run on this data would train on.

    Args:
        data: rows (see `read_rows`), or a dataset that `data prepare` wrote.
        config: settings as a YAML file or mapping.
        overrides: settings of `InspectSettings`.

    Raises:
        InvalidInput: the data, a template or a setting is wrong, or the loss would count nothing.
        BadArtifact: the model's folder has no tokenizer.
    """
    started = time.perf_counter()
    settings = config_module.load(InspectSettings, config, **overrides)
    rows, held_out, templates = load_splits(data, validation=settings.validation, rows=settings.rows)
    chosen = {name: getattr(settings, name) or getattr(templates, name) for name in _TEMPLATES}
    if settings.model is None:
        interface, warnings = Interface(**chosen, train_on=settings.train_on), []
        corpus, lengths, examples = _without_model(rows, interface, settings.examples)
    else:
        folder = _model_folder(settings.model)
        tokenizer = Tokenizer.load(folder)
        interface, warnings = _interface(folder, rows, tokenizer, settings, chosen)
        corpus = encode_rows(rows, tokenizer, interface)
        lengths = _lengths([len(sequence.ids) for sequence in corpus.sequences], "tokens")
        examples = [_example(sequence, tokenizer) for sequence in corpus.sequences[: settings.examples]]
    shared = None if held_out is None else overlap(rows, held_out, **_of(interface))
    if shared:
        warnings.append(f"{shared} of {len(held_out or [])} validation rows ask what a training row asks too")
    return Inspection(
        data=str(data),
        model=settings.model,
        counts=corpus.document(),
        columns=tuple(columns_of(rows)),
        lengths=lengths,
        examples=tuple(examples),
        validation_rows=None if held_out is None else len(held_out),
        overlap=shared,
        interface=interface,
        warnings=(*warnings, *corpus.warnings),
        seconds=round(time.perf_counter() - started, 3),
    )


def _interface(
    folder: Path, rows: list[Row], tokenizer: Tokenizer, settings: InspectSettings, chosen: dict[str, str | None]
) -> tuple[Interface, list[str]]:
    """Take the interface that travels with a fine-tuned model, unless flags say otherwise; else choose one."""
    made = artifact.find(folder)
    asked = [getattr(settings, name) for name in (*_TEMPLATES, "stop_token", "max_length_tokens")]
    if made is not None and made.manifest.interface and not any(asked) and settings.train_on == "completion":
        return Interface.model_validate(made.manifest.interface), []
    return choose_interface(
        folder,
        rows,
        **chosen,
        train_on=settings.train_on,
        stop_token=settings.stop_token,
        max_length_tokens=settings.max_length_tokens,
        tokenizer=tokenizer,
    )


def _model_folder(model: str) -> Path:
    folder = Path(model)
    if not folder.is_dir():
        raise BadArtifact(f"no such model folder: {model}", "give the folder of a model; inspecting downloads nothing")
    return folder


def _without_model(rows: list[Row], interface: Interface, examples: int) -> tuple[Corpus, Lengths, list[Example]]:
    """Look at the rows as text: characters instead of tokens, nothing cut."""
    row_format = row_format_of(rows, interface)
    texts = [question_and_answer(row, row_format, interface) for row in rows]
    plain = row_format == "text" or (row_format == "template" and not interface.prompt_template)
    duplicates, contradictions = repeats(rows, row_format, interface)
    corpus = Corpus(
        [],
        row_format=row_format,
        rows=len(rows),
        duplicates=duplicates,
        contradictions=contradictions,
        empty_fields=dict(Counter(name for row in rows for name in empty_columns(row, row_format, interface))),
    )
    shown = []
    for number, (prompt, completion) in enumerate(texts[:examples], 1):
        parts = (() if plain else (Token(prompt, None, interface.train_on == "all"),)) + (Token(completion, None, True),)
        shown.append(Example(number, parts))
    lengths = _lengths([len(completion) + (0 if plain else len(prompt)) for prompt, completion in texts], "characters")
    return replace(corpus, warnings=warnings_of(corpus, rows, len(rows), interface)), lengths, shown


def _example(sequence: Encoded, tokenizer: Tokenizer) -> Example:
    tokens = (Token(tokenizer.token(i), i, label != NOT_COUNTED) for i, label in zip(sequence.ids, sequence.labels, strict=True))
    return Example(sequence.row + 1, tuple(tokens), sequence.truncated)


def _lengths(values: Sequence[int], unit: str) -> Lengths:
    data = np.asarray(values)
    low, high = int(data.min()), int(data.max())
    width = max(1, -(-(high - low + 1) // _BINS))
    starts = range(low, high + 1, width)
    counts = np.bincount((data - low) // width, minlength=len(starts))
    bins = tuple((start, min(start + width - 1, high), int(count)) for start, count in zip(starts, counts, strict=True))
    median, p95, p99 = (float(x) for x in np.percentile(data, [50, 95, 99]))
    return Lengths(unit, low, median, p95, p99, high, bins)


def _of(interface: Interface) -> dict[str, str | None]:
    return {name: getattr(interface, name) for name in _TEMPLATES}
