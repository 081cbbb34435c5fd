"""From a model to a folder that runs on a device: the stage behind `slmops export`, and behind the base of `slmops pack`."""

from slmops.exporting.exporting import Exports, export, exports
from slmops.exporting.genai_graph import run_once, write_export
from slmops.exporting.preflight import choose_bounded_interface, preflight

__all__ = ["Exports", "choose_bounded_interface", "export", "exports", "preflight", "run_once", "write_export"]
