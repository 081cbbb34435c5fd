"""Which faults does `slmops verify` have to find? Each is planted in a copy of a good package, and the copy sealed anew.

A sealed copy passes the first stage, `files`, as a package would whose maker made the mistake: its hashes are right and
its content is wrong. Used by `benchmarks/fault_table.py` and `tests/test_faults.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import slmops
from slmops import artifact, cli

GRAPH_FILES = ("model.onnx", "model_full.onnx", "model.onnx.data")
# One block size that the rules do not choose for stories3m's layers, and that divides all of them (192, 512).
OTHER_BLOCK_SIZE = 16


@dataclass(frozen=True)
class Road:
    """Where the steps of one good road lie: neighbours in one folder, so that a copy finds its lineage."""

    base: Path
    adapter: Path
    merged: Path
    package: Path
    precision: str

    @property
    def place(self) -> Path:
        """The folder that holds the package, and where copies go."""
        return self.package.parent


@dataclass(frozen=True)
class Fault:
    """One mistake that somebody may make, or a device may meet."""

    name: str
    stages: tuple[str, ...]
    """Where it is sensible to find it."""
    plant: Callable[[Road, Path], None]
    """Change a copy of the package."""
    sealed: bool = True
    quantized_only: bool = False


@dataclass(frozen=True)
class Outcome:
    """What `slmops verify --json` said of a package."""

    exit_code: int
    failed_stage: str | None
    explanation: str
    document: dict[str, Any]

    def stage(self, name: str) -> dict[str, Any]:
        """Return one stage's document."""
        return next(stage for stage in self.document["stages"] if stage["name"] == name)


def make_road(place: Path, model: Path, rows: Path, precision: str, **training: Any) -> Road:
    """Fine-tune, merge and export; steps that lie in `place` already are taken as they are.

    Args:
        place: folder for all of it.
        model: base model.
        rows: training data.
        precision: of the package.
        training: settings of `slmops.finetune`.
    """
    adapter, merged, package = place / "adapter", place / "merged", place / precision
    if not adapter.exists():
        slmops.finetune(model, rows, out=adapter, **training)
    if not merged.exists():
        slmops.merge(adapter, out=merged)
    if not package.exists():
        slmops.export(merged, out=package, precision=precision)
    return Road(model, adapter, merged, package, precision)


def planted(road: Road, fault: Fault) -> Path:
    """Return a copy of the package with the fault in it."""
    copy = road.place / f"{road.precision}-faulty"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(road.package, copy)
    fault.plant(road, copy)
    if fault.sealed:
        artifact.seal(copy)
    return copy


def outcome(package: Path, data: Path | None, *flags: str) -> Outcome:
    """Run `slmops verify PACKAGE --data DATA --json` at default bars, in this process; without data on the validation rows."""
    stdout = io.StringIO()
    code: Any = None
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.main(["verify", str(package), *(["--data", str(data)] if data else []), "--json", *flags])
        except SystemExit as end:
            code = end.code
    document = json.loads(stdout.getvalue())
    stage = document.get("failed_stage")
    explanation = next((s["explanation"] for s in document.get("stages", []) if s["name"] == stage), "")
    return Outcome(code or 0, stage, explanation or document.get("error", {}).get("message", ""), document)


def faults(precision: str) -> Iterator[Fault]:
    """Yield the faults that a package of this precision can have."""
    yield from (fault for fault in FAULTS if precision != "fp32" or not fault.quantized_only)


def _take_graph(road: Road, copy: Path, model: Path, **settings: Any) -> None:
    """Put another model's graph into the package; manifest, tokenizer and genai_config stay."""
    out = road.place / "other"
    slmops.export(model, out=out, precision=road.precision, force=True, **settings)
    for name in GRAPH_FILES:
        shutil.copyfile(out / name, copy / name)


