"""Does each adapter of a package do what it does in PyTorch, whichever was on before it?

For every adapter: it is the one that was trained, all of it (its tensors against PEFT's modules), it is asked and
stopped as in training, its logits and answers are PyTorch's, and its effect is neither lost nor scaled. Then across
adapters: switching among them leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from slmops import progress
from slmops.errors import BadArtifact
from slmops.graph import carrying
from slmops.graph.linears import load_graph
from slmops.graph.lora import A, B, Slot, slots
from slmops.graph.rewriting import ADAPTED, FAST
from slmops.runtime import adapter_files, hugging_face
from slmops.runtime.package import adapter_facts
from slmops.verification import behaviour, surface
from slmops.verification.bars import Bars
from slmops.verification.self_test import TOLERANCES
from slmops.verification.stages import Stage, Status, Verdict, concluded, exactly
from slmops.verification.subject import Subject, adapter_subject
from slmops.verification.texts import OPENINGS

# Of a pair's product against PEFT's, relative: float32 holds both to 1e-7; an int8 copy is 5e-3 away.
_TENSOR_BAR = 1e-5
_SWITCHES = 50


def check_adapters(base: Subject, bars: Bars) -> Stage:
    """Prove the adapters of a package, one after the other, and then that they do not touch each other."""
    if not base.adapters or base.opened is None:
        return Stage("adapters", "skipped", "the package has no runtime adapters")
    chosen = list(dict.fromkeys(base.settings.adapter or base.adapters))  # named twice, it would be alike to itself
    figures: dict[str, Any] = {}
    stages = []
    for name in chosen:
        stage = _check_one(base, name, bars)
        progress.say(f"adapter {name}: {stage.status}")
        figures[name] = stage.figures
        stages.append(Verdict(stage.status, f"{name}: {stage.explanation}"))
        if stage.status == "fail":
            return Stage("adapters", "fail", stages[-1].text, figures, stage.bars)
    verdicts = [*stages, *_cross_talk(base, chosen, figures)]
    outcome = _worst({verdict.status for verdict in verdicts})
    shown = "\n".join(verdict.text for verdict in verdicts if verdict.status == outcome)
    return Stage("adapters", outcome, shown, figures, {"tensors": _TENSOR_BAR, "cross_talk": 0.0})


def _check_one(base: Subject, name: str, bars: Bars) -> Stage:
    """Run the checks of one adapter until one fails; the figures of all that were run stand in the stage."""
    try:
        subject = adapter_subject(base, name)
    except BadArtifact as error:
        return Stage("adapters", "fail", f"{error.message}: {error.hint}")
    checks: tuple[Callable[[], Stage], ...] = (
        lambda: _check_origin(subject, name),
        lambda: _check_tensors(subject, name),
        lambda: surface.check_template(subject),
        lambda: surface.check_stop_tokens(subject),
        lambda: _check_runtime(subject),
        lambda: behaviour.check_logits(subject, bars),
        lambda: _check_effect(subject),
        lambda: behaviour.check_text(subject, bars),
    )
    figures: dict[str, Any] = {}
    done = []
    for check in checks:
        stage = check()
        figures[stage.name] = stage.document()["figures"]
        done.append(stage)
        if stage.status == "fail":
            break
    reference = subject.__dict__.pop("reference", None)
    if reference is not None:
        reference.close()
    outcome = _worst({stage.status for stage in done})
    return Stage("adapters", outcome, "; ".join(f"{s.name}: {s.explanation}" for s in done if s.status == outcome), figures)


def _worst(statuses: set[Status]) -> Status:
    return "fail" if "fail" in statuses else "inconclusive" if "inconclusive" in statuses else "pass"


def _check_origin(subject: Subject, name: str) -> Stage:
    """See that the file is of this base, and of an adapter whose effect pairs can carry whole."""
    assert subject.found is not None and subject.base is not None
    details = adapter_facts(subject.found, name)
    problems = carrying.uncarried(hugging_face.read_adapter_config(subject.baseline))
    trained_on = subject.baseline_found.manifest.input("base") if subject.baseline_found is not None else None
    recorded = subject.found.manifest.input("baseline")
    if recorded is not None and details["base"] != recorded.sha256:
        problems.append("it was packed for another base")
    if recorded is not None and trained_on is not None and trained_on.sha256 != recorded.sha256:
        problems.append("it was trained on another base")
    figures = {"problems": problems}
    if problems:
        return Stage("origin", "fail", f"{'; '.join(problems)}: pack an adapter of this base", figures, {"problems": 0})
    return Stage("origin", "pass", "trained on this base", figures, {"problems": 0})


def _check_tensors(subject: Subject, name: str) -> Stage:
    """Compare every pair of the file with PEFT's own modules: `scaling * B @ A` of each parameter."""
    assert subject.found is not None
    bars = {"difference": _TENSOR_BAR}
    tensors = adapter_files.read_adapter(subject.package / adapter_facts(subject.found, name)["file"])
    wrong = adapter_files.problems(tensors, adapter_files.widths(subject.found.manifest.facts["slots"]))
    if wrong:
        return Stage("tensors", "fail", f"{'; '.join(wrong[:3])}: pack it again", {"problems": wrong}, bars)
    assert subject.base is not None
    products = dict(
        item
        for slot in slots(load_graph(subject.graph_path), hugging_face.parameter_shapes(subject.base))
        for item in _file_products(slot, tensors)
    )
    energy = inner = error = 0.0
    missing, changed = [], 0
    for parameter, wanted in _products(subject.reference).items():
        product = products.pop(parameter, np.zeros_like(wanted))
        changed += bool(np.any(wanted))
        missing += [parameter] if np.any(wanted) and not np.any(product) else []
        energy += float(np.vdot(wanted, wanted))
        inner += float(np.vdot(product, wanted))
        error += float(((product - wanted) ** 2).sum())
    extra = sorted(products)
    difference = float(np.sqrt(error / energy)) if energy else float("inf")
    figures = {"difference": difference, "scale": inner / energy if energy else 0.0, "missing": missing, "extra": extra}
    text = _tensor_problem(figures, energy, error, all_missing=len(missing) == changed)
    if text:
        return Stage("tensors", "fail", f"{text}: pack it again", figures, bars)
    return Stage("tensors", "pass", f"all pairs are PEFT's, to {difference:.1g}", figures, bars)


