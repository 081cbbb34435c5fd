"""How do `finetune`, `export` and `pack` report what they made?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.cli.display.figures import NONE, duration, estimate, number, size
from slmops.cli.display.layout import Page, beside, shell
from slmops.cli.display.learned import learned, objective, replayed


def finetuned(page: Page, document: Mapping[str, Any]) -> None:
    """Write losses, tokens, time, the stop token and why, where the curve is, and the next command."""
    out = document.get("artifact", "")
    tokens, seconds = document.get("tokens") or {}, document.get("loop_seconds")
    speed = f" ({number(tokens['total'] / seconds)} tokens/s)" if tokens.get("total") and seconds else ""
    page.heading(f"{document.get('kind', 'adapter')} written to {out}")
    page.facts(
        [
            ("method", _joined(document.get("method"), f"engine {document['engine']}" if document.get("engine") else "")),
            ("objective", objective(document)),
            ("base", _quantized(document.get("quantized_base"))),
            ("rows", _joined(_counted(document, "rows", "to train on"), _counted(document, "validation_rows", "for validation"))),
            ("tokens", _joined(_counted(tokens, "total", ""), _counted(tokens, "supervised", "supervised"))),
            ("replay", replayed(document)),
            ("training loss", _metric(document, "train_loss")),
            ("validation loss", _metric(document, "validation_loss")),
            ("pairs right", _metric(document, "pairwise_accuracy") if document.get("objective") == "reward" else ""),
            ("time", _joined(f"{duration(seconds)} in the loop{speed}" if seconds else "", f"{duration(document.get('seconds'))} in all")),
            ("ended early", _early(document.get("ended_early"))),
            ("peak memory", _joined(size(document.get("peak_memory_bytes")), _foretold(document))),
            ("processor", _cores(document)),
            ("stop token", document.get("stop_reason")),
            ("loss curve", _existing(out, "loss.png")),
            *roads(document.get("roads")),
        ]
    )
    learned(page, document)
    page.warnings(document)
    if out:
        page.next(*_after_training(out, document))


def _foretold(document: Mapping[str, Any]) -> str:
    said = document.get("estimate")
    return f"foretold {size(said['memory_bytes'])} and {duration(said['seconds'])}" if said else ""


def _early(ended: Any) -> str:
    return f"at step {ended['step']} of {ended['of']}: the validation loss no longer fell" if ended else ""


def _cores(document: Mapping[str, Any]) -> str:
    cores, count = (document.get("usage") or {}).get("cpu_cores"), document.get("processes") or 1
    if not cores:
        return ""
    return f"{number(cores)} cores in use" + (f" in each of {count} processes" if count > 1 else "")


def roads(open_to: Any) -> list[tuple[str, str]]:
    """Return which of merge, pack and export are open, as facts."""
    return [(f"to {name}", str(said)) for name, said in open_to.items()] if isinstance(open_to, Mapping) else []


def _after_training(out: str, document: Mapping[str, Any]) -> list[str]:
    """Return the next commands: along the roads that are open."""
    if document.get("objective") == "reward":  # it gives no text
        return [f"slmops evaluate {shell(out)} PAIRS"]
    evaluate = f"slmops evaluate {shell(out)} {shell(str(Path(out) / 'validation.jsonl'))}"
    if document.get("kind") == "model":
        return [f"slmops export {shell(out)} -o {beside(out, 'export')}"]
    if document.get("quantized_base"):  # it stays an adapter
        return [evaluate, f"slmops pack EXPORT --adapter NAME={shell(out)} -o {beside(out, 'package')}"]
    if str((document.get("roads") or {}).get("merge", "")).startswith("refused"):
        return [evaluate]
    return [f"slmops merge {shell(out)} -o {beside(out, 'merged')}"]


def exported(page: Page, document: Mapping[str, Any]) -> None:
    """Write target, recipe, size, and the next commands; of several exports, of each."""
    if "exports" in document:
        for each in document["exports"].values():
            exported(page, each)
        return
    out = document.get("artifact", "")
    page.heading(f"{document.get('kind', 'export')} written to {out}")
    each = document.get("bytes_per_parameter")
    page.facts(
        [
            # The CPU's provider has the name of its device: once is enough.
            ("target", " ".join(dict.fromkeys(str(document[key]) for key in ("device", "provider", "precision") if document.get(key)))),
            ("level", document.get("level")),
            *compiled(document),
            ("recipe", recipe_line(document.get("recipe"))),
            ("size", _joined(size(document.get("size_bytes")), f"{number(each, 3)} bytes a parameter" if each else "")),
            ("longest sequence", f"{number(document['max_length_tokens'])} tokens" if document.get("max_length_tokens") else ""),
            *metrics(document),
            ("time", duration(document.get("seconds"))),
        ]
    )
    page.warnings(document)
    if out:  # what is not here to run it cannot measure it
        page.next(f"slmops verify {shell(out)}", *([f"slmops bench {shell(out)}"] if document.get("level") == "executed" else []))


def compiled(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return of an export that was compiled ahead of time: for which chip, what the NPU takes and what not, and on what it ran."""
    soc, places = document.get("soc"), document.get("placement") or {}
    if not soc:
        return []
    facts = [("chip", f"{soc['product']}: {soc['part']}, soc_model {soc['soc_model']}, htp_arch {soc['htp_arch']}")]
    for name, found in places.items():
        line = f"{found['node_share']:.1%} of {found['nodes']} nodes and {found['weight_share']:.1%} of the weights, in {found['contexts']} piece"
        facts.append((f"NPU takes, {name}", line + ("s" if found["contexts"] != 1 else "")))
    left = {name: details for found in places.values() for name, details in found["on_cpu"].items()}
    facts += [("CPU keeps", f"{details['nodes']} {name}: {details['reason']}") for name, details in left.items()]
    return [*facts, ("ran once on", str(document.get("executed_on", "")))]


