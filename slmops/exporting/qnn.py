"""The road of Qualcomm's NPU: graphs of fixed shapes, compiled ahead of time for one chip, with a report of what the NPU takes.

    OUT/prefill.onnx, decode.onnx, *_qnn.bin    compiled: what a device runs
    OUT/genai_config.json                       onnxruntime-genai's `decoder-pipeline` of the two
    OUT/portable/                               the same graphs before the compiler: the proof's, and to compile for another chip

A graph takes `prefill_tokens` tokens or one, and a cache of `max_length_tokens` positions; nothing of it can grow. The NPU
computes in 16-bit floats; quantized weights stay as the recipe rounded them.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slmops import artifact, environment, socs
from slmops.artifact import Draft
from slmops.config import ExportSettings
from slmops.data import Interface
from slmops.data.tokenizer_files import copy_tokenizer
from slmops.errors import InvalidInput, RunFailed
from slmops.exporting.record import eos_token_id, export_facts
from slmops.graph import checking
from slmops.graph.recipes import recipe_for
from slmops.graph.shapes import Shape
from slmops.graph.static import PAST_LENGTH, TOTAL_LENGTH
from slmops.runtime import qnn_plugin
from slmops.runtime.static_decoder import DECODE, PORTABLE, PREFILL
from slmops.socs import Soc
from slmops.targets import Target

_NAMES = (PREFILL, DECODE)
# Tokens of a piece of a prompt: what onnxruntime-genai's own NPU packages use.
_PREFILL_TOKENS = 64


def require(settings: ExportSettings) -> None:
    """Raise Unavailable for what this road lacks here, and for a chip that is not known."""
    from slmops.graph import building

    socs.find(settings.soc)
    qnn_plugin.device()
    building.require_libraries()


def write(draft: Draft, source: Path, interface: Interface, target: Target, settings: ExportSettings, shape: Shape) -> None:
    """Write an export for a Qualcomm NPU, compile it and run it once where it can be: see `slmops.exporting.exporting`.

    Raises:
        Unavailable: the compiler does not take the graph.
        InvalidInput: a length that does not fit.
        RunFailed: the builder failed, or a graph is not the one asked for.
    """
    soc, tokens = socs.find(settings.soc), settings.prefill_tokens or _PREFILL_TOKENS
    interface = _fixed(interface, tokens, draft)
    recipe = recipe_for(settings.precision, settings.block_size, target.provider)
    portable = draft.folder / PORTABLE
    with TemporaryDirectory(prefix="slmops-export-") as scratch:
        config = _write_portable(source, portable, Path(scratch) / "float", interface, tokens, recipe)
    problems = [line for name in _NAMES for line in checking.static_problems(portable / name, recipe.document()["options"])]
    if problems:
        raise RunFailed(f"the graph is not the one asked for: {'; '.join(problems)}", "report the model's architecture and this message")
    qnn_plugin.compile_graphs({portable / name: draft.folder / name for name in _NAMES}, soc, weights_once=settings.weights_once)
    copy_tokenizer(source, draft.folder)
    tokenizer_file = json.loads((draft.folder / "tokenizer.json").read_text(encoding="utf-8"))
    pad, sure = pad_token(tokenizer_file, int(config["model"]["vocab_size"]), interface)
    if not sure:
        draft.warn(f"onnxruntime-genai takes token {pad} for padding: a prompt that holds it is cut there (slmops itself does not)")
    artifact.write_json(draft.folder / "genai_config.json", pipeline_config(config, interface, tokens, pad))
    draft.add_input("baseline", source)
    draft.interface = interface.model_dump(mode="json")
    size = sum(file.stat().st_size for file in draft.folder.iterdir() if file.suffix in (".onnx", ".bin", ".data"))
    draft.facts = export_facts(target, recipe.document(), source, interface, size, "compiled") | _facts(draft.folder, soc)
    draft.facts |= {"weights_once": settings.weights_once, "prefill_tokens": tokens}
    draft.facts["executed_on"] = _run_once(draft)
    if settings.weights_once and not qnn_plugin.has_npu():
        draft.warn("with --weights-once the compiled file cannot be run on this machine: `slmops verify` compiles the plain graphs anew")


def pipeline_config(built: dict[str, Any], interface: Interface, prefill_tokens: int, pad_token_id: int) -> dict[str, Any]:
    """Return the `genai_config.json` of two compiled graphs (onnxruntime-genai 0.18, `decoder-pipeline`).

    Padding stands on the right, the cache is one buffer that does not slide, and each graph runs in one phase only.

    Args:
        built: the builder's config.
        interface: stop tokens and the length of the cache.
        prefill_tokens: of a piece of a prompt.
        pad_token_id: a token that no prompt holds: genai counts a prompt's tokens up to the first of it.
    """
    model = dict(built["model"])
    decoder = {key: value for key, value in model["decoder"].items() if key not in ("filename", "session_options")}
    caches = [f"{{}}.{i}.{part}" for i in range(decoder["num_hidden_layers"]) for part in ("key", "value")]
    inputs = ["input_ids", PAST_LENGTH, TOTAL_LENGTH, *(name.format("past_key_values") for name in caches)]
    outputs = ["logits", *(name.format("present") for name in caches)]
    options = {"log_id": "onnxruntime-genai", "provider_options": [{"qnn": {"backend_type": "htp", "htp_performance_mode": "burst"}}]}
    decoder["session_options"] = options
    decoder["inputs"] = {
        "input_ids": "input_ids",
        "past_sequence_length": PAST_LENGTH,
        "total_sequence_length": TOTAL_LENGTH,
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    decoder["sliding_window"] = {"window_size": prefill_tokens, "pad_value": 0, "alignment": "left", "slide_key_value_cache": False}
    graph = {"inputs": inputs, "outputs": outputs, "session_options": options}
    decoder["pipeline"] = [
        {"prefill": {"filename": PREFILL, **graph, "run_on_prompt": True, "run_on_token_gen": False}},
        {"decode": {"filename": DECODE, **graph, "run_on_prompt": False, "run_on_token_gen": True}},
    ]
    changed = {
        "type": "decoder-pipeline",
        "context_length": interface.max_length_tokens,
        "eos_token_id": eos_token_id(interface.stop_token_ids),
        "pad_token_id": pad_token_id,
    }
    search = {**built["search"], "max_length": interface.max_length_tokens, "do_sample": False, "past_present_share_buffer": True}
    return {**built, "model": {**model, **changed, "decoder": decoder}, "search": search}


def pad_token(tokenizer: dict[str, Any], vocabulary: int, interface: Interface) -> tuple[int, bool]:
    """Return a token that no prompt holds, and whether that is sure.

    A row of the embedding behind the tokenizer's last token; else the unknown token of a tokenizer that knows every byte; else a
    special token that stands in no template.

    Args:
        tokenizer: content of `tokenizer.json`.
        vocabulary: rows of the embedding.
        interface: BOS, stop tokens, templates.
    """
    content = tokenizer.get("model", {}).get("vocab", {})
    pairs = content.items() if isinstance(content, dict) else ((entry[0], i) for i, entry in enumerate(content))
    ids = {str(text): int(token) for text, token in pairs}
    added = {entry["content"]: int(entry["id"]) for entry in tokenizer.get("added_tokens", [])}
    last = max([*ids.values(), *added.values()], default=-1)
    if last + 1 < vocabulary:
        return last + 1, True
    unknown = tokenizer.get("model", {}).get("unk_token")
    if unknown in ids and tokenizer["model"].get("byte_fallback"):
        return ids[unknown], True
    templates = " ".join(text or "" for text in (interface.chat_template, interface.prompt_template, interface.completion_template))
    used = {interface.bos_token_id, *interface.stop_token_ids}
    free = [token for text, token in added.items() if token not in used and text not in templates]
    return (max(free), True) if free else (vocabulary - 1, False)


def _fixed(interface: Interface, size: int, draft: Draft) -> Interface:
    """Bound the length to whole pieces of a prompt."""
    asked = interface.max_length_tokens
    length = asked // size * size
    if not length:
        raise InvalidInput(
            f"prefill_tokens: a piece of {size} tokens is longer than the cache of {asked}", f"use --prefill-tokens {asked // 2} or fewer"
        )
    if length != asked:
        draft.warn(f"max_length_tokens: {asked} is no multiple of {size} (prefill_tokens); bounded to {length}")
    return interface.model_copy(update={"max_length_tokens": length})


def _write_portable(source: Path, out: Path, built: Path, interface: Interface, tokens: int, recipe: Any) -> dict[str, Any]:
    """Write both graphs, on one data file; return the builder's config."""
    from slmops.graph import building, rewriting, static
    from slmops.graph.linears import load_graph

    onnx_ir = environment.require("onnx_ir", "to write a graph")
    length = interface.max_length_tokens
    out.mkdir()
    graph, _ = building.build_for_cpu(source, built, recipe, context_tokens=length, data=out / rewriting.DATA)
    config = json.loads((built / "genai_config.json").read_text(encoding="utf-8"))
    rewriting.save_twins(graph, out)
    for name, count in ((PREFILL, tokens), (DECODE, 1)):
        fixed = load_graph(out / rewriting.FULL)
        static.make_static(fixed, tokens=count, capacity=length, head_size=config["model"]["decoder"]["head_size"])
        onnx_ir.save(fixed, out / name)
    (out / rewriting.FULL).unlink()
    (out / rewriting.MAIN).unlink()
    return config


