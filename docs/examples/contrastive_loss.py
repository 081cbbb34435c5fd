r"""A loss of one's own for `slmops finetune --loss`: learn the answers, and draw prompts with the same label together.

    slmops finetune MODEL train.jsonl -o runs/intent --prompt-template '{text}\nIntent:' --completion-template ' {intent}' \
        --loss docs/examples/contrastive_loss.py:ContrastiveLoss --loss-args label=intent --loss-args temperature=0.1

The cross entropy of the answers (what sft learns) plus `weight` times the supervised contrastive loss of Khosla et al.
2020 (arXiv 2004.11362, equation 2) on what the model makes of each prompt: the last layer's output at its last token.
Batches are of rows of like length, so take them large enough that labels repeat in them (`--batch-size 32`).
"""

import torch
from torch.nn import functional


class ContrastiveLoss:
    """Cross entropy of the answers + weight x supervised contrastive loss of the prompts.

    Args:
        label: column whose equal values are to lie together.
        temperature: of the similarities; lower looks at the nearest only.
        weight: of the contrastive part; 0 leaves the cross entropy.
    """

    def __init__(self, label: str, temperature: float = 0.1, weight: float = 0.5) -> None:
        self.label, self.temperature, self.weight = label, temperature, weight

    def __call__(self, model, batch) -> torch.Tensor:
        """Return the loss of one batch.

        `batch` holds `input_ids`, `attention_mask` and `labels`, each (rows, tokens); `prompt_tokens` (rows,); and `rows`,
        the data rows with all their columns.
        """
        out = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
            output_hidden_states=True,
            use_cache=False,
        )
        rows = torch.arange(len(batch["rows"]), device=batch["input_ids"].device)
        prompts = out.hidden_states[-1][rows, batch["prompt_tokens"] - 1]  # (rows, width)
        return out.loss + self.weight * supervised_contrastive(prompts, [row[self.label] for row in batch["rows"]], self.temperature)


def supervised_contrastive(vectors: torch.Tensor, labels: list, temperature: float) -> torch.Tensor:
    """Return the supervised contrastive loss (Khosla et al. 2020, equation 2); 0 where no label comes twice.

    Args:
        vectors: (rows, width), of any length: they are normalized here.
        labels: of each row.
        temperature: of the similarities.
    """
    unit = functional.normalize(vectors.float(), dim=-1)
    others = ~torch.eye(len(labels), dtype=torch.bool, device=vectors.device)
    alike = torch.tensor([[a == b for b in labels] for a in labels], device=vectors.device) & others
    logits = (unit @ unit.T / temperature).masked_fill(~others, float("-inf"))
    log_shares = functional.log_softmax(logits, dim=-1).masked_fill(~others, 0.0)  # (rows, rows)
    anchors = alike.any(-1)
    if not anchors.any():
        return vectors.sum() * 0.0
    return -((log_shares * alike).sum(-1)[anchors] / alike.sum(-1)[anchors]).mean()
