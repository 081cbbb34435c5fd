"""What are the weights in a Hugging Face folder's files? Read one at a time, without loading the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slmops import environment
from slmops.graph.linears import EMBEDDING, HEAD


class StoredWeights(Mapping[str, np.ndarray]):
    """The parameters of a Hugging Face folder by name, each read as float32 when it is asked for.

    A file is open only while a tensor is read: its pages count as memory of this process as long as it is mapped, and a
    reader of all tensors would end with the whole model. A head that is tied to the embedding has no file of its own:
    asked for by its name, it is the embedding.
    """

    def __init__(self, folder: Path) -> None:
        environment.require("ml_dtypes", "to read weights")  # by which numpy knows bfloat16
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with self._open(file) as stored:
                self._files |= dict.fromkeys(stored.keys(), file)

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._place(name)
        with self._open(self._files[place]) as stored:
            return stored.get_tensor(place).astype(np.float32, copy=False)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return some rows of a parameter as float32; no other is read."""
        place = self._place(name)
        with self._open(self._files[place]) as stored:
            return stored.get_slice(place)[start:stop].astype(np.float32, copy=False)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter; it is not read."""
        place = self._place(name)
        with self._open(self._files[place]) as stored:
            return tuple(stored.get_slice(place).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return self._place(name) in self._files  # Mapping's own would read the tensor

    @staticmethod
    def _open(file: Path) -> Any:
        return environment.require("safetensors", "to read weights").safe_open(file, framework="numpy")

    def _place(self, name: object) -> str:
        tied = name == f"{HEAD}.weight" and name not in self._files
        return f"{EMBEDDING}.weight" if tied else str(name)
