"""Does a package still compute on this device what it computed when it was made? No PyTorch, no data, a few seconds.

When a package is made, the graph that ships answers a few prompts, for the base and with each adapter on. The ids of the
prompts, the first tokens and the largest logits of the first one lie beside the graphs. On the device the same prompts
are run by the device's own runtime: another processor's kernels sum in another order, so logits have a tolerance, and a
token may differ where the two most likely ones were within it. A lost adapter, another's file or a wrong stop token are
units away.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmops import artifact, progress
from slmops.artifact import Artifact
from slmops.data import Interface, Tokenizer, encode_prompt, read_rows, row_format_of
from slmops.errors import BadArtifact, SlmopsError, Unavailable
from slmops.runtime.decoder import greedy
from slmops.runtime.package import Package
from slmops.runtime.runner import ExportRunner
from slmops.verification.stages import Stage
from slmops.verification.texts import OPENINGS

FILE = "self_test.json"
_NEW_TOKENS = 8
_OTHER_OPENINGS_TOKENS = 1
"""Of openings after the first: what a model makes of a text that nobody asked it about says no more with every token."""
_PROMPTS, _OPENING_TOKENS = 4, 32
_TOP = 5
# Largest difference of a logit between two processors. Quantized layers round their activations to 8 bits: a sum in
# another order can flip a rounding (int4 of a 3M model: 0.5 between the kernels of one machine).
# 16 bits: a logit of 25 is stored in steps of 0.016 (float16) or 0.125 (bfloat16), and what it is made of was rounded as coarsely.
TOLERANCES = {"fp32": 0.01, "fp16": 0.2, "bf16": 1.0, "int8": 0.5, "int4": 1.0}


def record(folder: Path, interface: Mapping[str, Any] | None, facts: Mapping[str, Any], prompts: Mapping[str, Sequence[list[int]]]) -> None:
    """Write the self-tests of a package: its base's, and one beside the file of each adapter.

    Args:
        folder: being written; its manifest need not be there.
        interface: of the base.
        facts: `precision`, and of a package `slots` and `adapters`.
        prompts: ids of prompts by adapter, "" for the base; where there are none, the openings that slmops brings.

    Raises:
        Unavailable: the runtime cannot run the graph; this is the first time that it is asked to.
    """
    try:
        _record(folder, interface, facts, prompts)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise Unavailable(
            f"the graph was built, and the runtime cannot run it: {reason}", "take a model of another architecture or shape"
        ) from error


def _record(
    folder: Path, interface: Mapping[str, Any] | None, facts: Mapping[str, Any], prompts: Mapping[str, Sequence[list[int]]]
) -> None:
    package = Package.of_parts(folder, interface, facts, prepacking=_pays_to_pack(facts))
    openings = _openings(package.tokenizer, package.interface())
    tolerance = TOLERANCES.get(str(facts["precision"]), 1.0)
    adapters: list[str | None] = [name for name in prompts if name]
    # The base and the adapters run two graphs: one at a time is loaded.
    groups = [[None], adapters] if not (folder / FILE).is_file() else [adapters]
    with progress.task("record the self-test", total=sum(map(len, groups))) as task:
        for names in groups:
            for name in names:
                path = folder / (_file_of(package.found, name) if name else FILE)
                given = prompts.get(name or "")
                counts = [_NEW_TOKENS] * len(given) if given else [_NEW_TOKENS, *[_OTHER_OPENINGS_TOKENS] * (len(openings) - 1)]
                cases = _cases(package, name, list(zip(given or openings, counts, strict=True)))
                artifact.write_json(path, {"tolerance": tolerance, "cases": cases})
                task.advance()
            package.close()


def prompts_of(adapter: Path, base: Path, interface: Interface) -> list[list[int]]:
    """Return the ids of a few prompts of an adapter's validation rows; of plain text, its beginnings. Empty where it has none."""
    file = adapter / "validation.jsonl"
    if not file.is_file() or not file.stat().st_size:
        return []
    rows = read_rows(file)
    rows = rows[:: max(1, len(rows) // _PROMPTS)][:_PROMPTS]
    tokenizer = Tokenizer.load(adapter if (adapter / "tokenizer.json").is_file() else base)
    row_format = row_format_of(rows, interface)
    if row_format != "text":
        return [encode_prompt(row, tokenizer, interface, row_format) for row in rows]
    start = [] if interface.bos_token_id is None else [interface.bos_token_id]
    return [[*start, *tokenizer.encode(str(next(iter(row.values()))))[:_OPENING_TOKENS]] for row in rows]


def check_self_test(folder: Path, found: Artifact | None, adapters: Sequence[str] | None, threads: int | None = None) -> Stage:
    """Run the self-tests that a package carries.

    Args:
        folder: the package.
        found: its artefact.
        adapters: those to test, by name; None: all, and the base.
        threads: of the runtime.
    """
    if found is None or not (folder / FILE).is_file():
        return Stage("self_test", "skipped", "the package carries no self-test")
    package = Package(folder, threads=threads)
    names: list[str | None] = list(adapters) if adapters is not None else [None, *package.adapters]
    figures: dict[str, Any] = {}
    failures = []
    with progress.task("self-test", total=len(names)) as task:
        for name in names:
            key = name or "base"
            try:
                content = json.loads((folder / (_file_of(found, name) if name else FILE)).read_text(encoding="utf-8"))
                figures[key], wrong = _run(package.engine_runner(name), content, package.interface(name))
            except BadArtifact as error:
                figures[key], wrong = {}, [error.message]
            except (OSError, ValueError, LookupError, TypeError, SlmopsError) as error:
                figures[key], wrong = {}, [f"its self-test cannot be run: {error!r}"]
            failures += [f"{key}: {text}" for text in wrong]
            task.advance()
    package.close()
    if failures:
        advice = "copy the package again; if it stays so, this device computes otherwise: export for it"
        return Stage("self_test", "fail", f"{'; '.join(failures[:4])}: {advice}", figures, {"failures": 0})
    count = sum(figure["cases"] for figure in figures.values())
    largest = max(figure["largest_difference"] for figure in figures.values())
    return Stage(
        "self_test", "pass", f"{count} prompts answered as when the package was made; logits within {largest:.2g}", figures, {"failures": 0}
    )


def _pays_to_pack(facts: Mapping[str, Any]) -> bool:
    """Return whether onnxruntime should lay the weights out for its kernels before a few tokens are computed.

    Of float32 weights that is a copy of most of them (0.5B: 7 s of loading, and 1 s without), and the products are the same, to
    6e-6 of a logit. Quantized ones have no other fast kernel. Who checks a self-test loads the package as whoever uses it does.
    """
    return facts.get("precision") != "fp32"


def _cases(package: Package, name: str | None, prompts: Sequence[tuple[list[int], int]]) -> list[dict[str, Any]]:
    """Return what a runner answers to prompts, each with so many tokens and cut to what fits, with the logits that it chose by."""
    runner, stops = package.engine_runner(name), list(package.interface(name).stop_token_ids)
    cases = []
    for prompt, count in prompts:
        ids = list(prompt[-max(1, runner.max_length_tokens - _NEW_TOKENS) :])
        tokens: list[int] = []
        steps: list[np.ndarray] = []
        for logits in runner.greedy_logits(ids, min(count, runner.max_length_tokens - len(ids))):
            steps.append(logits)
            tokens.append(int(greedy(logits)))
            if tokens[-1] in stops:
                tokens.pop()
                break
        top = np.argsort(-steps[0], kind="stable")[:_TOP]
        cases.append(
            {
                "prompt": ids,
                "new_tokens": count,
                "stop_tokens": stops,
                "tokens": tokens,
                "margins": [round(_margin(logits), 4) for logits in steps],
                "logits": {str(int(token)): round(float(steps[0][token]), 5) for token in top},
            }
        )
    return cases


def _run(runner: ExportRunner, content: Mapping[str, Any], interface: Interface) -> tuple[dict[str, Any], list[str]]:
    """Return figures, and what is wrong."""
    tolerance, largest, wrong = float(content["tolerance"]), 0.0, [] if content["cases"] else ["its self-test has no prompts"]
    for number, case in enumerate(content["cases"], 1):
        logits = next(runner.greedy_logits(case["prompt"], 1))
        difference = max(abs(float(logits[int(token)]) - value) for token, value in case["logits"].items())
        largest = max(largest, difference)
        if difference > tolerance:
            wrong.append(f"prompt {number}: a logit differs by {difference:.3g}, and {tolerance:g} is allowed")
            continue
        if list(interface.stop_token_ids) != case["stop_tokens"]:
            wrong.append(f"prompt {number}: the answer stops at {list(interface.stop_token_ids)}, and {case['stop_tokens']} were recorded")
            continue
        count = case.get("new_tokens", _NEW_TOKENS)  # of each, before 2026-11-22
        tokens = list(runner.stream(case["prompt"], max_new_tokens=count, stop_token_ids=interface.stop_token_ids))
        at = next((i for i, (a, b) in enumerate(zip([*tokens, -1], [*case["tokens"], -1], strict=False)) if a != b), None)
        if at is not None and case["margins"][min(at, len(case["margins"]) - 1)] > tolerance:
            wrong.append(f"prompt {number}: token {at + 1} of the answer is another one")
    return {"cases": len(content["cases"]), "largest_difference": largest, "tolerance": tolerance}, wrong


def _margin(logits: np.ndarray) -> float:
    """Return how far the most likely token is above the next."""
    second, first = np.partition(logits, -2)[-2:]
    return float(first - second)


def _openings(tokenizer: Tokenizer, interface: Interface) -> list[list[int]]:
    start = [] if interface.bos_token_id is None else [interface.bos_token_id]
    return [[*start, *tokenizer.encode(text)] for text in OPENINGS]


def _file_of(found: Artifact, name: str) -> str:
    return found.manifest.facts["adapters"][name]["file"].rpartition(".")[0] + "." + FILE
