# SPDX-License-Identifier: Apache-2.0
"""What the disk tier does when files, device or folder are not as it left them."""

from __future__ import annotations

import errno
import os
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loracache.errors import ConfigError
from loracache.storage_backends import header
from loracache.storage_backends.base import Outcome, Transfer
from loracache.storage_backends.codec import Encoded
from loracache.storage_backends.disk.backend import DiskBackend

OK, MISS, CORRUPT, FULL = Outcome.OK, Outcome.MISS, Outcome.CORRUPT, Outcome.FULL
MANIFEST_HEADER = 32


def scanned(backend: DiskBackend) -> set[bytes]:
    return {info.key for info in backend.scan()}


def refused_and_gone(backend: DiskBackend, folder: Any, objects: Any, transfer: Transfer) -> None:
    assert objects.load(backend, transfer) is CORRUPT
    assert not folder.file(transfer).exists()
    assert objects.found(backend, transfer) is MISS
    assert objects.load(backend, transfer) is MISS
    objects.store(backend, [transfer])
    assert objects.holds(backend, transfer)


def refused_and_left(backend: DiskBackend, folder: Any, objects: Any, transfer: Transfer) -> None:
    """It may be an honest object of another key: an operator who changes his mind finds it again."""
    before = folder.file(transfer).read_bytes()
    assert objects.load(backend, transfer) is Outcome.UNPROVEN
    assert objects.found(backend, transfer) is MISS
    assert folder.file(transfer).read_bytes() == before
    objects.store(backend, [transfer])
    assert objects.holds(backend, transfer)


@pytest.mark.parametrize("length", [0, 100, 4096, 8192, 9000])
def test_a_truncated_file_is_corrupt(disk: Any, objects: Any, folder: Any, length: int) -> None:
    backend, stored = disk(), objects.new(9000)
    objects.store(backend, [stored])
    os.truncate(folder.file(stored), length)
    refused_and_gone(backend, folder, objects, stored)


@pytest.mark.parametrize("offset", [0, 8, 20, 40, 130, header.HEADER_BYTES - 1, 4096, 4096 + 8999])
def test_a_flipped_bit_is_corrupt(disk: Any, objects: Any, folder: Any, offset: int) -> None:
    backend, stored = disk(), objects.new(9000)
    objects.store(backend, [stored])
    folder.flip(folder.file(stored), offset)
    refused_and_gone(backend, folder, objects, stored)


def test_swapped_files_are_corrupt(disk: Any, objects: Any, folder: Any) -> None:
    backend, one, two = disk(), objects.new(9000), objects.new(9000)
    objects.store(backend, [one, two])
    os.rename(folder.file(one), folder.path / "x")
    os.rename(folder.file(two), folder.file(one))
    os.rename(folder.path / "x", folder.file(two))
    refused_and_gone(backend, folder, objects, one)
    refused_and_gone(backend, folder, objects, two)


def test_another_objects_bytes_are_refused_even_where_size_and_checksum_agree(
    disk: Any, objects: Any, folder: Any
) -> None:
    backend, one = disk(), objects.new(9000)
    twin = Transfer(replace(one.info, key=bytes(range(32))), one.buffers)
    objects.store(backend, [one, twin])
    os.replace(folder.file(one), folder.file(twin))
    assert objects.load(backend, twin) is CORRUPT


