# SPDX-License-Identifier: Apache-2.0
"""Names of adapters on one machine: what a name points to, what survives, who may have written it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from loracache.adapters import names as adapter_names
from loracache.adapters.names import AdapterNames, NameRecord, check_name
from loracache.errors import Unavailable, UsageError

X, Y, Z = "1" * 64, "2" * 64, "3" * 64
KEY, OTHER_KEY = b"a secret", b"another"


class Clock:
    """Stands where the module's `time` is."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(adapter_names, "time", made)
    return made


@pytest.fixture(params=["in a folder", "in memory"])
def names(request: pytest.FixtureRequest, tmp_path: Path) -> AdapterNames:
    return AdapterNames(tmp_path / "names" if request.param == "in a folder" else None, None)


def digest_of(found: NameRecord | None) -> str | None:
    return found.digest if found is not None else None


# -- one machine -------------------------------------------------------------------------------------------------------


def test_a_name_points_to_what_it_was_given_last(names: AdapterNames) -> None:
    assert names.find("a") is None
    names.put("a", X, "config of x")
    names.put("b", X, "config of x")
    names.put("a", Y, "config of y")
    found = names.find("a")
    assert found is not None
    assert (found.name, found.digest, found.config) == ("a", Y, "config of y")
    assert {name: record.digest for name, record in names.known().items()} == {"a": Y, "b": X}


def test_a_removed_name_points_nowhere_until_it_is_given_again(names: AdapterNames) -> None:
    names.put("a", X, "")
    assert digest_of(names.remove("a")) == X
    assert names.find("a") is None
    assert names.known() == {}
    assert names.remove("a") is None
    assert names.remove("never given") is None
    names.put("a", Y, "")
    assert digest_of(names.find("a")) == Y


def test_every_change_has_a_higher_version_even_where_the_clock_is_set_back(names: AdapterNames, clock: Clock) -> None:
    versions = []
    for digest in (X, Y, "", Z, Z):
        if digest:
            names.put("a", digest, "")
        else:
            names.remove("a")
        versions.append(names._known["a"].version)
        clock.now -= 3600
    assert versions == sorted(set(versions))


def test_what_changes_is_told_with_what_was_there_before(names: AdapterNames) -> None:
    told: list[tuple[str | None, str]] = []
    names.changed = lambda before, after: told.append((digest_of(before), after.digest))
    names.put("a", X, "")
    names.find("a")
    names.put("a", Y, "")
    names.remove("a")
    names.remove("a")
    assert told == [(None, X), (X, Y), (Y, "")]


def test_names_and_removals_survive_a_restart(tmp_path: Path) -> None:
    names = AdapterNames(tmp_path / "names", None, KEY)
    names.put("org/adapter:v1@x+y", X, "config")
    names.put("gone", X, "")
    names.remove("gone")
    names.close()
    again = AdapterNames(tmp_path / "names", None, KEY)
    assert again.known() == names.known()
    found = again.find("org/adapter:v1@x+y")
    assert found is not None
    assert (found.digest, found.config) == (X, "config")
    assert again.remove("gone") is None


def test_a_restart_passes_over_files_that_are_damaged_foreign_or_in_the_wrong_place(tmp_path: Path) -> None:
    folder = tmp_path / "names"
    names = AdapterNames(folder, None)
    names.put("a", X, "")
    (file,) = folder.glob("*.json")
    old = file.read_bytes()
    names.put("a", Y, "")
    good = file.read_bytes()
    names.put("b", Z, "")
    (damaged,) = set(folder.glob("*.json")) - {file}
    damaged.write_bytes(damaged.read_bytes()[:-9])
    for name, content in {
        "0.json": old, "zz.json": old, "empty.json": b"", "list.json": b"[]", "deep.json": b"[" * 100_000,
        "bytes.json": b"\xff\xfe", "left.tmp": good, "README.md": b"not ours",
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    (folder / "folder.json").mkdir()
    again = AdapterNames(folder, None)
    assert {name: record.digest for name, record in again.known().items()} == {"a": Y}
    again.put("b", X, "")
    assert digest_of(AdapterNames(folder, None).find("b")) == X


def test_a_folder_that_cannot_be_written_refuses_the_change_and_nothing_changed(tmp_path: Path) -> None:
    folder = tmp_path / "names"
    names = AdapterNames(folder, None)
    names.put("a", X, "")
    before = names.known()
    names.changed = lambda *change: pytest.fail(f"told of {change}")
    shutil.rmtree(folder)
    change: Callable[[], object]
    for change in (lambda: names.put("a", Y, ""), lambda: names.remove("a")):
        with pytest.raises(Unavailable, match=f"the name a cannot be kept in {folder}"):
            change()
    with pytest.raises(Unavailable, match="the name new cannot be kept"):
        names.put("new", Y, "")
    assert names.known() == before
    assert digest_of(names.find("a")) == X


def test_a_full_file_system_refuses_the_change_and_keeps_the_old_record(file_system: Callable[[int], Path]) -> None:
    folder = file_system(1)
    names = AdapterNames(folder, None)
    names.put("a", X, "")
    filler = os.open(folder / "filler", os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(filler, 0, (1 << 20) - (64 << 10))
    os.close(filler)
    with pytest.raises(Unavailable, match=r"the name a cannot be kept in .*No space left"):
        names.put("a", Y, "c" * 100_000)
    assert digest_of(names.find("a")) == X
    assert digest_of(AdapterNames(folder, None).find("a")) == X
    (folder / "filler").unlink()
    names.put("a", Y, "c" * 100_000)
    assert AdapterNames(folder, None).known() == names.known()


@pytest.mark.parametrize(
    "name", ["a", "7", "x" * 200, "org/model", "a.b-c_d:e@f+g/h", "A" * 63, "g" * 64, "a" * 65, "0" * 63 + "A"]
)
def test_names_that_serve_as_file_url_and_model_names_are_taken(name: str, names: AdapterNames) -> None:
    check_name(name)
    names.put(name, X, "")
    assert digest_of(names.find(name)) == X


@pytest.mark.parametrize(
    "name",
    [
        "", " ", "a b", "a\n", "\na", "-a", "_a", ".a", "/a", "a/../b", "..", "x" * 201, "ä", "a\0b", "a\\b", "a*",
        "a#", "a,b", "a[0]", "٣", X, "0123456789abcdef" * 4, "\ud800",
    ],
)  # fmt: skip
def test_names_that_could_be_taken_for_something_else_are_refused_and_not_kept(name: str, names: AdapterNames) -> None:
    call: Callable[[], object]
    for call in (lambda: check_name(name), lambda: names.put(name, X, "")):
        with pytest.raises(UsageError, match="cannot be an adapter's name: 1 to 200 of letters") as caught:
            call()
        assert str(caught.value).isascii()
    assert names.known() == {}
    assert names.find(name) is None
    assert names.remove(name) is None


def test_files_that_nobody_with_the_key_wrote_are_no_names(tmp_path: Path) -> None:
    for at, (key, later) in enumerate([(KEY, None), (KEY, OTHER_KEY), (None, KEY)]):
        names = AdapterNames(tmp_path / str(at), None, key)
        names.put("a", X, "")
        assert set(AdapterNames(tmp_path / str(at), None, key).known()) == {"a"}
        assert AdapterNames(tmp_path / str(at), None, later).known() == {}
