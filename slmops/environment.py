"""What is this machine, and are the libraries here the ones that slmops was tested with?

Also the one place that switches the libraries' telemetry off, before any of them is imported.
"""

from __future__ import annotations

import gc
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from slmops.errors import RunFailed, Unavailable

# The set of versions that resolves and works together (constraints.txt pins the same; a test holds them equal).
TESTED = {
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.2",
    "click": "8.5.1",
    "datasets": "5.2.0",
    "numpy": "2.4.6",
    "olive-ai": "0.13.0",
    "onnx": "1.23.2",
    "onnx-ir": "1.1.0",
    "onnxruntime": "1.31.1",
    "onnxruntime-genai": "0.18.0",
    "peft": "0.21.2",
    "pydantic": "2.14.3",
    "tokenizers": "0.23.3",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
}

# What an environment of the extra `openvino` has in their place (constraints-openvino.txt pins the same; a test holds them equal).
TESTED_WITH_OPENVINO = {
    "nncf": "3.4.0",
    "openvino": "2026.4.1",
    "openvino-genai": "2026.4.1.0",
    "optimum-intel": "2.2.0",
    "tokenizers": "0.22.2",
    "transformers": "5.5.4",
}

# Import name -> (distribution, extra of slmops that brings it).
PROVIDED_BY = {
    "accelerate": ("accelerate", "train"),
    "bitsandbytes": ("bitsandbytes", "qlora"),
    "datasets": ("datasets", "train"),
    "jinja2": ("jinja2", "runtime"),
    "matplotlib": ("matplotlib", "train"),
    "mlflow": ("mlflow-skinny", "mlflow"),
    "numpy": ("numpy", "runtime"),
    "olive": ("olive-ai", "olive"),
    "ml_dtypes": ("ml-dtypes", "train"),
    "onnx": ("onnx", "train"),
    "onnx_ir": ("onnx-ir", "train"),
    "onnxruntime": ("onnxruntime", "runtime"),
    "nncf": ("nncf", "openvino"),
    "onnxruntime_ep_webgpu": ("onnxruntime-ep-webgpu", "webgpu"),
    "onnxruntime_genai": ("onnxruntime-genai", "runtime"),
    "onnxruntime_qnn": ("onnxruntime-qnn", "qnn"),
    "openvino": ("openvino", "openvino"),
    "openvino_genai": ("openvino-genai", "openvino"),
    "openvino_tokenizers": ("openvino-tokenizers", "openvino"),
    "optimum": ("optimum-intel", "openvino"),
    "peft": ("peft", "train"),
    "psutil": ("psutil", "runtime"),
    "pyarrow": ("pyarrow", "train"),
    "safetensors": ("safetensors", "train"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "tokenizers": ("tokenizers", "runtime"),
    "torch": ("torch", "train"),
    "transformers": ("transformers", "train"),
    "trl": ("trl", "preference"),
    "wandb": ("wandb", "wandb"),
}

# Distributions that put different files into the same package: the last one installed wins, without a word.
FLAVOURS = {
    "onnxruntime": (
        "onnxruntime",
        "onnxruntime-gpu",
        "onnxruntime-directml",
        "onnxruntime-openvino",
        "onnxruntime-rocm",
        "onnxruntime-silicon",
    ),
    "onnxruntime_genai": ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml", "onnxruntime-genai-winml"),
}

# Every variable that a dependency reads to send nothing (STACK: olive, onnxruntime >= 1.29, genai, huggingface_hub).
NO_TELEMETRY = {
    "OLIVE_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "1",
    "WANDB_ERROR_REPORTING": "false",
    # Olive sends a device id before it looks at its own variable, unless it takes the machine for a CI one (0.13, telemetry.py:476). Of
    # the variables by which it does, this is the one that no other Python library here reads.
    "SYSTEM_TEAMFOUNDATIONCOLLECTIONURI": "none",
}
# A package that does nothing but send, on `import openvino` and for want of a file that says no; it knows no variable for that.
# openvino and nncf have a stub of their own for where it is not installed (openvino 2026.4, `tools/ovc/telemetry_utils.py`).
NO_IMPORT = ("openvino_telemetry",)


def disable_telemetry() -> None:
    """Switch the telemetry of every dependency off for this process and its children."""
    os.environ.update(NO_TELEMETRY)
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]  None: to be taken for not installed
    for name in NO_IMPORT:
        modules.setdefault(name, None)


def collect_seldom() -> None:
    """Let the garbage collector of this process look at every 50,000th new object, not every 700th.

    Importing PyTorch and transformers makes more than a million objects that stay. To look at them again and again takes 0.7 s,
    a tenth of a short command; what is freed in time, tensors above all, is freed by counting references. For programs, not for a library.
    """
    gc.set_threshold(50_000, 10, 10)


