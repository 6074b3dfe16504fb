# SPDX-License-Identifier: Apache-2.0
"""Names of adapters under random changes, losses and restarts of two machines, and under threads: the last one wins."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from loracache.adapters import names as adapter_names
from loracache.adapters.names import AdapterNames, NameRecord, SharedNames
from loracache.errors import Unavailable

KEY = b"a secret"
MACHINES = (0, 1)
machines = st.sampled_from(MACHINES)
NAMES = ("a", "b")
named = st.sampled_from(NAMES)
digests = st.integers(0, 3).map(lambda number: f"{number:064x}")


class Clock:
    """Stands where the module's `time` is: every step takes a while."""

    now = 1_700_000_000.0

    def time(self) -> float:
        return self.now

    monotonic = time


class Shared(SharedNames):
    """The hash that both ask, unless it is away."""

    def __init__(self) -> None:
        self.records: dict[str, bytes] = {}
        self.away = False

    def get(self, name: str) -> bytes | None:
        self._reach()
        return self.records.get(name)

    def all(self) -> list[bytes]:
        self._reach()
        return list(self.records.values())

    def put(self, name: str, record: bytes, *, only_new: bool = False) -> None:
        self._reach()
        if not only_new or name not in self.records:
            self.records[name] = record

    def close(self) -> None:
        pass

    def _reach(self) -> None:
        if self.away:
            raise Unavailable("on order")


class NamesMachine(RuleBasedStateMachine):
    """`last`: what every name points to after its last change, None where it was removed. `heard`: what each machine
    was last told or told others. `lost`: names that the shared place lost and was not proven to have again.
    """

    def __init__(self, folder: Path, clock: Clock) -> None:
        super().__init__()
        self.folder = folder
        self.clock = clock
        self.shared = Shared()
        self.last: dict[str, str | None] = {}
        self.given: set[tuple[str, str]] = set()
        self.lost: set[str] = set()
        self.heard: list[dict[str, str | None]] = [{}, {}]
        self.names = [self._start(machine) for machine in MACHINES]

    def _start(self, machine: int) -> AdapterNames:
        return AdapterNames(self.folder / str(machine), self.shared, KEY)

    def _changed(self, machine: int, name: str, digest: str | None) -> None:
        self.last[name] = self.heard[machine][name] = digest
        self.lost.discard(name)

    def _heard(self, machine: int, name: str, record: NameRecord | None) -> None:
        digest = record.digest if record is not None else None
        if digest is not None:
            assert (name, digest) in self.given
        if name not in self.lost:
            assert digest == self.last.get(name)
        self.heard[machine][name] = digest

    @rule(machine=machines, name=named, several=st.lists(digests, min_size=1, max_size=3))
    def put(self, machine: int, name: str, several: list[str]) -> None:
        for digest in several:
            self.clock.now += 2
            self.names[machine].put(name, digest, "")
            self.given.add((name, digest))
            self._changed(machine, name, digest)

    @rule(machine=machines, name=named)
    def remove(self, machine: int, name: str) -> None:
        self.clock.now += 2
        gone = self.names[machine].remove(name)
        self._heard(machine, name, gone)
        if gone is not None:
            self._changed(machine, name, None)

    @rule(machine=machines, name=named)
    def find(self, machine: int, name: str) -> None:
        self._heard(machine, name, self.names[machine].find(name))

    @rule(machine=machines)
    def refresh(self, machine: int) -> None:
        self.names[machine].refresh()
        for name in NAMES:
            record = self.names[machine].known().get(name)
            if record is None and name in self.lost:
                continue  # nothing was heard of it
            self._heard(machine, name, record)

    @rule()
    def lose_everything(self) -> None:
        self.shared.records.clear()
        self.lost |= set(NAMES)

    @rule(machine=machines, name=named, digest=digests)
    def ask_and_change_while_it_is_away(self, machine: int, name: str, digest: str) -> None:
        names = self.names[machine]
        self.shared.away = True
        change: Callable[[], object]
        for change in (lambda: names.put(name, digest, ""), lambda: names.remove(name)):
            with pytest.raises(Unavailable):
                change()
        names.refresh()
        found = names.find(name)
        assert (found.digest if found is not None else None) == self.heard[machine].get(name)
        self.shared.away = False
        self.clock.now += 2  # it is asked again

    @rule(machine=machines)
    def restart(self, machine: int) -> None:
        before = self.names[machine].known()
        self.names[machine] = self._start(machine)
        assert self.names[machine].known() == before

    @rule()
    def all_agree_once_everybody_asked(self) -> None:
        for machine in MACHINES * 2:
            for name in NAMES:
                self.names[machine].find(name)
        for machine in MACHINES:
            known = {name: record.digest for name, record in self.names[machine].known().items()}
            assert known == {name: digest for name, digest in self.last.items() if digest is not None}
            self.heard[machine] = dict(self.last)
        self.lost.clear()

    def teardown(self) -> None:
        self.all_agree_once_everybody_asked()


@pytest.mark.timeout(300)  # a failure takes long to shrink
def test_the_last_change_of_a_name_wins_on_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(adapter_names, "time", clock)
    runs = iter(range(1 << 30))
    run_state_machine_as_test(
        lambda: NamesMachine(tmp_path / str(next(runs)), clock),  # type: ignore[arg-type]
        settings=settings(max_examples=150, stateful_step_count=30),
    )


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run_all(*works: Callable[[], object]) -> None:
    failures: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it is raised below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    if failures:
        raise failures[0]


@pytest.mark.usefixtures("switching")
def test_changes_are_told_in_the_order_they_happened_whoever_makes_them(tmp_path: Path) -> None:
    names = AdapterNames(tmp_path / "names", None)
    told: list[tuple[NameRecord | None, NameRecord]] = []

    def changed(before: NameRecord | None, after: NameRecord) -> None:
        time.sleep(0.001 * (after.version % 2))  # the next may come before, where it can
        told.append((before, after))

    names.changed = changed

    def write(first: int) -> None:
        for number in range(first, first + 50):
            names.put("a", f"{number:064x}", "")

    run_all(*(lambda first=first: write(first) for first in (0, 1000, 2000, 3000)))
    befores, afters = zip(*told, strict=True)
    assert befores == (None, *afters[:-1])
    assert names.find("a") == afters[-1]


@pytest.mark.usefixtures("switching")
def test_readers_never_see_a_half_changed_record(tmp_path: Path) -> None:
    shared = Shared()
    one, other = AdapterNames(tmp_path / "one", shared), AdapterNames(None, shared)
    digests = [f"{number:064x}" for number in range(120)]
    one.put("a", digests[0], digests[0] * 20)
    done = threading.Event()

    def write() -> None:
        try:
            for digest in digests:
                one.put("a", digest, digest * 20)
        finally:
            done.set()

    def read(find: Callable[[], NameRecord | None]) -> None:
        last = ""
        while not done.is_set():
            found = find()
            assert found is not None
            assert found.config == found.digest * 20
            assert found.digest >= last  # never back to an older one
            last = found.digest

    def from_file() -> NameRecord:
        (path,) = (tmp_path / "one").glob("*.json")
        return NameRecord.decode(path.read_bytes(), None)

    run_all(
        write,
        lambda: read(lambda: one.find("a")),
        lambda: read(lambda: one.known()["a"]),
        lambda: read(lambda: other.find("a")),
        lambda: read(from_file),
    )
    found = other.find("a")
    assert found is not None
    assert found.digest == digests[-1]
