"""How do several adapters become one? By PEFT's own `add_weighted_adapter`, with what it does behind one's back made good.

With s_i the scale of adapter i (alpha / r, or alpha / sqrt(r) for rsLoRA), D_i = s_i B_i A_i its delta and w_i its weight
(peft 0.21.2, tuners/lora/model.py):

- `cat` stacks the matrices along the rank. It is exact, sum of w_i D_i, for adapters of any ranks and any targets.
- `svd` is the best approximation of that sum of a given rank: exact only where that rank is the sum of all.
- `linear` adds sqrt(w_i s_i) A_i and sqrt(w_i s_i) B_i before it multiplies them. So it is not the sum of the deltas but
  that sum plus every cross term sqrt(w_i s_i w_j s_j) B_i A_j, as large as the deltas themselves.
- `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` prune A and B apart and have the same cross terms; with `_svd`
  they prune the deltas, as their papers do (TIES: Yadav et al. 2023, arXiv 2306.01708; DARE: Yu et al. 2024, arXiv 2311.03099).

How far the result is from the sum is measured, layer by layer, whatever the strategy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmops import environment, progress
from slmops.adapters.sources import Source, ground_warnings, ranks_of, refuse_uncombinable, refuse_unequal_ranks
from slmops.config import MergeSettings
from slmops.errors import BadArtifact, InvalidInput, RunFailed, Unavailable
from slmops.runtime import hugging_face, native

COMBINED = "combined"
_EXACT = 1e-5  # relative, in float32
_EQUAL_RANKS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_PRUNING = ("ties", "dare", "magnitude_prune")
_DENSITY = 0.5


@dataclass(frozen=True)
class Merger:
    """A base with the adapter that is to be merged active on it: the only one, or the combination of several."""

    model: Any
    """A `PeftModel` in eval mode, float32."""
    facts: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def load_merger(sources: Sequence[Source], settings: MergeSettings) -> Merger:
    """Load base and adapters, and combine several to one.

    A single adapter with nothing said of weights is taken as it is, whatever its method.

    Raises:
        See `load_all` and `combine`.
    """
    environment.require("torch", "to merge")
    if not combines(sources, settings):
        return Merger(hugging_face.load_adapted(sources[0].base, sources[0].folder))
    adapted, names = load_all(sources)
    rank, distance = combine(adapted, names, settings)
    weights = weights_for(settings, len(sources))
    parts = [
        {"name": source.name, "weight": weight, "rank": max(ranks_of(source.folder).values(), default=0)}
        for source, weight in zip(sources, weights, strict=True)
    ]
    facts = {"strategy": settings.strategy, "density": density_for(settings), "rank": rank, "adapters": parts}
    warnings = (*ground_warnings(sources), *_distance_warnings(settings, len(sources), distance))
    return Merger(adapted, facts, {"distance_from_sum": {"value": distance}}, warnings)


def combines(sources: Sequence[Source], settings: MergeSettings) -> bool:
    """Tell whether a combined adapter is made: of several, of one with a weight, or because one is to be written."""
    return len(sources) > 1 or settings.into == "adapter" or settings.weights is not None or settings.strategy != "cat"


def weights_for(settings: MergeSettings, count: int) -> list[float]:
    """Return one weight an adapter: those given, or 1 / N each, the mean.

    At weight 1 each the sum is larger than any adapter was when it learned, and answers break: on stories3m, exact match of
    two SNIPS adapters of 0.99 and 0.98 (intents, and a copied word) after `cat` was 0.12 and 0.13 with 1 each, 0.33 and 0.20
    with 1 / sqrt(N), 0.15 and 0.23 with 1 / N; intents beside slots (learned to 0.07) kept 0.26, 0.85 and 0.84. Of the two
    that are near each other, the mean is what a user expects: an adapter merged with its copy is that adapter.

    Raises:
        InvalidInput: another number of weights than of adapters.
    """
    if settings.weights is None:
        return [1 / count] * count
    if len(settings.weights) != count:
        raise InvalidInput(
            f"weights: {len(settings.weights)} of them ({', '.join(f'{w:g}' for w in settings.weights)}) for {count} adapters",
            "give one weight an adapter, in their order: --weights 0.7,0.3",
        )
    return list(settings.weights)


def density_for(settings: MergeSettings) -> float | None:
    """Return the share of values that a pruning strategy keeps; None for a strategy that prunes nothing.

    Raises:
        InvalidInput: a density for a strategy that prunes nothing, or a rank for one that makes no SVD.
    """
    prunes = settings.strategy.startswith(_PRUNING)
    if settings.density is not None and not prunes:
        raise InvalidInput(f"density: {settings.strategy} prunes nothing", "leave --density out, or use ties, dare_linear_svd ...")
    if settings.svd_rank is not None and not settings.strategy.endswith("svd"):
        raise InvalidInput(f"svd_rank: {settings.strategy} makes no SVD", "leave --svd-rank out, or use --strategy svd")
    return (settings.density or _DENSITY) if prunes else None


def preflight(sources: Sequence[Source], settings: MergeSettings) -> None:
    """Refuse what cannot be combined, before any weight is loaded.

    Raises:
        InvalidInput: a setting that does not fit the adapters or the strategy.
        Unavailable, BadArtifact: see `refuse_uncombinable`.
    """
    density_for(settings)
    if not combines(sources, settings):
        return
    refuse_uncombinable(sources)
    weights_for(settings, len(sources))
    if len(sources) == 1 and settings.strategy != "cat":
        raise InvalidInput(f"strategy: {settings.strategy} combines several adapters, and one was given", "leave --strategy out")
    if settings.strategy in _EQUAL_RANKS:
        refuse_unequal_ranks(sources, settings.strategy)


def load_all(sources: Sequence[Source]) -> tuple[Any, list[str]]:
    """Load the base with every adapter on it; return the model and the adapters' names in it.

    The base has the values that they all learned on (nf4 for QLoRA); where they learned on different ones, it is in float.

    Raises:
        BadArtifact: a tensor of an adapter has no place in this base, or the wrong shape.
    """
    first, agreed = sources[0], len({source.ground for source in sources}) == 1
    adapted: Any = hugging_face.load_adapted(first.base, first.folder, nf4=None if agreed else False)
    names = ["default"]
    for number, source in enumerate(sources[1:], 1):
        names.append(f"adapter_{number}")
        try:
            adapted.load_adapter(source.folder, adapter_name=names[-1], is_trainable=False)
        except (RuntimeError, ValueError, KeyError) as error:
            raise BadArtifact(
                f"{source.folder} does not fit {source.base}: {_line(error)}", "give the base that it was trained on"
            ) from error
        hugging_face.refuse_misfits(adapted, source.folder, names[-1])
    return adapted.eval(), names


def combine(adapted: Any, names: Sequence[str], settings: MergeSettings) -> tuple[int, float]:
    """Add a combined adapter, called `COMBINED`, to a model that holds its sources, and make it the active one.

    Args:
        adapted: of `load_all`.
        names: the sources' names in it.
        settings: strategy, weights, density, seed.

    Returns:
        Its rank, and how far its deltas are from the weighted sum: ||D - sum w_i D_i|| / ||sum w_i D_i|| over all layers.

    Raises:
        RunFailed: the strategy is exact, and the result is not the sum.
        InvalidInput: PEFT refuses the combination.
    """
    torch = environment.require("torch", "to combine adapters")
    weights = weights_for(settings, len(names))
    _normalize(adapted, names)
    progress.say(f"combining {len(names)} adapters: {settings.strategy}, weights {', '.join(f'{w:g}' for w in weights)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # dare prunes at random
        try:
            adapted.base_model.add_weighted_adapter(
                list(names),
                weights,
                COMBINED,
                combination_type=settings.strategy,
                svd_rank=settings.svd_rank,
                svd_full_matrices=False,
                density=density_for(settings),
            )
        except ValueError as error:
            raise InvalidInput(f"PEFT cannot combine these adapters: {_line(error)}", "use --strategy cat") from error
    rank = int(adapted.peft_config[COMBINED].r)
    _pad(adapted, rank)
    adapted.set_adapter(COMBINED)
    distance = _distance_from_sum(adapted, names, weights)
    if settings.strategy == "cat" and not distance <= _EXACT:
        raise RunFailed(f"the combined adapter is not the sum of its sources (off by {distance:.2g})", "report the adapters' configuration")
    return rank, distance


def fold(adapted: Any) -> Any:
    """Merge the active adapter into the base's weights, in memory; return the base.

    Raises:
        Unavailable: PEFT has no weights to put a part of it into (a bias where the base has none).
        RunFailed: the merged weights are not finite.
    """
    if hasattr(adapted, "slmops_adapter"):
        return native.fold_own(adapted)
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise RunFailed(f"PEFT cannot merge the adapter: {_line(error)}", "train it again: its weights are damaged or too large") from error
    except RuntimeError as error:  # NotImplementedError is one too
        hint = "train it again with --method lora; this one runs in PyTorch only"
        raise Unavailable(f"PEFT cannot merge the adapter: {_line(error)}", hint) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _distance_warnings(settings: MergeSettings, count: int, distance: float) -> list[str]:
    """Say so where a strategy's name promises a sum and the result is another one."""
    if count > 1 and settings.strategy == "linear" and distance > _EXACT:
        return [
            f"strategy linear adds A and B apart, so that the product has cross terms between the adapters: it is {distance:.2g} of "
            "the sum's own size away from the weighted sum of the deltas; cat is that sum"
        ]
    if settings.strategy == "svd" and distance > 0.1:
        return [f"strategy svd cut the rank: what is left differs from the weighted sum by {distance:.2g} of its size; cat is that sum"]
    return []


