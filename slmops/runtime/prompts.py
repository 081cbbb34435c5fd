"""How does a model run with learned positions before the text (prefix, prompt and p-tuning), with and without a KV cache?

PEFT holds, trains, saves and loads them; its forward pass puts them before the text of every call. That is not enough here (peft
0.21.2): in a step with a KV cache they would come again; of a prompt-tuned model the positions given are dropped, so that a row's
distance to them depends on how far it is padded; and the logits are longer than the text. So the pass is ours: position p of
the text stands at virtual tokens + p, whatever the padding, and logits are those of the text.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModelForCausalLM, PeftType


class PromptedModel(PeftModelForCausalLM):
    """A PEFT model with learned positions before the text."""

    @property
    def virtual_tokens(self) -> int:
        """How many there are."""
        config: Any = self.active_peft_config
        return int(config.num_virtual_tokens)

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        **given: Any,
    ) -> Any:
        """Run the model.

        Args:
            input_ids: (batch, tokens), the text alone.
            attention_mask: (batch, tokens), of the text alone; None: all of it counts.
            position_ids: (batch, tokens), of the text alone, from 0; None: 0, 1, 2 ...
            past_key_values: of an earlier call, with the learned positions in it.
            given: for the base, such as `use_cache` and `logits_to_keep`.

        Returns:
            The base's output; its logits are (batch, tokens or `logits_to_keep`, vocabulary).
        """
        base: Any = self.get_base_model()
        if past_key_values is not None and past_key_values.get_seq_length():
            return base(input_ids=input_ids, past_key_values=past_key_values, **given)
        (rows, tokens), count = input_ids.shape, self.virtual_tokens
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(rows, count), attention_mask], dim=1)
        if position_ids is None:
            position_ids = torch.arange(tokens, device=input_ids.device).expand(rows, tokens)
        given |= {"attention_mask": attention_mask}
        if self.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
            cache: Any = self.get_prompt(rows)
            return base(input_ids=input_ids, position_ids=position_ids + count, past_key_values=cache, **given)
        table: Any = base.get_input_embeddings()
        words = table(input_ids)
        prompts = self.get_prompt(rows).to(words.dtype)
        before = torch.arange(count, device=input_ids.device).expand(rows, count)
        positions = torch.cat([before, position_ids + count], dim=1)
        out = base(inputs_embeds=torch.cat([prompts, words], dim=1), position_ids=positions, past_key_values=past_key_values, **given)
        out.logits = out.logits[:, -tokens:]
        return out


def prompted(model: Any) -> Any:
    """Give a model of PEFT's with learned positions our forward pass, in place; any other is returned as it is."""
    if model.active_peft_config.is_prompt_learning:
        model.__class__ = PromptedModel
    return model
