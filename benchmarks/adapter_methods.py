"""Print what becomes of each kind of adapter that PEFT makes: `python benchmarks/adapter_methods.py MODEL`.

Each is made by PEFT on MODEL with parameters that have an effect, and held against the model as PEFT has it in memory:
once packed (as a runtime adapter on fp32 graphs), once merged and exported to fp32. Either is right, or it is refused with
exit code 3 and the way out that is named then works. A Markdown table; exit code 1 where that is not so. Used by
`tests/test_adapter_methods.py` too.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import slmops
from slmops.errors import SlmopsError
from slmops.runtime.hugging_face import load_model
from slmops.runtime.package import Package

HEADER = "| method | effect | pack | merge, then export | way out |\n| --- | --- | --- | --- | --- |"
# Of logits in float32 against PyTorch: the order of sums is 1e-12. Where random parameters throw a model about so that PyTorch itself is further
# from its own numbers in float64, that many times as far. An adapter that moved the logits by less than the last figure proves nothing.
NMSE, TIMES_ITS_ROUNDING = 1e-10, 10
LEAST_EFFECT = 1e-3
_TOKENS = 36


@dataclass(frozen=True)
class Method:
    """One kind of adapter."""

    name: str
    make: Callable[[Any], Any]
    """From the base in memory to PEFT's config."""


@dataclass(frozen=True)
class Road:
    """What became of an adapter on one road: a figure, or a refusal."""

    nmse: float | None = None
    refusal: SlmopsError | None = None
    rounding: float = 0.0
    """NMSE of PyTorch's float32 against its float64."""

    @property
    def right(self) -> bool:
        """It computes what PEFT computes."""
        return self.nmse is not None and self.nmse <= max(NMSE, TIMES_ITS_ROUNDING * self.rounding)

    @property
    def acceptable(self) -> bool:
        """It is right, or refused as unavailable."""
        return self.right or (self.refusal is not None and self.refusal.exit_code == 3)

    def cell(self, verb: str) -> str:
        """Return the table's cell."""
        if self.refusal is not None:
            return f"exit {self.refusal.exit_code}: {_short(self.refusal.message)}"
        beside = f" (PyTorch's own rounding {self.rounding:.0e})" if self.right and self.nmse is not None and self.nmse > NMSE else ""
        return f"{verb}, NMSE {self.nmse:.0e}{beside}" if self.right else f"**WRONG, NMSE {self.nmse:.1g}**"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    effect: float
    """NMSE of the adapted logits against the base's: what would go unnoticed if it were small."""
    packed: Road
    merged: Road

    @property
    def problems(self) -> list[str]:
        """What of this line is not as promised."""
        lines = [] if self.effect >= LEAST_EFFECT else [f"the adapter has no effect ({self.effect:.1g}): nothing is proven"]
        lines += [] if self.packed.acceptable else [f"pack: {self.packed.cell('carried')}"]
        lines += [] if self.merged.acceptable else [f"merge, export: {self.merged.cell('merged')}"]
        if self.points_to_merge and not self.merged.right:
            lines.append("pack says to merge it, and that does not work")
        if self.packed.refusal is not None and not self.points_to_merge and self.merged.right:
            lines.append("merging works, and pack does not say so")
        return lines

    @property
    def points_to_merge(self) -> bool:
        """Pack refused it and said to merge it."""
        return self.packed.refusal is not None and "slmops merge" in self.packed.refusal.hint

    def line(self) -> str:
        """Return it in Markdown."""
        way = "" if self.packed.refusal is None else "merge" if self.points_to_merge else _short(self.packed.refusal.hint)
        return f"| {self.method} | {self.effect:.2g} | {self.packed.cell('carried')} | {self.merged.cell('right')} | {way} |"


def rows_of(model: Path, scratch: Path, chosen: tuple[Method, ...] | None = None) -> Iterator[Row]:
    """Yield the table's lines for a base model.

    Args:
        model: its folder.
        scratch: folder to work in.
        chosen: methods; None: all.
    """
    package = scratch / "package"
    if not package.exists():
        slmops.pack(model, out=package, precision="fp32")
    for method in chosen or METHODS:
        place = scratch / method.name.replace(" ", "-")
        expected, effect, rounding = make_adapter(place / "adapter", model, method)
        packed = _road(lambda place=place: _packed(package, place / "adapter"), expected, rounding)
        merged = _road(lambda place=place: _merged(place), expected, rounding)
        shutil.rmtree(place)
        yield Row(method.name, effect, packed, merged)


def make_adapter(folder: Path, model: Path, method: Method) -> tuple[np.ndarray, float, float]:
    """Write an adapter with random parameters.

    Returns:
        The logits of the model in memory, how far they are from the base's, and how far from its own in float64.
    """
    import torch
    from peft import get_peft_model

    torch.manual_seed(0)
    network: Any = load_model(model).eval()
    base = logits(network)
    adapted: Any = get_peft_model(network, method.make(network))
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            _disturb(name, weight)
    expected = logits(adapted.eval())
    adapted.save_pretrained(folder)
    return expected, float(_nmse(expected, base)), float(_nmse(expected, logits(adapted.double())))


def logits(network: Any) -> np.ndarray:
    """Return the logits for the tokens that all sides are asked."""
    import torch

    with torch.no_grad():
        return network(torch.tensor([_ids(network.config.vocab_size)])).logits[0, -_TOKENS:].float().numpy()


