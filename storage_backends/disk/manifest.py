# SPDX-License-Identifier: Apache-2.0
"""The disk tier's manifest: an append-only list of what was added and deleted, so that a start reads no headers.

It is an accelerator and never the truth: the files are. A record that is missing, torn or damaged costs a start the
time to look at the files concerned, and nothing else; so a failed append is retried with the next one and fails nobody.
Records have a fixed size and a CRC of their own. Threading: none here, the caller holds its lock around every call.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loracache.folder import sync_folder
from loracache.storage_backends.base import Kind, ObjectInfo

__all__ = ["RECORD_BYTES", "Manifest", "Records", "parents_first", "records_of"]

_log = logging.getLogger(__name__)

_MAGIC = b"LoRACach manifest v2\n".ljust(32, b"\0")
_MAGIC_1 = b"LoRACach manifest v1\n".ljust(32, b"\0")
# operation, kind, has a parent, unused, size, checksum, stored, key, parent, namespace; a CRC of all that follows
_FIELDS = struct.Struct("<BBBBQQQ32s32s32s")
_FIELDS_1 = struct.Struct("<BBBBQQ32s32s32s")  # knew no compression
_CRC = struct.Struct("<I")
RECORD_BYTES = _FIELDS.size + _CRC.size
_ADD, _DELETE = 1, 2
_SHORT_BYTES = 1 << 20
_COMPACT_AT_LEAST = 1024  # a manifest of fewer records is not worth a rewrite


@dataclass(frozen=True, slots=True)
class Records:
    """What a manifest's bytes say. version: 0 where they are none. held: in the order of adding. count: whole records,
    `damaged` among them, whose CRC is wrong. torn: bytes behind the last whole one."""

    version: int
    held: dict[bytes, ObjectInfo]
    count: int = 0
    damaged: int = 0
    torn: int = 0


class Manifest:
    """One open manifest file. After `read`, `add` and `delete` queue records and `flush` appends them in one write."""

    def __init__(self, path: Path, *, sync: bool) -> None:
        self._path = path
        self._sync = sync
        self._queue: list[bytes] = []
        self._records = 0
        self._compact_from = _COMPACT_AT_LEAST
        self._fd = -1

    def read(self) -> dict[bytes, ObjectInfo]:
        """What the manifest says is held, in the order of adding; opens it for appending.

        A file that is missing, cannot be read or is not a manifest counts as empty and is replaced. One of version
        1 is read and replaced; on a full disk or one that takes no writes that waits, as what is added does, for a
        later `compact`.
        """
        try:
            raw = self._path.read_bytes()
        except FileNotFoundError:
            raw = b""
        except OSError as error:
            _log.warning("%s cannot be read (%s): the files are looked at instead", self._path, error.strerror)
            raw = b""
        records = records_of(raw)
        live = records.held
        if records.version != 2:
            with contextlib.suppress(OSError):
                self.compact(live)
            return live
        self._records = whole = records.count
        with contextlib.suppress(OSError):  # a disk that is full, or read only, is no reason not to start
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)
            try:
                # A torn record at the end would put all later ones out of step.
                os.ftruncate(fd, len(_MAGIC) + whole * RECORD_BYTES)
            except OSError:
                os.close(fd)
                raise
            self._fd = fd
            if self.wasteful(len(live)):
                self.compact(live)
        return live

    def is_short(self) -> bool:
        """Whether reading it takes no time worth putting off."""
        try:
            return self._path.stat().st_size < _SHORT_BYTES
        except OSError:
            return True

    def add(self, info: ObjectInfo) -> None:
        """Queues the record that `info` is held."""
        self._queue.append(_pack(_ADD, info))

    def delete(self, info: ObjectInfo) -> None:
        """Queues the record that `info` is held no more."""
        self._queue.append(_pack(_DELETE, info))

    def flush(self) -> None:
        """Appends what is queued in one write. Raises OSError; then everything stays queued."""
        if not self._queue:
            return
        end = len(_MAGIC) + self._records * RECORD_BYTES
        block = b"".join(self._queue)
        try:
            if os.write(self._fd, block) != len(block):
                raise OSError(f"short write to {self._path}")
            if self._sync:
                os.fdatasync(self._fd)
        except OSError:
            os.ftruncate(self._fd, end)
            raise
        self._records += len(self._queue)
        self._queue.clear()

    def wasteful(self, live: int) -> bool:
        """Whether more than half of the records are dead, and enough of them for a rewrite to pay; or whether something
        is queued and there is no manifest to append it to."""
        if self._fd < 0:
            return bool(self._queue)
        return self._records >= self._compact_from and self._records > 2 * live

    def compact(self, live: Mapping[bytes, ObjectInfo]) -> None:
        """Replaces the manifest by one that holds `live` alone. Raises OSError; then the old one stays."""
        self._compact_from = 2 * self._records  # should this fail, not again before it is worth twice as much
        fresh = self._path.with_suffix(".new")
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        try:
            block = _MAGIC + b"".join(_pack(_ADD, info) for info in live.values())
            if os.write(fd, block) != len(block):
                raise OSError(f"short write to {fresh}")
            if self._sync:
                os.fdatasync(fd)
            os.rename(fresh, self._path)
        except OSError:
            os.close(fd)
            fresh.unlink(missing_ok=True)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._records = len(live)
        self._compact_from = _COMPACT_AT_LEAST
        self._queue.clear()
        if self._sync:
            sync_folder(self._path.parent)

    def close(self) -> None:
        """Appends what is queued, where that still works, and closes the file."""
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            self.flush()
        os.close(self._fd)
        self._fd = -1


def parents_first(objects: Mapping[bytes, ObjectInfo]) -> tuple[list[ObjectInfo], list[ObjectInfo]]:
    """(rooted, hanging): objects whose whole chain is in `objects`, and the rest; in both, parents before children."""
    rooted_by_key: dict[bytes, bool] = {}
    rooted: list[ObjectInfo] = []
    hanging: list[ObjectInfo] = []
    for info in objects.values():
        chain: list[ObjectInfo] = []
        above: ObjectInfo | None = info
        while above is not None and above.key not in rooted_by_key:
            rooted_by_key[above.key] = False  # also ends the walk around a ring of parents, which only damage can make
            chain.append(above)
            above = objects.get(above.parent)
        for link in reversed(chain):
            is_rooted = not link.parent or rooted_by_key.get(link.parent, False)
            rooted_by_key[link.key] = is_rooted
            (rooted if is_rooted else hanging).append(link)
    return rooted, hanging


def records_of(raw: bytes) -> Records:
    """The records in a manifest's bytes; none where they are not a manifest."""
    for version, magic, layout in ((2, _MAGIC, _FIELDS), (1, _MAGIC_1, _FIELDS_1)):
        if raw.startswith(magic):
            count, torn = divmod(len(raw) - len(magic), layout.size + _CRC.size)
            held, damaged = _replay(memoryview(raw)[len(magic) :], layout)
            return Records(version, held, count, damaged, torn)
    return Records(0, {})


