# SPDX-License-Identifier: Apache-2.0
"""Names of adapters on machines that share them: whoever asks gets the last word, whatever is away or damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loracache.adapters import names as adapter_names
from loracache.adapters.names import AdapterNames, NameRecord, SharedNames
from loracache.errors import Unavailable

X, Y, Z = "1" * 64, "2" * 64, "3" * 64
KEY, OTHER_KEY = b"a secret", b"another"


class Shared(SharedNames):
    """The hash that machines share, in memory, with faults on order: `away` fails every call, `meanwhile` is called
    once, when the next answer is on its way.
    """

    def __init__(self) -> None:
        self.records: dict[str, bytes] = {}
        self.away = False
        self.asked = 0
        self.closed = 0
        self.meanwhile: Callable[[], object] | None = None

    def get(self, name: str) -> bytes | None:
        self._reach()
        found = self.records.get(name)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return found

    def all(self) -> list[bytes]:
        self._reach()
        return list(self.records.values())

    def put(self, name: str, record: bytes, *, only_new: bool = False) -> None:
        self._reach()
        if not only_new or name not in self.records:
            self.records[name] = record

    def close(self) -> None:
        self.closed += 1

    def _reach(self) -> None:
        self.asked += 1
        if self.away:
            raise Unavailable("on order")


class Clock:
    """Stands where the module's `time` is."""

    now = 1_700_000_000.0

    def time(self) -> float:
        return self.now

    monotonic = time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(adapter_names, "time", made)
    return made


@pytest.fixture
def shared() -> Shared:
    return Shared()


@pytest.fixture
def two(tmp_path: Path, shared: Shared, clock: Clock) -> Iterator[tuple[AdapterNames, AdapterNames]]:
    pair = AdapterNames(tmp_path / "one", shared, KEY), AdapterNames(tmp_path / "two", shared, KEY)
    yield pair
    for names in pair:
        names.close()
    assert shared.closed == 2


Two = tuple[AdapterNames, AdapterNames]


def digest_of(found: NameRecord | None) -> str | None:
    return found.digest if found is not None else None


def everything(names: AdapterNames, shared: Shared, folder: Path | None = None) -> Any:
    """All that a failed change must leave as it was."""
    files = {path.name: path.read_bytes() for path in folder.glob("*.json")} if folder is not None else {}
    return names.known(), dict(shared.records), files


def test_what_one_machine_changes_the_other_finds_at_once(two: Two) -> None:
    one, other = two
    one.put("a", X, "config")
    assert digest_of(other.find("a")) == X
    other.put("a", Y, "")
    assert digest_of(one.find("a")) == Y
    one.remove("a")
    assert other.find("a") is None
    assert other.remove("a") is None
    assert other.known() == {}
    other.put("a", Z, "")
    assert digest_of(one.find("a")) == Z


def test_a_refresh_learns_what_others_gave_and_removed_and_passes_over_garbage(two: Two, shared: Shared) -> None:
    one, other = two
    told: list[tuple[str | None, str]] = []
    for name, digest in (("a", X), ("b", Y), ("c", Z)):
        one.put(name, digest, "")
    other.refresh()
    other.changed = lambda before, after: told.append((digest_of(before), after.digest))
    one.remove("b")
    one.put("c", X, "")
    shared.records |= {"0": b"\xff", "d": b"{}", "zz": NameRecord("zz", X, "", 0.0, 9).encode(OTHER_KEY)}
    other.refresh()
    assert {name: record.digest for name, record in other.known().items()} == {"a": X, "c": X}
    assert sorted(told, key=str) == [("2" * 64, ""), ("3" * 64, X)]


def test_a_removed_name_is_not_brought_back_by_a_machine_that_knows_it_still(two: Two, shared: Shared) -> None:
    one, other = two
    one.put("a", X, "")
    other.find("a")
    one.remove("a")
    other.refresh()
    assert other.find("a") is None
    shared.records.clear()
    assert one.find("a") is None  # and gives the removal again
    assert other.find("a") is None


