# SPDX-License-Identifier: Apache-2.0
"""Checks what is kept beside the objects: descriptors of namespaces and names of adapters, on disk and in the Redis."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from loracache.adapters.names import NameRecord
from loracache.audit.faults import Fault, Report
from loracache.errors import UsageError
from loracache.keys import Namespace

__all__ = ["check_names", "read_namespaces"]


def read_namespaces(folder: Path, report: Report, *, fix: bool) -> list[Namespace]:
    """Those that the folder holds; a file that is none is removed where `fix` says so."""
    found = []

    def read(path: Path) -> None:
        found.append(Namespace.parse(path.read_text().partition("\n")[0]))

    _read_all(folder, read, report, fix)
    return found


def check_names(
    folder: Path,
    shared: Iterable[bytes],
    held: Callable[[bytes], bool],
    key: bytes | None,
    report: Report,
    *,
    fix: bool,
) -> None:
    """The records of names in a folder, and those in the Redis. held: whether the content of a digest is anywhere."""
    records: dict[str, NameRecord] = {}

    def take(place: str, where: str, data: bytes) -> None:
        try:
            record = NameRecord.decode(data, key)
        except ValueError as error:
            if not _is_record(data):
                raise
            report.add(place, Fault.UNPROVEN, f"{where}: {error}", nbytes=len(data))
            return
        if record.name not in records or record.version > records[record.name].version:
            records[record.name] = record

    _read_all(folder, lambda path: take("disk", f"adapters/{path.name}", path.read_bytes()), report, fix)
    for data in shared:
        try:
            take("redis", "the hash of names", data)
        except ValueError as error:  # its name is not known to us, so that it cannot be removed from the hash
            report.add("redis", Fault.DAMAGED, f"the hash of names: {error}", nbytes=len(data))
    for record in records.values():
        if record.digest and not held(bytes.fromhex(record.digest)):
            report.add("names", Fault.NAME_ALONE, f"{record.name}: {record.digest}")


def _read_all(folder: Path, read: Callable[[Path], None], report: Report, fix: bool) -> None:
    for path in sorted(folder.glob("*.json")):
        try:
            read(path)
        except OSError as error:
            report.add("disk", Fault.UNREADABLE, f"{folder.name}/{path.name}: {error.strerror}")
        except (UsageError, ValueError) as error:
            finding = report.add("disk", Fault.DAMAGED, f"{folder.name}/{path.name}: {error}")
            finding.bytes += path.lstat().st_size
            if fix:
                with contextlib.suppress(OSError):
                    path.unlink()
                    finding.fixed += 1


def _is_record(data: bytes) -> bool:
    """Whether it is a record but for its MAC."""
    try:
        body, _ = json.loads(data)
        NameRecord.decode(json.dumps([body, ""]).encode(), None)
    except (ValueError, TypeError):
        return False
    return True