def _pack(operation: int, info: ObjectInfo) -> bytes:
    body = _FIELDS.pack(
        operation,
        info.kind,
        bool(info.parent),
        0,
        info.size,
        info.checksum,
        info.stored,
        info.key,
        info.parent,
        info.namespace,
    )
    return body + _CRC.pack(zlib.crc32(body))


def _replay(records: memoryview, layout: struct.Struct) -> tuple[dict[bytes, ObjectInfo], int]:
    """What is held after all whole records, and how many of them are damaged. `layout` packs a record's fields,
    `stored` among them or not."""
    live: dict[bytes, ObjectInfo] = {}
    damaged = 0
    shared: dict[bytes, bytes] = {}  # one bytes object per parent and namespace instead of one per record
    kinds = {int(kind): kind for kind in Kind}
    crc32, body, record_bytes = zlib.crc32, layout.size, layout.size + _CRC.size
    whole = len(records) // record_bytes * record_bytes
    starts: Iterable[int] = range(0, whole, record_bytes)
    fields = struct.Struct(layout.format + "I").iter_unpack(records[:whole])
    for start, (operation, kind, has_parent, _, size, checksum, *stored, key, parent, namespace, crc) in zip(
        starts, fields, strict=True
    ):
        if crc32(records[start : start + body]) != crc or kind not in kinds:
            damaged += 1  # the sweep of the files finds what this record would have told
            continue
        if operation == _DELETE:
            live.pop(key, None)
            continue
        live[key] = ObjectInfo(
            shared.setdefault(key, key),
            shared.setdefault(parent, parent) if has_parent else b"",
            kinds[kind],
            shared.setdefault(namespace, namespace),
            size,
            checksum,
            *stored,
        )
    return live, damaged
