"""With which templates are rows asked? The model's own, unless the user or a prepared dataset brings others."""

from __future__ import annotations

from typing import Any

from slmops.config import EvaluateSettings
from slmops.data import Interface


def asked_interface(interface: Interface, settings: EvaluateSettings, templates: Any) -> Interface:
    """Return the model's interface with the user's templates over it, and the dataset's where there are no others."""
    if settings.prompt_template is not None or settings.completion_template is not None:
        changes = {"prompt_template": settings.prompt_template, "completion_template": settings.completion_template}
        return interface.model_copy(update={key: value for key, value in changes.items() if value is not None})
    if interface.completion_template is None and templates.completion_template is not None:
        return interface.model_copy(update=templates._asdict())
    return interface
