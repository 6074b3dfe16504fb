"""The Redis tier: objects in segments under a small header that is written last.

    <prefix>:{<64 hex digits of the key>}        the header (header.py): whoever finds it may ask for the segments
    <prefix>:{<64 hex digits of the key>}:<i>    payload bytes i * segment_bytes and on
    <prefix>:{<64 hex digits of the key>}:<checksum>:<i>    the same of an object's compressed bytes

The braces put all of an object into one cluster slot. Redis may evict any of these keys at any time: a missing header
is a MISS, a missing segment too, and then the rest is deleted. A payload's bytes go between the sockets and the
caller's buffers without a copy (resp.py), two segments in flight.

An object that is stored again with other `planes` gets other segments, then its new header; the old segments are left
to expire, so that whoever found the old header still reads them.

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
from loracache.storage_backends import codec, header
from loracache.storage_backends.base import ObjectInfo, Outcome, Result, StorageBackend, Transfer
from loracache.storage_backends.redis_connections import Connections
from loracache.storage_backends.redis_layout import Layout, read_header
from loracache.storage_backends.resp import ErrorReply, ProtocolFault, Reply, Wire, command, opening
from loracache.storage_backends.vectors import head, length, pieces

RETIRED_S = 60  # how long segments outlive their header: longer than a load takes that found it
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
        self.layout = Layout(prefix.encode())
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
        wire.send([command(b"MGET", *(self.layout.header_key(key) for key in keys))])
        reply = wire.reply()
        if isinstance(reply, ErrorReply) or (isinstance(reply, list) and len(reply) == len(keys)):
            return reply
        raise ProtocolFault("MGET was not answered with one value per key")

    def unlink(self, wire: Wire, objects: Sequence[list[bytes]]) -> list[Reply]:
        """Removes the keys of each object, all in one round trip; per object 1 if its first key was there, or 0.

        Headers are the first, so that nobody finds one without its segments.
        """
        commands: list[bytes] = []
        for first, *rest in objects:
            commands.append(command(b"UNLINK", first))
            commands.append(command(b"UNLINK", *(rest or [first])))
        if commands:
            wire.send([b"".join(commands)])
        return [wire.reply() for _ in commands][::2]

    def retire(self, wire: Wire, segments: Sequence[bytes]) -> None:
        """Has segments expire that no header names any more."""
        if segments:
            wire.send([b"".join(command(b"EXPIRE", segment, b"%d" % RETIRED_S) for segment in segments)])
        for _ in segments:
            wire.reply()

    def _delete(self, wire: Wire, keys: Sequence[bytes]) -> list[Result]:
        answer = self.ask(wire, keys)
        if isinstance(answer, ErrorReply):
            return [_refusal(answer)] * len(keys)
        objects = []
        for key, raw in zip(keys, answer, strict=True):
            found = read_header(key, raw)
            segments = self.layout.held(found) if isinstance(found, header.Header) else []
            objects.append([self.layout.header_key(key), *segments])
        return [_deletion(reply) for reply in self.unlink(wire, objects)]

    def _run(self, batch: _Batch) -> list[Result]:
        nbytes = sum(length(transfer.buffers) for transfer in batch.transfers)
        lost = self._connections.talk(batch.run, nbytes) if batch.transfers else ""
        return [result or Result(Outcome.UNAVAILABLE, detail=lost) for result in batch.results]


@dataclass(slots=True)  # not frozen: that would cost a microsecond each
class _Command:
    """A command on its way: whose it is, what is sent, and the buffers its answer goes to, if it has one.

    is_question: it asks for the header that is about to be replaced.
    """

    item: int
    parts: list[bytes | memoryview]
    target: list[memoryview] | None = None
    is_header: bool = False
    is_question: bool = False


class _Batch(ABC):
    """The state of one load or store: a result per item, None until it is known."""

    def __init__(self, backend: RedisBackend, transfers: Sequence[Transfer]) -> None:
        self.backend = backend
        self.transfers = transfers
        self.results: list[Result | None] = [None] * len(transfers)
        self.missing = [0] * len(transfers)  # segments of each item that are not through yet
        self.headers: deque[_Command] = deque()  # ready to be sent
        self.remains: list[list[bytes]] = []  # what to unlink when all answers are in
        self.retired: list[bytes] = []  # segments to let expire then
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
        self.backend.retire(wire, self.retired)

    def _upcoming(self) -> list[_Command]:
        segment = self.next_segment()
        upcoming = [*self.headers, *([segment] if segment is not None else ())]
        self.headers.clear()
        return upcoming

    def fail(self, item: int, outcome: Outcome, detail: str, segments: Sequence[bytes]) -> None:
        """Gives an item up and has what Redis holds of it removed."""
        self.results[item] = Result(outcome, detail=detail)
        self.remains.append([self.backend.layout.header_key(self.transfers[item].info.key), *segments])


class _Load(_Batch):
    def __init__(self, backend: RedisBackend, transfers: Sequence[Transfer]) -> None:
        super().__init__(backend, transfers)
        self._headers: dict[int, header.Header] = {}
        self._compressed: dict[int, memoryview] = {}  # of items on their way
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
            stored, target = found.info.stored, transfer.buffers
            if stored:
                target = [self._compressed.setdefault(item, memoryview(bytearray(stored)))]
            runs = list(pieces(target, stored or found.info.size, found.segment_bytes))
            self.missing[item] = len(runs)
            if not runs:
                self._prove(item)
            for segment, run in zip(self.backend.layout.held(found), runs, strict=True):
                if self.results[item] is not None:
                    break
                yield _Command(item, [command(b"GET", segment)], run)

    def _take_header(self, item: int, raw: Reply) -> header.Header | None:
        """The item's header where it is as expected; else the item has its result."""
        info = self.transfers[item].info
        found = read_header(info.key, raw)
        if found is None:
            self.results[item] = Result(Outcome.MISS)
        elif isinstance(found, str):
            supposed = self.backend.layout.segment_keys(info.key, info.size, self.backend.segment_bytes)
            self.fail(item, Outcome.CORRUPT, found, supposed)
        elif fault := header.header_fault(found, info):
            self.fail(item, Outcome.CORRUPT, fault, self.backend.layout.held(found))
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
        if reply is None:
            self.fail(item, Outcome.MISS, "a segment is missing", self._held(item))
        elif isinstance(reply, ErrorReply) and reply.code != "WRONGTYPE":
            self.results[item] = _refusal(reply)
        elif sent.target is None or reply != length(sent.target):
            self.fail(item, Outcome.CORRUPT, "a segment has the wrong length or type", self._held(item))
        else:
            self.missing[item] -= 1
            if not self.missing[item]:
                self._prove(item)

    def _prove(self, item: int) -> None:
        found, transfer = self._headers[item], self.transfers[item]
        payload, compressed = head(transfer.buffers, found.info.size), self._compressed.pop(item, None)
        if fault := header.restore(found, compressed, payload, self.backend.integrity_key):
            self.fail(item, Outcome.CORRUPT, fault, self._held(item))
        else:
            self.results[item] = Result(Outcome.OK)

    def _held(self, item: int) -> list[bytes]:
        return self.backend.layout.held(self._headers[item])