def _disturb(name: str, weight: Any) -> None:
    """Give a parameter a value that training might: what begins at zero is not zero, what begins at one is not one."""
    import torch

    noise = torch.randn_like(weight)
    with torch.no_grad():
        if "magnitude_vector" in name or "ia3" in name or "modules_to_save" in name or "trainable_tokens" in name:
            weight.mul_(1 + 0.3 * noise)
        elif "prompt_encoder" in name:
            weight.copy_(noise)
        else:
            weight.add_(0.1 * noise)


def _packed(package: Path, adapter: Path) -> np.ndarray:
    slmops.pack(package, adapter=[f"it={adapter}"], force=True)
    opened = Package(package, threads=1)
    try:
        return next(opened.runner("it").logits([_ids(opened.runner().vocabulary)]))
    finally:
        opened.close()


def _merged(place: Path) -> np.ndarray:
    slmops.merge(place / "adapter", out=place / "merged")
    slmops.export(place / "merged", out=place / "export", precision="fp32")
    opened = Package(place / "export", threads=1)
    try:
        return next(opened.runner().logits([_ids(opened.runner().vocabulary)]))
    finally:
        opened.close()


def _road(walk: Callable[[], np.ndarray], expected: np.ndarray, rounding: float) -> Road:
    try:
        return Road(nmse=float(_nmse(walk(), expected)), rounding=rounding)
    except SlmopsError as error:
        return Road(refusal=error)


def _short(text: str) -> str:
    """Leave out where the adapter lies, for a table that is the same wherever it is made."""
    return re.sub(r"\S*/adapter\b", "ADAPTER", text).replace("|", "\\|")


def _ids(vocabulary: int) -> list[int]:
    return [1, *np.random.default_rng(0).integers(3, vocabulary, _TOKENS - 1).tolist()]


def _nmse(found: np.ndarray, expected: np.ndarray) -> np.floating:
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return ((found - expected) ** 2).sum() / (expected**2).sum()


def _lora(**settings: Any) -> Callable[[Any], Any]:
    def make(_: Any) -> Any:
        from peft import LoraConfig

        return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings))

    return make


def _peft(kind: str, **settings: Any) -> Callable[[Any], Any]:
    def make(_: Any) -> Any:
        import peft

        return getattr(peft, kind)(task_type="CAUSAL_LM", **settings)

    return make


_TARGETS = ["q_proj", "v_proj", "down_proj"]
METHODS = (
    Method("LoRA", _lora()),
    Method("rsLoRA", _lora(use_rslora=True)),
    Method("rank_pattern", _lora(rank_pattern={"q_proj": 2, "down_proj": 8})),
    Method("alpha_pattern", _lora(alpha_pattern={"q_proj": 3, r"layers\.1\.mlp\.up_proj": 32})),
    Method("some layers", _lora(target_modules=["q_proj", "v_proj"], layers_to_transform=[1])),
    Method("DoRA", _lora(use_dora=True)),
    Method("lora_bias", _lora(lora_bias=True, target_modules=["q_proj", "v_proj"])),
    Method("bias lora_only", _lora(bias="lora_only")),
    Method("modules_to_save head", _lora(modules_to_save=["lm_head"])),
    Method("modules_to_save embedding", _lora(modules_to_save=["embed_tokens"])),
    Method("modules_to_save norm", _lora(modules_to_save=["norm"])),
    Method("LoRA of the embedding", _lora(target_modules=["embed_tokens", "q_proj"])),
    Method("LoRA of the head", _lora(target_modules=["lm_head", "q_proj"])),
    Method("trainable tokens", _lora(trainable_token_indices=list(range(3, 300)))),
    Method("target_parameters", _lora(target_modules=[], target_parameters=["q_proj.weight"])),
    Method("layer_replication", _lora(layer_replication=[[0, 2], [1, 2]])),
    Method("aLoRA", lambda network: _lora(alora_invocation_tokens=[_ids(network.config.vocab_size)[5]])(network)),
    Method("PiSSA", _lora(init_lora_weights="pissa")),
    Method("PiSSA in 4 steps", _lora(init_lora_weights="pissa_niter_4")),
    Method("OLoRA", _lora(init_lora_weights="olora")),
    Method("AdaLoRA", _peft("AdaLoraConfig", init_r=6, target_r=4, total_step=10, target_modules=_TARGETS)),
    Method("LoHa", _peft("LoHaConfig", r=4, target_modules=_TARGETS)),
    Method("LoKr", _peft("LoKrConfig", r=4, target_modules=_TARGETS)),
    Method("IA3", _peft("IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    Method("OFT", _peft("OFTConfig", oft_block_size=16, target_modules=_TARGETS)),
    Method("VeRA", _peft("VeraConfig", r=16, target_modules=["q_proj", "o_proj"])),
    Method("prefix tuning", _peft("PrefixTuningConfig", num_virtual_tokens=4)),
    Method("prompt tuning", _peft("PromptTuningConfig", num_virtual_tokens=4)),
)


def main() -> int:
    """Make, pack, merge, export, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", nargs="+", default=None, help="names of methods")
    given = parser.parse_args()
    chosen = tuple(method for method in METHODS if given.only is None or method.name in given.only)
    print(HEADER)
    problems = 0
    with TemporaryDirectory(prefix="slmops-methods-") as scratch:
        for row in rows_of(given.model, Path(scratch), chosen):
            print(row.line(), flush=True)
            for problem in row.problems:
                print(f"{row.method}: {problem}", file=sys.stderr)
            problems += bool(row.problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
