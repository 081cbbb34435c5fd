"""Each model family goes down the whole road and comes out as PyTorch has it; what would not is refused by name.

`benchmarks/families.py` prints the same as a table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from tiny import TEMPLATES, make_tokenizer, write_rows

import slmops
from slmops.errors import SlmopsError, Unavailable

sys.path.insert(0, str(ROOT / "benchmarks"))

from families import FAMILIES, Family, line, outcome_of  # noqa: E402  # pyright: ignore[reportMissingImports]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_is_in_its_packages_what_it_is_in_pytorch(family: Family, tmp_path: Path) -> None:
    found = outcome_of(family, tmp_path / "work", merged=family.name == "Llama")
    print(line(family, found))
    assert found.refusal is None, found.refusal
    wrong = {name: figures.stage for name, figures in found.figures.items() if not figures.passed}
    assert not wrong
    assert {"export", "adapter", "int4"} <= set(found.figures)


def config_only(folder: Path, tokenizer: Path, **config: Any) -> Path:
    """Write a model folder without weights that can be loaded: what is refused was never looked into."""
    folder.mkdir()
    llama = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 128, "vocab_size": 320}
    (folder / "config.json").write_text(json.dumps(llama | config))
    (folder / "model.safetensors").write_bytes(b"these are no weights")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "GPT-2": ({"architectures": ["GPT2LMHeadModel"]}, "does not know it", "this one still fine-tunes"),
    "T5": ({"architectures": ["T5ForConditionalGeneration"]}, "does not know it", "nothing is left to do"),
    "LFM2": ({"architectures": ["Lfm2ForCausalLM"]}, "states of convolutions", "this one still fine-tunes"),
    "InternLM2": ({"architectures": ["InternLM2ForCausalLM"]}, "code that comes with the model", "nothing else works"),
    "Olmo": ({"architectures": ["OlmoForCausalLM"]}, "computes something else", "this one still fine-tunes"),
    "Llama with yarn": ({"architectures": ["LlamaForCausalLM"], "rope_scaling": _YARN}, r"RoPE \(yarn\)", "this one still fine-tunes"),
    "Qwen2, dynamic": (
        {"architectures": ["Qwen2ForCausalLM"], "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        r"RoPE \(dynamic\)",
        "this one still fine-tunes",
    ),
    "Gemma 3 with yarn": (
        {
            "architectures": ["Gemma3ForCausalLM"],
            "rope_parameters": {"sliding_attention": {"rope_type": "default"}, "full_attention": _YARN},
        },
        r"RoPE \(yarn\)",
        "this one still fine-tunes",
    ),
    "Granite with Mamba": (
        {"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": ["mamba", "attention"], "position_embedding_type": "rope"},
        "only dense models with attention",
        "this one still fine-tunes",
    ),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_what_would_come_out_wrong_is_refused_by_name(name: str, tokenizer: Path, tmp_path: Path) -> None:
    config, reason, way_out = _REFUSED[name]
    model = config_only(tmp_path / "model", tokenizer, **config)
    for verb, settings in ((slmops.export, {}), (slmops.pack, {"adapter": ["a=nowhere"]})):
        with pytest.raises(Unavailable, match=reason) as caught:
            verb(model, out=tmp_path / "out", **settings)
        assert config["architectures"][0] in caught.value.message
        assert way_out in caught.value.hint
        assert caught.value.exit_code == 3


@pytest.mark.slow
def test_the_hint_is_true_of_gpt2_and_of_t5(tokenizer: Path, tmp_path: Path) -> None:
    """GPT-2 fine-tunes, merges and evaluates; with T5 nothing begins."""
    import torch
    import transformers

    torch.manual_seed(0)
    tokens: dict[str, Any] = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2}
    made = {
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=128, **tokens)),
        "t5": transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, **tokens)
        ),
    }
    rows = write_rows(tmp_path / "rows.jsonl")
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name / file).write_bytes((tokenizer / file).read_bytes())
    settings = {"validation": rows, "max_steps": 1, "stop_token": "</s>", "threads": 1}
    slmops.finetune(tmp_path / "gpt2", rows, out=tmp_path / "adapter", **settings, **TEMPLATES)
    merged = slmops.merge(tmp_path / "adapter", out=tmp_path / "merged").path
    assert slmops.evaluate(merged, rows, threads=1).metrics["exact_match"].n == 8
    with pytest.raises(SlmopsError, match="T5ForConditionalGeneration"):
        slmops.finetune(tmp_path / "t5", rows, out=tmp_path / "none", **settings, **TEMPLATES)


def test_the_builder_has_what_is_mended() -> None:
    """Its source, without its imports: a version that lost a method or renamed it would take a mend away without a word."""
    from importlib.util import find_spec

    package = find_spec("onnxruntime_genai")
    assert package is not None and package.origin is not None
    builders = Path(package.origin).parent / "models" / "builders"
    expected = {
        "base": ("load_weights", "make_initializer", "save_model", "make_config_init", "has_lm_head", "make_embedding", "make_rope_init"),
        "gemma": ('embed_attrs["scale"] = np.round(np.sqrt(', "config.rope_local_base_freq", '"cos_cache_local"'),
        "llama": ("def make_rope_init(self, config)",),
        "smollm": ("self.no_rope_layers[layer_id]", "def make_attention("),
    }
    for name, texts in expected.items():
        source = (builders / f"{name}.py").read_text(encoding="utf-8")
        for text in texts:
            assert text in source, f"{name}: {text}"
