# SPDX-License-Identifier: Apache-2.0
"""Pinned memory, beside a runtime that writes down what it is asked: in pieces, in turns, on the worker's device, and
given back before the memory goes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from loracache.connectors.vllm.link import pinned
from loracache.connectors.vllm.link.pinned import CudaHost, PinnedPieces, prepare_mapping
from loracache.mapping import ArenaMap, address, map_arena

PIECE = 64 << 10
SIZE = 5 * PIECE + 4096


@dataclass
class Host:
    """A runtime. fails: the error of the call of that number; takes: seconds of a registration; stops: behind so many
    until `let` is set again."""

    inode: str = ""
    fails: dict[int, int] = field(default_factory=dict)
    takes: float = 0.0
    stops: int = 0
    registered: list[tuple[int, int]] = field(default_factory=list)
    unregistered: list[int] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)
    mapped: list[bool] = field(default_factory=list)
    let: threading.Event = field(default_factory=threading.Event)

    def register(self, start: int, nbytes: int) -> int:
        self.let.wait(60)
        began = time.monotonic()
        time.sleep(self.takes)
        self.spans.append((began, time.monotonic()))
        if error := self.fails.get(len(self.spans)):
            return error
        self.registered.append((start, nbytes))
        if len(self.registered) == self.stops:
            self.let.clear()
        return 0

    def unregister(self, start: int) -> int:
        self.unregistered.append(start)
        self.mapped.append(self.inode in inodes())
        return 0


def inodes() -> set[str]:
    """Of the files that this process maps."""
    return {line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines()}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[ArenaMap, Host]]]:
    hosts: list[Host] = []

    def make(**options: Any) -> tuple[ArenaMap, Host]:
        fd = os.memfd_create("arena")
        os.ftruncate(fd, SIZE)
        arena = map_arena(fd, SIZE, os.urandom(16))
        hosts.append(Host(str(os.fstat(fd).st_ino), **options))
        os.close(fd)
        return arena, hosts[-1]

    monkeypatch.setattr(pinned, "_PIECE", PIECE)
    monkeypatch.setattr(pinned, "_told", set())
    yield make
    for host in hosts:
        host.let.set()
    deadline = time.monotonic() + 30
    while threads("loracache-pin") and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.fixture
def pieces(eventually: Any) -> PinnedPieces:
    eventually(lambda: not pinned.pieces.steps()[0].size, "those of the test before are gone")
    return pinned.pieces


def test_the_whole_arena_is_pinned_in_pieces_and_no_copy_is_told_to_span_two(
    make: Any, pieces: PinnedPieces, eventually: Any
) -> None:
    arena, host = make()
    base = address(arena)
    prepare_mapping(arena, host)
    edges = pieces.steps()[0].tolist()
    assert edges == [*range(base, base + SIZE, PIECE), base + SIZE]  # known before the first is pinned
    assert not pieces.is_pinned(base, 1)
    host.let.set()
    eventually(lambda: pieces.is_pinned(base + 5 * PIECE, 4096), "all is pinned")
    assert host.registered == list(zip(edges[:-1], [PIECE] * 5 + [4096], strict=True))
    assert pieces.steps()[0].tolist() == edges
    assert all(pieces.is_pinned(start, nbytes) for start, nbytes in host.registered)
    for start, nbytes in [(base - 1, 2), (base + PIECE - 1, 2), (base, PIECE + 1), (base + SIZE - 1, 2), (0, 8)]:
        assert not pieces.is_pinned(start, nbytes)
    assert not pieces.is_pinned(base + SIZE, 1)


def test_what_was_read_of_the_pieces_does_not_change_under_its_reader(
    make: Any, pieces: PinnedPieces, eventually: Any
) -> None:
    arena, host = make()
    prepare_mapping(arena, host)
    _, before = pieces.steps()
    host.let.set()
    eventually(lambda: pieces.is_pinned(address(arena), PIECE), "it is pinned")
    assert not before.any()


@pytest.mark.usefixtures("make")
def test_arenas_side_by_side_are_told_apart() -> None:
    pieces = PinnedPieces()
    pieces.add(10 * PIECE, 2 * PIECE)
    pieces.add(8 * PIECE, 2 * PIECE)
    pieces.add(1 << 40, PIECE // 2)
    for piece in (9, 10, 11):
        pieces.pin(8 * PIECE if piece < 10 else 10 * PIECE, piece * PIECE)
    assert [pieces.is_pinned(piece * PIECE, PIECE) for piece in range(7, 13)] == [False, False, True, True, True, False]
    assert not pieces.is_pinned(10 * PIECE - 8, 16)
    assert pieces.remove(10 * PIECE) == [10 * PIECE, 11 * PIECE]
    assert [pieces.is_pinned(piece * PIECE, PIECE) for piece in (8, 9, 10)] == [False, True, False]
    assert pieces.remove(1 << 40) == []


def test_a_mapping_may_end_while_another_begins_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the collector comes upon the last reference to the one."""
    pieces = PinnedPieces()
    pieces.add(PIECE, SIZE)
    join = pieces._join

    def collected() -> None:
        monkeypatch.setattr(pieces, "_join", join)
        pieces.remove(PIECE)
        join()

    monkeypatch.setattr(pieces, "_join", collected)
    adding = threading.Thread(target=pieces.add, args=(100 * PIECE, SIZE), daemon=True)
    adding.start()
    adding.join(10)
    assert not adding.is_alive()
    assert pieces.steps()[0][0] == 100 * PIECE


