"""What can this machine do with slmops, and what is in the way? The answer of `slmops doctor`.

Providers are believed only after a graph of one node ran on them, in a process of its own: a list of names says what a
wheel was compiled with, and `onnxruntime_genai.is_qnn_available()` is true on every machine.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slmops import compiling, environment, probe, targets
from slmops.bandwidth import measure_bandwidth
from slmops.errors import Unavailable

_LEAST_DISK_BYTES = 2 * 10**9
_LEAST_MEMORY_BYTES = 10**9
_OLDEST_PYTHON = (3, 11)
_SERVICE = "AzureExecutionProvider"

# What each side of the road needs at least.
_TO_RUN = ("numpy", "onnxruntime", "onnxruntime-genai", "tokenizers")
_TO_BUILD = ("accelerate", "datasets", "onnx", "onnx-ir", "peft", "torch", "transformers")
_OPTIONAL = {"bitsandbytes": "qlora", "olive-ai": "olive"}


@dataclass(frozen=True)
class Problem:
    """Something that is in the way, and what to do about it."""

    problem: str
    fix: str
    severity: str = "warning"
    """`error`: something will not work; `warning`: it may not."""


@dataclass(frozen=True)
class Package:
    """One library: what is installed and what slmops was tested with."""

    name: str
    installed: str | None
    tested: str
    status: str
    """`tested`, `other` or `missing`."""


@dataclass(frozen=True)
class Provider:
    """One execution provider that onnxruntime names: did a graph run on it?"""

    name: str
    works: bool
    detail: str
    stands_in: bool = False
    """It works without its device: the processor computes what that would."""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `slmops doctor` found."""

    machine: environment.Machine
    memory_available_bytes: int
    disk_free_bytes: int
    bandwidth_bytes_per_second: float | None
    packages: tuple[Package, ...]
    providers: tuple[Provider, ...]
    torch: dict[str, Any] | None
    compiler: str | None
    """Of C++: it makes the kernels of a training step."""
    targets: tuple[dict[str, Any], ...]
    telemetry: dict[str, bool]
    problems: tuple[Problem, ...]
    seconds: float

    def document(self) -> dict[str, Any]:
        """Return what `slmops doctor --json` prints."""
        document = asdict(self)
        document["telemetry"] = {"off": all(self.telemetry.values()), "variables": self.telemetry}
        warnings = [f"{item.problem}: {item.fix}" for item in self.problems]
        return {"command": "doctor", "ok": True, "warnings": warnings, **document}


def doctor() -> Diagnosis:
    """Examine this machine: libraries, providers, processor, memory, disk. Takes a few seconds, and changes nothing."""
    started = time.perf_counter()
    bandwidth = _bandwidth()  # before the probes start: they would take part of it
    with ThreadPoolExecutor(2) as pool:
        torch, probed = pool.submit(probe.ask, "torch"), pool.submit(_providers)
        providers = probed.result()
        torch_facts = torch.result() if environment.version_of("torch") else None
        devices = tuple(probe.ask("openvino").get("devices", ())) if environment.version_of("openvino") else ()
    packages = tuple(_package(name, tested) for name, tested in environment.tested().items())
    free = shutil.disk_usage(Path.cwd()).free
    available = environment.memory_bytes()[1]
    telemetry = {name: os.environ.get(name) == value for name, value in environment.NO_TELEMETRY.items()}
    compiler, compiler_problems = _compiler()
    problems = (
        *_version_problems(packages),
        *_flavour_problems(),
        *_provider_problems(providers),
        *_torch_problems(torch_facts),
        *compiler_problems,
        *_machine_problems(available, free, telemetry),
    )
    return Diagnosis(
        machine=environment.machine(),
        memory_available_bytes=available,
        disk_free_bytes=free,
        bandwidth_bytes_per_second=bandwidth,
        packages=packages,
        providers=providers,
        torch=torch_facts,
        compiler=compiler,
        targets=tuple(_ability(target, providers, devices) for target in targets.TARGETS),
        telemetry=telemetry,
        problems=problems,
        seconds=round(time.perf_counter() - started, 3),
    )


def _bandwidth() -> float | None:
    try:
        return measure_bandwidth()
    except Unavailable:
        return None


def _package(name: str, tested: str) -> Package:
    installed = _any_flavour(name)
    if installed is None:
        return Package(name, None, tested, "missing")
    # "2.13.0+cpu" is a build of 2.13.0.
    return Package(name, installed, tested, "tested" if installed.split("+")[0] == tested else "other")


def _any_flavour(name: str) -> str | None:
    """Return the installed version of a distribution, or of another flavour of it, such as the one for CUDA."""
    flavours = next((names for names in environment.FLAVOURS.values() if name in names), (name,))
    return next((version for flavour in (name, *flavours) if (version := environment.version_of(flavour))), None)


