"""What do the passes of slmops have in common? Each makes a folder for the workflow's target, by the settings of a verb."""

from __future__ import annotations

from typing import Any, ClassVar

from olive.passes import Pass

from slmops import targets
from slmops.config import ExportSettings, PackSettings, load
from slmops.olive_passes.parameters import place


class TargetPass(Pass):
    """A pass whose result is made for a target."""

    verb: ClassVar[type[ExportSettings | PackSettings]]
    """Settings of the verb."""
    own: ClassVar[tuple[str, ...]] = ()
    """Parameters of the pass that the verb has not."""

    @staticmethod
    def is_accelerator_agnostic(accelerator_spec: Any) -> bool:
        """Tell Olive's cache that what is made for one target is none for another."""
        return False

    @classmethod
    def foretell(cls, wanted: dict[str, Any], accelerator_spec: Any) -> None:
        """Raise the error of slmops that a run would end with, as far as it can be known before one.

        Args:
            wanted: the parameters in the workflow, of one candidate.
            accelerator_spec: the workflow's target.
        """
        known = {name: value for name, value in wanted.items() if name not in cls.own}
        settings = load(cls.verb, known, **place(accelerator_spec))
        targets.find(settings.device, settings.provider, settings.precision)
