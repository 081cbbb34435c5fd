"""How does a chat become text? By the model's own Jinja template, in the very environment that transformers uses.

The environment is that of transformers 5.23 (`utils/chat_template_utils.py`): a sandbox, because a template comes from
whoever published the model; blocks trimmed; `tojson` without HTML escapes; loop controls; `{% generation %}` accepted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from slmops import environment
from slmops.errors import InvalidInput

Message = dict[str, Any]

_REASONING = ("reasoning_content", "thinking", "reasoning")


def render_template(
    source: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str] | None = None,
) -> str:
    """Render a chat template as transformers' `apply_chat_template(tokenize=False)` does.

    Args:
        source: Jinja source.
        messages: the chat.
        tools: JSON schemas of functions that the model may call.
        add_generation_prompt: end where the assistant's answer begins.
        special_tokens: `bos_token`, `eos_token` and so on, as the template may name them.

    Raises:
        InvalidInput: the template is broken, or refuses the chat; the message is its own.
        Unavailable: jinja2 is not installed.
    """
    environment.require("jinja2", "to render a chat template")
    from jinja2.exceptions import TemplateError

    try:
        return _compiled(source).render(
            messages=[_plain_message(message) for message in messages],
            tools=_plain(tools),
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **(special_tokens or {}),
        )
    except TemplateError as error:
        raise InvalidInput(
            f"the chat template refuses a chat of {_roles(messages)}: {' '.join(str(error).split())}",
            "mend the messages of that row; the template comes with the model",
        ) from None
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise InvalidInput(
            f"the chat template fails on a chat of {_roles(messages)}: {' '.join(str(error).split())}", "mend the messages of that row"
        ) from None


def _roles(messages: Sequence[Message]) -> str:
    roles = [str(message.get("role")) for message in messages]
    return ", ".join(roles[:8]) + (" ..." if len(roles) > 8 else "") if roles else "no messages"


def _plain_message(message: Message) -> Message:
    """Drop keys that are None and give reasoning under each of its names, as transformers does."""
    kept = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((kept[key] for key in _REASONING if kept.get(key) is not None), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """Rebuild data from plain JSON types: the template must not reach methods of richer ones."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


@lru_cache(maxsize=32)
def _compiled(source: str) -> Any:
    from jinja2 import ext, nodes, utils
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """`{% generation %}` marks what the assistant wrote; here its content is simply written."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Any) -> str:
            return caller()

    class Dict:
        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    class Namespace(utils.Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a chat template may not set {name!r} on a namespace")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    sandbox.filters["tojson"] = tojson
    sandbox.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, dict=Dict(), namespace=Namespace)
    return sandbox.from_string(source)
