"""Is the graph the one that was asked for, and is the fine-tune still in its weights?

`retention`, in weight space and without data: the share p of the fine-tune in each adapted layer (`slmops.graph.survival`).
It is 1 when the fine-tune is there, 0 when it is gone (merged into a coarse grid and rounded off, dropped, the base passed
off), 1.5 when it was scaled so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from slmops import progress
from slmops.graph import checking, kernels
from slmops.graph.linears import load_graph
from slmops.graph.rewriting import FULL, MAIN
from slmops.graph.stored_weights import StoredWeights
from slmops.graph.survival import Share, pooled, share_of
from slmops.runtime.hugging_face import parameter_shapes
from slmops.runtime.providers import load_problem
from slmops.verification.stages import Stage, Verdict, within
from slmops.verification.stored import Stored
from slmops.verification.subject import Subject
from slmops.verification.texts import PROBES

_LAYER_BAND = 0.2
_NOISE_WIDTHS = 3


def check_graph(subject: Subject) -> Stage:
    """Compare the graph with the manifest's recipe, the baseline's layers, and its twin."""
    facts = subject.found.manifest.facts if subject.found is not None else None
    problems = subject.stored.problems(facts, parameter_shapes(subject.baseline))
    if subject.adapters:
        problems += checking.adapter_problems(subject.package)
    if subject.target is not None and subject.target.provider in kernels.PROVIDERS:
        problems += [line for name in (MAIN, FULL) if (line := load_problem(subject.package / name)) is not None]
    if not problems:  # what cannot run is not run
        problems += _last_token_problems(subject)
    schemes = subject.stored.schemes
    figures = {"layers": sum(schemes.values()), "schemes": schemes, "problems": problems[:20]}
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        return Stage("graph", "fail", f"{'; '.join(problems[:3])}{more}: export again", figures, {"problems": 0})
    shown = ", ".join(f"{count} layers of {key}" for key, count in schemes.items())
    if subject.target is not None and subject.target.provider in kernels.PROVIDERS:
        placed = kernels.placement(load_graph(subject.graph_path))
        figures |= {"nodes_of_the_provider": placed.provider, "integer_nodes": placed.host}
        shown += f"; {subject.target.provider} has kernels for all {placed.provider} nodes that compute with floats"
    return Stage("graph", "pass", f"{shown}, as the recipe says", figures, {"problems": 0})


def _last_token_problems(subject: Subject) -> list[str]:
    """The graph that ships gives the last token's logits; they must be those of its twin, which the proof uses."""
    if not ((subject.package / FULL).is_file() and (subject.package / MAIN).is_file()):
        return []
    from slmops.runtime.decoder import Cache

    main, full = subject.genai_candidate.shipped, subject.candidate
    sequences = [sequence.ids for sequence in subject.corpus.sequences] or [subject.tokenizer.encode(text) for text in PROBES[4:8]]
    rows = [ids[: full.max_length_tokens] for ids in sequences[:: max(1, len(sequences) // 4)][:4]]
    largest = 0.0
    for row, expected in zip(rows, full.logits(rows), strict=True):
        found = main.run(np.array([row]), np.array([len(row)]), Cache(main, 1, len(row)).arrays)[0, -1]
        largest = max(largest, float(np.abs(found - expected[-1]).max()))
    # The cut changes the order of no sum but the head's and one MLP's, whose kernels depend on the number of rows.
    bar = 1e-3 if subject.precision == "fp32" else 2.0
    return [f"the last token's logits differ by {largest:.2g} between {MAIN} and its twin"] if largest > bar else []


def shares(stored: Stored, tuned: Path, base: Path) -> list[Share]:
    """Measure the fine-tune's share in every layer that it changed.

    Args:
        stored: what the package stores.
        tuned: the baseline, merged, in float.
        base: the model before the fine-tune.
    """
    after, before = StoredWeights(tuned), StoredWeights(base)
    result: list[Share] = []
    with progress.task("retention in the weights", total=sum(stored.schemes.values()), unit="layers") as task:
        for name, package, steps in stored.parts(parameter_shapes(tuned)):
            share = share_of(name.removesuffix(".weight"), package, before[name], after[name], steps)
            if share is not None:
                result.append(share)
            task.advance()
    return result


def changed_vectors(tuned: Path, base: Path) -> list[str]:
    """Return the biases and other vectors that a fine-tune changed or added; no export quantizes them."""
    after, before = StoredWeights(tuned), StoredWeights(base)
    vectors = [name for name in after if after[name].ndim == 1]
    return [
        name
        for name in vectors
        if (name in before or after[name].any()) and not (name in before and np.array_equal(after[name], before[name]))
    ]


def weight_verdicts(found: list[Share], bar: float) -> tuple[list[Verdict], dict[str, Any], dict[str, Any]]:
    """Hold the shares, pooled and layer by layer, against their bars; return verdicts, figures and bars."""
    p, noise = pooled(found)
    worst = max(found, key=lambda s: abs(s.p - 1) - _NOISE_WIDTHS * s.noise)
    verdicts = [within("p, pooled", p, 1 - bar, 1 + bar)]
    band = _LAYER_BAND + _NOISE_WIDTHS * worst.noise
    verdicts.append(within(f"p, worst layer ({worst.layer})", worst.p, round(1 - band, 3), round(1 + band, 3)))
    figures = {
        "p": p,
        "p_noise": noise,
        "layers": {s.layer: {"p": s.p, "noise": s.noise} for s in found},
    }
    return verdicts, figures, {"p": [1 - bar, 1 + bar], "p_layer": [1 - _LAYER_BAND, 1 + _LAYER_BAND]}
