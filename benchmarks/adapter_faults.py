"""Print which faults of packed adapters `slmops verify` finds: `python benchmarks/adapter_faults.py PACKAGE --adapter NAME`.

PACKAGE was made by `slmops pack` and has two adapters or more. Each fault is planted in a copy, or in the host that runs it, the copy sealed
anew and verified at default bars. A Markdown table; exit code 1 when a fault went unnoticed. Used by
`tests/test_adapter_faults.py` too.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from faults import Outcome, outcome

from slmops import artifact
from slmops.graph.lora import A, B
from slmops.runtime import adapter_files, genai_runner
from slmops.runtime.adapter_files import Tensors

HEADER = "| precision | fault | failed stage | exit | what verify says |\n| --- | --- | --- | --- | --- |"


@dataclass(frozen=True)
class Fault:
    """One mistake in an adapter's file, in its lineage, or in the program that runs the package."""

    name: str
    says: str
    """What verify has to say of it."""
    change: Callable[[Tensors], Tensors] | None = None
    """Of the adapter's file."""
    plant: Callable[[Path, str], None] | None = None
    """Of the copied package; its second argument is the adapter."""
    host: Callable[[str], AbstractContextManager[None]] | None = None
    """Of the runtime's use; its argument is another adapter of the package."""


def main() -> int:
    """Plant, verify, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("package", type=Path)
    parser.add_argument("--adapter", required=True, help="the one to damage")
    parser.add_argument("--data", type=Path, default=None, help="its held-out rows (default: its validation rows)")
    given = parser.parse_args()
    print(HEADER)
    missed = 0
    with TemporaryDirectory(prefix="slmops-faults-", dir=given.package.resolve().parent) as scratch:
        for fault in (None, *FAULTS):
            found = found_in(given.package, given.adapter, fault, Path(scratch) / "package", given.data)
            missed += (found.exit_code != 0) if fault is None else not is_found(found, fault, given.adapter)
            print(line(given.package, fault.name if fault else "none", found), flush=True)
    return 1 if missed else 0


def found_in(package: Path, adapter: str, fault: Fault | None, copy: Path, data: Path | None = None, *flags: str) -> Outcome:
    """Plant a fault in a copy of a package and verify it."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(package, copy)
    _keep_lineage(package, copy)
    facts = artifact.load(copy).manifest.facts
    if fault is not None and fault.change is not None:
        file = copy / facts["adapters"][adapter]["file"]
        adapter_files.write_adapter(file, fault.change(adapter_files.read_adapter(file)))
        artifact.seal(copy)
    if fault is not None and fault.plant is not None:
        fault.plant(copy, adapter)
    other = next(name for name in facts["adapters"] if name != adapter)
    with fault.host(other) if fault is not None and fault.host is not None else nullcontext():
        rows = ["--data", f"{adapter}={data}"] if data else []
        return outcome_of(copy, "--adapter", adapter, *rows, *flags)


def outcome_of(package: Path, *flags: str) -> Outcome:
    """Run `slmops verify PACKAGE FLAGS --json` in this process."""
    return outcome(package, None, *flags)


def is_found(found: Outcome, fault: Fault, adapter: str) -> bool:
    """Tell whether verify failed where it should, and named the adapter and the fault."""
    return found.exit_code == 5 and found.failed_stage == "adapters" and adapter in found.explanation and fault.says in found.explanation


def line(package: Path, name: str, found: Outcome) -> str:
    """Return one row of the table."""
    precision = artifact.load(package).manifest.facts["precision"]
    explanation = found.explanation.replace("|", "\\|").replace("\n", "\\n")
    return f"| {precision} | {name} | {found.failed_stage or '-'} | {found.exit_code} | {explanation[:170]} |"


def _scaled(factor: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value * np.float32(factor) if name.endswith(B) else value for name, value in tensors.items()}


def _transposed(tensors: Tensors) -> Tensors:
    """Take A for B and B for A wherever the shapes let it pass: square layers."""
    square = [
        name.removesuffix(A)
        for name, value in tensors.items()
        if name.endswith(A) and value.shape == tensors[name.removesuffix(A) + B].shape
    ]
    swapped = {layer + A: tensors[layer + B] for layer in square} | {layer + B: tensors[layer + A] for layer in square}
    if not swapped:
        raise ValueError("the adapter adapts no square layer")
    return tensors | swapped


def _transposed_shapes(tensors: Tensors) -> Tensors:
    return {name: np.ascontiguousarray(value.T) for name, value in tensors.items()}


def _half(tensors: Tensors) -> Tensors:
    layers = sorted({name.removesuffix(A).removesuffix(B) for name in tensors})[::2]
    return {name: value for name, value in tensors.items() if name.removesuffix(A).removesuffix(B) in layers}


def _without_b(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if name.endswith(A)}


def _wrong_names(tensors: Tensors) -> Tensors:
    return {f"base_model.model.{name}": value for name, value in tensors.items()}


def _rounded(tensors: Tensors) -> Tensors:
    """Round every tensor to 8 bits, as a quantizer that also takes the adapter would."""
    steps = {name: np.abs(value).max() / 127 or 1 for name, value in tensors.items()}
    return {name: (np.rint(value / steps[name]) * steps[name]).astype(np.float32) for name, value in tensors.items()}