def require(module: str, purpose: str) -> ModuleType:
    """Import a library, or say which extra brings it.

    Args:
        module: import name, such as "onnxruntime_genai".
        purpose: what needs it, for the message: "to run a package".

    Raises:
        Unavailable: it is not installed (exit 3; the hint is the pip line).
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0]
        distribution, extra = PROVIDED_BY.get(missing, (missing, "train"))
        raise Unavailable(f"{distribution} is not installed; it is needed {purpose}", how_to_install(extra)) from error


def how_to_install(extra: str) -> str:
    """Return the pip line of an extra, and where it cannot go into this environment, that."""
    line = f"pip install 'slmops[{extra}]'"
    if extra == "openvino":
        return f"{line} in an environment of its own: it wants older libraries than training"
    if extra == "train" and builds_openvino():
        return f"{line} in another environment: this is one of slmops[openvino], which wants older libraries"
    return line


@cache
def version_of(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    from importlib import metadata  # 25 ms of start-up that --help does not need

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def clashing_flavours() -> list[tuple[str, ...]]:
    """Return the distributions that are installed over one another: two or more flavours of the same package."""
    found = [tuple(name for name in names if version_of(name)) for names in FLAVOURS.values()]
    return [present for present in found if len(present) > 1]


def missing_for_openvino() -> list[str]:
    """Return what is not installed of what builds OpenVINO exports; to import them would take seconds."""
    needed = ("optimum-intel", "nncf", "openvino", "openvino-genai", "openvino-tokenizers", "torch", "transformers")
    return [name for name in needed if version_of(name) is None]


def builds_openvino() -> bool:
    """Tell whether this environment is one that makes exports for OpenVINO, which cannot be one that trains."""
    return version_of("optimum-intel") is not None


def tested() -> dict[str, str]:
    """Return the set of versions that an environment like this was tested with."""
    return TESTED | TESTED_WITH_OPENVINO if builds_openvino() else TESTED


@dataclass(frozen=True)
class Machine:
    """The facts of this machine that figures depend on."""

    processor: str
    cores: int
    memory_bytes: int
    features: tuple[str, ...]
    system: str
    python: str


# What the kernels of onnxruntime and torch choose their code paths by.
_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
    "bf16",
)


@cache
def machine() -> Machine:
    """Read the facts of this machine."""
    name, flags = platform.processor() or platform.machine(), set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    return Machine(
        processor=name,
        cores=usable_cores(),
        memory_bytes=memory_bytes()[0],
        features=tuple(feature for feature in _FEATURES if feature in flags),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
    )


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Matrices of a model below this run no faster on two threads than on one: to wake and wait for the other costs as much as
# it saves, and where other programs use the cores a thread that waits spins (20 times the processor time, measured).
_ONE_THREAD_BYTES = 64 << 20


# Of mallopt(3): blocks from the first size on are mapped one by one (32 MB is the most that glibc takes); the heap shrinks beyond the second.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _KEPT_BLOCK_BYTES = -3, -1, 32 << 20


def threads_for(weights_bytes: int) -> int:
    """Return how many threads to run a model of that size with: one for a tiny model, else all cores that may be used."""
    return 1 if weights_bytes < _ONE_THREAD_BYTES else usable_cores()


def memory_bytes() -> tuple[int, int]:
    """Return (total, available) memory in bytes; (0, 0) where it cannot be read."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return 0, 0
    rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    total, available = (int(rows[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    return total, available


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    import resource

    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts from what the parent had when it started this process
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_bytes() -> int:
    """Return the most GPU memory that torch has held in this process so far; 0 without a GPU."""
    torch = require("torch", "to train")
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def keep_freed_memory() -> None:
    """Let this process keep memory that it frees, for the tensors of the next step, where the C library is glibc.

    By default glibc gives large blocks back to the system at once, and takes them again page by page: 2 to 10 % of a
    training step, for 1 % more memory at the peak.
    """
    import ctypes

    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library, such as musl
        return
    for parameter, value in ((_M_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES), (_M_TRIM_THRESHOLD, 2**31 - 1)):
        mallopt(parameter, value)


def process_index() -> int:
    """Return which of a launcher's processes this is (`accelerate launch`, torchrun); the first, 0, speaks for all."""
    return int(os.environ.get("RANK", "0"))


def own_gpu() -> str:
    """Return where a process of a launcher's puts a model on a machine with GPUs: its own one, or, alone, wherever there is room."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "auto"


def need_disk(folder: Path, size_bytes: int, what: str) -> None:
    """Raise RunFailed before work begins when `size_bytes` will not fit where `folder` is to be."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size_bytes:
        raise RunFailed(
            f"{what} needs about {size_bytes / 1e9:.2f} GB on disk at {place}, and {free / 1e9:.2f} GB are free",
            "free some space or write elsewhere with -o",
        )


def snapshot() -> dict[str, object]:
    """Return what a manifest records of the environment: machine facts and library versions."""
    packages = {name: version for name in TESTED | TESTED_WITH_OPENVINO if (version := version_of(name))}
    return {"machine": asdict(machine()), "packages": packages}
