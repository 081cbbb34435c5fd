"""Is everything here that Olive needs? Asked before any work, without importing it."""

from __future__ import annotations

from importlib.util import find_spec

from slmops.errors import Unavailable

# olive-ai 0.13 imports requests and tabulate and declares neither.
_MODULES = {"olive": "olive-ai", "requests": "requests", "tabulate": "tabulate", "transformers": "transformers", "peft": "peft"}


def require_olive(purpose: str, *, quantized: bool = False) -> None:
    """Refuse to go on without Olive.

    Args:
        purpose: what needs it, for the message: "for --engine olive".
        quantized: bitsandbytes is needed too.

    Raises:
        Unavailable: a library is not installed.
    """
    modules = {**_MODULES, "bitsandbytes": "bitsandbytes"} if quantized else _MODULES
    missing = [distribution for module, distribution in modules.items() if find_spec(module) is None]
    if missing:
        verb, pronoun = ("is", "it is") if len(missing) == 1 else ("are", "they are")
        raise Unavailable(f"{', '.join(missing)} {verb} not installed; {pronoun} needed {purpose}", "pip install 'slmops[olive]'")
