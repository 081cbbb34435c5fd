"""What does a file or a folder hold? Told by hashes of its content, so that another one is known, wherever it lies."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from slmops.errors import BadArtifact

# Hugging Face weights; optimizer states and the like are not the model.
_WEIGHTS = ("*.safetensors",)
_CONFIGS = ("config.json", "adapter_config.json")
_MANIFEST = "slmops.json"
_PROCESS = """
import hashlib, json, sys
print(json.dumps({name: hashlib.file_digest(open(name, "rb"), "sha256").hexdigest() for name in sys.argv[1:]}))
"""

Stamp = list[int]
"""Of a file: size, modification time in nanoseconds, inode. A file with the same stamp was not written to since."""


class FileRecord(BaseModel):
    """Size and hash of one file of an artefact."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    bytes: int
    sha256: str


Known = Mapping[str, tuple[Stamp, FileRecord]]
"""What is known of files, by their name in the folder, and the stamp that they had when it was found out."""


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(path: Path | str) -> str:
    """Return a hash that tells one model, adapter, data file or folder from another.

    Of a folder with weights: the hash of its `*.safetensors` and config files' contents, whatever else lies beside
    them. Of any other folder: of all its files. Of a file: of its content.
    """
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise BadArtifact(f"no such file or folder: {path}", "check the path")
    weights = [file for pattern in _WEIGHTS for file in sorted(path.glob(pattern))]
    configs = [file for name in _CONFIGS if (file := path / name).is_file()]
    chosen = weights + configs if weights else sorted(file for file in path.rglob("*") if file.is_file() and file.name != _MANIFEST)
    lines = [f"{file.relative_to(path)} {sha256_file(file)}" for file in chosen]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def records(folder: Path, *, without: Path, known: Known | None = None) -> dict[str, FileRecord]:
    """Return size and hash of each file of a folder but one, by its name there; what is known is not read again."""
    found: dict[str, FileRecord] = {}
    for file, seen in _stamps(folder, without).items():
        name = str(Path(file).relative_to(folder))
        before, record = (known or {}).get(name, (None, None))
        found[name] = record if record is not None and before == seen else FileRecord(bytes=seen[0], sha256=sha256_file(Path(file)))
    return found


@contextmanager
def hashing(folder: Path, *, without: Path) -> Iterator[Callable[[], Known]]:
    """Hash a folder's files beside the work of the block, in a process: a thread would wait for libraries that keep Python's lock.

    Yields:
        a function that returns what was found, of files that are there when the block begins; to be called at its end.
    """
    stamps = _stamps(folder, without)
    command = [sys.executable, "-I", "-S", "-c", _PROCESS, *map(str, stamps)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:

        def found() -> Known:
            output, _ = process.communicate()
            hashed: dict[str, str] = json.loads(output) if process.returncode == 0 else {}
            files = {file: (stamps[file], FileRecord(bytes=stamps[file][0], sha256=sha)) for file, sha in hashed.items()}
            return {str(Path(file).relative_to(folder)): seen for file, seen in files.items()}

        try:
            yield found
        finally:
            process.kill()


def stamp(path: Path) -> Stamp | None:
    """Return a file's stamp; None where there is no file."""
    if not path.is_file():
        return None
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def size_bytes(folder: Path | str) -> int:
    """Return the size of all files of a folder."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def _stamps(folder: Path, without: Path) -> dict[str, Stamp]:
    """Return the stamps of a folder's files but one, by path."""
    stamps = ((file, stamp(file)) for file in sorted(folder.rglob("*")) if file != without)
    return {str(file): seen for file, seen in stamps if seen is not None}
