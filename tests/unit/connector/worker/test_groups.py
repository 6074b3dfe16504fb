# SPDX-License-Identifier: Apache-2.0
"""Loads and stores of an engine whose layers differ in what they need of a prefix: all of it arrives, or the load is
reported as failed; what is beside the chain hangs under its own chunk; every store is said to be over, once."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loracache.connectors.vllm.common.groups import KVGroup, Member
from loracache.connectors.vllm.common.messages import AdapterBinding, ChunkBlocks, Load, Prefix, StepPlan, Store
from loracache.connectors.vllm.common.options import Options
from loracache.connectors.vllm.connector import LoRACacheConnector
from loracache.connectors.vllm.link.pinned import pieces
from loracache.connectors.vllm.worker import side as side_module
from loracache.connectors.vllm.worker.objects import GroupObjects
from loracache.connectors.vllm.worker.side import WorkerSide
from loracache.connectors.vllm.worker.storer import Storer
from loracache.groups import Need
from loracache.kernels.page_copy import PageCopier
from loracache.kernels.page_copy.recording import RecordingDevice
from loracache.keys import Namespace, object_key

CHUNK = 32
SPACE = Namespace("m" * 64, "bfloat16", "mixed", CHUNK)
OLD, NEW = "a" * 64, "b" * 64


class Engine:
    """A worker of a Mixed, and the steps it is taken through."""

    def __init__(self, mixed: Any, url: str, problem: str = "") -> None:
        self.mixed = mixed
        self.side = WorkerSide(mixed.config, mixed.kv_cache_config, Options(server=url, chunk_tokens=CHUNK), problem)
        self.side.register_kv_caches(mixed.caches)
        self.before = mixed.memory.clone()
        self.over: Counter[int] = Counter()
        self._step = 0

    def step(self, **plan: Any) -> None:
        self._step += 1
        whole = StepPlan(step=self._step, **plan)
        self.side.handle_preemptions(whole)
        self.side.start_loads(whole)
        self.side.take_stores(whole)
        self.side.start_stores()

    def news(self) -> dict[str, int]:
        """Failures since the last call; numbers of stores go to `over`."""
        news = self.side.take_news()
        self.over.update(news.stored if news is not None else {})
        return news.failures if news is not None else {}

    def are_over(self, count: int) -> bool:
        self.news()
        return len(self.over) == count

    def stored(self, eventually: Any, *chunks: ChunkBlocks, parent: bytes = b"") -> dict[str, int]:
        """Store, to the end."""
        self.step(stores=[Store("s", SPACE, parent, chunks, None, 1)])
        eventually(lambda: not self.side._storing, "the store ends")
        return self.news()

    def loaded(self, eventually: Any, *chunks: ChunkBlocks) -> set[str]:
        """Load, to the end; answers the requests that failed."""
        self.step(loads=[Load("l", chunks, None, CHUNK)])
        eventually(lambda: "l" in self.side.take_finished()[1], "the load ends")
        assert self.side.take_load_errors() == set()
        return self.side.take_failed_loads()

    def of(self, chunks: Sequence[ChunkBlocks]) -> list[list[bytes]]:
        """What a member's layers have in each of these blocks, object after object."""
        found = []
        for chunk in chunks:
            members = [0] * len(chunk.blocks) if chunk.group == 0 else [1, 2]
            found += [self.mixed.content(member, block) for member, block in zip(members, chunk.blocks, strict=True)]
        return found


@pytest.fixture(scope="module")
def running(module_daemon: Any) -> Any:
    return module_daemon(memory="64MiB", page_size="4KiB")


def objects_of(running: Any) -> int:
    return int(running.status()["tiers"]["cpu"]["objects"])


@pytest.fixture
def make_engine(make_mixed: Any) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(url: str, kind: str = "window", problem: str = "", **options: Any) -> Engine:
        made.append(Engine(make_mixed(kind, **options), url, problem))
        return made[-1]

    yield make
    for engine in made:
        engine.side.close()


def chunk(key: bytes, *blocks: int, first: int = 0) -> ChunkBlocks:
    """Of full attention."""
    return ChunkBlocks(key, blocks, first)


def beside(key: bytes, kind: str, *blocks: int) -> ChunkBlocks:
    """A block of each member of the group beside."""
    return ChunkBlocks(key, blocks, CHUNK - 16 if kind == "window" else 0, 1)


KINDS = pytest.mark.parametrize("kind", ["window", "state"])


