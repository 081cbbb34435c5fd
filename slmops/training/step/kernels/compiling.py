"""Where does the compiled library come from? From the C++ compiler of the machine, two seconds, once; then from the user's cache."""

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

SOURCE = Path(__file__).with_name("kernels.cpp")
# Sums and signs stay as they are written: -ffast-math would also change how the whole process treats numbers near 0.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_COMPILERS = ("g++", "c++", "clang++")
_SECONDS = 120


class NotCompiled(Exception):
    """There is no library on this machine; the message says why, and what would help."""


def library() -> ctypes.CDLL:
    """Return the library of the kernels, compiled now where it never was on this machine.

    Raises:
        NotCompiled: there is no compiler that compiles it.
    """
    compiler = _compiler()
    kept = _kept(compiler)
    found = _loaded(kept) if kept is not None and kept.is_file() else None
    if found is not None:
        return found
    progress.say("kernels of the training step are compiled for this processor, once")
    with tempfile.TemporaryDirectory(prefix="slmops-") as scratch:
        made = Path(scratch) / "kernels.so"
        _compile(compiler, made)
        found = _loaded(kept if kept is not None and _keep(made, kept) else made)  # what is loaded stays when its file goes
    if found is None:
        raise NotCompiled(f"what {compiler} makes of the kernels cannot be loaded")
    return found


def _loaded(path: Path) -> ctypes.CDLL | None:
    """Load a library; None where it cannot be, as when its file is damaged."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _compiler() -> str:
    if platform.system() != "Linux":
        raise NotCompiled(f"kernels are compiled on Linux alone, not on {platform.system()}")
    names = [os.environ["CXX"]] if os.environ.get("CXX") else _COMPILERS
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise NotCompiled(f"no C++ compiler ({', '.join(names)}): install one, such as the package g++")
    return found


def _compile(compiler: str, made: Path) -> None:
    try:
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(made)], check=True, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        said = next((line for line in lines if "error" in line), lines[0])
        raise NotCompiled(f"{compiler} does not compile the kernels ({said.strip()})") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotCompiled(f"{compiler} does not compile the kernels ({error})") from error


def _kept(compiler: str) -> Path | None:
    """Return where the library is kept for this source, compiler and processor; None where there is no home."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    status = Path(compiler).resolve().stat()
    made_by = f"{compiler} {status.st_size} {status.st_mtime_ns} {' '.join(FLAGS)} {_processor()}"
    return home / "slmops" / "kernels" / f"{hashlib.sha256(SOURCE.read_bytes() + made_by.encode()).hexdigest()[:32]}.so"


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
