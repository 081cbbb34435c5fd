"""What do the quickstart and the recipes in `adapters/` train on? A base model and rows that slmops makes: nothing is downloaded.

`make_demo` writes both: commands to a small home device with three kinds of answers (`tasks`), from a grammar (`household`),
and a tokenizer and a tiny Llama trained from scratch (`pretraining`) on plain text of the same household (`stories`).
`recipes` has the adapters that are trained on them.
"""

from slmops.demo.household import INTENTS
from slmops.demo.making import Data, make_demo, write_data
from slmops.demo.pretraining import few_threads

__all__ = ["INTENTS", "Data", "few_threads", "make_demo", "write_data"]
