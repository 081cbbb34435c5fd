"""Where does a library of our own in C++ come from? From the compiler of the machine, in seconds, once; then from the user's cache.

The source is part of slmops, and what is made of it never leaves the machine: it has the instructions of its processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from slmops import progress

# Sums and signs stay as they are written: -ffast-math would also change how the whole process treats numbers near 0.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_COMPILERS = ("g++", "c++", "clang++")
_SECONDS = 120


class NotCompiled(Exception):
    """There is no library on this machine; the message says why, and what would help."""


def library(source: Path) -> ctypes.CDLL:
    """Return what a C++ source becomes, compiled now where it never was on this machine.

    Args:
        source: one file, without headers but the language's own.

    Raises:
        NotCompiled: there is no compiler that compiles it.
    """
    by = compiler()
    kept = _kept(source, by)
    found = _loaded(kept) if kept is not None and kept.is_file() else None
    if found is not None:
        return found
    progress.say(f"{source.name} is compiled for this processor, once")
    with tempfile.TemporaryDirectory(prefix="slmops-") as scratch:
        made = Path(scratch) / f"{source.stem}.so"
        _compile(source, by, made)
        found = _loaded(kept if kept is not None and _keep(made, kept) else made)  # what is loaded stays when its file goes
    if found is None:
        raise NotCompiled(f"what {by} makes of {source.name} cannot be loaded")
    return found


def _loaded(path: Path) -> ctypes.CDLL | None:
    """Load a library; None where it cannot be, as when its file is damaged."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def compiler() -> str:
    """Return the path of the C++ compiler: `CXX`, or one that is usual.

    Raises:
        NotCompiled: there is none, or slmops compiles nothing on this system.
    """
    if platform.system() != "Linux":
        raise NotCompiled(f"slmops compiles on Linux alone, not on {platform.system()}")
    names = [os.environ["CXX"]] if os.environ.get("CXX") else _COMPILERS
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise NotCompiled(f"no C++ compiler ({', '.join(names)}): install one, such as the package g++")
    return found


def _compile(source: Path, by: str, made: Path) -> None:
    try:
        subprocess.run([by, *FLAGS, str(source), "-o", str(made)], check=True, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        said = next((line for line in lines if "error" in line), lines[0])
        raise NotCompiled(f"{by} does not compile {source.name} ({said.strip()})") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotCompiled(f"{by} does not compile {source.name} ({error})") from error


def _kept(source: Path, by: str) -> Path | None:
    """Return where the library is kept for this source, compiler and processor; None where there is no home."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    status = Path(by).resolve().stat()
    made_by = f"{by} {status.st_size} {status.st_mtime_ns} {' '.join(FLAGS)} {_processor()}"
    return home / "slmops" / "compiled" / f"{source.stem}-{hashlib.sha256(source.read_bytes() + made_by.encode()).hexdigest()[:32]}.so"


def _processor() -> str:
    """Tell processors apart for which the compiler makes other instructions: a home may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    wanted = ("model name", "flags", "Features", "CPU part", "isa")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))


def _keep(made: Path, kept: Path) -> bool:
    """Put the library where it stays, at once or not at all: others may look for it now."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = kept.with_suffix(f".{os.getpid()}")
        with made.open("rb") as source, draft.open("wb") as target:
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())  # half a library would not be refused when it is loaded but end the process later
        draft.replace(kept)
    except OSError:
        return False
    return True