def _tensor_problem(figures: dict[str, Any], energy: float, error: float, *, all_missing: bool) -> str:
    """Say in words how the tensors differ; empty where they do not."""
    difference, scale, missing, extra = (figures[key] for key in ("difference", "scale", "missing", "extra"))
    if not energy:
        return "the adapter that was trained is zero: it has no effect"
    if all_missing:
        return "its tensors are zero: it has no effect"
    if missing:
        return f"{len(missing)} pairs that were trained are not in the file, such as {missing[0]}"
    if extra:
        return f"{len(extra)} pairs in the file were not trained, such as {extra[0]}"
    if difference <= _TENSOR_BAR:
        return ""
    residual = max(0.0, error - (scale - 1) ** 2 * energy) / energy
    if np.sqrt(residual) < 0.01 and abs(scale - 1) > 0.02:
        return f"its effect is scaled by {scale:.3g}"
    if difference < 0.2:
        return f"its tensors are PEFT's but for {difference:.2g} of their size: rounded (quantized?), and they are to stay in float"
    return f"its tensors are others than those that were trained (they differ by {difference:.2g} of their size)"


def _products(reference: Any) -> dict[str, np.ndarray]:
    """Return what PEFT adds to each parameter, (outputs, inputs), read from its modules in memory."""
    result = {}
    for name, module in reference.model.named_modules():
        for key in getattr(module, "lora_A", {}):
            a, b = module.lora_A[key].weight.detach().float(), module.lora_B[key].weight.detach().float()
            result[name.removeprefix("base_model.model.") + ".weight"] = (module.scaling[key] * (b @ a)).numpy()
    return result


