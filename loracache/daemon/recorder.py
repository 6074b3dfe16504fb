# SPDX-License-Identifier: Apache-2.0
"""`loracache serve --record FILE`: what a running daemon is asked, as a trace that `loracache simulate` replays.

One JSON object a line. No token ids and no names: keys, adapters, tenants and models are hashes (64 bits of BLAKE2b)
under a key that is drawn when the file is opened and never written, so that two files have nothing in common, nor has
one with the cache.

    {"loracache_trace": 1}     a daemon begins, with nothing in memory; hashes begin anew
    {"space": 0, "model": H, "adapter": H or "", "tenant": H or "", "chunk_tokens": 16}     what KV belongs to
    {"time": 0.1, "request": 0, "chunks": "HH...", "group": 1, "tokens": 512, "space": 0, "found": {"cpu": 3, ...}}
    {"time": 0.2, "store": "HH...", "below": H or "", "bytes": 65536, "space": 0}
    {"time": 0.3, "adapter": H, "bytes": 5242880, "found": "disk"}

A request is recorded once, however often its engine asks (a lease is a request); one that is asked in parts has lines
with one number. `group` chunks (shards) make one, which has `chunk_tokens` tokens. Of a request of which nothing was
held, neither `tokens` nor `space` are known: those of the store that follows are. `bytes` are what each object takes in
memory.

Threading: the event loop hands over what it has anyway; hashes, lines and the file are one thread's. The file is at
most `most_bytes` long, and what waits at most `_MOST_WAITING` bytes. A file that cannot be written ends the recording
and nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loracache.errors import ConfigError
from loracache.folder import open_file
from loracache.keys import KEY_BYTES, Namespace
from loracache.tiers import Tier

__all__ = ["MOST_BYTES", "Recorder"]

_log = logging.getLogger(__name__)
MOST_BYTES = 1 << 30
_MOST_WAITING = 32 << 20  # bytes of keys that the thread has not written yet
_MOST_LEASES = 65_536  # requests that are remembered, so that they are recorded once
_HASHES = 64  # between two looks whether the event loop wants to run
_WRITE_BYTES, _WRITE_S = 1 << 16, 1.0
_END_S = 1.0
_MAY_PASS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}


@dataclass(frozen=True, slots=True)
class _Asked:
    """A lookup: its owner and lease, keys, what was found of them, tier by tier, and what they belong to, if known."""

    time: float
    owner: int
    lease: bytes
    keys: bytes
    group: int
    tiers: Sequence[int]
    space: Namespace | None


@dataclass(frozen=True, slots=True)
class _Stored:
    """A reservation."""

    time: float
    space: Namespace
    keys: bytes
    parents: bytes
    sizes: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An adapter that an engine got, and the tier that had it when it asked."""

    time: float
    keys: bytes
    size: int
    tier: Tier | None


_Entry = _Asked | _Stored | _Loaded


@dataclass(slots=True)
class _Request:
    """A request that was recorded: the first keys of its parts, and whether all that was asked so far was found."""

    number: int
    parts: set[bytes] = field(default_factory=set)
    whole: bool = False


