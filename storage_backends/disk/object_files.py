# SPDX-License-Identifier: Apache-2.0
"""The disk tier's files: where an object's file lies, how it is written, read and looked at. No index, no outcomes.

A file is a page of 4096 bytes with the header, then the bytes as they are kept, padded to 4096. It is written in `tmp/`
under a name of its own and never changes once it stands in `objects/`. A plain payload moves in one system call with
its header, straight from and to the caller's buffers; a compressed one goes through memory of the thread.

Threading: any number of threads; each has its own page for headers and its own scratch.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import mmap
import os
import string
import threading
from collections.abc import Iterator
from pathlib import Path

from loracache.folder import open_file, own_folder, sync_folder
from loracache.storage_backends import codec, header
from loracache.storage_backends.base import ALIGNMENT, KEY_BYTES, ObjectInfo, Transfer, padded
from loracache.storage_backends.vectors import head, length, move

__all__ = ["FULL", "UNWRITABLE", "NotOurs", "ObjectFiles", "footprint", "object_file"]

_log = logging.getLogger(__name__)

FULL = {errno.ENOSPC, errno.EDQUOT}
UNWRITABLE = FULL | {errno.EROFS}
_NO_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP}
_HEX = frozenset(string.hexdigits.lower())
# Scratch that a thread keeps, as far as it was ever touched: chunks of KV fit, and larger objects take it for one call.
_KEPT_SCRATCH = 8 << 20


def object_file(objects: Path, key: bytes) -> Path:
    """Where an object lies below the folder `objects`."""
    name = key.hex()
    return objects / name[:2] / name


def footprint(size: int) -> int:
    """Bytes of a file whose object takes `size` bytes as it is kept."""
    return ALIGNMENT + padded(size)


def _is_of_another_version(error: header.HeaderError, page: memoryview) -> bool:
    return isinstance(error, header.OtherVersion) and not header.is_of_damaged_version(page)


class NotOurs(Exception):
    """A file of another version, or whole under another integrity_key."""


class ObjectFiles:
    """The files below `path`. Every method raises OSError for what the device does."""

    def __init__(self, path: Path, *, sync: bool, integrity_key: bytes | None) -> None:
        self._objects = path / "objects"
        self._tmp = path / "tmp"
        self._sync = sync
        self._integrity_key = integrity_key
        self._scratch = threading.local()
        self._serial = itertools.count()
        self.direct = False
        self._flags = os.O_CLOEXEC

    def open(self) -> str:
        """Makes the folders, removes what a crash left unfinished, and sees whether the file system takes O_DIRECT. In
        words why nothing can be written, empty where it can: what is there is read all the same. While it could not, no
        file is being written, and this may be called again.
        """
        try:
            own_folder(self._tmp)
            own_folder(self._objects)
            for number in range(256):
                own_folder(self._objects / f"{number:02x}")
            for leftover in os.scandir(self._tmp):
                os.unlink(leftover.path)
            if self._sync:
                for folder in (self._objects, self._objects.parent):
                    sync_folder(folder)
            self.direct = self._takes_direct()
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            return os.strerror(error.errno)
        self._flags = os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0)
        return ""

    def file(self, key: bytes) -> Path:
        """Where an object lies."""
        return object_file(self._objects, key)

    def read(self, transfer: Transfer, stored: int) -> str:
        """Fills the transfer's buffers; in words what is wrong with the file, empty where nothing is. Raises NotOurs.

        stored: how the object is thought to be kept. Where the header says otherwise, the same file is read again: it
        stays open, so that this time its header says the same, whatever replaces it meanwhile.
        """
        info = transfer.info
        page = self._header_page()
        stored = stored if 0 < stored < info.size else 0
        fd = os.open(self.file(info.key), os.O_RDONLY | os.O_NOFOLLOW | self._flags)
        try:
            for _ in range(2):
                body = [self._body(padded(stored))] if stored else transfer.buffers
                moved = move(os.preadv, fd, [page, *body])
                found = header.unpack(page[: min(moved, ALIGNMENT)])
                if fault := header.header_fault(found, info):
                    return fault
                if found.info.stored == stored:
                    break
                stored = found.info.stored
            else:
                return "the header changes while it is read"
        except header.HeaderError as error:
            if _is_of_another_version(error, page):
                raise NotOurs(str(error)) from None
            return str(error)
        finally:
            os.close(fd)
        if moved < footprint(stored or info.size):
            return f"file ends after {moved} bytes"
        compressed, payload = body[0][:stored] if stored else None, head(transfer.buffers, info.size)
        fault = header.restore(found, compressed, payload, self._integrity_key)
        if fault and header.is_unproven(found, compressed, payload, self._integrity_key):
            raise NotOurs(fault)
        return fault

    def write(self, transfer: Transfer) -> tuple[Path, int]:
        """Writes an object to a file of its own in `tmp/`; returns that and ObjectInfo.stored. Leaves nothing where it
        raises."""
        info = transfer.info
        # Compressed, it has to save a page at least: files have whole pages.
        scratch = self._body(max(padded(info.size) - ALIGNMENT, 0) if transfer.planes else 0)
        encoded = codec.encoded(head(transfer.buffers, info.size), transfer.planes, scratch)
        body = transfer.buffers
        if encoded.stored:
            body = [scratch[: padded(encoded.stored)]]
            body[0][encoded.stored :] = bytes(body[0].nbytes - encoded.stored)  # the object before it in this scratch
        page = self._header_page()
        page[:] = header.pack(info, encoded, self._integrity_key).ljust(ALIGNMENT, b"\0")
        fresh = self._tmp / str(next(self._serial))
        try:
            self._write(fresh, [page, *body])
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise
        return fresh, encoded.stored

    def publish(self, fresh: Path, key: bytes) -> None:
        """Puts a written file in the object's place, in one step; removes it where that fails."""
        try:
            os.rename(fresh, self.file(key))
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise

    def inspect(self, key: bytes) -> ObjectInfo | None:
        """What a file's header says it holds; None where file, header or size are not as they should be. Raises
        NotOurs, also where there is an integrity_key, and the header has no MAC at all.
        """
        page = self._header_page()
        try:
            fd = os.open(self.file(key), os.O_RDONLY | os.O_NOFOLLOW | self._flags)
        except FileNotFoundError:
            return None
        try:
            moved = os.preadv(fd, [page], 0)
            size = os.fstat(fd).st_size
        finally:
            os.close(fd)
        try:
            found = header.unpack(page[:moved])
        except header.HeaderError as error:
            if _is_of_another_version(error, page[:moved]):
                raise NotOurs(str(error)) from None
            return None
        info = found.info
        if self._integrity_key is not None and found.mac == header.NO_MAC:
            raise NotOurs("it has no MAC, and there is an integrity_key")
        return info if info.key == key and size == footprint(info.stored or info.size) else None

    def listing(self, number: int) -> Iterator[tuple[bytes, int]]:
        """Key and size of every object file in a folder; other files are none of ours and stay untouched."""
        folder = f"{number:02x}"
        try:
            with os.scandir(self._objects / folder) as entries:
                for entry in entries:
                    name = entry.name
                    if len(name) != 2 * KEY_BYTES or not name.startswith(folder) or not _HEX.issuperset(name):
                        continue
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                        yield bytes.fromhex(name), entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:  # of a folder that could not be written when it was made
            return
        except OSError as error:
            _log.warning("%s not listed: %s", self._objects / folder, error)

    def _write(self, path: Path, views: list[memoryview]) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | self._flags, 0o600)
        try:
            if move(os.pwritev, fd, views) < length(views):
                raise OSError(errno.ENOSPC, "short write")
            if self._sync:
                os.fdatasync(fd)
        finally:
            os.close(fd)  # network file systems report a full device here at the latest

    def _takes_direct(self) -> bool:
        probe = self._tmp / "probe"
        try:
            fd = open_file(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
            try:
                os.pwritev(fd, [self._header_page()], 0)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno in _NO_DIRECT:
                _log.warning("%s takes no O_DIRECT: disk I/O goes through the page cache", self._objects.parent)
                return False
            if error.errno not in FULL:  # a full disk still serves what it holds
                raise
        finally:
            probe.unlink(missing_ok=True)
        return True

    def _header_page(self) -> memoryview:
        """This thread's own aligned 4096 bytes."""
        page: memoryview | None = getattr(self._scratch, "page", None)
        if page is None:
            page = self._scratch.page = memoryview(mmap.mmap(-1, ALIGNMENT))
        return page

    def _body(self, nbytes: int) -> memoryview:
        """Aligned memory for this thread's next object, until its next call."""
        if nbytes == 0:
            return memoryview(b"")
        if nbytes > _KEPT_SCRATCH:
            return memoryview(mmap.mmap(-1, nbytes))
        body: memoryview | None = getattr(self._scratch, "body", None)
        if body is None:
            body = self._scratch.body = memoryview(mmap.mmap(-1, _KEPT_SCRATCH))
        return body[:nbytes]
