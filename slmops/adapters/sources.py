"""Which adapters are given, and do they belong together? Names, one base, the same weights under it, one way to ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops import artifact, hashes
from slmops.artifact import Artifact
from slmops.data import Interface
from slmops.errors import BadArtifact, InvalidInput, Unavailable
from slmops.graph import carrying
from slmops.runtime import hugging_face

# What may differ between LoRA adapters that are combined: their delta is B A times the scale, whatever these say (peft 0.21).
_PLAIN = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version", "task_type", "r", "lora_alpha",
    "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "fan_in_fan_out", "init_lora_weights", "eva_config", "runtime_config", "megatron_core", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
# Of the initializations that have a name, those that leave the base as it is; others (PiSSA, OLoRA, LoftQ ...) change it.
_HARMLESS_INITIALIZATIONS = ("gaussian", "eva", "orthogonal")
# What makes two interfaces ask and end alike; the longest sequence may differ.
_ASKED_ALIKE = ("prompt_template", "completion_template", "chat_template", "bos_token_id", "stop_token_ids")


@dataclass(frozen=True)
class Source:
    """One adapter that is to be merged."""

    name: str
    folder: Path
    found: Artifact | None
    """None for an adapter of somebody else's."""
    details: dict[str, Any]
    """Its `adapter_config.json`."""
    base: Path

    @property
    def interface(self) -> Interface | None:
        """How its task is asked; None for an adapter of somebody else's."""
        found = self.found.manifest.interface if self.found is not None else None
        return Interface.model_validate(found) if found is not None else None

    @property
    def ground(self) -> str:
        """The weights that lay under it when it learned: `float`, `nf4` (QLoRA), or the hash of a quantized base."""
        if self.found is None:
            return "float"
        # The place of an adapter that was trained on an export's own weights: another ground than the same model in float.
        quantized = self.found.manifest.input("quantized_base")
        if quantized is not None:
            return quantized.sha256
        return "nf4" if self.found.manifest.facts.get("method") == "qlora" else "float"


def read_sources(adapters: str | Path | Sequence[str | Path], base: str | None) -> list[Source]:
    """Read one or several adapters and check that they are for one base.

    Args:
        adapters: folders; a text may be `NAME=FOLDER`, otherwise the name is the folder's.
        base: the base model's folder, in place of the recorded one.

    Raises:
        BadArtifact: not an adapter, changed, another base than it was trained on, or adapters of different bases.
        Unavailable: a method whose effect is not in the weights.
        InvalidInput: no adapter, or one given twice.
    """
    given = [adapters] if isinstance(adapters, (str, Path)) else list(adapters)
    if not given:
        raise InvalidInput("no adapter was given", "give the folders that `slmops finetune` wrote")
    places = _named(given)
    sources = [_read(name, folder, base) for name, folder in places.items()]
    _refuse_different_bases(sources)
    return sources


def refuse_uncombinable(sources: Sequence[Source]) -> None:
    """Refuse adapters whose deltas cannot be added up.

    Raises:
        Unavailable: another method than LoRA, or a LoRA with an effect beside B A (DoRA, biases, saved modules ...).
        BadArtifact: they learned on different quantized weights of the base.
    """
    for source in sources:
        kind = carrying.type_of(source.details)
        if kind != "LORA":
            raise Unavailable(
                f"{source.name} is an adapter of type {kind}, and only LoRA adapters can be combined", "merge it alone, or leave it out"
            )
        extras = _extras(source.details)
        if extras:
            raise Unavailable(
                f"{source.name} has {', '.join(extras)}: more than a product of two matrices, which a combination would lose",
                "merge it alone, or leave it out",
            )
    grounds = {source.name: source.ground for source in sources}
    quantized = [name for name, ground in grounds.items() if ground not in ("float", "nf4")]
    if quantized and len(set(grounds.values())) > 1:
        raise BadArtifact(
            f"{', '.join(quantized)} learned on a quantized base, and {_others(grounds, quantized)} on other weights of the same model",
            "combine adapters that were trained with the same --quantized-base",
        )


def ground_warnings(sources: Sequence[Source]) -> list[str]:
    """Say which adapters learned on nf4 (QLoRA) and are combined on the base in float, because others did not."""
    if len({source.ground for source in sources}) == 1:
        return []
    lossy = [source.name for source in sources if source.ground == "nf4"]
    # peft#2321: what an adapter learned to make up for the error of nf4 is an error of its own on the float base.
    return [
        f"{', '.join(lossy)} learned with qlora on the base in nf4, and the others on it in float: merged into the float base, "
        "what it learned to make up for the rounding of nf4 stays in it as an error"
    ]


