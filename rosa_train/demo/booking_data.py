"""Generates a small data set for the demo: requests to a front desk, and their meanings.

A grammar makes up every word, and nothing is copied from elsewhere. No model has seen the language
of the meanings, so an untrained model gets none right. Requests name times in words, in any order,
and meanings have clock times in a fixed order. No meaning of the evaluation occurs in training, so
memorising does not help.
"""

from __future__ import annotations

import random
from collections.abc import Container, Mapping
from pathlib import Path

from rosa_train.files import json_lines

PROMPT_TEMPLATE = "{utterance}\n=>"
COMPLETION_TEMPLATE = " {meaning}"


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


_NUMBERS = _names("zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve")
_WEEK = _names("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
# From the words of a request to the meaning.
_DAYS = {"today": "today", "tomorrow": "tomorrow"} | {f"on {d}": d[:3].lower() for d in _WEEK}
_TOWNS = _names(
    "Alderby, Brightwater, Coldbrook, Dunmere, Eastfold, Farrow, Gullhaven, Hazelton, Ironbridge, "
    "Juniper, Kestrel, Larkfield"
)
_RESTAURANTS = _names(
    "Copper Kettle, Olive Branch, Blue Heron, Saffron Room, Old Mill, Paper Lantern, Green Door, "
    "Fig Tree, Harbour Grill, Two Spoons"
)
_HOTELS = _names(
    "Grand Linden, Swan Hotel, Station Inn, Maple Lodge, Castle View, Quiet House, Harvest Inn, "
    "Lakeside Hotel"
)
_TABLE_WISHES = {
    "outdoor": _names("outside, on the terrace, in the open air"),
    "window": _names("by the window, with a view, next to a window"),
    "quiet": _names("somewhere quiet, in a quiet corner, where it is calm"),
}
_TRAIN_WISHES = {
    "first": _names("first class, in the good seats, travelling first"),
    "bike": _names("with my bike, bringing a bicycle, with two bikes"),
    "return": _names("there and back, and back again, as a return"),
}
_ROOM_WISHES = {
    "breakfast": _names("with breakfast, breakfast included, and a meal in the morning"),
    "sea": _names("facing the sea, with a sea view, close to the water"),
    "pets": _names("and my dog comes too, with a cat, where pets are fine"),
}
_ROOMS = {
    1: _names("a single room, a room for one, a room just for me"),
    2: _names("a double room, a room for two, a room for the two of us"),
    3: _names("a triple room, a room for three, a room for me and two friends"),
}
_ASK = _names(
    "I'd like, Can I get, Please book, We need, Could you reserve, Get me, I want, Any chance of, "
    "Looking for, Book me"
)
_END = (".", ".", ".", ", please.", ", thanks.")


def generate(
    count: int, seed: int = 0, *, exclude: Container[str] = frozenset()
) -> list[dict[str, str]]:
    """``count`` records ``{"utterance": ..., "meaning": ...}``. Equal seeds give equal records.

    A meaning has a kind of booking, and its slots in a fixed order. Half of them have a wish:
    ``table(at=Blue Heron; for=4; when=fri 19:30; wish=window)``,
    ``train(from=Farrow; to=Dunmere; when=today 08:15)``,
    ``room(at=Maple Lodge; for=2; when=mon; nights=3; wish=sea)``.

    Args:
        exclude: meanings that must not occur.

    Raises:
        ValueError: the count is negative.
    """
    if count < 0:
        raise ValueError(f"generate: expected count >= 0, got {count}")
    rng = random.Random(f"bookings/{seed}")
    found: list[dict[str, str]] = []
    while len(found) < count:
        row = rng.choice((_table, _train, _room))(rng)
        if row["meaning"] not in exclude:
            found.append(row)
    return found


def write(
    directory: str | Path, *, train: int = 2000, eval: int = 200, seed: int = 0
) -> tuple[Path, Path]:
    """Writes ``train.jsonl`` and ``eval.jsonl``, which share no meaning. Returns their paths."""
    held_out = generate(eval, 2 * seed)
    learnt = generate(train, 2 * seed + 1, exclude={row["meaning"] for row in held_out})
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, rows in zip(paths, (learnt, held_out), strict=True):
        path.write_text(json_lines(rows), encoding="utf-8")
    return paths


def _table(rng: random.Random) -> dict[str, str]:
    place, people = rng.choice(_RESTAURANTS), rng.randint(2, 12)
    size = rng.choice(
        (
            f"for {_number(rng, people)}",
            f"for {_number(rng, people)} people",
            f"for a party of {_number(rng, people)}",
            f"for me and {_number(rng, people - 1)} more",
        )
    )
    day, time, when = _when(rng)
    said = [_place(rng, place), size, day, time]
    slots = {"at": place, "for": str(people), "when": when}
    return _row(rng, "table", "a table", said, slots, _TABLE_WISHES)


def _train(rng: random.Random) -> dict[str, str]:
    start, end = rng.sample(_TOWNS, 2)
    thing = rng.choice(("a train", "a train ticket", "a seat on the train"))
    way = rng.choice(
        (f"from {start} to {end}", f"to {end} from {start}", f"to {end}, starting in {start},")
    )
    day, time, when = _when(rng)
    slots = {"from": start, "to": end, "when": when}
    return _row(rng, "train", thing, [way, day, time], slots, _TRAIN_WISHES)


def _room(rng: random.Random) -> dict[str, str]:
    place, people, nights = rng.choice(_HOTELS), rng.randint(1, 3), rng.randint(1, 7)
    stays = [f"for {_number(rng, nights)} night" + "s" * (nights > 1)]
    stays += ["just overnight"] * (nights == 1) + ["for a week"] * (nights == 7)
    day, when = rng.choice(tuple(_DAYS.items()))
    said = [_place(rng, place), rng.choice(stays), day.replace("on ", "from ")]
    slots = {"at": place, "for": str(people), "when": when, "nights": str(nights)}
    return _row(rng, "room", rng.choice(_ROOMS[people]), said, slots, _ROOM_WISHES)


def _row(
    rng: random.Random,
    kind: str,
    thing: str,
    said: list[str],
    slots: dict[str, str],
    wishes: Mapping[str, tuple[str, ...]],
) -> dict[str, str]:
    if rng.random() < 0.5:
        slots["wish"] = rng.choice(tuple(wishes))
        said.append(rng.choice(wishes[slots["wish"]]))
    rng.shuffle(said)
    utterance = " ".join((rng.choice(_ASK), thing, *said)).rstrip(",") + rng.choice(_END)
    meaning = "; ".join(f"{name}={value}" for name, value in slots.items())
    return {"utterance": utterance, "meaning": f"{kind}({meaning})"}


def _when(rng: random.Random) -> tuple[str, str, str]:
    """The words for a day and for a time, and the meaning of both, such as ``fri 19:30``."""
    hour, minute = rng.randint(7, 21), rng.choice((0, 15, 30, 45))
    twelve, following = (_NUMBERS[(h - 1) % 12 + 1] for h in (hour, hour + 1))
    words = {
        0: f"{twelve} o'clock",
        15: f"quarter past {twelve}",
        30: f"half past {twelve}",
        45: f"quarter to {following}",
    }[minute]
    part = "morning" if hour < 12 else "afternoon" if hour < 18 else "evening"
    half = "am" if hour < 12 else "pm"
    time = rng.choice(
        (
            f"{words} in the {part}",
            f"{(hour - 1) % 12 + 1}:{minute:02d} {half}",
            f"{hour}:{minute:02d}",
        )
    )
    day, meant = rng.choice(tuple(_DAYS.items()))
    return day, f"at {time}", f"{meant} {hour:02d}:{minute:02d}"


def _place(rng: random.Random, name: str) -> str:
    return f"{rng.choice(('at', 'in'))} the {name}"


def _number(rng: random.Random, value: int) -> str:
    return rng.choice((_NUMBERS[value], str(value)))
