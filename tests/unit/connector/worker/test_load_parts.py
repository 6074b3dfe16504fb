# SPDX-License-Identifier: Apache-2.0
"""The parts of a load, with a scripted daemon: which are asked for when, and what counts of one that ends early."""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.client.connection import Reply
from loracache.connectors.vllm.common.messages import ChunkBlocks, Load
from loracache.connectors.vllm.worker import loader as loader_module
from loracache.connectors.vllm.worker import loading as loading_module
from loracache.connectors.vllm.worker.by_layer import LayerCopies
from loracache.errors import Unavailable
from loracache.keys import Namespace, checksum, chunk_keys
from loracache.wire import protocol

SIZE = 64 << 10
SPACE = Namespace("m" * 64, "float32", "rows", 1)
COUNT = 96  # of SIZE: six times the smallest arena there is
CHUNKS = chunk_keys(SPACE.digest(), range(COUNT), 1)
Make = Callable[..., Any]


@pytest.fixture
def make_worker(make_rows_worker: Make) -> Make:
    return partial(make_rows_worker, CHUNKS, SIZE)


class ScriptedConnection:
    """Answers requests when told to: `acquired` are the positions asked for by each part, `put` answers one."""

    def __init__(self, arena: int) -> None:
        self.map: bytearray | None = bytearray(arena)
        self.connected = True
        self.ended = False
        self.unsent = False
        self.parts: list[tuple[int, protocol.Acquire]] = []
        self.releases: list[protocol.Release] = []
        self.held = True  # what a release is answered
        self.confirms = True  # whether it is
        self._replies: dict[int, deque[Reply]] = {}
        self._number = 0
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._wake

    def poll(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        self.ended = self.map is None

    def send(self, request: Any, *, answer: bool = True) -> int:
        if self.map is None:
            if answer:
                raise Unavailable("gone")
            return 0
        self._number += 1
        self._replies[self._number] = deque()
        if isinstance(request, protocol.Acquire):
            self.parts.append((self._number, request))
        else:
            self.releases.append(request)
            if answer and self.confirms:
                self.reply(self._number, Reply([self.held], True))
        return self._number if answer else 0

    def reply(self, number: int, reply: Reply) -> None:
        self._replies.get(number, deque()).append(reply)
        os.eventfd_write(self._wake, 1)

    def take(self, number: int) -> Reply | None:
        if self.ended:
            raise Unavailable("gone")
        replies = self._replies[number]
        return replies.popleft() if replies else None

    def forget(self, number: int) -> None:
        self._replies.pop(number, None)

    def buffers(self, extents: list[int], size: int) -> list[memoryview]:
        assert self.map is not None
        return [memoryview(self.map)[extents[0] : extents[0] + size]]

    def close(self) -> None:
        self.map, self.connected = None, False

    def count(self, part: int) -> int:
        """Keys that a part asks for."""
        return len(self.parts[part][1].keys) // 32

    def bring(self, part: int, *places: int, last: bool = False, cause: str = "") -> None:
        """Answer for some places of a part: they are there, or why not."""
        number, _ = self.parts[part]
        good = checksum([memoryview(self.map)[:SIZE]])  # type: ignore[arg-type]
        items = [[place, cause] if cause else [place, SIZE, good, [0, SIZE]] for place in places]
        self.reply(number, Reply(items, last))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ScriptedConnection:
    """Sixteen objects of room in a worker's share of the arena, four in a part."""
    connection = ScriptedConnection(64 * SIZE)
    link = SimpleNamespace(connection=connection, ready=lambda: True, outage=SimpleNamespace(goes_on=print))
    monkeypatch.setattr(loader_module, "WorkerLink", lambda *_: link)
    return connection


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the loader sees runs `clock[0]` seconds ahead."""
    ahead = [0.0]
    for module in (loader_module, loading_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0]))
    return ahead


def test_two_parts_are_under_way_and_the_next_is_asked_for_when_one_is_let_go(
    script: ScriptedConnection, make_worker: Make, eventually: Any
) -> None:
    worker = make_worker("unix:///none")
    worker.load(range(12))
    eventually(lambda: len(script.parts) == 2, "two parts are asked for")
    assert [script.count(part) for part in (0, 1)] == [4, 4]
    assert not script.releases
    script.bring(0, 0, 1, 2, 3, last=True)
    eventually(lambda: len(script.parts) == 3, "a part is let go and the next asked for")
    script.bring(1, 0, 1, 2, 3, last=True)
    script.bring(2, 0, 1, 2, 3, last=True)
    assert worker.loaded() == ([], {})


def test_all_loads_of_a_worker_leave_room_for_others(
    script: ScriptedConnection, make_worker: Make, eventually: Any
) -> None:
    worker = make_worker("unix:///none")
    for number in range(3):
        worker.load(range(8), name=str(number))
    eventually(lambda: len(script.parts) == 4, "a quarter of the arena is asked for")
    for part in range(4):
        script.bring(part, 0, 1, 2, 3, last=True)
    eventually(lambda: len(script.parts) == 6, "the third load has its turn")
    for part in (4, 5):
        script.bring(part, 0, 1, 2, 3, last=True)
    assert [worker.loaded() for _ in range(3)] == [([], {})] * 3


def test_the_deadline_is_for_the_next_byte(
    script: ScriptedConnection, make_worker: Make, eventually: Any, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that takes longer than `load_timeout` is whole where each byte came in time."""
    worker = make_worker("unix:///none", timeout=100.0)
    copied: list[int] = []
    scatter = worker.copier.scatter

    def watched(moves: Any, after: Any) -> Any:
        copy = scatter(moves, after)
        copied.extend(block for move in moves for block in move.blocks)
        return copy

    monkeypatch.setattr(worker.copier, "scatter", watched)
    worker.load(range(4))
    eventually(lambda: len(script.parts) == 1)
    for place in range(4):
        clock[0] += 60.0
        script.bring(0, place, last=place == 3)
        eventually(lambda: len(copied) == place + 1)  # noqa: B023
    assert worker.loaded() == ([], {})


@pytest.mark.parametrize(("held", "failed"), [(True, [2, 3, 4, 5]), (False, [0, 1, 2, 3, 4, 5])])
def test_what_arrived_before_the_deadline_counts_where_its_lease_held(
    script: ScriptedConnection, make_worker: Make, eventually: Any, clock: list[float], held: bool, failed: list[int]
) -> None:
    worker = make_worker("unix:///none", timeout=100.0)
    script.held = held
    worker.load(range(6))
    eventually(lambda: len(script.parts) == 2)
    script.bring(0, 0, 1)
    eventually(lambda: worker.loader._active[0].parts[0].copied)
    clock[0] += 200.0
    os.eventfd_write(worker.loader._wake, 1)
    assert worker.loaded()[0] == failed
    script.bring(0, 2, 3, last=True)  # too late
    assert not worker.rows[2:4].any()


def test_of_a_daemon_that_does_not_confirm_only_what_was_let_go_before_counts(
    script: ScriptedConnection, make_worker: Make, eventually: Any, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading_module, "_CONFIRM_S", 0.01)
    worker = make_worker("unix:///none", timeout=100.0)
    worker.load(range(8))
    eventually(lambda: len(script.parts) == 2)
    script.bring(0, 0, 1, 2, 3, last=True)
    eventually(lambda: len(script.releases) == 1)
    script.confirms = False
    script.bring(1, 0, 1)
    eventually(lambda: worker.loader._active[0].parts[-1].copied)
    clock[0] += 200.0
    os.eventfd_write(worker.loader._wake, 1)
    assert worker.loaded() == ([4, 5, 6, 7], {"deadline": 1})


def test_a_daemon_that_dies_leaves_what_was_let_go_before(
    script: ScriptedConnection, make_worker: Make, eventually: Any
) -> None:
    worker = make_worker("unix:///none")
    worker.load(range(8))
    eventually(lambda: len(script.parts) == 2)
    script.bring(0, 0, 1, 2, 3, last=True)
    eventually(lambda: len(worker.loader._active[0].parts) == 1)
    script.map = None
    os.eventfd_write(worker.loader._wake, 1)
    assert worker.loaded() == ([4, 5, 6, 7], {"unavailable": 1})


def test_a_daemon_that_hangs_up_while_its_answer_is_copied_is_not_waited_for(
    script: ScriptedConnection, make_worker: Make, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that watches for hang-ups sees it first, and drops the mapping."""
    worker = make_worker("unix:///none", timeout=60.0)
    scatter = worker.copier.scatter

    def hangs_up(*arguments: Any) -> Any:
        copy = scatter(*arguments)
        script.map, script.connected = None, False
        return copy

    monkeypatch.setattr(worker.copier, "scatter", hangs_up)
    worker.load(range(8))
    eventually(lambda: len(script.parts) == 2)
    script.bring(0, 0)
    _, failed, causes = worker.done.get(timeout=10)
    assert (failed, causes) == (list(range(8)), {"unavailable": 1})


def test_behind_a_chunk_that_will_never_come_nothing_more_is_asked_for(
    script: ScriptedConnection, make_worker: Make, eventually: Any
) -> None:
    """vLLM computes everything from the first failed block on."""
    worker = make_worker("unix:///none")
    worker.load(range(16))
    eventually(lambda: len(script.parts) == 2)
    script.bring(0, 1, cause="absent")
    script.bring(0, 0, 2, 3, last=True)
    script.bring(1, 0, 1, 2, 3, last=True)
    failed, causes = worker.loaded()
    assert (failed, causes) == ([1, *range(8, 16)], {"absent": 1})
    assert len(script.parts) == 2


def test_a_lost_lease_fails_its_own_part(script: ScriptedConnection, make_worker: Make, eventually: Any) -> None:
    worker = make_worker("unix:///none")
    worker.load(range(8))
    eventually(lambda: len(script.parts) == 2)
    script.bring(0, 0, 1, 2, 3, last=True)
    eventually(lambda: len(worker.loader._active[0].parts) == 1)
    script.held = False
    script.bring(1, 0, 1, 2, 3, last=True)
    assert worker.loaded() == ([4, 5, 6, 7], {"lease_lost": 1})


def test_where_there_is_no_room_less_is_asked_for_at_a_time(
    script: ScriptedConnection, make_worker: Make, eventually: Any
) -> None:
    worker = make_worker("unix:///none")
    worker.load(range(4))
    eventually(lambda: len(script.parts) == 1)
    script.bring(0, 2, 3, cause="memory_full")
    script.bring(0, 0, 1, last=True)
    eventually(lambda: len(script.parts) == 2)
    script.bring(1, 0, 1, cause="memory_full", last=True)
    eventually(lambda: len(script.parts) >= 3)
    assert [script.count(part) for part in range(3)] == [4, 2, 1]
    for part in range(2, 4):
        eventually(lambda: len(script.parts) > part)  # noqa: B023
        script.bring(part, 0, last=True)
    assert worker.loaded() == ([], {})


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def test_a_load_over_several_tiers_begins_with_what_is_in_memory(
    script: ScriptedConnection, make_worker: Make, eventually: Any, late_copier: Any
) -> None:
    worker = make_worker("unix:///none", copier=late_copier)
    worker.load(range(4))
    eventually(lambda: len(script.parts) == 1)
    script.bring(0, 0, 2)  # the rest comes from a disk
    eventually(lambda: worker.loader._active[0].parts[0].copied == [0, 2], "its bytes are in their blocks")
    assert not script.releases
    script.bring(0, 1)
    script.bring(0, 3, last=True)
    assert worker.loaded() == ([], {})
    assert [move.blocks for moves, _ in worker.copier.scatters for move in moves][:2] == [(0,), (2,)]


@pytest.mark.parametrize("how", ["the daemon dies", "it is late"])
def test_a_load_that_ends_early_is_reported_after_what_it_submitted(
    script: ScriptedConnection, make_worker: Make, eventually: Any, late_copier: Any, clock: list[float], how: str
) -> None:
    """Else vLLM computes into blocks that a copy under way still writes to."""
    worker = make_worker("unix:///none", timeout=100.0, copier=late_copier)
    worker.copier.may.clear()
    worker.load(range(4))
    eventually(lambda: len(script.parts) == 1)
    script.bring(0, 0, 1)
    eventually(lambda: worker.copier.scatters)
    if how == "the daemon dies":
        script.map = None
    else:
        clock[0] += 200.0
    os.eventfd_write(worker.loader._wake, 1)
    with pytest.raises(queue.Empty):
        worker.done.get(timeout=0.3)
    assert not script.releases
    worker.copier.may.set()
    failed, causes = worker.loaded()
    assert all(copy.ended for _, copy in worker.copier.scatters)
    if how == "the daemon dies":
        assert (failed, causes) == ([0, 1, 2, 3], {"unavailable": 1})
    else:
        assert (failed, causes) == ([2, 3], {"deadline": 1})


def test_the_deadline_is_not_for_the_device(
    script: ScriptedConnection, make_worker: Make, eventually: Any, late_copier: Any, clock: list[float]
) -> None:
    worker = make_worker("unix:///none", timeout=100.0, copier=late_copier)
    worker.copier.may.clear()
    worker.load(range(4))
    eventually(lambda: len(script.parts) == 1)
    script.bring(0, 0, 1, 2, 3, last=True)
    eventually(lambda: worker.copier.scatters)
    clock[0] += 200.0
    os.eventfd_write(worker.loader._wake, 1)
    with pytest.raises(queue.Empty):
        worker.done.get(timeout=0.2)
    worker.copier.may.set()
    assert worker.loaded() == ([], {})


def test_layers_are_copied_once_all_chunks_are_there_and_all_are_asked_for_at_a_time(
    script: ScriptedConnection, make_worker: Make, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "_WITHIN_STEP_S", 20.0)
    worker = make_worker("unix:///none")
    copies = LayerCopies([slice(0, 1)], [SIZE])
    plan = tuple(ChunkBlocks(CHUNKS[at], (at,)) for at in range(12))
    worker.loader.submit(Load("r", plan, None, 1, within_step=True), None, copies)
    eventually(lambda: script.parts, "it is asked for")
    assert script.count(0) == 12
    script.bring(0, 0, 1)
    assert not copies.until_over(0.1)
    assert not copies._copies
    script.bring(0, *range(2, 12), last=True)
    assert worker.loaded() == ([], {})
    assert copies.until_over(5)
    assert len(copies._copies) == len(script.parts) == 1


def test_layers_wait_for_no_room(script: ScriptedConnection, make_worker: Make, eventually: Any) -> None:
    """A load that a step waits for is given up where the memory is full."""
    worker = make_worker("unix:///none")
    copies = LayerCopies([slice(0, 1)], [SIZE])
    plan = tuple(ChunkBlocks(CHUNKS[at], (at,)) for at in range(3))
    worker.loader.submit(Load("r", plan, None, 1, within_step=True), None, copies)
    eventually(lambda: script.parts, "it is asked for")
    script.bring(0, 0)
    script.bring(0, 1, cause="memory_full")
    script.bring(0, 2, last=True)
    assert worker.loaded() == ([1], {"memory_full": 1})
    assert len(script.parts) == 1
