# SPDX-License-Identifier: Apache-2.0
"""The Redis tier: objects in one value, or in segments under a small header that is written last.

    <prefix>:{<64 hex digits of the key>}        the header (header.py), and behind it the bytes of a small object;
                                                 of a larger one who finds it may ask for the segments
    <prefix>:{<64 hex digits of the key>}:<i>    payload bytes i * segment_bytes and on
    <prefix>:{<64 hex digits of the key>}:<checksum>:<i>    the same of an object's compressed bytes

The braces put all of an object into one slot of a cluster. Redis may evict any of these keys at any time: a missing
header is a MISS, a missing segment too, and then the rest is deleted. What another release wrote, or is whole under
another integrity_key, is UNPROVEN and left as it is until it is stored anew. A payload's bytes go between the sockets
and the caller's buffers without a copy (resp.py), two segments in flight (batches.py).

An object that is stored again with other `planes` gets other segments, then its new header; the old segments are left
to expire, so that whoever found the old header still reads them.

Which server has a key is known to servers.py. Where a connection is lost (connections.py), the items
without an answer are UNAVAILABLE, and the next call connects anew. A call waits at most `timeout_s` for a server that
went silent. Error replies concern one item each.

Threading: any number of threads; each call has a connection of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from loracache.errors import ConfigError
from loracache.storage_backends import header
from loracache.storage_backends.base import (
    ObjectInfo,
    Outcome,
    Purge,
    Purpose,
    Result,
    Standing,
    StorageBackend,
    Tended,
    Transfer,
)
from loracache.storage_backends.redis import rights
from loracache.storage_backends.redis.batches import LoadCall, StoreCall, refusal
from loracache.storage_backends.redis.cluster import Cluster
from loracache.storage_backends.redis.commands import ObjectCommands
from loracache.storage_backends.redis.descriptors import Descriptors
from loracache.storage_backends.redis.hashes import RedisHash
from loracache.storage_backends.redis.layout import Layout, NotOurs, read_header
from loracache.storage_backends.redis.purge import Purger
from loracache.storage_backends.redis.resp import ErrorReply, Reply, Wire
from loracache.storage_backends.redis.servers import Call, OneServer, Servers
from loracache.storage_backends.redis.sweep import Sweeper
from loracache.storage_backends.redis.urls import parse_target
from loracache.storage_backends.redis.walk import ENDLESS

__all__ = ["RedisBackend"]


class RedisBackend(StorageBackend):
    """Objects in the Redis at `url` (urls.py), under keys that begin with `prefix`.

    password_file: holds the password where the URL has none. timeout_s: how long a call waits for a silent server.
    segment_bytes: largest value written; what was written with another is read all the same. integrity_key: as in
    DiskBackend. describe(namespace): what others shall know of a namespace that has objects.
    ttl_s: seconds after which an object goes that nobody loaded; 0: none does. max_bytes: of Redis's memory that our
    keys may take; 0: any.
    Raises ConfigError for settings that cannot work; whether a server answers is asked by `check`.
    """

    name = "redis"

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "loracache",
        password_file: Path | None = None,
        integrity_key: bytes | None = None,
        timeout_s: float = 2.0,
        segment_bytes: int = 8 << 20,
        ttl_s: int = 0,
        max_bytes: int = 0,
        describe: Callable[[bytes], Mapping[bytes, bytes]] = lambda namespace: {},
    ) -> None:
        header.check_integrity_key(integrity_key)
        if not re.fullmatch(r"[\w.:/-]+", prefix, re.ASCII):
            raise ConfigError(f"redis_prefix {prefix!r} will not do; use letters, digits and _ . : / -")
        if not timeout_s > 0:
            raise ConfigError(f"redis_timeout_s is {timeout_s}; give the seconds to wait, more than 0")
        if not 0 < segment_bytes <= 512 << 20:
            raise ConfigError(f"redis_segment_bytes is {segment_bytes}; give 1 to {512 << 20}, a value's limit")
        target = parse_target(url, timeout_s, password_file)
        self.segment_bytes = segment_bytes
        self._objects = ObjectCommands(
            Layout(prefix.encode()), bool(target.cluster), integrity_key, segment_bytes, ttl_s
        )
        self.limit = max_bytes
        self._descriptors = Descriptors(RedisHash(target, f"{prefix}:namespaces"), describe)
        self._servers: Servers = Cluster(target) if target.cluster else OneServer(target)
        self._lock = RedisHash(target, f"{prefix}:sweep")
        self._sweeper = Sweeper(self._objects, self._servers, self._lock, max_bytes)

    def check(self) -> Standing:
        """Whether a server answers and lets us do all that we need to do. Raises ConfigError for a wrong login and
        other settings that cannot work.
        """
        return rights.check(self._servers, self._objects, limited=bool(self.limit))

    def contains(self, keys: Sequence[bytes]) -> list[Result]:
        return self._run(keys, lambda numbers: _Question(self._objects, [keys[number] for number in numbers]))

    def load(self, transfers: Sequence[Transfer]) -> list[Result]:
        keys = [transfer.info.key for transfer in transfers]
        return self._run(keys, lambda numbers: LoadCall(self._objects, [transfers[number] for number in numbers]))

    def store(self, transfers: Sequence[Transfer]) -> list[Result]:
        keys = [transfer.info.key for transfer in transfers]
        self._descriptors.note({transfer.info.namespace for transfer in transfers})
        results = self._run(keys, lambda numbers: StoreCall(self._objects, [transfers[number] for number in numbers]))
        stored = zip(transfers, results, strict=True)
        self._sweeper.wrote(sum(each.stored or sent.info.size for sent, each in stored if each.outcome is Outcome.OK))
        return results

    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        return self._run(keys, lambda numbers: _Removal(self._objects, [keys[number] for number in numbers]))

    def scan(self) -> Iterator[ObjectInfo]:
        return iter(())

    def descriptors(self) -> dict[bytes, bytes]:
        return self._descriptors.all()

    def forget(self, fields: Collection[bytes]) -> None:
        self._descriptors.forget(fields)

    def purge(self, purpose: Purpose, did: Purge, go_on: Callable[[], bool]) -> None:
        lost = self._servers.everywhere(Purger(self._objects, purpose, did, go_on).run, ENDLESS)
        if lost is not None:
            did.fail(f"redis {self._servers.place}: {lost.text}")

    @property
    def due(self) -> bool:
        return self._sweeper.due

    def tend(self, go_on: Callable[[], bool]) -> Tended:
        return self._sweeper.sweep(go_on)

    def close(self) -> None:
        self._descriptors.close()
        self._lock.close()
        self._servers.close()

    def _run(self, keys: Sequence[bytes], call: Callable[[Sequence[int]], Call]) -> list[Result]:
        return self._servers.run(keys, call) if keys else []


class _Question:
    """Which of some keys are there."""

    nbytes = 0

    def __init__(self, objects: ObjectCommands, keys: Sequence[bytes]) -> None:
        self.results: list[Result | None] = [None] * len(keys)
        self._objects = objects
        self._keys = keys

    def run(self, wire: Wire) -> None:
        answer = self._objects.headers(wire, self._keys)
        if wire.finished():  # else the answers may be to another question
            self.results = [self._presence(key, raw) for key, raw in zip(self._keys, answer, strict=True)]

    def _presence(self, key: bytes, raw: Reply) -> Result:
        if isinstance(raw, ErrorReply):
            return refusal(raw)
        found = read_header(key, raw, self._objects.integrity_key)
        if isinstance(found, header.Header):
            return Result(Outcome.OK, found.info)
        if isinstance(found, NotOurs):
            return Result(Outcome.UNPROVEN, detail=found.detail)
        return Result(Outcome.MISS, detail=found or "")


class _Removal(_Question):
    """Removes some keys."""

    def run(self, wire: Wire) -> None:
        objects = {}
        for item, (key, raw) in enumerate(zip(self._keys, self._objects.headers(wire, self._keys), strict=True)):
            if isinstance(raw, ErrorReply):
                self.results[item] = refusal(raw)
                continue
            found, layout = read_header(key, raw), self._objects.layout
            segments = layout.held(found) if isinstance(found, header.Header) else []
            objects[item] = [layout.header_key(key), *segments]
        for item, reply in zip(objects, self._objects.unlink(wire, list(objects.values())), strict=True):
            self.results[item] = _deletion(reply)


def _deletion(reply: Reply) -> Result:
    if isinstance(reply, ErrorReply):
        return refusal(reply)
    return Result(Outcome.OK if reply == 1 else Outcome.MISS)
