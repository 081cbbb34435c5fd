"""How does a pile of rows become a dataset that a run can be traced to? Cleaned, without repeats, split, fingerprinted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops import artifact, hashes
from slmops import config as config_module
from slmops.artifact import Artifact, Draft, Input
from slmops.config import PrepareSettings
from slmops.data.corpus import row_format_of, unused_columns
from slmops.data.formats import RowFormat, question_and_answer
from slmops.data.interface import Interface
from slmops.data.rows import Row, columns_of, load_splits, row_text
from slmops.data.splitting import overlap, split
from slmops.errors import InvalidInput


def prepare_data(data: str | Path, *, out: Path | str, config: Path | str | Mapping[str, Any] | None = None, **overrides: Any) -> Artifact:
    """Write a dataset folder: `train.jsonl`, `validation.jsonl` and a manifest with templates, counts and hashes.

    Rows without an answer are left out, and rows that repeat an earlier one (but never pieces of a text). `finetune`,
    `evaluate` and `data inspect` take the folder and find its templates.

    Args:
        data: rows (see `read_rows`).
        out: the folder to write.
        config: settings as a YAML file or mapping.
        overrides: settings of `PrepareSettings`.

    Raises:
        InvalidInput: the data, a template or a setting is wrong, or no row is left.
        BadArtifact: `out` is not empty.
    """
    settings = config_module.load(PrepareSettings, config, **overrides)
    artifact.refuse_occupied(out, force=settings.force)
    rows, given, templates = load_splits(data, rows=settings.rows)
    interface = Interface(
        prompt_template=settings.prompt_template or templates.prompt_template,
        completion_template=settings.completion_template or templates.completion_template,
    )
    row_format = row_format_of(rows, interface)
    with artifact.create(out, kind="dataset", command="data prepare", config=config_module.flat(settings), force=settings.force) as draft:
        kept, facts = clean(rows, row_format, interface, keep_duplicates=settings.keep_duplicates)
        if not kept:
            raise InvalidInput(f"none of the {len(rows)} rows of {data} has an answer", "check the columns and templates")
        train, validation = (kept, given) if given is not None else _split(kept, settings, interface)
        _warn(draft, facts, len(rows), train, validation, interface)
        if unused := unused_columns(rows, row_format, interface):
            draft.warn(f"read as plain text of the column 'text'; not used: {', '.join(unused)} (templates can use them)")
        draft.interface = interface.model_dump(mode="json")
        draft.facts = {
            "rows": len(rows),
            "format": row_format,
            "columns": columns_of(rows),
            **facts,
            "splits": {name: _write(draft, name, part) for name, part in (("train", train), ("validation", validation)) if part},
        }
        _record_source(draft, data, rows)
    return draft.done()


def clean(
    rows: list[Row], row_format: RowFormat, interface: Interface, *, keep_duplicates: bool = False
) -> tuple[list[Row], dict[str, int]]:
    """Leave out rows without an answer and rows that repeat an earlier one; return the rest and the counts."""
    kept: list[Row] = []
    known: set[tuple[str, str]] = set()
    counts = {"without_answer": 0, "duplicates": 0}
    for number, row in enumerate(rows, 1):
        try:
            pair = question_and_answer(row, row_format, interface)
        except InvalidInput as error:
            raise InvalidInput(f"row {number}: {error.message}", error.hint) from None
        if not pair[1].strip():
            counts["without_answer"] += 1
            continue
        if row_format == "text":  # other columns may hold the answer that a later template asks for
            pair = (pair[0], row_text(row))
        if pair in known and "pieces" not in row:
            counts["duplicates"] += 1
            kept += [row] if keep_duplicates else []
        else:
            known.add(pair)
            kept.append(row)
    return kept, counts


def _split(rows: list[Row], settings: PrepareSettings, interface: Interface) -> tuple[list[Row], list[Row]]:
    return split(
        rows,
        settings.validation_share,
        settings.seed,
        prompt_template=interface.prompt_template,
        completion_template=interface.completion_template,
    )


def _warn(draft: Draft, facts: dict[str, int], total: int, train: list[Row], validation: list[Row], interface: Interface) -> None:
    if facts["without_answer"]:
        draft.warn(f"{facts['without_answer']} of {total} rows have no answer and were left out")
    if facts["duplicates"]:
        what = "were kept" if draft.config["keep_duplicates"] else "were left out"
        draft.warn(f"{facts['duplicates']} of {total} rows repeat an earlier row and {what}")
    templates = {"prompt_template": interface.prompt_template, "completion_template": interface.completion_template}
    if shared := overlap(train, validation, **templates):
        draft.warn(f"{shared} of {len(validation)} validation rows ask what a training row asks too")


def _write(draft: Draft, name: str, rows: list[Row]) -> dict[str, Any]:
    path = draft.folder / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    return {"rows": len(rows), "sha256": hashes.sha256_file(path)}


def _record_source(draft: Draft, data: str | Path, rows: list[Row]) -> None:
    if Path(data).exists():
        draft.add_input("data", data)
        return
    import hashlib

    content = hashlib.sha256("\n".join(row_text(row) for row in rows).encode()).hexdigest()
    draft.inputs.append(Input(role="data", path=str(data), sha256=content))
