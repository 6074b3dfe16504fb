# SPDX-License-Identifier: Apache-2.0
"""What earlier versions of the disk tier wrote is still read."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import zlib
from dataclasses import replace
from typing import Any

import pytest

from loracache.storage_backends.base import ALIGNMENT, Outcome, Transfer, padded

OK, CORRUPT = Outcome.OK, Outcome.CORRUPT
KEY = b"k" * 32


def stored(backend: Any, transfer: Transfer) -> int:
    (result,) = backend.store([transfer])
    assert result.outcome is OK
    return int(result.stored)


def header_1(transfer: Transfer, payload: bytes, integrity_key: bytes | None) -> bytes:
    info = transfer.info
    fields = struct.pack(
        "<8sHBBIQQ32s32s32s",
        b"LoRACach",
        1,
        info.kind,
        bool(info.parent),
        0,
        info.size,
        info.checksum,
        info.key,
        info.parent,
        info.namespace,
    )
    mac = hashlib.blake2b(fields + payload, key=integrity_key, digest_size=32).digest() if integrity_key else bytes(32)
    return fields + mac + zlib.crc32(fields + mac).to_bytes(4, "little")


def write_1(folder: Any, objects: Any, transfer: Transfer, integrity_key: bytes | None = None) -> None:
    payload = objects.payload(transfer)
    page = header_1(transfer, payload, integrity_key).ljust(ALIGNMENT, b"\0")
    folder.file(transfer).write_bytes(page + payload.ljust(padded(len(payload)), b"\0"))


@pytest.mark.parametrize("integrity_key", [None, KEY], ids=["unkeyed", "keyed"])
def test_a_file_of_version_1_is_read_and_can_be_compressed(
    disk: Any, objects: Any, folder: Any, integrity_key: bytes | None
) -> None:
    backend, old = disk(integrity_key=integrity_key), objects.new(90_000, compressible=True)
    write_1(folder, objects, old, integrity_key)
    assert list(backend.scan()) == [old.info]
    assert objects.holds(backend, old)
    assert stored(backend, objects.keep(old, 2)) > 0
    assert objects.holds(backend, old)
    write_1(folder, objects, old, integrity_key)
    folder.flip(folder.file(old), 20)
    assert objects.load(backend, old) is CORRUPT
    if integrity_key:
        write_1(folder, objects, old, b"another key of 32 bytes or so...")
        assert objects.load(backend, old) is Outcome.UNPROVEN


def manifest_1(*made: Transfer, dead: Transfer) -> bytes:
    records = [b"LoRACach manifest v1\n".ljust(32, b"\0")]
    for operation, each in [(1, dead), *((1, each) for each in made), (2, dead)]:
        info = each.info
        body = struct.pack(
            "<BBBBQQ32s32s32s",
            operation,
            info.kind,
            bool(info.parent),
            0,
            info.size,
            info.checksum,
            info.key,
            info.parent,
            info.namespace,
        )
        records.append(body + zlib.crc32(body).to_bytes(4, "little"))
    return b"".join(records)


@pytest.mark.parametrize("room", [True, False], ids=["", "full"])
def test_a_manifest_of_version_1_is_read_and_replaced(
    disk: Any, objects: Any, folder: Any, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    disk().close()
    root, dead, late = objects.new(10), objects.new(10), objects.new(90_000, compressible=True)
    child = objects.new(9000, parent=root.info.key)
    for each in (root, child):
        write_1(folder, objects, each)
    folder.manifest.write_bytes(manifest_1(root, child, dead=dead) + b"torn")
    rename = os.rename

    def refuse(source: Any, target: Any) -> None:
        if os.fspath(target) == os.fspath(folder.manifest):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    with monkeypatch.context() as patch:
        if not room:
            patch.setattr("os.rename", refuse)
        backend = disk()
        known = backend.contains([each.info.key for each in (root, child, dead)])
        assert [result.info for result in known] == [root.info, child.info, None]
        assert list(backend.scan()) == [root.info, child.info]
        assert folder.manifest.read_bytes().startswith(b"LoRACach manifest v2" if room else b"LoRACach manifest v1")
    taken = stored(backend, objects.keep(late, 2))
    backend.close()
    assert folder.manifest.read_bytes().startswith(b"LoRACach manifest v2")
    again = disk()
    infos = [result.info for result in again.contains([each.info.key for each in (root, child, late)])]
    assert infos == [root.info, child.info, replace(late.info, stored=taken)]