def _file_products(slot: Slot, tensors: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """Return what a file adds to each parameter that one pair changes."""
    if slot.name + A not in tensors:
        return []
    product, start, result = tensors[slot.name + B] @ tensors[slot.name + A].T, 0, []
    for parameter, rows in slot.parts:
        if np.any(tensors[slot.name + B][start : start + rows]):
            result.append((parameter, product[start : start + rows]))
        start += rows
    return result


def _check_runtime(subject: Subject) -> Stage:
    """Hold onnxruntime-genai's Generator, which switches adapters on a device, against the graph with the adapter's tensors."""
    prompts = _prompts(subject)
    if not prompts:
        return Stage("runtime", "skipped", "no prompts are known")
    runner = subject.genai_candidate
    differences = [float(np.abs(runner.runtime_logits(ids) - runner.next_logits(ids)).max()) for ids in prompts]
    figures: dict[str, Any] = {"prompts": len(prompts), "largest_difference": max(differences), "graph": runner.graph}
    bars = {"largest_difference": 1e-3}
    verdicts = [exactly("logits of the runtime, with the adapter on, against the graph's", max(differences), 1e-3)]
    if runner.graph == FAST:
        # What runs where no compiler is: the same products, rounded to 8 bits elsewhere, as between two processors.
        bars["largest_difference_of_graphs"] = bar = TOLERANCES.get(subject.precision, 1.0)
        others = [float(np.abs(runner.portable_logits(ids) - runner.next_logits(ids)).max()) for ids in prompts]
        figures["largest_difference_of_graphs"] = max(others)
        verdicts.append(exactly(f"logits of {ADAPTED} against {FAST}'s", max(others), bar))
    return concluded("runtime", verdicts, figures, bars, "the runtime does not apply the adapter as it should")


def _check_effect(subject: Subject) -> Stage:
    if not subject.corpus.sequences:
        return Stage("effect", "inconclusive", "no held-out rows are known: give some with --data")
    figures: dict[str, Any] = {}
    chosen = behaviour.few(subject.corpus.sequences)
    verdicts = [behaviour.twin_verdict(subject, chosen, figures), behaviour.effect_verdict(subject, chosen, figures)]
    bar = subject.settings.effect_bar
    bars = {"twin_kl": subject.settings.twin_bar, "effect": [1 - bar, 1 + bar]}
    return concluded("effect", verdicts, figures, bars, "the adapter does not do in the package what it does in PyTorch")


def _cross_talk(base: Subject, names: list[str], figures: dict[str, Any]) -> list[Verdict]:
    """Switch among the adapters and the base, at random, through the device's runtime: each gives its own logits bit for bit."""
    assert base.opened is not None
    prompt = next(iter(_prompts(base)), base.tokenizer.encode(OPENINGS[0]))
    states: list[str | None] = [None, *names]
    own = {name: base.opened.runner(name).runtime_logits(prompt) for name in states}
    alone = base.opened.runner(None).next_logits(prompt)
    random = np.random.default_rng(0)
    order = [*names, *names, None, *(states[i] for i in random.integers(0, len(states), _SWITCHES))]
    changed = []
    with progress.task("switch adapters", total=len(order)) as task:
        for name in order:
            if not np.array_equal(base.opened.runner(name).runtime_logits(prompt), own[name]):
                changed.append(name or "base")
            task.advance()
    same = sum(np.array_equal(own[a], own[b]) for i, a in enumerate(states) for b in states[:i])
    base_moved = float(np.abs(own[None] - alone).max())
    figures["cross_talk"] = {"switches": len(order), "changed": changed, "states_alike": same, "base_moved": base_moved}
    return [
        exactly(f"logits that changed in {len(order)} switches", len(changed), 0),
        exactly("adapters that compute what another does", same, 0),
        exactly("logits of the base after adapters were on", base_moved, 1e-3),
    ]


def _prompts(subject: Subject) -> list[list[int]]:
    """Return up to four beginnings of the sequences that are compared: what comes before the first counted token."""
    sequences = subject.corpus.sequences[:: max(1, len(subject.corpus.sequences) // 4)][:4]
    limit = subject.candidate.max_length_tokens - 1
    return [sequence.ids[: max(2, min(sequence.prompt_tokens, limit))] for sequence in sequences]