def everything(kind: str, keys: Sequence[bytes], blocks: Sequence[int]) -> list[ChunkBlocks]:
    """Two chunks of all layers; blocks in the order they are taken."""
    at = iter(blocks)
    width = 2 if kind == "window" else 1
    found = []
    for key in keys:
        found.append(chunk(key, *(next(at) for _ in range(width))))
        found.append(beside(key, kind, next(at), next(at)))
    return found


@KINDS
@pytest.mark.parametrize("layout", ["LBNHC", "BLHNC"])
def test_what_one_engine_stored_another_loads(
    running: Any, make_engine: Any, eventually: Any, kind: str, layout: str
) -> None:
    here = make_engine(running.url, kind, layout=layout)
    there = make_engine(running.url, kind, layout=layout, seed=2)
    keys = [os.urandom(32) for _ in range(2)]
    before = objects_of(running)
    out, into = everything(kind, keys, (3, 9, 1, 11, 0, 7, 5, 6)), everything(kind, keys, (11, 2, 4, 8, 10, 1, 0, 3))
    assert here.stored(eventually, *out) == {}
    assert torch.equal(here.mixed.memory, here.before)
    assert objects_of(running) == before + 4
    assert there.loaded(eventually, *into) == set()
    assert there.of(into) == here.of(out)
    others = sorted(set(range(12)).difference(*(each.blocks for each in into)))
    plain = make_engine(running.url, kind, layout=layout, seed=2)
    for member in range(3):
        assert [there.mixed.content(member, b) for b in others] == [plain.mixed.content(member, b) for b in others]
    sizes = [here.side._objects[each.group].nbytes(len(each.blocks)) for each in out]
    assert here.side.tally.take().data["store_bytes"] == sum(sizes)
    assert there.side.tally.take().data["load_bytes"] == sum(sizes)


def test_blocks_that_the_engine_has_itself_are_left_out(running: Any, make_engine: Any, eventually: Any) -> None:
    here, there = make_engine(running.url), make_engine(running.url, seed=2)
    key = os.urandom(32)
    assert here.stored(eventually, chunk(key, 3, 9), beside(key, "window", 1, 11)) == {}
    into = [chunk(key, 5, first=16), beside(key, "window", 2, 8)]  # its first 16 tokens are there
    assert there.loaded(eventually, *into) == set()
    assert there.of(into) == here.of([chunk(key, 9), beside(key, "window", 1, 11)])
    assert not there.side.tally.take().data.keys() & {"load_failures.size"}


@KINDS
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("how", ["absent", "checksum"])
def test_a_load_that_lacks_one_object_fails_whole_and_by_its_request(
    running: Any, make_engine: Any, eventually: Any, kind: str, group: int, how: str
) -> None:
    engine = make_engine(running.url, kind)
    keys = [os.urandom(32) for _ in range(2)]
    out = everything(kind, keys, (3, 9, 1, 11, 0, 7, 5, 6))
    wrong = out[2 + group]
    assert engine.stored(eventually, *(out if how == "checksum" else [each for each in out if each != wrong])) in (
        {},
        {"store.no_parent": 1},
    )
    if how == "checksum":
        with running.client().acquire([engine.side._objects[group].key(wrong.key)]) as reading:
            reading.slots[0].buffers[0][100] ^= 1
    assert engine.loaded(eventually, *everything(kind, keys, (2, 4, 8, 10, 1, 0, 3, 5))) == {"l"}
    assert engine.side.take_failed_loads() == set()  # once
    assert engine.news().keys() == {f"load.{how}"}


def test_a_load_of_nothing_that_the_plan_calls_void_fails(running: Any, make_engine: Any, eventually: Any) -> None:
    """The scheduler has no blocks to load into: nothing of the prefix is there."""
    engine = make_engine(running.url)
    engine.step(loads=[Load("l", (), None, CHUNK)], void={"l"})
    eventually(lambda: "l" in engine.side.take_finished()[1], "the load ends")
    assert engine.side.take_failed_loads() == {"l"}


