# SPDX-License-Identifier: Apache-2.0
"""With `sync` all that was acknowledged survives a power cut at any moment, and nothing else is served in its place:
objects, deletions, descriptors of namespaces, names of adapters, and the folders they lie in.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loracache import Namespace
from loracache.adapters.names import AdapterNames
from loracache.namespaces import Namespaces
from loracache.storage_backends.base import Outcome
from loracache.storage_backends.disk import manifest
from loracache.storage_backends.disk.backend import DiskBackend

Item = tuple[str, int]
NEVER = 1 << 60
CUTS = 4  # of each history
FAST = "/dev/shm" if os.path.isdir("/dev/shm") else None  # 256 folders for each cut


class History:
    """A disk tier and what lies beside it, in use; what was acknowledged when. Every thing has a number."""

    def __init__(self, recorder: Any, objects: Any) -> None:
        self.path = recorder.root / "deep" / "disk"
        self.recorder = recorder
        self.objects = [objects.new(size, compressible=True) for size in (1, 5000, 5000, 9000)]
        self.said: dict[Item, list[tuple[int, int, Any]]] = {}  # (begun, acknowledged, what is so then)
        self.start()

    def start(self) -> None:
        self.disk = DiskBackend(self.path, sync=True)
        list(self.disk.scan())
        self.spaces = Namespaces(self.path / "namespaces", sync=True)
        self.names = AdapterNames(self.path / "adapters", None, sync=True)

    def restart(self, number: int) -> None:
        self.disk.close()
        self.start()

    @contextlib.contextmanager
    def saying(self, kind: str, number: int, now: Any) -> Iterator[None]:
        begun = len(self.recorder.steps)
        told = self.said.setdefault((kind, number), [])
        told.append((begun, NEVER, now))
        yield
        told[-1] = (begun, len(self.recorder.steps), now)

    def store(self, number: int) -> None:
        planes = number % 2 and 2
        with self.saying("object", number % 4, True), self.saying("object", (number + 1) % 4, True):
            both = [self.objects[number % 4], self.objects[(number + 1) % 4]]
            results = self.disk.store([type(each)(each.info, each.buffers, planes) for each in both])
            assert [each.outcome for each in results] == [Outcome.OK] * 2

    def delete(self, number: int) -> None:
        with self.saying("object", number % 4, False):
            self.disk.delete([self.objects[number % 4].info.key])

    def register(self, number: int) -> None:
        with self.saying("space", number % 3, True):
            self.spaces.register(space(number % 3).descriptor(), [f"name {number}"])
            self.spaces.keep()
            assert not self.spaces.unkept

    def name(self, number: int) -> None:
        digest = hashlib.sha256(bytes([number])).hexdigest()
        with self.saying("name", number % 2, digest):
            self.names.put(f"name-{number % 2}", digest, "{}")

    def forget(self, number: int) -> None:
        with self.saying("name", number % 2, None):
            self.names.remove(f"name-{number % 2}")

    def may_be(self, item: Item, steps: int, nothing: Any) -> set[Any]:
        """What may be so when the power goes after so many steps: the last that was acknowledged, or what was begun."""
        allowed = {nothing}
        for begun, acknowledged, now in self.said.get(item, []):
            if acknowledged <= steps:
                allowed = {now}
            elif begun < steps:
                allowed.add(now)
        return allowed

    def check(self, path: Path, steps: int, loaded: Callable[[Any, Any], bool]) -> None:
        disk = DiskBackend(path / "deep" / "disk")
        list(disk.scan())
        for number, each in enumerate(self.objects):
            assert loaded(disk, each) in self.may_be(("object", number), steps, False), f"object {number}"
        disk.close()
        spaces = Namespaces(path / "deep" / "disk" / "namespaces")
        for number in range(3):
            there = spaces.get(space(number).digest()) is not None
            assert there in self.may_be(("space", number), steps, False), f"namespace {number}"
        names = AdapterNames(path / "deep" / "disk" / "adapters", None)
        for number in range(2):
            found = names.find(f"name-{number}")
            digest = found.digest if found is not None else None
            assert digest in self.may_be(("name", number), steps, None), f"name {number}"


def space(number: int) -> Namespace:
    return Namespace(f"{number:064x}", "float32", "layout", 16)


def loaded_by(objects: Any) -> Callable[[DiskBackend, Any], bool]:
    """Whether a backend serves an object; other bytes than its own fail."""

    def loaded(disk: DiskBackend, transfer: Any) -> bool:
        target = objects.empty(transfer)
        (result,) = disk.load([target])
        assert result.outcome in (Outcome.OK, Outcome.MISS, Outcome.CORRUPT), result
        assert result.outcome is not Outcome.OK or objects.payload(target) == objects.payload(transfer)
        return result.outcome is Outcome.OK

    return loaded


CALLS = ("store", "store", "delete", "register", "name", "forget", "restart")
calls_of_a_run = st.lists(st.tuples(st.sampled_from(CALLS), st.integers(0, 5)), min_size=1, max_size=8)


def run(recorder: Any, objects: Any, calls: list[tuple[str, int]]) -> History:
    with recorder.recording(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "_COMPACT_AT_LEAST", 2)
        history = History(recorder, objects)
        for call, number in calls:
            getattr(history, call)(number)
        history.disk.close()
    return history


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=calls_of_a_run, seed=st.integers(0, 2**32), survives=st.sampled_from([0.0, 0.5, 0.9]))
def test_what_was_acknowledged_survives_a_power_cut(
    power_cut: Any, objects: Any, calls: list[tuple[str, int]], seed: int, survives: float
) -> None:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        root = Path(folder) / "before"
        root.mkdir()
        recorder = power_cut.Recorder(root)
        history = run(recorder, objects, calls)
        assert power_cut.looked(root) == recorder.tree.look()  # nothing was done that was not recorded
        total = len(recorder.steps)
        for number, steps in enumerate([total, *(chance.randrange(total) for _ in range(CUTS - 1))]):
            after = Path(folder) / str(number)
            recorder.cut(steps, chance, survives).build(after)
            history.check(after, steps, loaded_by(objects))


@pytest.mark.parametrize("call", ["store", "register", "name", "delete"])
def test_a_cut_shows_what_was_not_synced(
    power_cut: Any, objects: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Of the test itself: where no folder is synced after the start, it fails."""
    root = tmp_path / "before"
    root.mkdir()
    recorder = power_cut.Recorder(root)
    history = run(recorder, objects, [])
    with recorder.recording():
        history.start()
        history.store(1)
        for place in ("namespaces", "adapters.names", "storage_backends.disk.backend"):
            monkeypatch.setattr(f"loracache.{place}.sync_folder", lambda path: None)
        getattr(history, call)(2)
        history.disk.close()
    recorder.cut(len(recorder.steps), random.Random(0), 0.0).build(tmp_path / "after")
    with pytest.raises(AssertionError, match=r"object|namespace|name"):
        history.check(tmp_path / "after", len(recorder.steps), loaded_by(objects))
