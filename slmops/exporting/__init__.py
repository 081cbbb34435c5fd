"""From a model to a folder that runs on a device: the stage behind `slmops export`, and behind the base of `slmops pack`."""

from slmops.exporting.exporting import Exports, export, exports
from slmops.exporting.genai_graph import write_export
from slmops.exporting.preflight import choose_bounded_interface, preflight
from slmops.exporting.record import eos_token_id

__all__ = ["Exports", "choose_bounded_interface", "eos_token_id", "export", "exports", "preflight", "write_export"]