class Recorder:
    """Appends to the file at `path` (made with mode 0600). page: of the arena. count(name) counts on the event loop; it
    is called from the thread. Raises ConfigError for a file that cannot be one, BlockingIOError where another daemon
    writes it, and OSError where the disk is full, or takes nothing."""

    def __init__(self, path: Path, page: int, count: Callable[[str], None], most_bytes: int = MOST_BYTES) -> None:
        self.on = True
        self._path = path
        self._page = page
        self._count = count
        self._most_bytes = most_bytes
        self._descriptor = _open(path)
        self._size = os.fstat(self._descriptor).st_size
        self._began = time.monotonic()
        self._key = os.urandom(32)
        self._given = self._taken = 0  # bytes, by the event loop and by the thread
        self._requests: OrderedDict[tuple[int, bytes], _Request] = OrderedDict()
        self._numbers = 0
        self._spaces: dict[Namespace, int] = {}
        self._entries: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    # -- the event loop's ----------

    def asked(
        self, owner: int, lease: bytes, keys: bytes, group: int, tiers: Sequence[int], space: Namespace | None
    ) -> None:
        """A lookup was answered."""
        self._give(_Asked(self._now(), owner, lease, keys, group, tiers, space))

    def stored(self, space: Namespace, keys: bytes, parents: bytes, sizes: Sequence[int]) -> None:
        """Room was asked for new objects."""
        self._give(_Stored(self._now(), space, keys, parents, sizes))

    def loaded(self, adapter: bytes, size: int, tier: Tier | None) -> None:
        """An engine got an adapter; tier: where it was when it asked."""
        self._give(_Loaded(self._now(), adapter, size, tier))

    def close(self) -> None:
        """The last call: what was recorded is written, as far as that takes no longer than a second."""
        self._entries.put(None)
        self._thread.join(_END_S)

    def _now(self) -> float:
        return round(time.monotonic() - self._began, 4)

    def _give(self, entry: _Entry) -> None:
        if not self.on:
            return
        if self._given - self._taken > _MOST_WAITING:
            self._count("record.dropped")
            return
        self._given += len(entry.keys)
        self._entries.put(entry)

    # -- the thread's ----------

    def _run(self) -> None:
        try:
            self._record()
        except OSError as error:
            self._ended("record.failed", f"it cannot be written: {error.strerror}")
        except Exception:  # noqa: BLE001 - top of the thread: a trace that ends is no reason for anything else to
            _log.exception("the recording of a trace failed")
            self._ended("record.failed", "of a fault of ours")
        os.close(self._descriptor)

    def _record(self) -> None:
        lines = bytearray(b'{"loracache_trace": 1}\n')
        written = time.monotonic()
        while True:
            try:
                entry = self._entries.get(timeout=_WRITE_S if lines else None)
            except queue.Empty:
                entry = None
            else:
                if entry is None:
                    self._write(lines)
                    return
                self._taken += len(entry.keys)
                for line in self._lines(entry):
                    lines += json.dumps(line).encode() + b"\n"
            if len(lines) >= _WRITE_BYTES or time.monotonic() - written >= _WRITE_S:
                if not self._write(lines):
                    return
                lines.clear()
                written = time.monotonic()

    def _write(self, lines: bytearray) -> bool:
        """Append whole lines; False where the file is as long as it may be."""
        if self._size + len(lines) > self._most_bytes:
            self._ended("record.full", f"it has {self._size} bytes, of {self._most_bytes} that it may have")
            return False
        view = memoryview(bytes(lines))
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(lines)
        return True

    def _ended(self, counter: str, why: str) -> None:
        self.on = False
        _log.warning("nothing is recorded to %s any more: %s", self._path, why)
        self._count(counter)

    def _lines(self, entry: _Entry) -> list[dict[str, Any]]:
        match entry:
            case _Asked():
                return self._asked(entry)
            case _Stored():
                return self._stored(entry)
            case _Loaded():
                tier = entry.tier.label if entry.tier is not None else ""
                name = self._hashes(entry.keys)
                return [{"time": entry.time, "adapter": name, "bytes": self._room(entry.size), "found": tier}]

    def _asked(self, entry: _Asked) -> list[dict[str, Any]]:
        if not entry.keys:
            return []
        number = self._number(entry)
        if number is None:
            return []
        line: dict[str, Any] = {"time": entry.time, "request": number, "chunks": self._hashes(entry.keys)}
        line["group"] = entry.group
        lines: list[dict[str, Any]] = []
        if entry.space is not None:
            line["tokens"] = len(entry.keys) // KEY_BYTES * entry.space.chunk_tokens // entry.group
            line["space"] = self._space(entry.space, lines)
        found = {tier.label: entry.tiers.count(tier) for tier in (Tier.CPU, Tier.DISK, Tier.REDIS)}
        line["found"] = {tier: count for tier, count in found.items() if count}
        return [*lines, line]

    def _number(self, entry: _Asked) -> int | None:
        """Of the request that the lookup is, or is the next part of; None where it was recorded before."""
        whole = len(entry.tiers) * KEY_BYTES == len(entry.keys)
        first = entry.keys[:KEY_BYTES]
        request = self._requests.get((entry.owner, entry.lease)) if entry.lease else None
        if request is not None and first in request.parts:
            return None
        if request is None or not request.whole:
            request = _Request(self._numbers)
            self._numbers += 1
        if entry.lease:
            self._requests[entry.owner, entry.lease] = request
            if len(self._requests) > _MOST_LEASES:
                self._requests.popitem(last=False)
        request.parts.add(first)
        request.whole = whole
        return request.number

    def _stored(self, entry: _Stored) -> list[dict[str, Any]]:
        """A line for each run of objects of one size, each the next one's parent."""
        lines: list[dict[str, Any]] = []
        space = self._space(entry.space, lines)
        begin = 0
        for position, size in enumerate(entry.sizes):
            end = position + 1
            goes_on = end < len(entry.sizes) and entry.sizes[end] == size
            if goes_on and _key(entry.parents, end) == _key(entry.keys, position):
                continue
            keys, parent = entry.keys[begin * KEY_BYTES : end * KEY_BYTES], _key(entry.parents, begin)
            below = self._hashes(parent) if any(parent) else ""
            line = {"time": entry.time, "store": self._hashes(keys), "below": below, "bytes": self._room(size)}
            lines.append(line | {"space": space})
            begin = end
        return lines

    def _space(self, space: Namespace, lines: list[dict[str, Any]]) -> int:
        """Its number; a line that says what it is, where it was not said yet."""
        number = self._spaces.get(space)
        if number is None:
            number = self._spaces[space] = len(self._spaces)
            adapter = self._hashes(bytes.fromhex(space.adapter))  # as the adapter's own key
            named = {"model": self._hash(space.model.encode()), "adapter": adapter, "tenant": ""}
            if space.salt:
                named["tenant"] = self._hash(bytes.fromhex(space.salt))
            lines.append({"space": number} | named | {"chunk_tokens": space.chunk_tokens})
        return number

    def _hashes(self, keys: bytes) -> str:
        """16 hexadecimal digits a key. In between the event loop may run, which a thread that computes holds up."""
        found = []
        for count, at in enumerate(range(0, len(keys), KEY_BYTES), start=1):
            found.append(self._hash(keys[at : at + KEY_BYTES]))
            if not count % _HASHES:
                time.sleep(0)
        return "".join(found)

    def _hash(self, data: bytes) -> str:
        return hashlib.blake2b(data, key=self._key, digest_size=8).hexdigest()

    def _room(self, size: int) -> int:
        return -(-size // self._page) * self._page


def _key(keys: bytes, position: int) -> bytes:
    return keys[position * KEY_BYTES : (position + 1) * KEY_BYTES]


def _open(path: Path) -> int:
    """The file, for this daemon alone. Raises as `Recorder`."""
    fix = "give another file, or remove this one"
    try:
        descriptor = open_file(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    except OSError as error:
        if error.errno in _MAY_PASS:
            raise
        raise ConfigError(f"record={str(path)!r} cannot be written: {error.strerror}; give another file") from None
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise ConfigError(f"record={str(path)!r} is there already, and others may read it; {fix}")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if found.st_size and os.pread(descriptor, 1, found.st_size - 1) != b"\n":  # of a daemon that was killed
            os.write(descriptor, b"\n")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
