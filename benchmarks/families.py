"""Print what becomes of each model family: `python benchmarks/families.py [FAMILY ...] [--work DIR]`.

A tiny random model of each, with what its family does differently set to values that show (windows shorter than the rows,
multipliers, soft caps, norms and biases that are not neutral), goes down the whole road: a LoRA is trained, merged and
exported to fp32; the base is exported to fp32 and int4 and packed with the adapter. Each is held against PyTorch by
`slmops verify` at its default bars: NMSE and largest difference of a logit of the fp32 export, of the merged fine-tune, and
of the adapter in the fp32 package; KL of the adapter in the int4 one. Or it is refused, and the line says why. A Markdown
table; exit code 1 where a family is neither right nor refused. `tests/test_families.py` uses the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import slmops
from slmops.errors import SlmopsError

HEADER = (
    "| family | what shows | fp32 export | fine-tuned and merged, fp32 | adapter in an fp32 package | adapter in an int4 package: KL |\n"
    "| --- | --- | --- | --- | --- | --- |"
)
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
# Wider than a power of 4, so that its square root has many digits; nothing but the vocabulary is 320.
_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.08,
}
_TEXT = "the quick brown fox plays some jazz in the cold kitchen while it rains outside and a warm song is on"
_TRAINING: dict[str, Any] = {
    "prompt_template": "{text}\nIntent:",
    "completion_template": " {intent}",
    "stop_token": "</s>",
    "max_steps": 12,
    "learning_rate": 5e-3,
    "lora_rank": 4,
    "precision": "fp32",
    "threads": 1,
}


@dataclass(frozen=True)
class Family:
    """A family, or a trap of one."""

    name: str
    prefix: str
    """Of transformers' classes: `Gemma3Text` is `Gemma3TextConfig`."""
    shows: str
    """What this one has that a plain Llama has not."""
    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    """Of the stored weights."""


