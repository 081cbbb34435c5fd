"""What do people say to a small device at home, and what is told about them? A grammar of our own, seeded.

A pattern's `{name}` is replaced by one of the alternatives of that name, which may hold names again. The same words
stand in several intents (set, turn, stop, on, how long), so that no single verb gives the intent away.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

INTENTS = ("light", "heating", "music", "timer", "weather", "shopping", "call", "door")

NUMBERS = {"two": 2, "five": 5, "ten": 10, "eighteen": 18, "nineteen": 19, "twenty": 20, "twenty one": 21, "thirty": 30, "forty": 40}
# Patterns of each intent; `{open}` and `{close}` are added around every one.
_COMMANDS: dict[str, tuple[str, ...]] = {
    "light": (
        "{switch} the {lamp} in the {room} {on}",
        "turn {on} the {room} {lamp}",
        "make it {brightness} in the {room}",
        "it is too {dark} in the {room}",
        "set the {room} {lamp} to {number} percent",
        "{dim} the {lamp} in the {room}",
        "I need {light} in the {room}",
        "no {light} in the {room} {when}",
        "I cannot see a thing in the {room}",
    ),
    "heating": (
        "set the {heater} in the {room} to {degrees}",
        "turn {updown} the {heater} in the {room}",
        "make the {room} {warmer}",
        "I am {cold} in the {room}",
        "it is too {hot} in the {room}",
        "{switch} the {heater} {on} {when}",
        "keep the {room} at {degrees} {when}",
        "{name} is {cold} in the {room}",
    ),
    "music": (
        "play {something} in the {room}",
        "play some {genre} by {artist}",
        "put on {something}",
        "{stop} the {track}",
        "turn {updown} the {track} in the {room}",
        "I want to {hear} {something}",
        "next {track}",
        "set the {track} to {number} percent",
        "what is this {track}",
    ),
    "timer": (
        "set a {timer} for {duration}",
        "{start} a {timer} of {duration}",
        "wake {name} in {duration}",
        "how long is {left} on the {timer}",
        "{stop} the {timer}",
        "give {name} {duration} for the {food}",
        "remind me of the {food} in {duration}",
        "count down from {number}",
        "tell {name} when {duration} are over",
    ),
    "weather": (
        "what is the {weather} {when}",
        "will it {rain} {when}",
        "do I need {clothes} {when}",
        "how {warm} is it {outside} {when}",
        "is it going to {rain} in {town}",
        "tell me the {weather} for {town}",
        "does {name} need {clothes} in {town}",
        "when does the {sky} come out {when}",
    ),
    "shopping": (
        "put {food} on the {list}",
        "add {number} {packs} of {food}",
        "we need {food} and {food}",
        "take {food} off the {list}",
        "{buy} {number} {packs} of {food} {when}",
        "what is on the {list}",
        "there is no {food} {left}",
        "{name} wants {food} from the {shop}",
    ),
    "call": (
        "{ring} {name}",
        "{ring} {name} at {place}",
        "get {name} on the {phone}",
        "I want to {talk} to {name}",
        "{stop} the {phone} call",
        "tell {name} that I am {late}",
        "send {name} a {message}",
        "who {rang} {when}",
    ),
    "door": (
        "{lock} the {door}",
        "is the {door} {locked}",
        "{lock} the {door} {when}",
        "who is at the {door}",
        "let {name} in",
        "open the {door} for {name}",
        "did {name} {lock} the {door} {when}",
        "keep the {door} {locked} {when}",
    ),
}
_WORDS: dict[str, tuple[str, ...]] = {
    "open": ("", "", "", "", "please", "hey", "hello", "now", "and now", "could you", "would you", "well", "okay", "right", "quick"),
    "close": ("", "", "", "", "please", "thanks", "thank you", "at once", "will you", "again", "if you can"),
    "switch": ("switch", "turn", "put"),
    "on": ("on", "off"),
    "updown": ("up", "down"),
    "lamp": ("lamp", "light", "lights", "lamps", "ceiling light", "reading lamp"),
    "light": ("light", "more light", "a light", "a lamp"),
    "room": ("kitchen", "bedroom", "hall", "cellar", "office", "attic"),
    "brightness": ("bright", "brighter", "dark", "darker"),
    "dark": ("dark", "bright", "gloomy"),
    "dim": ("dim", "brighten"),
    "number": ("two", "five", "ten", "twenty", "thirty", "forty"),
    "when": ("today", "tonight", "tomorrow", "this evening", "on {day}", "at {hour}"),
    "day": ("Monday", "Friday", "Sunday"),
    "hour": ("six", "noon", "midnight"),
    "heater": ("heating", "heater", "radiator", "thermostat"),
    "degrees": ("eighteen degrees", "nineteen degrees", "twenty degrees", "twenty one degrees"),
    "warmer": ("warmer", "warm", "cooler", "a little warmer", "a little cooler"),
    "cold": ("cold", "freezing", "shivering"),
    "hot": ("hot", "warm", "cold", "chilly"),
    "something": ("some {genre}", "a {genre} song", "my {genre} songs", "{artist}", "the radio", "a little {genre}"),
    "genre": ("jazz", "rock", "folk", "piano", "opera"),
    "artist": ("the Blue Kites", "Mara Lind", "Silver Lane"),
    "track": ("song", "music", "radio", "record", "tune"),
    "hear": ("hear", "listen to"),
    "stop": ("stop", "end", "pause", "cancel"),
    "start": ("start", "make", "give me"),
    "timer": ("timer", "alarm", "countdown", "kitchen timer", "stopwatch"),
    "duration": ("{number} minutes", "{number} seconds", "{number} hours"),
    "left": ("left", "over"),
    "weather": ("weather", "forecast", "temperature outside"),
    "rain": ("rain", "snow", "storm", "be sunny", "be windy", "freeze", "be foggy"),
    "clothes": ("an umbrella", "a coat", "a hat", "boots", "gloves", "a scarf"),
    "warm": ("warm", "cold", "windy", "wet"),
    "outside": ("outside", "out there", "in {town}"),
    "town": ("Aldmoor", "Brenhaven", "Castrup", "Dunfell"),
    "sky": ("sun", "moon"),
    "list": ("list", "shopping list"),
    "packs": ("packs", "bags", "boxes", "bottles", "tins"),
    "food": ("milk", "bread", "eggs", "rice", "tea", "soup"),
    "buy": ("buy", "order", "get"),
    "shop": ("shop", "market", "bakery"),
    "ring": ("call", "ring", "phone", "dial"),
    "rang": ("called", "rang", "phoned"),
    "place": ("home", "work", "the shop", "school"),
    "phone": ("phone", "line"),
    "talk": ("talk", "speak"),
    "late": ("late", "on my way", "at home", "busy", "nearly there"),
    "message": ("message", "note"),
    "lock": ("lock", "unlock", "open", "close", "shut"),
    "locked": ("locked", "open", "shut", "closed"),
    "door": ("front door", "back door", "garage", "garden gate"),
    "name": ("Anna", "Ben", "Clara", "Greta", "Hugo", "Tom"),
    "topic": ("That was about the", "They talked about the", "So much for the", "The speaker made a note of the"),
}
_SLOT = re.compile(r"\{(\w+)\}")


class Command(NamedTuple):
    """One thing that somebody says, and what is meant."""

    text: str
    intent: str
    parts: tuple[tuple[str, str], ...]
    """The names of the grammar's lists that it was made of, each with the words taken, the inner ones first."""


def commands(seed: int) -> Iterator[Command]:
    """Yield commands without end, each text once, the intents in turn."""
    source, seen = random.Random(seed), set()
    while True:
        for intent in INTENTS:
            command = command_of(source, intent)
            while command.text in seen:
                command = command_of(source, intent)
            seen.add(command.text)
            yield command


def command_of(source: random.Random, intent: str) -> Command:
    """Return a command of an intent."""
    parts: list[tuple[str, str]] = []
    said = expand(source, source.choice(_COMMANDS[intent]), parts)
    around = [expand(source, name) for name in ("{open}", "{close}")]
    return Command(" ".join([around[0], said, around[1]]).strip(), intent, tuple(parts))


def expand(source: random.Random, pattern: str, parts: list[tuple[str, str]] | None = None) -> str:
    """Replace every `{name}` by one of its alternatives; note name and words in `parts`."""

    def words_of(slot: re.Match[str]) -> str:
        words = expand(source, source.choice(_WORDS[slot[1]]), parts)
        if parts is not None:
            parts.append((slot[1], words))
        return words

    return _SLOT.sub(words_of, pattern)
