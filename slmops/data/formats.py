"""Which format has a row, and what is asked and answered in it?

Formats are found by their columns; a template given by the user wins over what the columns look like.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal

from slmops.data.interface import Interface
from slmops.data.rows import Row, row_text
from slmops.data.templates import is_empty, parse, value_text
from slmops.errors import InvalidInput

RowFormat = Literal["template", "prompt_completion", "alpaca", "messages", "conversations", "text"]
Message = dict[str, Any]

# In order: the first whose columns are all there.
_COLUMNS: dict[RowFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_OPTIONAL: dict[RowFormat, tuple[str, ...]] = {
    "messages": ("tools",),
    "conversations": ("tools", "system"),
    "alpaca": ("input",),
    "text": ("document", "piece", "pieces"),
}
# ShareGPT's names (and those of its kin) for who speaks.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
# Stanford Alpaca's own two prompts (tatsu-lab/stanford_alpaca, train.py).
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


def detect_format(columns: Iterable[str], *, prompt_template: str | None = None, completion_template: str | None = None) -> RowFormat:
    """Tell the format of rows by their columns.

    Raises:
        InvalidInput: a template names a column that is not there, there is a prompt template without a completion
            template, or the columns are of no known format.
    """
    columns = list(columns)
    if prompt_template is not None or completion_template is not None:
        if completion_template is None:
            raise InvalidInput(
                "--prompt-template is given without --completion-template", "give both: the prompt, and the text to learn after it"
            )
        for template in (prompt_template, completion_template):
            if template is not None:
                parse(template).check(columns)
        return "template"
    for name, needed in _COLUMNS.items():
        if all(column in columns for column in needed):
            return name
    example = columns[0] if columns else "column"
    raise InvalidInput(
        f"the columns are of no known format: {', '.join(columns) or 'none'}",
        f"say how they become text: --prompt-template '{{{example}}}' --completion-template '...'; known are prompt + completion, "
        "instruction + output, messages, conversations, text",
    )


def used_columns(row_format: RowFormat, interface: Interface) -> tuple[str, ...]:
    """Return the columns that go into the text."""
    if row_format == "template":
        fields = [field for t in (interface.prompt_template, interface.completion_template) if t for field in parse(t).fields]
        return tuple(dict.fromkeys(fields))
    return _COLUMNS[row_format] + _OPTIONAL.get(row_format, ())


def required_columns(row_format: RowFormat, interface: Interface) -> tuple[str, ...]:
    """Return the columns that should say something in every row."""
    return used_columns(row_format, interface) if row_format == "template" else _COLUMNS[row_format]


def empty_columns(row: Row, row_format: RowFormat, interface: Interface) -> list[str]:
    """Return the columns that should say something, and do not in this row."""
    return [name for name in required_columns(row_format, interface) if is_empty(row.get(name))]


def is_chat(row_format: RowFormat, interface: Interface) -> bool:
    """Tell whether rows of this format go through the chat template.

    Chats always do. Prompt and completion do where the model has a chat template: it knows no other way to be asked.
    Plain text and the user's own templates never do.
    """
    if row_format in ("messages", "conversations"):
        return True
    return row_format in ("prompt_completion", "alpaca") and interface.chat_template is not None


def pair(row: Row, row_format: RowFormat, interface: Interface) -> tuple[str, str]:
    """Return prompt and completion of a row that is not a chat; a plain text is a completion without a prompt."""
    if row_format == "template":
        prompt = parse(interface.prompt_template).render(row) if interface.prompt_template else ""
        return prompt, parse(interface.completion_template or "").render(row)
    if row_format == "prompt_completion":
        return value_text(row.get("prompt")), value_text(row.get("completion"))
    if row_format == "alpaca":
        template = _ALPACA if is_empty(row.get("input")) else _ALPACA_INPUT
        return parse(template).render(row), value_text(row.get("output"))
    return "", value_text(row.get("text"))


def chat(row: Row, row_format: RowFormat) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Return the messages of a row and its tools, where it has any.

    Raises:
        InvalidInput: the messages are not a list of mappings with a role.
    """
    if row_format == "messages":
        return _messages(_decoded(row.get("messages")), "messages"), _tools(row)
    if row_format == "conversations":
        messages = [_from_sharegpt(turn) for turn in _messages(_decoded(row.get("conversations")), "conversations")]
        if not is_empty(row.get("system")):
            messages.insert(0, {"role": "system", "content": value_text(row["system"])})
        return messages, _tools(row)
    if row_format == "alpaca":
        question = value_text(row.get("instruction"))
        if not is_empty(row.get("input")):
            question += f"\n\n{value_text(row['input'])}"
        return _exchange(question, row.get("output")), None
    return _exchange(row.get("prompt"), row.get("completion")), _tools(row)


def question_and_answer(row: Row, row_format: RowFormat, interface: Interface) -> tuple[str, str]:
    """Return what is asked and what is to be answered, as text that is equal for rows that train the same."""
    if row_format in ("messages", "conversations"):
        messages, tools = chat(row, row_format)
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        return row_text({"messages": messages[:last], "tools": tools}), row_text({"messages": messages[last:]})
    prompt, completion = pair(row, row_format, interface)
    return (prompt, completion) if prompt else (completion, completion)


def _exchange(prompt: Any, completion: Any) -> list[Message]:
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": value_text(prompt)}]
    answered = completion if isinstance(completion, list) else [{"role": "assistant", "content": value_text(completion)}]
    return _messages(asked + answered, "prompt and completion")


def _messages(value: Any, where: str) -> list[Message]:
    shape = 'it holds a list: [{"role": "user", "content": "..."}, ...]'
    if where == "conversations":
        shape = 'it holds a list: [{"from": "human", "value": "..."}, ...]'
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise InvalidInput(f"the column {where} of a row is {_short(value)}", shape)
    if where != "conversations":
        for item in value:
            if not isinstance(item.get("role"), str):
                raise InvalidInput(f"a message in {where} has no role: {_short(item)}", shape)
    return value


def _from_sharegpt(turn: Message) -> Message:
    speaker, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = _ROLES.get(str(speaker))
    if role is None:
        raise InvalidInput(f"a turn in conversations is from {speaker!r}: {_short(turn)}", f"known are {', '.join(_ROLES)}")
    if role != "function_call":
        return {"role": role, "content": value_text(content)}
    calls = _decoded(content)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return {"role": "assistant", "content": value_text(content)}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _tools(row: Row) -> list[dict[str, Any]] | None:
    tools = _decoded(row.get("tools"))
    if is_empty(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidInput(f"the column tools of a row is {_short(tools)}", "it holds a list of JSON schemas, or that list as text")
    return tools


def _decoded(value: Any) -> Any:
    """Return a list or mapping that is kept as JSON text, as tables must keep it; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _short(value: Any) -> str:
    text = value_text(value) or repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
