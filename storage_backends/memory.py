# SPDX-License-Identifier: Apache-2.0
"""The reference backend: objects in a dict. Shows the contract at its shortest, and stands in for a tier in tests.

Threading: one lock around the dicts; bytes are copied and decompressed outside of it, which is safe because what was
put there is never written to again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from loracache.storage_backends import codec, header
from loracache.storage_backends.base import ObjectInfo, Outcome, Result, StorageBackend, Transfer
from loracache.storage_backends.vectors import head

__all__ = ["MemoryBackend"]


class MemoryBackend(StorageBackend):
    """Holds at most `capacity` bytes as they are kept (None: no limit); what does not fit answers FULL."""

    name = "memory"

    def __init__(self, capacity: int | None = None) -> None:
        self._capacity = capacity
        self._used = 0
        self._objects: dict[bytes, tuple[ObjectInfo, bytes]] = {}
        self._planes: dict[bytes, int] = {}  # of those that are kept compressed
        self._lock = threading.Lock()

    def contains(self, keys: Sequence[bytes]) -> list[Result]:
        with self._lock:
            held = [self._objects.get(key) for key in keys]
        return [Result(Outcome.OK, entry[0]) if entry else Result(Outcome.MISS) for entry in held]

    def load(self, transfers: Sequence[Transfer]) -> list[Result]:
        return [self._load_one(transfer) for transfer in transfers]

    def store(self, transfers: Sequence[Transfer]) -> list[Result]:
        return [self._store_one(transfer) for transfer in transfers]

    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        return [Result(Outcome.OK if self._remove(key) else Outcome.MISS) for key in keys]

    def scan(self) -> Iterator[ObjectInfo]:
        # A child enters with or after its parent and leaves before it, so the order of insertion will do.
        with self._lock:
            held = [info for info, _ in self._objects.values()]
        return iter(held)

    def close(self) -> None:
        self._objects.clear()

    def _load_one(self, transfer: Transfer) -> Result:
        if fault := header.transfer_fault(transfer):
            return Result(Outcome.FAILED, detail=fault)
        with self._lock:
            entry = self._objects.get(transfer.info.key)
            planes = self._planes.get(transfer.info.key, 0)
        if entry is None:
            return Result(Outcome.MISS)
        info, stored = entry
        found = header.Header(info)
        fault = header.header_fault(found, transfer.info)
        if not fault:
            payload = head(transfer.buffers, info.size)
            if planes:
                codec.decode(memoryview(stored), planes, payload)
            else:
                codec.scatter(stored, payload)
            fault = header.payload_fault(found, payload)
        if fault:
            self._remove(info.key)
            return Result(Outcome.CORRUPT, detail=fault)
        return Result(Outcome.OK)

    def _store_one(self, transfer: Transfer) -> Result:
        info = transfer.info
        if fault := header.transfer_fault(transfer):
            return Result(Outcome.FAILED, detail=fault)
        payload = head(transfer.buffers, info.size)
        if header.payload_checksum(payload) != info.checksum:
            return Result(Outcome.CORRUPT, detail="payload does not match its checksum")
        encoded = codec.encoded(payload, transfer.planes, codec.scratch_for(info.size, transfer.planes))
        data = b"".join(encoded.views)
        with self._lock:
            replaced = self._objects.get(info.key)
            used = self._used + len(data) - (_kept_bytes(replaced[0]) if replaced else 0)
            if self._capacity is not None and used > self._capacity:
                return Result(Outcome.FULL, detail=f"capacity is {self._capacity} bytes")
            self._used = used
            self._objects[info.key] = (header.as_stored(info, encoded.stored), data)
            self._planes.pop(info.key, None)
            if encoded.planes:
                self._planes[info.key] = encoded.planes
        return Result(Outcome.OK, stored=encoded.stored)

    def _remove(self, key: bytes) -> bool:
        with self._lock:
            entry = self._objects.pop(key, None)
            self._planes.pop(key, None)
            if entry is not None:
                self._used -= _kept_bytes(entry[0])
        return entry is not None


def _kept_bytes(info: ObjectInfo) -> int:
    return info.stored or info.size
