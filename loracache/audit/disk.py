# SPDX-License-Identifier: Apache-2.0
"""Checks a disk tier's folder, which nobody else uses now: files, their parents, the manifest, what was left behind."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from loracache.audit.faults import Fault, Finding, Report
from loracache.audit.files import foreign_entries, judge_file, object_files
from loracache.audit.objects import Verdict
from loracache.keys import LORA_NAMESPACE
from loracache.storage_backends.base import ObjectInfo
from loracache.storage_backends.disk.manifest import RECORD_BYTES, Manifest, Records, parents_first, records_of
from loracache.storage_backends.disk.object_files import object_file

__all__ = ["DiskCheck"]


class DiskCheck:
    """The check of the folder `path`. namespaces: digests that have a descriptor. adapters: keys of adapters that these
    are of, which may be parents without being there."""

    def __init__(
        self,
        path: Path,
        report: Report,
        *,
        integrity_key: bytes | None,
        namespaces: Collection[bytes],
        adapters: Collection[bytes],
        fix: bool,
    ) -> None:
        self.objects: dict[bytes, ObjectInfo] = {}  # those that are whole and have their parents
        self._path = path
        self._report = report
        self._integrity_key = integrity_key
        self._namespaces = {*namespaces, LORA_NAMESPACE}
        self._adapters = adapters
        self._fix = fix
        self._unknown: set[bytes] = set()  # keys of files that may be good, for all we can say
        self._bad: set[bytes] = set()  # keys of files that are not, or are orphans

    def run(self) -> None:
        """Look at everything, and mend it where that was asked for."""
        for entry in foreign_entries(self._path):
            self._foreign(entry)
        for part in ("tmp/*", "manifest.new", "namespaces/*.tmp", "adapters/*.tmp"):
            for leftover in self._path.glob(part):
                self._remove(self._add(Fault.LEFTOVER, leftover, ""), leftover)
        for key, file in object_files(self._path, self._foreign):
            self._look_at(key, file)
        self._drop_orphans()
        self._report.checked["disk"] = len(self.objects)
        self._compare_manifest()

    def _look_at(self, key: bytes, file: Path) -> None:
        try:
            verdict = judge_file(key, file.read_bytes(), self._integrity_key)
        except OSError as error:
            verdict = Verdict(None, Fault.UNREADABLE, error.strerror or str(error))
        if verdict.info is not None:
            self.objects[key] = verdict.info
        elif verdict.fault is not Fault.DAMAGED:
            self._unknown.add(key)
        if verdict.fault is not None:
            finding = self._add(verdict.fault, file, verdict.detail)
            if verdict.fault is Fault.DAMAGED:
                self._bad.add(key)
                self._remove(finding, file)

    def _drop_orphans(self) -> None:
        """An object stays where its chain leads to a root. What has no descriptor may be of an adapter that nobody
        here knows, and what cannot be judged may be a parent."""
        rooted, hanging = parents_first(self.objects)
        stays = {info.key for info in rooted} | self._unknown
        for info in hanging:
            if info.parent in stays or info.parent in self._adapters or info.namespace not in self._namespaces:
                stays.add(info.key)
                continue
            del self.objects[info.key]
            self._bad.add(info.key)
            file = self._file(info.key)
            finding = self._add(Fault.ORPHAN, file, f"its parent {info.parent.hex()} is not there")
            self._remove(finding, file)
        for info in self.objects.values():
            if info.namespace not in self._namespaces:
                self._add(Fault.UNDESCRIBED, self._file(info.key), f"namespace {info.namespace.hex()}")

    def _compare_manifest(self) -> None:
        path = self._path / "manifest"
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raw = b""
            faults = [("it is missing", 0)] if self.objects else []
        except OSError as error:
            self._report.add("disk", Fault.UNREADABLE, f"manifest: {error.strerror}")
            return
        else:
            faults = list(self._manifest_faults(records_of(raw), len(raw)))
        for example, nbytes in faults:
            self._report.add("disk", Fault.MANIFEST, example, nbytes=nbytes)
        held = records_of(raw).held
        if self._fix and (faults or held.keys() != self.objects.keys() | self._unknown):
            self._rewrite(path, {key: held[key] for key in self._unknown & held.keys()})

    def _manifest_faults(self, records: Records, nbytes: int) -> Iterator[tuple[str, int]]:
        if not records.version:
            yield "it is not a manifest", nbytes
            return
        yield from [("a record is damaged", RECORD_BYTES)] * records.damaged
        if records.torn:
            yield "it ends within a record", records.torn
        for key, info in records.held.items():
            if key in self.objects and info != self.objects[key]:
                yield f"{key.hex()}: recorded otherwise than its file says", 0
            elif key not in self.objects and key not in self._unknown and key not in self._bad:
                yield f"{key.hex()}: recorded, and there is no file", 0
        for key in self.objects.keys() - records.held.keys():
            yield f"{key.hex()}: not recorded", 0

    def _rewrite(self, path: Path, unknown: dict[bytes, ObjectInfo]) -> None:
        """As the files say, and what it said of those that cannot be judged."""
        manifest = Manifest(path, sync=True)
        try:
            manifest.compact(unknown | self.objects)
        except OSError as error:
            self._report.add("disk", Fault.UNREADABLE, f"manifest: not written: {error.strerror}")
            return
        manifest.close()
        for finding in self._report.findings:
            if finding.fault is Fault.MANIFEST:
                finding.fixed = finding.count

    def _file(self, key: bytes) -> Path:
        return object_file(self._path / "objects", key)

    def _foreign(self, path: Path) -> None:
        self._add(Fault.FOREIGN, path, "")

    def _add(self, fault: Fault, path: Path, detail: str) -> Finding:
        name = str(path.relative_to(self._path))
        example = f"{name}: {detail}" if detail else name
        return self._report.add("disk", fault, example, nbytes=path.lstat().st_size)

    def _remove(self, finding: Finding, path: Path) -> None:
        if self._fix:
            try:
                path.unlink()
            except OSError as error:
                finding.examples.append(f"{path.name} cannot be removed: {error.strerror}")
            else:
                finding.fixed += 1
