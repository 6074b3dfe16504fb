# SPDX-License-Identifier: Apache-2.0
"""Models with several groups, over a real daemon with a disk and a real Redis: one round trip tells where everything
is, a prompt's tokens tell how far a hit reaches, and verbs by tokens cover the objects of all groups."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from loracache import CacheClient, Group, Namespace, Need, Selection
from loracache.errors import ProtocolError, Unavailable, UsageError
from loracache.keys import salt_digest
from loracache.simulator.replay import replay
from loracache.simulator.store import Sizes, Way
from loracache.simulator.trace import read_trace
from loracache.wire import protocol
from loracache.wire.protocol import NOWHERE, join_keys

SIZE, WIDTH, CHUNKS = 3000, 4, 5
WINDOW, STATE = Group(Need.WINDOW, 7, ("w",)), Group(Need.STATE, 0, ("s0", "s1"))
HYBRID = Namespace("ab" * 32, "float32", "layout#a0|a1", WIDTH, groups=(WINDOW, STATE))
BARE = replace(HYBRID, model="cd" * 32, layout="layout")
OBJECTS = CHUNKS * HYBRID.width


@pytest.fixture(scope="module")
def redis(module_redis: Any) -> Any:
    return module_redis()


@pytest.fixture(scope="module")
def running(module_daemon: Any, redis: Any, eventually: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("daemon")
    patient = folder / "patient.yaml"
    patient.write_text("redis_lookup_ms: 1000\n")
    options = {"memory": "4MiB", "page_size": "4KiB", "disk_path": folder / "disk", "disk": "64MiB", "redis": redis.url}
    made = module_daemon(http="127.0.0.1:0", config=patient, **options)

    def up() -> bool:
        try:
            return httpx.get(f"{made.http}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    eventually(up, "REST answers", 60)
    return made


@pytest.fixture
def client(running: Any, redis: Any) -> Iterator[CacheClient]:
    with CacheClient(running.url, name="test") as made:
        yield made
        made.flush()
        made.clear()
        made.flush()
        redis.redis.flushall()


@pytest.fixture
def rest(running: Any) -> Iterator[httpx.Client]:
    token = Path(f"{running.socket}.token").read_text().strip()
    with httpx.Client(base_url=running.http, headers={"authorization": f"Bearer {token}"}, timeout=30) as made:
        yield made


class Prompt:
    """A tenant's prompt whose KV all tiers have. chain, beside: keys, chunk by chunk; keys: all of them as stored."""

    def __init__(self, client: CacheClient, space: Namespace, chunks: int = CHUNKS) -> None:
        self.salt = os.urandom(8).hex()
        self.space = replace(space, salt=salt_digest(self.salt))
        self.tokens = [int.from_bytes(os.urandom(3)) for _ in range(chunks * space.chunk_tokens)]
        root = client.register(self.space, ["hybrid"])
        ((self.chain, self.beside),) = self.space.parts(self.tokens, chunks)
        lead, more = space.lead, len(space.beside)
        self.keys: list[bytes] = []
        parents: list[bytes] = []
        for chunk in range(chunks):
            own = range(chunk * lead, (chunk + 1) * lead)
            self.keys += [self.chain[at] for at in own]
            parents += [self.chain[at - lead] if chunk else b"" for at in own]
            self.keys += self.beside[chunk * more : (chunk + 1) * more]
            parents += [self.chain[chunk * lead + at % lead] if lead else b"" for at in range(more)]
        sizes = [SIZE] * len(self.keys)
        with client.reserve(root, self.keys, sizes, parents=parents, beside=self.beside) as reservation:
            for position, key in enumerate(self.keys):
                reservation.write(position, payload(key))
        assert set(reservation.causes) == {""}
        client.flush()

    @property
    def selection(self) -> Selection:
        return Selection(model="hybrid", tokens=self.tokens, salt=self.salt)

    def of(self, shard: str, chunk: int) -> bytes:
        """The object of one chunk and shard."""
        if shard in self.space.shards:
            return self.chain[chunk * self.space.lead + self.space.shards.index(shard)]
        return self.beside[chunk * len(self.space.beside) + self.space.beside.index(shard)]