def ranks_of(folder: Path) -> dict[str, int]:
    """Return the rank of each layer that a LoRA folder adapts, from the header of its tensors."""
    ranks = {}
    for name, shape in hugging_face.parameter_shapes(folder).items():
        if ".lora_A." in name or name.endswith("lora_embedding_A"):
            ranks[name.split(".lora_")[0].removeprefix("base_model.model.")] = shape[0]
    return ranks


def refuse_unequal_ranks(sources: Sequence[Source], strategy: str) -> None:
    """Refuse adapters of different ranks for a strategy that adds their matrices up.

    Raises:
        InvalidInput: they differ in a layer that they share, or as a whole; the message says who has which.
    """
    ranks = {source.name: ranks_of(source.folder) for source in sources}
    layers = {layer for own in ranks.values() for layer in own}
    alike = all(len({own[layer] for own in ranks.values() if layer in own}) == 1 for layer in layers)
    if alike and len({max(own.values(), default=0) for own in ranks.values()}) == 1:
        return
    shown = ", ".join(f"{name} {_span(own.values())}" for name, own in ranks.items())
    svd = "svd" if strategy == "linear" else f"{strategy}_svd"
    raise InvalidInput(f"strategy: {strategy} needs adapters of equal ranks, and these have {shown}", f"use --strategy {svd}, or cat")


def agreed_interface(sources: Sequence[Source]) -> tuple[Interface | None, list[str]]:
    """Return the interface that travels, the first adapter's, and a warning where others are asked otherwise."""
    interfaces = {source.name: source.interface for source in sources}
    known = {name: interface for name, interface in interfaces.items() if interface is not None}
    if not known:
        return None, []
    first, chosen = next(iter(known.items()))
    asked = chosen.model_dump(include=set(_ASKED_ALIKE))
    other = [name for name, interface in known.items() if interface.model_dump(include=set(_ASKED_ALIKE)) != asked]
    if not other:
        return chosen, []
    return chosen, [
        f"{', '.join(other)}: asked with other templates or stop tokens than {first}, whose travel with the result; "
        "give the others to `evaluate` with --prompt-template and --completion-template"
    ]


def _named(given: Sequence[str | Path]) -> dict[str, Path]:
    """Return the adapters' folders by name: the one given, else the folder's, with its parent's where that is not enough."""
    pairs = [_split(item) for item in given]
    short = [name or folder.name for name, folder in pairs]
    result: dict[str, Path] = {}
    for (name, folder), own in zip(pairs, short, strict=True):
        key = own if name or short.count(own) == 1 else f"{folder.parent.name}/{own}"
        if key in result:
            raise InvalidInput(f"two adapters have the name {key}", "give each a name of its own: NAME=FOLDER")
        result[key] = folder
    return result


def _split(item: str | Path) -> tuple[str | None, Path]:
    folder = Path(item)
    name, equals, place = str(item).partition("=")
    if isinstance(item, str) and equals and name and "/" not in name and not folder.exists():
        return name, Path(place)
    return None, folder if folder.name not in ("", "..") else folder.resolve()


def _read(name: str, folder: Path, base: str | None) -> Source:
    found = artifact.checked(
        folder, "adapter", f"a model needs no merge: slmops export {folder} -o EXPORT; of a fine-tune give the adapter"
    )
    details = hugging_face.read_adapter_config(folder)
    carrying.refuse_unmergeable(folder, details)
    return Source(name, folder, found, details, hugging_face.find_base(folder, found, details, base))


def _refuse_different_bases(sources: Sequence[Source]) -> None:
    first = sources[0]
    for other in sources[1:]:
        if other.base.resolve() != first.base.resolve() and hashes.fingerprint(other.base) != hashes.fingerprint(first.base):
            raise BadArtifact(
                f"{first.name} was trained on {first.base}, and {other.name} on {other.base}, which is another model",
                "merge adapters of one base; for two bases, make two models",
            )


def _extras(details: Mapping[str, Any]) -> list[str]:
    """Name what a LoRA config asks for beside the product of A and B."""
    found = [key for key, value in details.items() if key not in _PLAIN and key != "bias" and value]
    if details.get("bias", "none") != "none":
        found.append(f"bias {details['bias']}")
    initialization = details.get("init_lora_weights")
    if isinstance(initialization, str) and initialization not in _HARMLESS_INITIALIZATIONS:
        found.append(f"init_lora_weights {initialization}")
    return found


def _others(grounds: Mapping[str, str], some: Sequence[str]) -> str:
    return ", ".join(name for name in grounds if name not in some) or "each of them"


def _span(ranks: Any) -> str:
    values = sorted(set(ranks))
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
