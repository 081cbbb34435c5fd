"""What does `slmops quickstart` train on? A base model and a data set that it makes itself: nothing is downloaded.

`write_data` writes commands to a small home device with their intents, and plain text of the same household;
`write_base` trains a tokenizer and a tiny Llama on that plain text from scratch.
"""

from slmops.demo.household import INTENTS, Data, write_data
from slmops.demo.pretraining import settings_of, write_base

__all__ = ["INTENTS", "Data", "settings_of", "write_base", "write_data"]
