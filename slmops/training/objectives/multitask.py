"""Objective multitask: how do several tasks become one run? Their shares, one way to ask, and validation of each.

Each task has its own rows and templates. All become rows of one form, a prompt and a completion (or a chat), so that
one interface asks them all; whoever evaluates one task gives its templates, which the manifest keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops import progress
from slmops.config import FinetuneSettings
from slmops.data import Corpus, Interface, Row, Tokenizer, detect_format, encode_rows, load_splits, overlap, split
from slmops.data.formats import chat, is_chat, pair
from slmops.data.rows import columns_of
from slmops.errors import InvalidInput
from slmops.training import mixture
from slmops.training.mixture import Mixture, Source
from slmops.training.objectives.material import Course, Figures, Material, Setup, Task, joined
from slmops.training.objectives.naming import named

PROMPT, COMPLETION = "{prompt}", "{completion}"
_HINT = "give --task NAME=FILE for each, or a mapping `task:` in the YAML file"


@dataclass(frozen=True)
class Part:
    """One task as it was asked for."""

    name: str
    data: str
    prompt_template: str | None
    completion_template: str | None
    weight: float | None
    validation: str | None


@dataclass(frozen=True)
class Learned:
    """One task as it is trained on."""

    part: Part
    templates: Interface
    """The templates of its own rows."""
    chat: bool
    rows: list[Row]
    validation: list[Row]


def prepare(task: Task) -> Material:
    """Read, split and encode every task.

    Raises:
        InvalidInput: no tasks, DATA or --validation beside them, a name that is no task, chats beside tasks with templates.
    """
    settings = task.settings
    if task.data is not None or settings.data.validation is not None:
        given = f"DATA ({task.data})" if task.data is not None else "validation"
        raise InvalidInput(f"objective multitask: {given} belongs to no task", "give --task NAME=FILE and --task-validation NAME=FILE")
    parts = read_parts(settings)
    tokenizer = Tokenizer.load(task.base)
    learned = [_read(part, task, tokenizer) for part in parts]
    templates = _one_form(learned)
    interface = task.interface([row for one in learned for row in one.rows], *templates)
    progress.say(f"stop token: {interface.stop_reason}")
    train = [encode_rows(one.rows, tokenizer, interface) for one in learned]
    held_out = {one.part.name: encode_rows(one.validation, tokenizer, interface) for one in learned if one.validation}
    for one, corpus in zip(learned, train, strict=True):
        for warning in corpus.warnings:
            task.draft.warn(f"task {one.part.name}: {warning}")
    order = _order(parts, train, settings)
    validation = joined(list(held_out.values())) if held_out else Corpus.empty()
    course = Course(
        order=order,
        trainer=lambda setup: _trainer(setup, held_out, settings.run.seed),
        close=lambda run, _: _figures(run, list(held_out)),
        facts={"tasks": {one.part.name: _facts(one, source, order.drawn) for one, source in zip(learned, order.sources, strict=True)}},
    )
    drawn = [source.drawn for source in order.sources]
    rows = [row for one in learned for row in one.validation]
    return Material(task.package, interface, joined(train, drawn), validation, rows, course=course)


def read_parts(settings: FinetuneSettings) -> list[Part]:
    """Return the tasks that the settings name.

    Raises:
        InvalidInput: none, one named twice, a setting of a task that is not there, or weights beside a temperature.
    """
    given, data = settings.objective, settings.data
    files = named("task", given.task)
    if not files:
        raise InvalidInput("objective multitask: there is no task", _HINT)
    prompts = named("task_prompt_template", given.task_prompt_template, of=files)
    completions = named("task_completion_template", given.task_completion_template, of=files)
    validations = named("task_validation", given.task_validation, of=files)
    weights = {name: _weight(name, text) for name, text in named("task_weight", given.task_weight, of=files).items()}
    if weights and given.task_temperature is not None:
        raise InvalidInput("task_weight and task_temperature both say how often a task comes", "give one of them")
    return [
        Part(
            name,
            file,
            prompts.get(name, data.prompt_template),
            completions.get(name, data.completion_template),
            weights.get(name, 1.0) if weights else None,
            validations.get(name),
        )
        for name, file in files.items()
    ]


def _weight(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InvalidInput(f"task_weight: {name}={text} is no number above 0", "write NAME=2")
    return value


def _read(part: Part, task: Task, tokenizer: Tokenizer) -> Learned:
    """Read one task's rows and bring them into the common form."""
    given = task.settings.data
    try:
        rows, validation, templates = load_splits(part.data, validation=part.validation, rows=given.rows, max_rows=given.max_rows)
        own = Interface(
            prompt_template=part.prompt_template or templates.prompt_template,
            completion_template=part.completion_template or templates.completion_template,
            chat_template=tokenizer.chat_template,
        )
        asked = {"prompt_template": own.prompt_template, "completion_template": own.completion_template}
        row_format = detect_format(columns_of(rows), **asked)
        if row_format == "text":
            raise InvalidInput("plain text asks nothing", "give a prompt and a completion template, or mix the text in with --replay")
        if validation is None:
            rows, validation = split(rows, given.validation_share, task.settings.run.seed, **asked)
        elif shared := overlap(rows, validation, **asked):
            task.draft.warn(f"task {part.name}: {shared} validation rows stand in the training data too: the validation loss is too good")
        goes_through_chat = is_chat(row_format, own)

        def common(row: Row) -> Row:
            if goes_through_chat:
                messages, tools = chat(row, row_format)
                return {"task": part.name, "messages": messages, **({"tools": tools} if tools else {})}
            prompt, completion = pair(row, row_format, own)
            return {"task": part.name, "prompt": prompt, "completion": completion}

        return Learned(part, own, goes_through_chat, [common(row) for row in rows], [common(row) for row in validation])
    except InvalidInput as error:
        raise InvalidInput(f"task {part.name}: {error.message}", error.hint) from None


