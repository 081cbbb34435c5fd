"""What of an export can be done before there is a graph? Its matrices are quantized while the builder works.

Rows of a matrix are quantized one by one, so a parameter of the model's files has the same codes alone as in a projection
that the builder fuses it into: nothing but the files and the recipe is needed. Processes do it, not threads: between two
operators of numpy one thread runs at a time, and two of them quantize hardly faster than one.

The work is cut into pieces of rows. Whoever takes one, a process or later the export itself, says so with a file that only
one can make; so all are busy to the end, and what a process did not come to, or lost, the export does.

    python -P -m slmops.graph.ahead FOLDER        one such process
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from slmops import environment
from slmops.errors import InvalidInput
from slmops.graph.linears import Linear
from slmops.graph.quantization import Packed, Scheme, pack, quantize
from slmops.graph.stored_weights import StoredWeights

# Weights of a piece: 50 ms of work. A model of fewer than the second number is quantized before a process has begun.
_PIECE, _FEWEST = 1 << 22, 1 << 24
_MOST_PROCESSES = 8
_JOB, _POLL_SECONDS = "job.json", 0.002


@dataclass(frozen=True)
class _Piece:
    """Some rows of a parameter, and how they are quantized."""

    parameter: str
    start: int
    stop: int
    bits: int
    block_size: int

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.bits, self.block_size)

    def quantize(self, stored: StoredWeights) -> Packed:
        return pack(quantize(stored.rows(self.parameter, self.start, self.stop), self.scheme, threads=1))


class Ahead:
    """Matrices that are being quantized: made by `quantizing`."""

    def __init__(self, model: Path, folder: Path, rule: Callable[[Linear], Scheme]) -> None:
        self._stored, self._folder = StoredWeights(model), folder
        self._pieces = list(_pieces(self._stored, rule))
        self._of: dict[str, list[int]] = {}
        for number, piece in enumerate(self._pieces):
            self._of.setdefault(piece.parameter, []).append(number)
        job = {"model": str(model.resolve()), "pieces": [astuple(piece) for piece in self._pieces]}
        (folder / _JOB).write_text(json.dumps(job), encoding="utf-8")
        self._workers: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Begin, with a core left for the builder; a small model, or a single core, is left to the export."""
        weights = sum((piece.stop - piece.start) * self._stored.shape(piece.parameter)[1] for piece in self._pieces)
        count = min(environment.usable_cores() - 1, _MOST_PROCESSES, weights // _FEWEST)
        command = [sys.executable, "-P", "-m", "slmops.graph.ahead", str(self._folder)]
        nothing = subprocess.DEVNULL
        self._workers = [subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing) for _ in range(count)]

    def packed(self, parameters: Sequence[str], scheme: Scheme) -> Packed | None:
        """Return parameters quantized, stacked along their outputs; None where that was not foreseen, or there are none."""
        numbers = [number for name in parameters for number in self._of.get(name, ())]
        foreseen = bool(parameters) and all(name in self._of for name in parameters)
        if not foreseen or any(self._pieces[number].scheme != scheme for number in numbers):
            return None
        codes, scales, points = (np.concatenate(parts) for parts in zip(*map(self._piece, numbers), strict=True))
        return codes, scales, points

    def end(self) -> None:
        """Stop what still works."""
        for worker in self._workers:
            worker.kill()
            worker.wait()

    def _piece(self, number: int) -> Packed:
        done = _done(self._folder, number)
        if not _claim(self._folder, number):
            while not done.is_file() and any(worker.poll() is None for worker in self._workers):
                time.sleep(_POLL_SECONDS)
            if done.is_file():
                found = _read(done)
                done.unlink()  # where temporary files are kept in memory, it would be held twice
                return found
        return self._pieces[number].quantize(self._stored)


@contextmanager
def quantizing(model: Path, rule: Callable[[Linear], Scheme]) -> Iterator[Ahead]:
    """Quantize a model's matrices from now on, in processes that end with the block.

    Args:
        model: Hugging Face folder.
        rule: the scheme of each matrix, by the last part of its name and its size; one that InvalidInput is raised for is left out.
    """
    with TemporaryDirectory(prefix="slmops-ahead-") as folder:
        ahead = Ahead(model, Path(folder), rule)
        try:
            ahead.start()
            yield ahead
        finally:
            ahead.end()


def _pieces(stored: StoredWeights, rule: Callable[[Linear], Scheme]) -> Iterator[_Piece]:
    for name in stored.matrices():
        outputs, inputs = stored.shape(name)
        try:
            scheme = rule(Linear(name.removesuffix(".weight"), inputs, outputs, None, None, ()))
        except InvalidInput:
            continue
        rows = max(1, _PIECE // inputs)
        for start in range(0, outputs, rows):
            yield _Piece(name, start, min(start + rows, outputs), scheme.bits, scheme.block_size)


def _claim(folder: Path, number: int) -> bool:
    """Take a piece, unless another has it."""
    try:
        (folder / f"{number}.claim").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _done(folder: Path, number: int) -> Path:
    return folder / f"{number}.npz"


def _read(path: Path) -> Packed:
    with np.load(path) as stored:
        return stored["codes"], stored["scales"], stored["points"]


def _work(folder: Path) -> None:
    """Quantize what is not taken yet."""
    job = json.loads((folder / _JOB).read_text(encoding="utf-8"))
    stored, parent = StoredWeights(Path(job["model"])), os.getppid()
    for number, fields in enumerate(job["pieces"]):
        if os.getppid() != parent:
            return  # the export was killed
        if not _claim(folder, number):
            continue
        codes, scales, points = _Piece(*fields).quantize(stored)
        part = folder / f"{number}.part"
        with part.open("wb") as stream:
            np.savez(stream, codes=codes, scales=scales, points=points)
        part.replace(_done(folder, number))


if __name__ == "__main__":
    with suppress(FileNotFoundError):  # the export ended, and took the folder with it
        _work(Path(sys.argv[1]))