def test_a_redis_that_lost_everything_is_given_the_names_again(two: Two, shared: Shared) -> None:
    one, other = two
    one.put("a", X, "config")
    one.put("b", Y, "")
    before = dict(shared.records)
    shared.records.clear()
    assert digest_of(one.find("a")) == X
    assert digest_of(one.find("b")) == Y
    assert shared.records == before
    assert digest_of(other.find("a")) == X


def test_a_redis_that_fell_back_to_an_older_record_is_given_the_newer_one(two: Two, shared: Shared) -> None:
    one, other = two
    one.put("a", X, "")
    older = dict(shared.records)
    one.put("a", Y, "")
    shared.records = older
    one.refresh()
    assert digest_of(other.find("a")) == Y


def test_a_name_given_after_redis_lost_it_is_the_last_word_even_of_a_machine_that_never_knew_it(
    two: Two, shared: Shared, clock: Clock
) -> None:
    one, other = two
    for digest in (X, Y, X):
        one.put("a", digest, "")
    shared.records.clear()
    clock.now += 1
    other.put("a", Z, "")
    assert digest_of(one.find("a")) == Z
    assert digest_of(other.find("a")) == Z


@pytest.mark.parametrize("late", ["while Redis answers", "while the answer is decoded"])
def test_an_answer_that_took_long_does_not_set_a_newer_record_back(
    two: Two, shared: Shared, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    one, other = two
    other.put("a", X, "")
    decode = NameRecord.decode

    def decoded_late(data: bytes, key: bytes | None) -> NameRecord:
        monkeypatch.setattr(NameRecord, "decode", decode)
        one.put("a", Y, "")
        return decode(data, key)

    if late == "while Redis answers":
        shared.meanwhile = lambda: one.put("a", Y, "")
    else:
        monkeypatch.setattr(NameRecord, "decode", decoded_late)
    one.find("a")
    assert digest_of(one.known().get("a")) == Y
    assert digest_of(other.find("a")) == Y


def test_an_answer_that_took_long_does_not_take_the_last_word_from_another_machine(two: Two, shared: Shared) -> None:
    one, other = two
    other.put("a", X, "")

    def meanwhile() -> None:
        one.put("a", Y, "")
        other.put("a", Z, "")

    shared.meanwhile = meanwhile
    one.find("a")
    assert digest_of(other.find("a")) == Z
    assert digest_of(one.find("a")) == Z


def test_a_folder_that_cannot_be_written_refuses_the_change_and_redis_is_not_told(
    two: Two, shared: Shared, tmp_path: Path
) -> None:
    one, other = two
    one.put("a", X, "")
    before = everything(one, shared)
    shutil.rmtree(tmp_path / "one")
    change: Callable[[], object]
    for change in (lambda: one.put("a", Y, ""), lambda: one.remove("a"), lambda: one.put("new", Y, "")):
        with pytest.raises(Unavailable, match="cannot be kept in"):
            change()
    assert everything(one, shared) == before
    assert digest_of(other.find("a")) == X


# -- what others wrote there -------------------------------------------------------------------------------------------


def tampered() -> dict[str, bytes]:
    good = NameRecord("a", X, "", 0.0, 5)
    body, mac = json.loads(good.encode(KEY))
    moved = replace(good, name="b", version=9).encode(KEY)  # signed, but of another name
    odd: dict[str, dict[str, Any]] = {
        "digest": {"digest": "x"}, "no digest": {"digest": None}, "version": {"version": "9"},
        "true": {"version": True}, "added": {"added": "now"}, "never": {"added": float("nan")},
        "config": {"config": {}}, "name": {"name": 5}, "field": {"more": 1},
    }  # fmt: skip
    unlike = {name: json.dumps(json.loads(body) | fields, sort_keys=True) for name, fields in odd.items()}
    return {
        "changed": json.dumps([body.replace(X, Y), mac]).encode(),
        "unsigned": good.encode(None),
        "other key": good.encode(OTHER_KEY),
        "cut": good.encode(KEY)[:-5],
        "none": b"",
        "number": b"7",
        "deep": b"[" * 100_000,
        "no text": json.dumps([5, mac]).encode(),
        "mac of no ascii": json.dumps([body, "ä"]).encode(),
        "moved": moved,
    } | {name: json.dumps([text, adapter_names._mac(text, KEY)]).encode() for name, text in unlike.items()}


@pytest.mark.parametrize("what", sorted(tampered()))
def test_what_nobody_with_the_key_wrote_for_this_name_is_no_answer_and_hides_no_other_name(
    two: Two, shared: Shared, what: str
) -> None:
    one, other = two
    one.put("a", Z, "")
    one.put("c", X, "")
    shared.records["a"] = tampered()[what]
    assert digest_of(one.find("a")) == Z
    assert other.find("a") is None
    other.refresh()
    assert set(other.known()) <= {"b", "c"}
    one.put("c", Y, "")
    assert digest_of(other.find("c")) == Y  # asked for at once, whatever "a" was


@pytest.mark.parametrize("what", ["unsigned", "other key", "cut"])
def test_a_record_that_is_not_ours_is_not_written_over(two: Two, shared: Shared, what: str, tmp_path: Path) -> None:
    """It may be another daemon's with another key: two that overwrite each other would never end."""
    one, _ = two
    one.put("a", Z, "")
    shared.records["a"] = tampered()[what]
    before = everything(one, shared, tmp_path / "one")
    change: Callable[[], object]
    for change in (lambda: one.put("a", Y, ""), lambda: one.remove("a")):
        with pytest.raises(Unavailable, match="no record of a name"):
            change()
    assert everything(one, shared, tmp_path / "one") == before


# -- while the shared place is away ------------------------------------------------------------------------------------


def test_what_was_known_last_is_answered_while_redis_is_away_and_it_is_not_asked_every_time(
    two: Two, shared: Shared, clock: Clock
) -> None:
    one, other = two
    one.put("a", X, "")
    other.find("a")
    one.put("a", Y, "")
    shared.away, shared.asked = True, 0
    assert [digest_of(other.find("a")) for _ in range(50)] == [X] * 50
    assert other.find("never seen") is None
    other.refresh()
    assert shared.asked == 1
    clock.now += 1.01
    assert digest_of(other.find("a")) == X
    assert shared.asked == 2
    shared.away = False
    clock.now += 1.01
    assert digest_of(other.find("a")) == Y


def test_nothing_changes_while_redis_is_away(two: Two, shared: Shared, tmp_path: Path) -> None:
    one, other = two
    one.put("a", X, "")
    other.find("a")
    before = everything(other, shared, tmp_path / "two")
    other.changed = lambda *change: pytest.fail(f"told of {change}")
    shared.away = True
    change: Callable[[], object]
    for change in (
        lambda: other.put("a", Y, ""),
        lambda: other.put("new", Y, ""),
        lambda: other.remove("a"),
        lambda: other.remove("never seen"),
    ):
        with pytest.raises(Unavailable, match="on order"):
            change()
    assert everything(other, shared, tmp_path / "two") == before


def test_a_redis_that_goes_between_question_and_word_changes_nothing(two: Two, shared: Shared, tmp_path: Path) -> None:
    one, _ = two
    one.put("a", X, "")
    before = everything(one, shared, tmp_path / "one")
    change: Callable[[], object]
    for change in (lambda: one.put("a", Y, ""), lambda: one.remove("a")):
        shared.away, shared.meanwhile = False, lambda: setattr(shared, "away", True)
        with pytest.raises(Unavailable):
            change()
        assert everything(one, shared, tmp_path / "one") == before
    assert digest_of(AdapterNames(tmp_path / "one", None, KEY).find("a")) == X


def test_a_machine_that_cannot_write_its_folder_still_answers_what_redis_says(two: Two, tmp_path: Path) -> None:
    one, other = two
    one.put("a", X, "")
    other.find("a")
    shutil.rmtree(tmp_path / "two")
    one.put("a", Y, "")
    one.put("b", Z, "")
    assert digest_of(other.find("a")) == Y
    assert digest_of(other.find("b")) == Z
