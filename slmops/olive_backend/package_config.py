"""Which passes does Olive know? Its own, and those of slmops: the file for `olive run --package-config`.

python -m slmops.olive_backend.package_config > package_config.json

A package config that is given takes the place of Olive's own list, so both are in it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_ANY = ["*"]
OWN_PASSES: dict[str, dict[str, Any]] = {
    "SlmopsExport": {
        "module_path": "slmops.olive_passes.exporter.SlmopsExport",
        "supported_providers": _ANY,
        "supported_accelerators": _ANY,
        "supported_precisions": _ANY,
        "supported_algorithms": [],
        "supported_quantization_encodings": [],
    },
    "SlmopsPack": {
        "module_path": "slmops.olive_passes.packer.SlmopsPack",
        "supported_providers": _ANY,
        "supported_accelerators": ["cpu"],
        "supported_precisions": _ANY,
        "supported_algorithms": [],
        "supported_quantization_encodings": [],
    },
}


def package_config() -> dict[str, Any]:
    """Return the list of the Olive that is installed with our passes in it.

    Raises:
        Unavailable: Olive is not installed.
    """
    from slmops.olive_backend.requirements import require_olive

    require_olive("for its list of passes")
    from olive.package_config import OlivePackageConfig

    own = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8"))
    return {**own, "passes": {**own["passes"], **OWN_PASSES}}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(package_config(), indent=2) + "\n")
