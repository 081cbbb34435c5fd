"""What does a file or a folder hold? Told by hashes of its content, so that another one is known, wherever it lies.

Every verb asks whether the model is still the one that it was, and to hash 6 GB takes 4 s. So the hash of a large file is kept per
user with the file's stamp, which changes when a program writes to it: size, inode, and the times of the last change of its content
and of anything about it, the second of which no program can set. A file that changed within the last seconds is not kept: what is
written to it next could leave the same times. Who changes a file that it keeps mapped is not seen: what must be proven (`verify`) is
hashed each time. Windows has no time that tells, and nothing is kept there.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from slmops.cache import cache_folder
from slmops.errors import BadArtifact

# Hugging Face weights; optimizer states and the like are not the model.
_WEIGHTS = ("*.safetensors",)
_CONFIGS = ("config.json", "adapter_config.json")
_MANIFEST = "slmops.json"
_PROCESS = """
import hashlib, json, sys
print(json.dumps({name: hashlib.file_digest(open(name, "rb"), "sha256").hexdigest() for name in sys.argv[1:]}))
"""

# Bytes of a file whose hash is worth keeping, and nanoseconds since its last change from which on it is.
_LARGE, _SETTLED = 1 << 20, 2_000_000_000

Stamp = list[int]
"""Of a file: size, nanoseconds of the last change of its content and of anything, device, inode."""


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


def kept_sha256(path: Path) -> str:
    """Return what `sha256_file` does, of a large file that did not change since the last time without reading it."""
    now, seen, place = time.time_ns(), stamp(path), _memory(path)
    if seen is None or seen[0] < _LARGE or place is None or os.name == "nt":
        return sha256_file(path)
    try:
        kept = json.loads(place.read_text(encoding="utf-8"))
        if kept["stamp"] == seen:
            return str(kept["sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        pass  # not there, or not ours: hashed, and kept anew
    found = sha256_file(path)
    if stamp(path) == seen and now - max(seen[1:3]) > _SETTLED:
        with suppress(OSError):  # a device with a read-only home hashes each time
            place.parent.mkdir(parents=True, exist_ok=True)
            part = place.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps({"stamp": seen, "sha256": found}), encoding="utf-8")
            part.replace(place)
    return found


def fingerprint(path: Path | str) -> str:
    """Return a hash that tells one model, adapter, data file or folder from another; large files by `kept_sha256`.

    Of a folder with weights: the hash of its `*.safetensors` and config files' contents, whatever else lies beside
    them. Of any other folder: of all its files. Of a file: of its content.
    """
    path = Path(path)
    if path.is_file():
        return kept_sha256(path)
    if not path.is_dir():
        raise BadArtifact(f"no such file or folder: {path}", "check the path")
    weights = [file for pattern in _WEIGHTS for file in sorted(path.glob(pattern))]
    configs = [file for name in _CONFIGS if (file := path / name).is_file()]
    chosen = weights + configs if weights else sorted(file for file in path.rglob("*") if file.is_file() and file.name != _MANIFEST)
    lines = [f"{file.relative_to(path)} {kept_sha256(file)}" for file in chosen]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def records(folder: Path, *, without: Path, known: Known | None = None) -> dict[str, FileRecord]:
    """Return size and hash of each file of a folder but one, by its name there; what is known is not read again."""
    found: dict[str, FileRecord] = {}
    for file, seen in _stamps(folder, without).items():
        name = _name(file, folder)
        before, record = (known or {}).get(name, (None, None))
        found[name] = record if record is not None and before == seen else FileRecord(bytes=seen[0], sha256=sha256_file(Path(file)))
    return found


@contextmanager
def hashing(folder: Path, *, without: Path, known: Known) -> Iterator[Callable[[], Known]]:
    """Hash a folder's files that are not known yet beside the work of the block, in a process: a thread would wait for libraries that keep Python's lock.

    Yields:
        a function that returns what was found, of files that are there when the block begins; to be called at its end.
    """
    stamps = {file: seen for file, seen in _stamps(folder, without).items() if known.get(_name(file, folder), (None,))[0] != seen}
    command = [sys.executable, "-I", "-S", "-c", _PROCESS, *map(str, stamps)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:

        def found() -> Known:
            output, _ = process.communicate()
            hashed: dict[str, str] = json.loads(output) if process.returncode == 0 else {}
            files = {file: (stamps[file], FileRecord(bytes=stamps[file][0], sha256=sha)) for file, sha in hashed.items()}
            return {**known, **{_name(file, folder): seen for file, seen in files.items()}}

        try:
            yield found
        finally:
            process.kill()


def stamp(path: Path) -> Stamp | None:
    """Return a file's stamp; None where there is no file."""
    if not path.is_file():
        return None
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_dev, status.st_ino]


def size_bytes(folder: Path | str) -> int:
    """Return the size of all files of a folder."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def _name(file: str, folder: Path) -> str:
    return str(Path(file).relative_to(folder))


def _memory(path: Path) -> Path | None:
    """Return where a file's hash is kept; None where there is no home."""
    folder = cache_folder("hashes")
    return folder / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json" if folder is not None else None


def _stamps(folder: Path, without: Path) -> dict[str, Stamp]:
    """Return the stamps of a folder's files but one, by path."""
    stamps = ((file, stamp(file)) for file in sorted(folder.rglob("*")) if file != without)
    return {str(file): seen for file, seen in stamps if seen is not None}