def test_vllm_is_told_of_failed_requests_and_of_no_block(running: Any, make_engine: Any, eventually: Any) -> None:
    engine = make_engine(running.url)
    connector: Any = object.__new__(LoRACacheConnector)
    connector._worker, connector._connector_metadata = engine.side, None
    key = os.urandom(32)
    assert engine.stored(eventually, chunk(key, 3, 9), beside(key, "window", 1, 11)) == {}
    loads = [Load("gone", (chunk(os.urandom(32), 5, 6),), None, CHUNK), Load("here", (chunk(key, 7, 8),), None, CHUNK)]
    engine.step(loads=loads)
    seen: list[set[str]] = [set(), set()]

    def over() -> bool:
        results = connector.get_transfer_results(set())
        assert results.failed_recving <= results.finished_recving
        assert connector.get_block_ids_with_load_errors() == set()
        seen[0] |= results.finished_recving
        seen[1] |= results.failed_recving
        return len(seen[0]) == 2

    eventually(over, "both loads end")
    assert seen == [{"gone", "here"}, {"gone"}]


def test_what_is_wrong_after_vllm_was_told_is_counted_and_no_block_reported(
    running: Any, make_engine: Any, eventually: Any
) -> None:
    engine = make_engine(running.url)
    key, side = os.urandom(32), engine.side
    assert engine.stored(eventually, chunk(key, 3, 9)) == {}
    side._adapters.confirm(1, OLD)
    engine.step(loads=[Load("l", (chunk(key, 5, 6),), AdapterBinding(1, OLD), CHUNK)])
    eventually(lambda: "l" in side.take_finished()[1], "the load ends")
    engine.news()
    side._adapters.confirm(1, NEW)
    engine.step(first_runs={"l"}, prefixes=[Prefix(1, 1, (2, 4))])
    assert side.take_finished() == (set(), set())
    assert (side.take_load_errors(), side.take_failed_loads()) == (set(), set())
    assert engine.news() == {"load.adapter_changed": 1, "prefix.adapter_changed": 1}


# -- parents -----------------------------------------------------------------------------------------------------------


def parents(storer: Storer, *chunks: ChunkBlocks, parent: bytes = b"") -> list[bytes]:
    return [item.parent for item in storer._items(Store("s", SPACE, parent, chunks, None, 1))]


def test_the_chain_hangs_under_the_chunk_before_and_what_is_beside_under_its_own(
    running: Any, make_engine: Any
) -> None:
    side = make_engine(running.url).side
    one, two, three = (os.urandom(32) for _ in range(3))
    full = side._objects[0].key
    whole = [chunk(one, 1, 2), beside(one, "window", 3, 4), chunk(two, 5, 6), beside(two, "window", 7, 8)]
    assert parents(side._storer, *whole) == [bytes(32), full(one), full(one), full(two)]
    assert parents(side._storer, *whole, parent=three) == [full(three), full(one), full(one), full(two)]
    late = [beside(one, "window", 3, 4), chunk(two, 5, 6)]  # the first chunk's other object was stored before
    assert parents(side._storer, *late, parent=three) == [full(one), full(one)]


def test_where_nothing_needs_all_of_a_prefix_there_are_no_parents(running: Any) -> None:
    rows = torch.zeros(4, 8, dtype=torch.int64)
    group = KVGroup(Need.STATE, 0, (Member(0, 16, ()),), "state-1")
    objects = (GroupObjects(group, "s", (64,)),)
    storer = Storer(running.url, lambda: None, PageCopier((rows,)), objects, lambda _: True, print)
    chunks = ChunkBlocks(b"a" * 32, (1,)), ChunkBlocks(b"b" * 32, (2,))
    assert parents(storer, *chunks, parent=b"c" * 32) == [bytes(32)] * 2
    storer.close()


@KINDS
def test_what_is_beside_a_chunk_that_is_there_already_is_stored(
    running: Any, make_engine: Any, eventually: Any, kind: str
) -> None:
    engine = make_engine(running.url, kind)
    keys = [os.urandom(32) for _ in range(2)]
    before = objects_of(running)
    out = everything(kind, keys, (3, 9, 1, 11, 0, 7, 5, 6))
    assert engine.stored(eventually, out[0], out[2]) == {}
    assert engine.stored(eventually, *out) == {}
    assert objects_of(running) == before + 4
    assert engine.stored(eventually, beside(os.urandom(32), kind, 1, 2)) == {"store.no_parent": 1}


