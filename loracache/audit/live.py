# SPDX-License-Identifier: Apache-2.0
"""Compares the files of a disk tier's folder, and its manifest, with the index of the daemon that uses it now.

Clients store, and the daemon evicts and moves, meanwhile. So what seems wrong at a first look at everything is looked
at twice more: the index is asked, then the daemon has written and deleted what was on its way, then come the files, and
the index is asked again. A fault counts only where the index said the same before and after, both times, of the same
file. Nothing is changed here: the daemon is asked to drop entries, and files that it may be about to replace are its.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loracache.audit.daemon import DaemonIndex
from loracache.audit.faults import Fault, Finding, Report
from loracache.audit.files import foreign_entries, judge_file, object_files
from loracache.audit.objects import Verdict
from loracache.errors import ConfigError
from loracache.storage_backends.base import ObjectInfo
from loracache.storage_backends.disk.manifest import RECORD_BYTES, Records, parents_first, records_of
from loracache.storage_backends.disk.object_files import object_file

__all__ = ["GRACE_S", "LiveDiskCheck"]

GRACE_S = 0.5  # between two looks
_DROPPED = {Fault.MISSING, Fault.CONTRADICTION, Fault.DAMAGED}  # what `fix` has the daemon drop, where it names it


@dataclass(frozen=True, slots=True)
class _Seen:
    """A file as it was read: whether it is whole, and which it is (inode, time of writing, size)."""

    verdict: Verdict
    identity: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _Doubt:
    """One thing that may be wrong about an object. file: which one it was seen with."""

    place: str
    fault: Fault
    words: str
    nbytes: int
    file: tuple[int, int, int] | None


class LiveDiskCheck:
    """The check of the folder `path` against `index`, of the daemon that uses it."""

    def __init__(
        self, index: DaemonIndex, path: Path, report: Report, *, integrity_key: bytes | None, fix: bool
    ) -> None:
        self.objects: dict[bytes, ObjectInfo] = {}  # by the files that are whole, when they were seen first
        self._index = index
        self._path = path
        self._report = report
        self._integrity_key = integrity_key
        self._fix = fix
        self._left: set[bytes] = set()  # keys of files that the daemon leaves alone, and of what depends on them

    def run(self) -> None:
        """Look at everything, and have dropped what was to be mended."""
        try:
            suspects = self._suspects()
            first = self._look_again(suspects)
            time.sleep(GRACE_S if first else 0)
            second = self._look_again(first)
        except OSError as error:
            raise ConfigError(f"disk_path {str(self._path)!r} cannot be read: {error.strerror or error}") from None
        self._report.checked["disk"] = len(self.objects)
        self._count({key: doubts & first[key] for key, doubts in second.items()})

    # -- looking ----------

    def _suspects(self) -> set[bytes]:
        """Keys of which index, file and manifest do not say the same at a first look; foreign files are counted."""
        named = self._index.all("disk")
        foreign = foreign_entries(self._path)
        seen: dict[bytes, _Seen] = {}
        for key, file in object_files(self._path, foreign.append):
            if (found := self._read(key, file)) is not None:
                seen[key] = found
                if found.verdict.info is not None:
                    self.objects[key] = found.verdict.info
        for path in filter(os.path.lexists, foreign):
            self._report.add("disk", Fault.FOREIGN, str(path.relative_to(self._path)), nbytes=path.lstat().st_size)
        self._left = _left_alone(named, seen)
        records = self._records()
        keys = named.keys() | seen.keys() | records.held.keys()
        return {key for key in keys if any(self._doubts(key, named.get(key), seen.get(key), records))}

    def _look_again(self, keys: Collection[bytes]) -> dict[bytes, set[_Doubt]]:
        """What is wrong about those of `keys` of which the index says the same before and after."""
        if not keys:
            return {}
        before = self._index.ask(keys, "disk")
        self._index.settle()
        records = self._records()
        seen = {key: self._read(key, object_file(self._path / "objects", key)) for key in keys}
        after = self._index.ask(keys, "disk")
        found = {
            key: set(self._doubts(key, after.get(key), seen[key], records))
            for key in keys
            if before.get(key) == after.get(key)
        }
        return {key: doubts for key, doubts in found.items() if doubts}

    def _read(self, key: bytes, path: Path) -> _Seen | None:
        """A file, or None where it has gone meanwhile."""
        try:
            with path.open("rb") as file:
                said = os.fstat(file.fileno())
                verdict = judge_file(key, file.read(), self._integrity_key)
        except FileNotFoundError:
            return None
        except OSError as error:
            return _Seen(Verdict(None, Fault.UNREADABLE, error.strerror or str(error)), (0, 0, 0))
        return _Seen(verdict, (said.st_ino, said.st_mtime_ns, said.st_size))

    def _records(self) -> Records:
        try:
            return records_of((self._path / "manifest").read_bytes())
        except FileNotFoundError:
            return Records(0, {})

    # -- judging ----------

    def _doubts(self, key: bytes, named: ObjectInfo | None, seen: _Seen | None, records: Records) -> Iterator[_Doubt]:
        """named: what the index says; seen: the file; records: the manifest's, none where it is none at all."""
        recorded = records.held.get(key)
        if seen is None:
            if named is not None:
                yield _Doubt("index", Fault.MISSING, f"{key.hex()}: named, and there is no file", named.size, None)
            elif recorded is not None:
                yield self._record(f"{key.hex()}: recorded, and there is no file", None)
            return
        verdict, (_, _, nbytes) = seen.verdict, seen.identity
        info = verdict.info
        if verdict.fault is not None:
            words = f"{self._name(key)}: {verdict.detail}"
            yield _Doubt("disk", verdict.fault, words, nbytes, seen.identity)
        elif named is None and key not in self._left:
            words = f"{self._name(key)}: the index does not name it"
            yield _Doubt("disk", Fault.UNINDEXED, words, nbytes, seen.identity)
        elif named is not None and named != info:
            words = f"{key.hex()}: the index says other than its file"
            yield _Doubt("index and disk", Fault.CONTRADICTION, words, nbytes, seen.identity)
        if info is not None and recorded != info and records.version:
            words = "not recorded" if recorded is None else "recorded otherwise than its file says"
            yield self._record(f"{key.hex()}: {words}", seen.identity)

    @staticmethod
    def _record(words: str, file: tuple[int, int, int] | None) -> _Doubt:
        return _Doubt("disk", Fault.MANIFEST, words, 0, file)

    def _name(self, key: bytes) -> str:
        return str(object_file(self._path / "objects", key).relative_to(self._path))

    # -- counting and mending ----------

    def _count(self, found: dict[bytes, set[_Doubt]]) -> None:
        going: dict[bytes, Finding] = {}
        for key, doubts in found.items():
            for doubt in sorted(doubts, key=lambda each: each.words):
                finding = self._report.add(doubt.place, doubt.fault, doubt.words, nbytes=doubt.nbytes)
                if doubt.fault in _DROPPED:
                    going[key] = finding
        if self._fix and going:
            going = {key: going[key] for key in self._index.ask(going, "disk")}  # else nothing can be dropped
            self._index.drop_from_disk(going)
            left = self._index.ask(going, "disk")
            for key, finding in going.items():
                finding.fixed += key not in left

    def check_manifest(self, report: Report) -> None:
        """Faults of the manifest as a file."""
        try:
            raw = (self._path / "manifest").read_bytes()
        except FileNotFoundError:
            if self.objects:
                report.add("disk", Fault.MANIFEST, "it is missing")
            return
        except OSError as error:
            report.add("disk", Fault.UNREADABLE, f"manifest: {error.strerror}")
            return
        records = records_of(raw)
        if not records.version:
            report.add("disk", Fault.MANIFEST, "it is not a manifest", nbytes=len(raw))
        if records.damaged:
            words = f"{records.damaged} records are damaged"
            report.add("disk", Fault.MANIFEST, words, nbytes=records.damaged * RECORD_BYTES)
        if records.torn:
            report.add("disk", Fault.MANIFEST, "it ends within a record", nbytes=records.torn)


def _left_alone(named: Mapping[bytes, ObjectInfo], seen: Mapping[bytes, _Seen]) -> set[bytes]:
    """Keys of files that cannot be judged here, so that a daemon leaves them alone, and of what depends on them."""
    left = {key for key, each in seen.items() if each.verdict.fault not in (None, Fault.DAMAGED)}
    infos = {key: each.verdict.info for key, each in seen.items() if each.verdict.info is not None and key not in named}
    for info in (info for group in parents_first(infos) for info in group):
        if info.parent in left:
            left.add(info.key)
    return left
