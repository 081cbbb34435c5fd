"""Which device, execution provider and precision can a model be exported for, and how far has each been checked?

A target is "executed" where slmops has run such an export on that provider, "compiled" where the provider's compiler
took it without the device, and "built" where only the graph was written. Nothing is claimed beyond what was executed.

The tables follow onnxruntime-genai 0.18's model builder; a test compares them with the builder's source. It has no FP16 for
WebGPU in its list of valid pairs, and writes a graph for it that runs there. Graphs for a GPU are the builder's own for that
provider (operators and types differ), quantized by slmops with the weights' type for scales: the rounding that was measured
on the CPU is the same, and a model is quantized once, not by a quantizer for every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from slmops.errors import Unavailable

Level = Literal["built", "compiled", "executed"]
Road = Literal["genai", "genai-gpu", "qnn", "openvino"]
"""genai: a graph that onnxruntime-genai runs on the CPU; genai-gpu: one for a GPU; qnn: compiled for a Qualcomm NPU; openvino: IR that openvino-genai runs."""


@dataclass(frozen=True)
class Target:
    """One device, provider and precision that an export can be made for."""

    device: str
    provider: str
    precision: str
    road: Road
    """Which writer of `slmops.exporting` makes it, and which Runner runs it."""
    ort_provider: str
    """What onnxruntime calls the provider."""
    runtime_package: str
    """Distribution that runs the export."""
    extra: str
    """Extra of slmops that brings it; empty where none does."""
    level: Level
    """How far this target was taken by slmops's own tests."""
    recipe: str
    """How weights are stored, in one line."""
    lacks: str
    """What the target cannot do, in one line; empty where nothing is known to lack."""
    check: str
    """How it was checked, in one line, and where."""
    runtime_adapters: bool = False
    """A package of it takes adapters at run time; where it does not, they are merged first."""
    builder_provider: str = ""
    """Roads genai and genai-gpu: what the model builder calls the provider."""
    builder_precision: str = ""
    """Roads genai and genai-gpu: what the model builder calls the precision of the graph that it writes; slmops quantizes it."""
    config_name: str = ""
    """Roads genai and genai-gpu: what `genai_config.json` calls the provider; empty for the CPU, which it does not name."""

    @property
    def float_type(self) -> str:
        """ONNX's name of the type of activations, cache and float weights."""
        return {"fp16": "FLOAT16", "bf16": "BFLOAT16"}.get(self.builder_precision, "FLOAT")

    @property
    def name(self) -> str:
        """Say the target in a few words, as messages do."""
        return f"{self.device} {self.precision}" if self.provider == self.device else f"{self.device} {self.provider} {self.precision}"

    def document(self) -> dict[str, str | bool]:
        """Return the JSON form."""
        return {
            "device": self.device,
            "provider": self.provider,
            "precision": self.precision,
            "level": self.level,
            "road": self.road,
            "recipe": self.recipe,
            "runtime_package": self.runtime_package,
            "extra": self.extra,
            "runtime_adapters": self.runtime_adapters,
            "lacks": self.lacks,
            "check": self.check,
        }


def _cpu(precision: str, recipe: str, check: str) -> Target:
    return Target(
        device="cpu",
        provider="cpu",
        precision=precision,
        road="genai",
        ort_provider="CPUExecutionProvider",
        runtime_package="onnxruntime-genai",
        extra="runtime",
        level="executed",
        recipe=recipe,
        lacks="",
        check=check,
        runtime_adapters=True,
        builder_provider="cpu",
        builder_precision="fp32",
    )


def _gpu(provider: str, precision: str, recipe: str, **changes: Any) -> Target:
    details: dict[str, Any] = {
        "device": "gpu",
        "provider": provider,
        "precision": precision,
        "road": "genai-gpu",
        "level": "built",
        "recipe": recipe,
        "lacks": "runtime adapters (merged first)",
        "check": _NOT_EXECUTED,
        "builder_provider": provider,
        "builder_precision": "bf16" if precision == "bf16" else "fp16",
        **_GPU_RUNTIMES[provider],
    }
    details["lacks"] += changes.pop("lacks", "")
    return Target(**(details | changes))


