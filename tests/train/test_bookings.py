"""The generated data set: it depends on the seed, rarely repeats, and its meanings are right."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from rosa_train.data.examples import parse_template
from rosa_train.data.records import read_records
from rosa_train.demo.booking_data import (
    COMPLETION_TEMPLATE,
    PROMPT_TEMPLATE,
    generate,
    write,
)

WORDS = re.findall(r"\w+", "one two three four five six seven eight nine ten eleven twelve")
NUMBERS = {word: value for value, word in enumerate(WORDS, 1)}
DAYS = ("today", "tomorrow", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
MEANING = re.compile(
    r"table\(at=[\w ]+; for=\d+; when=(\w+) \d\d:\d\d(; wish=\w+)?\)"
    r"|train\(from=\w+; to=\w+; when=(\w+) \d\d:\d\d(; wish=\w+)?\)"
    r"|room\(at=[\w ]+; for=[123]; when=(\w+); nights=[1-7](; wish=\w+)?\)"
)


def slots(meaning: str) -> dict[str, str]:
    return dict(slot.split("=") for slot in meaning.split("(")[1].rstrip(")").split("; "))


def test_same_seed_generates_the_same_data() -> None:
    random.seed(1)
    before = random.getstate()
    assert generate(50, 3) == generate(50, 3)
    assert generate(60, 3)[:50] == generate(50, 3) != generate(50, 4)
    assert random.getstate() == before
    assert generate(0) == []
    with pytest.raises(ValueError, match="count >= 0, got -1"):
        generate(-1)


def test_generated_rows_rarely_repeat() -> None:
    rows = generate(2000, 1)
    meanings = {row["meaning"] for row in rows}
    assert len({row["utterance"] for row in rows}) > 1990
    assert len(meanings) > 1800
    assert all(MEANING.fullmatch(meaning) for meaning in meanings)
    kinds = [row["meaning"].split("(")[0] for row in rows]
    assert {kind: kinds.count(kind) // 100 for kind in kinds} == pytest.approx(
        {"table": 6, "train": 6, "room": 6}, abs=1
    )
    again = generate(100, 1, exclude=meanings)
    assert not meanings & {row["meaning"] for row in again}


def said_time(utterance: str) -> str | None:
    """The time in an utterance, parsed independently of the generator's own rules."""
    if found := re.search(r"at (\d+):(\d\d)(?: ([ap])m)?", utterance):
        hour = int(found[1]) % 12 + 12 * (found[3] == "p") if found[3] else int(found[1])
        return f"{hour:02d}:{found[2]}"
    found = re.search(
        r"at (?:(quarter past|half past|quarter to) )?(\w+)(?: o'clock)? in the (\w+)", utterance
    )
    if not found or found[2] not in NUMBERS:
        return None
    past = {None: 0, "quarter past": 15, "half past": 30, "quarter to": -15}[found[1]]
    candidates = [60 * (NUMBERS[found[2]] + offset) + past for offset in (0, 12)]
    parts = {"morning": (0, 720), "afternoon": (720, 1080), "evening": (1080, 1440)}
    start, stop = parts[found[3]]
    (minutes,) = {m % 1440 for m in candidates if start <= m % 1440 < stop}
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def test_meaning_matches_its_utterance() -> None:
    times = 0
    for row in generate(2000, 5):
        utterance, meaning = row["utterance"], slots(row["meaning"])
        for name in ("at", "from", "to"):
            assert meaning.get(name, "") in utterance
        day, *time = meaning["when"].split()
        words = re.findall(r"\w+", utterance.lower())
        (said,) = {*DAYS, "sunday"} & {*words}
        assert day in (said, said[:3])
        if time:
            assert said_time(utterance) == time[0]
            times += 1
        if row["meaning"].startswith("train"):
            assert f"from {meaning['from']}" in utterance or f"in {meaning['from']}" in utterance
            assert f"to {meaning['to']}" in utterance
        if row["meaning"].startswith("table"):
            number = rf"(\d+|{'|'.join(WORDS)})\b"
            more = re.search(rf"for me and {number} more", utterance)
            people = more or re.search(rf"for (?:a party of )?{number}", utterance)
            assert people
            count = int(people[1]) if people[1].isdigit() else NUMBERS[people[1]]
            assert count + bool(more) == int(meaning["for"])
    assert times > 1000


def test_written_files_can_be_read_for_training(tmp_path: Path) -> None:
    paths = write(tmp_path / "new", train=300, eval=40, seed=2)
    assert [path.name for path in paths] == ["train.jsonl", "eval.jsonl"]
    train, held_out = (read_records(path) for path in paths)
    assert (len(train), len(held_out)) == (300, 40)
    assert not {r.fields["meaning"] for r in train} & {r.fields["meaning"] for r in held_out}
    first = json.loads(paths[0].read_text().splitlines()[0])
    assert parse_template(PROMPT_TEMPLATE)(train[0]) == first["utterance"] + "\n=>"
    assert parse_template(COMPLETION_TEMPLATE)(train[0]) == " " + first["meaning"]
    before = [path.read_bytes() for path in paths]
    write(tmp_path / "new", train=300, eval=40, seed=2)
    assert [path.read_bytes() for path in paths] == before
    # The files of the next seed all differ from these.
    other = write(tmp_path / "other", train=300, eval=40, seed=3)
    assert len({path.read_bytes()[:500] for path in (*paths, *other)}) == 4
