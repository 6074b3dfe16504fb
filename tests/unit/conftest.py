# SPDX-License-Identifier: Apache-2.0
"""`make_rig`: a TieredCache whose tiers' threads are queues, so that a test decides when a read or a write is done."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import os
import random
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import pytest

from loracache.cache.eviction import Evicted
from loracache.cache.state.arena import Arena
from loracache.cache.state.index import Index, Node
from loracache.cache.state.leases import Writing
from loracache.cache.state.node import ARENA, LOWER, State
from loracache.cache.state.slices import whole
from loracache.cache.tier import io as tier_io
from loracache.cache.tiered import Acquired, TieredCache
from loracache.control import steps
from loracache.keys import checksum
from loracache.storage_backends.base import Kind, ObjectInfo, Outcome, Result, StorageBackend, Transfer
from loracache.storage_backends.memory import MemoryBackend
from loracache.tiers import Tier

PAGE = 4096
NAMESPACE = bytes(32)


class Steps:
    """Stands where a tier's threads are: what is submitted runs when told to."""

    def __init__(self, workers: int, name: str) -> None:
        self.name = name
        self.queue: deque[Callable[[], None]] = deque()

    def submit(self, work: Callable[[], None]) -> None:
        self.queue.append(work)

    def run_one(self) -> bool:
        if self.queue:
            self.queue.popleft()()
            return True
        return False

    def end(self) -> None:
        self.queue.clear()

    def ended(self, deadline: float) -> bool:
        return True


