"""Where does a library of our own in C++ come from? From the compiler of the machine, in seconds, once; then from the user's cache.

The source is part of slmops, and what is made of it never leaves the machine: it has the instructions of its processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from slmops import progress
from slmops.cache import cache_folder

# Sums and signs stay as they are written: -ffast-math would also change how the whole process treats numbers near 0.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
SWITCH = "SLMOPS_COMPILE"
"""Environment variable: with `no` nothing of ours is compiled or used; PyTorch's and onnxruntime's operators do the same."""
_COMPILERS = ("g++", "c++", "clang++")
_SECONDS = 120


class NotCompiled(Exception):
    """There is no library on this machine; the message says why, and what would help."""


def switched_off() -> bool:
    """Return whether the user asked for the libraries' own operators."""
    return os.environ.get(SWITCH, "").lower() in ("no", "0", "false")


def library(source: Path, *flags: str) -> ctypes.CDLL:
    """Return what a C++ source becomes, compiled now where it never was on this machine.

    Args:
        source: one file, without headers but the language's own.
        flags: of the compiler, beside `FLAGS`.

    Raises:
        NotCompiled: there is no compiler that compiles it.
    """
    by = [*compiler(), *flags]
    try:
        kept = _kept(source, by)
        found = _loaded(kept) if kept is not None else None
        if found is not None:
            return found
        progress.say(f"{source.name} is compiled for this processor, once")
        with tempfile.TemporaryDirectory(prefix="slmops-") as scratch:
            made = Path(scratch) / _name(source, by)
            _compile(source, by, made)
            if kept is not None and _keep(made, kept):
                found = _loaded(kept)
            found = found or _loaded(made)  # what is loaded stays when its file goes
    except (OSError, ValueError) as error:
        raise NotCompiled(f"{source.name} cannot be compiled here ({error})") from error
    if found is None:
        raise NotCompiled(f"what {by[0]} makes of {source.name} cannot be loaded")
    return found


def _loaded(path: Path) -> ctypes.CDLL | None:
    """Load a library; None where there is none, where it is damaged, or where somebody else could have put it there."""
    try:
        if all(_own(place) for place in (path, path.parent)):
            return ctypes.CDLL(str(path))
    except OSError:
        pass
    return None


def _own(path: Path) -> bool:
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def compiler() -> list[str]:
    """Return the C++ compiler, a path and perhaps arguments: `CXX`, or one that is usual.

    Raises:
        NotCompiled: there is none, or slmops compiles nothing on this system.
    """
    if platform.system() != "Linux":
        raise NotCompiled(f"slmops compiles on Linux alone, not on {platform.system()}")
    asked = os.environ.get("CXX", "").split()
    names = asked[:1] or _COMPILERS
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise NotCompiled(f"no C++ compiler ({', '.join(names)}): install one, such as the package g++")
    return [found, *asked[1:]]


def _compile(source: Path, by: list[str], made: Path) -> None:
    command = [*by, *FLAGS, f"-Wl,-soname,{made.name}", str(source), "-o", str(made)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        said = next((line for line in lines if "error" in line), lines[0])
        raise NotCompiled(f"{by[0]} does not compile {source.name} ({said.strip()})") from error
    except subprocess.TimeoutExpired as error:
        raise NotCompiled(f"{by[0]} does not compile {source.name} within {_SECONDS} s") from error


def _kept(source: Path, by: list[str]) -> Path | None:
    """Return where the library is kept; None where there is no home."""
    folder = cache_folder("compiled")
    return folder / _name(source, by) if folder is not None else None


def _name(source: Path, by: list[str]) -> str:
    """Name a library after its source, the compiler and the processor."""
    status = Path(by[0]).resolve().stat()
    made_by = f"{by} {status.st_size} {status.st_mtime_ns} {' '.join(FLAGS)} {_processor()}"
    return f"slmops-{source.stem}-{hashlib.sha256(source.read_bytes() + made_by.encode()).hexdigest()[:32]}.so"


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
    draft = None
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with made.open("rb") as source, tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as target:
            draft = Path(target.name)
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())  # half a library would not be refused when it is loaded but end the process later
        draft.replace(kept)
    except OSError:
        if draft is not None:
            draft.unlink(missing_ok=True)
        return False
    return True
