"""What can be done with a trained adapter? Merge it into the base that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from slmops import artifact, environment, progress
from slmops.artifact import Artifact, Draft
from slmops.config import MergeSettings, flat, load
from slmops.data import Interface
from slmops.data.tokenizer_files import copy_tokenizer
from slmops.errors import RunFailed, Unavailable
from slmops.runtime import hugging_face

# A merge in float32 against base + adapter, per logit: what the order of sums may differ by.
_MERGE_NMSE = 1e-8
# The methods of PEFT whose effect lies in the weights of linear layers; everything else has state beside them.
_MERGEABLE = ("LORA", "LOHA", "LOKR", "IA3", "ADALORA", "OFT", "BOFT")


def merge(adapter: str | Path, *, out: str | Path, config: Any = None, **overrides: Any) -> Artifact:
    """Merge one adapter into its base, in float32.

    The merged model is run beside base + adapter on a few sequences before it is written.

    Args:
        adapter: a PEFT folder, from `finetune` or elsewhere.
        out: the model folder to write.
        config: YAML file or mapping of `MergeSettings`.
        overrides: single settings.

    Raises:
        BadArtifact: not an adapter, another base than it was trained on, or `out` is occupied.
        Unavailable: a method whose effect is not in the weights.
        RunFailed: the merged model does not do what base + adapter does.
    """
    settings = load(MergeSettings, config, **overrides)
    folder, out = Path(adapter), Path(out)
    artifact.refuse_occupied(out, force=settings.force)
    found = artifact.checked(folder, "adapter", "give the folder that `slmops finetune` wrote")
    details = hugging_face.read_adapter_config(folder)
    if details.get("peft_type") not in _MERGEABLE:
        raise Unavailable(
            f"an adapter of type {details.get('peft_type')} has no effect on the weights: it cannot be merged",
            f"these can: {', '.join(name.lower() for name in _MERGEABLE)}",
        )
    base = hugging_face.find_base(folder, found, details, settings.base)
    with artifact.create(out, kind="model", command="merge", config=flat(settings), force=settings.force) as draft:
        _merge_into(draft, folder, base, found)
    return draft.done()


def _merge_into(draft: Draft, adapter: Path, base: Path, found: Artifact | None) -> None:
    torch = environment.require("torch", "to merge")
    with progress.task("merge", total=4, unit="steps") as task:
        adapted: Any = hugging_face.load_adapted(base, adapter)
        task.advance()
        ids = _probe(adapted.config.vocab_size)
        with torch.inference_mode():
            expected = adapted(ids).logits.numpy()
        merged = adapted.merge_and_unload(safe_merge=True)
        task.advance()
        with torch.inference_mode():
            nmse, largest = _difference(merged(ids).logits.numpy(), expected)
        if nmse > _MERGE_NMSE:
            raise RunFailed(
                f"the merged model differs from base + adapter (NMSE {nmse:.2g})", "keep the adapter unmerged and report its configuration"
            )
        task.advance()
        _write_model(draft, merged, adapter, base, found)
        task.advance()
    draft.metrics = {"merge_nmse": {"value": nmse}, "merge_largest_difference": {"value": largest}}


def _write_model(draft: Draft, merged: Any, adapter: Path, base: Path, found: Artifact | None) -> None:
    draft.interface = found.manifest.interface if found is not None else None
    if draft.interface is not None:
        # So that other tools, which read only this, stop at the right token too.
        merged.generation_config.eos_token_id = list(Interface.model_validate(draft.interface).stop_token_ids)
    merged.save_pretrained(draft.folder, safe_serialization=True)
    copy_tokenizer(base, draft.folder)
    copy_tokenizer(adapter, draft.folder)
    draft.add_input("base", base)
    draft.add_input("adapter", adapter)
    draft.facts = {
        "parameters": sum(p.numel() for p in merged.parameters()),
        "precision": "fp32",
        "size_bytes": artifact.size_bytes(draft.folder),
    }


def _probe(vocabulary: int) -> Any:
    import torch

    return torch.randint(0, vocabulary, (2, 48), generator=torch.Generator().manual_seed(0))


def _difference(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    difference = found.astype(np.float64) - expected
    return float((difference**2).sum() / (expected.astype(np.float64) ** 2).sum()), float(np.abs(difference).max())
