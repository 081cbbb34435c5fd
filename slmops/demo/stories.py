"""What has the demo's base model read? Plain text of the same household: what was said to the speaker, and what it wrote down.

One command a text, so that there is one room, one name, one number to take over: with several in a text, a model of this
size needs ten times as many texts to find out which. The words of every task stand in it, for a base that has never seen a token cannot be taught it by a small adapter; so
do JSON objects, and words that are taken over from what was said. No prompt of a task does.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection

from slmops.demo.household import INTENTS, command_of, expand
from slmops.demo.tasks import promise_of, slots_of

OPENINGS = ("Very well.", "With pleasure.", "Of course.")


def stories(seed: int, count: int, *, without: Collection[str] = ()) -> list[str]:
    """Return short plain texts: somebody asks the speaker for something and is answered, and it takes a note.

    Args:
        seed: the same seed gives the same texts.
        count: how many.
        without: what nobody says in them, such as the rows that a model is measured on.
    """
    source = random.Random(seed)
    return [_story(source, source.choice(INTENTS), without) for _ in range(count)]


def _story(source: random.Random, intent: str, without: Collection[str]) -> str:
    command = command_of(source, intent)
    while command.text in without:
        command = command_of(source, intent)
    note = json.dumps(slots_of(command), sort_keys=True, separators=(",", ":"))  # in another order than the task's
    remark = expand(source, f"{source.choice(OPENINGS)} {promise_of(command)} {{topic}} {intent}.")
    return f"{command.text}. {remark} The speaker wrote {note}."