def test_what_hangs_under_what_has_no_room_waits_with_it_and_all_else_is_stored(running: Any, make_engine: Any) -> None:
    side = make_engine(running.url).side
    keys = [os.urandom(32) for _ in range(4)]
    items = side._storer._items(
        Store("s", SPACE, b"", tuple(everything("window", keys, [*range(12), 0, 1, 2, 3])), None, 1)
    )
    counts: dict[str, int] = {}
    side._storer._link.connection.buffers = lambda extents, size: [memoryview(bytearray(size))]
    answer: list[Any] = [[], "full", "exists", [], "full", "no_parent", "no_parent", "no_parent"]
    granted, left = side._storer._sorted(items, answer, counts)
    assert [each.item for each in granted] == [items[0], items[3]]
    assert left == [items[1], *items[4:]]
    assert counts == {}
    answer = ["busy", "no_parent", "over_quota", "no_parent", "no_parent", "no_parent", "no_parent", "too_large"]
    granted, left = side._storer._sorted(items, answer, counts)
    assert (granted, left) == ([], [])
    assert counts == {"no_parent": 1, "over_quota": 5, "too_large": 1}


# -- stores that are over ----------------------------------------------------------------------------------------------


def numbered(number: int, *chunks: ChunkBlocks, adapter: AdapterBinding | None = None) -> Store:
    return Store(f"r{number}", SPACE, b"", chunks or (chunk(os.urandom(32), 3, 9),), adapter, 1, number)


def test_every_numbered_store_is_over_once_whatever_comes_of_it(
    daemon: Any, make_engine: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = daemon(page_size="4KiB")
    engine = make_engine(running.url)
    side = engine.side
    side._adapters.confirm(1, OLD)
    orphan = beside(os.urandom(32), "window", 1, 2)
    changed = numbered(3, adapter=AdapterBinding(1, NEW))
    engine.step(stores=[numbered(1), numbered(0), numbered(2, orphan), changed], await_stores={"r1"})
    eventually(lambda: engine.are_over(3), "three are over")
    inside, go = threading.Event(), threading.Event()
    gather = side._storer._copier.gather

    def slow(*arguments: Any) -> Any:
        inside.set()
        go.wait(5)
        return gather(*arguments)

    monkeypatch.setattr(side._storer._copier, "gather", slow)
    engine.step(stores=[numbered(4), numbered(5)])
    assert inside.wait(5)
    side.handle_preemptions(StepPlan(step=9, preempted={"r5"}))
    go.set()
    eventually(lambda: engine.are_over(5), "two more are over")
    with side.weights.change():
        pass
    engine.step(stores=[numbered(6)])  # planned with the weights before
    engine.news()
    running.stop(9)
    known = {0: side.weights.version}
    engine.step(stores=[numbered(7)], weights=known)
    eventually(lambda: engine.are_over(7), "the one that nobody takes is over")
    whole = StepPlan(step=99, stores=[numbered(8)], weights=known)
    side.handle_preemptions(whole)
    side.take_stores(whole)  # and then the engine ends
    side.close()
    engine.step(stores=[numbered(9)], weights=known)
    engine.news()
    assert engine.over == dict.fromkeys(range(1, 10), 1)


def test_an_engine_that_stores_nothing_says_at_once_that_it_is_over(make_engine: Any) -> None:
    engine = make_engine("unix:///nowhere.sock", problem="no reason")
    engine.step(stores=[numbered(1), numbered(0)], await_stores={"r1"})
    engine.news()
    assert engine.over == {1: 1}
    assert engine.side.take_finished()[0] == {"r1"}


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("bounce_below", [0, 1 << 40], ids=["straight", "bouncing"])
def test_a_device_moves_every_groups_rows(
    running: Any, make_engine: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch, kind: str, bounce_below: int
) -> None:
    class OnDevice(PageCopier):
        gate = SimpleNamespace(shut=lambda: None, reopen=lambda: None)

        def __init__(self, rows: Any, bounce: Any) -> None:
            super().__init__(rows, pieces=pieces, device=RecordingDevice(4), bounce_below=bounce_below)

    monkeypatch.setattr(side_module, "GatedCopier", OnDevice)
    monkeypatch.setattr(
        "loracache.connectors.vllm.link.worker.CudaHost",
        lambda: SimpleNamespace(register=lambda start, nbytes: 0, unregister=lambda start: 0),
    )
    here, there = make_engine(running.url, kind, layout="BLHNC"), make_engine(running.url, kind, layout="BLHNC", seed=2)
    keys = [os.urandom(32) for _ in range(2)]
    out, into = everything(kind, keys, (3, 9, 1, 11, 0, 7, 5, 6)), everything(kind, keys, (11, 2, 4, 8, 10, 1, 0, 3))
    assert here.stored(eventually, *out) == {}
    assert there.loaded(eventually, *into) == set()
    assert there.of(into) == here.of(out)
    assert there.side.take_failed_loads() == set()
    assert object_key(keys[0], there.side._objects[1].shard) == there.side._objects[1].key(keys[0])
