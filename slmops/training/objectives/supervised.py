"""Objective sft: how do rows of questions and answers (or of plain text) become what a run trains on?"""

from __future__ import annotations

from slmops import progress
from slmops.data import Corpus, Tokenizer, encode_rows, load_splits, overlap, split
from slmops.training.objectives.material import Material, Task


def prepare(task: Task) -> Material:
    """Read, split and encode the rows; every loss on the way is a warning of the draft."""
    given = task.settings.data
    rows, validation, templates = load_splits(task.data or "", validation=given.validation, rows=given.rows, max_rows=given.max_rows)
    interface = task.interface(
        rows,
        given.prompt_template or templates.prompt_template,
        given.completion_template or templates.completion_template,
    )
    progress.say(f"stop token: {interface.stop_reason}")
    asked = {"prompt_template": interface.prompt_template, "completion_template": interface.completion_template}
    if validation is None:
        rows, validation = split(rows, given.validation_share, task.settings.run.seed, **asked)
    elif shared := overlap(rows, validation, **asked):
        task.draft.warn(f"{shared} validation rows stand in the training data too: the validation loss is too good")
    tokenizer = Tokenizer.load(task.base)
    train = encode_rows(rows, tokenizer, interface)
    held_out = encode_rows(validation, tokenizer, interface) if validation else Corpus.empty()
    for warning in train.warnings:
        task.draft.warn(warning)
    return Material(task.package, interface, train, held_out, validation, rows)
