# SPDX-License-Identifier: Apache-2.0
"""Loads and stores of the Redis tier: the commands that many objects take on one connection, and their answers.

Threading: a batch belongs to the call that made it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loracache.storage_backends import codec, header
from loracache.storage_backends.base import Outcome, Result, Transfer
from loracache.storage_backends.redis.commands import RETIRED_S, ObjectCommands
from loracache.storage_backends.redis.layout import LARGEST_WHOLE, NotOurs, read_header
from loracache.storage_backends.redis.resp import ErrorReply, ProtocolFault, Reply, Wire
from loracache.storage_backends.vectors import head, length, pieces

__all__ = ["LoadCall", "StoreCall", "refusal"]

WINDOW = 2  # commands in flight: with one, Redis waits for us and we for Redis; more gain nothing
_LOST = {"MOVED", "ASK", "CLUSTERDOWN", "TRYAGAIN", "LOADING", "READONLY", "MASTERDOWN", "NOAUTH", "NOREPLICAS"}


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

    def __init__(self, objects: ObjectCommands, transfers: Sequence[Transfer]) -> None:
        self.objects = objects
        self.transfers = transfers
        self.results: list[Result | None] = [None] * len(transfers)
        self.missing = [0] * len(transfers)  # segments of each item that are not through yet
        self.headers: deque[_Command] = deque()  # ready to be sent
        self.remains: list[list[bytes]] = []  # what to unlink when all answers are in
        self.retired: list[bytes] = []  # segments to let expire then
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
        self.objects.unlink(wire, self.remains)
        self.objects.retire(wire, self.retired)

    def _upcoming(self) -> list[_Command]:
        segment = self.next_segment()
        upcoming = [*self.headers, *([segment] if segment is not None else ())]
        self.headers.clear()
        return upcoming

    def fail(self, item: int, outcome: Outcome, detail: str, segments: Sequence[bytes]) -> None:
        """Gives an item up and has what Redis holds of it removed."""
        self.results[item] = Result(outcome, detail=detail)
        self.remains.append([self.objects.layout.header_key(self.transfers[item].info.key), *segments])


class LoadCall(_Batch):
    """Reads objects: all headers at once, then their segments."""

    def __init__(self, objects: ObjectCommands, transfers: Sequence[Transfer]) -> None:
        super().__init__(objects, transfers)
        self._headers: dict[int, header.Header] = {}
        self._compressed: dict[int, memoryview] = {}  # of items on their way
        self._commands: Iterator[_Command] = iter(())

    def run(self, wire: Wire) -> None:
        self._commands = self._gets(self.objects.ask(wire, [transfer.info.key for transfer in self.transfers]))
        self.pump(wire)

    def _gets(self, raw_headers: Sequence[Reply]) -> Iterator[_Command]:
        """Headers are read one by one, while the segments of the objects before are on their way."""
        for item, (transfer, raw) in enumerate(zip(self.transfers, raw_headers, strict=True)):
            if self.results[item] is not None or (found := self._take_header(item, raw)) is None:
                continue
            stored, target = found.info.stored, transfer.buffers
            if not found.segment_bytes:
                self._take_whole(item, memoryview(raw if isinstance(raw, bytes) else b"")[header.HEADER_BYTES :])
                continue
            if stored:
                target = [self._compressed.setdefault(item, memoryview(bytearray(stored)))]
            runs = list(pieces(target, stored or found.info.size, found.segment_bytes))
            self.missing[item] = len(runs)
            if not runs:
                self._prove(item)
            for segment, run in zip(self.objects.layout.held(found), runs, strict=True):
                if self.results[item] is not None:
                    break
                yield _Command(item, [self.objects.get(segment, RETIRED_S)], run)

    def _take_header(self, item: int, raw: Reply) -> header.Header | None:
        """The item's header where it is as expected; else the item has its result."""
        info = self.transfers[item].info
        if isinstance(raw, ErrorReply):
            self.results[item] = refusal(raw)
            return None
        found = read_header(info.key, raw, self.objects.integrity_key)
        if found is None:
            self.results[item] = Result(Outcome.MISS)
        elif isinstance(found, NotOurs):
            self.results[item] = Result(Outcome.UNPROVEN, detail=found.detail)
        elif isinstance(found, str):
            supposed = self.objects.layout.segment_keys(info.key, info.size, self.objects.segment_bytes)
            self.fail(item, Outcome.CORRUPT, found, supposed)
        elif fault := header.header_fault(found, info):
            self.fail(item, Outcome.CORRUPT, fault, self.objects.layout.held(found))
        else:
            self._headers[item] = found
            return found
        return None

    def _take_whole(self, item: int, kept: memoryview) -> None:
        """What stood behind the header."""
        info = self._headers[item].info
        if kept.nbytes != (info.stored or info.size):
            self.fail(item, Outcome.CORRUPT, f"{kept.nbytes} bytes stand behind the header", [])
            return
        if info.stored:
            self._compressed[item] = kept
        else:
            codec.scatter(kept, head(self.transfers[item].buffers, info.size))
        self._prove(item)

    def next_segment(self) -> _Command | None:
        return next(self._commands, None)

    def answered(self, sent: _Command, reply: Reply) -> None:
        item = sent.item
        if self.results[item] is not None:
            return
        if reply is None:
            self.fail(item, Outcome.MISS, "a segment is missing", self._held(item))
        elif isinstance(reply, ErrorReply) and reply.code != "WRONGTYPE":
            self.results[item] = refusal(reply)
        elif sent.target is None or reply != length(sent.target):
            self.fail(item, Outcome.CORRUPT, "a segment has the wrong length or type", self._held(item))
        else:
            self.missing[item] -= 1
            if not self.missing[item]:
                self._prove(item)

    def _prove(self, item: int) -> None:
        found, transfer = self._headers[item], self.transfers[item]
        payload, compressed = head(transfer.buffers, found.info.size), self._compressed.pop(item, None)
        fault = header.restore(found, compressed, payload, self.objects.integrity_key)
        if not fault:
            self.results[item] = Result(Outcome.OK)
        elif header.is_unproven(found, compressed, payload, self.objects.integrity_key):
            self.results[item] = Result(Outcome.UNPROVEN, detail=fault)
        else:
            self.fail(item, Outcome.CORRUPT, fault, self._held(item))

    def _held(self, item: int) -> list[bytes]:
        return self.objects.layout.held(self._headers[item])


