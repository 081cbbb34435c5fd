"""What is the same whatever engine is asked: which token ids can be asked at all, and answers given back in the order of the prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from slmops.errors import InvalidInput, RunFailed

LONGER_EXPORT = "shorten it, or export with a larger --max-length-tokens"


def check_ids(ids: Sequence[int], vocabulary: int) -> None:
    """Refuse a prompt that no engine can be asked.

    Raises:
        InvalidInput: it has no tokens.
        RunFailed: an id is none of the model's: engines read another row of the embedding for it, silently.
    """
    if len(ids) == 0:
        raise InvalidInput("the prompt has no tokens", "give some text")
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise RunFailed(f"a token id outside 0 to {vocabulary - 1}", "the tokenizer is not this model's")


def check_length(tokens: int, new_tokens: int, most: int) -> None:
    """Raise InvalidInput where a prompt of so many tokens leaves no room for the new ones within `most`."""
    if tokens + new_tokens > most:
        raise InvalidInput(f"a prompt of {tokens} tokens does not fit the package's {most}", LONGER_EXPORT)


def in_order(batches: Iterable[Mapping[int, list[int]]]) -> Iterator[list[int]]:
    """Yield the answers of batches by the numbers of their prompts, from 0 on, each as soon as all before it are there."""
    waiting: dict[int, list[int]] = {}
    given = 0
    for answers in batches:
        waiting |= answers
        while given in waiting:
            yield waiting.pop(given)
            given += 1