def test_a_registration_ends_after_the_last_view_and_before_the_memory_goes(
    make: Any, pieces: PinnedPieces, eventually: Any
) -> None:
    """A copy under way holds views of what it copies."""
    arena, host = make()
    host.let.set()
    prepare_mapping(arena, host)
    eventually(lambda: len(host.registered) == 6, "it is pinned")
    eventually(lambda: threads("loracache-pin") == 0, "its thread has ended")
    copying = memoryview(arena)[PIECE : PIECE + 64]
    del arena
    assert host.unregistered == []
    assert host.inode in inodes()
    copying.release()
    del copying
    assert host.unregistered == [start for start, _ in host.registered]
    assert all(host.mapped)
    assert host.inode not in inodes()
    assert pieces.steps()[0].size == 0


def test_an_arena_lost_while_it_is_pinned_gives_back_what_was(make: Any, pieces: PinnedPieces, eventually: Any) -> None:
    arena, host = make(stops=2)
    host.let.set()
    prepare_mapping(arena, host)
    eventually(lambda: len(host.registered) == 2, "some of it is pinned")
    del arena
    host.let.set()
    eventually(lambda: host.inode not in inodes(), "it is unmapped")
    assert len(host.registered) < 6
    assert host.unregistered == [start for start, _ in host.registered]
    assert all(host.mapped)


def test_nothing_is_unmapped_under_a_registration_at_the_end_of_the_interpreter(
    make: Any, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    arena, host = make()
    host.let.set()
    prepare_mapping(arena, host)
    eventually(lambda: len(host.registered) == 6, "it is pinned")
    eventually(lambda: threads("loracache-pin") == 0, "its thread has ended")
    base = address(arena)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "is_finalizing", lambda: True)
        del arena
    pinned.pieces.remove(base)
    assert host.unregistered == []
    assert host.inode in inodes()


def test_a_forked_child_ends_no_registration_of_its_parent(make: Any, pieces: PinnedPieces, eventually: Any) -> None:
    arena, host = make()
    host.let.set()
    prepare_mapping(arena, host)
    eventually(lambda: len(host.registered) == 6, "it is pinned")
    eventually(lambda: threads("loracache-pin") == 0, "its thread has ended")
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            del arena
        os._exit(len(host.unregistered) + (host.inode in inodes()))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert pieces.is_pinned(address(arena), PIECE)


def test_there_is_a_pause_behind_each_piece_as_long_as_it_took(make: Any, eventually: Any) -> None:
    arena, host = make(takes=0.02)
    host.let.set()
    prepare_mapping(arena, host)
    eventually(lambda: len(host.registered) == 6, "it is pinned")
    for (began, ended), (again, _) in zip(host.spans, host.spans[1:], strict=False):
        assert again - ended >= 0.9 * (ended - began)


