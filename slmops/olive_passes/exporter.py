"""The pass `SlmopsExport`: what `slmops export` does, as a step of an Olive workflow."""

from __future__ import annotations

from typing import Any

from olive.passes import Pass

from slmops import targets
from slmops.config import ExportSettings, load
from slmops.exporting import export
from slmops.olive_passes.handover import handler_of, model_folder, told_to_olive
from slmops.olive_passes.parameters import given, parameters, place

# What a search tries unless the workflow names the values.
_SEARCHED: dict[str, list[Any]] = {"precision": ["int4", "int8"], "block_size": [32, 64]}


class SlmopsExport(Pass):
    """Export a Hugging Face model for the workflow's target: HfModel -> ONNXModel (of several graphs, a CompositeModel)."""

    @staticmethod
    def is_accelerator_agnostic(accelerator_spec: Any) -> bool:
        """Tell Olive's cache that an export for one target is none for another."""
        return False

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:
        return parameters(ExportSettings, searched=_SEARCHED)

    @classmethod
    def foretell(cls, wanted: dict[str, Any], accelerator_spec: Any) -> None:
        """Raise the error of slmops that a run would end with, as far as it can be known before one.

        Args:
            wanted: the parameters in the workflow, of one candidate.
            accelerator_spec: the workflow's target.
        """
        settings = load(ExportSettings, wanted, **place(accelerator_spec))
        targets.find(settings.device, settings.provider, settings.precision)

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        with told_to_olive():
            wish = {**given(config, parameters(ExportSettings)), **place(self.accelerator_spec)}
            return handler_of(export(model_folder(model), out=output_model_path, force=True, **wish))
