# SPDX-License-Identifier: Apache-2.0
"""CacheClient's control calls, over real daemons with a disk and a real Redis."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient, Namespace
from loracache.client.control import Selection
from loracache.errors import LoRACacheError, Rejected, Unknown, UsageError
from loracache.keys import salt_digest

MODEL = "0123456789abcdef" * 4
PLAIN = Namespace(MODEL, "float32", "layout", 16)
SALTED = Namespace(MODEL, "float32", "layout", 16, salt=salt_digest("tenant"))
SHARDED = Namespace(MODEL, "float32", "layout#a|b", 8, salt=salt_digest("sharded"))
Tokens = list[int]


@pytest.fixture(scope="module")
def redis(module_redis: Any) -> Any:
    return module_redis()


@pytest.fixture(scope="module")
def running(module_daemon: Any, redis: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("disk")
    return module_daemon(memory="4MiB", page_size="4KiB", disk_path=folder, disk="64MiB", redis=redis.url)


@pytest.fixture
def client(running: Any, redis: Any) -> Iterator[CacheClient]:
    with CacheClient(running.url, name="test") as made:
        yield made
        made.flush()  # what is being written lands behind a clear
        made.clear()
        made.flush()
        redis.redis.flushall()


Put = Callable[..., tuple[list[bytes], Tokens]]


@pytest.fixture
def put(client: CacheClient) -> Put:
    """put(chunks, namespace) stores the KV of a new prompt, so that all tiers have it: keys, and token ids."""

    def store(chunks: int, namespace: Namespace = PLAIN, size: int = 5000) -> tuple[list[bytes], Tokens]:
        root = client.register(namespace, ["served"])
        tokens = [int.from_bytes(os.urandom(3)) for _ in range(chunks * namespace.chunk_tokens)]
        keys = namespace.object_keys(tokens)
        group = len(namespace.shards) or 1
        parents = [keys[at - group] if at >= group else b"" for at in range(len(keys))]
        with client.reserve(root, keys, [size] * len(keys), parents=parents) as reservation:
            for position, key in enumerate(keys):
                reservation.write(position, payload(key, size))
        assert set(reservation.causes) == {""}
        client.flush()
        return keys, tokens

    return store


def payload(key: bytes, size: int = 5000) -> bytes:
    return (key * (size // 32 + 1))[:size]


def tiers_of(client: CacheClient, redis: Any, keys: list[bytes]) -> dict[str, int]:
    """How many of the keys each tier has."""
    listed = {item["key"]: item["tiers"] for item in client.objects(Selection(keys=keys))}
    found = {tier: sum(tier in listed.get(key.hex(), ()) for key in keys) for tier in ("cpu", "disk")}
    names = redis.redis.keys("*")
    return found | {"redis": sum(any(key.hex().encode() in name or key in name for name in names) for key in keys)}


def only_in(client: CacheClient, keys: list[bytes], tier: str) -> None:
    client.evict(keys, tiers=[each for each in ("cpu", "disk", "redis") if each != tier])
    client.flush()


# -- moving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["cpu", "disk", "redis"])
@pytest.mark.parametrize("target", ["cpu", "disk", "redis"])
def test_objects_move_between_every_two_tiers_with_their_bytes(
    client: CacheClient, redis: Any, put: Put, source: str, target: str
) -> None:
    if source == target:
        with pytest.raises(Rejected, match="give two tiers"):
            client.move([bytes(32)], source, target)
        return
    keys, _ = put(30)
    only_in(client, keys, source)
    copied = client.move(keys, source, target, keep=True)
    assert (copied.state, copied.objects, copied.bytes, copied.total) == ("done", 30, 150_000, 30)
    client.flush()
    there = tiers_of(client, redis, keys)
    assert (there[source], there[target]) == (30, 30)
    moved = client.move(keys, source, target)
    assert (moved.objects, moved.skipped) == (30, 0)
    client.flush()
    there = tiers_of(client, redis, keys)
    assert (there[source], there[target]) == (0, 30)
    assert [client.get(key) for key in keys] == [payload(key) for key in keys]
    assert client.status()["leases"] == 0


@pytest.mark.parametrize("tier", ["disk", "redis"])
def test_a_prompt_is_admitted_ahead_of_need(client: CacheClient, redis: Any, put: Put, tier: str) -> None:
    keys, tokens = put(20)
    only_in(client, keys, tier)
    prompt = Selection(model="served", tokens=tokens)
    before = client.locate(prompt)
    assert (before.hits, before.asked, before.tokens, set(before.tiers)) == (20, 20, 320, {tier})
    assert before.namespace == PLAIN.digest().hex()
    assert client.admit(prompt).counts == (20, 100_000, 0)
    assert set(client.locate(prompt).tiers) == {"cpu"}
    assert client.admit(prompt).causes == {"already": 20}
    assert client.admit([os.urandom(32)]).causes == {"absent": 1}


def test_more_than_the_arena_holds_passes_through_it(client: CacheClient, redis: Any, put: Put) -> None:
    keys: list[bytes] = []
    for _ in range(8):
        keys += put(4, size=500_000)[0]
    assert len(keys) * 500_000 > 3 * (4 << 20)
    only_in(client, keys, "redis")
    moved = client.move(keys, "redis", "disk")
    assert (moved.objects, moved.skipped) == (32, 0)
    client.flush()
    assert tiers_of(client, redis, keys) == {"cpu": 0, "disk": 32, "redis": 0}
    assert all(client.get(key) == payload(key, 500_000) for key in keys)


def test_a_whole_model_moves_while_others_store_and_load(running: Any, client: CacheClient, put: Put) -> None:
    stored = dict.fromkeys(key for _ in range(3) for key in put(20)[0])
    ending = threading.Event()
    wrong: list[object] = []
    rounds: list[int] = []

    def busy() -> None:
        with CacheClient(running.url, name="busy") as other:
            root = other.register(PLAIN)
            while not ending.is_set():
                fresh = [os.urandom(32) for _ in range(5)]
                with other.reserve(root, fresh, [5000] * 5) as reservation:
                    for position, slot in enumerate(reservation.slots):
                        if slot is not None:
                            reservation.write(position, payload(fresh[position]))
                for key in [*list(stored)[:: len(rounds) % 7 + 1], *fresh]:
                    found = other.get(key)
                    if found is not None and found != payload(key):
                        wrong.append(key)
                rounds.append(1)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for source, target in (("cpu", "disk"), ("disk", "cpu"), ("redis", "disk"), ("disk", "redis")):
            assert client.move(Selection(model="served"), source, target).state == "done"
    finally:
        ending.set()
        thread.join(30)
    assert not thread.is_alive()
    assert not wrong
    assert rounds
    assert [client.get(key) for key in stored] == [payload(key) for key in stored]
    assert client.status()["leases"] == 0


def test_a_redis_that_stops_answering_is_counted_and_the_operation_ends(daemon: Any, redis_server: Any) -> None:
    server = redis_server()
    running = daemon(memory="4MiB", page_size="4KiB", redis=server.url)
    client = running.client()
    root = client.register(PLAIN)
    keys = [os.urandom(32) for _ in range(5)]
    with client.reserve(root, keys, [100] * 5) as reservation:
        for position in range(5):
            reservation.write(position, bytes(100))
    client.flush()
    server.kill()
    moved = client.move(keys, "cpu", "redis")
    assert (moved.state, moved.objects, moved.causes) == ("done", 0, {"not_written": 5})
    assert client.move(keys, "redis", "cpu").causes == {"redis_unavailable": 5}
    assert client.lookup(keys).tiers == ("cpu",) * 5


def test_a_daemon_that_is_told_to_end_ends_its_operations_and_loses_nothing(
    daemon: Any, short_tmp: Path, eventually: Any
) -> None:
    options = {"memory": "4MiB", "page_size": "4KiB", "disk_path": short_tmp / "disk", "disk": "64MiB"}
    running = daemon(**options)
    client = running.client()
    root = client.register(PLAIN)
    keys = [os.urandom(32) for _ in range(400)]
    for at in range(0, 400, 50):
        part = keys[at : at + 50]
        with client.reserve(root, part, [5000] * 50, parents=[b""] * 50) as reservation:
            for position, key in enumerate(part):
                reservation.write(position, payload(key))
    client.flush()
    begun = client.move(keys, "cpu", "disk", wait=0)
    assert begun.state in ("running", "done")
    assert running.stop(signal.SIGTERM) == 0
    assert "Traceback" not in running.log()
    again = daemon(**options).client()
    eventually(lambda: again.status()["tiers"]["disk"]["scanned"], "the disk is read")
    assert sum(again.get(key) == payload(key) for key in keys) == 400


# -- the other calls ---------------------------------------------------------------------------------------------------


def test_pins_hold_until_they_are_ended(client: CacheClient, put: Put) -> None:
    keys, tokens = put(6)
    assert client.pin(keys[:4]) == 4
    assert client.pin(Selection(keys=keys[:2]), tier="disk", ttl=3600) == 2
    cleared = client.clear(tiers=["cpu", "disk"])
    assert (cleared.objects, cleared.causes) == (2 + 4, {"held": 4 + 2})
    pinned = {item["key"]: item["pinned"] for item in client.objects(Selection(keys=keys))}
    assert pinned == {key.hex(): ["cpu", "disk"] if at < 2 else ["cpu"] for at, key in enumerate(keys[:4])}
    assert client.unpin(Selection(model="served", tokens=tokens)) == 4
    assert client.unpin(keys, tier="disk") == 2


def test_evicting_takes_descendants_along_and_says_what_it_left(client: CacheClient, put: Put) -> None:
    keys, tokens = put(6)
    with client.acquire(keys[4:5]):
        done = client.evict(Selection(model="served", tokens=tokens[:32]), tiers=["cpu"])
        assert (done.objects, done.causes, done.total) == (1, {"held": 5}, 2)
    assert client.evict(keys[:1], tiers=["cpu"]).objects == 5
    assert client.evict([os.urandom(32)]).counts == (0, 0, 0)
    assert client.evict([]).counts == (0, 0, 0)


def test_a_shard_is_no_chunk(client: CacheClient, put: Put) -> None:
    keys, tokens = put(3, SHARDED)
    prompt = Selection(model="served", tokens=tokens, salt="sharded")
    assert (client.locate(prompt).hits, client.locate(prompt).tokens) == (3, 24)
    client.evict([keys[-1]])
    client.flush()  # Redis has let go of it, too
    assert (client.locate(prompt).hits, client.locate(prompt).asked, client.locate(prompt).tokens) == (2, 3, 16)
    assert client.evict(prompt).objects > 0


def test_tenants_and_models_are_told_apart(client: CacheClient, put: Put) -> None:
    plain, salted = put(3)[0], put(4, SALTED)[0]
    held = client.locate(Selection(salt="tenant")).held
    assert held == {"cpu": (4, 20_000), "disk": (4, 20_000)}
    assert client.locate(Selection(model=MODEL[:8])).held["cpu"] == (7, 35_000)
    listed = [item["key"] for item in client.objects(Selection(salt=""))]
    assert sorted(listed) == sorted(key.hex() for key in plain)
    client.evict(Selection(salt="tenant"))
    client.flush()  # Redis removes behind it
    assert client.lookup(salted).hits == 0
    assert client.lookup(plain).hits == 3


def test_lists_page_through_everything(client: CacheClient, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loracache.client.control._PAGE", 7)
    keys = put(30)[0] + put(20, SALTED)[0]
    assert sorted(item["key"] for item in client.objects()) == sorted(key.hex() for key in keys)
    assert [item["key"] for item in client.objects(Selection(keys=keys * 2))] == [key.hex() for key in keys]
    client.evict(keys, tiers=["disk"])
    assert list(client.objects(tier="disk")) == []
    assert len(list(client.objects(tier="cpu"))) == 50
    seen: list[str] = []
    waiting = ["base"]
    while waiting:
        below = [node["id"] for node in client.tree(waiting.pop())]
        seen += [each for each in below if len(each) == 64]
        waiting += below
    assert sorted(seen) == sorted(key.hex() for key in keys)


def test_operations_are_shown_listed_and_cancelled(client: CacheClient, put: Put) -> None:
    keys, _ = put(5)
    done = client.evict(keys, tiers=["cpu"])
    assert client.operation(done.id) == client.operation(done.id, wait=5) == done
    running = client.move(Selection(model="*"), "disk", "redis", wait=0)
    assert running.total is None
    assert client.cancel(running.id).state in ("cancelled", "done")
    assert client.operation(running.id, wait=30).state in ("cancelled", "done")
    assert [each.id for each in client.operations(2)] == [running.id, done.id]
    for call in (client.operation, client.cancel):
        with pytest.raises(Unknown, match="no operation"):
            call("0" * 16)


def test_events_are_waited_for_and_come_in_order(running: Any, client: CacheClient, put: Put) -> None:
    since, lost, found = client.events(wait=0)
    assert (lost, found) == (0, [])
    keys, _ = put(3)
    last, lost, found = client.events(since)
    entered = [event["key"] for event in found if event["event"] == "admitted" and event["tier"] == "cpu"]
    assert (entered, lost) == ([key.hex() for key in keys], 0)
    assert [event["id"] for event in found] == list(range(since + 1, last + 1))
    assert client.events(last, wait=0.0005) == (last, 0, [])  # however short the wait is
    woken: list[Any] = []

    def watch() -> None:
        with CacheClient(running.url, name="watch") as other:
            woken.append(other.events(last, wait=20))

    watching = [threading.Thread(target=watch) for _ in range(5)]
    for thread in watching:
        thread.start()
    client.evict(keys)
    for thread in watching:
        thread.join(30)
    assert len(woken) == 5
    assert all(found and found[0]["event"] == "evicted" and found[0]["cause"] == "asked" for _, _, found in woken)


def test_the_settings_are_shown_without_secrets(client: CacheClient) -> None:
    assert client.config()["memory"] == 4 << 20
    assert "integrity_key" in client.config()


@pytest.mark.parametrize("tier", ["disk", "redis"])
def test_compressing_keeps_the_bytes_readable(client: CacheClient, put: Put, tier: str) -> None:
    keys, _ = put(4)
    only_in(client, keys, tier)
    assert client.compress(keys, tier=tier).state == "done"
    assert client.decompress(keys, tier=tier).state == "done"
    assert [client.get(key) for key in keys] == [payload(key) for key in keys]
    assert client.status()["leases"] == 0


# -- what cannot be meant ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda c: c.pin([bytes(32)], ttl=0), UsageError, "ttl=0"),
        (lambda c: c.pin([bytes(32)], ttl=float("nan")), UsageError, "ttl=nan"),
        (lambda c: c.pin([bytes(31)]), UsageError, "32 bytes"),
        (lambda c: c.pin([bytes(32)], tier="redis"), Rejected, "cannot pin"),
        (lambda c: c.evict([bytes(32)], tiers=["tape"]), Rejected, "unknown tier"),
        (lambda c: c.evict([bytes(32)], wait=1e6), UsageError, "seconds from 0 to 600"),
        (lambda c: c.evict([bytes(32)], tiers=[1]), UsageError, "list of strings"),
        (lambda c: c.clear(wait=-1), UsageError, "seconds from 0"),
        (lambda c: c.admit([bytes(32)], tier=None), UsageError, "must be a string"),
        (lambda c: c.admit([bytes(32)], tier="gpu"), Rejected, "belongs to the engines"),
        (lambda c: c.compress([bytes(32)], tier="cpu"), Rejected, "compress disk or redis"),
        (lambda c: c.move([bytes(32)], "cpu", "disk", keep=1), UsageError, "true or false"),
        (lambda c: c.operations(0), UsageError, "from 1 to 10000"),
        (lambda c: c.events(-1), UsageError, "63 bits"),
        (lambda c: c.events(wait=601), UsageError, "seconds from 0 to 600"),
        (lambda c: c.locate(Selection()), Rejected, "empty"),
        (lambda c: c.locate(Selection(model="nobody")), Unknown, "no engine has registered"),
        (lambda c: c.locate(Selection(adapter="nobody")), Unknown, "no adapter has the name"),
        (lambda c: c.locate(Selection(tokens=[1])), Rejected, "needs the model"),
        (lambda c: c.locate(Selection(model="m", tokens=[2**40])), UsageError, "32 bits"),
        (lambda c: c.locate(Selection(model="m" * 301)), UsageError, "at most 300"),
        (lambda c: list(c.objects(tier="redis")), Rejected, "list cpu or disk"),
        (lambda c: list(c.tree("x")), Rejected, "not a node of the tree"),
        (lambda c: list(c.tree("00" * 32)), Unknown, "no object"),
    ],
)
def test_wrong_uses_say_what_is_wrong_and_end_no_lease(
    client: CacheClient, put: Put, call: Callable[[CacheClient], Any], error: type[LoRACacheError], said: str
) -> None:
    (key,), _ = put(1)
    with client.acquire([key]), pytest.raises(error, match=said) as caught:
        call(client)
    assert type(caught.value) is error
