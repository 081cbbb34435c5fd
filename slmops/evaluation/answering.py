"""What does a model answer to each row? Prompts as token ids, greedy answers, right or wrong.

Prompts are made by `slmops.data` from the rows alone, so that every engine is asked the very same ids: they are the
first ids of the row as it is trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slmops import progress
from slmops.data import Interface, Row, Tokenizer, encode, expected_text, row_format_of
from slmops.errors import InvalidInput
from slmops.runtime.loading import Loaded
from slmops.runtime.runner import Runner

SPARE_TOKENS = 8
"""An answer may be so many tokens longer than the longest expected one: a wrong one shows, and costs little."""


@dataclass(frozen=True)
class Question:
    """One row as it is asked."""

    prompt: str
    """Its text, without BOS."""
    prompt_ids: list[int]
    expected: str
    answer_tokens: int
    """Tokens of the expected answer, without the stop token."""
    truncated: int = 0
    """Tokens of the row that its length cost it."""


@dataclass(frozen=True)
class Answer:
    """One row as it was answered."""

    prompt: str
    expected: str
    predicted: str
    correct: bool
    """Expected and predicted text are equal once both are stripped."""
    prompt_ids: list[int]
    predicted_ids: list[int]

    def document(self) -> dict[str, object]:
        """Return the row of the predictions file."""
        return {"prompt": self.prompt, "expected": self.expected, "predicted": self.predicted, "correct": self.correct}


def questions_of(rows: Sequence[Row], tokenizer: Tokenizer, interface: Interface) -> list[Question]:
    """Turn rows into questions.

    Raises:
        InvalidInput: plain text, a row that lacks a field or whose answer is not there; the message says which row.
    """
    row_format = row_format_of(rows, interface)
    questions = []
    for number, row in enumerate(rows, 1):
        try:
            expected = expected_text(row, interface, row_format)
            encoded = encode(row, tokenizer, interface, row_format)
        except InvalidInput as error:
            raise InvalidInput(f"row {number}: {error.message}", error.hint) from None
        ids, answer = encoded.ids[: encoded.prompt_tokens], encoded.ids[encoded.prompt_tokens :]
        if not ids:
            raise InvalidInput(
                f"row {number}: its prompt has no tokens: there is nothing to ask", "give a --prompt-template, or fill the column"
            )
        shown = ids[1:] if ids[0] == interface.bos_token_id else ids
        tokens = len(answer) - int(bool(answer) and answer[-1] in interface.stop_token_ids)
        questions.append(Question(tokenizer.decode(shown, special=True), ids, expected, tokens, encoded.truncated))
    return questions


def longest_answer_tokens(questions: Sequence[Question]) -> int:
    """Return the default of `max_new_tokens`: the longest expected answer and `SPARE_TOKENS` more."""
    return max(question.answer_tokens for question in questions) + SPARE_TOKENS


def answers_of(questions: Sequence[Question], generated: Iterable[Sequence[int]], tokenizer: Tokenizer) -> list[Answer]:
    """Judge generated ids, one sequence a question in their order."""
    answers = []
    for question, ids in zip(questions, generated, strict=True):
        predicted = tokenizer.decode(ids, after=question.prompt_ids)
        correct = predicted.strip() == question.expected.strip()
        answers.append(Answer(question.prompt, question.expected, predicted, correct, question.prompt_ids, [int(i) for i in ids]))
    return answers


def answer_rows(loaded: Loaded, rows: Sequence[Row], *, max_new_tokens: int | None = None, batch_size: int = 32) -> list[Answer]:
    """Ask a loaded model every row; greedy, to a stop token or `max_new_tokens`.

    Args:
        loaded: of `open_model`; to ask two models the same ids, give both the same tokenizer and interface.
        rows: with their answers.
        max_new_tokens: longest answer; None: the longest expected one in tokens + 8.
        batch_size: rows that run together.

    Returns:
        One answer a row, in order.

    Raises:
        InvalidInput: see `questions_of`.
    """
    interface = bounded(loaded.interface, loaded.runner)
    questions = questions_of(rows, loaded.tokenizer, interface)
    generated = generate_all(
        loaded.runner,
        [question.prompt_ids for question in questions],
        max_new_tokens=max_new_tokens or longest_answer_tokens(questions),
        stop_token_ids=interface.stop_token_ids,
        batch_size=batch_size,
    )
    return answers_of(questions, generated, loaded.tokenizer)


def generate_all(
    runner: Runner, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_token_ids: Sequence[int], batch_size: int
) -> list[list[int]]:
    """Return the greedy answer to each prompt, in order; progress is reported row by row."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # as runners compute, so that answers come at once
    answers: list[list[int]] = [[] for _ in prompts]
    with progress.task("answer", total=len(prompts), unit="rows") as task:
        generated = runner.generate(
            [prompts[i] for i in order], max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids, batch_size=batch_size
        )
        for i, ids in zip(order, generated, strict=True):
            answers[i] = ids
            task.advance()
    return answers


def bounded(interface: Interface, runner: Runner) -> Interface:
    """Return the interface with a length that the engine can take."""
    return interface.model_copy(update={"max_length_tokens": min(interface.max_length_tokens, runner.max_length_tokens)})


def warnings_of(questions: Sequence[Question], answers: Sequence[Answer], max_new_tokens: int, limit: int) -> list[str]:
    """Say in one line each what was lost, with its count."""
    total, found = len(questions), []
    if cut := sum(question.truncated > 0 for question in questions):
        lost = sum(question.truncated for question in questions)
        found.append(f"{cut} of {total} rows are longer than {limit} tokens and were cut: {lost} tokens lost")
    if empty := sum(not question.expected.strip() for question in questions):
        found.append(f"{empty} of {total} rows expect an empty answer")
    if endless := sum(len(answer.predicted_ids) >= max_new_tokens for answer in answers):
        found.append(f"{endless} of {total} answers did not end by themselves and were cut at {max_new_tokens} tokens")
    return found
