# SPDX-License-Identifier: Apache-2.0
"""The disk tier: one file per object, written and read past the page cache, straight from and to the caller's buffers.

    <path>/objects/ab/<64 hex digits of the key>    one object, compressed or as it is (object_files.py)
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
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from loracache.errors import ConfigError
from loracache.folder import make_folders, owner_fault, sync_folder
from loracache.storage_backends import header
from loracache.storage_backends.base import ObjectInfo, Outcome, Result, Standing, StorageBackend, Transfer
from loracache.storage_backends.disk.lock import lock_folder
from loracache.storage_backends.disk.manifest import Manifest, parents_first
from loracache.storage_backends.disk.object_files import FULL, UNWRITABLE, NotOurs, ObjectFiles, footprint
from loracache.storage_backends.vectors import head

__all__ = ["DiskBackend"]

_log = logging.getLogger(__name__)

_GONE = {errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN}
_MAY_PASS = _GONE | UNWRITABLE | {errno.EIO}  # of a folder that cannot be opened now; all else is its user's mistake


class DiskBackend(StorageBackend):
    """Objects under the folder `path`, which is made where it is missing.

    sync: store and delete answer OK only once that would survive a crash of the machine, not just of the process.
    integrity_key: 16 to 64 bytes; objects then carry a MAC, and what lacks the right one is CORRUPT.
    owner: what another backend that finds the folder in use is told of who uses it, "NAME at ADDRESS".
    A folder that cannot be written is read, and one that cannot be reached now answers UNAVAILABLE, until `check` finds
    that it can.
    direct: whether the file system takes O_DIRECT; where it does not, I/O goes through the page cache.
    Raises ConfigError for a folder that cannot be used or that another backend uses.
    """

    name = "disk"

    def __init__(
        self, path: str | Path, *, sync: bool = False, integrity_key: bytes | None = None, owner: str = ""
    ) -> None:
        header.check_integrity_key(integrity_key)
        self.path = Path(path)
        self._files = ObjectFiles(self.path, sync=sync, integrity_key=integrity_key)
        self._sync = sync
        self._owner = owner
        self._lock = threading.Lock()
        self._manifest = Manifest(self.path / "manifest", sync=sync)
        self._lock_fd = -1
        self._known: dict[bytes, ObjectInfo] | None = None
        self._left_alone: dict[bytes, int] = {}
        self._unwritable = ""
        self._unreachable = self._open()

    def check(self) -> Standing:
        if self._unreachable:
            self._unreachable = self._open()
        elif self._unwritable or os.statvfs(self.path).f_flag & os.ST_RDONLY:
            if self._lock_fd < 0:
                self._lock_fd = lock_folder(self.path, self._owner)
            self._unwritable = self._files.open()
            self._flush_manifest()
        if self._unreachable:
            reason = f"disk_path {str(self.path)!r} cannot be reached: {self._unreachable}"
            return Standing(reads=False, writes=False, reason=reason)
        if self._unwritable:
            reason = f"disk_path {str(self.path)!r} cannot be written: {self._unwritable}"
            return Standing(writes=False, reason=reason)
        return Standing()

    @property
    def direct(self) -> bool:
        return self._files.direct

    def _open(self) -> str:
        """In words why the folder cannot be opened now, empty where it is. Raises ConfigError."""
        try:
            make_folders(self.path, sync=self._sync)
            if fault := owner_fault(self.path):
                raise ConfigError(f"disk_path {str(self.path)!r} cannot be trusted: {fault}")
            self._lock_fd = lock_folder(self.path, self._owner)
            self._unwritable = self._files.open()
        except OSError as error:
            self._release()
            if error.errno in _MAY_PASS:
                return error.strerror or str(error)
            raise ConfigError(
                f"disk_path {str(self.path)!r} cannot be used: {_named(error, self.path)}; give a folder that this "
                "process may create and write"
            ) from error
        if self._manifest.is_short():
            self._known = self._manifest.read()
        return ""

    def _held(self) -> dict[bytes, ObjectInfo]:
        """What is held. A long manifest (a second for 200,000 objects) is read at the first use: under the lock, and
        by `scan` where the cache has just begun."""
        if self._known is None:
            self._known = self._manifest.read()
        return self._known

    def contains(self, keys: Sequence[bytes]) -> list[Result]:
        if self._unreachable:
            return self._out_of_reach(len(keys))
        with self._lock:
            held = [self._held().get(key) for key in keys]
        return [Result(Outcome.OK, info) if info else Result(Outcome.MISS) for info in held]

    def load(self, transfers: Sequence[Transfer]) -> list[Result]:
        if self._unreachable:
            return self._out_of_reach(len(transfers))
        results = [self._load_one(transfer) for transfer in transfers]
        self._flush_manifest()
        return results

    def store(self, transfers: Sequence[Transfer]) -> list[Result]:
        if self._unreachable:
            return self._out_of_reach(len(transfers))
        results = [self._store_one(transfer) for transfer in transfers]
        if self._sync:
            self._sync_folders([transfer.info.key for transfer in transfers], results)
        self._flush_manifest()
        return results

    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        if self._unreachable:
            return self._out_of_reach(len(keys))
        results = []
        for key in keys:
            try:
                was_there = self._remove(key)
            except OSError as error:
                results.append(_failure(error))
            else:
                results.append(Result(Outcome.OK if was_there else Outcome.MISS))
        if self._sync:
            self._sync_folders(keys, results)
        self._flush_manifest()
        return results

    def scan(self) -> Iterator[ObjectInfo]:
        """Yields what the manifest knows at once, then compares files and index and yields what that brought up.

        Objects whose parents the manifest does not know come last: a parent may be among the adopted files.
        """
        if self._unreachable:
            return
        with self._lock:
            known = dict(self._held())
        rooted, hanging = parents_first(known)
        yield from self._still_held(rooted)
        late = {info.key: info for info in hanging} | {info.key: info for info in self._sweep(known)}
        for group in parents_first(late):
            yield from self._still_held(group)

    def close(self) -> None:
        self._manifest.close()
        self._release()

    def _release(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def footprint(self, size: int) -> int:
        return footprint(size)

    def _out_of_reach(self, count: int) -> list[Result]:
        return [Result(Outcome.UNAVAILABLE, detail=self._unreachable)] * count

    def _load_one(self, transfer: Transfer) -> Result:
        info = transfer.info
        if fault := header.transfer_fault(transfer):
            return Result(Outcome.FAILED, detail=fault)
        # The index knows best how the object is kept, but may still have to be read: nobody waits here for that.
        held = self._known.get(info.key, info) if self._known else info
        try:
            fault = self._files.read(transfer, held.stored)
            if fault:
                self._remove(info.key)
        except FileNotFoundError:
            self._forget(info.key)
            return Result(Outcome.MISS)
        except NotOurs as error:
            with self._lock:
                self._held().pop(info.key, None)
            return Result(Outcome.UNPROVEN, detail=str(error))
        except OSError as error:
            return _failure(error)
        return Result(Outcome.CORRUPT, detail=fault) if fault else Result(Outcome.OK)

    def _store_one(self, transfer: Transfer) -> Result:
        info = transfer.info
        if fault := header.transfer_fault(transfer):
            return Result(Outcome.FAILED, detail=fault)
        if header.payload_checksum(head(transfer.buffers, info.size)) != info.checksum:
            return Result(Outcome.CORRUPT, detail="payload does not match its checksum; nothing was stored")
        try:
            fresh, stored = self._files.write(transfer)
            info = header.as_stored(info, stored)
            with self._lock:
                self._files.publish(fresh, info.key)
                self._held()[info.key] = info
                self._manifest.add(info)
        except OSError as error:
            return _failure(error)
        return Result(Outcome.OK, stored=stored)

    def _sync_folders(self, keys: Sequence[bytes], results: list[Result]) -> None:
        """Makes the names of this batch durable; where that fails, so did the items in that folder."""
        done = [item for item, result in enumerate(results) if result.outcome is Outcome.OK]
        failures: dict[Path, Result] = {}
        for folder in {self._files.file(keys[item]).parent for item in done}:
            try:
                sync_folder(folder)
            except OSError as error:
                failures[folder] = _failure(error)
        for item in done:
            results[item] = failures.get(self._files.file(keys[item]).parent, results[item])

    def _remove(self, key: bytes) -> bool:
        """Unlinks an object; whether there was a file. Raises OSError where the file stays."""
        with self._lock:
            was_there = True
            try:
                os.unlink(self._files.file(key))
            except FileNotFoundError:
                was_there = False
            self._drop(key)
        return was_there

    def _forget(self, key: bytes) -> None:
        """Drops an object whose file was seen to be missing, unless it has come back."""
        with self._lock, contextlib.suppress(OSError):
            try:
                os.stat(self._files.file(key))
            except FileNotFoundError:
                self._drop(key)

    def _drop(self, key: bytes) -> None:
        info = self._held().pop(key, None)
        if info is not None:
            self._manifest.delete(info)

    def _flush_manifest(self) -> None:
        if self._unwritable:
            return
        with self._lock:
            try:
                if self._manifest.wasteful(len(self._held())):
                    self._manifest.compact(self._held())
                else:
                    self._manifest.flush()
            except OSError as error:
                # No item fails for it: what was stored is found by its file, and the records wait for the next flush.
                _log.warning("manifest of %s not written: %s", self.path, error)

    def left_alone(self) -> dict[bytes, int]:
        return self._left_alone

    def _still_held(self, infos: Iterable[ObjectInfo]) -> Iterator[ObjectInfo]:
        return (info for info in infos if info.key in self._held())

    def _sweep(self, known: Iterable[bytes]) -> list[ObjectInfo]:
        """Compares the files with the index, one folder at a time; returns what was adopted."""
        by_folder: list[set[bytes]] = [set() for _ in range(256)]
        for key in known:
            by_folder[key[0]].add(key)
        adopted = []
        for number, expected in enumerate(by_folder):
            suspects = expected
            for key, size in self._files.listing(number):
                info = self._held().get(key)
                suspects.discard(key)
                if info is None or size != footprint(info.stored or info.size):
                    suspects.add(key)
            for key in suspects:
                if (info := self._reconcile(key)) is not None:
                    adopted.append(info)
        self._flush_manifest()
        if adopted:
            _log.info("%s: adopted %d files that the manifest did not know", self.path, len(adopted))
        return adopted

    def _reconcile(self, key: bytes) -> ObjectInfo | None:
        """Brings the index in line with one file: returns it if adopted; a bad file goes, a missing one is dropped."""
        before = self._held().get(key)
        try:
            try:
                found = self._files.inspect(key)
            except NotOurs:
                with self._lock:
                    if self._held().get(key) is before:
                        self._left_alone[key] = os.lstat(self._files.file(key)).st_size
                        self._held().pop(key, None)
                return None
            with self._lock:
                if self._held().get(key) is not before:
                    return None  # stored or deleted while we looked
                if found is None:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(self._files.file(key))
                    self._drop(key)
                elif found != before:
                    self._held()[key] = found
                    self._manifest.add(found)
                    return found
        except OSError as error:
            _log.warning("%s not examined: %s", self._files.file(key), error)
        return None


def _named(error: OSError, path: Path) -> str:
    """What is wrong, and with what in the folder."""
    what = error.strerror or str(error)
    return what if error.filename in (None, str(path), path) else f"{error.filename}: {what}"


def _failure(error: OSError) -> Result:
    if error.errno in FULL:
        return Result(Outcome.FULL, detail=str(error))
    if error.errno == errno.EROFS:
        return Result(Outcome.UNAVAILABLE, detail=str(error), partial=True)
    if error.errno in _GONE:
        return Result(Outcome.UNAVAILABLE, detail=str(error))
    return Result(Outcome.FAILED, detail=str(error))
