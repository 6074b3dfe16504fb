# SPDX-License-Identifier: Apache-2.0
"""Write leases that break: their bytes stay out of use until the holder, or its end, says that nobody writes there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loracache import CacheClient, Namespace
from loracache.cache.state.leases import Writing
from loracache.errors import Unavailable

PAGE = 4096
NAMESPACE = Namespace("model", "float32", "layout", 16)
SIZE, HELD = 5000, 2 * PAGE
Make = Callable[..., Any]


def test_adding_to_a_lease_for_a_shorter_time_does_not_shorten_it(rig_of: Make) -> None:
    rig = rig_of()
    rig.chain("a", "b")
    rig.acquire("a", ttl=30.0)
    rig.acquire("b", ttl=5.0)
    rig.later(6)
    assert rig.cache.leases.held_objects == 2
    rig.later(25)
    assert rig.cache.leases.held_objects == 0


# -- by the word of the holder's next connection -----------------------------------------------------------------------


def test_a_broken_lease_is_ended_by_its_holders_next_connection(rig_of: Make) -> None:
    rig = rig_of(pages=4)
    rig.reserve("a", size=3 * PAGE, owner=1)
    assert rig.cache.leases.disconnect(1)
    assert rig.cache.leases.quarantined == 3 * PAGE
    assert not rig.cache.leases.release(2, b"another")
    assert rig.cache.leases.quarantined == 3 * PAGE
    assert not rig.cache.leases.release(2, b"w")  # known by its id; it held no longer
    assert rig.cache.leases.quarantined == 0
    assert rig.store("big", size=4 * PAGE, owner=3) == ""
    rig.cache.leases.writer_gone(1)  # later: there is nothing left to free


def test_a_lease_that_is_not_broken_is_nobody_elses_to_end(rig_of: Make) -> None:
    rig = rig_of()
    rig.store("r")
    rig.acquire("r", owner=1)
    writing = rig.reserve("a", owner=1)
    assert isinstance(writing, Writing)
    assert not rig.cache.leases.release(2, b"w")
    assert not rig.cache.leases.release(2, b"r")
    assert rig.commit(2, b"w", [(writing.info.key, 0)]) == ["lease_lost"]
    assert rig.cache.leases.held_objects == 1
    assert rig.commit(1, b"w", [(writing.info.key, rig.write(writing))]) == [""]
    assert rig.get("a") == rig.payload("a")
    assert rig.release(owner=1)


def test_only_the_broken_one_of_two_leases_with_one_id_is_ended(rig_of: Make) -> None:
    rig = rig_of()
    rig.reserve("a", owner=1)
    rig.cache.leases.disconnect(1)
    writing = rig.reserve("a", owner=3)
    assert not rig.cache.leases.release(2, b"w")
    assert rig.cache.leases.quarantined == 0
    assert rig.commit(3, b"w", [(writing.info.key, rig.write(writing))]) == [""]


def test_a_lease_that_ran_out_of_time_is_ended_from_another_connection_too(rig_of: Make) -> None:
    rig = rig_of()
    writing = rig.reserve("a", owner=1)
    rig.later(31)
    assert rig.cache.leases.quarantined == PAGE
    assert rig.commit(2, b"w", [(writing.info.key, 0)]) == ["lease_lost"]
    assert rig.cache.leases.quarantined == 0


# -- over a real daemon ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(module_daemon: Any) -> Any:
    return module_daemon(memory="16MiB", page_size="4KiB")


@pytest.fixture
def client(running: Any) -> Iterator[CacheClient]:
    with CacheClient(running.url) as made:
        yield made


def quarantined(client: CacheClient) -> object:
    return client.status()["quarantined_bytes"]


def test_a_commit_on_the_next_connection_is_refused_and_frees_the_bytes(running: Any, client: CacheClient) -> None:
    root = client.register(NAMESPACE)
    key = os.urandom(32)
    with client.reserve(root, [key], [SIZE]) as reservation:
        reservation.write(0, bytes(SIZE))
        client.connection.close()
    assert reservation.causes == ["lease_lost"]
    assert quarantined(client) == 0
    assert client.lookup([key]).hits == 0


class Interrupted(Exception):
    pass


def test_a_writer_whose_connection_broke_frees_its_bytes_with_its_next_call(
    running: Any, client: CacheClient, eventually: Any
) -> None:
    root = client.register(NAMESPACE)
    key = os.urandom(32)

    def interrupted() -> None:
        with client.reserve(root, [key], [SIZE]):
            client.connection.close()
            raise Interrupted

    with CacheClient(running.url) as other:
        with pytest.raises(Interrupted):
            interrupted()
        eventually(lambda: quarantined(other) == HELD, "the daemon has seen the end of the connection")
        client.lookup([])
        assert quarantined(other) == 0
        with client.reserve(root, [key], [SIZE]) as reservation:  # and nobody is writing it any more
            pass
        assert reservation.causes == [""]


def test_several_broken_leases_are_all_given_up(running: Any, client: CacheClient, eventually: Any) -> None:
    root = client.register(NAMESPACE)

    def interrupted() -> None:
        with client.reserve(root, [os.urandom(32)], [SIZE]), client.reserve(root, [os.urandom(32)], [SIZE]):
            client.connection.close()
            raise Interrupted

    with CacheClient(running.url) as other:
        with pytest.raises(Interrupted):
            interrupted()
        eventually(lambda: quarantined(other) == 2 * HELD, "the daemon has seen the end of the connection")
        client.lookup([])
        assert quarantined(other) == 0


def test_a_reservation_whose_answer_never_came_is_given_up(daemon: Any, eventually: Any) -> None:
    """The daemon may have reserved all the same."""
    running = daemon(memory="4MiB", page_size="4KiB")
    other, impatient = running.client(), running.client(timeout=0.1)
    root = other.register(NAMESPACE)

    def reserve() -> None:
        with impatient.reserve(root, [os.urandom(32)], [SIZE]):
            pass

    running.send(signal.SIGSTOP)
    with pytest.raises(Unavailable, match="did not answer"):
        reserve()
    running.send(signal.SIGCONT)
    eventually(lambda: quarantined(other) == HELD, "the daemon has reserved, and seen the end of the connection")
    impatient.flush(timeout=30)
    assert quarantined(other) == 0


def test_a_broken_lease_is_no_concern_of_the_next_daemons(daemon: Any) -> None:
    first = daemon(memory="4MiB")
    client = first.client()
    root = client.register(NAMESPACE)

    def interrupted() -> None:
        with client.reserve(root, [os.urandom(32)], [SIZE]):
            first.stop()
            client.connection.close()
            raise Interrupted

    with pytest.raises(Interrupted):
        interrupted()
    daemon(memory="4MiB", socket=first.socket)
    assert client.lookup([]).hits == 0
    assert quarantined(client) == 0