def _facts(folder: Path, soc: Soc) -> dict[str, Any]:
    from slmops.graph.placement import compiled_for, placement

    for name in _NAMES:
        if compiled_for(folder / name) != (soc.soc_model, soc.htp_arch):
            raise RunFailed(
                f"the QNN compiler made {name} for another chip than {soc.name}", "report this with your version of onnxruntime-qnn"
            )
    return {
        "portable_bytes": sum(file.stat().st_size for file in (folder / PORTABLE).iterdir()),
        "soc": soc.document(),
        "compiler": f"onnxruntime-qnn {environment.version_of('onnxruntime-qnn')}",
        "placement": {name.removesuffix(".onnx"): placement(folder / PORTABLE / name, folder / name) for name in _NAMES},
    }


def _run_once(draft: Draft) -> str:
    """Run both graphs, so that they are known to load; return on what.

    Raises:
        RunFailed: they give no numbers.
    """
    import numpy as np

    from slmops.runtime.static_runner import StaticRunner

    runner = StaticRunner(draft.folder, environment.usable_cores(), facts=draft.facts)
    logits, cache = runner.decoder.prefill([1, 2], runner.decoder.empty())
    last, _ = runner.decoder.step(3, 2, cache)
    runner.close()
    if not (np.isfinite(logits).all() and np.isfinite(last).all()):
        raise RunFailed("the compiled graphs give logits that are not finite", "its numbers overflow 16-bit floats: take another base")
    return runner.ran_on
