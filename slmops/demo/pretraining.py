"""How does a base model come out of plain text alone? A tokenizer, random weights, and a loop of half a minute.

A byte-level BPE tokenizer of 1,024 tokens and a Llama of about one million weights (head_dim 32, so that it exports).
Documents are `<s> text </s>`: `</s>` is seen at each end, so that an adapter can learn to stop with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slmops import artifact, environment, progress
from slmops.runtime import hugging_face

SPECIALS = ("<unk>", "<s>", "</s>")
_BOS, _EOS = 1, 2
_VOCABULARY = 1024
_POSITIONS = 256
_BATCH = 8  # documents
_PEAK_LEARNING_RATE = 2e-3
# About 1 / sqrt(hidden size). With transformers' 0.02, meant for widths of thousands, attention hardly looks at anything at
# first, and what a text takes over from its beginning is learned too late (76 % instead of 99 % right after the same steps).
_INITIAL_DEVIATION = 0.08
_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def make_base(documents: Sequence[str], folder: Path, *, seed: int = 0) -> dict[str, Any]:
    """Train a tiny base model on plain text and save it as a Hugging Face folder.

    Args:
        documents: plain texts.
        folder: where its files go.
        seed: of the weights and of the order of blocks; the same seed gives the same model on one machine.

    Returns:
        `loss` of the end of the loop (nats a token), `parameters`, and `tokens` seen.

    Raises:
        Unavailable: torch, transformers or tokenizers is missing.
    """
    torch = environment.require("torch", "to train the demo's base model")
    transformers = hugging_face.quiet_libraries()
    tokenizer = train_tokenizer(documents)
    sequences = [torch.tensor([*encoded.ids, _EOS]) for encoded in tokenizer.encode_batch(list(documents))]
    with few_threads(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=_VOCABULARY,
            max_position_embeddings=_POSITIONS,
            tie_word_embeddings=True,
            initializer_range=_INITIAL_DEVIATION,
            bos_token_id=_BOS,
            eos_token_id=_EOS,
            **_SHAPE,
        )
        model = transformers.LlamaForCausalLM(config)
        loss = pretrain(model, sequences)
    _save(model, tokenizer, folder)
    return {"loss": loss, "parameters": sum(p.numel() for p in model.parameters()), "tokens": sum(len(ids) for ids in sequences)}


@contextmanager
def few_threads() -> Iterator[None]:
    """Let torch use one thread: more cost more than they bring on matrices of 128 (on a busy machine 20 times as much processor time)."""
    torch = environment.require("torch", "to train the demo's models")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_tokenizer(documents: Sequence[str]) -> Any:
    """Train a byte-level BPE tokenizer that puts `<s>` before a text, as Llama's does."""
    tokenizers = environment.require("tokenizers", "to train the demo's tokenizer")
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=SPECIALS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", _BOS)])
    return tokenizer


def pretrain(model: Any, documents: Sequence[Any]) -> float:
    """Train all weights for one pass over the documents; return the mean loss of the last tenth, in nats a token.

    The schedule is that of one cycle (Smith and Topin 2018, arXiv 1708.07120): a tiny model learns most at a rate that
    it could not start with.

    Args:
        model: a causal language model.
        documents: token ids of each, one-dimensional tensors.
    """
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    order = torch.randperm(len(documents)).split(_BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LEARNING_RATE, total_steps=len(order), pct_start=0.15)
    losses: list[float] = []
    model.train()
    with progress.task("pre-train a tiny base", total=len(order), unit="steps") as task:
        for numbers in order:
            loss = model(**_batch([documents[number] for number in numbers.tolist()]), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            task.advance(loss=round(losses[-1], 3))
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def _batch(documents: list[Any]) -> dict[str, Any]:
    """Return ids and labels (documents, tokens), padded on the right, where causal attention never looks."""
    import torch

    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(documents, batch_first=True, padding_value=_EOS),
        "labels": pad(documents, batch_first=True, padding_value=-100),
    }


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a Hugging Face folder; tokenizer, config and generation config name the same stop token."""
    model.eval().save_pretrained(folder, safe_serialization=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": SPECIALS[0], "bos_token": SPECIALS[_BOS], "eos_token": SPECIALS[_EOS]}
    artifact.write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": _POSITIONS, **names}
    )
