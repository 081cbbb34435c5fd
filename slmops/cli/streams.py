"""Which words go to stdout and which to stderr? Results to stdout, everything else to stderr.

Libraries print where they like, also from C++ and in child processes. While a command works, file descriptor 1 leads
to stderr, and only the results are written to the real stdout: so `--json` is one document, whatever was loaded.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO


@contextlib.contextmanager
def results_only() -> Iterator[TextIO]:
    """Give the real stdout; until the block ends, whatever else is printed goes to stderr."""
    try:
        output, errors = sys.stdout.fileno(), sys.stderr.fileno()
    except (AttributeError, OSError):
        # Inside a test or a notebook stdout is an object without a descriptor.
        real = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):
            yield real
        return
    sys.stdout.flush()
    saved = os.dup(output)
    os.dup2(errors, output)
    real = os.fdopen(saved, "w", encoding=sys.stdout.encoding, errors="replace", closefd=False)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield real
    finally:
        with contextlib.suppress(BrokenPipeError):
            real.close()
        os.dup2(saved, output)
        os.close(saved)


@contextlib.contextmanager
def libraries_quiet() -> Iterator[None]:
    """Keep the notices of libraries to their developers (deprecations, missing accelerators) off the user's screen.

    Nothing that changes a result is told that way: slmops checks for itself. `--debug` shows them.
    """
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.level
        logging.root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logging.root.setLevel(before)


def write_document(document: Mapping[str, Any], stream: TextIO) -> None:
    """Write the one document of `--json`: NaN and infinities as null, paths as text."""
    stream.write(json.dumps(plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    stream.flush()


def plain(value: Any) -> Any:
    """Return a value as JSON knows it."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    # numpy's scalars and arrays turn themselves into Python's.
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)
