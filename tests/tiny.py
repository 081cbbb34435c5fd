"""A tiny model, adapter and data that tests make themselves, in seconds: real files, real engines, nothing mocked.

The model is a Llama (hidden 64, 2 layers, 4 heads of 16, tied embedding, 128 positions) with a Llama-like tokenizer of
about 300 tokens, on which it can learn a handful of rows by heart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS = [
    {"text": "play some jazz", "intent": "music"},
    {"text": "will it rain today", "intent": "weather"},
    {"text": "turn on the lamp", "intent": "light"},
    {"text": "play the blues", "intent": "music"},
    {"text": "is it cold outside", "intent": "weather"},
    {"text": "dim the kitchen light", "intent": "light"},
    {"text": "put on a song", "intent": "music"},
    {"text": "how warm is it", "intent": "weather"},
]
PROMPT, COMPLETION = "{text}\nIntent:", " {intent}"
TEMPLATES = {"prompt_template": PROMPT, "completion_template": COMPLETION}
POSITIONS = 128


def make_tokenizer(folder: Path) -> Path:
    """Write a SentencePiece-like BPE tokenizer with bytes as a fallback, <unk> 0, <s> 1 and </s> 2, about 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [word for row in ROWS for word in f"{row['text']} Intent: {row['intent']}".split()]
    backend.train_from_iterator(words * 3, trainers.BpeTrainer(vocab_size=310, special_tokens=specials, show_progress=False))
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]  # bytes are ordinary tokens
    backend = Tokenizer.from_str(json.dumps(state))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def make_model(folder: Path, seed: int = 0, *, learned: Sequence[dict[str, Any]] = (), steps: int = 80, **config: Any) -> Path:
    """Write a tiny Llama as a Hugging Face folder.

    Args:
        folder: to write.
        seed: of its weights.
        learned: rows like `ROWS` that it learns by heart, in `PROMPT` and `COMPLETION`; none: random weights.
        steps: of that learning, all rows in each.
        config: changes to its `LlamaConfig`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(folder)
    torch.set_num_threads(1)  # more of them wait for each other at every layer of a model this small
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,
    }
    model = LlamaForCausalLM(LlamaConfig(**(shape | config)))
    if learned:
        _learn(model, folder, learned, steps)
    model.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path, seed: int = 0, *, rank: int = 4, scale: float = 0.05) -> Path:
    """Write a plain PEFT LoRA folder on all linear layers of `base`, with random A and B (so that it has an effect)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=scale)
    adapted.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_learned_adapter(folder: Path, base: Path, rows: Sequence[dict[str, Any]] = ROWS, *, rank: int = 8, steps: int = 60) -> Path:
    """Write a plain PEFT LoRA folder that learned rows by heart, without slmops's training."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = LoraConfig(r=rank, lora_alpha=4 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    _learn(adapted, base, rows, steps)
    adapted.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_export(folder: Path, model: Path, precision: str = "fp32", **settings: Any) -> Path:
    """Export a model for the CPU with slmops."""
    from slmops.exporting import export

    return export(model, out=folder, precision=precision, **settings).path


def write_rows(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _learn(model: Any, folder: Path, rows: Sequence[dict[str, Any]], steps: int) -> None:
    import torch

    from slmops.data import Interface, Tokenizer, encode_rows

    interface = Interface(**TEMPLATES, bos_token_id=1, stop_token_ids=(2,), max_length_tokens=POSITIONS)
    sequences = encode_rows(rows, Tokenizer.load(folder), interface).sequences
    longest = max(len(sequence.ids) for sequence in sequences)
    ids = torch.tensor([sequence.ids + [0] * (longest - len(sequence.ids)) for sequence in sequences])
    labels = torch.tensor([sequence.labels + [-100] * (longest - len(sequence.ids)) for sequence in sequences])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.eval()