class StepLoop(asyncio.AbstractEventLoop):
    """An event loop of which every callback waits in `posted` until a test runs it; nothing runs by itself."""

    def __init__(self, posted: deque[Callable[[], None]]) -> None:
        self._posted = posted
        self._timers: list[tuple[float, asyncio.TimerHandle]] = []
        self.errors: list[dict[str, Any]] = []

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._posted.append(lambda: None if handle.cancelled() else self.within(handle._run))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(delay, callback, args, self, context)
        self._timers.append((delay, handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def fire(self) -> list[float]:
        """All timers that nobody cancelled are over; answers their seconds."""
        timers = [(delay, handle) for delay, handle in self._timers if not handle.cancelled()]
        self._timers = []
        for _, handle in timers:
            self.within(handle._run)
        return [delay for delay, _ in timers]

    def within(self, call: Callable[[], Any]) -> Any:
        """What `call` answers, which runs as if this loop had called it."""
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            return call()
        finally:
            asyncio._set_running_loop(before)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, **options)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(context)

    def get_debug(self) -> bool:
        return False


class FaultyBackend(MemoryBackend):
    """The reference backend with faults on order: `fails[what]` is the outcome of every such call until it is
    removed."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: dict[str, Outcome] = {}
        self.stored: list[bytes] = []
        self.deletions: list[list[bytes]] = []  # one entry a call
        self.most_bytes = 0

    def contains(self, keys: Sequence[bytes]) -> list[Result]:
        return self._failed("contains", len(keys)) or super().contains(keys)

    def load(self, transfers: Sequence[Transfer]) -> list[Result]:
        return self._failed("load", len(transfers)) or super().load(transfers)

    def store(self, transfers: Sequence[Transfer]) -> list[Result]:
        failed = self._failed("store", len(transfers))
        if failed:
            return failed
        results = super().store(transfers)
        self.stored += [
            item.info.key for item, result in zip(transfers, results, strict=True) if result.outcome is Outcome.OK
        ]
        self.most_bytes = max(self.most_bytes, self._used)
        return results

    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        self.deletions.append(list(keys))
        return self._failed("delete", len(keys)) or super().delete(keys)

    def _failed(self, what: str, count: int) -> list[Result]:
        return [Result(self.fails[what], detail="on order")] * count if what in self.fails else []

    def held(self) -> dict[bytes, ObjectInfo]:
        return {key: info for key, (info, _) in self._objects.items()}

    def flip(self, key: bytes) -> None:
        info, payload = self._objects[key]
        self._objects[key] = (info, bytes([payload[0] ^ 1]) + payload[1:])

    def lose(self, key: bytes) -> None:
        self._remove(key)


def key_of(name: object) -> bytes:
    return hashlib.sha256(str(name).encode()).digest()


def payload_of(key: bytes, size: int) -> bytes:
    return random.Random(key).randbytes(size)


class Rig:
    """The cache, its clock, its backends, and what a client does in one call each. Objects are named by anything.
    scanned: whether the disk was read already that an earlier run left."""

    def __init__(
        self, pages: int = 16, disk: int | None = None, redis: bool = False, scanned: bool = True, **options: Any
    ) -> None:
        self.now = 0.0
        self.posted: deque[Callable[[], None]] = deque()
        self.loop = StepLoop(self.posted)  # type: ignore[abstract]  # what is not there fails when it is called
        self.disk = FaultyBackend() if disk is not None else None
        self.redis = FaultyBackend() if redis else None
        self.arena = Arena(pages * PAGE, PAGE)
        self.cache = TieredCache(
            self.arena,
            self.posted.append,
            disk=self.disk,
            disk_limit=disk or 0,
            redis=self.redis,
            clock=lambda: self.now,
            **options,
        )
        if self.cache.disk is not None and scanned:
            self.cache.disk.adopted_all([])

    def close(self) -> None:
        os.close(self.arena.fd)

    # -- time and threads ----------------------------------------------------------------------------------------------

    def threads(self) -> list[Steps]:
        """Writing before reading before asking, the disk's before Redis's."""
        ios = [writer.io for writer in self.cache.writers]
        threads: list[Any] = [thread for io in ios for thread in (io._writes, io._loads, io._asks, io._care)]
        return threads

    def answer(self) -> None:
        while self.posted:
            self.posted.popleft()()

    def step(self, name: str) -> bool:
        """One job of the thread called `name`, for example "disk-write", and what follows on the cache's thread."""
        (thread,) = [thread for thread in self.threads() if thread.name == name]
        done = thread.run_one()
        self.answer()
        return done

    def settle(self) -> None:
        """Everything that was asked for, and what follows from it, is done."""
        self.answer()
        while any(thread.run_one() for thread in self.threads()):
            self.answer()

    def start(self, work: Coroutine[Any, Any, Any]) -> list[Any]:
        """Run a coroutine of the control path up to its first wait; the rest of it is `posted`. What it answers or
        raises is in the list, once it has come to its end."""
        ends: list[Any] = []

        async def run() -> None:
            try:
                ends.append(await work)
            except Exception as error:  # noqa: BLE001 - the test looks at it
                ends.append(error)

        self.loop.within(lambda: steps.start(run()))
        return ends

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.cache.tick()

    # -- a client ------------------------------------------------------------------------------------------------------

    def info(self, name: object, parent: object = None, size: int = PAGE) -> ObjectInfo:
        above = b"" if parent is None else key_of(parent)
        return ObjectInfo(key_of(name), above, Kind.KV, NAMESPACE, size, 0)

    def reserve(
        self, name: object, parent: object = None, size: int = PAGE, *, owner: int = 1, lease: bytes = b"w"
    ) -> Writing | str:
        return whole(self.cache.reserve(owner, lease, [self.info(name, parent, size)], 30.0))[0]

    def write(self, writing: Writing) -> int:
        """Copy the object's payload into its extents; answers its checksum."""
        key, size = writing.info.key, writing.info.size
        self.put(writing.extents, payload_of(key, size))
        return checksum([payload_of(key, size)])

    def payload(self, name: object, size: int = PAGE) -> bytes:
        """What every computation of the object gives."""
        return payload_of(key_of(name), size)

    def put(self, extents: Sequence[tuple[int, int]], data: bytes) -> None:
        for view in self.arena.buffers(extents, len(data)):
            view[:] = data[: len(view)]
            data = data[len(view) :]

    def store(self, name: object, parent: object = None, size: int = PAGE, *, owner: int = 1) -> str:
        """Reserve, write, commit; "" or why not."""
        writing = self.reserve(name, parent, size, owner=owner, lease=b"s")
        if isinstance(writing, str):
            return writing
        return self.commit(owner, b"s", [(writing.info.key, self.write(writing))])[0]

    def commit(self, owner: int, lease: bytes, written: Sequence[tuple[bytes, int]]) -> list[str]:
        return [*whole(self.cache.commit(owner, lease, written))]

    def chain(self, *names: object, size: int = PAGE) -> None:
        for parent, name in zip((None, *names), names, strict=False):
            assert self.store(name, parent, size) == ""

    def acquire(self, *names: object, owner: int = 1, lease: bytes = b"r", ttl: float = 30.0) -> list[Acquired | None]:
        """The answers so far, by position; later ones appear in the same list."""
        answers: list[Acquired | None] = [None] * len(names)

        def ready(acquired: list[Acquired]) -> None:
            for item in acquired:
                assert answers[item.position] is None, "a position was answered twice"
                answers[item.position] = item

        self.cache.acquire(owner, lease, [key_of(name) for name in names], ttl, ready)
        return answers

    def release(self, *, owner: int = 1, lease: bytes = b"r") -> bool:
        return self.cache.leases.release(owner, lease)

    def read(self, acquired: Acquired | None) -> bytes:
        assert acquired is not None
        assert acquired.node is not None, acquired.cause
        node = acquired.node
        data = b"".join(self.arena.buffers(node.extents, node.size))
        assert checksum([data]) == node.checksum
        return data

    def get(self, name: object) -> bytes | str:
        """The payload, or why there is none."""
        answers = self.acquire(name, lease=b"get")
        self.settle()
        found = answers[0]
        assert found is not None, "never answered"
        data = self.read(found) if found.node is not None else found.cause
        assert self.release(lease=b"get")
        return data

    def evict(self, *names: object, tiers: Sequence[Tier] = (Tier.CPU,)) -> tuple[int, int, int]:
        did = Evicted()
        assert list(self.cache.evict([key_of(name) for name in names], tiers, did)) == []  # at once: these are few
        return did.objects, did.nbytes, did.skipped

    def remove(self, slices: Callable[[Evicted], Iterator[None]]) -> list[Evicted]:
        """An eviction that lets others in between its slices, as the daemon's do; what it did, once it is over."""

        async def run() -> Evicted:
            did = Evicted()
            for _ in slices(did):
                await steps.turn()
            return did

        return self.start(run())

    def node(self, name: object) -> Node | None:
        return self.cache.index.get(key_of(name))

    def count(self, counter: str) -> int:
        return self.cache.counters[counter]

    def backend(self, name: str) -> StorageBackend:
        found = self.disk if name == "disk" else self.redis
        assert found is not None
        return found


Transition = tuple[str, State, State]
_CHANGES = ("enter", "leave", "load", "load_failed", "queue", "unqueue", "hold", "unhold")
_TABLES = {Tier.CPU: ("arena", ARENA), Tier.DISK: ("lower", LOWER), Tier.REDIS: ("lower", LOWER)}


@pytest.fixture
def transitions(monkeypatch: pytest.MonkeyPatch) -> set[Transition]:
    """The changes of state that any index made during the test; one that the tables do not have fails it."""
    seen: set[Transition] = set()

    def watched(change: Callable[..., None]) -> Callable[..., None]:
        def wrapper(index: Index, node: Node, *args: Any, **options: Any) -> None:
            before = {tier: node.state(tier) for tier in _TABLES}
            change(index, node, *args, **options)
            for tier, (name, table) in _TABLES.items():
                way = before[tier], node.state(tier)
                if way[0] is not way[1]:
                    assert way in table, f"{tier.label}: {way[0].name} -> {way[1].name} by {change.__name__}"
                    seen.add((name, *way))

        return wrapper

    for name in _CHANGES:
        monkeypatch.setattr(Index, name, watched(getattr(Index, name)))
    return seen


@pytest.fixture
def make_rig(monkeypatch: pytest.MonkeyPatch, transitions: set[Transition]) -> Iterator[Callable[..., Rig]]:
    """make_rig(pages=16, disk=bytes or None, redis=False, scanned=True, policy="lru", ...) gives a Rig. Its objects
    change their states as the tables say, and in no other way."""
    monkeypatch.setattr(tier_io, "Workers", Steps)
    rigs: list[Rig] = []

    def make(**options: Any) -> Rig:
        rigs.append(Rig(**options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig_of(make_rig: Callable[..., Rig]) -> Iterator[Callable[..., Rig]]:
    """make_rig, and at the end everything settles with every page held once or free, no more on disk than allowed, and
    all that is on disk counted.
    """
    rigs: list[Rig] = []

    def make(**options: Any) -> Rig:
        rigs.append(make_rig(**options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.settle()
        assert rig.cache.audit() == []
        assert [len(thread.queue) for thread in rig.threads()] == [0] * len(rig.threads())
        if rig.disk is not None and rig.cache.disk is not None:
            assert rig.disk.most_bytes <= rig.cache.disk.limit
            assert rig.cache.disk.used == sum(info.size for info in rig.disk.held().values())
