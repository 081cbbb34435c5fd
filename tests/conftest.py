"""Fixtures: where real models and data may be found, and tiny ones that tests make themselves."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

# A runner in the background (nohup, `&`) ignores Ctrl-C, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data beside the project; tests that need it skip where it is absent."""
    folder = ROOT.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip("needs ../shared (real models and data), which is not here")
    return folder
