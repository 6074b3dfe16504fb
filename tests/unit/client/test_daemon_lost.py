# SPDX-License-Identifier: Apache-2.0
"""A daemon that is gone leaves no memory behind in its clients, whether they notice it by themselves or not."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient, Namespace
from loracache.client import hangups
from loracache.client.connection import Connection
from loracache.errors import Unavailable
from loracache.mapping import ArenaMap, address, map_arena

SIZE = 50_000


def arena_of(pid: int | str) -> str:
    """The inode of the arena that a process maps, "" where it maps none."""
    found = re.search(r" (\d+) +/memfd:loracache-arena", Path(f"/proc/{pid}/maps").read_text())
    return found.group(1) if found else ""


def mapped(inode: str) -> bool:
    """Whether this process maps that arena."""
    return re.search(rf" {inode} +/memfd:loracache-arena", Path("/proc/self/maps").read_text()) is not None


def stored(client: CacheClient) -> bytes:
    root, key = client.register(Namespace("model", "float32", "layout", 16)), os.urandom(32)
    with client.reserve(root, [key], [SIZE]) as reservation:
        reservation.write(0, bytes(SIZE))
    return key


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_clients_that_do_nothing_let_go_of_a_daemons_arena_by_themselves(
    daemon: Any, eventually: Any, end: int
) -> None:
    serving = daemon()
    one, two = serving.client(), serving.client()
    stored(one)
    inode = arena_of(serving.process.pid)
    assert mapped(inode)
    serving.send(end)
    serving.process.wait(20)
    eventually(lambda: not mapped(inode), "nobody maps the arena")
    for client in (one, two):
        with pytest.raises(Unavailable):
            client.lookup([os.urandom(32)])
    again = daemon(socket=serving.socket)
    assert two.get(stored(one)) == bytes(SIZE)
    assert mapped(arena_of(again.process.pid))


def test_a_copy_under_way_keeps_the_arena_and_its_end_lets_it_go(daemon: Any, eventually: Any) -> None:
    serving = daemon()
    client = serving.client()
    key, inode = stored(client), arena_of(serving.process.pid)
    held = client.acquire([key])
    reading = held.__enter__()
    serving.stop(signal.SIGKILL)
    eventually(lambda: client.connection.map is None, "the client knows")
    (slot,) = reading.slots
    assert slot is not None
    assert b"".join(slot.buffers) == bytes(SIZE)
    assert mapped(inode)
    with pytest.raises(Unavailable):
        held.__exit__(None, None, None)
    del held, reading, slot
    gc.collect()
    eventually(lambda: not mapped(inode), "nobody maps the arena")


def test_an_answer_of_a_lost_daemon_is_not_read_where_the_arena_was(daemon: Any, eventually: Any) -> None:
    serving = daemon()
    client = serving.client()
    with client.acquire([stored(client)]) as reading:
        assert reading.slots[0] is not None
    serving.stop(signal.SIGKILL)
    eventually(lambda: client.connection.map is None, "the client knows")
    with pytest.raises(Unavailable, match="is gone, and its arena with it"):
        client.connection.buffers([0, 4096], 4096)


def test_a_client_that_closes_maps_nothing_any_more(daemon: Any) -> None:
    serving = daemon()
    inode = arena_of(serving.process.pid)
    with CacheClient(serving.url) as client:
        stored(client)
        assert mapped(inode)
    assert not mapped(inode)


def test_what_is_called_at_a_mappings_end_finds_it_mapped() -> None:
    fd = os.memfd_create("loracache-arena")
    os.ftruncate(fd, 1 << 20)
    inode, seen = str(os.fstat(fd).st_ino), []
    arena = map_arena(fd, 1 << 20, b"instance")
    os.close(fd)
    assert address(arena) % 4096 == 0
    arena.at_end(lambda: seen.append(mapped(inode)))
    view = memoryview(arena)[4096:8192]
    del arena
    assert mapped(inode)
    assert not seen
    view.release()
    del view
    assert seen == [True]
    assert not mapped(inode)


class Listener:
    """What `hangups` tells. Each call drops an arena."""

    def __init__(self) -> None:
        self.calls = 0

    def hung_up(self) -> ArenaMap | None:
        self.calls += 1
        return None


def test_only_the_socket_that_hung_up_is_told_though_another_had_its_descriptor(eventually: Any) -> None:
    for _ in range(200):
        listener, successor = Listener(), Listener()
        ours, theirs = socket.socketpair()
        number = ours.fileno()
        hangups.watch(number, listener.hung_up)
        theirs.close()
        hangups.forget(number)
        before = listener.calls
        ours.close()
        ours, theirs = socket.socketpair()
        hangups.watch(ours.fileno(), successor.hung_up)
        with theirs:
            theirs.send(b"x")
            assert listener.calls == before
            assert successor.calls == 0
        eventually(lambda successor=successor: successor.calls == 1, "it is told", 5)
        hangups.forget(ours.fileno())
        ours.close()


def test_a_listener_is_not_kept_and_an_error_of_one_costs_no_other(eventually: Any, caplog: Any) -> None:
    class Broken(Listener):
        def hung_up(self) -> ArenaMap | None:
            raise RuntimeError("on purpose")

    pairs = [socket.socketpair() for _ in range(3)]
    forgotten, broken, listener = Listener(), Broken(), Listener()
    for (ours, _), each in zip(pairs, (forgotten, broken, listener), strict=True):
        hangups.watch(ours.fileno(), each.hung_up)
    del forgotten, each
    for _, theirs in pairs:
        theirs.close()
    eventually(lambda: listener.calls == 1, "it is told", 5)
    eventually(lambda: "on purpose" in caplog.text, "the error is logged", 5)
    for ours, _ in pairs:
        hangups.forget(ours.fileno())
        ours.close()


def test_a_socket_that_a_child_still_has_and_nobody_closed_here_keeps_no_thread_busy(monkeypatch: Any) -> None:
    listener = Listener()
    ours, theirs = socket.socketpair()
    in_the_child = os.dup(ours.fileno())
    hangups.watch(ours.fileno(), listener.hung_up)
    del listener
    ours.close()
    theirs.close()
    time.sleep(0.1)
    polls: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(hangups._watch, "_fire", polls.append)
        time.sleep(0.2)
    os.close(in_the_child)
    assert not polls


def test_a_forked_childs_connections_are_not_its_parents(daemon: Any, eventually: Any) -> None:
    serving = daemon()
    client = serving.client()
    inode = arena_of(serving.process.pid)
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            client.close()
        os._exit(0)
    os.waitpid(child, 0)
    serving.stop(signal.SIGKILL)
    eventually(lambda: not mapped(inode), "nobody maps the arena")


def test_connections_that_come_and_go_beside_a_dying_daemon_lose_no_mapping_they_have(
    daemon: Callable[..., Any],
) -> None:
    serving = daemon()
    stop, failures = threading.Event(), []

    def churn() -> None:
        connection = Connection(serving.url, name="churn")
        while not stop.is_set():
            try:
                connection.connect()
            except Unavailable:
                continue
            if connection.map is None and not stop.is_set() and serving.process.poll() is None:
                failures.append(time.monotonic())
            connection.close()

    threads = [threading.Thread(target=churn) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