def save_combined(adapted: Any, base: Path, folder: Path) -> None:
    """Write the combined adapter as a PEFT folder."""
    adapted.peft_config[COMBINED].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder, safe_serialization=True, selected_adapters=[COMBINED])
    own = folder / COMBINED  # PEFT gives every adapter but `default` a folder of its own
    for file in own.iterdir():
        file.replace(folder / file.name)
    own.rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    (folder / "adapter_model.safetensors").chmod(0o644)  # safetensors writes for the owner only


def _normalize(adapted: Any, names: Sequence[str]) -> None:
    """Say in each config what is in the model, because PEFT makes the combined one out of the first's.

    An rsLoRA first would scale the combination by sqrt(r); its `layers_to_transform` would drop the others' layers without
    a word; a pattern and a list of targets together are refused, though the layers are known.
    """
    configs = {name: adapted.peft_config[name] for name in names}
    limited = any(
        isinstance(config.target_modules, str) or config.layers_to_transform is not None or config.exclude_modules
        for config in configs.values()
    )
    for name, config in configs.items():
        config.use_rslora, config.init_lora_weights = False, True
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
        config.lora_dropout = 0.0
        if limited:
            config.target_modules = {layer for layer, module in _layers(adapted) if _holds(module, name)}


def _pad(adapted: Any, rank: int) -> None:
    """Fill A and B with zeros up to the rank that the config tells, where a layer's own is smaller: else it cannot be loaded again."""
    from torch.nn.functional import pad

    for _, module in _layers(adapted):
        if COMBINED in module.lora_A:
            first, second = module.lora_A[COMBINED].weight, module.lora_B[COMBINED].weight
        elif COMBINED in module.lora_embedding_A:
            first, second = module.lora_embedding_A[COMBINED], module.lora_embedding_B[COMBINED]
        else:
            continue
        missing = rank - first.shape[0]
        first.data = pad(first.data, (0, 0, 0, missing)).contiguous()
        second.data = pad(second.data, (0, missing)).contiguous()


def _distance_from_sum(adapted: Any, names: Sequence[str], weights: Sequence[float]) -> float:
    """Compare the combined deltas with the weighted sum of the sources', layer by layer."""
    import torch

    difference = energy = 0.0
    for layer, module in _layers(adapted):
        held = [(name, weight) for name, weight in zip(names, weights, strict=True) if _holds(module, name)]
        if not held:
            continue
        if not _holds(module, COMBINED):
            raise RunFailed(f"PEFT left {layer} out of the combined adapter", "report the adapters' configuration")
        expected = torch.stack([weight * module.get_delta_weight(name).detach().double() for name, weight in held]).sum(0)
        difference += float(((module.get_delta_weight(COMBINED).detach().double() - expected) ** 2).sum())
        energy += float((expected**2).sum())
    return math.sqrt(difference / energy) if energy else (0.0 if not difference else math.inf)


def _layers(adapted: Any) -> Iterator[tuple[str, Any]]:
    """Yield the layers that hold LoRA matrices, by their names in the base model."""
    from peft.tuners.lora import LoraLayer

    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _holds(module: Any, name: str) -> bool:
    return name in module.lora_A or name in module.lora_embedding_A