def packed(page: Page, document: Mapping[str, Any]) -> None:
    """Write the base's recipe, the adapters with rank, layers and size, and the next commands."""
    out, adapters = document.get("artifact", ""), document.get("adapters") or {}
    page.heading(f"{document.get('kind', 'package')} written to {out}")
    page.facts(
        [
            ("target", " ".join(dict.fromkeys(str(document[key]) for key in ("device", "provider", "precision") if document.get(key)))),
            ("level", document.get("level")),
            ("recipe of the base", recipe_line(document.get("recipe"))),
            ("size", _joined(size(document.get("size_bytes")), f"{size(sum(a['size_bytes'] for a in adapters.values()))} of it adapters")),
            ("time", duration(document.get("seconds"))),
        ]
    )
    rows = [
        (
            name,
            ", ".join(str(rank) for rank in details.get("ranks", [])),
            ", ".join(target.removesuffix("_proj") for target in details.get("targets", [])),
            number(details.get("parameters")),
            size(details.get("size_bytes")),
            "the package's own weights" if details.get("quantized_base") else "the float model",
        )
        for name, details in adapters.items()
    ]
    if rows:
        page.table(("adapter", "rank", "layers", "parameters", "size", "trained on"), rows, right=(1, 3, 4))
    page.warnings(document)
    if out:
        first = f" --adapter {shell(next(iter(adapters)))}" if adapters else ""
        page.next(f"slmops verify {shell(out)}", f"slmops generate {shell(out)} PROMPT{first}")


def recipe_line(recipe: Any) -> str:
    """Return a recipe in one line: its id, its options, and bits/block size of each kind of layer."""
    if not isinstance(recipe, Mapping):
        return str(recipe or "")
    options = recipe.get("options") or {}
    layers = options.get("layers") or {}
    parts = [f"{key.replace('_', ' ')} {number(value)}" for key, value in options.items() if not isinstance(value, Mapping)]
    parts += [f"{kind} {_scheme(scheme)}" for kind, scheme in layers.items()]
    return f"{recipe.get('id', '')}: {', '.join(parts)}" if parts else str(recipe.get("id", ""))


def _scheme(scheme: Any) -> str:
    if not isinstance(scheme, Mapping):
        return str(scheme)
    return f"int{scheme.get('bits')}/{scheme.get('block_size')}"


def _quantized(facts: Any) -> str:
    """Return which quantized weights were the frozen base; empty where they were the model's own."""
    if not isinstance(facts, Mapping):
        return ""
    recipe = facts.get("recipe")
    name = recipe.get("id") if isinstance(recipe, Mapping) else facts.get("precision")
    return f"the quantized weights of the {facts.get('kind')} given ({name})"


def metrics(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a document's metrics as facts."""
    return [(name.replace("_", " "), number(value)) for name, value in (document.get("metrics") or {}).items()]


def _metric(document: Mapping[str, Any], name: str) -> str:
    value = (document.get("metrics") or {}).get(name)
    return estimate(value) if isinstance(value, Mapping) else number(value)


def _counted(source: Mapping[str, Any], key: str, what: str) -> str:
    return f"{number(source[key])} {what}".strip() if source.get(key) is not None else ""


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part and part != NONE and not part.startswith(f"{NONE} "))


def _existing(folder: str, name: str) -> str:
    path = Path(folder) / name
    return str(path) if folder and path.is_file() else ""