def _qnn(precision: str, recipe: str) -> Target:
    return Target(
        device="npu",
        provider="qnn",
        precision=precision,
        road="qnn",
        ort_provider="QNNExecutionProvider",
        runtime_package="onnxruntime-qnn",
        extra="qnn",
        level="compiled",
        recipe=recipe,
        lacks="runtime adapters (merged first), dynamic shapes",
        check="compiled for the chip; the compiled files computed by the plugin's x86-64 stand-in for the NPU, within the bars of `slmops verify`; no NPU",
    )


# slmops.graph.ir_building: what each is, and what it cost.
_IR_RECIPES = {
    ("cpu", "int8"): "8 bits, a scale and a zero point a row",
    ("cpu", "int4"): "4 bits in groups that divide the model, query, key, value, embedding and head in 8",
    ("npu", "int8"): "8 bits, a scale a row",
    ("npu", "int4"): "4 bits in groups of 128 or with a scale a row, no zero points; embedding and head in 8",
}


def _openvino(device: str, precision: str, level: Level, lacks: str, check: str) -> Target:
    return Target(
        device=device,
        provider="openvino",
        precision=precision,
        road="openvino",
        ort_provider="OpenVINOExecutionProvider",
        runtime_package="openvino-genai",
        extra="openvino",
        level=level,
        recipe=f"IR: {_IR_RECIPES.get(('npu' if device == 'npu' else 'cpu', precision), precision)}",
        lacks=lacks,
        check=check,
    )


_NOT_EXECUTED = (
    "operators, types and config against tables of the provider's kernels; numerics by a float twin on the CPU; not executed on a GPU"
)
_WEBGPU_EXECUTED = "executed and verified on a software GPU (Mesa 25.0 lavapipe), on no other; without one, as the others are"
_GPU_RUNTIMES = {
    "cuda": {"ort_provider": "CUDAExecutionProvider", "runtime_package": "onnxruntime-genai-cuda", "extra": "cuda", "config_name": "cuda"},
    "webgpu": {
        "ort_provider": "WebGpuExecutionProvider",
        "runtime_package": "onnxruntime-ep-webgpu",
        "extra": "webgpu",
        "config_name": "webgpu",
    },
    "dml": {"ort_provider": "DmlExecutionProvider", "runtime_package": "onnxruntime-genai-directml", "extra": "", "config_name": "dml"},
    "trt-rtx": {
        "ort_provider": "NvTensorRTRTXExecutionProvider",
        "runtime_package": "onnxruntime-ep-nv-tensorrt-rtx",
        "extra": "",
        "config_name": "NvTensorRtRtx",
    },
}
_INT8 = "8 bits in blocks of 64 with zero points, by least squares, float16 scales"
_INT4 = "4 bits in blocks of 32 to 128, query, key and value in 8, by least squares, float16 scales"
_WITHIN_BARS = "KL and task metric against PyTorch within the bars of `slmops verify`, on this CPU"

_MERGED = "runtime adapters (merged first)"
_IR_READ = "matrices read back and compared with the recipe; compiling takes the driver of an Intel"

# The first target of a device has its usual provider.
TARGETS = (
    _cpu("fp32", "float", "logits equal PyTorch's to 2e-4 and answers are the same, on this CPU"),
    _cpu("int8", "8 bits in blocks of 64 with zero points, by least squares", _WITHIN_BARS),
    _cpu("int4", "4 bits in blocks of 32 to 256, query, key and value in 8, by least squares", _WITHIN_BARS),
    _gpu("cuda", "fp16", "float16"),
    _gpu("cuda", "bf16", "bfloat16, logits in float32"),
    _gpu("cuda", "int8", _INT8),
    _gpu("cuda", "int4", _INT4),
    _gpu("webgpu", "fp16", "float16", level="executed", check=_WEBGPU_EXECUTED),
    _gpu("webgpu", "int8", _INT8, level="executed", check=_WEBGPU_EXECUTED),
    _gpu("webgpu", "int4", _INT4, level="executed", check=_WEBGPU_EXECUTED),
    _gpu("dml", "fp16", "float16", lacks="; Windows only"),
    _gpu("dml", "int4", f"{_INT4}, an even number of them a row; embedding in float16", lacks="; Windows only"),
    _gpu("trt-rtx", "fp16", "float16"),
    _gpu("trt-rtx", "bf16", "bfloat16, logits in float32"),
    _qnn("int4", "4 bits in blocks of 32 to 256, query, key and value in 8, by least squares; 16-bit floats between"),
    _qnn("int8", "8 bits in blocks of 64 with zero points, by least squares; 16-bit floats between"),
    _qnn("fp16", "16-bit floats (the graph is in 32 bits, the NPU computes in 16)"),
    *(_openvino("cpu", precision, "executed", _MERGED, _WITHIN_BARS) for precision in ("fp32", "fp16", "int8", "int4")),
    *(_openvino("gpu", precision, "built", _MERGED, f"{_IR_READ} GPU") for precision in ("fp16", "int8", "int4")),
    *(_openvino("npu", precision, "built", f"{_MERGED}, dynamic shapes", f"{_IR_READ} NPU") for precision in ("int8", "int4")),
)

