"""From a model and a data file to a metric with its interval: what does `slmops evaluate` do?"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops import artifact, progress
from slmops.config import EvaluateSettings, load
from slmops.data import Interface, Row, encode_rows, load_splits
from slmops.errors import InvalidInput, RunFailed
from slmops.evaluation import preferring
from slmops.evaluation.answering import answers_of, bounded, generate_all, longest_answer_tokens, questions_of, warnings_of
from slmops.evaluation.asking import asked_interface
from slmops.evaluation.losses import perplexity, token_losses
from slmops.evaluation.scoring import labels_of, score
from slmops.results import Estimate
from slmops.runtime.loading import Loaded, open_model, parse_selection


@dataclass(frozen=True)
class Evaluation:
    """What a model reached on some rows."""

    model: str
    data: str
    engine: str
    threads: int
    rows: int
    metrics: dict[str, Estimate]
    predictions: Path
    warnings: tuple[str, ...]
    seconds: float

    def document(self) -> dict[str, Any]:
        """Return the `--json` document of `slmops evaluate`."""
        return {
            "command": "evaluate",
            "ok": True,
            "model": self.model,
            "data": self.data,
            "engine": self.engine,
            "threads": self.threads,
            "rows": self.rows,
            "metrics": {name: estimate.document() for name, estimate in self.metrics.items()},
            "predictions": str(self.predictions),
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }


def evaluate(model: str | Path, data: str | Path, *, config: Any = None, **overrides: Any) -> Evaluation:
    """Measure a model on a task.

    Args:
        model: folder of a package, a model or an adapter (base and adapter are loaded).
        data: rows with their answers, or text for perplexity; of a prepared dataset, its validation rows.
        config: YAML file or mapping of `EvaluateSettings`.
        overrides: single settings, such as `metric="f1"`.

    Raises:
        InvalidInput: a setting, template or row is wrong.
        BadArtifact: the model is incomplete or changed.
        Unavailable: its engine is not installed.
    """
    started = time.perf_counter()
    settings = load(EvaluateSettings, config, **overrides)
    selection = parse_selection(settings.adapter)
    place = _predictions_place(Path(model), str(data), settings)
    rows, templates = held_out_rows(data, rows=settings.rows, max_rows=settings.max_rows)
    if preferring.is_asked(model, settings):
        judged = preferring.judge(model, rows, templates, settings, selection)
        _write_lines(place, judged.lines)
        return Evaluation(
            str(model), str(data), "torch", judged.threads, len(rows), judged.metrics, place, judged.warnings, time.perf_counter() - started
        )
    loaded = open_model(model, threads=settings.threads, base_only=settings.base, adapter=selection)
    try:
        interface = asked_interface(bounded(loaded.interface, loaded.runner), settings, templates)
        progress.say(f"{len(rows)} rows of {data} on {loaded.runner.engine}, {loaded.runner.threads} threads")
        metrics, lines, warnings = _measure(loaded, interface, rows, settings)
        engine, threads = loaded.runner.engine, loaded.runner.threads
    finally:
        loaded.runner.close()
    _write_lines(place, lines)
    return Evaluation(str(model), str(data), engine, threads, len(rows), metrics, place, tuple(warnings), time.perf_counter() - started)


def held_out_rows(data: str | Path, *, rows: Any = "auto", max_rows: int | None = None) -> tuple[list[Row], Any]:
    """Read rows to measure on, and the templates that belong to them.

    Of a dataset that `slmops data prepare` wrote, the validation rows: a model may have learned the others.
    """
    train, held_out, templates = load_splits(data, rows=rows)
    if held_out is not None:
        progress.say(f"{data}: measured on its {len(held_out)} validation rows")
    return (held_out or train)[:max_rows], templates


def _measure(
    loaded: Loaded, interface: Interface, rows: Sequence[Row], settings: EvaluateSettings
) -> tuple[dict[str, Estimate], Iterable[dict[str, Any]], list[str]]:
    """Return metrics, the rows of the predictions file, and warnings."""
    if settings.metric == "perplexity":
        return _measure_losses(loaded, interface, rows)
    questions = questions_of(rows, loaded.tokenizer, interface)
    length = settings.max_new_tokens or longest_answer_tokens(questions)
    generated = generate_all(
        loaded.runner,
        [question.prompt_ids for question in questions],
        max_new_tokens=length,
        stop_token_ids=interface.stop_token_ids,
        batch_size=settings.batch_size,
    )
    answers = answers_of(questions, generated, loaded.tokenizer)
    warnings = warnings_of(questions, answers, length, interface.max_length_tokens)
    labels = len(labels_of(answers))
    if settings.metric != "exact_match" and labels > max(20, len(rows) // 4):
        warnings.append(f"{labels} different labels in {len(rows)} rows: {settings.metric} is meant for a choice among few")
    names = ("f1", "accuracy") if settings.metric == "f1" else (settings.metric,)
    return {name: score(answers, name) for name in names}, (answer.document() for answer in answers), warnings


def _measure_losses(
    loaded: Loaded, interface: Interface, rows: Sequence[Row]
) -> tuple[dict[str, Estimate], Iterable[dict[str, Any]], list[str]]:
    corpus = encode_rows(rows, loaded.tokenizer, interface)
    losses = token_losses(loaded, corpus)
    decode = loaded.tokenizer.decode
    lines = (
        {
            "prompt": decode(sequence.ids[: sequence.prompt_tokens], special=True),
            "expected": decode(sequence.ids[sequence.prompt_tokens :], after=sequence.ids[: sequence.prompt_tokens]),
            "predicted": None,
            "correct": None,
            "nats": loss.nats,
            "tokens": loss.tokens,
        }
        for sequence, loss in zip(corpus.sequences, losses, strict=True)
    )
    return {"perplexity": perplexity(losses)}, lines, corpus.warnings


def _predictions_place(model: Path, data: str, settings: EvaluateSettings) -> Path:
    """Return where the answers go, before any work: beside the model, never inside a folder with hashes."""
    if settings.predictions is None:
        stem = re.sub(r"[^\w.-]+", "-", Path(data).stem if Path(data).suffix else data.strip("/").rpartition("/")[2]) or "data"
        kind = "-base" if settings.base else "".join(f"-{text.replace('=', '')}" for text in settings.adapter or ())
        parent, name = (model.parent, model.name) if model.name not in ("", "..") else (model.resolve().parent, model.resolve().name)
        return parent / f"{name}.evaluations" / f"{stem}-{settings.metric}{kind}.jsonl"
    place = settings.predictions
    if place.is_dir() or place.resolve() == Path(data).resolve():
        raise InvalidInput(f"predictions: {place} is {'a folder' if place.is_dir() else 'the data itself'}", "give a new .jsonl file")
    inside = next((folder for folder in place.resolve().parents if (folder / artifact.MANIFEST).is_file()), None)
    if inside is not None:
        raise InvalidInput(f"predictions: {place} lies inside {inside}, whose hashes it would break", "give a place outside of it")
    return place


def _write_lines(place: Path, lines: Iterable[dict[str, Any]]) -> None:
    temporary = place.with_name(place.name + ".tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        temporary.replace(place)
    except OSError as error:
        raise RunFailed(f"{place} could not be written: {error.strerror}", "give another place with --predictions") from error
