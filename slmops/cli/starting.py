"""The commands of somebody who has just installed slmops: `quickstart` and `doctor`."""

from __future__ import annotations

from typing import Any

import slmops
from slmops.cli.options import Call, command
from slmops.config import QuickstartSettings


@command(
    "quickstart",
    QuickstartSettings,
    writes="slmops-quickstart",
    examples=("slmops quickstart", "slmops quickstart -o demo --precision int8"),
)
def quickstart(call: Call) -> Any:
    """Run the demo.

    A tiny model is trained from scratch on a small grammar of home-automation commands, fine-tuned, merged, exported,
    verified, measured against PyTorch and asked a question. Nothing is downloaded. It ends with what to type next for
    your own model and data.
    """
    return slmops.quickstart(config=call.config, **call.overrides)


@command("doctor", None, examples=("slmops doctor", "slmops doctor --json"))
def doctor(call: Call) -> Any:
    """Examine the machine.

    Compares the installed versions with the set that slmops was tested with, runs a tiny graph on every execution
    provider that onnxruntime names, measures the memory bandwidth, and says for each problem what to do about it.
    Works without torch and transformers. Takes a few seconds.
    """
    return slmops.doctor()
