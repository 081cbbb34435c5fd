"""What do people say to a small device at home, and what is told about them? A grammar of our own, seeded.

A pattern's `{name}` is replaced by one of the alternatives of that name, which may hold names again. The same words
stand in several intents (set, turn, stop, on, how long), so that no single verb gives the intent away.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

INTENTS = ("light", "heating", "music", "timer", "weather", "shopping", "call", "door")

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
        "play {something} by {artist}",
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
    "close": ("", "", "", "", "please", "thanks", "thank you", "now", "at once", "will you", "again", "if you can", "for {name}"),
    "switch": ("switch", "turn", "put"),
    "on": ("on", "off"),
    "updown": ("up", "down"),
    "lamp": ("lamp", "light", "lights", "lamps", "ceiling light", "reading lamp"),
    "light": ("light", "more light", "a light", "a lamp"),
    "room": ("kitchen", "bedroom", "bathroom", "hall", "cellar", "office", "attic", "nursery", "living room", "dining room"),
    "brightness": ("bright", "brighter", "dark", "darker"),
    "dark": ("dark", "bright", "gloomy"),
    "dim": ("dim", "brighten"),
    "number": ("two", "three", "four", "five", "six", "seven", "eight", "ten", "twelve", "fifteen", "twenty", "thirty", "forty", "fifty"),
    "when": (
        "now",
        "today",
        "tonight",
        "tomorrow",
        "this morning",
        "this evening",
        "on {day}",
        "at {hour}",
        "until {hour}",
        "before {hour}",
    ),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "hour": ("six", "seven", "eight", "nine", "ten", "noon", "midnight"),
    "heater": ("heating", "heater", "radiator", "thermostat"),
    "degrees": ("{number} degrees", "twenty one degrees", "nineteen degrees", "eighteen degrees"),
    "warmer": ("warmer", "warm", "cooler", "a little warmer", "a little cooler"),
    "cold": ("cold", "freezing", "shivering"),
    "hot": ("hot", "warm", "cold", "chilly"),
    "something": ("some {genre}", "a {genre} song", "my {genre} songs", "{artist}", "the radio", "a little {genre}"),
    "genre": ("jazz", "rock", "folk", "piano", "dance", "guitar", "opera", "summer"),
    "artist": ("the Blue Kites", "Mara Lind", "the Night Ferry", "Otto and the Owls", "Silver Lane", "Nina Vale"),
    "track": ("song", "music", "radio", "record", "tune"),
    "hear": ("hear", "listen to"),
    "stop": ("stop", "end", "pause", "cancel"),
    "start": ("start", "make", "give me"),
    "timer": ("timer", "alarm", "countdown", "kitchen timer", "stopwatch"),
    "duration": ("{number} minutes", "{number} seconds", "{number} hours", "half an hour", "a quarter of an hour", "an hour"),
    "left": ("left", "over"),
    "weather": ("weather", "forecast", "temperature outside"),
    "rain": ("rain", "snow", "storm", "be sunny", "be windy", "freeze", "be foggy"),
    "clothes": ("an umbrella", "a coat", "a hat", "boots", "gloves", "a scarf"),
    "warm": ("warm", "cold", "windy", "wet"),
    "outside": ("outside", "out there", "in {town}"),
    "town": ("Aldmoor", "Brenhaven", "Castrup", "Dunfell", "Eskby", "Fornham", "Greywick", "Hollin"),
    "sky": ("sun", "moon"),
    "list": ("list", "shopping list"),
    "packs": ("packs", "bags", "boxes", "bottles", "tins"),
    "food": ("milk", "bread", "eggs", "rice", "tea", "coffee", "apples", "cheese", "butter", "soup", "pasta", "potatoes", "flour", "sugar"),
    "buy": ("buy", "order", "get"),
    "shop": ("shop", "market", "bakery"),
    "ring": ("call", "ring", "phone", "dial"),
    "rang": ("called", "rang", "phoned"),
    "place": ("home", "work", "the office", "the shop", "school"),
    "phone": ("phone", "line"),
    "talk": ("talk", "speak"),
    "late": ("late", "on my way", "at home", "busy", "nearly there"),
    "message": ("message", "note"),
    "lock": ("lock", "unlock", "open", "close", "shut"),
    "locked": ("locked", "open", "shut", "closed"),
    "door": ("front door", "back door", "garage", "garden gate", "cellar door", "door"),
    "name": (
        "Anna",
        "Ben",
        "Clara",
        "David",
        "Ella",
        "Felix",
        "Greta",
        "Hugo",
        "Ida",
        "Jonas",
        "Lena",
        "Max",
        "Nora",
        "Paul",
        "Rosa",
        "Tom",
    ),
    "arrives": ("came into the {room}", "was in the {room}", "sat down in the {room}", "came home at {hour}", "went to the {room}"),
    "says": ("said", "asked", "called out", "told the speaker"),
    "answers": ("the speaker answered", "said the speaker", "came the answer"),
    "topic": ("That was about the", "They talked about the", "So much for the", "The speaker made a note of the"),
    "ending": (
        "Then {name} went to the {room}.",
        "{name} made tea in the {room}.",
        "It was {hour}, and {name} was {late}.",
        "Outside it began to {rain}.",
        "{name} put the {food} on the table.",
        "So the day ended, and all was well.",
    ),
}
# What the device answers, by intent: plain text, in which the intent's name is a word among others.
_ANSWERS: dict[str, tuple[str, ...]] = {
    "light": ("the light in the {room} is {on}", "the {lamp} is {brightness} now"),
    "heating": ("the heating in the {room} is at {degrees}", "the {room} will be {warmer}: the heating is {on}"),
    "music": ("here is some music: {something}", "the music is {on}"),
    "timer": ("the timer is set to {duration}", "{duration} are left on the timer"),
    "weather": ("the weather {when} is {warm}", "the weather in {town}: it will {rain}"),
    "shopping": ("the shopping list has {food} and {food}", "{food} for the next shopping"),
    "call": ("the call to {name} begins", "there was a call from {name}"),
    "door": ("the {door} is {locked}", "{name} is at the door"),
}
_SLOT = re.compile(r"\{(\w+)\}")


class Command(NamedTuple):
    """One thing that somebody says, and what is meant."""

    text: str
    intent: str


class Data(NamedTuple):
    """The files of the demo."""

    stories: Path
    train: Path
    test: Path


def commands(seed: int) -> Iterator[Command]:
    """Yield commands without end, each text once, the intents in turn."""
    source, seen = random.Random(seed), set()
    while True:
        for intent in INTENTS:
            text = _command(source, intent)
            while text in seen:
                text = _command(source, intent)
            seen.add(text)
            yield Command(text, intent)


def stories(seed: int, count: int) -> list[str]:
    """Return short plain texts of the household: someone comes, asks the device for things, and is answered."""
    source = random.Random(seed)
    return [_story(source) for _ in range(count)]


def write_data(folder: Path, *, seed: int = 0, train: int = 1500, test: int = 200, documents: int = 2500) -> Data:
    """Write `stories.txt` (documents apart by a blank line), `train.jsonl` and `test.jsonl`; no row is in both.

    Args:
        folder: where the files go; made if need be.
        seed: the same seed gives the same bytes.
        train: rows to learn from.
        test: rows held out.
        documents: plain texts for pre-training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = Data(folder / "stories.txt", folder / "train.jsonl", folder / "test.jsonl")
    source = commands(seed)
    for path, rows in ((data.train, train), (data.test, test)):
        lines = (json.dumps(next(source)._asdict()) + "\n" for _ in range(rows))
        _write(path, "".join(lines))
    _write(data.stories, "\n\n".join(stories(seed, documents)) + "\n")
    return data


def _write(path: Path, text: str) -> None:
    """Leave a file alone that holds this already: its age then says when the data changed."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _command(source: random.Random, intent: str) -> str:
    pattern = source.choice(_COMMANDS[intent])
    return " ".join(_expand(source, f"{{open}} {pattern} {{close}}").split())


def _story(source: random.Random) -> str:
    sentences = [_expand(source, "{name} {arrives}.")]
    for _ in range(source.randint(1, 3)):
        intent = source.choice(INTENTS)
        said, answer = _command(source, intent), _expand(source, source.choice(_ANSWERS[intent]))
        sentences.append(_expand(source, f'"{said}", {{name}} {{says}}. "{answer}", {{answers}}. {{topic}} {intent}.'))
    sentences.append(_expand(source, "{ending}"))
    return " ".join(sentences)


def _expand(source: random.Random, pattern: str) -> str:
    while _SLOT.search(pattern):
        pattern = _SLOT.sub(lambda slot: source.choice(_WORDS[slot[1]]), pattern)
    return pattern
