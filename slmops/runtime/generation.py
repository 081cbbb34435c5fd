"""Text in, text out: what does `slmops generate` do?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slmops.config import GenerateSettings, load
from slmops.data import Interface, Tokenizer, encode_prompt, prompt_of_chat
from slmops.data.templates import parse
from slmops.errors import InvalidInput
from slmops.runtime.loading import open_model, parse_selection
from slmops.runtime.runner import Runner, Sampling


def generate(package: str | Path, prompt: str, *, config: Any = None, **overrides: Any) -> Iterator[str]:
    """Yield the answer to a prompt, piece by piece as it is made.

    The prompt goes through the template that travels with the package: in a template of one field it takes that
    field's place; for a chat model it is the user's turn.

    Args:
        package: a package, an export, a model or an adapter.
        prompt: the text.
        config: YAML file or mapping of `GenerateSettings`.
        overrides: single settings.

    Raises:
        BadArtifact: the package is incomplete or changed.
        InvalidInput: the prompt does not fit, or the template has several fields (then give `raw`).
    """
    settings = load(GenerateSettings, config, **overrides)
    loaded = open_model(package, threads=settings.threads, adapter=parse_selection(settings.adapter))
    sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, settings.seed)
    options = {"max_new_tokens": settings.max_new_tokens, "sampling": sampling, "raw": settings.raw}
    yield from answer(loaded.runner, loaded.tokenizer, loaded.interface, prompt, **options)


def answer(
    runner: Runner,
    tokenizer: Tokenizer,
    interface: Interface,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    raw: bool = False,
) -> Iterator[str]:
    """Yield a model's answer to a prompt, piece by piece."""
    ids = prompt_ids(prompt, tokenizer, interface, raw=raw)
    pieces = tokenizer.stream(after=ids)
    for token in runner.stream(ids, max_new_tokens=max_new_tokens, stop_token_ids=interface.stop_token_ids, sampling=sampling):
        if piece := pieces.push(token):
            yield piece


def prompt_ids(prompt: str, tokenizer: Tokenizer, interface: Interface, *, raw: bool = False) -> list[int]:
    """Return the ids of a prompt given as one text.

    Raises:
        InvalidInput: the template has more than one field.
    """
    if not raw and interface.prompt_template is not None:
        fields = parse(interface.prompt_template).fields
        if len(fields) != 1:
            raise InvalidInput(
                f"the package's template has the fields {', '.join(fields) or '(none)'}, and one prompt was given",
                "write the whole prompt yourself and give --raw",
            )
        return encode_prompt({fields[0]: prompt}, tokenizer, interface, "template")
    if not raw and interface.chat_template is not None:
        return prompt_of_chat([{"role": "user", "content": prompt}], None, tokenizer, interface)
    ids = tokenizer.encode(prompt)
    return ids if interface.bos_token_id is None else [interface.bos_token_id, *ids]
