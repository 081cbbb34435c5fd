"""What are the weights in a Hugging Face folder's files? Read one at a time, without loading the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

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
        safetensors = environment.require("safetensors", "to read weights")
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safetensors.safe_open(file, framework="numpy") as stored:
                self._files |= dict.fromkeys(stored.keys(), file)

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._place(name)
        safetensors = environment.require("safetensors", "to read weights")
        with safetensors.safe_open(self._files[place], framework="pt") as stored:  # numpy has no bfloat16
            return stored.get_tensor(place).float().numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return self._place(name) in self._files  # Mapping's own would read the tensor

    def _place(self, name: object) -> str:
        tied = name == f"{HEAD}.weight" and name not in self._files
        return f"{EMBEDDING}.weight" if tied else str(name)
