"""Objective pretrain: how does unlabelled text become what a run trains on? For continued pre-training on a domain.

Documents are packed into full-length blocks (`slmops.data.blocks`). Perplexity on the held-out text is measured before
and after, so that the manifest says what the run bought.
"""

from __future__ import annotations

from slmops import progress
from slmops.data import Corpus, Tokenizer, encode_blocks, encode_rows, load_splits, overlap, split
from slmops.errors import InvalidInput
from slmops.runtime.loading import Loaded
from slmops.training.effects import Score, perplexity_of
from slmops.training.objectives.material import Course, Material, Task


def prepare(task: Task) -> Material:
    """Read, split and pack the text.

    Raises:
        InvalidInput: a prompt template, or rows that are no plain text.
    """
    given = task.settings.data
    if given.prompt_template is not None:
        raise InvalidInput("objective pretrain: plain text has no prompt (prompt_template)", "leave it out, or use --objective sft")
    rows, validation, templates = load_splits(task.data or "", validation=given.validation, rows=given.rows, max_rows=given.max_rows)
    interface = task.interface(rows, None, given.completion_template or templates.completion_template)
    progress.say(f"stop token: {interface.stop_reason}")
    if validation is None:
        rows, validation = split(rows, given.validation_share, task.settings.run.seed, completion_template=interface.completion_template)
    elif shared := overlap(rows, validation, completion_template=interface.completion_template):
        task.draft.warn(f"{shared} validation rows stand in the training data too: the validation loss is too good")
    tokenizer = Tokenizer.load(task.base)
    train = encode_blocks(rows, tokenizer, interface)
    # As `evaluate` will measure it: the same rows give the same perplexity there.
    held_out = encode_rows(validation, tokenizer, interface) if validation else Corpus.empty()
    for warning in train.warnings:
        task.draft.warn(warning)

    def measure(loaded: Loaded) -> dict[str, Score]:
        return {"validation": perplexity_of(loaded, held_out.sequences)}

    facts = {"blocks": {"count": len(train.sequences), "tokens": len(train.sequences[0].ids)}}
    course = Course(measures=(measure,) if validation else (), facts=facts)
    return Material(task.package, interface, train, held_out, validation, course=course)
