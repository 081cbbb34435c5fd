"""Does one thing of this machine work? Run as a process: `python -m slmops.probe session CPUExecutionProvider`.

Each probe may end its own process without harm. It prints one line of JSON: facts, or `error`.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

# An ONNX graph of one node, y = x + x over one float (IR 8, opset 17). A device has no onnx library to make it with;
# a test makes it anew and compares.
ONE_NODE = base64.b64decode("CAgSADo1Cg4KAXgKAXgSAXkiA0FkZBIBZ1oPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEBE=")


def providers() -> dict[str, Any]:
    """Return the names of the execution providers that the installed onnxruntime was compiled with."""
    import onnxruntime

    return {"providers": onnxruntime.get_available_providers(), "version": onnxruntime.__version__}


def session(provider: str) -> dict[str, Any]:
    """Run the one-node graph on a provider, and nowhere else."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if provider != "CPUExecutionProvider":
        # Without it, a node that the provider does not take runs on the CPU, and the provider seems to work.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    ready = onnxruntime.InferenceSession(ONE_NODE, options, providers=[provider])
    if ready.get_providers()[0] != provider:
        return {"error": f"onnxruntime fell back to {ready.get_providers()[0]}"}
    answer = float(np.asarray(ready.run(None, {"x": np.ones(1, np.float32)})[0])[0])
    return {"answer": answer} if answer == 2.0 else {"error": f"1 + 1 gave {answer}"}


def torch() -> dict[str, Any]:
    """Return which build of torch is here and which GPUs it sees."""
    import torch as library

    gpus = [library.cuda.get_device_name(index) for index in range(library.cuda.device_count())] if library.cuda.is_available() else []
    return {"version": library.__version__, "cuda_build": library.version.cuda, "gpus": gpus, "threads": library.get_num_threads()}


def main(words: list[str]) -> None:
    """Run the probe that the command line names and print what it found."""
    probes = {"providers": providers, "session": session, "torch": torch}
    try:
        found = probes[words[0]](*words[1:])
    except Exception as error:  # a probe: whatever goes wrong is the finding
        found = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