class StoreCall(_Batch):
    """Writes objects: of each the segments, then the header, and which it replaces is asked before."""

    def __init__(self, objects: ObjectCommands, transfers: Sequence[Transfer]) -> None:
        super().__init__(objects, transfers)
        self._segments = self._sets()
        self._encoded: dict[int, codec.Encoded] = {}  # of items on their way
        self._segment_keys: dict[int, list[bytes]] = {}
        self._replaced: dict[int, list[bytes]] = {}  # the segments of what the items replace
        self._others: set[int] = set()  # items that replace what another release wrote: its segments are not known

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
            encoded = codec.encoded(payload, transfer.planes, codec.scratch_for(info.size, transfer.planes))
            nbytes, segment_bytes = encoded.stored or info.size, self.objects.segment_bytes
            whole = info.size <= min(LARGEST_WHOLE, segment_bytes)
            names = [] if whole else self.objects.layout.segment_keys(info.key, nbytes, segment_bytes, encoded.checksum)
            self._encoded[item], self._segment_keys[item], self.missing[item] = encoded, names, len(names)
            question = self.objects.question(info.key)
            self.headers.append(_Command(item, [question], is_header=True, is_question=True))
            if whole:
                yield self._header(item, encoded.views)
                continue
            for name, run in zip(names, pieces(encoded.views, nbytes, segment_bytes), strict=True):
                if self.results[item] is not None:
                    break
                yield _Command(item, self.objects.set(name, run, RETIRED_S))

    def _header(self, item: int, behind: Sequence[memoryview] = ()) -> _Command:
        """Sets the header, and what stands behind it of an object without segments."""
        info = self.transfers[item].info
        segment_bytes = self.objects.segment_bytes if self._segment_keys[item] else 0
        raw = header.pack(info, self._encoded[item], self.objects.integrity_key, segment_bytes=segment_bytes)
        name = self.objects.layout.header_key(info.key)
        return _Command(item, self.objects.set(name, [raw, *behind]), is_header=True)

    def next_segment(self) -> _Command | None:
        return next(self._segments, None)

    def answered(self, sent: _Command, reply: Reply) -> None:
        item = sent.item
        if self.results[item] is not None:
            return
        if sent.is_question:
            found = read_header(self.transfers[item].info.key, reply)
            if isinstance(found, header.Header):
                self._replaced[item] = self.objects.layout.held(found)
            elif isinstance(found, NotOurs):
                self._others.add(item)
        elif isinstance(reply, ErrorReply):
            self._refused(item, refusal(reply))
        elif reply != b"OK":
            raise ProtocolFault("SET was not answered with OK")
        elif sent.is_header:
            self.results[item] = Result(Outcome.OK, stored=self._encoded.pop(item).stored)
            mine = set(self._segment_keys[item])
            self.retired += [name for name in self._replaced.get(item, ()) if name not in mine]
        else:
            self.missing[item] -= 1
            if not self.missing[item]:
                self.headers.append(self._header(item))

    def _refused(self, item: int, result: Result) -> None:
        """Leaves what was there before where it is whole still, and else nothing."""
        mine, before = self._segment_keys[item], self._replaced.get(item)
        del self._encoded[item]
        self.results[item] = result
        overwritten = self.missing[item] < len(mine)
        if before is not None and set(mine).isdisjoint(before):
            self.remains += [mine] if mine else []
        elif overwritten or (before is None and item not in self._others):
            self.fail(item, result.outcome, result.detail, mine)


def refusal(reply: ErrorReply) -> Result:
    """What an error reply means for its item."""
    if reply.code == "OOM":
        return Result(Outcome.FULL, detail=reply.text)
    return Result(Outcome.UNAVAILABLE if reply.code in _LOST else Outcome.FAILED, detail=reply.text)