_BY_SIZE = ("int8", "int4", "fp16", "bf16", "fp32")
# What the builder writes without complaint and the runtime then refuses: worse than an error at once.
_IMPOSSIBLE = {
    ("cpu", "fp16"): "the graph builds and then fails at run time: onnxruntime has no fp16 kernels for it on a CPU",
    ("cpu", "bf16"): "the graph builds and then fails at run time: onnxruntime has no bf16 kernels for it on a CPU",
    (
        "cuda",
        "fp32",
    ): "onnxruntime's attention for grouped queries has no fp32 kernel on CUDA, and the builder leaves the cache without a producer",
    ("dml", "fp32"): "the model builder has no graph for it",
    ("dml", "bf16"): "DirectML has no bf16 kernels",
    ("dml", "int8"): "the model builder has no graph for it",
    ("webgpu", "fp32"): "the model builder has no graph for it",
    ("webgpu", "bf16"): "WebGPU has no bf16",
    ("trt-rtx", "fp32"): "the model builder has no graph for it",
    ("trt-rtx", "int8"): "the model builder has no graph for it",
    ("trt-rtx", "int4"): "the model builder has no graph for it",
}

# Hugging Face `architectures[0]` -> class of the model builder, for text-only causal language models.
ARCHITECTURES = {
    "Ernie4_5ForCausalLM": "ErnieModel",
    "Gemma2ForCausalLM": "Gemma2Model",
    "Gemma3ForCausalLM": "Gemma3Model",
    "GemmaForCausalLM": "GemmaModel",
    "GptOssForCausalLM": "GPTOSSModel",
    "GraniteForCausalLM": "GraniteModel",
    "GraniteMoeHybridForCausalLM": "GraniteMoEHybridModel",
    "HunYuanDenseV1ForCausalLM": "HunyuanDenseV1Model",
    "LlamaForCausalLM": "LlamaModel",
    "MistralForCausalLM": "MistralModel",
    "NemotronForCausalLM": "NemotronModel",
    "Phi3ForCausalLM": "Phi3MiniModel",
    "PhiForCausalLM": "PhiModel",
    "Qwen2ForCausalLM": "QwenModel",
    "Qwen3ForCausalLM": "Qwen3Model",
    "SmolLM3ForCausalLM": "SmolLM3Model",
}

_MORE_THAN_TEXT = "it takes images or sound as well as text, and slmops exports text-only models"
_OWN_CODE = "transformers loads it only with code that comes with the model, and slmops runs none"
_STATES = "its layers keep states of convolutions beside keys and values, which neither verify nor batches can carry on"
# What the builder knows and slmops does not take, with the reason.
REFUSED_ARCHITECTURES = {
    "ChatGLMForConditionalGeneration": _OWN_CODE,
    "ChatGLMModel": _OWN_CODE,
    "Gemma3ForConditionalGeneration": _MORE_THAN_TEXT,
    "Gemma4ForConditionalGeneration": _MORE_THAN_TEXT,
    "Gemma4UnifiedForConditionalGeneration": _MORE_THAN_TEXT,
    "InternLM2ForCausalLM": _OWN_CODE,
    "Lfm2AudioForConditionalGeneration": _MORE_THAN_TEXT,
    "Lfm2ForCausalLM": _STATES,
    "Lfm2MoeForCausalLM": _STATES,
    "Lfm2VlForConditionalGeneration": _MORE_THAN_TEXT,
    "Mistral3ForConditionalGeneration": _MORE_THAN_TEXT,
    "Phi3SmallForCausalLM": _OWN_CODE,
    "Phi3VForCausalLM": _MORE_THAN_TEXT,
    "Phi4MMForCausalLM": _MORE_THAN_TEXT,
    "OlmoForCausalLM": "the model builder writes a graph that computes something else (NMSE 0.05 against PyTorch, seen on a tiny model)",
    "PhiMoEForCausalLM": "the model builder makes it for CUDA only",
    "Qwen2_5_VLForConditionalGeneration": _MORE_THAN_TEXT,
    "Qwen3VLForConditionalGeneration": _MORE_THAN_TEXT,
    "Qwen3_5ForConditionalGeneration": _MORE_THAN_TEXT,
    "Qwen3_5MoeForConditionalGeneration": _MORE_THAN_TEXT,
    "VideoChatFlashQwenForCausalLM": _MORE_THAN_TEXT,
    "WhisperForConditionalGeneration": "it is a speech recognizer, not a causal language model",
}