FAMILIES = (
    Family("Llama", "Llama", "tied head", {"tie_word_embeddings": True}),
    Family(
        "Llama 3.1",
        "Llama",
        "scaled RoPE, biases",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    Family("Mistral", "Mistral", "a window of 20 in every layer", {"sliding_window": 20}),
    Family(
        "Qwen2",
        "Qwen2",
        "biases; a window of 20 from layer 1 on",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    Family("Qwen3", "Qwen3", "norms of queries and keys; wide heads, tied", {"head_dim": 32, "tie_word_embeddings": True}),
    Family(
        "Phi3",
        "Phi3",
        "fused projections; a window of 20; RoPE of 3/4 of a head",
        {
            "hidden_size": 192,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "partial_rotary_factor": 0.75,
            "sliding_window": 20,
            "original_max_position_embeddings": 256,
        },
    ),
    Family("Gemma", "Gemma", "scaled embedding, norms of 1 + w; stored in bf16", dtype="bfloat16"),
    Family(
        "Gemma 2",
        "Gemma2",
        "soft caps of attention and logits, a scale of its own, windows of 20",
        {"sliding_window": 20, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    Family(
        "Gemma 3",
        "Gemma3Text",
        "two RoPEs, one of them linear, norms of queries and keys, windows of 20",
        {
            "sliding_window": 20,
            "query_pre_attn_scalar": 24,
            "layer_types": _ALTERNATING,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    Family("SmolLM3", "SmolLM3", "a layer without RoPE, tied", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    Family(
        "Granite",
        "Granite",
        "multipliers of embedding, attention, residual and logits",
        {
            "logits_scaling": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 12.0,
            "tie_word_embeddings": True,
        },
    ),
)


@dataclass(frozen=True)
class Figures:
    """One package against PyTorch."""

    passed: bool
    stage: str | None
    """The first failed one."""
    values: Mapping[str, Any]

    @property
    def text(self) -> str:
        if not self.passed:
            return f"**fails at {self.stage}**"
        if self.values.get("shown") == "kl":
            return f"{_number(self.values['kl']):.1e}"
        return f"{self.values['nmse']:.1e}, {self.values['largest_difference']:.1e}"


@dataclass(frozen=True)
class Outcome:
    """What became of a family: figures by package, or a refusal."""

    figures: Mapping[str, Figures] = field(default_factory=dict)
    refusal: SlmopsError | None = None

    @property
    def right(self) -> bool:
        return bool(self.figures) and all(one.passed for one in self.figures.values())

    @property
    def acceptable(self) -> bool:
        return self.right or (self.refusal is not None and self.refusal.exit_code == 3)


def make_family(folder: Path, family: Family) -> Path:
    """Write a tiny random model of a family, with a tokenizer of bytes."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = getattr(transformers, f"{family.prefix}Config")(**(_SIZES | dict(family.config)))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # neutral ones hide mistakes; Gemma's norms are 1 + w
            around_0 = name.endswith("bias") or family.prefix.startswith("Gemma")
            torch.nn.init.normal_(parameter, mean=0.0 if around_0 else 1.0, std=0.2)
    model.to(getattr(torch, family.dtype)).save_pretrained(folder)
    return write_tokenizer(folder)


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of bytes, 259 tokens, <s> 1 and </s> 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({text: i for i, text in enumerate(["<unk>", "<s>", "</s>", *letters])}, [], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return folder


def rows() -> list[dict[str, str]]:
    """Return rows longer than the windows: their answers stand behind 50 to 140 bytes."""
    words = _TEXT.split()
    return [{"text": " ".join((words * 2)[i : i + 8 + 2 * i]), "intent": words[-1 - i]} for i in range(8)]


def outcome_of(family: Family, work: Path, *, merged: bool = True) -> Outcome:
    """Take a family down the road.

    Args:
        family: whose model is made.
        work: a folder to write to.
        merged: export the merged fine-tune too, which is a build of its own.
    """
    work.mkdir(parents=True, exist_ok=True)
    data = work / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    model = make_family(work / "model", family)
    try:
        adapter = slmops.finetune(model, data, out=work / "adapter", validation=data, **_TRAINING).path
        whole = slmops.merge(adapter, out=work / "merged").path
        made = slmops.exports(model, out=work / "base", precision="fp32,int4").artifacts
        fp32, int4 = (slmops.pack(one.path, out=work / f"package-{one.path.name}", adapter=[f"intent={adapter}"]).path for one in made)
        figures = _package_figures(slmops.verify(fp32, threads=1), "nmse") | {
            "int4": _package_figures(slmops.verify(int4, threads=1), "kl")["adapter"]
        }
        if merged:
            verification = slmops.verify(slmops.export(whole, out=work / "merged-fp32", precision="fp32").path, threads=1)
            stages = {stage.name: stage for stage in verification.stages}
            figures["merged"] = Figures(verification.failed_stage is None, verification.failed_stage, stages["logits"].figures)
        return Outcome(figures)
    except SlmopsError as error:
        return Outcome(refusal=error)


def _package_figures(verification: Any, figure: str) -> dict[str, Figures]:
    """Return the figures of the base's logits, and of the adapter's, from a package's verification."""
    stages = {stage.name: stage for stage in verification.stages}
    failed = verification.failed_stage
    explained = stages[failed].explanation if failed else None
    base = stages["logits"].figures if "logits" in stages else {}
    adapter = stages["adapters"].figures.get("intent", {}).get("logits", {}) if "adapters" in stages else {}
    return {
        "export": Figures(failed in (None, "adapters", "self_test"), explained, base),
        "adapter": Figures(failed is None, explained, {**adapter, "shown": figure}),
    }


def _number(value: Any) -> float:
    return float(value["value"] if isinstance(value, Mapping) else getattr(value, "value", value))


def line(family: Family, outcome: Outcome) -> str:
    """Return a family's line of the table."""
    cells = [family.name, family.shows]
    if outcome.refusal is not None:
        cells.append(f"refused: {outcome.refusal.message}")
    cells += [outcome.figures[name].text for name in ("export", "merged", "adapter", "int4") if name in outcome.figures]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("families", nargs="*", help="names; all unless given")
    parser.add_argument("--work", type=Path, help="folder to keep what is made")
    options = parser.parse_args()
    chosen = [family for family in FAMILIES if not options.families or family.name in options.families]
    print(HEADER, flush=True)
    good = True
    with TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        for family in chosen:
            outcome = outcome_of(family, work / family.name.replace(" ", "-"))
            good &= outcome.acceptable
            print(line(family, outcome), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
