"""How is an adapter trained? `finetune` is the verb; the modules below it are its steps."""

from slmops.training.finetuning import finetune

__all__ = ["finetune"]
