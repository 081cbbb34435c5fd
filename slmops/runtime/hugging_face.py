"""How is a PyTorch model loaded: a model folder, or a base with an adapter on it? Safetensors only, never remote code."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops import artifact, environment
from slmops.artifact import Artifact
from slmops.errors import BadArtifact, Unavailable
from slmops.graph import carrying
from slmops.runtime import native

if TYPE_CHECKING:
    from torch import nn


def quiet_libraries() -> Any:
    """Import transformers without its own bars and advice; progress is ours to show."""
    transformers = environment.require("transformers", "to load a PyTorch model")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_model(folder: Path, *, precision: str = "fp32", nf4: bool = False, device: str | None = None) -> nn.Module:
    """Load a causal language model from its folder.

    Args:
        folder: Hugging Face folder with safetensors.
        precision: of the weights in memory: fp32 or bf16.
        nf4: hold the linear layers in nf4 with double quantization, as QLoRA does.
        device: for `nf4`: where bitsandbytes puts the layers; None: the GPU if there is one.

    Raises:
        Unavailable: torch, transformers or bitsandbytes is missing, or the architecture needs code of its own.
        BadArtifact: the weights do not fit the config.
    """
    torch = environment.require("torch", "to load a PyTorch model")
    transformers = quiet_libraries()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    extra: dict[str, Any] = {}
    if nf4:
        environment.require("bitsandbytes", "for weights in nf4 (qlora)")
        extra = {
            "quantization_config": nf4_config(dtype),
            "device_map": device or (environment.own_gpu() if torch.cuda.is_available() else "cpu"),
        }
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **extra
        )
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Unavailable(f"transformers cannot load {folder}: {reason}", "give a ...ForCausalLM model that transformers knows") from error
    except (RuntimeError, OSError, environment.require("safetensors", "to read weights").SafetensorError) as error:
        raise BadArtifact(
            f"{folder} cannot be loaded: {' '.join(str(error).split())[:200]}", "download or convert the model again"
        ) from error
    for module in model.modules() if nf4 else ():
        # In eval mode, on a CPU with AVX512-BF16, bitsandbytes 0.50 packs weights for a kernel that has no gradient, and leaves them
        # packed: after the first validation the adapters below a layer would learn from a part of their gradient, without a word.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    missing = sorted(report.get("missing_keys") or [])
    if missing:
        raise BadArtifact(f"{folder} lacks {len(missing)} weights, such as {missing[0]}", "download or convert the model again")
    return model


def parameter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of a Hugging Face folder, from the headers of its safetensors: no weight is read.

    Raises:
        BadArtifact: a file is damaged.
    """
    from slmops.graph.stored_weights import StoredWeights  # numpy, which not every command needs

    stored = StoredWeights(folder)
    return {name: stored.shape(name) for name in stored}


def parameter_count(folder: Path) -> int:
    """Return the number of weights of a Hugging Face folder."""
    return sum(math.prod(shape) for shape in parameter_shapes(folder).values())


def nf4_config(dtype: Any) -> Any:
    """Return the quantization that QLoRA trains on (Dettmers et al. 2023, arXiv 2305.14314: nf4, double quantization)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)


def read_adapter_config(folder: Path, *, scores: bool = False) -> dict[str, Any]:
    """Read `adapter_config.json` of a PEFT folder.

    Args:
        folder: of the adapter.
        scores: a reward model will do, which gives a score and no text.

    Raises:
        BadArtifact: no adapter there, one saved as a pickle, or a broken config.
        Unavailable: a reward model, where text is needed.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise BadArtifact(f"{folder} has no adapter_config.json: it is not a PEFT adapter", "give the folder that `slmops finetune` wrote")
    if not (folder / "adapter_model.safetensors").is_file():
        hint = "save it again as safetensors; slmops loads no pickle" if (folder / "adapter_model.bin").is_file() else "copy it again"
        raise BadArtifact(f"{folder} has no adapter_model.safetensors", hint)
    try:
        details = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BadArtifact(f"{path} is not JSON: {error}", "copy the adapter again") from None
    if details.get("task_type") == "SEQ_CLS" and not scores:
        raise Unavailable(
            f"{folder} is a reward model: it has a score in place of the vocabulary, so that it gives no text and no export carries it",
            f"slmops evaluate {folder} PAIRS tells how often it prefers the better answer",
        )
    return details


