"""From adapters to one model, or one adapter: what does `slmops merge` do?"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmops import artifact, hashes, progress
from slmops.adapters import combining, regret
from slmops.adapters.combining import Merger
from slmops.adapters.planning import Plan, plan_merge
from slmops.adapters.sources import Source, agreed_interface, read_sources
from slmops.artifact import Artifact, Draft
from slmops.config import MergeSettings, flat, load
from slmops.data import Interface
from slmops.data.tokenizer_files import copy_tokenizer
from slmops.errors import InvalidInput, RunFailed
from slmops.runtime import quantized_base
from slmops.runtime.hugging_face import parameter_count

# A merge in float32 against base + adapter, per logit: what the order of sums may differ by.
_MERGE_NMSE = 1e-8


def merge(
    adapters: str | Path | Sequence[str | Path], *more: str | Path, out: str | Path | None = None, config: Any = None, **overrides: Any
) -> Artifact | Plan:
    """Merge adapters into their base, or several into one adapter, in float32.

    Several become one first, each with its weight (1 / N unless told otherwise: their mean). The default strategy `cat`
    stacks their matrices: it is exactly the weighted sum of what they do to the weights, and the only one that takes
    adapters of any ranks and any layers without losing something; `slmops.adapters.combining` says what the others do.

    The merged model is run beside base + adapter on a few sequences before it is written. With `data`, each adapter's
    task is scored before (base + that adapter alone) and after, each asked with its own templates.

    Args:
        adapters: a PEFT folder, from `finetune` or elsewhere, or several; a text may be `NAME=FOLDER`.
        more: further adapters.
        out: the folder to write: of a model, or of an adapter with `into="adapter"`. Not needed with `plan`.
        config: YAML file or mapping of `MergeSettings`.
        overrides: single settings, such as `weights=[0.7, 0.3]`.

    Returns:
        The artefact written; with `plan`, the plan.

    Raises:
        BadArtifact: not an adapter, another base than it was trained on, adapters of different bases, or `out` is occupied.
        InvalidInput: a setting that does not fit the adapters or the strategy.
        Unavailable: a method whose effect is not in the weights, or that cannot be combined; or adapters that were trained on
            quantized weights, into their base (`slmops.runtime.quantized_base.refuse_merge`).
        RunFailed: the merged model does not do what base + adapter does.
    """
    settings = load(MergeSettings, config, **overrides)
    given = [*([adapters] if isinstance(adapters, (str, Path)) else adapters), *more]
    _refuse_idle(settings)
    if settings.plan:
        return plan_merge(given, settings, unwritten=out)
    if out is None:
        raise InvalidInput("out: no folder to write was given", "give one with -o/--out, or ask for --plan, which writes nothing")
    out = Path(out)
    artifact.refuse_occupied(out, force=settings.force)
    sources = read_sources(given, settings.base)
    if settings.into == "base":
        for source in sources:
            quantized_base.refuse_merge(source.folder, source.found)
    combining.preflight(sources, settings)
    tasks = regret.read_tasks(sources, settings)
    kind = "adapter" if settings.into == "adapter" else "model"
    with artifact.create(out, kind=kind, command="merge", config=flat(settings), force=settings.force) as draft:
        before = regret.score_alone(tasks, settings)
        _write(draft, combining.load_merger(sources, settings), sources, settings, regret.After(tasks, before))
    return draft.done()


def _refuse_idle(settings: MergeSettings) -> None:
    """Refuse settings that would do nothing: somebody may take the result for what it is not."""
    if settings.plan and settings.data:
        raise InvalidInput("data: --plan merges nothing that could be scored", "leave --data or --plan out")
    quantizing = [name for name in ("precision", "block_size") if getattr(settings, name) is not None]
    if quantizing and not settings.plan:
        raise InvalidInput(
            f"{quantizing[0]}: a merge is written in float32, only --plan looks at it", "quantize with `slmops export`, or add --plan"
        )


def _write(draft: Draft, merger: Merger, sources: Sequence[Source], settings: MergeSettings, after: regret.After) -> None:
    interface, warnings = agreed_interface(sources)
    for line in (*merger.warnings, *warnings):
        draft.warn(line)
    draft.interface = interface.model_dump(mode="json") if interface is not None else None
    draft.facts |= merger.facts
    draft.metrics |= merger.metrics
    with progress.task("merge", total=3, unit="steps") as task:
        if settings.into == "adapter":
            _write_adapter(draft, merger, sources)
        task.advance()
        _untie(draft, merger.model)
        merged = _merged(draft, merger.model)
        task.advance()
        if settings.into == "base":
            _write_model(draft, merged, interface)
        task.advance()
    after.score(merged, draft, settings)
    copy_tokenizer(sources[0].base, draft.folder)
    copy_tokenizer(sources[0].folder, draft.folder)
    draft.add_input("base", sources[0].base)
    for source in sources:
        draft.add_input("adapter", source.folder)
    draft.facts["size_bytes"] = hashes.size_bytes(draft.folder)


def _merged(draft: Draft, adapted: Any) -> Any:
    """Merge the active adapter, and run the result beside base + adapter."""
    import torch

    ids = _probe(adapted.config.vocab_size)
    with torch.inference_mode():
        expected = adapted(ids).logits.numpy()
    merged = combining.fold(adapted)
    with torch.inference_mode():
        nmse, largest = _difference(merged(ids).logits.numpy(), expected)
    if nmse > _MERGE_NMSE:
        raise RunFailed(
            f"the merged model differs from base + adapter (NMSE {nmse:.2g})", "keep the adapter unmerged and report its configuration"
        )
    draft.metrics |= {"merge_nmse": {"value": nmse}, "merge_largest_difference": {"value": largest}}
    return merged


def _untie(draft: Draft, adapted: Any) -> None:
    """Give the head weights of its own where a LoRA changes it or the embedding alone: merged in place it would change both."""
    from peft.tuners.lora import LoraLayer
    from torch.nn import Parameter

    network: Any = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
    table, head = network.get_input_embeddings(), network.get_output_embeddings()
    if not network.config.tie_word_embeddings or not any(isinstance(layer, LoraLayer) for layer in (table, head)):
        return
    own: Any = head.base_layer if isinstance(head, LoraLayer) else head
    own.weight = Parameter(own.weight.detach().clone())
    network.config.tie_word_embeddings = False
    if draft.kind == "model":
        size = 4 * own.weight.numel()
        draft.warn(f"the adapter changes one of embedding and head, which the base ties: they are two now, {size:,} bytes more")


def _write_model(draft: Draft, merged: Any, interface: Interface | None) -> None:
    if interface is not None:
        # So that other tools, which read only this, stop at the right token too.
        merged.generation_config.eos_token_id = list(interface.stop_token_ids)
    merged.save_pretrained(draft.folder, safe_serialization=True)
    draft.facts |= {"precision": "fp32", "parameters": sum(p.numel() for p in merged.parameters())}


def _write_adapter(draft: Draft, merger: Merger, sources: Sequence[Source]) -> None:
    """Write the combination, with what an adapter of `finetune` has beside its tensors."""
    combining.save_combined(merger.model, sources[0].base, draft.folder)
    # Later steps put a `qlora` adapter on the base in nf4 (`load_adapted`): right where all of them learned on it.
    method = "qlora" if all(source.ground == "nf4" for source in sources) else "lora"
    draft.facts |= {"method": method, "trainable_parameters": parameter_count(draft.folder)}
    # Their common base in quantized weights is that of the combination (other grounds were refused).
    quantized = quantized_base.quantized_base_of(sources[0].found, sources[0].base) if sources[0].found is not None else None
    if quantized is not None:
        draft.add_input(quantized_base.ROLE, quantized.folder, quantized.sha256)
        draft.facts |= {quantized_base.ROLE: quantized.facts}
    owner = next((source for source in sources if source.interface is not None), sources[0])
    rows = owner.folder / "validation.jsonl"  # of the task whose interface travels: later steps measure on them
    if rows.is_file():
        shutil.copyfile(rows, draft.folder / rows.name)


def _probe(vocabulary: int) -> Any:
    import torch

    return torch.randint(0, vocabulary, (2, 48), generator=torch.Generator().manual_seed(0))


def _difference(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    difference = found.astype(np.float64) - expected
    return float((difference**2).sum() / (expected.astype(np.float64) ** 2).sum()), float(np.abs(difference).max())
