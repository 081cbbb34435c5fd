"""Which interface does a fine-tune get? Decided here once, from the model, the rows and what the user asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from slmops import progress
from slmops.data.formats import detect_format, is_chat
from slmops.data.interface import Interface
from slmops.data.rows import Row, columns_of
from slmops.data.stop_tokens import choose_stop_tokens, read_json
from slmops.data.tokenizer import Tokenizer
from slmops.errors import InvalidInput

DEFAULT_LENGTH = 1024

# For chats of a model that has no template of its own. {stop} ends an assistant's turn.
_PLAIN_CHAT = (
    "{bos}{{% for message in messages %}}{{{{ message['role'] | capitalize }}}}: {{{{ message['content'] }}}}"
    "{{% if message['role'] == 'assistant' %}}{{{{ {stop} }}}}{{% endif %}}{{{{ '\\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}Assistant:{{% endif %}}"
)


def choose_interface(
    model_folder: str | Path,
    rows: Sequence[Row],
    *,
    prompt_template: str | None = None,
    completion_template: str | None = None,
    train_on: Literal["completion", "all"] = "completion",
    stop_token: str | None = None,
    max_length_tokens: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> tuple[Interface, list[str]]:
    """Decide how text goes into the model and comes out.

    Args:
        model_folder: a Hugging Face model, or a folder with its tokenizer.
        rows: the training rows; their columns give the format. Without any, a chat model is asked as one.
        prompt_template: template of the prompt; it wins over the format.
        completion_template: template of the text to learn.
        train_on: the tokens that the loss counts.
        stop_token: the token that ends an answer, as text or id; None: checked and chosen.
        max_length_tokens: longest sequence; None: 1024, or the model's own limit where that is less.
        tokenizer: the folder's tokenizer, where it is loaded already.

    Returns:
        (the interface, warnings).

    Raises:
        InvalidInput: the columns, a template, the stop token or the length do not fit.
        BadArtifact: the folder has no tokenizer.
    """
    folder = Path(model_folder)
    tokenizer = tokenizer or Tokenizer.load(folder)
    draft = Interface(
        prompt_template=prompt_template,
        completion_template=completion_template,
        chat_template=tokenizer.chat_template,
        train_on=train_on,
        max_length_tokens=choose_length(folder, max_length_tokens),
    )
    goes_through_chat = draft.chat_template is not None
    if rows or completion_template is not None:
        row_format = detect_format(columns_of(list(rows)), prompt_template=prompt_template, completion_template=completion_template)
        goes_through_chat = is_chat(row_format, draft)
        if goes_through_chat and row_format in ("prompt_completion", "alpaca"):
            progress.say(
                f"{row_format.replace('_', ' and ')} rows go through the model's chat template; templates of your own would win over it"
            )
    stops = choose_stop_tokens(folder, tokenizer, stop_token=stop_token, chat_template=draft.chat_template if goes_through_chat else None)
    warnings = list(stops.warnings)
    template = draft.chat_template
    if goes_through_chat and template is None:
        template = plain_chat_template(tokenizer, stops.ids[0])
        warnings.append("the model has no chat template: chats are written as plain `User: ...` and `Assistant: ...` lines")
    # As transformers does; a chat template writes its own BOS, or none.
    bos = tokenizer.bos_token_id if tokenizer.adds_bos() else None
    return (
        draft.model_copy(update={"chat_template": template, "bos_token_id": bos, "stop_token_ids": stops.ids, "stop_reason": stops.reason}),
        warnings,
    )


def choose_length(folder: Path, asked: int | None) -> int:
    """Return the longest sequence in tokens.

    Raises:
        InvalidInput: more is asked than the model has positions.
    """
    config = read_json(folder / "config.json")
    limit = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    limit = limit or config.get("n_positions") or read_json(folder / "genai_config.json").get("model", {}).get("context_length")
    if asked is None:
        return min(DEFAULT_LENGTH, int(limit)) if limit else DEFAULT_LENGTH
    if limit and asked > int(limit):
        raise InvalidInput(f"--max-length-tokens {asked}: the model has {limit} positions", f"give at most {limit}")
    return asked


def plain_chat_template(tokenizer: Tokenizer, stop_id: int) -> str:
    """Return a chat template of plain lines, for a model that has none."""
    return _PLAIN_CHAT.format(bos="{{ bos_token }}" if tokenizer.adds_bos() else "", stop=repr(tokenizer.token(stop_id)))
