"""The reference backend: objects in a dict. Shows the contract at its shortest, and stands in for a tier in tests.

Threading: one lock around the dict; payloads are copied outside of it, which is safe because stored bytes never change.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from loracache.storage_backends import header
from loracache.storage_backends.base import ObjectInfo, Outcome, Result, StorageBackend, Transfer
from loracache.storage_backends.vectors import head


class MemoryBackend(StorageBackend):
    """Holds at most `capacity` payload bytes (None: no limit); what does not fit answers FULL."""

    name = "memory"

    def __init__(self, capacity: int | None = None) -> None:
        self._capacity = capacity
        self._used = 0
        self._objects: dict[bytes, tuple[ObjectInfo, bytes]] = {}
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
        if entry is None:
            return Result(Outcome.MISS)
        info, stored = entry
        payload = memoryview(stored)
        found = header.Header(info, 0, header.NO_MAC)
        fault = header.header_fault(found, transfer.info) or header.payload_fault(found, [payload], None)
        if fault:
            self._remove(info.key)
            return Result(Outcome.CORRUPT, detail=fault)
        for view in head(transfer.buffers, info.size):
            view[:] = payload[: view.nbytes]
            payload = payload[view.nbytes :]
        return Result(Outcome.OK)

    def _store_one(self, transfer: Transfer) -> Result:
        info = transfer.info
        if fault := header.transfer_fault(transfer):
            return Result(Outcome.FAILED, detail=fault)
        payload = b"".join(head(transfer.buffers, info.size))
        if header.payload_checksum([memoryview(payload)]) != info.checksum:
            return Result(Outcome.CORRUPT, detail="payload does not match its checksum")
        with self._lock:
            replaced = self._objects.get(info.key)
            used = self._used + info.size - (replaced[0].size if replaced else 0)
            if self._capacity is not None and used > self._capacity:
                return Result(Outcome.FULL, detail=f"capacity is {self._capacity} bytes")
            self._used = used
            self._objects[info.key] = (info, payload)
        return Result(Outcome.OK)

    def _remove(self, key: bytes) -> bool:
        with self._lock:
            entry = self._objects.pop(key, None)
            if entry is not None:
                self._used -= entry[0].size
        return entry is not None