class _Store(_Batch):
    def __init__(self, backend: RedisBackend, transfers: Sequence[Transfer]) -> None:
        super().__init__(backend, transfers)
        self._segments = self._sets()
        self._kept: dict[int, codec.Kept] = {}  # of items on their way
        self._segment_keys: dict[int, list[bytes]] = {}
        self._replaced: dict[int, list[bytes]] = {}  # the segments of what the items replace

    def run(self, wire: Wire) -> None:
        self.pump(wire)

    def _sets(self) -> Iterator[_Command]:
        for item, transfer in enumerate(self.transfers):
            if self.results[item] is not None:
                continue
            info = transfer.info
            payload = head(transfer.buffers, info.size)
            if header.payload_checksum(payload) != info.checksum:
                detail = "payload does not match its checksum; nothing was stored"
                self.results[item] = Result(Outcome.CORRUPT, detail=detail)
                continue
            kept = codec.keep(payload, transfer.planes, codec.scratch_for(info.size, transfer.planes))
            nbytes, segment_bytes = kept.stored or info.size, self.backend.segment_bytes
            names = self.backend.layout.segment_keys(info.key, nbytes, segment_bytes, kept.checksum)
            self._kept[item], self._segment_keys[item], self.missing[item] = kept, names, len(names)
            question = command(b"GET", self.backend.layout.header_key(info.key))
            self.headers.append(_Command(item, [question], is_header=True, is_question=True))
            if not names:
                self.headers.append(self._header(item))
            for name, run in zip(names, pieces(kept.views, nbytes, segment_bytes), strict=True):
                if self.results[item] is not None:
                    break
                start = opening(3, b"SET", name) + b"$%d\r\n" % length(run)
                yield _Command(item, [start, *run, b"\r\n"])

    def _header(self, item: int) -> _Command:
        info = self.transfers[item].info
        kept = self._kept[item]
        raw = header.pack(info, kept, self.backend.integrity_key, segment_bytes=self.backend.segment_bytes)
        return _Command(item, [command(b"SET", self.backend.layout.header_key(info.key), raw)], is_header=True)

    def next_segment(self) -> _Command | None:
        return next(self._segments, None)

    def answered(self, sent: _Command, reply: Reply) -> None:
        item = sent.item
        if self.results[item] is not None:
            return
        if sent.is_question:
            found = read_header(self.transfers[item].info.key, reply)
            if isinstance(found, header.Header):
                self._replaced[item] = self.backend.layout.held(found)
        elif isinstance(reply, ErrorReply):
            self._refused(item, _refusal(reply))
        elif reply != b"OK":
            raise ProtocolFault("SET was not answered with OK")
        elif sent.is_header:
            self.results[item] = Result(Outcome.OK, stored=self._kept.pop(item).stored)
            mine = set(self._segment_keys[item])
            self.retired += [name for name in self._replaced.get(item, ()) if name not in mine]
        else:
            self.missing[item] -= 1
            if not self.missing[item]:
                self.headers.append(self._header(item))

    def _refused(self, item: int, refusal: Result) -> None:
        """Leaves what was there before where it is whole still, and else nothing."""
        mine, before = self._segment_keys[item], self._replaced.get(item)
        del self._kept[item]
        if before is None or not set(mine).isdisjoint(before):
            self.fail(item, refusal.outcome, refusal.detail, mine)
        else:
            self.results[item] = refusal
            self.remains += [mine] if mine else []


def _presence(key: bytes, raw: Reply) -> Result:
    found = read_header(key, raw)
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
