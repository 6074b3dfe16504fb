# SPDX-License-Identifier: Apache-2.0
"""Files in the places of objects, and whether their bytes are what their headers say. Nothing is changed here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from loracache.audit.faults import Fault
from loracache.audit.objects import Verdict, judge
from loracache.keys import is_digest
from loracache.storage_backends import header
from loracache.storage_backends.base import ALIGNMENT
from loracache.storage_backends.disk.object_files import footprint

__all__ = ["foreign_entries", "judge_file", "object_files"]

_OURS = {"objects", "tmp", "manifest", "manifest.new", "lock", "namespaces", "adapters"}


def foreign_entries(path: Path) -> list[Path]:
    """What lies in a disk tier's folder that is none of ours; the places of objects left aside."""
    return [entry for entry in sorted(path.iterdir()) if entry.name not in _OURS]


def object_files(path: Path, foreign: Callable[[Path], object]) -> Iterator[tuple[bytes, Path]]:
    """(key, file) of the files in the places of objects below a tier's folder; `foreign` is told of all else there."""
    for folder in _entries(path / "objects"):
        if not folder.is_dir(follow_symlinks=False):
            foreign(Path(folder.path))
            continue
        for file in _entries(Path(folder.path)):
            in_place = is_digest(file.name) and file.name.startswith(folder.name) and len(folder.name) == 2
            if in_place and file.is_file(follow_symlinks=False):
                yield bytes.fromhex(file.name), Path(file.path)
            else:
                foreign(Path(file.path))


def judge_file(key: bytes, raw: bytes, integrity_key: bytes | None) -> Verdict:
    """raw: all of a file in the place of the object `key`."""
    try:
        found = header.unpack(raw[:ALIGNMENT])
    except header.OtherVersion as error:
        return Verdict(None, Fault.OTHER_VERSION, str(error))
    except header.HeaderError as error:
        return Verdict(None, Fault.DAMAGED, str(error))
    nbytes = found.info.stored or found.info.size
    if found.info.key != key:
        return Verdict(None, Fault.DAMAGED, f"holds the object {found.info.key.hex()}")
    if len(raw) != footprint(nbytes):
        return Verdict(None, Fault.DAMAGED, f"file has {len(raw)} bytes, its object takes {footprint(nbytes)}")
    return judge(found, memoryview(raw)[ALIGNMENT : ALIGNMENT + nbytes], integrity_key)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
