"""Has the model ever seen a token? Read from its embedding, without loading the model.

A token that never came up in training has a row that training left where weight decay and the softmax push all such
rows: together. So rows that surely were never seen (bytes that no UTF-8 text has, reserved tokens, rows beyond the
vocabulary) make a reference, and a token among them was not seen either (Land and Bartolo 2024, "Fishing for Magikarp",
arXiv 2405.05417, sections 3.1 and 3.2: the distance to the mean of the known unused rows). Where the reference does not
stand apart from ordinary tokens, or there is none, the answer is "cannot tell".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slmops.data.tokenizer import Tokenizer

Seen = Literal["seen", "never", "unknown"]

# The output layer first: a stop token must be produced. A tied model has only the embedding.
_OUTPUT = ("lm_head.weight", "embed_out.weight")
_EMBEDDING = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight", "shared.weight")
_RESERVED = re.compile(r"reserved|unused|<\|?extra_|dummy|placeholder|^<SPECIAL_\d+>$", re.IGNORECASE)
# No UTF-8 text holds these bytes (RFC 3629, section 1).
_IMPOSSIBLE_BYTES = (0xC0, 0xC1, *range(0xF5, 0x100))
_DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2"}
_SAMPLE = 2048
_FEWEST = 3  # rows that make a reference


@dataclass(frozen=True)
class Evidence:
    """What the embedding says of one token."""

    seen: Seen
    reason: str


def judge(folder: Path | str, tokenizer: Tokenizer, ids: Sequence[int]) -> dict[int, Evidence]:
    """Tell for each token whether the model has seen it in training.

    Args:
        folder: a Hugging Face model; without readable weights every answer is "unknown".
        tokenizer: its tokenizer.
        ids: the tokens in question.
    """
    table = _find_table(Path(folder))
    if table is None:
        return dict.fromkeys(ids, Evidence("unknown", "no weights to look at"))
    references = [group for group in _reference_groups(tokenizer, table.rows) if len(group) >= _FEWEST]
    known = {i for group in references for i in group} | set(ids)
    others = np.array([i for i in range(min(table.rows, tokenizer.vocabulary_size)) if i not in known])
    if not references or not len(others):
        return dict.fromkeys(ids, Evidence("unknown", "no rows of the embedding are known to be unused"))
    others = np.random.default_rng(0).choice(others, min(_SAMPLE, len(others)), replace=False)
    ordinary = table.read(np.sort(others))
    groups = [_Group.of(table.read(group), ordinary) for group in references]
    return {i: _verdict(table.read([i])[0], groups) if 0 <= i < table.rows else Evidence("unknown", "no such row") for i in ids}


@dataclass(frozen=True)
class _Group:
    """Rows that were surely never seen: their centre, how far they lie from it, and how far ordinary rows do."""

    centre: np.ndarray
    radius: float
    ordinary: float

    @staticmethod
    def of(rows: np.ndarray, ordinary: np.ndarray) -> _Group:
        centre = np.median(rows, axis=0)
        spread = np.linalg.norm(rows - centre, axis=1)
        # A reserved token that was used after all is no outlier to widen the radius by.
        spread = spread[spread <= 4 * np.median(spread) + 1e-12]
        return _Group(centre, float(spread.max()), float(np.median(np.linalg.norm(ordinary - centre, axis=1))))

    @property
    def stands_apart(self) -> bool:
        return self.radius < 0.5 * self.ordinary


def _verdict(row: np.ndarray, groups: list[_Group]) -> Evidence:
    if not np.any(row):
        return Evidence("never", "its row of the embedding is zero")
    usable = [group for group in groups if group.stands_apart]
    if not usable:
        return Evidence("unknown", "unused rows of the embedding do not stand apart from used ones")
    distances = [(float(np.linalg.norm(row - group.centre)), group) for group in usable]
    distance, group = min(distances, key=lambda item: item[0] / max(item[1].radius, 1e-12))
    figures = f"its embedding lies {distance:.2g} from those of tokens never seen, ordinary ones {group.ordinary:.2g}"
    # Measured: no token of stories3m lies between 0.0043 and 0.108 of the ordinary distance, none of stories260k
    # between 0.0009 and 0.029. A hundredth is in both gaps; what is seen a few times lies beyond.
    if distance <= max(1.5 * group.radius, 0.01 * group.ordinary):
        return Evidence("never", figures)
    # Between the cloud of unused rows and the ordinary ones lie tokens that were seen a few times.
    return Evidence("seen", figures) if distance >= max(3 * group.radius, 0.25 * group.ordinary) else Evidence("unknown", figures)


def _reference_groups(tokenizer: Tokenizer, rows: int) -> list[list[int]]:
    vocabulary = tokenizer.vocabulary_size
    sentencepiece = [tokenizer.id(f"<0x{byte:02X}>") for byte in _IMPOSSIBLE_BYTES]
    # GPT-2's byte-level alphabet: these bytes stand for themselves in Latin-1.
    byte_level = [tokenizer.id(chr(byte)) for byte in _IMPOSSIBLE_BYTES] if tokenizer.id("Ġ") is not None else []
    reserved = [i for i in sorted(tokenizer.added) if _RESERVED.search(tokenizer.token(i))]
    beyond = list(range(vocabulary, rows))[:_SAMPLE]
    groups = [[i for i in group if i is not None and i < rows] for group in (sentencepiece, byte_level, reserved, beyond)]
    return [group for group in groups if group]


@dataclass(frozen=True)
class _Table:
    """A matrix of a safetensors file, read row by row."""

    data: np.ndarray
    rows: int
    bfloat16: bool

    def read(self, ids: Any) -> np.ndarray:
        """Return rows as float32, shaped (len(ids), width)."""
        chosen = np.asarray(self.data[ids])
        if self.bfloat16:  # the upper half of a float32
            return (chosen.astype(np.uint32) << 16).view(np.float32)
        return chosen.astype(np.float32)


def _find_table(folder: Path) -> _Table | None:
    """Find the output layer, or the embedding where both are one, in the folder's safetensors."""
    found: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header = _header(path)
        if header is not None:
            start, tensors = header
            found.update({name: (path, start, entry) for name, entry in tensors.items() if name != "__metadata__"})
    for suffix in (*_OUTPUT, *_EMBEDDING):
        for name, (path, start, entry) in found.items():
            if (name == suffix or name.endswith("." + suffix)) and len(entry["shape"]) == 2 and entry["dtype"] in _DTYPES:
                offset = start + entry["data_offsets"][0]
                data = np.memmap(path, dtype=_DTYPES[entry["dtype"]], mode="r", offset=offset, shape=tuple(entry["shape"]))
                return _Table(data, entry["shape"][0], entry["dtype"] == "BF16")
    return None


def _header(path: Path) -> tuple[int, dict[str, Any]] | None:
    """Read the header of a safetensors file: 8 bytes of length, then JSON. The library reads no bfloat16 into numpy."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length < 100_000_000 or length > path.stat().st_size:
            return None
        try:
            return 8 + length, json.loads(stream.read(length))
        except ValueError:
            return None
