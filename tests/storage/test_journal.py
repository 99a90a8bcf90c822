"""The journal: what it says is what was written, or it says that it is damaged."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from w8a8.storage.journal import Journal


@dataclass(frozen=True)
class Work:
    what: str


@dataclass(frozen=True)
class Done:
    number: int
    share: float
    names: tuple[str, ...] = ()


@pytest.fixture
def journal(tmp_path: Path) -> Journal[Work, Done]:
    found = Journal(tmp_path / "journal.jsonl", Work, Done)
    found.begin(Work("größe"))
    found.append(Done(1, 0.5, ("a", "b")))
    return found


def test_what_is_written_is_read(journal: Journal[Work, Done]) -> None:
    noted = journal.read()
    assert (noted.job, noted.done, noted.damage) == (Work("größe"), [Done(1, 0.5, ("a", "b"))], "")


def test_no_journal_says_nothing(tmp_path: Path) -> None:
    noted = Journal(tmp_path / "none", Work, Done).read()
    assert (noted.job, [*noted.done], noted.damage) == (None, [], "")


@pytest.mark.parametrize("tail", ['{"number": 2, "sh', "{", '"', "\0\0\0", "[" * 100_000])
def test_a_line_that_was_cut_off_makes_room_for_the_next(journal: Journal[Work, Done], tail: str) -> None:
    with journal.path.open("a") as file:
        file.write(tail)
    assert journal.read().damage == ""
    journal.append(Done(2, 1))
    noted = journal.read()
    assert ([done.number for done in noted.done], noted.damage) == ([1, 2], "")


def test_a_line_that_lacks_its_end_alone_counts(journal: Journal[Work, Done]) -> None:
    with journal.path.open("a") as file:
        file.write(json.dumps(asdict(Done(2, 1))))
    assert [done.number for done in journal.read().done] == [1, 2]
    journal.append(Done(3, 1))
    assert [done.number for done in journal.read().done] == [1, 2, 3]


def test_damage_is_named_and_hides_nothing_else(journal: Journal[Work, Done]) -> None:
    with journal.path.open("a") as file:
        file.write("[1]\n")
    journal.append(Done(2, 1))
    noted = journal.read()
    assert noted.damage == "line 3 is not what was written"
    assert [done.number for done in noted.done] == [1, 2]