def _other_base(copy: Path, adapter: str) -> None:
    """Let the lineage say that the adapter was trained on another base: what a copied `adapters` folder would say."""
    source = artifact.load(copy).find(f"adapter {adapter}")
    assert source is not None
    place = copy.parent / f"{adapter}-of-another-base"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)
    manifest = artifact.load(source).manifest
    inputs = [item.model_copy(update={"sha256": "0" * 64}) if item.role == "base" else item for item in manifest.inputs]
    artifact.seal(place, inputs=inputs)
    _point_at(copy, adapter, place)


def _dora(copy: Path, adapter: str) -> None:
    """Let the adapter be a DoRA of which somebody exported the pairs alone."""
    source = artifact.load(copy).find(f"adapter {adapter}")
    assert source is not None
    place = copy.parent / f"{adapter}-dora"
    shutil.rmtree(place, ignore_errors=True)
    _as_dora(source, place)
    _point_at(copy, adapter, place)


def _as_dora(source: Path, place: Path) -> None:
    """Write a LoRA folder as the DoRA (Liu et al. 2024, arXiv 2402.09353) whose magnitudes learned to be a tenth larger."""
    import torch
    from peft import LoraConfig, PeftModel
    from safetensors.torch import load_file, save_file

    from slmops.runtime import hugging_face

    details = hugging_face.read_adapter_config(source)
    base = hugging_face.find_base(source, artifact.find(source), details)
    shutil.copytree(source, place)
    (place / artifact.MANIFEST).unlink(missing_ok=True)
    adapted: Any = PeftModel.from_pretrained(hugging_face.load_model(base), source)
    tensors = load_file(place / "adapter_model.safetensors")
    for name, module in adapted.named_modules():
        if "default" in getattr(module, "lora_A", {}):
            weight = (
                module.base_layer.weight + module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
            )
            tensors[f"{name}.lora_magnitude_vector"] = 1.1 * torch.linalg.norm(weight.detach(), dim=1)
    save_file(tensors, place / "adapter_model.safetensors")
    config = LoraConfig(
        **{key: details[key] for key in ("r", "lora_alpha", "target_modules", "task_type", "base_model_name_or_path")}, use_dora=True
    )
    config.inference_mode = True
    config.save_pretrained(place)


def _point_at(copy: Path, adapter: str, place: Path) -> None:
    manifest = artifact.load(copy).manifest
    role = f"adapter {adapter}"
    artifact.seal(copy, inputs=[artifact.input_of(copy, role, place) if item.role == role else item for item in manifest.inputs])


def _keep_lineage(package: Path, copy: Path) -> None:
    """Paths of inputs are relative to the package: make those of the copy point where the package's do."""
    manifest = artifact.load(package).manifest
    places = {item.role: artifact.load(package).find(item.role) for item in manifest.inputs}
    inputs = [artifact.input_of(copy, role, place) for role, place in places.items() if place is not None]
    artifact.seal(copy, inputs=inputs)


@contextmanager
def _set_after_the_prompt(other: str) -> Iterator[None]:
    """A host that turns the adapter on when the prompt is in: accepted by the runtime, and the cache holds the base's values."""

    class Late:
        def __init__(self, generator: Any, adapter: Any, model: Any) -> None:
            self.generator, self.adapter, self.model = generator, adapter, model

        def append_tokens(self, ids: Any) -> None:
            self.generator.append_tokens(ids)
            self.adapter.activate(self.generator, self.model)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.generator, name)

    def late(runner: Any, options: dict[str, Any]) -> Any:
        adapter, runner._adapter = runner._adapter, None
        try:
            generator = own(runner, options)
        finally:
            runner._adapter = adapter
        return generator if adapter is None else Late(generator, adapter, runner._model)

    own = genai_runner.GenaiRunner._generator
    genai_runner.GenaiRunner._generator = late
    try:
        yield
    finally:
        genai_runner.GenaiRunner._generator = own


@contextmanager
def _two_at_once(other: str) -> Iterator[None]:
    """A host that sets a second adapter on the same generator: the last one silently wins."""

    def twice(runner: Any, options: dict[str, Any]) -> Any:
        generator = own(runner, options)
        if runner._adapter is not None:
            type(runner._adapter)(runner._adapter.library, {other: 1.0}).activate(generator, runner._model)
        return generator

    own = genai_runner.GenaiRunner._generator
    genai_runner.GenaiRunner._generator = twice
    try:
        yield
    finally:
        genai_runner.GenaiRunner._generator = own


FAULTS = (
    Fault("all zero", "zero", change=_scaled(0.0)),
    Fault("scaled by 0.5", "scaled by 0.5", change=_scaled(0.5)),
    Fault("scaled by 1.5", "scaled by 1.5", change=_scaled(1.5)),
    Fault("scaled by 2", "scaled by 2", change=_scaled(2.0)),
    Fault("A and B swapped in square layers", "tensors", change=_transposed),
    Fault("every pair transposed", "is shaped", change=_transposed_shapes),
    Fault("half of the pairs", "not in the file", change=_half),
    Fault("A without B", "A without B", change=_without_b),
    Fault("names of another tool", "no input of the graph", change=_wrong_names),
    Fault("tensors rounded to 8 bits", "rounded", change=_rounded),
    Fault("adapter of another base", "trained on another base", plant=_other_base),
    Fault("DoRA exported as LoRA", "DoRA", plant=_dora),
    Fault("adapter set after the prompt", "the runtime does not apply the adapter", host=_set_after_the_prompt),
    Fault("two adapters set at once", "the runtime does not apply the adapter", host=_two_at_once),
)

if __name__ == "__main__":
    sys.exit(main())
