"""Which of merge, pack and export are open to an adapter, and if one is not, why?

Asked of the same rules by which those verbs act (`slmops.graph.carrying`, `slmops.graph.shapes`), so that what a manifest says
and what a verb does cannot differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slmops.errors import SlmopsError
from slmops.graph import carrying
from slmops.graph.shapes import read_shape, refuse_unrunnable

# Of the verbs: what is written into a manifest where a road is open.
EXACT, AS_ADAPTER, AS_MERGED, AS_MODEL = "exact", "as an adapter", "merged", "as it is"


def roads_of(config: dict[str, Any], base: Path, *, method: str, quantized: bool) -> dict[str, str]:
    """Return what becomes of an adapter in `merge`, `pack` and `export`.

    Args:
        config: its `adapter_config.json`.
        base: folder of its base.
        method: that it was trained with.
        quantized: it was trained on the weights of an export or package.
    """
    merge = carrying.not_in_weights(config)
    if quantized:
        merge.append("it belongs on the quantized weights that it was trained on")
    shape = _not_runnable(base)
    packable = not carrying.uncarried(config)
    merged = _said(merge, f"{EXACT}, into the base's values in nf4" if method == "qlora" else EXACT)
    return {
        "merge": merged,
        "pack": _said(shape, AS_ADAPTER) if packable else _said([*shape, *merge], f"{AS_MERGED}, in a package of its own"),
        "export": _said([*shape, *merge], AS_MERGED),
    }


def roads_of_model(model: Path) -> dict[str, str]:
    """Return what becomes of a model that was trained as a whole."""
    shape = _not_runnable(model)
    return {"merge": "refused: it is a model, there is nothing to merge", "pack": _said(shape, AS_MODEL), "export": _said(shape, AS_MODEL)}


def _said(reasons: list[str], otherwise: str) -> str:
    return f"refused: {'; '.join(dict.fromkeys(reasons))}" if reasons else otherwise


def _not_runnable(model: Path) -> list[str]:
    try:
        refuse_unrunnable(read_shape(model))
    except SlmopsError as error:
        return [error.message]
    return []
