"""What does a model learn from, and how does text become its tokens? Rows, formats, templates, tokenizer, stop tokens.

Everything here works on a device, without torch and transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmops.data.blocks import encode_blocks as encode_blocks
    from slmops.data.choosing import choose_interface as choose_interface
    from slmops.data.corpus import Corpus as Corpus
    from slmops.data.corpus import encode_rows as encode_rows
    from slmops.data.corpus import row_format_of as row_format_of
    from slmops.data.encoding import NOT_COUNTED as NOT_COUNTED
    from slmops.data.encoding import Encoded as Encoded
    from slmops.data.encoding import encode as encode
    from slmops.data.encoding import encode_prompt as encode_prompt
    from slmops.data.encoding import expected_text as expected_text
    from slmops.data.encoding import prompt_of_chat as prompt_of_chat
    from slmops.data.formats import RowFormat as RowFormat
    from slmops.data.formats import detect_format as detect_format
    from slmops.data.inspection import Inspection as Inspection
    from slmops.data.inspection import inspect_data as inspect_data
    from slmops.data.interface import Interface as Interface
    from slmops.data.preferences import Pair as Pair
    from slmops.data.preferences import encode_pairs as encode_pairs
    from slmops.data.preferences import preference_rows as preference_rows
    from slmops.data.preparation import prepare_data as prepare_data
    from slmops.data.rows import Row as Row
    from slmops.data.rows import load_splits as load_splits
    from slmops.data.rows import read_rows as read_rows
    from slmops.data.splitting import overlap as overlap
    from slmops.data.splitting import split as split
    from slmops.data.templates import Template as Template
    from slmops.data.templates import render as render
    from slmops.data.tokenizer import Tokenizer as Tokenizer

# Loaded when first used: an interface is read without numpy, a template without jinja2.
_MODULES = {
    "blocks": ("encode_blocks",),
    "choosing": ("choose_interface",),
    "corpus": ("Corpus", "encode_rows", "row_format_of"),
    "encoding": ("NOT_COUNTED", "Encoded", "encode", "encode_prompt", "expected_text", "prompt_of_chat"),
    "formats": ("RowFormat", "detect_format"),
    "inspection": ("Inspection", "inspect_data"),
    "interface": ("Interface",),
    "preferences": ("Pair", "encode_pairs", "preference_rows"),
    "preparation": ("prepare_data",),
    "rows": ("Row", "load_splits", "read_rows"),
    "splitting": ("overlap", "split"),
    "templates": ("Template", "render"),
    "tokenizer": ("Tokenizer",),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [*_PLACES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"slmops.data.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'slmops.data' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
