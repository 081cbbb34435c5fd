"""How is a reward model loaded and asked? A base with a head of one output: the score of a text.

The head stands in the place of the vocabulary (`...ForSequenceClassification`, one label) and is saved with the
adapter. The score is read at the last token; the library finds that as the last one that is not padding, so the padding
token is chosen to be none that ends an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmops import artifact, environment, progress
from slmops.artifact import Artifact
from slmops.data import Interface, Tokenizer
from slmops.errors import BadArtifact, InvalidInput, Unavailable
from slmops.runtime import hugging_face

_ROWS_AT_ONCE = 64


class RewardModel:
    """A reward model in memory, and how text goes into it.

    Args:
        model: base, adapter and head, in eval mode.
        folder: where it came from.
        tokenizer: of the base.
        interface: of the adapter.
        threads: of torch, for the whole process.
    """

    engine = "torch"

    def __init__(self, model: Any, folder: Path, tokenizer: Tokenizer, interface: Interface, threads: int) -> None:
        environment.require("torch", "to run a reward model").set_num_threads(threads)
        self.model, self.folder, self.tokenizer, self.interface, self.threads = model.eval(), folder, tokenizer, interface, threads

    def scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Return the score of each row of ids; rows of one length run together, so nothing is padded."""
        torch = environment.require("torch", "to run a reward model")
        limit = int(self.model.config.max_position_embeddings or 1 << 30)
        found = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        with progress.task("score", total=len(rows), unit="rows") as task, torch.inference_mode():
            while order:
                length = len(rows[order[0]])
                if not 0 < length <= limit:
                    raise InvalidInput(f"a row has {length} tokens, and the model takes 1 to {limit}", "shorten it")
                batch = [i for i in order[:_ROWS_AT_ONCE] if len(rows[i]) == length]
                order = order[len(batch) :]
                out = self.model(input_ids=torch.tensor([list(rows[i]) for i in batch]), use_cache=False).logits[:, 0]
                for i, score in zip(batch, out.float().tolist(), strict=True):
                    found[i] = score
                task.advance(len(batch))
        return found


def is_reward(found: Artifact | None) -> bool:
    """Tell whether an artefact is a reward model."""
    return found is not None and found.manifest.kind == "adapter" and found.manifest.facts.get("objective") == "reward"


def load_headed_base(base: Path, interface: Interface, *, precision: str = "fp32") -> Any:
    """Load a base with a fresh head of one output in place of its vocabulary.

    Args:
        base: Hugging Face folder of a causal language model.
        interface: its stop tokens tell which token cannot be the padding.
        precision: of the weights in memory: fp32 or bf16.

    Raises:
        Unavailable: the architecture has no such head.
    """
    torch = environment.require("torch", "to load a reward model")
    transformers = hugging_face.quiet_libraries()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Unavailable(f"{base} cannot be given a head that scores: {reason}", "give another architecture") from error
    model.config.pad_token_id = padding_token(interface)
    return model


def padding_token(interface: Interface) -> int:
    """Return the lowest id that ends no answer."""
    return next(i for i in range(len(interface.stop_token_ids) + 1) if i not in interface.stop_token_ids)


def load_reward(folder: Path, *, threads: int | None = None) -> RewardModel:
    """Load a reward model that `slmops finetune --objective reward` wrote.

    Raises:
        BadArtifact: incomplete or changed, or its base is gone.
    """
    found = artifact.load(folder, kinds=("adapter",))
    if not is_reward(found) or found.manifest.interface is None:
        raise BadArtifact(f"{folder} is no reward model", "train one with `slmops finetune --objective reward`")
    artifact.check(found)
    base = hugging_face.find_base(folder, found, hugging_face.read_adapter_config(folder, scores=True))
    return assemble(base, folder, Interface.model_validate(found.manifest.interface), threads=threads)


def assemble(base: Path, folder: Path, interface: Interface, *, threads: int | None = None) -> RewardModel:
    """Put a reward adapter and its head on their base.

    Args:
        base: the base model's folder.
        folder: the PEFT folder.
        interface: of the adapter.
        threads: of torch; None: by the size of the weights.
    """
    peft = environment.require("peft", "to load an adapter")
    model = peft.PeftModel.from_pretrained(load_headed_base(base, interface), folder, is_trainable=False)
    hugging_face.refuse_misfits(model, folder)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    return RewardModel(model, folder, Tokenizer.load(base), interface, threads or environment.threads_for(size))
