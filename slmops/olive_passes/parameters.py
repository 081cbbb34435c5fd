"""How do the settings of a verb become the parameters of an Olive pass, and how does the target come from the workflow?

The parameters are generated from the verb's settings model, so that a pass takes what the command takes. Device and
provider are not among them: a workflow says them once, in the system that is its `target`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slmops import targets
from slmops.config import Settings, fields
from slmops.errors import Unavailable

# Decided by the workflow: where Olive writes, and for what.
_DECIDED = ("out", "force", "device", "provider")


def parameters(model: type[Settings], *, without: tuple[str, ...] = (), searched: Mapping[str, list[Any]] | None = None) -> dict[str, Any]:
    """Return the `PassConfigParam` of each setting of a verb.

    Args:
        model: the verb's settings.
        without: settings that the pass has no use for.
        searched: values to try where the workflow has a search strategy and names none; only these settings can be searched.
    """
    from olive.passes.pass_config import PassConfigParam
    from olive.search.search_parameter import Categorical

    result = {}
    for name, info in fields(model):
        if name not in (*_DECIDED, *without):
            values = (searched or {}).get(name)
            result[name] = PassConfigParam(
                type_=info.annotation,  # pyright: ignore[reportArgumentType]
                default_value=info.default,
                search_defaults=Categorical(values) if values else None,
                description=info.description,
            )
    return result


def place(accelerator: Any) -> dict[str, str]:
    """Return `device` and `provider` of the accelerator that a workflow aims at (`olive.hardware.AcceleratorSpec`).

    Raises:
        Unavailable: slmops exports for no such provider.
    """
    device, named = str(accelerator.accelerator_type).lower(), accelerator.execution_provider
    if named is None:
        return {"device": device}
    known = {target.ort_provider: target.provider for target in targets.TARGETS}
    if str(named) not in known:
        raise Unavailable(f"slmops exports nothing for {named}", f"name one of {', '.join(known)} in the workflow's target")
    return {"device": device, "provider": known[str(named)]}


def given(config: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return the parameters that a pass runs with.

    Olive 0.13 makes an absolute path of any text that names a file or folder here (cache.py:314): of precision "int4" too, where
    there is a folder of that name. None of these parameters is a path, so the last part is what the workflow says.

    Args:
        config: as Olive gives it to a pass.
        names: of the parameters, none of them a path.
    """
    values = {name: getattr(config, name) for name in names}
    return {name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value for name, value in values.items()}
