"""What can be learned from a command of the household? Three tasks on the same rows: what is meant, with which details, and a reply.

A row is `text` with `intent` (one of eight words), `slots` (a JSON object: the device, and each detail that was said)
and `reply` (a butler's answer). All three follow from the command alone, by rules.
"""

from __future__ import annotations

from typing import Any

from slmops.demo.household import NUMBERS, Command

# What a command is carried out by: the one slot that every row has.
_DEVICES = {
    "light": "lamp",
    "heating": "heater",
    "music": "player",
    "timer": "timer",
    "weather": "forecast",
    "shopping": "list",
    "call": "phone",
    "door": "lock",
}
# Key of the object -> lists of the grammar whose words are its value, in the order in which the keys are written.
_SLOTS = {"room": ("room",), "door": ("door",), "town": ("town",), "person": ("name",), "state": ("on", "updown")}
# What a bare number counts, by intent.
_COUNTED = {"light": "percent", "music": "percent", "shopping": "count", "timer": "count"}
# What the butler promises, by intent: with a detail, where the command has it, and without.
_PROMISES = {
    "light": (("room", "I will see to the light in the {}."), "I will see to the light."),
    "heating": (("room", "I will see to the heating in the {}."), "I will see to the heating."),
    "music": (("room", "I will see to the music in the {}."), "I will see to the music."),
    "timer": (("name", "I will mind the time for {}."), "I will mind the time."),
    "weather": (("town", "I will look at the sky over {}."), "I will look at the sky."),
    "shopping": (("food", "I will put the {} on the list."), "I will read out the list."),
    "call": (("name", "I will ask the line for {}."), "I will see to the line."),
    "door": (("door", "I will see to the {}."), "I will see who is there."),
}


def row_of(command: Command) -> dict[str, Any]:
    """Return a command with its three answers, as a row of the data files."""
    return {"text": command.text, "intent": command.intent, "slots": slots_of(command), "reply": reply_of(command)}


def slots_of(command: Command) -> dict[str, Any]:
    """Return the device and each detail of a command, always in the same order of keys."""
    found: dict[str, Any] = {"device": _DEVICES[command.intent]}
    for key, names in _SLOTS.items():
        if said := [words for name, words in command.parts if name in names]:
            found[key] = said[-1]  # of nested lists the outermost
    if food := [words for name, words in command.parts if name == "food"]:
        found["food"] = food
    return found | _amount_of(command)


def reply_of(command: Command) -> str:
    """Return the butler's reply: always pleased."""
    return f"With pleasure. {promise_of(command)}"


def promise_of(command: Command) -> str:
    """Return what the butler will do."""
    (name, with_detail), without = _PROMISES[command.intent]
    detail = next((words for part, words in command.parts if part == name), None)
    return without if detail is None else with_detail.format(detail)


def _amount_of(command: Command) -> dict[str, Any]:
    """Return the number of a command with what it counts; nothing where it has none."""
    parts = dict(command.parts)
    if duration := parts.get("duration"):
        number, _, unit = duration.rpartition(" ")
        return {unit: NUMBERS[number]}
    if degrees := parts.get("degrees"):
        return {"degrees": NUMBERS[degrees.removesuffix(" degrees")]}
    return {_COUNTED[command.intent]: NUMBERS[parts["number"]]} if "number" in parts else {}
