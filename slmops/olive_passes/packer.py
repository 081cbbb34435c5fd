"""The pass `SlmopsPack`: what `slmops pack` does, as a step of an Olive workflow."""

from __future__ import annotations

from typing import Any

from olive.passes.pass_config import PassConfigParam

from slmops.config import PackSettings
from slmops.errors import InvalidInput
from slmops.olive_passes.handover import base_folder, handler_of, told_to_olive
from slmops.olive_passes.parameters import given, parameters, place
from slmops.olive_passes.target_pass import TargetPass
from slmops.packing import pack

_OWN = ("adapter", "remove")


class SlmopsPack(TargetPass):
    """Put adapters on one quantized base, switched at run time: HfModel -> ONNXModel."""

    verb = PackSettings
    own = ("adapters", "adapter_name")

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:
        return {
            "adapters": PassConfigParam(type_=dict[str, str], default_value=None, description="name and PEFT folder of each adapter"),
            "adapter_name": PassConfigParam(
                type_=str,
                default_value=None,
                description="name of the adapter that the model brings: an earlier pass's, or its adapter_path",
            ),
            **parameters(PackSettings, without=_OWN, searched={"precision": ["int4", "int8"]}),
        }

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        with told_to_olive():
            adapters = _adapters(model, config)
            own = given(config, parameters(PackSettings, without=_OWN))
            wish = {**own, **place(self.accelerator_spec), "adapter": [f"{name}={path}" for name, path in adapters.items()]}
            return handler_of(pack(base_folder(model), out=output_model_path, force=True, **wish))


def _adapters(model: Any, config: Any) -> dict[str, str]:
    """Return the adapters by name: those of the workflow, and the one that the model brings.

    Raises:
        InvalidInput: none at all, or one that has no name.
    """
    adapters, name = dict(config.adapters or {}), given(config, ["adapter_name"])["adapter_name"]
    if bool(model.adapter_path) != bool(name):
        lacks = (
            "adapter_name is missing: the model brings an adapter"
            if model.adapter_path
            else "adapter_name is given, and the model brings no adapter"
        )
        raise InvalidInput(f"SlmopsPack: {lacks}", "name it where there is one, and only there")
    if name in adapters:
        raise InvalidInput(f"SlmopsPack: the name {name} is given twice", "give each adapter a name of its own")
    if model.adapter_path:
        adapters[name] = str(model.adapter_path)
    if not adapters:
        raise InvalidInput("SlmopsPack: there is no adapter to pack", 'give `adapters`: {"NAME": "FOLDER"}, or use SlmopsExport')
    return adapters
