# SPDX-License-Identifier: Apache-2.0
"""One connection's requests: what waits for a tier while others are served, and what clients may count."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient, Namespace
from loracache.errors import Rejected, Unavailable
from loracache.wire import protocol

NAMESPACE = Namespace("model", "float32", "layout", 16)
LEASE = bytes(range(16))


def store(client: CacheClient, count: int, size: int = 100) -> list[bytes]:
    """Objects without parents."""
    root = client.register(NAMESPACE)
    keys = [os.urandom(32) for _ in range(count)]
    with client.reserve(root, keys, [size] * count, parents=[b""] * count) as reservation:
        for position in range(count):
            reservation.write(position, bytes(size))
    assert reservation.causes == [""] * count
    return keys


# -- a lookup that waits for Redis -------------------------------------------------------------------------------------


@pytest.fixture
def waiting(daemon: Any, redis_server: Any, tmp_path: Path) -> Iterator[tuple[CacheClient, Callable[[], Any], bytes]]:
    """A client whose Redis is stopped, what answers the lookup that it sent under LEASE (after Redis went on), and the
    key of it that the arena holds.
    """
    redis = redis_server()
    patient = tmp_path / "patient.yaml"
    patient.write_text("redis_lookup_ms: 1000\n")
    client = daemon(memory="4MiB", redis=redis.url, config=patient).client()
    (held,) = store(client, 1)
    client.flush()
    redis.send(signal.SIGSTOP)
    keys = protocol.join_keys([held, os.urandom(32)])
    number = client.connection.send(protocol.Lookup(LEASE, keys, 1, 60.0))

    def answer() -> Any:
        redis.send(signal.SIGCONT)
        return client.connection.wait(number, 30).payload

    yield client, answer, held
    redis.send(signal.SIGCONT)


def test_a_lease_released_while_its_lookup_waits_for_redis_is_not_taken_later(waiting: Any) -> None:
    client, answer, held = waiting
    assert client.connection.call(protocol.Release(LEASE, b""), 30).payload == [False]
    assert client.status()["leases"] == 0
    assert answer() == [b"\1"]  # what the arena holds is a hit all the same
    status = client.status()
    assert (status["leases"], status["leased_objects"]) == (0, 0)
    assert client.evict([held], tiers=["cpu"]).counts == (1, 100, 0)


def test_a_lookup_that_waited_for_redis_holds_what_it_found(waiting: Any) -> None:
    client, answer, held = waiting
    assert client.connection.call(protocol.Release(bytes(16), b""), 30).payload == [False]  # another's
    assert answer() == [b"\1"]
    status = client.status()
    assert (status["leases"], status["leased_objects"]) == (1, 1)
    assert client.evict([held], tiers=["cpu"]).counts == (0, 0, 1)
    assert client.connection.call(protocol.Release(LEASE, b""), 30).payload == [True]
    assert client.status()["leases"] == 0


def test_a_lease_that_was_released_once_may_be_taken_by_the_next_lookup(waiting: Any) -> None:
    client, answer, held = waiting
    client.connection.call(protocol.Release(LEASE, b""), 30)
    answer()
    client.connection.call(protocol.Lookup(LEASE, held, 1, 60.0), 30)
    assert client.status()["leased_objects"] == 1


def test_a_lookup_whose_client_left_meanwhile_holds_nothing(waiting: Any, eventually: Any) -> None:
    client, answer, _ = waiting
    client.connection.close()
    with pytest.raises(Unavailable):
        answer()
    eventually(lambda: client.status()["counters"].get("lookup") == 1, "the lookup ends")
    assert client.status()["leases"] == 0


# -- what clients count ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(module_daemon: Any) -> Any:
    return module_daemon(memory="4MiB")


@pytest.mark.parametrize(
    "counts",
    [
        {"Deadline": 1}, {"dead line": 1}, {"": 1}, {"x" * 65: 1}, {"dead\n": 1}, {"größe": 1}, {"a/b": 1},
        {"deadline": -1}, {"deadline": 2**32}, {"deadline": 1.5}, {"deadline": True}, {str(n): 1 for n in range(65)},
    ],
)  # fmt: skip
def test_counts_that_would_not_be_shown_as_they_are_end_the_connection(running: Any, counts: dict[str, int]) -> None:
    with CacheClient(running.url) as client:
        before: Any = client.status()["counters"]
        with pytest.raises(Unavailable, match=r"report: counts must map at most 64 names of a-z, 0-9, _ and \."):
            client.connection.call(protocol.Report(counts), 30)
        after: Any = client.status()["counters"]
    assert after == before | {"failure.protocol": before.get("failure.protocol", 0) + 1}


def test_names_that_a_client_makes_up_without_end_are_counted_as_one(daemon: Any) -> None:
    client = daemon(memory="4MiB").client()

    def report(counts: dict[str, int]) -> None:
        client.connection.call(protocol.Report(counts), 30)

    report({"load.deadline": 1})
    for first in range(0, 1280, 64):
        report({f"made_up.{number}": 2 for number in range(first, first + 64)})
    report({"load.deadline": 4, "a_new_one": 8})
    counters: Any = client.status()["counters"]
    made_up = [name for name in counters if name.startswith("client.made_up.")]
    assert 900 < len(made_up) < 1000
    assert len(counters) <= 1001
    assert counters["client.other"] == 2 * (1280 - len(made_up)) + 8
    assert counters["client.load.deadline"] == 5  # known before: counted on


# -- what takes long ---------------------------------------------------------------------------------------------------


def test_a_clear_of_very_many_is_answered_once_and_with_the_whole_sum(daemon: Any, tmp_path: Path) -> None:
    client = daemon(memory="16MiB", page_size="4KiB", disk_path=tmp_path / "disk").client()
    keys = store(client, 1200)
    client.flush()
    assert client.clear(tiers=["cpu", "disk"]).counts == (2400, 240_000, 0)
    assert client.lookup(keys).hits == 0
    client.flush()
    assert not [path for path in (tmp_path / "disk" / "objects").glob("*/*") if path.is_file()]


def test_a_pipe_in_the_place_of_an_adapter_file_is_refused_and_not_waited_for(daemon: Any, tmp_path: Path) -> None:
    client = daemon(memory="4MiB").client()
    os.mkfifo(tmp_path / "adapter_config.json")
    (tmp_path / "adapter_model.safetensors").touch()
    for request in (protocol.AdapterDigest(str(tmp_path)), protocol.AdapterAdd(str(tmp_path), "", "")):
        with pytest.raises(Rejected, match=r"adapter_config\.json is not a regular file"):
            client.connection.call(request, 10)
