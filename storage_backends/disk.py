"""The disk tier: one file per object, written and read past the page cache, straight from and to the caller's buffers.

    <path>/objects/ab/<64 hex digits of the key>    header padded to 4096 bytes, then the payload padded to 4096
    <path>/manifest                                 what is there, so that a start reads no headers (manifest.py)
    <path>/tmp/                                     files being written; emptied at start
    <path>/lock                                     flock: one backend per folder

The files are the truth. An object appears by rename and disappears by unlink; the manifest and the index in memory
follow, and `scan` brings them back in line with the files after a crash: it adopts files without a record and drops
records without a file. Bytes are proven on every load, against the header and what the caller expects.

Threading: any number of threads. I/O runs without a lock; `_lock` covers each rename or unlink together with its change
to index and manifest, so the three never disagree about the order of two calls.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import mmap
import os
import string
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from loracache.errors import ConfigError
from loracache.storage_backends import header
from loracache.storage_backends.base import (
    ALIGNMENT,
    KEY_BYTES,
    ObjectInfo,
    Outcome,
    Result,
    StorageBackend,
    Transfer,
    padded,
)
from loracache.storage_backends.manifest import Manifest, parents_first
from loracache.storage_backends.vectors import head, length, move

_log = logging.getLogger(__name__)

_FULL = {errno.ENOSPC, errno.EDQUOT}
_GONE = {errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN}
_NO_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP}
_HEX = frozenset(string.hexdigits.lower())


class DiskInUse(ConfigError):
    """Another backend uses the folder now."""


class DiskBackend(StorageBackend):
    """Objects under the folder `path`, which is made where it is missing.

    sync: store answers OK only once the object would survive a crash of the machine, not just of the process.
    integrity_key: 16 to 64 bytes; objects then carry a MAC, and what lacks the right one is CORRUPT.
    direct: whether the file system takes O_DIRECT; where it does not, I/O goes through the page cache.
    Raises ConfigError for a folder that cannot be used or that another backend uses.
    """

    name = "disk"

    def __init__(self, path: str | Path, *, sync: bool = False, integrity_key: bytes | None = None) -> None:
        header.check_integrity_key(integrity_key)
        self.path = Path(path)
        self._objects = self.path / "objects"
        self._tmp = self.path / "tmp"
        self._sync = sync
        self._integrity_key = integrity_key
        self._lock = threading.Lock()
        self._scratch = threading.local()
        self._serial = itertools.count()
        self._manifest = Manifest(self.path / "manifest", sync=sync)
        self._lock_fd = -1
        self._known: dict[bytes, ObjectInfo] | None = None
        try:
            self._open()
        except OSError as error:
            self.close()
            raise ConfigError(
                f"disk_path {str(self.path)!r} cannot be used: {error.strerror or error}; give a folder that this "
                "process may create and write"
            ) from error

    def _open(self) -> None:
        for folder in (self._objects, self._tmp):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._take_lock()
        for number in range(256):
            (self._objects / f"{number:02x}").mkdir(mode=0o700, exist_ok=True)
        for leftover in os.scandir(self._tmp):
            os.unlink(leftover.path)
        self.direct = self._takes_direct()
        self._flags = os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0)
        if self._manifest.is_short():
            self._known = self._manifest.read()

    @property
    def _index(self) -> dict[bytes, ObjectInfo]:
        """What is held. A long manifest (a second for 200,000 objects) is read at the first use: under the lock, and
        by `scan` where the cache has just begun."""
        if self._known is None:
            self._known = self._manifest.read()
        return self._known

    def _take_lock(self) -> None:
        self._lock_fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_fd)
            self._lock_fd = -1
            raise DiskInUse(
                f"disk_path {str(self.path)!r} is in use by another LoRACache daemon; stop that one or choose another "
                "disk_path"
            ) from None

    def _takes_direct(self) -> bool:
        probe = self._tmp / "probe"
        try:
            fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_DIRECT, 0o600)
            try:
                os.pwritev(fd, [self._header_page()], 0)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno in _NO_DIRECT:
                _log.warning("%s takes no O_DIRECT: disk I/O goes through the page cache", self.path)
                return False
            if error.errno not in _FULL:  # a full disk still serves what it holds
                raise
        finally:
            probe.unlink(missing_ok=True)
        return True

    def contains(self, keys: Sequence[bytes]) -> list[Result]:
        with self._lock:
            held = [self._index.get(key) for key in keys]
        return [Result(Outcome.OK, info) if info else Result(Outcome.MISS) for info in held]

    def load(self, transfers: Sequence[Transfer]) -> list[Result]:
        results = [self._load_one(transfer) for transfer in transfers]
        self._flush_manifest()
        return results

    def store(self, transfers: Sequence[Transfer]) -> list[Result]:
        results = [self._store_one(transfer) for transfer in transfers]
        if self._sync:
            self._sync_folders(transfers, results)
        self._flush_manifest()
        return results

    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        results = []
        for key in keys:
            try:
                was_there = self._remove(key)
            except OSError as error:
                results.append(_failure(error))
            else:
                results.append(Result(Outcome.OK if was_there else Outcome.MISS))
        self._flush_manifest()
        return results

    def scan(self) -> Iterator[ObjectInfo]:
        """Yields what the manifest knows at once, then compares files and index and yields what that brought up.

        Objects whose parents the manifest does not know come last: a parent may be among the adopted files.
        """
        with self._lock:
            known = dict(self._index)
        rooted, hanging = parents_first(known)
        yield from self._still_held(rooted)
        late = {info.key: info for info in hanging} | {info.key: info for info in self._sweep(known)}
        for group in parents_first(late):
            yield from self._still_held(group)

    def close(self) -> None:
        self._manifest.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def footprint(self, size: int) -> int:
        return ALIGNMENT + padded(size)

    def _load_one(self, transfer: Transfer) -> Result:
        info = transfer.info
        if fault := header.transfer_fault(transfer):
            return Result(Outcome.FAILED, detail=fault)
        page = self._header_page()
        try:
            fd = os.open(self._file(info.key), os.O_RDONLY | self._flags)
            try:
                moved = move(os.preadv, fd, [page, *transfer.buffers])
            finally:
                os.close(fd)
            fault = self._read_fault(page, transfer, moved)
            if fault:
                self._remove(info.key)
        except FileNotFoundError:
            self._forget(info.key)
            return Result(Outcome.MISS)
        except OSError as error:
            return _failure(error)
        return Result(Outcome.CORRUPT, detail=fault) if fault else Result(Outcome.OK)

    def _read_fault(self, page: memoryview, transfer: Transfer, moved: int) -> str:
        try:
            found = header.unpack(page[: min(moved, ALIGNMENT)])
        except header.HeaderError as error:
            return str(error)
        if fault := header.header_fault(found, transfer.info):
            return fault
        if moved < self.footprint(transfer.info.size):
            return f"file ends after {moved} bytes"
        return header.payload_fault(found, head(transfer.buffers, transfer.info.size), self._integrity_key)

    def _store_one(self, transfer: Transfer) -> Result:
        info = transfer.info
        if fault := header.transfer_fault(transfer):
            return Result(Outcome.FAILED, detail=fault)
        payload = head(transfer.buffers, info.size)
        if header.payload_checksum(payload) != info.checksum:
            return Result(Outcome.CORRUPT, detail="payload does not match its checksum; nothing was stored")
        page = self._header_page()
        page[:] = header.pack(info, payload, self._integrity_key).ljust(ALIGNMENT, b"\0")
        fresh = self._tmp / str(next(self._serial))
        try:
            self._write(fresh, [page, *transfer.buffers])
            with self._lock:
                os.rename(fresh, self._file(info.key))
                self._index[info.key] = info
                self._manifest.add(info)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            return _failure(error)
        return Result(Outcome.OK)

    def _write(self, path: Path, views: list[memoryview]) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | self._flags, 0o600)
        try:
            if move(os.pwritev, fd, views) < length(views):
                raise OSError(errno.ENOSPC, "short write")
            if self._sync:
                os.fdatasync(fd)
        finally:
            os.close(fd)  # network file systems report a full device here at the latest

    def _sync_folders(self, transfers: Sequence[Transfer], results: list[Result]) -> None:
        """Makes the renames of this batch durable; where that fails, so did the items in that folder."""
        stored = [item for item, result in enumerate(results) if result.outcome is Outcome.OK]
        failures: dict[Path, Result] = {}
        for folder in {self._file(transfers[item].info.key).parent for item in stored}:
            try:
                fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            except OSError as error:
                failures[folder] = _failure(error)
        for item in stored:
            results[item] = failures.get(self._file(transfers[item].info.key).parent, results[item])

    def _remove(self, key: bytes) -> bool:
        """Unlinks an object; whether there was a file. Raises OSError where the file stays."""
        with self._lock:
            was_there = True
            try:
                os.unlink(self._file(key))
            except FileNotFoundError:
                was_there = False
            self._drop(key)
        return was_there

    def _forget(self, key: bytes) -> None:
        """Drops an object whose file was seen to be missing, unless it has come back."""
        with self._lock, contextlib.suppress(OSError):
            try:
                os.stat(self._file(key))
            except FileNotFoundError:
                self._drop(key)

    def _drop(self, key: bytes) -> None:
        info = self._index.pop(key, None)
        if info is not None:
            self._manifest.delete(info)

    def _flush_manifest(self) -> None:
        with self._lock:
            try:
                self._manifest.flush()
                if self._manifest.wasteful(len(self._index)):
                    self._manifest.compact(self._index)
            except OSError as error:
                # No item fails for it: what was stored is found by its file, and the records wait for the next flush.
                _log.warning("manifest of %s not written: %s", self.path, error)

    def _still_held(self, infos: Iterable[ObjectInfo]) -> Iterator[ObjectInfo]:
        return (info for info in infos if info.key in self._index)

    def _sweep(self, known: Iterable[bytes]) -> list[ObjectInfo]:
        """Compares the files with the index, one folder at a time; returns what was adopted."""
        by_folder: list[set[bytes]] = [set() for _ in range(256)]
        for key in known:
            by_folder[key[0]].add(key)
        adopted = []
        for number, expected in enumerate(by_folder):
            suspects = expected
            for key, size in self._listing(number):
                info = self._index.get(key)
                suspects.discard(key)
                if info is None or size != self.footprint(info.size):
                    suspects.add(key)
            for key in suspects:
                if (info := self._reconcile(key)) is not None:
                    adopted.append(info)
        self._flush_manifest()
        if adopted:
            _log.info("%s: adopted %d files that the manifest did not know", self.path, len(adopted))
        return adopted

    def _listing(self, number: int) -> Iterator[tuple[bytes, int]]:
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
        except OSError as error:
            _log.warning("%s not listed: %s", self._objects / folder, error)

    def _reconcile(self, key: bytes) -> ObjectInfo | None:
        """Brings the index in line with one file: returns it if adopted; a bad file goes, a missing one is dropped."""
        before = self._index.get(key)
        try:
            found = self._inspect(key)
            with self._lock:
                if self._index.get(key) is not before:
                    return None  # stored or deleted while we looked
                if found is None:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(self._file(key))
                    self._drop(key)
                elif found != before:
                    self._index[key] = found
                    self._manifest.add(found)
                    return found
        except OSError as error:
            _log.warning("%s not examined: %s", self._file(key), error)
        return None

    def _inspect(self, key: bytes) -> ObjectInfo | None:
        """What a file's header says it holds; None where file, header or size are not as they should be."""
        page = self._header_page()
        try:
            fd = os.open(self._file(key), os.O_RDONLY | os.O_NOFOLLOW | self._flags)
        except FileNotFoundError:
            return None
        try:
            moved = os.preadv(fd, [page], 0)
            size = os.fstat(fd).st_size
        finally:
            os.close(fd)
        try:
            info = header.unpack(page[:moved]).info
        except header.HeaderError:
            return None
        return info if info.key == key and size == self.footprint(info.size) else None

    def _file(self, key: bytes) -> Path:
        name = key.hex()
        return self._objects / name[:2] / name

    def _header_page(self) -> memoryview:
        """This thread's own aligned 4096 bytes."""
        page: memoryview | None = getattr(self._scratch, "page", None)
        if page is None:
            page = self._scratch.page = memoryview(mmap.mmap(-1, ALIGNMENT))
        return page


def _failure(error: OSError) -> Result:
    if error.errno in _FULL:
        return Result(Outcome.FULL, detail=str(error))
    if error.errno in _GONE:
        return Result(Outcome.UNAVAILABLE, detail=str(error))
    return Result(Outcome.FAILED, detail=str(error))
