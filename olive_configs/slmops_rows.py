"""How do plain rows with text columns become what a workflow trains on? The `user_script` of the workflows here.

It registers the data component `slmops_text_rows`, which reads and encodes rows as `slmops finetune` does, and, through
slmops's own user script, seeds the adapter's initial weights.
"""

import logging
from pathlib import Path

from olive.data.registry import Registry  # noqa: TID253  (Olive imports this file, and nobody else)

from slmops.data import Tokenizer, choose_interface, encode_rows, read_rows
from slmops.errors import SlmopsError
from slmops.olive_backend.user_script import token_row

logger = logging.getLogger("olive.slmops_rows")


@Registry.register_dataset("slmops_text_rows")
def slmops_text_rows(
    path: str,
    model: str,
    prompt_template: str | None = None,
    completion_template: str | None = None,
    train_on: str = "completion",
    stop_token: str | None = None,
    max_length_tokens: int | None = None,
    max_rows: int | None = None,
) -> list[dict[str, list[int]]]:
    """Read rows and make them token rows with labels; the parameters are the settings of `slmops finetune`.

    Args:
        path: a .jsonl, .json, .csv, .parquet or .txt file, or a folder of them.
        model: folder with the tokenizer: the workflow's `model_path`.
        prompt_template: text of the prompt; `{field}` takes a column.
        completion_template: text to learn after it; the stop token is appended.
        train_on: "completion" or "all".
        stop_token: token that ends an answer; None: checked and chosen.
        max_length_tokens: longer rows are cut, and said so.
        max_rows: use only the first so many.

    Raises:
        ValueError: whatever is wrong with the rows: Olive lets it through, where it would swallow an error of slmops and end with exit code 0.
    """
    try:
        rows = read_rows(path, max_rows=max_rows)
        interface, warnings = choose_interface(
            Path(model),
            rows,
            prompt_template=prompt_template,
            completion_template=completion_template,
            train_on=train_on,  # type: ignore[arg-type]
            stop_token=stop_token,
            max_length_tokens=max_length_tokens,
        )
        corpus = encode_rows(rows, Tokenizer.load(Path(model)), interface)
    except SlmopsError as error:
        raise ValueError(f"{error.message} ({error.hint})") from error
    for warning in (*warnings, *corpus.warnings):
        logger.warning(warning)
    logger.info(
        "%d rows, %d tokens, %d of them supervised; stop token: %s",
        corpus.rows,
        corpus.tokens_total,
        corpus.tokens_supervised,
        interface.stop_reason,
    )
    return [token_row(list(sequence.ids), list(sequence.labels), f"{path}, row {sequence.row + 1}") for sequence in corpus.sequences]
