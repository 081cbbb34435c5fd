"""The pass `SlmopsExport`: what `slmops export` does, as a step of an Olive workflow."""

from __future__ import annotations

from typing import Any

from slmops.config import ExportSettings
from slmops.exporting import export
from slmops.olive_passes.handover import handler_of, model_folder, told_to_olive
from slmops.olive_passes.parameters import given, parameters, place
from slmops.olive_passes.target_pass import TargetPass

# What a search tries unless the workflow names the values.
_SEARCHED: dict[str, list[Any]] = {"precision": ["int4", "int8"], "block_size": [32, 64]}


class SlmopsExport(TargetPass):
    """Export a Hugging Face model for the workflow's target: HfModel -> ONNXModel (of several graphs, a CompositeModel)."""

    verb = ExportSettings

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:
        return parameters(ExportSettings, searched=_SEARCHED)

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        with told_to_olive():
            wish = {**given(config, parameters(ExportSettings)), **place(self.accelerator_spec)}
            return handler_of(export(model_folder(model), out=output_model_path, force=True, **wish))
