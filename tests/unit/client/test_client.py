# SPDX-License-Identifier: Apache-2.0
"""Client and connection: what the caller gets from a daemon, and from one that is gone, stuck or talking nonsense."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loracache import CacheClient, Namespace, chunk_keys
from loracache.client import requests as client_requests
from loracache.errors import LeaseLost, Rejected, Unavailable, UsageError

NAMESPACE = Namespace("model", "float32", "layout", 16)
ARENA = 16 * 4096


def fresh_keys(count: int) -> list[bytes]:
    return [os.urandom(32) for _ in range(count)]


# -- with a daemon -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(module_daemon: Any) -> Any:
    return module_daemon(memory="16MiB", page_size="4KiB")


@pytest.fixture
def client(running: Any) -> Iterator[CacheClient]:
    with CacheClient(running.url) as made:
        yield made


@pytest.fixture
def namespace(client: CacheClient) -> bytes:
    return client.register(NAMESPACE)


def store(client: CacheClient, namespace: bytes, keys: list[bytes], size: int = 5000) -> list[bytes]:
    payloads = [os.urandom(size) for _ in keys]
    with client.reserve(namespace, keys, [size] * len(keys)) as reservation:
        for position, payload in enumerate(payloads):
            reservation.write(position, payload)
    assert reservation.causes == [""] * len(keys)
    return payloads


def test_ten_lines_store_and_find_something(running: Any) -> None:
    with CacheClient(running.url) as cache:
        root = cache.register(NAMESPACE)
        keys = chunk_keys(root, range(48), NAMESPACE.chunk_tokens)
        assert cache.lookup(keys).hits == 0
        with cache.reserve(root, keys, [1000, 1000, 1000]) as reservation:
            for position in range(3):
                reservation.write(position, bytes([position]) * 1000)
        assert cache.lookup(keys).tiers == ("cpu", "cpu", "cpu")
        assert cache.get(keys[2]) == b"\2" * 1000


def test_two_clients_share_what_one_stored(running: Any, client: CacheClient, namespace: bytes) -> None:
    keys = fresh_keys(3)
    payloads = store(client, namespace, keys)
    with CacheClient(running.url) as other, other.acquire([*keys, os.urandom(32)]) as reading:
        assert [slot and slot.tobytes() for slot in reading.slots] == [*payloads, None]
        assert reading.causes == ["", "", "", "absent"]


def test_connections_of_a_process_share_one_mapping(running: Any, client: CacheClient) -> None:
    with CacheClient(running.url) as other:
        assert other.connection.map is client.connection.map


def test_a_lookup_answers_the_leading_run_and_whole_groups(client: CacheClient, namespace: bytes) -> None:
    keys = fresh_keys(5)
    store(client, namespace, keys)
    assert client.lookup(keys).hits == 5
    assert client.lookup([*keys[:2], os.urandom(32), *keys[2:]]).hits == 2
    assert client.lookup(keys, group=2).hits == 4
    assert client.lookup([]).hits == 0


def test_a_long_lookup_is_asked_in_parts_as_far_as_hits_go(
    client: CacheClient, namespace: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_requests, "_PART_KEYS", 3)
    keys = fresh_keys(8)
    store(client, namespace, keys[:7])
    asked: list[int] = []
    call = client._call
    monkeypatch.setattr(client, "_call", lambda request: asked.append(len(request.keys) // 32) or call(request))
    assert client.lookup(keys).hits == 7
    assert client.lookup(keys, group=2).hits == 6
    assert client.lookup(keys, group=4).hits == 4
    assert client.lookup([os.urandom(32), *keys]).hits == 0
    assert asked == [3, 3, 2, 2, 2, 2, 2, 4, 4, 3]


def test_more_keys_than_a_message_holds_can_be_looked_up(client: CacheClient, namespace: bytes) -> None:
    (key,) = fresh_keys(1)
    store(client, namespace, [key])
    assert client.lookup([key] * 300_000).hits == 300_000


def test_a_reservation_left_by_an_exception_is_given_back(client: CacheClient, namespace: bytes) -> None:
    (key,) = fresh_keys(1)

    class Oops(Exception):
        pass

    def fail() -> None:
        with client.reserve(namespace, [key], [5000]):
            raise Oops

    with pytest.raises(Oops):
        fail()
    store(client, namespace, [key])  # nobody is writing it any more


def test_what_exists_needs_no_writing(client: CacheClient, namespace: bytes) -> None:
    keys = fresh_keys(2)
    (payload,) = store(client, namespace, keys[:1])
    with client.reserve(namespace, keys, [5000, 5000]) as reservation:
        assert reservation.causes == ["exists", ""]
        with pytest.raises(UsageError, match="exists"):
            reservation.write(0, payload)
        reservation.write(1, payload)
    assert reservation.causes == ["exists", ""]
    assert client.get(keys[1]) == payload
    with client.reserve(namespace, keys, [5000, 5000]) as nothing:
        assert nothing.slots == [None, None]


def test_a_payload_of_another_size_is_refused(client: CacheClient, namespace: bytes) -> None:
    with client.reserve(namespace, fresh_keys(1), [5000]) as reservation:
        for size in (0, 4999, 5001):
            with pytest.raises(UsageError, match=f"reserved with 5000 bytes, not {size}"):
                reservation.write(0, bytes(size))
        reservation.write(0, memoryview(bytes(5000)))


def test_wrong_arguments_are_refused_before_anything_is_sent(client: CacheClient, namespace: bytes) -> None:
    def reserve(*arguments: Any, **options: Any) -> None:
        with client.reserve(namespace, *arguments, **options):
            pass

    with pytest.raises(UsageError, match="2 keys, 1 sizes and 2 parents"):
        reserve(fresh_keys(2), [1])
    with pytest.raises(UsageError, match="1 parents"):
        reserve(fresh_keys(2), [1, 1], parents=[b""])
    with pytest.raises(UsageError, match="32 bytes"):
        client.lookup([b"short"])
    with pytest.raises(UsageError, match="32 bytes"):
        client.get(b"short")
    assert client.lookup([]).hits == 0  # the connection lives


def test_what_the_daemon_refuses_is_raised_with_its_reason_and_the_connection_lives(client: CacheClient) -> None:
    def reserve() -> None:
        with client.reserve(bytes(32), fresh_keys(1), [1]):
            pass

    with pytest.raises(Rejected, match=r"namespace 0{64} is not registered"):
        reserve()
    with pytest.raises(Rejected, match="unknown tier 'tape'"):
        client.pin(fresh_keys(1), tier="tape")
    with pytest.raises(Rejected, match="belongs to the engines"):
        client.evict(fresh_keys(1), tiers=["gpu"])
    assert client.lookup([]).hits == 0


def test_pins_keep_and_evictions_report(client: CacheClient, namespace: bytes) -> None:
    keys = fresh_keys(3)
    store(client, namespace, keys)
    assert client.pin(keys[:2]) == 2
    assert client.evict(keys).counts == (1, 5000, 2)
    assert client.unpin(keys) == 2
    assert client.evict(keys, tiers=["cpu"]).counts == (2, 10000, 0)
    assert client.lookup(keys).hits == 0


@pytest.mark.parametrize("ttl", [0, 0.0, -1, 3600.1, 4000, float("nan"), float("inf")])
def test_a_pins_time_that_is_none_is_refused_with_its_value(client: CacheClient, namespace: bytes, ttl: float) -> None:
    keys = fresh_keys(1)
    store(client, namespace, keys)
    with pytest.raises(UsageError, match=rf"ttl={ttl} must be seconds, more than 0 and at most 3600; leave it out"):
        client.pin(keys, ttl=ttl)
    assert client.connection.connected
    assert client.unpin(keys) == 0  # nothing was pinned, least of all for ever


def test_a_pin_ends_with_its_time(client: CacheClient, namespace: bytes, eventually: Callable[..., Any]) -> None:
    keys = fresh_keys(2)
    store(client, namespace, keys)
    assert client.pin(keys[1:], ttl=3600) == 1
    assert client.evict(keys[1:], tiers=["cpu"]).counts == (0, 0, 1)
    assert client.pin(keys[1:], ttl=0.01) == 1
    eventually(lambda: client.evict(keys[1:], tiers=["cpu"]).counts == (1, 5000, 0), "the pin is over")


def test_an_object_whose_bytes_changed_is_reported_and_served_no_more(client: CacheClient, namespace: bytes) -> None:
    (key,) = fresh_keys(1)
    store(client, namespace, [key])
    with client.acquire([key]) as reading:
        slot = reading.slots[0]
        assert slot is not None
        slot.buffers[0][0] ^= 1
    with pytest.raises(LeaseLost, match=key.hex()):
        client.get(key)
    assert client.get(key) is None
    failures: Any = client.status()["failures"]
    assert failures["cpu.corrupt"] >= 1


def test_a_reader_can_report_what_it_found_broken(client: CacheClient, namespace: bytes) -> None:
    keys = fresh_keys(2)
    store(client, namespace, keys)
    with client.acquire(keys) as reading:
        reading.bad.append(keys[1])
    assert client.lookup(keys).hits == 1


def test_a_lease_that_ended_meanwhile_is_told_on_leaving(
    client: CacheClient, namespace: bytes, eventually: Callable[..., Any]
) -> None:
    (key,) = fresh_keys(1)
    store(client, namespace, [key])

    def slow() -> None:
        with client.acquire([key], ttl=0.01):
            eventually(lambda: client.status()["leases"] == 0, "the lease is over")

    with pytest.raises(LeaseLost, match="do not use them"):
        slow()


def test_a_write_lease_that_ended_meanwhile_commits_nothing(
    client: CacheClient, namespace: bytes, eventually: Callable[..., Any]
) -> None:
    (key,) = fresh_keys(1)
    with client.reserve(namespace, [key], [5000], ttl=0.01) as reservation:
        eventually(lambda: client.status()["quarantined_bytes"] == 8192, "the lease is over")
        reservation.write(0, bytes(5000))
    assert reservation.causes == ["lease_lost"]
    assert client.get(key) is None
    assert client.status()["quarantined_bytes"] == 0


def test_a_client_lives_through_a_daemons_restart(daemon: Any) -> None:
    first = daemon(memory="4MiB")
    client = first.client()
    root = client.register(NAMESPACE)
    (key,) = fresh_keys(1)
    store(client, root, [key])
    first.stop()
    with pytest.raises(Unavailable):
        client.get(key)
    with pytest.raises(Unavailable, match=r"start one with: loracache serve --socket"):
        client.lookup([key])
    daemon(memory="4MiB", socket=first.socket)
    assert client.get(key) is None  # the first call after it, on a connection of its own
    store(client, client.register(NAMESPACE), [key])


def test_a_lease_of_a_daemon_that_was_restarted_is_lost(daemon: Any) -> None:
    first = daemon(memory="4MiB")
    client = first.client()
    root = client.register(NAMESPACE)
    keys = fresh_keys(2)
    store(client, root, keys)

    def restart() -> None:
        first.stop()
        daemon(memory="4MiB", socket=first.socket)
        assert client.lookup(keys).hits == 0

    def read() -> None:
        with client.acquire(keys):
            restart()

    with pytest.raises(LeaseLost):
        read()


def test_views_of_the_arena_stay_valid_after_the_connection_is_closed(client: CacheClient, namespace: bytes) -> None:
    """A daemon that goes must not take a reader's process with it."""
    (key,) = fresh_keys(1)
    (payload,) = store(client, namespace, [key])
    read: list[bytes] = []

    def close_while_reading() -> None:
        with client.acquire([key]) as reading:
            client.close()
            assert reading.slots[0] is not None
            read.append(reading.slots[0].tobytes())

    with pytest.raises(LeaseLost):
        close_while_reading()
    assert read == [payload]


