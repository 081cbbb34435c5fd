"""How are the matrices of a float graph written? From the model's files into the graph's data file, while the builder works.

Which matrices the builder will ask for is foreseen by their names: it stacks q, k and v, and gate and up, turns each matrix to
(inputs, outputs), and a tied embedding is the head's. What it asked for is seen afterwards; where that is something else (a model's
files that hold more than its graph), the file is dropped and written as any other graph's (`slmops.graph.rewriting.save_twins`).

Most of the time goes to the system, which finds memory to keep the file in: so pieces are large, since it takes one write to a file
at a time, and their own memory is used again.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmops import environment, hashes, progress
from slmops.graph.linears import EMBEDDING, FUSED, HEAD, Model
from slmops.graph.stored_weights import StoredWeights

# Bytes that are read, turned and written at once, up to twice as many; and the square in which a matrix is turned, which a core's cache holds.
_PIECE_BYTES, _TURNED = 64 << 20, 128
_MOST_THREADS = 4
_INSIDE_BYTES, _HASHED_BYTES = 256, 1 << 22
_ITEM = np.dtype(np.float32).itemsize


@dataclass(frozen=True)
class Matrix:
    """A matrix of the graph that is to come."""

    parameters: tuple[str, ...]
    """Of the model's files, stacked along their outputs."""
    transposed: bool
    """It is stored (inputs, outputs)."""
    outputs: int
    inputs: int
    offset: int
    """In the data file."""

    @property
    def length(self) -> int:
        """Return its bytes."""
        return _ITEM * self.outputs * self.inputs

    @property
    def shape(self) -> tuple[int, int]:
        """Return its shape in the graph."""
        return (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)


class FloatData:
    """A data file that is being written.

    Args:
        model: Hugging Face folder.
        file: to write; it must not be there.
    """

    def __init__(self, model: Path, file: Path) -> None:
        self.file = file
        self._stored = StoredWeights(model)
        self._sha256, self._hashed = hashlib.sha256(), 0
        self._matrices = list(foreseen(self._stored))
        self._pieces = iter([piece for matrix in self._matrices for piece in _pieces(matrix)])
        self._end = sum(matrix.length for matrix in self._matrices)
        with file.open("xb") as stream:
            stream.truncate(self._end)
        self._streams: list[Any] = []
        self._room = _Room(file, self._streams)

    def work(self, more: Callable[[], bool]) -> None:
        """Write pieces until all are written, or `more` says no."""
        for matrix, start, stop in self._pieces:
            self._write(matrix, start, stop)
            if not more():
                return

    def give(self, graph: Model) -> hashes.Known:
        """Let a graph of `slmops.graph.building.load_built` read all its tensors in this file, once they are written.

        Where it is not the graph that was foreseen, it keeps its matrices, and there is no file afterwards.

        Returns:
            the file's hash, by its name: taken behind the writing, which leaves a processor time for it.
        """
        onnx_ir = environment.require("onnx_ir", "to write an ONNX graph")
        values: dict[tuple[tuple[str, ...], bool], Any] = {}
        for value in graph.graph.initializers.values():
            source = value.meta.get("source")
            if source is not None and value.dtype == onnx_ir.DataType.FLOAT:
                values.setdefault((tuple(source["parameters"]), source["transposed"]), value)
        if any((matrix.parameters, matrix.transposed) not in values for matrix in self._matrices):
            self.close()
            self.file.unlink()
            return {}
        for matrix in self._matrices:
            value = values[matrix.parameters, matrix.transposed]
            value.const_value = self._external(value.const_value, matrix.offset, matrix.length)
        self._finish()
        given = {id(values[matrix.parameters, matrix.transposed]) for matrix in self._matrices}
        self._append(value for value in graph.graph.initializers.values() if id(value) not in given)
        self._hash(self._end)
        seen = hashes.stamp(self.file)
        if seen is None:
            raise OSError(f"{self.file} was removed while it was written")
        return {self.file.name: (seen, hashes.FileRecord(bytes=seen[0], sha256=self._sha256.hexdigest()))}

    def close(self) -> None:
        """Write no more."""
        for stream in self._streams:
            stream.close()

    def _finish(self) -> None:
        """Write the pieces that are left; hash the matrices before them meanwhile, and behind them."""
        rest = list(self._pieces)
        threads = min(environment.usable_cores(), _MOST_THREADS)
        with progress.task("write the weights", total=len(rest)) as task, ThreadPoolExecutor(threads) as pool:
            done = pool.map(lambda piece: self._write(*piece), rest)
            try:
                for (matrix, _, stop), _ in zip(rest, done, strict=True):
                    self._hash(matrix.offset + matrix.length if stop == matrix.outputs else matrix.offset)
                    task.advance()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _append(self, values: Iterable[Any]) -> None:
        """Write tensors that are no matrices of the model to the end; the small ones stay inside the graph's file."""
        for value in values:
            tensor = value.const_value
            if tensor.nbytes > _INSIDE_BYTES:
                self._put(np.frombuffer(tensor.tobytes(), np.uint8), self._end)
                value.const_value = self._external(tensor, self._end, tensor.nbytes)
                self._end += tensor.nbytes

    def _external(self, tensor: Any, offset: int, length: int) -> Any:
        onnx_ir = environment.require("onnx_ir", "to write an ONNX graph")
        place = {"location": self.file.name, "offset": offset, "length": length, "base_dir": self.file.parent}
        return onnx_ir.ExternalTensor(**place, dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)

    def _hash(self, end: int) -> None:
        """Hash what is written up to an offset."""
        while self._hashed < end:
            self._room.stream.seek(self._hashed)
            part = self._room.stream.read(min(_HASHED_BYTES, end - self._hashed))
            if not part:
                raise OSError(f"{self.file} was cut while it was written")
            self._sha256.update(part)
            self._hashed += len(part)

    def _write(self, matrix: Matrix, start: int, stop: int) -> None:
        """Write the outputs from `start` to `stop` of a matrix."""
        rows = self._rows(matrix, start, stop)
        if not matrix.transposed:
            self._put(rows, matrix.offset + _ITEM * start * matrix.inputs)
            return
        turned = turn(rows, self._room.array(1, (rows.shape[1], len(rows))))
        if len(rows) == matrix.outputs:
            self._put(turned, matrix.offset)
            return
        for row, numbers in enumerate(turned):
            self._put(numbers, matrix.offset + _ITEM * (row * matrix.outputs + start))

    def _rows(self, matrix: Matrix, start: int, stop: int) -> np.ndarray:
        """Return some outputs of a matrix, (stop - start, inputs)."""
        found, at, first = self._room.array(0, (stop - start, matrix.inputs)), 0, 0
        for name in matrix.parameters:
            rows = self._stored.shape(name)[0]
            low, high = max(start - first, 0), min(stop - first, rows)
            if low < high:
                self._stored.rows(name, low, high, found[at : at + high - low])
                at += high - low
            first += rows
        return found

    def _put(self, numbers: np.ndarray, offset: int) -> None:
        data: Any = numbers.reshape(-1).view(np.uint8)
        self._room.stream.seek(offset)
        while len(data):
            data = data[self._room.stream.write(data) :]  # less than all where a signal comes


