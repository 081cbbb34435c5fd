"""Which execution provider does a package ask for, is it here, and what would bring it?

A name in onnxruntime's list says what a wheel was compiled with. A provider is here when a graph of one node ran on it:
without the driver or a device, onnxruntime's Python falls back to the CPU with a printed line, and everything seems to work.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from slmops import environment, probe, targets
from slmops.errors import Unavailable

_INSTALL = {
    "cuda": "in an environment of its own: pip install 'slmops[cuda]', on a machine with an NVIDIA GPU",
    "dml": "on Windows, in an environment of its own: pip install onnxruntime-genai-directml",
    "webgpu": "pip install 'slmops[webgpu]', on a machine with a GPU (on Linux, with a Vulkan driver)",
    "trt-rtx": "pip install onnxruntime-ep-nv-tensorrt-rtx, on a machine with an NVIDIA RTX GPU",
}


def provider_of(config: dict[str, Any]) -> targets.Target | None:
    """Return a target of the provider that a `genai_config.json` names (its precision is any); None for the CPU.

    Raises:
        Unavailable: slmops does not know the provider.
    """
    options = config["model"]["decoder"].get("session_options", {}).get("provider_options") or []
    names = [name for option in options for name in option]
    if not names or names == ["cpu"]:
        return None
    found = next((target for target in targets.TARGETS if target.config_name == names[0]), None)
    if found is None:
        raise Unavailable(f"the package is for the provider {names[0]}, which slmops does not run", "export it again with slmops")
    return found


@cache
def absence(ort_provider: str) -> str | None:
    """Say why a provider cannot run anything here, in one line; None where it can."""
    if clash := environment.clashing_flavours():
        return f"{' and '.join(clash[0])} are both installed and overwrite each other"
    answer = probe.ask("session", ort_provider)
    return answer.get("error")


def require_provider(target: targets.Target, folder: object) -> None:
    """Raise Unavailable where the provider that a package was made for cannot run it here."""
    reason = absence(target.ort_provider)
    if reason is None:
        return
    clash = environment.clashing_flavours()
    fix = f"pip uninstall -y {' '.join(clash[0])}, then install the one you need" if clash else _INSTALL[target.provider]
    raise Unavailable(
        f"{folder} is made for {target.provider}, which is not here: {reason}",
        f"{fix}; `slmops verify` checks the package here by a float twin on the CPU",
    )


def open_session(path: str, options: Any, target: targets.Target | None) -> Any:
    """Return onnxruntime's session of a graph, on the provider that was asked for and no other.

    Raises:
        Unavailable: onnxruntime fell back to another provider.
        Exception: of the binding's own classes, where the graph cannot be loaded.
    """
    ort = environment.require("onnxruntime", "to run a package")
    if target is None:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    if probe.add_plugin(options, target.ort_provider):
        session = ort.InferenceSession(path, options, enable_fallback=0)
    else:
        session = ort.InferenceSession(path, options, providers=[target.ort_provider, "CPUExecutionProvider"], enable_fallback=0)
    if session.get_providers()[0] != target.ort_provider:
        raise Unavailable(f"onnxruntime ran {path} on {session.get_providers()[0]}, not on {target.provider}", _INSTALL[target.provider])
    return session


def load_problem(path: Path) -> str | None:
    """Say what onnxruntime finds wrong with a graph's operators, attributes, types or shapes; None where it finds nothing.

    It infers all of them when it loads a graph, before it looks for kernels: that the CPU has none is no fault of the graph's.
    """
    ort = environment.require("onnxruntime", "to check a graph")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding's own classes derive from Exception alone
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        if type(error).__name__ != "NotImplemented":
            said = " ".join(str(error).split()).rpartition("failed:")[2]
            # The node comes first and the reason last, with every name of its inputs between them.
            return f"{path.name}: {said if len(said) < 240 else f'{said[:90]} ... {said[-140:]}'}"
    return None


def register_with_genai(target: targets.Target | None) -> None:
    """Let onnxruntime-genai find the plugin of a provider."""
    if target is None or target.ort_provider not in probe.PLUGINS:
        return
    og = environment.require("onnxruntime_genai", "to run a package")
    _register(og, target.ort_provider)


@cache
def _register(og: Any, ort_provider: str) -> None:
    plugin = environment.require(probe.PLUGINS[ort_provider], "to run a package")
    og.register_execution_provider_library(plugin.__name__, plugin.get_library_path())
