"""The Redis tier: objects in segments under a small header that is written last.

    <prefix>:{<64 hex digits of the key>}        the header (header.py): whoever finds it may ask for the segments
    <prefix>:{<64 hex digits of the key>}:<i>    payload bytes i * segment_bytes and on

The braces put all of an object into one cluster slot. Redis may evict any of these keys at any time: a missing header
is a MISS, a missing segment too, and then the rest is deleted. The bytes go between the sockets and the caller's
buffers without a copy (resp.py), two segments in flight.

Where the connection is lost (redis_connections.py), the items without an answer are UNAVAILABLE, and the next call
connects anew. A call waits at most `timeout_s` for a server that went silent. Error replies concern one item each.

Threading: any number of threads; each call has a connection of its own.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loracache.errors import ConfigError
from loracache.storage_backends import header
from loracache.storage_backends.base import ObjectInfo, Outcome, Result, StorageBackend, Transfer
from loracache.storage_backends.redis_connections import Connections
from loracache.storage_backends.resp import ErrorReply, ProtocolFault, Reply, Wire, command, opening
from loracache.storage_backends.vectors import head, length, pieces

WINDOW = 2  # commands in flight: with one, Redis waits for us and we for Redis; more gain nothing
_LOST = {"MOVED", "ASK", "CLUSTERDOWN", "TRYAGAIN", "LOADING", "READONLY", "MASTERDOWN", "NOAUTH", "NOREPLICAS"}


class RedisBackend(StorageBackend):
    """Objects in the Redis at `url` (redis://, rediss:// or unix://), under keys that begin with `prefix`.

    timeout_s: how long a call waits for a silent server. segment_bytes: largest value written; what was written with
    another is read all the same. integrity_key: as in DiskBackend.
    Raises ConfigError for settings that cannot work; whether a server answers is asked by `check`.
    """

    name = "redis"

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "loracache",
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
        self._prefix = prefix.encode()
        self._connections = Connections(url, timeout_s)
        self.integrity_key = integrity_key
        self.segment_bytes = segment_bytes

    def check(self) -> None:
        """Raises ConfigError unless the server answers and lets us in."""
        answers: list[list[Reply] | ErrorReply] = []
        lost = self._connections.talk(lambda wire: answers.append(self.ask(wire, [bytes(32)])), 0)
        if lost:
            raise ConfigError(f"redis {self._connections.place}: {lost}; start that Redis, or correct redis")
        if isinstance(answers[0], ErrorReply):
            raise ConfigError(f"redis {self._connections.place}: the server answers {answers[0].text!r}; correct redis")

    def contains(self, keys: Sequence[bytes]) -> list[Result]:
        if not keys:
            return []
        answers: list[list[Reply] | ErrorReply] = []
        lost = self._connections.talk(lambda wire: answers.append(self.ask(wire, keys)), 0)
        if lost:
            return [Result(Outcome.UNAVAILABLE, detail=lost)] * len(keys)
        if isinstance(answers[0], ErrorReply):
            return [_refusal(answers[0])] * len(keys)
        return [_presence(key, raw) for key, raw in zip(keys, answers[0], strict=True)]

    def load(self, transfers: Sequence[Transfer]) -> list[Result]:
        return self._run(_Load(self, transfers))

    def store(self, transfers: Sequence[Transfer]) -> list[Result]:
        return self._run(_Store(self, transfers))

    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        results: list[Result] = []
        lost = self._connections.talk(lambda wire: results.extend(self._delete(wire, keys)), 0) if keys else ""
        return results or [Result(Outcome.UNAVAILABLE, detail=lost)] * len(keys)

    def scan(self) -> Iterator[ObjectInfo]:
        return iter(())

    def close(self) -> None:
        self._connections.close()

    def ask(self, wire: Wire, keys: Sequence[bytes]) -> list[Reply] | ErrorReply:
        """The header values of all `keys` in one round trip."""
        wire.send([command(b"MGET", *(self.header_key(key) for key in keys))])
        reply = wire.reply()
        if isinstance(reply, ErrorReply) or (isinstance(reply, list) and len(reply) == len(keys)):
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

    def _delete(self, wire: Wire, keys: Sequence[bytes]) -> list[Result]:
        answer = self.ask(wire, keys)
        if isinstance(answer, ErrorReply):
            return [_refusal(answer)] * len(keys)
        extents = []
        for key, raw in zip(keys, answer, strict=True):
            found = _read_header(key, raw)
            size, segment_bytes = (found.info.size, found.segment_bytes) if isinstance(found, header.Header) else (0, 1)
            extents.append((key, size, segment_bytes))
        return [_deletion(reply) for reply in self.unlink(wire, extents)]

    def _run(self, batch: _Batch) -> list[Result]:
        nbytes = sum(length(transfer.buffers) for transfer in batch.transfers)
        lost = self._connections.talk(batch.run, nbytes) if batch.transfers else ""
        return [result or Result(Outcome.UNAVAILABLE, detail=lost) for result in batch.results]


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
        answer = self.backend.ask(wire, [transfer.info.key for transfer in self.transfers])
        if isinstance(answer, ErrorReply):
            self.results = [result or _refusal(answer) for result in self.results]
            return
        self._commands = self._gets(answer)
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