def foreseen(stored: StoredWeights) -> Iterator[Matrix]:
    """Yield the matrices that the builder's float graph of a model will have, one behind the other in the data file."""
    offset = 0
    for parameters in _stacks(stored):
        outputs, inputs = sum(stored.shape(name)[0] for name in parameters), stored.shape(parameters[0])[1]
        looked_up = parameters == (f"{EMBEDDING}.weight",) and f"{HEAD}.weight" in list(stored)
        matrix = Matrix(parameters, not looked_up, outputs, inputs, offset)
        offset += matrix.length
        yield matrix


def _stacks(stored: StoredWeights) -> Iterator[tuple[str, ...]]:
    """Yield matrices that are stacked together, by name, in the order of the first of each."""
    names, done = stored.matrices(), set[str]()
    known = set(names)
    for name in names:
        if name in done:
            continue
        stem, _, kind = name.removesuffix(".weight").rpartition(".")
        stack = next((kinds for kinds in FUSED.values() if kind in kinds), (kind,))
        together = tuple(f"{stem}.{other}.weight" for other in stack)
        found = together if known.issuperset(together) and len({stored.shape(other)[1] for other in together}) == 1 else (name,)
        done |= set(found)
        yield found


def _pieces(matrix: Matrix) -> Iterator[tuple[Matrix, int, int]]:
    step = -(-matrix.outputs // max(1, matrix.length // _PIECE_BYTES))
    for start in range(0, matrix.outputs, step):
        yield matrix, start, min(start + step, matrix.outputs)


def turn(rows: np.ndarray, turned: np.ndarray) -> np.ndarray:
    """Write the transpose of a matrix into `turned`, square by square: 3 times as fast as in one piece."""
    for row in range(0, len(rows), _TURNED):
        for at in range(0, rows.shape[1], _TURNED):
            turned[at : at + _TURNED, row : row + _TURNED] = rows[row : row + _TURNED, at : at + _TURNED].T
    return turned


class _Room(threading.local):
    """What each thread has of its own: the file, and two arrays that are used again: new ones the system would give page by page."""

    def __init__(self, file: Path, streams: list[Any]) -> None:
        self.stream = file.open("r+b", buffering=0)
        streams.append(self.stream)
        self._arrays = [np.empty(0, np.float32), np.empty(0, np.float32)]

    def array(self, number: int, shape: tuple[int, int]) -> np.ndarray:
        """Return one of the two, of some content."""
        size = shape[0] * shape[1]
        if len(self._arrays[number]) < size:
            self._arrays[number] = np.empty(size, np.float32)
        return self._arrays[number][:size].reshape(shape)