def _one_form(learned: Sequence[Learned]) -> tuple[str | None, str | None]:
    """Return the templates of the common rows; none for chats."""
    chats = [one.part.name for one in learned if one.chat]
    if chats and len(chats) < len(learned):
        raise InvalidInput(
            f"task {chats[0]} is asked through the chat template, and others are not: one adapter is asked in one way",
            "give every task a prompt and a completion template, or none",
        )
    return (None, None) if chats else (PROMPT, COMPLETION)


def _order(parts: Sequence[Part], train: Sequence[Corpus], settings: FinetuneSettings) -> Mixture:
    sizes = [len(corpus.sequences) for corpus in train]
    weights = [part.weight for part in parts if part.weight is not None] or None
    parts_of_one = mixture.shares(sizes, temperature=settings.objective.task_temperature or 1.0, weights=weights)
    drawn = mixture.apportioned(sum(sizes), parts_of_one)
    sources = tuple(Source(part.name, size, count) for part, size, count in zip(parts, sizes, drawn, strict=True))
    lengths = [len(sequence.ids) for corpus in train for sequence in corpus.sequences]
    return Mixture(sources, lengths, settings.optimizer.batch_size, settings.run.seed)


def _facts(one: Learned, source: Source, drawn: int) -> dict[str, Any]:
    return {
        "data": Path(one.part.data).name,
        "rows": source.rows,
        "rows_per_epoch": source.drawn,
        "share": round(source.drawn / drawn, 4),
        "validation_rows": len(one.validation),
        "prompt_template": one.templates.prompt_template,
        "completion_template": one.templates.completion_template,
    }


def _trainer(setup: Setup, held_out: Mapping[str, Corpus], seed: int) -> Any:
    from slmops.training.objectives.task_trainer import TaskTrainer

    return TaskTrainer(setup, held_out, seed)


def _figures(run: Any, names: Sequence[str]) -> Figures:
    """Return each task's validation loss at the step whose adapter was kept."""
    entries = [entry for entry in run.history if "eval_loss" in entry]
    if not entries:
        return {}, {}
    best = min(entries, key=lambda entry: entry["eval_loss"])
    return {f"validation_loss_{name}": {"value": best[f"eval_loss_{name}"]} for name in names}, {}
