"""How is Qualcomm's plugin of onnxruntime asked: is it here, on what does it run, and what does it make of a graph?

The plugin (distribution onnxruntime-qnn) is a library beside onnxruntime; it overwrites nothing. On a machine without a Hexagon
NPU its HTP backend for x86-64 compiles for any chip, and computes what the NPU would, in 16-bit floats, on the CPU: slowly (a
second a token for 3 M parameters), so it is a check of numbers and not of speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slmops import environment, probe
from slmops.errors import BadArtifact, RunFailed, Unavailable
from slmops.socs import Soc

PROVIDER = "QNNExecutionProvider"
# Of the graph's finalization: 3 searches longest for the fastest plan (onnxruntime, QNN Execution Provider, provider options).
_COMPILE = {"htp_graph_finalization_optimization_mode": "3"}
_LOGGED_ERRORS = 4  # fatal only: errors come as exceptions, and the plugin logs warnings of its own for every node


def installed() -> bool:
    """Tell whether the plugin is installed."""
    return find_spec("onnxruntime_qnn") is not None


@cache
def device() -> Any:
    """Return the plugin's device: the NPU where there is one, else the CPU that stands in for it.

    Raises:
        Unavailable: the plugin is not installed, or finds no device.
    """
    for library in ("onnxruntime", probe.PLUGINS[PROVIDER]):
        environment.require(library, "to compile for a Qualcomm NPU")
    try:
        found = probe.devices_of(PROVIDER)
    except Exception as error:  # the binding's own classes derive from Exception alone
        raise Unavailable(
            f"onnxruntime cannot load the QNN plugin: {_first_line(error)}", "pip install 'slmops[qnn]' anew: its version must fit"
        ) from error
    if not found:
        raise Unavailable("the QNN plugin is installed and finds no device here", "compile on x86-64 Linux or Windows, or on the device")
    return found[0]


def has_npu() -> bool:
    """Tell whether the plugin's device is an NPU."""
    return probe.kind_of(device()) == "NPU"


def place() -> str:
    """Say in words on what the plugin runs here."""
    version = environment.version_of("onnxruntime-qnn")
    if has_npu():
        return f"the Hexagon NPU of this machine, onnxruntime-qnn {version}"
    return f"no NPU: the HTP backend of onnxruntime-qnn {version} for x86-64 computes on this CPU what the NPU would"


def open_session(path: Path, soc: Soc, threads: int) -> Any:
    """Open a graph on the plugin: a compiled one as it is, a plain one by compiling it in memory.

    Raises:
        BadArtifact: the file is missing, damaged, or made by another version of the plugin.
        Unavailable: the plugin is not installed.
    """
    ort = environment.require("onnxruntime", "to run a package")
    if not path.is_file():
        raise BadArtifact(f"{path} is missing", "export the model again, or copy the folder again")
    return _opened(ort, path, _options(ort, soc, _COMPILE), threads)


def open_on_cpu(path: Path, threads: int) -> Any:
    """Open a plain graph on onnxruntime's CPU provider.

    Raises:
        BadArtifact: the file is missing or damaged.
    """
    ort = environment.require("onnxruntime", "to run a package")
    if not path.is_file():
        raise BadArtifact(f"{path} is missing", "export the model again, or copy the folder again")
    options = ort.SessionOptions()
    options.log_severity_level = _LOGGED_ERRORS
    return _opened(ort, path, options, threads)


def _opened(ort: Any, path: Path, options: Any, threads: int) -> Any:
    options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(str(path), options)
    except Exception as error:  # the binding's own classes derive from Exception alone
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise BadArtifact(
            f"onnxruntime cannot load {path}: {_first_line(error)}", "export the model again, or copy the folder again"
        ) from error


def compile_graphs(graphs: Mapping[Path, Path], soc: Soc, *, weights_once: bool) -> None:
    """Compile plain graphs ahead of time for a chip: each becomes a small graph of EPContext nodes beside a `*_qnn.bin`.

    Args:
        graphs: plain graph -> compiled graph to write, in one folder.
        soc: the chip.
        weights_once: one `*_qnn.bin` for all of them, in which a weight that they share stands once.

    Raises:
        Unavailable: the plugin is not installed, or the compiler does not take the chip or the graph.
    """
    ort = environment.require("onnxruntime", "to compile for a Qualcomm NPU")
    extra = _COMPILE | ({"enable_htp_weight_sharing": "1"} if weights_once else {})
    for number, (plain, compiled) in enumerate(graphs.items(), 1):
        options = _options(ort, soc, extra)
        if weights_once:
            options.add_session_config_entry("ep.share_ep_contexts", "1")
            if number == len(graphs):
                options.add_session_config_entry("ep.stop_share_ep_contexts", "1")
        try:
            ort.ModelCompiler(
                options,
                str(plain),
                embed_compiled_data_into_model=False,
                graph_optimization_level=ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
            ).compile_to_file(str(compiled))
        except Exception as error:  # the binding's own classes derive from Exception alone
            raise Unavailable(
                f"the QNN compiler does not take {plain.name} for {soc.name}: {_first_line(error)}",
                "export it for another --soc, or for --device cpu",
            ) from error
        if not compiled.is_file():
            raise RunFailed(f"the QNN compiler wrote no {compiled.name}", "export it for another --soc, or for --device cpu")


def _options(ort: Any, soc: Soc, extra: Mapping[str, str]) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = _LOGGED_ERRORS
    chosen = {**probe.OPTIONS[PROVIDER], "soc_model": str(soc.soc_model), "htp_arch": str(soc.htp_arch), **extra}
    options.add_provider_for_devices([device()], chosen)
    return options


def _first_line(error: Exception) -> str:
    return " ".join(str(error).splitlines()[0].split())[:300] if str(error) else type(error).__name__
