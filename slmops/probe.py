"""Does one thing of this machine work? Run as a process: `python -m slmops.probe session CPUExecutionProvider`.

Each probe may end its own process without harm. It prints one line of JSON: facts, or `error`.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_SECONDS = 60
# Providers that come as a library beside onnxruntime -> the module that says where it lies (`get_library_path`).
PLUGINS = {
    "NvTensorRTRTXExecutionProvider": "onnxruntime_ep_nv_tensorrt_rtx",
    "QNNExecutionProvider": "onnxruntime_qnn",
    "WebGpuExecutionProvider": "onnxruntime_ep_webgpu",
}

# Qualcomm's plugin calls its provider what it is registered as, and makes none without its backend named.
OPTIONS = {"QNNExecutionProvider": {"backend_type": "htp"}}

# An ONNX graph of one node, y = x + x over one float (IR 8, opset 17). A device has no onnx library to make it with;
# a test makes it anew and compares.
ONE_NODE = base64.b64decode("CAgSADo1Cg4KAXgKAXgSAXkiA0FkZBIBZ1oPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEBE=")


def providers() -> dict[str, Any]:
    """Return the names of the execution providers that the installed onnxruntime was compiled with, and of plugins beside it."""
    import onnxruntime

    names = [*onnxruntime.get_available_providers(), *(name for name in PLUGINS if plugin_installed(name))]
    return {"providers": names, "version": onnxruntime.__version__}


def ask(*words: str) -> dict[str, Any]:
    """Ask a probe in a process of its own: a provider without its libraries may end the process that tries it."""
    command = [sys.executable, "-P", "-m", "slmops.probe", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {_SECONDS} s"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()
        return {"error": f"the process ended with code {done.returncode}{': ' + last[-1][:200] if last else ''}"}


def plugin_installed(provider: str) -> bool:
    """Tell whether the library of a provider that is a plugin is installed."""
    return provider in PLUGINS and find_spec(PLUGINS[provider]) is not None


def add_plugin(options: Any, provider: str) -> bool:
    """Let a session run on a provider that is a plugin; False where it is none.

    Raises:
        ModuleNotFoundError: the plugin is not installed.
        RuntimeError: it finds no device.
    """
    if provider not in PLUGINS:
        return False
    devices = devices_of(provider)
    if not devices:
        raise RuntimeError("its plugin is installed and finds no device: there is none, or no driver for it")
    options.add_provider_for_devices(devices[:1], OPTIONS.get(provider, {}))
    return True


def devices_of(provider: str) -> list[Any]:
    """Return the devices of a provider that is a plugin; an NPU is first, a processor that stands in for it last.

    Raises:
        ModuleNotFoundError: the plugin is not installed.
    """
    import onnxruntime

    _register(provider)
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider]
    return sorted(found, key=lambda device: ("NPU", "GPU", "CPU").index(kind_of(device)))


def kind_of(device: Any) -> str:
    """Return what a plugin's device is: NPU, GPU, or CPU, which computes what the real one would."""
    return str(device.device.type).rpartition(".")[2]


@cache
def _register(provider: str) -> None:
    import onnxruntime

    plugin = import_module(PLUGINS[provider])
    name = provider if provider in OPTIONS else plugin.__name__
    onnxruntime.register_execution_provider_library(name, plugin.get_library_path())


def session(provider: str) -> dict[str, Any]:
    """Run the one-node graph on a provider, and nowhere else."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if provider != "CPUExecutionProvider":
        # Without it, a node that the provider does not take runs on the CPU, and the provider seems to work.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if provider in PLUGINS:
        if not plugin_installed(provider):
            return {"error": f"{PLUGINS[provider].replace('_', '-')} is not installed"}
        add_plugin(options, provider)
        ready = onnxruntime.InferenceSession(ONE_NODE, options, enable_fallback=0)
    elif provider not in onnxruntime.get_available_providers():
        return {"error": f"the installed onnxruntime has no {provider}"}
    else:
        ready = onnxruntime.InferenceSession(ONE_NODE, options, providers=[provider], enable_fallback=0)
    if ready.get_providers()[0] != provider:
        return {"error": f"onnxruntime fell back to {ready.get_providers()[0]}"}
    answer = float(np.asarray(ready.run(None, {"x": np.ones(1, np.float32)})[0])[0])
    if answer != 2.0:
        return {"error": f"1 + 1 gave {answer}"}
    return {"answer": answer, "stands_in": provider in PLUGINS and kind_of(devices_of(provider)[0]) == "CPU"}


def torch() -> dict[str, Any]:
    """Return which build of torch is here and which GPUs it sees."""
    import torch as library

    gpus = [library.cuda.get_device_name(index) for index in range(library.cuda.device_count())] if library.cuda.is_available() else []
    return {"version": library.__version__, "cuda_build": library.version.cuda, "gpus": gpus, "threads": library.get_num_threads()}


def openvino() -> dict[str, Any]:
    """Return the devices that OpenVINO has a driver for."""
    library = import_module("openvino")  # of an extra that this environment may not have
    return {"devices": sorted({name.split(".")[0] for name in library.Core().available_devices})}


def main(words: list[str]) -> None:
    """Run the probe that the command line names and print what it found."""
    probes = {"providers": providers, "session": session, "torch": torch, "openvino": openvino}
    try:
        found = probes[words[0]](*words[1:])
    except Exception as error:  # a probe: whatever goes wrong is the finding
        found = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
