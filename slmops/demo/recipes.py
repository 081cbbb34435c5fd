"""What are the recipes of the folder `adapters/`, and how do their steps stand in a pipeline?

Every recipe trains one adapter on the demo's base model, packs it, and holds it against its gate before and after. The pipeline files in `adapters/`
are written from here (`python -m slmops.demo.recipes adapters`), and `quickstart` puts the same steps into its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BASE = "household"
"""Name of the step that makes the base model and the rows."""
PRECISION = "int4"
"""Of the package, where nobody says otherwise."""
_HEAD = """\
# Written by `python -m slmops.demo.recipes adapters`: change it there, or copy it.
# Run it with `slmops run {file}`; steps that have not changed are skipped.

out: ../runs                # shared by the recipes of this base, which is made once; one folder or one .json a step

steps:
"""
_BASE_STEPS = """\
  {base}:                # -> a tiny base model, trained from scratch on generated text, and the rows of three tasks
    {{verb: demo, seed: {seed}}}
  {quantized}:{pad}# base -> export: quantized once; what a device will have
    {{verb: export, use: {base}, precision: {precision}}}
"""
_STEPS = """\
  {name}:{pad}# base + rows -> adapter: {purpose}
    verb: finetune
    use: {base}
    data: {base}/data/train.jsonl
    validation: {base}/data/validation.jsonl
    prompt_template: "{{text}}\\n{prompt}:"
    completion_template: " {{{column}}}"
{method}    learning_rate: {learning_rate:g}
    epochs: {epochs}
    seed: {seed}
  {name}_before:{short_pad}# what the base does on the task without the adapter
    {{verb: evaluate, use: {name}, base: true, data: {base}/data/test.jsonl}}
  {name}_after:{short_pad} # what it does with it
    {{verb: evaluate, use: {name}, data: {base}/data/test.jsonl, gate: {{exact_match: {gate:g}}}}}
"""
_PACKAGE_STEPS = """\
  {package}:{pad}# export + adapters -> package: each adapter a small file, switched per request
    {{verb: pack, use: {quantized}, adapter: {{{adapters}}}}}
  {package}_proof:{proof_pad}# base and adapters of the package against PyTorch, stage by stage, and its self-test
    {{verb: verify, use: {package}, data: {{{rows}}}, metric: exact_match}}
"""
_PACKED_STEP = """\
  {name}_packed:{pad}# the adapter as the package runs it
    {{verb: evaluate, use: {package}, adapter: {name}, data: {base}/data/test.jsonl, gate: {{exact_match: {gate:g}}}}}
"""


@dataclass(frozen=True)
class Recipe:
    """One adapter of the demo: a task, what it is trained with, and the bar that it must meet."""

    name: str
    """Of its step, and of the adapter in a package."""
    purpose: str
    column: str
    """The column of the rows that is learned."""
    prompt: str
    """What stands after the text, before a colon."""
    rank: int
    targets: tuple[str, ...]
    """Layers that it adapts; empty for all linear layers."""
    learning_rate: float
    epochs: int
    gate: float
    """Lowest exact match on the test rows, in PyTorch."""
    on_quantized: bool = False
    """It learns on the weights of the quantized base, so that it answers in the package as it did in training, token for token."""

    @property
    def folder(self) -> str:
        """Its folder in `adapters/`."""
        return f"{BASE}_{self.name}"

    def steps(self, seed: int = 0, precision: str = PRECISION) -> str:
        """Return its steps as YAML, to stand under `steps:` after the base's."""
        method = f"    lora_rank: {self.rank}\n"
        if self.targets:
            method += f"    target_modules: [{', '.join(self.targets)}]\n"
        if self.on_quantized and precision != "fp32":
            method += f"    quantized_base: {quantized_step(precision)}\n"
        return _STEPS.format(
            base=BASE,
            seed=seed,
            name=self.name,
            purpose=self.purpose,
            prompt=self.prompt,
            column=self.column,
            method=method,
            learning_rate=self.learning_rate,
            epochs=self.epochs,
            gate=self.gate,
            pad=" " * (25 - len(self.name)),
            short_pad=" " * (18 - len(self.name)),
        )

    def pipeline(self) -> str:
        """Return its pipeline file."""
        head = _HEAD.format(file=f"adapters/{self.folder}/pipeline.yaml")
        return head + base_steps() + self.steps() + package_steps((self,), f"{self.name}_package")


RECIPES = (
    Recipe("intent", "which of eight things is meant", "intent", "Intent", 16, (), 2e-3, 1, 0.95),
    Recipe("slots", "the details, as a JSON object", "slots", "Slots", 8, (), 4e-3, 3, 0.9, on_quantized=True),
    Recipe("replies", "a butler's answer", "reply", "Reply", 4, ("q_proj", "v_proj"), 4e-3, 1, 0.9),
)
"""Different ranks and layers on purpose: a package must carry them side by side."""


def quantized_step(precision: str) -> str:
    """Return the name of the step that exports the base in some precision."""
    return f"{BASE}_{precision}"


def base_steps(seed: int = 0, precision: str = PRECISION) -> str:
    """Return the steps that every recipe starts from, the base and its export, as YAML."""
    quantized = quantized_step(precision)
    return _BASE_STEPS.format(base=BASE, seed=seed, quantized=quantized, precision=precision, pad=" " * (25 - len(quantized)))


def package_steps(recipes: Sequence[Recipe], package: str, precision: str = PRECISION) -> str:
    """Return the steps that pack the adapters of some recipes, prove the package, and hold each to its gate again, as YAML."""
    steps = _PACKAGE_STEPS.format(
        base=BASE,
        package=package,
        adapters=", ".join(f"{recipe.name}: {recipe.name}" for recipe in recipes),
        rows=", ".join(f"{recipe.name}: {BASE}/data/test.jsonl" for recipe in recipes),
        quantized=quantized_step(precision),
        pad=" " * (25 - len(package)),
        proof_pad=" " * (19 - len(package)),
    )
    for recipe in recipes:
        steps += _PACKED_STEP.format(base=BASE, package=package, name=recipe.name, gate=recipe.gate, pad=" " * (18 - len(recipe.name)))
    return steps


def write_pipelines(folder: Path) -> None:
    """Write the pipeline file of every recipe under `folder`."""
    for recipe in RECIPES:
        place = folder / recipe.folder
        place.mkdir(parents=True, exist_ok=True)
        (place / "pipeline.yaml").write_text(recipe.pipeline(), encoding="utf-8")


if __name__ == "__main__":
    write_pipelines(Path(sys.argv[1]))
