# SPDX-License-Identifier: Apache-2.0
"""A disk folder of a newer release, or from before an integrity_key was turned on: a rollback deletes nothing."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from loracache.storage_backends import header
from loracache.storage_backends.base import Outcome
from loracache.storage_backends.disk.backend import DiskBackend

KEY, OTHER = b"0123456789abcdef", b"fedcba9876543210"


def newer(file: Path) -> None:
    """A file as a release would write it whose header is of version 3."""
    raw = bytearray(file.read_bytes())
    struct.pack_into("<H", raw, 8, 3)
    mac = header.HEADER_BYTES - header.MAC_BYTES - 4
    body = bytes(raw[:mac]) + b"anything" + bytes(raw[mac : mac + header.MAC_BYTES])  # it has one more field
    raw[: len(body) + 4] = body + struct.pack("<I", zlib.crc32(body))
    file.write_bytes(raw)


def files(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in (path / "objects").glob("*/*")}


def keys(backend: DiskBackend) -> set[bytes]:
    return {info.key for info in backend.scan()}


@pytest.fixture
def stored(tmp_path: Path, objects: Any) -> Any:
    """Stores objects under a key, and closes."""

    def store(key: bytes | None, count: int = 3) -> list[Any]:
        backend, made = DiskBackend(tmp_path, integrity_key=key), [objects.new(5000) for _ in range(count)]
        objects.store(backend, made)
        backend.close()
        return made

    return store


@pytest.mark.parametrize("manifest", ["as it was", "of a newer version", "lost"])
def test_files_of_a_newer_version_are_left_alone_and_counted(
    tmp_path: Path, objects: Any, stored: Any, manifest: str
) -> None:
    made = stored(None)
    for each in list((tmp_path / "objects").glob("*/*"))[:2]:
        newer(each)
    before = files(tmp_path)
    if manifest == "lost":
        (tmp_path / "manifest").unlink()
    elif manifest == "of a newer version":
        raw = (tmp_path / "manifest").read_bytes()
        (tmp_path / "manifest").write_bytes(raw.replace(b"manifest v2", b"manifest v3"))
    backend = DiskBackend(tmp_path)
    known = keys(backend)
    outcomes = [backend.load([objects.empty(each)])[0].outcome for each in made]
    assert outcomes.count(Outcome.OK) == 1
    assert set(outcomes) <= {Outcome.OK, Outcome.UNPROVEN}
    assert files(tmp_path) == before
    if manifest != "as it was":  # else a load finds it
        assert len(known) == 1
        assert sum(backend.left_alone().values()) == 2 * (4096 + 8192)
    backend.close()


@pytest.mark.parametrize("field", [8, 9])
def test_a_version_that_is_damage_is_corrupt(tmp_path: Path, objects: Any, stored: Any, field: int) -> None:
    (made,) = stored(None, 1)
    (file,) = (tmp_path / "objects").glob("*/*")
    raw = bytearray(file.read_bytes())
    raw[field] ^= 1
    file.write_bytes(raw)
    backend = DiskBackend(tmp_path)
    assert backend.load([objects.empty(made)])[0].outcome is Outcome.CORRUPT
    assert files(tmp_path) == {}
    backend.close()


@pytest.mark.parametrize(("before", "now"), [(None, KEY), (KEY, OTHER)])
@pytest.mark.parametrize("planes", [0, 2])
def test_an_integrity_key_that_is_turned_on_or_changed_deletes_nothing(
    tmp_path: Path, objects: Any, before: bytes | None, now: bytes, planes: int
) -> None:
    first = DiskBackend(tmp_path, integrity_key=before)
    made = [objects.keep(objects.new(20_000, compressible=True), planes) for _ in range(3)]
    objects.store(first, made)
    first.close()
    content = files(tmp_path)
    second = DiskBackend(tmp_path, integrity_key=now)
    list(second.scan())
    assert [each.outcome for each in second.load([objects.empty(each) for each in made])] == [Outcome.UNPROVEN] * 3
    assert files(tmp_path) == content
    second.close()
    third = DiskBackend(tmp_path, integrity_key=before)  # and turned back, all is there
    list(third.scan())
    assert all(objects.holds(third, each) for each in made)
    third.close()


def test_without_a_manifest_what_has_no_mac_at_all_is_seen_by_its_header(
    tmp_path: Path, objects: Any, stored: Any
) -> None:
    made = stored(None)
    (tmp_path / "manifest").unlink()
    backend = DiskBackend(tmp_path, integrity_key=KEY)
    assert keys(backend) == set()
    assert set(backend.left_alone()) == {each.info.key for each in made}
    assert len(files(tmp_path)) == 3
    backend.close()


def test_damage_under_another_key_is_damage(tmp_path: Path, objects: Any, stored: Any, folder: Any) -> None:
    (made,) = stored(KEY, 1)
    (file,) = (tmp_path / "objects").glob("*/*")
    folder.flip(file, 4096 + 100)
    backend = DiskBackend(tmp_path, integrity_key=OTHER)
    assert backend.load([objects.empty(made)])[0].outcome is Outcome.CORRUPT
    assert files(tmp_path) == {}
    backend.close()


def test_what_is_left_alone_goes_when_its_key_is_deleted_or_stored_anew(
    tmp_path: Path, objects: Any, stored: Any
) -> None:
    one, two, _ = made = stored(None)
    (tmp_path / "manifest").unlink()
    backend = DiskBackend(tmp_path, integrity_key=KEY)
    list(backend.scan())
    assert backend.delete([one.info.key])[0].outcome is Outcome.OK
    objects.store(backend, [two])
    assert objects.holds(backend, two)
    assert len(files(tmp_path)) == len(made) - 1
    backend.close()
