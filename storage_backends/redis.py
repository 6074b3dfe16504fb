"""The Redis tier: objects in segments under a small header that is written last.

    <prefix>:{<64 hex digits of the key>}        the header (header.py): whoever finds it may ask for the segments
    <prefix>:{<64 hex digits of the key>}:<i>    payload bytes i * segment_bytes and on

The braces put all of an object into one slot of a cluster. Redis may evict any of these keys at any time: a missing
header is a MISS, a missing segment too, and then the rest is deleted. The bytes go between the sockets and the caller's
buffers without a copy (resp.py), two segments in flight.

Which server has a key is known to redis_servers.py. Where a connection is lost (redis_connections.py), the items
without an answer are UNAVAILABLE, and the next call connects anew. A call waits at most `timeout_s` for a server that
went silent. Error replies concern one item each.

Threading: any number of threads; each call has a connection of its own.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loracache.errors import ConfigError
from loracache.storage_backends import header, redis_rights
from loracache.storage_backends.base import ObjectInfo, Outcome, Result, StorageBackend, Transfer
from loracache.storage_backends.redis_cluster import Cluster
from loracache.storage_backends.redis_servers import Call, OneServer, Servers
from loracache.storage_backends.redis_urls import parse_target
from loracache.storage_backends.resp import ErrorReply, ProtocolFault, Reply, Wire, command, opening
from loracache.storage_backends.vectors import head, length, pieces

WINDOW = 2  # commands in flight: with one, Redis waits for us and we for Redis; more gain nothing
_LOST = {"MOVED", "ASK", "CLUSTERDOWN", "TRYAGAIN", "LOADING", "READONLY", "MASTERDOWN", "NOAUTH", "NOREPLICAS"}


class RedisBackend(StorageBackend):
    """Objects in the Redis at `url` (redis_urls.py), under keys that begin with `prefix`.

    password_file: holds the password where the URL has none. timeout_s: how long a call waits for a silent server.
    segment_bytes: largest value written; what was written with another is read all the same. integrity_key: as in
    DiskBackend.
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
    ) -> None:
        header.check_integrity_key(integrity_key)
        if not re.fullmatch(r"[\w.:/-]+", prefix, re.ASCII):
            raise ConfigError(f"redis_prefix {prefix!r} will not do; use letters, digits and _ . : / -")
        if not timeout_s > 0:
            raise ConfigError(f"redis_timeout_s is {timeout_s}; give the seconds to wait, more than 0")
        if not 0 < segment_bytes <= 512 << 20:
            raise ConfigError(f"redis_segment_bytes is {segment_bytes}; give 1 to {512 << 20}, a value's limit")
        target = parse_target(url, timeout_s, password_file)
        self._prefix = prefix.encode()
        self._cluster = target.cluster
        self._servers: Servers = Cluster(target) if target.cluster else OneServer(target)
        self.integrity_key = integrity_key
        self.segment_bytes = segment_bytes

    def check(self) -> None:
        """Raises ConfigError unless a server answers and lets us do all that we need to do."""
        redis_rights.check(self._servers, self._prefix, cluster=self._cluster)

    def contains(self, keys: Sequence[bytes]) -> list[Result]:
        return self._run(keys, lambda numbers: _Question(self, [keys[number] for number in numbers]))

    def load(self, transfers: Sequence[Transfer]) -> list[Result]:
        keys = [transfer.info.key for transfer in transfers]
        return self._run(keys, lambda numbers: _Load(self, [transfers[number] for number in numbers]))

    def store(self, transfers: Sequence[Transfer]) -> list[Result]:
        keys = [transfer.info.key for transfer in transfers]
        return self._run(keys, lambda numbers: _Store(self, [transfers[number] for number in numbers]))

    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        return self._run(keys, lambda numbers: _Removal(self, [keys[number] for number in numbers]))

    def scan(self) -> Iterator[ObjectInfo]:
        return iter(())

    def close(self) -> None:
        self._servers.close()

    def ask(self, wire: Wire, keys: Sequence[bytes]) -> list[Reply]:
        """The header values of all `keys`, or the errors in their place, in one round trip."""
        if self._cluster:  # a node refuses a command with keys of several slots
            wire.send([b"".join(command(b"GET", self.header_key(key)) for key in keys)])
            replies = [wire.reply() for _ in keys]
            return [None if isinstance(each, ErrorReply) and each.code == "WRONGTYPE" else each for each in replies]
        wire.send([command(b"MGET", *(self.header_key(key) for key in keys))])
        reply = wire.reply()
        if isinstance(reply, ErrorReply):
            return [reply] * len(keys)
        if isinstance(reply, list) and len(reply) == len(keys):
            return reply
        raise ProtocolFault("MGET was not answered with one value per key")

    def unlink(self, wire: Wire, objects: Sequence[tuple[bytes, int, int]]) -> list[Reply]:
        """Removes (key, size, segment bytes), all in one round trip; per object 1 if its header was there, or 0.

        Headers go first, so that nobody finds one without its segments.
        """
        commands: list[bytes] = []
        for key, size, segment_bytes in objects:
            count = -(-size // segment_bytes) or 1
            commands.append(command(b"UNLINK", self.header_key(key)))
            commands.append(command(b"UNLINK", *(self.segment_key(key, number) for number in range(count))))
        if commands:
            wire.send([b"".join(commands)])
        return [wire.reply() for _ in commands][::2]

    def header_key(self, key: bytes) -> bytes:
        return b"%b:{%b}" % (self._prefix, key.hex().encode())

    def segment_key(self, key: bytes, number: int) -> bytes:
        return b"%b:%d" % (self.header_key(key), number)

    def _run(self, keys: Sequence[bytes], call: Callable[[Sequence[int]], Call]) -> list[Result]:
        return self._servers.run(keys, call) if keys else []


class _Question:
    """Which of some keys are there."""

    nbytes = 0

    def __init__(self, backend: RedisBackend, keys: Sequence[bytes]) -> None:
        self.results: list[Result | None] = [None] * len(keys)
        self._backend = backend
        self._keys = keys

    def run(self, wire: Wire) -> None:
        answer = self._backend.ask(wire, self._keys)
        if wire.finished():  # else the answers may be to another question
            self.results = [_presence(key, raw) for key, raw in zip(self._keys, answer, strict=True)]


class _Removal(_Question):
    """Removes some keys."""

    def run(self, wire: Wire) -> None:
        extents = {}
        for item, (key, raw) in enumerate(zip(self._keys, self._backend.ask(wire, self._keys), strict=True)):
            if isinstance(raw, ErrorReply):
                self.results[item] = _refusal(raw)
                continue
            found = _read_header(key, raw)
            extents[item] = (
                (key, found.info.size, found.segment_bytes) if isinstance(found, header.Header) else (key, 0, 1)
            )
        for item, reply in zip(extents, self._backend.unlink(wire, list(extents.values())), strict=True):
            self.results[item] = _deletion(reply)


@dataclass(slots=True)  # not frozen: that would cost a microsecond each
class _Command:
    """A command on its way: whose it is, what is sent, and the buffers its answer goes to, if it has one."""

    item: int
    parts: list[bytes | memoryview]
    target: list[memoryview] | None = None
    is_header: bool = False


class _Batch(ABC):
    """The state of one load or store: a result per item, None until it is known."""

    def __init__(self, backend: RedisBackend, transfers: Sequence[Transfer]) -> None:
        self.backend = backend
        self.transfers = transfers
        self.results: list[Result | None] = [None] * len(transfers)
        self.missing = [0] * len(transfers)  # segments of each item that are not through yet
        self.headers: deque[_Command] = deque()  # ready to be sent
        self.remains: list[tuple[bytes, int, int]] = []  # what to unlink when all answers are in
        for item, transfer in enumerate(transfers):
            if fault := header.transfer_fault(transfer):
                self.results[item] = Result(Outcome.FAILED, detail=fault)

    @property
    def nbytes(self) -> int:
        return sum(length(transfer.buffers) for transfer in self.transfers)

    @abstractmethod
    def run(self, wire: Wire) -> None:
        """Fills `results` as far as the connection lasts."""

    @abstractmethod
    def next_segment(self) -> _Command | None:
        """The next segment to ask for or to send; None where there is none left."""

    @abstractmethod
    def answered(self, sent: _Command, reply: Reply) -> None:
        """Takes the answer to a command."""

    def pump(self, wire: Wire) -> None:
        """Keeps WINDOW segments in flight until there is nothing left to send and to receive. Headers travel with the
        next segment: they are too small to be worth a system call and a wait of their own.
        """
        flying: deque[_Command] = deque()
        segments = 0
        while True:
            while segments < WINDOW and (upcoming := self._upcoming()):
                wire.send([part for each in upcoming for part in each.parts])
                flying.extend(upcoming)
                segments += sum(not each.is_header for each in upcoming)
            if not flying:
                break
            sent = flying.popleft()
            segments -= not sent.is_header
            self.answered(sent, wire.reply() if sent.target is None else wire.reply_into(sent.target))
        self.backend.unlink(wire, self.remains)

    def _upcoming(self) -> list[_Command]:
        segment = self.next_segment()
        upcoming = [*self.headers, *([segment] if segment is not None else ())]
        self.headers.clear()
        return upcoming

    def fail(self, item: int, outcome: Outcome, detail: str, segment_bytes: int) -> None:
        """Gives an item up and has what Redis holds of it removed."""
        info = self.transfers[item].info
        self.results[item] = Result(outcome, detail=detail)
        self.remains.append((info.key, info.size, segment_bytes))


class _Load(_Batch):
    def __init__(self, backend: RedisBackend, transfers: Sequence[Transfer]) -> None:
        super().__init__(backend, transfers)
        self._headers: dict[int, header.Header] = {}
        self._commands: Iterator[_Command] = iter(())

    def run(self, wire: Wire) -> None:
        self._commands = self._gets(self.backend.ask(wire, [transfer.info.key for transfer in self.transfers]))
        self.pump(wire)

    def _gets(self, raw_headers: Sequence[Reply]) -> Iterator[_Command]:
        """Headers are read one by one, while the segments of the objects before are on their way."""
        for item, (transfer, raw) in enumerate(zip(self.transfers, raw_headers, strict=True)):
            if self.results[item] is not None or (found := self._take_header(item, raw)) is None:
                continue
            runs = list(pieces(transfer.buffers, found.info.size, found.segment_bytes))
            self.missing[item] = len(runs)
            if not runs:
                self._prove(item)
            for number, run in enumerate(runs):
                if self.results[item] is not None:
                    break
                yield _Command(item, [command(b"GET", self.backend.segment_key(found.info.key, number))], run)

    def _take_header(self, item: int, raw: Reply) -> header.Header | None:
        """The item's header where it is as expected; else the item has its result."""
        info = self.transfers[item].info
        if isinstance(raw, ErrorReply):
            self.results[item] = _refusal(raw)
            return None
        found = _read_header(info.key, raw)
        if found is None:
            self.results[item] = Result(Outcome.MISS)
        elif isinstance(found, str):
            self.fail(item, Outcome.CORRUPT, found, self.backend.segment_bytes)
        elif fault := header.header_fault(found, info):
            self.fail(item, Outcome.CORRUPT, fault, found.segment_bytes)
        else:
            self._headers[item] = found
            return found
        return None

    def next_segment(self) -> _Command | None:
        return next(self._commands, None)

    def answered(self, sent: _Command, reply: Reply) -> None:
        item = sent.item
        if self.results[item] is not None:
            return
        segment_bytes = self._headers[item].segment_bytes
        if reply is None:
            self.fail(item, Outcome.MISS, "a segment is missing", segment_bytes)
        elif isinstance(reply, ErrorReply) and reply.code != "WRONGTYPE":
            self.results[item] = _refusal(reply)
        elif sent.target is None or reply != length(sent.target):
            self.fail(item, Outcome.CORRUPT, "a segment has the wrong length or type", segment_bytes)
        else:
            self.missing[item] -= 1
            if not self.missing[item]:
                self._prove(item)

    def _prove(self, item: int) -> None:
        found, transfer = self._headers[item], self.transfers[item]
        fault = header.payload_fault(found, head(transfer.buffers, found.info.size), self.backend.integrity_key)
        if fault:
            self.fail(item, Outcome.CORRUPT, fault, found.segment_bytes)
        else:
            self.results[item] = Result(Outcome.OK)


class _Store(_Batch):
    def __init__(self, backend: RedisBackend, transfers: Sequence[Transfer]) -> None:
        super().__init__(backend, transfers)
        self._segments = self._sets()

    def run(self, wire: Wire) -> None:
        self.pump(wire)

    def _sets(self) -> Iterator[_Command]:
        for item, transfer in enumerate(self.transfers):
            if self.results[item] is not None:
                continue
            info = transfer.info
            if header.payload_checksum(head(transfer.buffers, info.size)) != info.checksum:
                detail = "payload does not match its checksum; nothing was stored"
                self.results[item] = Result(Outcome.CORRUPT, detail=detail)
                continue
            runs = list(pieces(transfer.buffers, info.size, self.backend.segment_bytes))
            self.missing[item] = len(runs)
            if not runs:
                self.headers.append(self._header(item))
            for number, run in enumerate(runs):
                if self.results[item] is not None:
                    break
                start = opening(3, b"SET", self.backend.segment_key(info.key, number)) + b"$%d\r\n" % length(run)
                yield _Command(item, [start, *run, b"\r\n"])

    def _header(self, item: int) -> _Command:
        info, buffers = self.transfers[item].info, self.transfers[item].buffers
        raw = header.pack(
            info, head(buffers, info.size), self.backend.integrity_key, segment_bytes=self.backend.segment_bytes
        )
        return _Command(item, [command(b"SET", self.backend.header_key(info.key), raw)], is_header=True)

    def next_segment(self) -> _Command | None:
        return next(self._segments, None)

    def answered(self, sent: _Command, reply: Reply) -> None:
        item = sent.item
        if self.results[item] is not None:
            return
        if isinstance(reply, ErrorReply):
            refusal = _refusal(reply)
            self.fail(item, refusal.outcome, refusal.detail, self.backend.segment_bytes)
        elif reply != b"OK":
            raise ProtocolFault("SET was not answered with OK")
        elif sent.is_header:
            self.results[item] = Result(Outcome.OK)
        else:
            self.missing[item] -= 1
            if not self.missing[item]:
                self.headers.append(self._header(item))


def _read_header(key: bytes, raw: Reply) -> header.Header | str | None:
    """The header kept under `key`; None where there is none; in words what is wrong with it where it is bad."""
    if raw is None:
        return None
    try:
        found = header.unpack(raw if isinstance(raw, bytes) else b"")
    except header.HeaderError as error:
        return str(error)
    if found.info.key != key:
        return f"header names the object {found.info.key.hex()}"
    return found if found.segment_bytes else "header names no segment size"


def _presence(key: bytes, raw: Reply) -> Result:
    if isinstance(raw, ErrorReply):
        return _refusal(raw)
    found = _read_header(key, raw)
    if isinstance(found, header.Header):
        return Result(Outcome.OK, found.info)
    return Result(Outcome.MISS, detail=found or "")


def _deletion(reply: Reply) -> Result:
    if isinstance(reply, ErrorReply):
        return _refusal(reply)
    return Result(Outcome.OK if reply == 1 else Outcome.MISS)


def _refusal(reply: ErrorReply) -> Result:
    if reply.code == "OOM":
        return Result(Outcome.FULL, detail=reply.text)
    return Result(Outcome.UNAVAILABLE if reply.code in _LOST else Outcome.FAILED, detail=reply.text)