def test_a_full_device_answers_full_and_keeps_no_half_file(
    file_system: Callable[[int], Path], disk: Any, objects: Any, folder: Any
) -> None:
    tiny_mount = file_system(4)
    backend = disk(tiny_mount)
    small, large, third = objects.new(1 << 20), objects.new(8 << 20), objects.new(1 << 20)
    results = backend.store([small, large, third])
    assert [result.outcome for result in results] == [OK, FULL, OK]
    assert folder.at(tiny_mount).files() == sorted([small.info.key.hex(), third.info.key.hex()])
    assert objects.found(backend, large) is MISS
    assert objects.holds(backend, small)
    backend.close()
    again = disk(tiny_mount)
    assert scanned(again) == {small.info.key, third.info.key}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_and_no_quota_are_full(
    disk: Any, objects: Any, folder: Any, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    backend, stored = disk(), objects.new(9000)

    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("loracache.storage_backends.disk.backend.os.pwritev", refuse)
    (result,) = backend.store([stored])
    assert result.outcome is FULL
    assert os.strerror(code) in result.detail
    assert folder.files() == []


def test_short_reads_and_writes_are_carried_on(disk: Any, objects: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, stored = disk(), objects.new(200_000, pieces=7)
    write, read = os.pwritev, os.preadv

    def write_little(fd: int, views: list[memoryview], offset: int) -> int:
        return write(fd, [views[0][:8192]], offset)

    def read_little(fd: int, views: list[memoryview], offset: int) -> int:
        return read(fd, [views[0][:8192]], offset)

    monkeypatch.setattr("loracache.storage_backends.disk.backend.os.pwritev", write_little)
    monkeypatch.setattr("loracache.storage_backends.disk.backend.os.preadv", read_little)
    objects.store(backend, [stored])
    assert objects.holds(backend, stored)


def test_a_write_that_ends_early_is_full_and_not_taken_for_whole(
    disk: Any, objects: Any, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, stored = disk(), objects.new(200_000)
    write = os.pwritev

    def write_once(fd: int, views: list[memoryview], offset: int) -> int:
        return 0 if offset else write(fd, [views[0][:8192]], offset)

    monkeypatch.setattr("loracache.storage_backends.disk.backend.os.pwritev", write_once)
    assert [result.outcome for result in backend.store([stored])] == [FULL]
    assert folder.files() == []


def test_a_read_error_fails_and_deletes_nothing(disk: Any, objects: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, stored = disk(), objects.new(9000)
    objects.store(backend, [stored])

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "refused")

    with monkeypatch.context() as patch:
        patch.setattr("loracache.storage_backends.disk.backend.os.preadv", refuse)
        assert objects.load(backend, stored) is Outcome.FAILED
    assert objects.holds(backend, stored)


def test_a_synced_store_syncs_file_folder_and_manifest_before_it_answers(
    disk: Any, objects: Any, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, stored = disk(sync=True), objects.new(9000)
    synced: list[str] = []

    def note(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))

    monkeypatch.setattr("os.fsync", note)
    monkeypatch.setattr("os.fdatasync", note)
    objects.store(backend, [stored])
    inside = [str(Path(path).relative_to(folder.path)) for path in synced]
    assert inside == ["tmp/0", f"objects/{stored.info.key.hex()[:2]}", "manifest"]


def test_a_file_system_without_direct_io_is_served_through_the_page_cache(
    disk: Any, objects: Any, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.open

    def open_without_direct(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain(path, flags, mode)

    monkeypatch.setattr("os.open", open_without_direct)
    backend, stored = disk(), objects.new(9001, pieces=2)
    assert not backend.direct
    objects.store(backend, [stored])
    assert objects.holds(backend, stored)
    os.truncate(folder.file(stored), 5000)
    refused_and_gone(backend, folder, objects, stored)


def test_a_second_backend_on_the_folder_is_refused_until_the_first_is_closed(disk: Any, folder: Any) -> None:
    first = disk()
    (folder.tmp / "17").write_bytes(b"being written")
    with pytest.raises(ConfigError, match=r"in use by another LoRACache daemon.*choose another disk_path") as caught:
        DiskBackend(folder.path)
    assert str(folder.path) in str(caught.value)
    assert (folder.tmp / "17").exists()
    first.close()
    disk()


def test_a_path_that_is_no_folder_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "below", Path("/proc/loracache")):
        with pytest.raises(ConfigError, match="disk_path") as caught:
            DiskBackend(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [0, 15, 65])
def test_an_integrity_key_of_the_wrong_length_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(ConfigError, match="integrity_key"):
        DiskBackend(tmp_path, integrity_key=b"k" * length)


@pytest.mark.parametrize("planter", [None, b"other key of 32 bytes or so......"])
def test_an_object_planted_without_the_integrity_key_is_refused(
    disk: Any, objects: Any, folder: Any, tmp_path: Path, planter: bytes | None
) -> None:
    donor: DiskBackend = disk(tmp_path / "donor", integrity_key=planter)
    backend: DiskBackend = disk(integrity_key=b"k" * 32)
    planted, own = objects.new(9000), objects.new(9000)
    objects.store(donor, [planted])
    objects.store(backend, [own])
    os.rename(folder.at(donor.path).file(planted), folder.file(planted))
    list(backend.scan())
    refused_and_left(backend, folder, objects, planted)
    assert objects.holds(backend, own)


def test_the_integrity_key_covers_all_of_the_header(disk: Any, objects: Any, folder: Any) -> None:
    """An attacker who mends the CRC still lacks the key: a chunk cannot be moved to another namespace."""
    backend: DiskBackend = disk(integrity_key=b"k" * 32)
    stored = objects.new(9000)
    objects.store(backend, [stored])
    whole = folder.file(stored).read_bytes()
    forged = header.pack(replace(stored.info, namespace=bytes(32)), Encoded([]), None)
    fields = forged[: -header.MAC_BYTES - 4] + header.unpack(whole).mac
    folder.file(stored).write_bytes(fields + zlib.crc32(fields).to_bytes(4, "little") + whole[header.HEADER_BYTES :])
    refused_and_left(backend, folder, objects, stored)


def test_threads_share_one_backend_without_sharing_scratch(disk: Any, objects: Any) -> None:
    backend: DiskBackend = disk(integrity_key=b"k" * 32)
    own = [[objects.new(30_000) for _ in range(10)] for _ in range(4)]
    failures: list[BaseException] = []

    def work(mine: list[Transfer]) -> None:
        try:
            for transfer in mine:
                objects.store(backend, [transfer])
                assert objects.holds(backend, transfer)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures


def test_closing_a_backend_releases_every_descriptor(objects: Any, tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    backend = DiskBackend(tmp_path)
    objects.store(backend, [objects.new(9000)])
    list(backend.scan())
    backend.close()
    assert descriptors() == before
    with pytest.raises(ConfigError):
        DiskBackend("/proc/loracache")
    assert descriptors() == before
