"""Run onnxruntime-genai's model builder, alone in a process: `python -P builder_process.py REQUEST.json`.

The builder imports top-level names (`builders`, `quantization`, `loaders`) from its own folder, so it may share neither
a process nor a working directory with anything else. Nothing of slmops is imported here.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Build what the request asks for."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    package = find_spec("onnxruntime_genai")
    assert package is not None and package.origin is not None
    sys.path.insert(0, str(Path(package.origin).parent / "models"))
    import builder  # type: ignore[import-not-found]  # noqa: PLC0415

    arguments = ("", request["model"], request["out"], request["precision"], request["provider"], request["cache"])
    options = builder.parse_extra_options(*arguments, [f"{key}={value}" for key, value in request["options"].items()])
    builder.create_model(*arguments, **options)


if __name__ == "__main__":
    main()
