"""How does a base model come out of plain text alone? A tokenizer, random weights, and a loop of half a minute.

A byte-level BPE tokenizer of 1,024 tokens and a Llama of about one million weights (head_dim 32, so that it exports).
Documents are `<s> text </s>`, one after the other in blocks of equal length: every block is full, and `</s>` is seen
at each end, so that an adapter can learn to stop with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmops import artifact, environment, progress
from slmops.artifact import Artifact
from slmops.runtime import hugging_face

SPECIALS = ("<unk>", "<s>", "</s>")
_BOS, _EOS = 1, 2
_VOCABULARY = 1024
_POSITIONS = 256
_BLOCK = 128  # tokens; two documents or so
_BATCH = 8
_PEAK_LEARNING_RATE = 4e-3
_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def write_base(stories: Path, *, out: Path, seed: int = 0, force: bool = False) -> Artifact:
    """Train a tiny base model on plain text, as a Hugging Face folder.

    Args:
        stories: UTF-8 text, documents apart by a blank line.
        out: the model folder to write.
        seed: of the weights and of the order of blocks; the same seed gives the same model on one machine.
        force: replace what slmops wrote there.

    Raises:
        BadArtifact: `out` is occupied.
        Unavailable: torch, transformers or tokenizers is missing.
    """
    torch = environment.require("torch", "to train the demo's base model")
    transformers = hugging_face.quiet_libraries()
    documents = stories.read_text(encoding="utf-8").split("\n\n")
    with artifact.create(out, kind="model", command="quickstart", config=settings_of(seed), force=force) as draft:
        tokenizer = train_tokenizer(documents)
        blocks = pack(tokenizer, documents)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = transformers.LlamaConfig(
                vocab_size=_VOCABULARY,
                max_position_embeddings=_POSITIONS,
                tie_word_embeddings=True,
                bos_token_id=_BOS,
                eos_token_id=_EOS,
                **_SHAPE,
            )
            model = transformers.LlamaForCausalLM(config)
            loss = pretrain(model, blocks)
        _save(model, tokenizer, draft.folder)
        draft.add_input("dataset", stories)
        draft.metrics = {"train_loss": {"value": loss}}
        draft.facts = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "precision": "fp32",
            "tokens": {"total": len(blocks) * _BLOCK},
        }
    return draft.done()


def settings_of(seed: int) -> dict[str, int | float]:
    """Return all that decides a base beside its text, as its manifest keeps it."""
    loop = {"seed": seed, "vocabulary": _VOCABULARY, "batch": _BATCH, "block_tokens": _BLOCK, "learning_rate": _PEAK_LEARNING_RATE}
    return loop | _SHAPE


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


def pack(tokenizer: Any, documents: Sequence[str]) -> Any:
    """Return the documents' tokens as one tensor (blocks, tokens), each document ended by `</s>`."""
    import torch

    stream = [token for encoded in tokenizer.encode_batch(list(documents)) for token in (*encoded.ids, _EOS)]
    whole = len(stream) // _BLOCK * _BLOCK
    return torch.tensor(stream[:whole], dtype=torch.long).view(-1, _BLOCK)


def pretrain(model: Any, blocks: Any) -> float:
    """Train all weights for one pass over the blocks; return the mean loss of the last tenth, in nats a token.

    The schedule is that of one cycle (Smith and Topin 2018, arXiv 1708.07120): a tiny model learns most at a rate that
    it could not start with.
    """
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    order = torch.randperm(len(blocks)).split(_BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LEARNING_RATE, total_steps=len(order), pct_start=0.15)
    losses: list[float] = []
    model.train()
    with progress.task("pre-train a tiny base", total=len(order), unit="steps") as task:
        for numbers in order:
            batch = blocks[numbers]
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            task.advance(loss=round(losses[-1], 3))
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a Hugging Face folder; tokenizer, config and generation config name the same stop token."""
    model.eval().save_pretrained(folder, safe_serialization=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": SPECIALS[0], "bos_token": SPECIALS[_BOS], "eos_token": SPECIALS[_EOS]}
    artifact.write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": _POSITIONS, **names}
    )
