"""What are the weights in a Hugging Face folder's files? Read one at a time, without loading the model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmops import environment
from slmops.errors import BadArtifact
from slmops.graph.linears import EMBEDDING, HEAD

_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LENGTH_BYTES = 8
_CHUNK = 1 << 22
"""Numbers that are converted at once."""


@dataclass(frozen=True)
class _Stored:
    """Where a parameter lies."""

    file: Path
    dtype: str
    """As the format names it: F32, BF16 ..."""
    shape: tuple[int, ...]
    offset: int


class StoredWeights(Mapping[str, np.ndarray]):
    """The parameters of a Hugging Face folder by name, each read as float32 when it is asked for.

    Read, not mapped: the pages of a file that is mapped count as memory of this process, a reader of all tensors would end with the
    whole model, and a page is slower to come by than to copy. The safetensors library can only map. Its format is a length, a JSON
    header with the place of each tensor, and the tensors (https://github.com/huggingface/safetensors, "Format").

    A head that is tied to the embedding has no tensor of its own: asked for by its name, it is the embedding.

    Args:
        folder: with `*.safetensors`.

    Raises:
        BadArtifact: a file is damaged, or a parameter that is asked for is of a type that is no float.
    """

    def __init__(self, folder: Path) -> None:
        self._stored: dict[str, _Stored] = {}
        for file in sorted(folder.glob("*.safetensors")):
            self._stored |= _read_header(file)

    def __getitem__(self, name: str) -> np.ndarray:
        stored = self._stored[self._place(name)]
        return _read(stored, 0, math.prod(stored.shape)).reshape(stored.shape)

    def rows(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Return some rows of a parameter as float32; no other is read.

        Args:
            name: of the parameter.
            start: first row.
            stop: row after the last.
            out: (stop - start, ...) float32, contiguous: to read into.
        """
        stored = self._stored[self._place(name)]
        width = math.prod(stored.shape[1:])
        return _read(stored, start * width, (stop - start) * width, out).reshape(stop - start, *stored.shape[1:])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter; it is not read."""
        return self._stored[self._place(name)].shape

    def matrices(self) -> list[str]:
        """Return the names of the parameters that are float matrices."""
        return [name for name, stored in self._stored.items() if len(stored.shape) == 2 and all(stored.shape) and stored.dtype in _TYPES]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return self._place(name) in self._stored  # Mapping's own would read the tensor

    def _place(self, name: object) -> str:
        tied = name == f"{HEAD}.weight" and name not in self._stored
        return f"{EMBEDDING}.weight" if tied else str(name)


def _read_header(file: Path) -> dict[str, _Stored]:
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            start, whole = _LENGTH_BYTES + size, file.stat().st_size
            entries: dict[str, Any] = json.loads(stream.read(size)) if start <= whole else {}
        entries.pop("__metadata__", None)
        found = {
            name: _Stored(file, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0]) for name, entry in entries.items()
        }
        ends = [start + entry["data_offsets"][1] for entry in entries.values()]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise BadArtifact(f"{file} cannot be read: it is no safetensors file", "download or convert the model again") from error
    if start > whole or max(ends, default=0) > whole:
        raise BadArtifact(f"{file} cannot be read: it ends before its last tensor", "download or copy the model again")
    return found


def _read(stored: _Stored, first: int, count: int, out: np.ndarray | None = None) -> np.ndarray:
    """Return some numbers of a parameter, (count,) float32, or `out`, which they are written to."""
    if stored.dtype not in _TYPES:
        raise BadArtifact(f"{stored.file} holds weights of type {stored.dtype}", f"convert the model to {', '.join(_TYPES)}")
    if stored.dtype == "BF16":
        environment.require("ml_dtypes", "to read weights")  # by which numpy knows bfloat16
    dtype = np.dtype(_TYPES[stored.dtype])
    offset = stored.offset + first * dtype.itemsize
    if out is None:
        return np.fromfile(stored.file, dtype, count, offset=offset).astype(np.float32, copy=False)
    if dtype == np.float32:
        with stored.file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            room: Any = memoryview(out.reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]
            while room and (read := stream.readinto(room)):
                room = room[read:]
        if room:
            raise _cut(stored.file)
    else:
        flat = out.reshape(-1)
        for at in range(0, count, _CHUNK):  # a small copy on the way, whose memory is used again
            part = np.fromfile(stored.file, dtype, min(_CHUNK, count - at), offset=offset + at * dtype.itemsize)
            if len(part) < min(_CHUNK, count - at):
                raise _cut(stored.file)
            flat[at : at + _CHUNK] = part
    return out


def _cut(file: Path) -> BadArtifact:
    return BadArtifact(f"{file} ends before its last tensor", "download or copy the model again")