def find_base(folder: Path, found: Artifact | None, details: dict[str, Any], given: str | None = None) -> Path:
    """Return the base model's folder, once it is seen to be the one that the adapter was trained on.

    Args:
        folder: the adapter.
        found: its artefact; None for an adapter of somebody else's, whose base is not checked.
        details: its `adapter_config.json`.
        given: a folder to use in place of the recorded one.

    Raises:
        BadArtifact: it is nowhere, or its hash differs from the one recorded in training.
    """
    recorded = found.manifest.input("base") if found is not None else None
    place = Path(given) if given else (found.find("base") if found is not None else None)
    if place is None and details.get("base_model_name_or_path"):
        place = Path(details["base_model_name_or_path"])
    if place is None or not place.is_dir():
        raise BadArtifact(f"the base model of {folder} is not at {place or recorded and recorded.path}", "give its folder with --base")
    artifact.require_model(place)
    if recorded is not None and not recorded.matches(place):
        raise BadArtifact(
            f"{place} is not the base that {folder} was trained on: its hash differs", "give the right one with --base, or train again"
        )
    return place


def load_base_of(base: Path, adapter: Path, *, precision: str = "fp32", nf4: bool | None = None) -> Any:
    """Load the base of an adapter with the weights that it was trained on: the float ones, those of nf4, or an export's.

    Args:
        base: the base model's folder.
        adapter: the PEFT folder.
        precision: of the base in memory: fp32 or bf16.
        nf4: with the values of nf4, in float, as after qlora. None: as the adapter's manifest says.

    Raises:
        BadArtifact: it was trained on an export's quantized weights (`finetune --quantized-base`), which are gone or differ.
    """
    from slmops.runtime import quantized_base

    found = artifact.find(adapter)
    quantized = quantized_base.quantized_base_of(found, base) if found is not None else None
    if quantized is not None:
        return quantized_base.load_dequantized(base, quantized, precision=precision)
    by_manifest = found is not None and found.manifest.facts.get("method") == "qlora"
    held = nf4 if nf4 is not None else by_manifest
    model: Any = load_model(base, precision=precision, nf4=held, device="cpu" if held else None)
    return model.dequantize() if held else model


def load_adapted(base: Path, adapter: Path, *, precision: str = "fp32", nf4: bool | None = None) -> nn.Module:
    """Load base + adapter, unmerged; the base with the weights that the adapter was trained on (`load_base_of`).

    Args:
        base: the base model's folder.
        adapter: the PEFT folder.
        precision: of the base in memory: fp32 or bf16.
        nf4: the adapter was trained on a base in nf4 (qlora). None: as its manifest says.

    Raises:
        BadArtifact: a tensor of the adapter has no place in this base, or the wrong shape; or the quantized weights that it
            was trained on are gone.
    """
    return attach(load_base_of(base, adapter, precision=precision, nf4=nf4), adapter, base)


def attach(model: Any, adapter: Path, base: Path) -> nn.Module:
    """Put an adapter on a loaded base.

    Args:
        model: the base, in memory.
        adapter: the PEFT folder.
        base: where the base came from, for the messages.

    Raises:
        BadArtifact: a tensor of the adapter has no place in this base, or the wrong shape.
        Unavailable: it began as something that PEFT would not begin as again.
    """
    config = read_adapter_config(adapter)
    if native.is_own(config):
        return native.load_own(model, adapter, config, base)
    peft = environment.require("peft", "to load an adapter")
    carrying.refuse_unrepeatable(adapter, config)
    try:
        with warnings.catch_warnings():
            # PEFT looks for AdaLoRA's ranks, which it wrote itself, among names of layers (peft 0.21.2).
            warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
            adapted = peft.PeftModel.from_pretrained(model, adapter, is_trainable=False)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadArtifact(f"{adapter} does not fit {base}: {reason}", "give the base that it was trained on with --base") from error
    refuse_misfits(adapted, adapter)
    from slmops.runtime.prompts import prompted

    return prompted(adapted).eval()


def refuse_misfits(adapted: Any, adapter: Path, name: str = "default") -> None:
    """Raise BadArtifact where PEFT loaded tensors into nothing, or found none for a place: it says no word either way.

    What has no place has no effect, and a place without its tensors keeps an adapter of zero. `name` is the adapter's in the model.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as stored:
        names = set(stored.keys())
    places = set(get_peft_model_state_dict(adapted, adapter_name=name))
    lost, empty = sorted(names - places), sorted(places - names)
    if lost:
        raise BadArtifact(
            f"{adapter}: {len(lost)} tensors have no place in this base, such as {lost[0]}", "give the base that it was trained on"
        )
    if empty:
        raise BadArtifact(f"{adapter} lacks {len(empty)} of its tensors, such as {empty[0]}", "copy the adapter again, or train it again")
