"""What are the weights in a Hugging Face folder's files? Read one at a time, without loading the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from slmops import environment


class StoredWeights(Mapping[str, np.ndarray]):
    """The parameters of a Hugging Face folder by name, each read as float32 when it is asked for."""

    def __init__(self, folder: Path) -> None:
        safetensors = environment.require("safetensors", "to read weights")
        self._files = {}
        for file in sorted(folder.glob("*.safetensors")):
            stored = safetensors.safe_open(file, framework="pt")  # numpy has no bfloat16
            self._files |= dict.fromkeys(stored.keys(), stored)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name).float().numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files  # Mapping's own would read the tensor
