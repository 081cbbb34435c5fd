"""Tiny tokenizers and models that the data tests make themselves: byte-level with ChatML, and SentencePiece-like as Llama's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

TEXTS = [
    "Turn on the light in the kitchen.",
    "What is the weather like today?",
    "Play some jazz music, please.",
    "Intent: PlayMusic GetWeather",
] * 3
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Llama 2's: BOS in the text, the end of an answer is EOS, nothing after it.
LLAMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As Qwen 3's: earlier answers lose their reasoning, the last one keeps it.
REASONING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last and message.reasoning_content %}<think>{{ message.reasoning_content }}</think>\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As many newer ones: tools as JSON, loop controls, a namespace, an exception, whitespace control.
TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}{{- '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(users=0) %}
{%- for message in messages %}
    {%- if message.role == 'nobody' %}{%- continue %}{%- endif %}
    {%- if message.role == 'user' %}{%- set ns.users = ns.users + 1 %}{%- endif %}
    {%- if ns.users == 0 and message.role == 'assistant' %}{{- raise_exception('the user speaks first') }}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{%- endfor %}
    {%- else %}{% generation %}{{- message.content | trim }}{% endgeneration %}{%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def byte_level(folder: Path, *, chat_template: str | None = None, eos: str | None = "<|im_end|>", specials: tuple[str, ...] = ()) -> Path:
    """Write a byte-level BPE tokenizer with ChatML's tokens (ids 0 to 2) and no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return _write(folder, backend, {"eos_token": eos, "chat_template": chat_template})


def llama_like(folder: Path, *, chat_template: str | None = None, metaspace: bool = False, adds_bos: bool = True) -> Path:
    """Write a BPE tokenizer as Llama's: a blank before every text, bytes as a fallback, BOS (1) and EOS (2)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    words = [word for text in TEXTS for word in text.split()] if not metaspace else TEXTS
    backend.train_from_iterator(words, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]  # bytes are ordinary tokens
    backend = Tokenizer.from_str(json.dumps(state))
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return _write(folder, backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": chat_template})


def write_model(folder: Path, table: np.ndarray, *, bfloat16: bool = False, output: np.ndarray | None = None, **config: Any) -> Path:
    """Write a config and an embedding, which is all that the choice of a stop token looks at."""
    import torch
    from safetensors.torch import save_file

    dtype = torch.bfloat16 if bfloat16 else torch.float32
    tensors = {"model.embed_tokens.weight": torch.tensor(table).to(dtype)}
    if output is not None:
        tensors["lm_head.weight"] = torch.tensor(output).to(dtype)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64, **config}))
    return folder


def table_with_unseen(rows: int, unseen: list[int], *, noise: float = 1e-3, seed: int = 0) -> np.ndarray:
    """Return an embedding (rows, 16) in which `unseen` lie together, and all others far apart."""
    random = np.random.default_rng(seed)
    table = random.normal(size=(rows, 16)).astype(np.float32)
    table[unseen] = np.full(16, 0.1, np.float32) + noise * random.normal(size=(len(unseen), 16)).astype(np.float32)
    return table


def _write(folder: Path, backend: Any, settings: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings}))
    return folder