def _version_problems(packages: tuple[Package, ...]) -> list[Problem]:
    status = {package.name: package.status for package in packages}
    problems = []
    if absent := [name for name in _TO_RUN if status[name] == "missing"]:
        problems.append(Problem(f"packages cannot be run here: {', '.join(absent)} missing", "pip install 'slmops[runtime]'", "error"))
    absent = [name for name in _TO_BUILD if status[name] == "missing"]
    if environment.builds_openvino() and "datasets" in absent:  # right so: it cannot live beside optimum-intel
        absent.remove("datasets")
    if absent and len(absent) < len(_TO_BUILD):  # none at all is a device, and right so
        problems.append(Problem(f"training and export lack {', '.join(absent)}", "pip install 'slmops[train]'"))
    if other := [package for package in packages if package.status == "other"]:
        named = ", ".join(f"{package.name} {package.installed} (tested: {package.tested})" for package in other)
        fix = f"pip install {' '.join(f'{package.name}=={package.tested}' for package in other)}"
        problems.append(Problem(f"not the versions that slmops was tested with: {named}", fix))
    return problems


def _flavour_problems() -> list[Problem]:
    return [
        Problem(
            f"{' and '.join(present)} overwrite each other: both install the same package",
            f"pip uninstall -y {' '.join(present)}, then pip install the one you need",
            "error",
        )
        for present in environment.clashing_flavours()
    ]


def _providers() -> tuple[Provider, ...]:
    if not _any_flavour("onnxruntime"):
        return ()
    listed = probe.ask("providers")
    if "error" in listed:
        return (Provider("onnxruntime", False, f"cannot be imported: {listed['error']}"),)
    with ThreadPoolExecutor(2) as pool:
        return tuple(pool.map(_provider, listed["providers"]))


def _provider(name: str) -> Provider:
    answer = probe.ask("session", name)
    if name == _SERVICE and "error" in answer:
        return Provider(name, False, "hands whole models to a service; it is no device")
    if "error" in answer:  # "[ONNXRuntimeError] : 1 : FAIL : why" -> "why"
        return Provider(name, False, answer["error"].rpartition(" : ")[2])
    stands_in = bool(answer.get("stands_in"))
    return Provider(name, True, "ran a graph of one node" + (": the processor stands in for its device" if stands_in else ""), stands_in)


def _provider_problems(providers: tuple[Provider, ...]) -> list[Problem]:
    problems = []
    for provider in providers:
        if not provider.works and provider.name != _SERVICE:
            fix = "install its driver and libraries on a machine with its device, or use --device cpu"
            severity = "error" if provider.name in ("onnxruntime", "CPUExecutionProvider") else "warning"
            problems.append(Problem(f"{provider.name} is installed and does not work: {provider.detail}", fix, severity))
    return problems


def _torch_problems(torch: dict[str, Any] | None) -> list[Problem]:
    if torch and "error" in torch:
        return [Problem(f"torch cannot be imported: {torch['error']}", "pip install --force-reinstall torch", "error")]
    return []


def _compiler() -> tuple[str | None, list[Problem]]:
    """Return the C++ compiler, and what its absence means for what this machine does."""
    try:
        return compiling.compiler()[0], []
    except compiling.NotCompiled as error:
        costs = {
            "torch": "a fine-tune takes up to half as long again",
            "onnxruntime-genai": "an adapter costs a third more of a package's decoding speed",
        }
        felt = [cost for library, cost in costs.items() if environment.version_of(library) is not None]
        return None, [Problem(str(error), f"or leave it: {', '.join(felt)}")] if felt and sys.platform == "linux" else []


def _machine_problems(available: int, free: int, telemetry: dict[str, bool]) -> list[Problem]:
    machine, problems = environment.machine(), []
    if sys.version_info[:2] < _OLDEST_PYTHON:
        problems.append(Problem(f"Python {machine.python} is too old", "use Python 3.11 or newer", "error"))
    if 0 < available < _LEAST_MEMORY_BYTES:
        problems.append(Problem(f"only {available / 1e9:.1f} GB of memory are free", "close other programs, or use a smaller model"))
    if free < _LEAST_DISK_BYTES:
        problems.append(Problem(f"only {free / 1e9:.1f} GB of disk are free here", "free some space, or write elsewhere with -o"))
    if machine.features and "avx2" not in machine.features and "asimddp" not in machine.features:
        problems.append(
            Problem("the processor has neither AVX2 nor dot products: int4 and int8 will be slow", "use another machine for speed")
        )
    if off := [name for name, value in telemetry.items() if not value]:
        problems.append(
            Problem(f"telemetry of a dependency is not switched off: {', '.join(off)}", f"export {' '.join(f'{n}=1' for n in off)}")
        )
    return problems


def _ability(target: targets.Target, providers: tuple[Provider, ...], openvino: tuple[str, ...]) -> dict[str, Any]:
    """Return what this machine can do with a target: build it, run it.

    Args:
        target: of the table.
        providers: of onnxruntime.
        openvino: the devices that OpenVINO finds.
    """
    if target.road == "openvino":
        executes = target.device.upper() in openvino and environment.version_of(target.runtime_package) is not None
        return {**target.document(), "builds_here": not environment.missing_for_openvino(), "executes_here": executes}
    built = all(_any_flavour(name) for name in (*_TO_BUILD, "onnxruntime-genai"))
    working = next((provider for provider in providers if provider.works and provider.name == target.ort_provider), None)
    if target.road == "qnn":  # its provider is the compiler too
        built = built and working is not None
    executes = working is not None and not working.stands_in and environment.version_of(target.runtime_package) is not None
    return {**target.document(), "builds_here": built, "executes_here": executes}