# -- more than the arena -----------------------------------------------------------------------------------------------


@pytest.fixture
def small(daemon: Any, tmp_path: Any) -> tuple[Any, list[bytes], list[bytes]]:
    """A daemon with 1 MiB of memory, and 3 MiB on its disk: keys and payloads."""
    running = daemon(memory="1MiB", page_size="4KiB", disk_path=tmp_path / "disk")
    client = running.client()
    root = client.register(NAMESPACE)
    keys, payloads = fresh_keys(24), []
    for at in range(0, 24, 4):
        payloads += store(client, root, keys[at : at + 4], size=128 << 10)
        client.flush()
    return running, keys, payloads


def test_many_objects_larger_than_the_memory_together_are_read(small: tuple[Any, list[bytes], list[bytes]]) -> None:
    running, keys, payloads = small
    unknown = os.urandom(32)
    assert list(running.client().get_many([*keys, unknown])) == [*payloads, None]
    assert running.status()["leases"] == 0


def test_reading_waits_for_room_and_gives_up_in_time(small: tuple[Any, list[bytes], list[bytes]]) -> None:
    running, keys, payloads = small
    holder, reader = running.client(), running.client(timeout=0.3)
    with holder.acquire(keys[:8]) as reading:
        assert all(reading.slots)
        assert list(reader.get_many([keys[0], keys[9], keys[1]])) == [payloads[0], None, payloads[1]]
        assert reader.get(keys[9]) is None
    assert reader.get(keys[9]) == payloads[9]