def find(device: str = "cpu", provider: str | None = None, precision: str = "int4") -> Target:
    """Return the target of a device, provider (None: the device's usual one) and precision.

    Raises:
        Unavailable: there is none; the message says what is missing and the hint names the nearest that works.
    """
    of_device = [target for target in TARGETS if target.device == device]
    if not of_device:
        known = _listed({target.device for target in TARGETS})
        raise Unavailable(f"this slmops has no target for device {device!r} (it has: {known})", _nearest(TARGETS, precision))
    chosen = provider or of_device[0].provider
    of_provider = [target for target in of_device if chosen in (target.provider, target.ort_provider)]
    if not of_provider:
        names = sorted({target.provider for target in of_device})
        close = get_close_matches(str(provider), names, n=1)
        guess = f"; did you mean {close[0]}?" if close else ""
        raise Unavailable(
            f"this slmops has no provider {provider!r} for device {device} (it has: {_listed(names)}{guess})",
            _nearest(of_device, precision),
        )
    exact = [target for target in of_provider if target.precision == precision]
    if not exact:
        found = of_provider[0]
        why = _IMPOSSIBLE.get((found.provider, precision), "slmops has no such target")
        place = device if found.provider == device else f"{device} with {found.provider}"
        raise Unavailable(f"precision {precision} does not run on {place}: {why}", _nearest(of_provider, precision))
    return exact[0]


def builder_class(architecture: str) -> str:
    """Return the model builder's class for a Hugging Face architecture (`architectures[0]` of config.json).

    Raises:
        Unavailable: the builder has none, or slmops does not take it.
    """
    if architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture]
    reason = REFUSED_ARCHITECTURES.get(architecture, "onnxruntime-genai's model builder does not know it")
    close = get_close_matches(architecture, ARCHITECTURES, n=1, cutoff=0.85)
    guess = f"did you mean {close[0]}? " if close else ""
    families = "Llama, Mistral, Qwen2, Qwen3, Phi3, Gemma, SmolLM3, Granite and others"
    if architecture.endswith("ForConditionalGeneration"):
        left = "slmops trains, evaluates and exports decoders of text only, so nothing is left to do with this one"
    elif REFUSED_ARCHITECTURES.get(architecture) == _OWN_CODE:
        left = "nothing else works for this one either"
    else:  # what transformers knows as a causal language model
        left = "this one still fine-tunes, merges and evaluates in PyTorch"
    raise Unavailable(
        f"architecture {architecture} cannot be exported: {reason}", f"{guess}choose a base model of another family ({families}); {left}"
    )


def _nearest(targets: tuple[Target, ...] | list[Target], precision: str) -> str:
    same = [target for target in targets if target.precision == precision]
    chosen = (same or list(targets))[0]
    # Of that one's device and provider; whoever asked for 16 bits cares for size: the smaller ones first.
    precisions = [t.precision for t in targets if (t.device, t.provider) == (chosen.device, chosen.provider) and (t in same or not same)]
    precisions.sort(key=lambda name: _BY_SIZE.index(name) if name in _BY_SIZE else 9)
    usual = next(t for t in TARGETS if t.device == chosen.device)
    provider = "" if chosen.provider == usual.provider else f" --provider {chosen.provider}"
    return f"use --device {chosen.device}{provider} --precision {_listed(precisions, 'or')}"


def _listed(names: set[str] | list[str], word: str = "and") -> str:
    ordered = sorted(names) if isinstance(names, set) else names
    return ordered[0] if len(ordered) == 1 else f"{', '.join(ordered[:-1])} {word} {ordered[-1]}"
