"""How do rows get out of files? One function, `read_rows`, for every kind of source.

A `.jsonl`, `.json`, `.csv` or `.parquet` file gives one row an object; a text file is one document, and its pieces
between blank lines are the rows; a folder gives the rows of its files in order of their names; anything else that looks
like `org/name` is a dataset on the Hugging Face hub.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from slmops import artifact, environment
from slmops.errors import InvalidInput, RunFailed

Row = dict[str, Any]
RowUnit = Literal["auto", "lines", "document"]


class Templates(NamedTuple):
    """The templates that belong to a prepared dataset; None where its rows speak for themselves."""

    prompt_template: str | None = None
    completion_template: str | None = None


_TEXT = (".txt", ".md")
_TABLES = (".jsonl", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.\[\]%-]+)?$")
_FORMATS_HINT = "give a .jsonl, .json, .csv, .parquet or .txt file, a folder of them, or a hub dataset (org/name)"


def read_rows(source: str | Path, *, rows: RowUnit = "auto", max_rows: int | None = None) -> list[Row]:
    """Read every row of a data source.

    Args:
        source: a file, a folder, a dataset that `slmops data prepare` wrote (its training rows), or a hub dataset as
            `org/name` or `org/name:split` where no such path exists.
        rows: what a row of a text file is: `lines`, or the pieces of a `document` between its blank lines (`auto`).
        max_rows: stop after so many rows.

    Returns:
        One mapping a row. A piece of a text file has the columns `text`, `document` (the file's name), `piece` and
        `pieces` (its number, from 1, and how many there are).

    Raises:
        InvalidInput: no such source, an unknown kind of file, an empty one, or content that cannot be read; the
            message names the file, and the line where there is one.
        Unavailable: a library that this kind of file needs is not installed.
    """
    place = Path(source)
    if place.is_dir():
        found = _read_folder(place, rows)
    elif place.is_file():
        found = _read_file(place, rows)
    else:
        found = _read_hub(str(source), rows)
    return found[:max_rows]


def load_splits(
    source: str | Path, *, validation: str | Path | None = None, rows: RowUnit = "auto", max_rows: int | None = None
) -> tuple[list[Row], list[Row] | None, Templates]:
    """Read training rows, validation rows where there are some, and the templates that belong to them.

    A folder that `slmops data prepare` wrote brings its own validation rows and templates; `validation` wins over them.

    Returns:
        (training rows, validation rows or None, templates).

    Raises:
        InvalidInput: see `read_rows`.
        BadArtifact: a prepared dataset whose files were changed.
    """
    prepared = _prepared(Path(source))
    train = read_rows(source, rows=rows, max_rows=max_rows)
    held_out = read_rows(validation, rows=rows) if validation is not None else None
    if prepared is None:
        return train, held_out, Templates()
    file = prepared.path / "validation.jsonl"
    if held_out is None and file.is_file():
        held_out = _read_file(file, "auto")
    interface = prepared.manifest.interface or {}
    return train, held_out, Templates(interface.get("prompt_template"), interface.get("completion_template"))


def columns_of(rows: list[Row]) -> list[str]:
    """Return the columns that any of the rows has, in the order in which they come up."""
    return list(dict.fromkeys(key for row in rows for key in row))


def row_text(row: Row) -> str:
    """Return a row as compact JSON with its keys sorted: equal for equal rows."""
    return json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)


def _prepared(folder: Path) -> artifact.Artifact | None:
    if not folder.is_dir():
        return None
    found = artifact.find(folder)
    return found if found is not None and found.manifest.kind == "dataset" else None


def _read_folder(folder: Path, rows: RowUnit) -> list[Row]:
    prepared = _prepared(folder)
    if prepared is not None:
        artifact.check(prepared)
        return _read_file(folder / "train.jsonl", rows)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _TEXT + _TABLES and file.name != artifact.MANIFEST)
    if not files:
        raise InvalidInput(f"folder {folder} holds no data file", _FORMATS_HINT)
    return [row for file in files for row in _read_file(file, rows, document=file.relative_to(folder).as_posix())]


def _read_file(path: Path, rows: RowUnit, document: str | None = None) -> list[Row]:
    suffix = path.suffix.lower()
    if rows != "auto" and suffix not in _TEXT:
        raise InvalidInput(f"--rows {rows} speaks of text files, and {path} is none", "leave --rows out")
    if suffix in _TEXT:
        found = _read_text(path, rows, document or path.name)
    elif suffix in _TABLES:
        found = _READERS[suffix](path)
    else:
        raise InvalidInput(f"{path} is not a kind of data file that slmops reads ({suffix or 'no suffix'})", _FORMATS_HINT)
    if not found:
        raise InvalidInput(f"{path} holds no rows", "give a file with at least one row")
    return found


def _read_text(path: Path, rows: RowUnit, document: str) -> list[Row]:
    content = _content(path)
    if rows == "lines":
        return [{"text": line} for line in content.splitlines() if line.strip()]
    pieces = [piece.strip("\n") for piece in re.split(r"\n[ \t]*(?:\n[ \t]*)+", content) if piece.strip()]
    return [{"text": piece, "document": document, "piece": i, "pieces": len(pieces)} for i, piece in enumerate(pieces, 1)]


def _read_jsonl(path: Path) -> list[Row]:
    found = []
    for number, line in enumerate(_content(path).split("\n"), 1):
        if line.strip():
            found.append(_row(_parse(line, path, number), f"{path} line {number}"))
    return found


def _read_json(path: Path) -> list[Row]:
    content = _content(path)
    if not content.strip():
        return []
    try:
        document = json.loads(content)
    except json.JSONDecodeError as error:
        if _is_lines(content):
            return _read_jsonl(path)
        raise InvalidInput(
            f"{path} line {error.lineno}: broken JSON ({error.msg}, column {error.colno})", "mend that line; .json holds one list of rows"
        ) from None
    if isinstance(document, dict):
        document = _unwrap(document)
    if not isinstance(document, list):
        raise InvalidInput(
            f"{path} holds a {type(document).__name__}, not a list of rows", "write [{...}, {...}] or one object a line (.jsonl)"
        )
    return [_row(item, f"{path} item {number}") for number, item in enumerate(document, 1)]


def _unwrap(document: dict[str, Any]) -> list[Any]:
    """Find the rows of an object: under its only list (`{"data": [...]}`), or the object itself as the one row."""
    lists = {key: value for key, value in document.items() if isinstance(value, list)}
    if len(lists) == 1 and (rows := next(iter(lists.values()))) and all(isinstance(row, dict) and "role" not in row for row in rows):
        named_rows = next(iter(lists)) in ("data", "rows", "train", "examples", "instances")
        return rows if named_rows else [document]
    return [document]


def _is_lines(content: str) -> bool:
    """Tell whether a .json file holds one object a line, as many exporters write it."""
    lines = [line for line in content.split("\n", 50)[:50] if line.strip()]
    try:
        return len(lines) > 1 and isinstance(json.loads(lines[0]), dict)
    except json.JSONDecodeError:
        return False


def _read_csv(path: Path) -> list[Row]:
    reader = csv.reader(io.StringIO(_content(path), newline=""), strict=True)
    found: list[Row] = []
    try:
        header = next(reader, None)
        if header is None:
            return []
        if len(set(header)) != len(header) or not all(name.strip() for name in header):
            raise InvalidInput(f"{path} line 1: column names must be given and differ: {', '.join(header)}", "name each column once")
        for fields in reader:
            if fields and len(fields) != len(header):
                raise InvalidInput(
                    f"{path} line {reader.line_num}: {len(fields)} fields, and the header has {len(header)}",
                    'quote fields that hold a comma: "a, b"',
                )
            if fields:
                found.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise InvalidInput(f"{path} line {reader.line_num}: broken CSV ({error})", "mend that line, or write .jsonl") from None
    return found


def _read_parquet(path: Path) -> list[Row]:
    environment.require("pyarrow", f"to read {path.name}")
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidInput(f"{path} cannot be read as parquet: {_line(error)}", "write it again, or as .jsonl") from None


def _read_hub(source: str, rows: RowUnit) -> list[Row]:
    looks_local = Path(source).suffix.lower() in _TEXT + _TABLES or not _HUB_ID.match(source)
    if looks_local or "/" not in source:
        raise InvalidInput(f"no such data file or folder: {source}", _FORMATS_HINT)
    if rows != "auto":
        raise InvalidInput(f"--rows {rows} speaks of text files, and {source} is a hub dataset", "leave --rows out")
    datasets = environment.require("datasets", f"to load {source} from the hub")
    name, _, split = source.partition(":")
    _ask_hub(name)
    try:
        # Remote code is never run: datasets >= 4 has no loading scripts any more.
        found = datasets.load_dataset(name, split=split or None)
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        raise InvalidInput(
            f"no such path, and {name} could not be loaded from the hub: {_line(error)}", f"check the name and the network; {_FORMATS_HINT}"
        ) from None
    if isinstance(found, dict):
        if "train" not in found and len(found) != 1:
            raise InvalidInput(f"{name} has the splits {', '.join(found)}", f"choose one: {name}:{next(iter(found))}")
        found = found["train"] if "train" in found else next(iter(found.values()))
    return [dict(row) for row in found]


def _ask_hub(name: str) -> None:
    """Find out at once whether the hub knows a dataset; `load_dataset` would try again and again for half a minute.

    With HF_HUB_OFFLINE set, the libraries' own cache is all there is, and nobody is asked.
    """
    hub = environment.require("huggingface_hub", "to load a dataset from the hub")
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if HF_HUB_OFFLINE:
        return
    try:
        hub.HfApi().dataset_info(name, timeout=10)
    except (RepositoryNotFoundError, GatedRepoError, HFValidationError) as error:
        what = "is gated" if isinstance(error, GatedRepoError) else "is neither a path here nor a dataset of the hub"
        raise InvalidInput(f"{name} {what}", f"check the name (private ones need `hf auth login`), or {_FORMATS_HINT}") from None
    except Exception as error:  # the HTTP library under huggingface_hub has changed its name twice: any error means not reached
        raise InvalidInput(
            f"{name} is no path here, and the hub was not reached: {_line(error)}", f"check the path or the network; {_FORMATS_HINT}"
        ) from None


def _content(path: Path) -> str:
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front. Universal newlines: \r\n is read as \n.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise InvalidInput(f"{path} line {line}: not UTF-8 (byte {error.object[error.start]:#x})", "save the file as UTF-8") from None
    except OSError as error:
        raise RunFailed(f"{path} could not be read: {error.strerror}", "check its permissions") from None


def _parse(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidInput(f"{path} line {number}: broken JSON ({error.msg}, column {error.colno})", "mend that line") from None


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise InvalidInput(f"{where}: a {type(value).__name__}, not an object with columns", 'write {"column": "value"}')
    return value


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] + ("..." if len(text) > 200 else "")


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