def payload(key: bytes) -> bytes:
    return (key * (SIZE // 32 + 1))[:SIZE]


def located(client: CacheClient, rest: httpx.Client, prompt: Prompt) -> tuple[int, tuple[str, ...]]:
    """(hits, tiers) of a prompt's tokens, which the daemon, REST and a lookup by keys agree on."""
    selector = {"model": "hybrid", "tokens": prompt.tokens, "salt": prompt.salt}
    answer = rest.post("/v1/lookup", json={"selector": selector})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    found = client.locate(prompt.selection)
    names = ("hits", "asked", "tokens", "tiers", "namespace")
    assert [found.hits, found.asked, found.tokens, list(found.tiers), found.namespace] == [told[name] for name in names]
    assert (found.asked, found.tokens) == (CHUNKS, found.hits * WIDTH)
    by_keys = client.lookup(prompt.chain, group=max(1, prompt.space.lead), beside=prompt.beside)
    assert by_keys.chunks(prompt.space) == found.hits
    return found.hits, found.tiers


# -- the wire ----------------------------------------------------------------------------------------------------------


def test_one_question_tells_how_far_a_chain_is_held_and_where_each_object_beside_it_is(client: CacheClient) -> None:
    prompt = Prompt(client, HYBRID)
    client.evict([prompt.of("w", 1)], tiers=["cpu"])
    client.evict([prompt.of("s0", 2)], tiers=["cpu", "disk"])
    client.evict([prompt.of("s1", 3)])
    client.evict([prompt.of("a1", 4)], tiers=["cpu", "disk"])
    client.flush()
    request = protocol.Lookup(b"", join_keys(prompt.chain), 2, 0.0, join_keys(prompt.beside))
    tiers, where = client.connection.call(request, 10).payload
    assert list(tiers) == [1] * 9 + [3]
    # What hangs under the object that left went with it: the window and a state hang under a0, the other under a1.
    expected = [[1, 1, 1], [2, 1, 1], [1, 3, 1], [1, 1, NOWHERE], [1, 3, 1]]
    assert [list(where[at : at + 3]) for at in range(0, 15, 3)] == expected
    assert client.connection.call(protocol.Lookup(b"", join_keys(prompt.chain), 2, 0.0), 10).payload == [tiers]
    alone = protocol.Lookup(b"", b"", 1, 0.0, join_keys([prompt.of("w", 1), os.urandom(32)]))
    assert client.connection.call(alone, 10).payload == [b"", bytes([2, NOWHERE])]


def test_what_is_found_beside_a_chain_is_neither_held_nor_counted_as_hit_or_miss(client: CacheClient) -> None:
    prompt = Prompt(client, HYBRID)
    before: Any = client.status()["counters"]
    lease = os.urandom(16)
    beside = [*prompt.beside, os.urandom(32), os.urandom(32)]
    request = protocol.Lookup(lease, join_keys(prompt.chain), 2, 60.0, join_keys(beside))
    client.connection.call(request, 10)
    status: Any = client.status()
    assert status["leased_objects"] == len(prompt.chain)
    grown = {name: count - before.get(name, 0) for name, count in status["counters"].items()}
    grown = {name: count for name, count in grown.items() if name.partition(".")[0] in ("hit", "miss", "beside")}
    assert {name: count for name, count in grown.items() if count} == {
        "hit.cpu": 10,
        "beside.cpu": 15,
        "beside.absent": 2,
    }
    hits = {item["key"]: item["hits"] for item in client.objects(prompt.selection)}
    assert {hits[key.hex()] for key in prompt.beside} == {0}
    assert {hits[key.hex()] for key in prompt.chain} == {1}
    assert client.connection.call(protocol.Release(lease, b""), 10).payload == [True]
    with client.acquire([prompt.of("w", 4), prompt.of("s0", 4)]):
        pass
    hits = {item["key"]: item["hits"] for item in client.objects(prompt.selection)}
    assert [hits[prompt.of(shard, 4).hex()] for shard in ("w", "s0", "s1")] == [1, 1, 0]


def test_objects_say_that_they_are_beside_a_chain_also_after_a_restart(
    daemon: Any, tmp_path: Path, eventually: Any
) -> None:
    first = daemon(memory="4MiB", page_size="4KiB", disk_path=tmp_path, disk="64MiB")
    with CacheClient(first.url) as client:
        prompt = Prompt(client, HYBRID)
        kinds = {item["key"]: item["kind"] for item in client.objects(prompt.selection)}
    assert first.stop() == 0
    with CacheClient(daemon(memory="4MiB", page_size="4KiB", disk_path=tmp_path, disk="64MiB").url) as client:
        eventually(lambda: len(list(client.objects())) == OBJECTS, "the disk is read")
        found = {item["key"]: item for item in client.objects(prompt.selection)}
        assert {key: item["kind"] for key, item in found.items()} == kinds
        assert sorted(kinds.values()) == ["beside"] * 15 + ["kv"] * 10
        assert found[prompt.of("s1", 2).hex()]["parent"] == prompt.of("a0", 2).hex()
        assert client.locate(prompt.selection).hits == CHUNKS
        assert list(client.get_many(prompt.keys)) == [payload(key) for key in prompt.keys]
        assert client.check_index()["faults"] == 0


@pytest.mark.parametrize("beside", [bytes(31), "x" * 32, [bytes(32)], None])
def test_keys_beside_a_chain_that_are_none_end_the_connection(running: Any, beside: Any) -> None:
    with CacheClient(running.url) as client, pytest.raises((Unavailable, ProtocolError), match="beside must be bytes"):
        client.connection.call(protocol.Lookup(b"", b"", 1, 0.0, beside), 10)


def test_very_many_keys_beside_a_chain_keep_nobody_waiting(
    running: Any, client: CacheClient, quickest: Callable[..., float]
) -> None:
    many = join_keys([os.urandom(32) for _ in range(100_000)])

    def longest() -> float:
        number = client.connection.send(protocol.Lookup(b"", b"", 1, 0.0, many))
        with CacheClient(running.url) as other:
            longest = 0.0
            for _ in range(30):
                began = time.perf_counter()
                other.lookup([bytes(32)])
                longest = max(longest, time.perf_counter() - began)
        _, where = client.connection.wait(number, 30).payload
        assert where == bytes([NOWHERE]) * 100_000
        return longest

    assert quickest(longest, 0.05) < 0.05


def test_a_client_asks_for_long_chains_in_parts(client: CacheClient, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = Prompt(client, HYBRID)
    sent: list[Any] = []
    call = client._call
    monkeypatch.setattr(client, "_call", lambda request, *more: sent.append(request) or call(request, *more))
    monkeypatch.setattr("loracache.client.requests._PART_KEYS", 6)
    whole = client.lookup(prompt.chain, group=2, beside=prompt.beside)
    assert (whole.tiers, whole.beside) == (("cpu",) * 10, ("cpu",) * 15)
    assert [(len(each.keys) // 32, len(each.beside) // 32) for each in sent] == [(4, 6), (4, 6), (2, 3)]
    sent.clear()
    cut = client.lookup([*prompt.chain[:3], os.urandom(32), *prompt.chain[4:]], group=2, beside=prompt.beside)
    assert (cut.tiers, cut.beside) == (("cpu",) * 2, ("cpu",) * 6 + ("",) * 9)
    assert len(sent) == 1
    assert client.lookup([], beside=prompt.beside).beside == ("cpu",) * 15
    with pytest.raises(UsageError, match="14 keys beside 10, 2 a chunk"):
        client.lookup(prompt.chain, group=2, beside=prompt.beside[1:])
    assert client.lookup([]).hits == client.lookup([], beside=[bytes(32)]).hits == 0
    assert client.lookup([], beside=[bytes(32)]).beside == ("",)


# -- by tokens ---------------------------------------------------------------------------------------------------------


def test_a_hit_reaches_as_far_as_all_groups_have_what_it_needs(client: CacheClient, rest: httpx.Client) -> None:
    """Chunks of 4 tokens and a window of 7 before the one that is computed: a prefix needs the last two windows."""
    prompt = Prompt(client, HYBRID)
    assert located(client, rest, prompt) == (5, ("cpu",) * 5)
    client.evict([prompt.of("w", 1)])
    assert located(client, rest, prompt) == (5, ("cpu",) * 5)  # which five chunks need no more
    client.evict([prompt.of("s1", 4)])
    client.evict([prompt.of("w", 3)], tiers=["cpu"])
    assert located(client, rest, prompt) == (4, ("cpu", "cpu", "cpu", "disk"))
    client.evict([prompt.of("s0", 3)])
    client.flush()
    assert located(client, rest, prompt) == (1, ("cpu",))  # three would need the window that has gone, and two
    client.evict([prompt.of("w", 0)])
    client.flush()
    assert located(client, rest, prompt) == (0, ())


def test_a_model_without_full_attention_is_found_by_its_groups(client: CacheClient, rest: httpx.Client) -> None:
    prompt = Prompt(client, BARE)
    assert prompt.chain == []
    assert located(client, rest, prompt) == (5, ("cpu", "cpu"))  # of three chunks nothing is needed
    client.evict([prompt.of("s0", 4)])
    client.evict([prompt.of("w", 3)], tiers=["cpu"])
    client.flush()
    assert located(client, rest, prompt) == (4, ("cpu", "disk"))
    assert client.evict(prompt.selection).objects == 3 * 14 - 1  # of cpu, disk and Redis
    assert located(client, rest, prompt) == (0, ())


def test_of_a_chain_in_redis_alone_a_hit_reaches_as_far(client: CacheClient, rest: httpx.Client) -> None:
    prompt = Prompt(client, HYBRID)
    client.evict(prompt.selection, tiers=["cpu", "disk"])
    client.flush()
    assert located(client, rest, prompt) == (5, ("redis",) * 5)
    client.evict([prompt.of("s1", 4)], tiers=["redis"])
    client.flush()
    assert located(client, rest, prompt) == (4, ("redis",) * 4)


def test_verbs_by_tokens_cover_the_objects_of_all_groups(client: CacheClient, redis: Any) -> None:
    prompt = Prompt(client, HYBRID)
    which = prompt.selection
    assert OBJECTS == len(prompt.keys) == 25
    assert client.pin(which) == OBJECTS
    assert client.evict(which, tiers=["cpu"]).skipped == OBJECTS
    assert client.unpin(which) == OBJECTS
    assert client.evict(which, tiers=["cpu"]).objects == OBJECTS
    assert client.admit(which).objects == OBJECTS
    assert {tuple(item["tiers"]) for item in client.objects(which)} == {("cpu", "disk")}
    assert client.compress(which, tier="disk").causes == {"incompressible": OBJECTS}
    assert client.decompress(which, tier="disk").causes == {"already": OBJECTS}
    assert client.move(which, "disk", "redis").total == OBJECTS
    client.flush()
    assert {tuple(item["tiers"]) for item in client.objects(which)} == {("cpu",)}
    assert client.flush(selection=which).durable["disk"] == OBJECTS
    report = client.evict(which)
    assert (report.total, report.objects) == (OBJECTS, 3 * OBJECTS)
    client.flush()
    assert client.locate(which).hits == 0
    assert len(list(client.objects(which))) == 0
    assert client.admit(which).causes == {"absent": OBJECTS}  # of Redis, too


def test_a_chunk_takes_what_is_beside_it_out_of_all_tiers(client: CacheClient, rest: httpx.Client) -> None:
    prompt = Prompt(client, HYBRID)
    client.evict([prompt.of("a0", 3)])
    client.flush()
    left = {bytes.fromhex(item["key"]) for item in client.objects(prompt.selection)}
    chunks = [3, 4]
    assert set(prompt.keys) - left == {prompt.of(shard, at) for shard in ("a0", "w", "s1") for at in chunks}
    assert client.locate(prompt.selection).hits == 3


def test_the_tree_shows_what_hangs_under_a_chunk(client: CacheClient) -> None:
    prompt = Prompt(client, HYBRID)
    under = client.tree(prompt.of("a0", 1).hex())
    assert {node["id"] for node in under} == {prompt.of(shard, 1).hex() for shard in ("w", "s1")} | {
        prompt.of("a0", 2).hex()
    }
    roots = client.tree(f"space:{prompt.space.digest().hex()}")
    assert {node["id"] for node in roots} == {prompt.of("a0", 0).hex(), prompt.of("a1", 0).hex()}


def test_the_command_line_says_how_far_a_hit_reaches(client: CacheClient, running: Any, loracache: Any) -> None:
    prompt = Prompt(client, HYBRID)
    client.evict([prompt.of("s0", 4)])
    tokens = ",".join(map(str, prompt.tokens))
    which = ("--model", "hybrid", "--tokens", tokens, "--salt", prompt.salt)
    found = loracache("lookup", *which, "--json", socket=running.socket)
    assert {name: found.json[name] for name in ("hits", "asked", "tokens")} == {"hits": 4, "asked": 5, "tokens": 16}
    listed = loracache("objects", *which, "--json", socket=running.socket)
    assert len(listed.json) == OBJECTS - 1


def test_the_dashboards_page_of_an_object_beside_a_chain_is_served(client: CacheClient, rest: httpx.Client) -> None:
    prompt = Prompt(client, HYBRID)
    (item,) = rest.get("/v1/objects", params={"key": prompt.of("w", 2).hex()}).json()["objects"]
    assert (item["kind"], item["parent"]) == ("beside", prompt.of("a0", 2).hex())


def test_a_recorded_trace_is_of_chains_and_replays_as_it_was_found(daemon: Any, tmp_path: Path) -> None:
    running = daemon(memory="4MiB", page_size="4KiB", record=tmp_path / "trace")
    with CacheClient(running.url) as client:
        prompt = Prompt(client, HYBRID)
        for _ in range(3):
            request = protocol.Lookup(
                os.urandom(16), join_keys(prompt.chain), HYBRID.lead, 30.0, join_keys(prompt.beside)
            )
            client.connection.call(request, 10)
    assert running.stop() == 0
    requests = read_trace(tmp_path / "trace")
    assert [(len(each.blocks), each.held) for each in requests] == [(10, 10)] * 3
    assert sum(len(kept.blocks) for kept in requests[0].kept) == OBJECTS  # what it stored takes room, all of it
    run = replay(requests, Sizes(4 << 20, 0, 1), Way.parse("lru"))
    assert (run.hit_rate, run.bytes_stored) == (1.0, OBJECTS * 4096)