def _merge_changed(road: Road, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """Merge the adapter with its config and tensors changed in place by `change`; return the model."""
    from safetensors.torch import load_file, save_file

    adapter, merged = road.place / "changed-adapter", road.place / "changed-merged"
    shutil.rmtree(adapter, ignore_errors=True)
    shutil.copytree(road.adapter, adapter)
    config, tensors = json.loads((adapter / "adapter_config.json").read_text()), load_file(adapter / "adapter_model.safetensors")
    change(config, tensors)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, adapter / "adapter_model.safetensors")
    artifact.seal(adapter)
    slmops.merge(adapter, out=merged, force=True)
    return merged


def _base_passed_off(road: Road, copy: Path) -> None:
    _take_graph(road, copy, road.base)


def _scaled_adapter(road: Road, copy: Path) -> None:
    def scale(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        config["lora_alpha"] *= 1.5

    _take_graph(road, copy, _merge_changed(road, scale))


def _dropped(part: str) -> Callable[[Road, Path], None]:
    """Leave the adapter out of every linear layer whose name holds `part`."""

    def plant(road: Road, copy: Path) -> None:
        def drop(config: dict[str, Any], tensors: dict[str, Any]) -> None:
            chosen = [name for name in tensors if part in name and "lora_B" in name]
            if not chosen:
                raise ValueError(f"the adapter has no tensor of {part}")
            for name in chosen:
                tensors[name] = tensors[name] * 0

        _take_graph(road, copy, _merge_changed(road, drop))

    return plant


def _other_block_size(road: Road, copy: Path) -> None:
    _take_graph(road, copy, road.merged, block_size=OTHER_BLOCK_SIZE)


def _flipped_byte(road: Road, copy: Path) -> None:
    path = copy / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _other_tokenizer(road: Road, copy: Path) -> None:
    """Swap the ids of two frequent tokens, as a tokenizer that was trained anew would."""
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = "▁the", "▁to"
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _other_template(road: Road, copy: Path) -> None:
    interface = dict(artifact.load(copy).manifest.interface or {})
    interface["prompt_template"] = interface["prompt_template"].replace("\n", " ")
    artifact.seal(copy, interface=interface)


def _stop_token(*, runtime: bool, manifest: bool) -> Callable[[Road, Path], None]:
    """Set another stop token in genai_config.json, in the manifest, or in both."""

    def plant(road: Road, copy: Path) -> None:
        interface = dict(artifact.load(copy).manifest.interface or {})
        wrong = interface["stop_token_ids"][0] + 1
        if runtime:
            config = json.loads((copy / "genai_config.json").read_text())
            config["model"]["eos_token_id"] = wrong
            (copy / "genai_config.json").write_text(json.dumps(config))
        if manifest:
            artifact.seal(copy, interface=interface | {"stop_token_ids": [wrong]})

    return plant


FAULTS = (
    Fault("the base passed off as the fine-tune", ("logits",), _base_passed_off),
    Fault("one flipped bit in the weights, not resealed", ("files",), _flipped_byte, sealed=False),
    Fault("another tokenizer (two tokens swapped)", ("tokenizer",), _other_tokenizer),
    Fault("a changed prompt template", ("template",), _other_template),
    Fault("the wrong stop token in genai_config.json", ("stop_tokens",), _stop_token(runtime=True, manifest=False)),
    Fault("the wrong stop token in the manifest", ("stop_tokens",), _stop_token(runtime=False, manifest=True)),
    Fault("the wrong stop token in both", ("stop_tokens",), _stop_token(runtime=True, manifest=True)),
    Fault("an adapter scaled by 1.5 before merging", ("logits", "text", "retention"), _scaled_adapter),
    Fault("another block size than the manifest says", ("graph",), _other_block_size, quantized_only=True),
    Fault("LoRA dropped from one decoder layer", ("logits", "text", "retention"), _dropped(".layers.2.")),
    Fault("LoRA dropped from one matrix", ("logits", "text", "retention"), _dropped(".layers.2.mlp.down_proj.")),
)
