# SPDX-License-Identifier: Apache-2.0
"""What the disk tier finds when it starts: after a restart, a crash, or damage to its manifest."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from loracache.storage_backends.base import Outcome
from loracache.storage_backends.disk import manifest
from loracache.storage_backends.disk.backend import DiskBackend

OK, MISS = Outcome.OK, Outcome.MISS
MANIFEST_HEADER = 32


def scanned(backend: DiskBackend) -> set[bytes]:
    return {info.key for info in backend.scan()}


def test_a_restart_finds_everything_without_reading_the_objects(disk: Any, objects: Any, folder: Any) -> None:
    first = disk()
    kept = [objects.new(size, pieces=2) for size in (0, 1, 5000, 300_000)]
    objects.store(first, kept)
    first.close()
    for transfer in kept:
        os.rename(folder.file(transfer), folder.file(transfer).with_suffix(".away"))
    second = disk()
    infos = [next(scan) for scan in [second.scan()] for _ in kept]
    assert infos == [transfer.info for transfer in kept]
    for transfer in kept:
        os.rename(folder.file(transfer).with_suffix(".away"), folder.file(transfer))
    assert all(objects.holds(second, transfer) for transfer in kept)


def test_a_missing_file_is_a_miss_and_stays_one(disk: Any, objects: Any, folder: Any) -> None:
    backend, lost, unlisted, kept = disk(), objects.new(9000), objects.new(9000), objects.new(1)
    objects.store(backend, [lost, unlisted, kept])
    folder.file(lost).unlink()
    assert objects.load(backend, lost) is MISS
    assert objects.found(backend, lost) is MISS
    backend.close()
    folder.file(unlisted).unlink()
    again = disk()
    assert objects.found(again, lost) is MISS
    list(again.scan())
    again.close()
    assert scanned(disk()) == {kept.info.key}


def test_a_file_of_the_wrong_size_is_dropped_by_the_scan(disk: Any, objects: Any, folder: Any) -> None:
    backend, cut, kept = disk(), objects.new(9000), objects.new(9000)
    objects.store(backend, [cut, kept])
    backend.close()
    os.truncate(folder.file(cut), 8192)
    again = disk()
    list(again.scan())
    assert objects.found(again, cut) is MISS
    assert folder.files() == [kept.info.key.hex()]


@pytest.mark.parametrize("damage", ["missing", "empty", "torn header", "not ours"])
def test_a_lost_manifest_is_rebuilt_from_the_files(disk: Any, objects: Any, folder: Any, damage: str) -> None:
    backend, root = disk(), objects.new(10)
    chain = [root]
    for _ in range(20):
        chain.append(objects.new(10, parent=chain[-1].info.key))
    objects.store(backend, chain)
    backend.close()
    path = folder.manifest
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "torn header": path.read_bytes()[:20], "not ours": b"#" * 500}[damage])
    again = disk()
    assert [info.key for info in again.scan()] == [transfer.info.key for transfer in chain]
    assert all(objects.holds(again, transfer) for transfer in chain)
    again.close()
    third = disk()
    assert [result.outcome for result in third.contains([transfer.info.key for transfer in chain])] == [OK] * len(chain)


@pytest.mark.parametrize("torn", [1, manifest.RECORD_BYTES - 1])
def test_a_torn_end_of_the_manifest_loses_nothing(disk: Any, objects: Any, folder: Any, torn: int) -> None:
    backend, first, last = disk(), objects.new(10), objects.new(9000)
    objects.store(backend, [first])
    objects.store(backend, [last])
    backend.close()
    os.truncate(folder.manifest, MANIFEST_HEADER + 2 * manifest.RECORD_BYTES - torn)
    again = disk()
    assert scanned(again) == {first.info.key, last.info.key}
    later = objects.new(20)
    objects.store(again, [later])
    again.close()
    third = disk()
    assert all(objects.found(third, transfer) is OK for transfer in (first, last, later))


def test_a_damaged_record_costs_no_other_and_its_parent_still_comes_first(disk: Any, objects: Any, folder: Any) -> None:
    backend, root = disk(), objects.new(10)
    child = objects.new(10, parent=root.info.key)
    other = objects.new(10)
    objects.store(backend, [root, child, other])
    backend.close()
    folder.flip(folder.manifest, MANIFEST_HEADER + 50)
    order = [info.key for info in disk().scan()]
    assert sorted(order) == sorted(transfer.info.key for transfer in (root, child, other))
    assert order.index(root.info.key) < order.index(child.info.key)


def test_a_crash_between_rename_and_record_loses_nothing(
    disk: Any, objects: Any, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, stored = disk(), objects.new(9000)
    monkeypatch.setattr(manifest.Manifest, "flush", lambda self: None)
    objects.store(backend, [stored])
    backend.close()
    monkeypatch.undo()
    again = disk()
    assert objects.found(again, stored) is MISS  # nobody told it yet ...
    assert objects.holds(again, stored)  # ... but the file is there
    assert scanned(again) == {stored.info.key}
    again.close()
    assert objects.found(disk(), stored) is OK


def test_strays_are_adopted_if_valid_and_deleted_if_not(disk: Any, objects: Any, folder: Any, tmp_path: Path) -> None:
    donor = disk(tmp_path / "donor")
    good, cut, misnamed = objects.new(9000), objects.new(9000), objects.new(9000)
    objects.store(donor, [good, cut, misnamed])
    backend = disk()
    for transfer in (good, cut):
        os.rename(folder.at(donor.path).file(transfer), folder.file(transfer))
    os.truncate(folder.file(cut), 4096)
    wrong_name = objects.new(1)
    os.rename(folder.at(donor.path).file(misnamed), folder.file(wrong_name))
    garbage = objects.new(1)
    folder.file(garbage).write_bytes(b"garbage")
    foreign = ["README", "abc", "ab" * 19]  # the last as another program names its objects
    for name in foreign:
        (folder.path / "objects" / "ab" / name).write_text("not ours")
    assert scanned(backend) == {good.info.key}
    assert folder.files() == sorted([*foreign, good.info.key.hex()])
    assert objects.holds(backend, good)


def test_leftover_files_of_a_crash_are_removed(disk: Any, folder: Any) -> None:
    disk().close()
    (folder.tmp / "17").write_bytes(b"half")
    (folder.path / "manifest.new").write_bytes(b"half")
    backend = disk()
    assert folder.files() == []
    assert scanned(backend) == set()


def test_a_mostly_dead_manifest_shrinks(disk: Any, objects: Any, folder: Any) -> None:
    backend, kept = disk(), objects.new(10)
    objects.store(backend, [kept])
    churned = objects.new(10)
    for _ in range(700):
        objects.store(backend, [churned])
        backend.delete([churned.info.key])
    assert (folder.manifest).stat().st_size < 1100 * manifest.RECORD_BYTES
    backend.close()
    again = disk()
    assert scanned(again) == {kept.info.key}
    objects.store(again, [churned])
    again.close()
    assert scanned(disk()) == {kept.info.key, churned.info.key}


def test_an_unwritable_manifest_fails_no_item_and_catches_up(
    disk: Any, objects: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, first, second = disk(), objects.new(10), objects.new(10)

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "refused")

    monkeypatch.setattr("loracache.storage_backends.disk.manifest.os.write", refuse)
    objects.store(backend, [first])
    monkeypatch.undo()
    objects.store(backend, [second])
    backend.close()
    again = disk()
    assert [objects.found(again, transfer) for transfer in (first, second)] == [OK, OK]


def test_scan_beside_stores_and_deletes_neither_loses_nor_invents(disk: Any, objects: Any) -> None:
    backend = disk()
    kept, doomed, late = ([objects.new(10) for _ in range(20)] for _ in range(3))
    objects.store(backend, kept + doomed)
    ended = threading.Event()

    def churn() -> None:
        while not ended.is_set():
            objects.store(backend, late)
            backend.delete([transfer.info.key for transfer in late])

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        scan = backend.scan()
        first = next(scan)
        backend.delete([transfer.info.key for transfer in doomed])
        found = {first.key} | {info.key for info in scan}
    finally:
        ended.set()
        thread.join(30)
    assert {transfer.info.key for transfer in kept} <= found
    assert not found & {transfer.info.key for transfer in doomed}
    objects.store(backend, late)
    assert all(objects.holds(backend, transfer) for transfer in kept + late)