def test_processes_with_the_same_arena_take_turns(make: Any, pieces: PinnedPieces, eventually: Any) -> None:
    arena, host = make()
    other, free = make()
    host.let.set(), free.let.set()
    with socket.socket(socket.AF_UNIX) as turn:  # as another rank has it
        turn.bind(f"\0loracache-pin-{arena.instance.hex()}")
        prepare_mapping(arena, host)
        prepare_mapping(other, free)
        eventually(lambda: len(free.registered) == 6, "another daemon's is pinned")
        assert host.registered == []
    eventually(lambda: len(host.registered) == 6, "it is our turn")


def test_who_waits_for_a_turn_keeps_no_lost_arena(make: Any, eventually: Any) -> None:
    arena, host = make()
    host.let.set()
    with socket.socket(socket.AF_UNIX) as turn:
        turn.bind(f"\0loracache-pin-{arena.instance.hex()}")
        prepare_mapping(arena, host)
        time.sleep(0.1)
        del arena
        eventually(lambda: host.inode not in inodes(), "it is unmapped")
        eventually(lambda: threads("loracache-pin") == 0, "nobody waits any more")
    assert host.registered == []


@pytest.mark.parametrize(
    ("error", "limit", "words"),
    [
        (2, 64 << 10, "the first 0.0 are pinned (CUDA error 2: no more memory can be locked).*ulimit -l is 64 KiB"),
        (2, resource.RLIM_INFINITY, "give the daemon a smaller memory"),
        (801, 64 << 10, "WSL"),
        (712, resource.RLIM_INFINITY, "CUDA error 712"),
    ],
)
def test_why_no_more_is_pinned_is_said_once_and_the_rest_stays_unpinned(
    make: Any, pieces: PinnedPieces, eventually: Any, caplog: Any, monkeypatch: Any, error: int, limit: int, words: str
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (limit, limit))
    caplog.set_level(logging.WARNING, logger=pinned.__name__)
    made = [make(fails={3: error}) for _ in range(2)]
    for arena, host in made:
        host.let.set()
        prepare_mapping(arena, host)
        eventually(lambda host=host: len(host.spans) == 3, "it was refused")
        eventually(lambda: threads("loracache-pin") == 0, "its thread has ended")
    for arena, host in made:
        assert [pieces.is_pinned(address(arena) + place * PIECE, PIECE) for place in range(4)] == [
            True,
            True,
            False,
            False,
        ]
        assert len(host.spans) == 3
    found = [record.getMessage() for record in caplog.records if record.name == pinned.__name__]
    assert len(found) == 1
    assert all(part in found[0] for part in words.split(".*"))


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What CUDA's runtime is asked, and on which device. A thread is on device 0 until told otherwise."""
    current, calls = threading.local(), []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        before, current.index = getattr(current, "index", 0), index
        yield
        current.index = before

    class Runtime:
        def cudaHostRegister(self, start: int, nbytes: int, flags: int) -> int:
            calls.append(("register", getattr(current, "index", 0)))
            return 0

        def cudaHostUnregister(self, start: int) -> int:
            calls.append(("unregister", getattr(current, "index", 0)))
            return 0

    current.index = 3  # of this thread, the worker's
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "index", 0))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    return calls


def test_memory_is_registered_and_unregistered_on_the_workers_device_from_any_thread(
    make: Any, devices: list[tuple[str, int]], eventually: Any
) -> None:
    arena, _ = make()
    prepare_mapping(arena, CudaHost())
    eventually(lambda: len(devices) == 6, "it is pinned")
    eventually(lambda: threads("loracache-pin") == 0, "its thread has ended")
    held = [arena]
    del arena
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert devices == [("register", 3)] * 6 + [("unregister", 3)] * 6


def test_a_device_that_is_lost_leaves_the_arena_unpinned(make: Any, pieces: PinnedPieces, eventually: Any) -> None:
    class Lost(Host):
        def register(self, start: int, nbytes: int) -> int:
            raise RuntimeError("CUDA error: device is lost")

    arena, _ = make()
    prepare_mapping(arena, Lost())
    eventually(lambda: threads("loracache-pin") == 0, "its thread has ended")
    assert not pieces.steps()[1].any()


def threads(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())
