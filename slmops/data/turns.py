"""Where in a chat's text does the assistant speak? The loss counts those places, each with the token that ends it.

A template is asked, not parsed: rendered up to a turn with the generation prompt, it ends where the answer begins;
rendered with the turn, it ends where the answer ends. Some templates write earlier turns differently once later ones
follow (they drop the reasoning): then each answer becomes a sequence of its own, asked exactly as a device will ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slmops.data.chat import Message
from slmops.data.interface import Interface
from slmops.data.tokenizer import Tokenizer
from slmops.errors import InvalidInput

Segments = tuple[tuple[str, bool], ...]
"""Texts in order, each counted by the loss or not."""
Tools = list[dict[str, Any]] | None


def draft_chat(messages: Sequence[Message], tools: Tools, tokenizer: Tokenizer, interface: Interface) -> list[tuple[Segments, bool]]:
    """Cut a chat into segments, the last one being an answer.

    Returns:
        One (segments, whether the stop token is to be appended) a sequence; usually there is one sequence.

    Raises:
        InvalidInput: the chat template refuses the chat.
    """
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    counts_all = interface.train_on == "all"
    if not answers:
        return [(((_render(messages, tools, tokenizer, interface), counts_all),), False)]
    whole = _render(messages, tools, tokenizer, interface)
    segments: list[tuple[str, bool]] = []
    cursor, ends = 0, True
    for i in answers:
        question, answered = _around(messages, i, tools, tokenizer, interface)
        if not (whole.startswith(answered) and answered.startswith(question) and len(question) >= cursor):
            return [_one_turn(messages, j, tools, tokenizer, interface) for j in answers]
        answer, ends = _until_stop(answered[len(question) :], tokenizer, interface)
        segments += [(whole[cursor : len(question)], counts_all), (answer, True)]
        cursor = len(question) + len(answer)
    return [(tuple(segments), ends)]


def draft_question(messages: Sequence[Message], tools: Tools, tokenizer: Tokenizer, interface: Interface) -> Segments:
    """Cut a chat that the assistant is to go on with, with the same segments as `draft_chat` makes of its beginning."""
    question = _render(messages, tools, tokenizer, interface, ask=True)
    earlier = list(messages)
    while earlier and earlier[-1].get("role") != "assistant":
        earlier.pop()
    if not earlier:
        return ((question, False),)
    drafts = draft_chat(earlier, tools, tokenizer, interface)
    known = "".join(text for text, _ in drafts[0][0])
    if len(drafts) > 1 or not question.startswith(known):
        return ((question, False),)
    return (*drafts[0][0], (question[len(known) :], False))


def _one_turn(messages: Sequence[Message], i: int, tools: Tools, tokenizer: Tokenizer, interface: Interface) -> tuple[Segments, bool]:
    question, answered = _around(messages, i, tools, tokenizer, interface)
    shared = len(question)
    if not answered.startswith(question):
        # The generation prompt has more than the finished turn (an opened <think>): ask as a device asks.
        shared = next((k for k, (a, b) in enumerate(zip(question, answered, strict=False)) if a != b), min(len(question), len(answered)))
    answer, ends = _until_stop(answered[shared:], tokenizer, interface)
    return ((question, interface.train_on == "all"), (answer, True)), ends


def _around(messages: Sequence[Message], i: int, tools: Tools, tokenizer: Tokenizer, interface: Interface) -> tuple[str, str]:
    """Render the chat before turn i, ending where the answer begins, and with turn i."""
    before = _render(messages[:i], tools, tokenizer, interface, ask=True) if i else ""
    return before, _render(messages[: i + 1], tools, tokenizer, interface)


def _until_stop(text: str, tokenizer: Tokenizer, interface: Interface) -> tuple[str, bool]:
    """Cut what follows the token that ends the turn; tell whether there was none, so that one must be appended."""
    ends = [text.rfind(stop) + len(stop) for token_id in interface.stop_token_ids if (stop := tokenizer.token(token_id)) in text]
    return (text[: max(ends)], False) if ends else (text, True)


def _render(messages: Sequence[Message], tools: Tools, tokenizer: Tokenizer, interface: Interface, *, ask: bool = False) -> str:
    if interface.chat_template is None:
        raise InvalidInput("the rows are chats, and the model has no chat template", "use a chat model")
    return tokenizer.render_chat(messages, tools, add_generation_prompt=ask, template=_template(tokenizer, interface, tools))


def _template(tokenizer: Tokenizer, interface: Interface, tools: Tools) -> str | None:
    """Take the interface's template; of a tokenizer that has another one for tools, that one for rows with tools."""
    if tools and interface.chat_template == tokenizer.chat_template and "tool_use" in tokenizer.chat_templates:
        return tokenizer.chat_templates["tool_use"]
    return interface.chat_template
