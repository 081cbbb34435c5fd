"""The road of OpenVINO: an IR by optimum-intel, weights by nncf with a recipe that fits, read back, checked and run.

On a machine without the device only the IR is made, and the level is "built": compiling for a GPU or an NPU takes its driver.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from slmops import artifact, environment
from slmops.artifact import Draft
from slmops.config import ExportSettings
from slmops.data import Interface, Tokenizer
from slmops.data.tokenizer_files import copy_tokenizer
from slmops.errors import RunFailed
from slmops.exporting.record import eos_token_id, export_facts
from slmops.graph import ir
from slmops.graph.ir_building import build_ir, ir_recipe, require_libraries
from slmops.graph.shapes import Shape
from slmops.runtime import hugging_face
from slmops.runtime.engines import model_bytes
from slmops.runtime.openvino_folder import differing_texts
from slmops.runtime.openvino_runner import OpenvinoRunner
from slmops.targets import Level, Target
from slmops.verification.texts import PROBES

_TOKENIZER_IRS = ("openvino_tokenizer", "openvino_detokenizer")


def require(settings: ExportSettings) -> None:
    """Raise Unavailable for what this road lacks here."""
    require_libraries()


def write(draft: Draft, source: Path, interface: Interface, target: Target, settings: ExportSettings, shape: Shape) -> None:
    """Write an export, and run it where its device is here: see `slmops.exporting.exporting`.

    Raises:
        InvalidInput: a group size that does not divide.
        RunFailed: optimum-intel or nncf failed, or the IR is not the one asked for.
    """
    shapes = hugging_face.parameter_shapes(source)
    recipe = ir_recipe(target.precision, target.device, shapes, settings.block_size)
    why = build_ir(source, draft.folder, recipe=recipe, device=target.device.upper(), context_tokens=interface.max_length_tokens)
    copy_tokenizer(source, draft.folder)
    shutil.copyfile(source / "config.json", draft.folder / "config.json")  # openvino-genai and optimum-intel read it
    _write_generation_config(draft.folder, interface)
    problems = ir.problems(ir.matrices(ir.read_ir(draft.folder / ir.MODEL)), recipe.document()["options"], shapes)
    if problems:
        raise RunFailed(f"the IR is not the one asked for: {'; '.join(problems[:3])}", "report the model's architecture and this message")
    _keep_true_tokenizer(draft, why)
    draft.add_input("baseline", source)
    draft.interface = interface.model_dump(mode="json")
    level = _run_once(draft, interface)
    draft.facts = export_facts(target, recipe.document(), source, interface, model_bytes(draft.folder), level)


def _write_generation_config(folder: Path, interface: Interface) -> None:
    """Write what openvino-genai reads: stop tokens, the longest sequence, greedy."""
    content = {"eos_token_id": eos_token_id(interface.stop_token_ids), "max_length": interface.max_length_tokens, "do_sample": False}
    if interface.bos_token_id is not None:
        content["bos_token_id"] = interface.bos_token_id
    artifact.write_json(folder / "generation_config.json", content)


def _keep_true_tokenizer(draft: Draft, why: str) -> None:
    """Leave out an IR of the tokenizer that makes other tokens: slmops never reads it, and a host would be led astray."""
    if not why:
        tokenizer = Tokenizer.load(draft.folder)
        differing = differing_texts(draft.folder, tokenizer, PROBES)
        why = f"{len(differing)} of {len(PROBES)} texts become other tokens, such as {differing[0][:40]!r}" if differing else ""
    if why:
        for path in _files_of(draft.folder, _TOKENIZER_IRS):
            path.unlink()
        draft.warn(f"no tokenizer as an IR: {why}; a host gives token ids, or uses tokenizer.json")


def _files_of(folder: Path, names: Iterable[str]) -> list[Path]:
    return [path for name in names for path in folder.glob(f"{name}.*")]


def _run_once(draft: Draft, interface: Interface) -> Level:
    """Generate a few tokens where the device is here; return the level that was reached."""
    runner = OpenvinoRunner(draft.folder, threads=environment.usable_cores())
    try:
        if not runner.is_here:
            draft.warn(f"built, not compiled: this machine has no {runner.device} that OpenVINO finds, and compiling takes its driver")
            return "built"
        runner.time([interface.bos_token_id or 0, 1, 2], new_tokens=2)
        return "executed"
    finally:
        runner.close()
