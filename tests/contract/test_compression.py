# SPDX-License-Identifier: Apache-2.0
"""Compression as base.py promises it: lossless, seen in `stored` alone, and changed in one step; for every backend."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loracache.storage_backends.base import ObjectInfo, Outcome, StorageBackend, Transfer
from loracache.storage_backends.codec import PLANES
from loracache.storage_backends.memory import MemoryBackend
from loracache.storage_backends.redis.backend import RedisBackend

OK, MISS, FAILED = Outcome.OK, Outcome.MISS, Outcome.FAILED
SIZES = [0, 1, 4095, 4096, 9001, (1 << 20) + 3, 5 << 20]


def stored(backend: StorageBackend, transfer: Transfer) -> int:
    """Stores it and answers what it takes, on which `store` and `contains` agree."""
    (result,) = backend.store([transfer])
    assert result.outcome is OK, result
    assert held(backend, transfer).stored == result.stored
    return result.stored


def held(backend: StorageBackend, transfer: Transfer) -> ObjectInfo:
    (found,) = backend.contains([transfer.info.key])
    assert found.info is not None
    return found.info


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("pieces", [1, 37])
def test_what_was_compressed_is_loaded_byte_for_byte(
    backend: StorageBackend, objects: Any, planes: int, pieces: int
) -> None:
    for size in SIZES:
        transfer = objects.keep(objects.new(size, compressible=True, pieces=pieces), planes)
        taken = stored(backend, transfer)
        assert not taken or backend.footprint(taken) < backend.footprint(size)
        assert size < 9001 or 0 < taken < 0.7 * size
        for other in (1, 3, 37):
            target = objects.empty(transfer, pieces=other)
            assert backend.load([target])[0].outcome is OK
            assert objects.payload(target) == objects.payload(transfer)


def test_contains_and_scan_tell_what_is_stored_and_all_else_of_the_info(backend: StorageBackend, objects: Any) -> None:
    root, noise = objects.new(50_000, compressible=True), objects.new(50_000)
    child = objects.new(50_000, compressible=True, parent=root.info.key)
    batch = [objects.keep(root, 2), objects.keep(noise, 2), child]
    results = backend.store(batch)
    infos = [replace(each.info, stored=result.stored) for each, result in zip(batch, results, strict=True)]
    assert [bool(info.stored) for info in infos] == [True, False, False]
    assert [result.info for result in backend.contains([each.info.key for each in batch])] == infos
    if not isinstance(backend, RedisBackend):
        assert set(backend.scan()) == set(infos)


def test_noise_is_kept_as_it_is(backend: StorageBackend, objects: Any) -> None:
    for size, planes in itertools.product([1, 4096, 1 << 20, (3 << 20) + 1], PLANES):
        noise = objects.keep(objects.new(size), planes)
        assert stored(backend, noise) == 0
        assert objects.holds(backend, noise)


def test_storing_again_changes_how_an_object_is_kept(backend: StorageBackend, objects: Any) -> None:
    transfer = objects.new(700_001, compressible=True, pieces=3)
    taken = {0: 0}
    for planes in (0, 2, 0, 4, 2, 2, 1, 0, 8, 4, 0):
        now = stored(backend, objects.keep(transfer, planes))
        assert bool(now) is bool(planes)
        assert taken.setdefault(planes, now) == now
        for claimed in (0, now, 17, 1 << 40):  # what callers believe binds nobody
            assert objects.holds(backend, replace(transfer, info=replace(transfer.info, stored=claimed), planes=8))
            assert held(backend, transfer).stored == now
    assert backend.delete([transfer.info.key])[0].outcome is OK
    assert not objects.holds(backend, transfer)


def test_an_unknown_number_of_planes_fails_the_item_and_no_other(backend: StorageBackend, objects: Any) -> None:
    items = [objects.keep(objects.new(9000, compressible=True), planes) for planes in (2, 3, -1, 16, 4)]
    results = backend.store(items)
    assert [result.outcome for result in results] == [OK, FAILED, FAILED, FAILED, OK]
    assert "planes is 3" in results[1].detail
    assert [objects.holds(backend, item) for item in (items[0], items[4])] == [True, True]
    assert objects.found(backend, items[1]) is MISS


def test_a_compressed_object_is_not_taken_for_another(backend: StorageBackend, objects: Any) -> None:
    transfer = objects.keep(objects.new(300_000, compressible=True), 2)
    objects.store(backend, [transfer])
    assert objects.load(backend, objects.unmatched(transfer)) is Outcome.CORRUPT
    assert objects.load(backend, transfer) is MISS
    assert backend.store([objects.unmatched(transfer)])[0].outcome is Outcome.CORRUPT
    assert objects.found(backend, transfer) is MISS


def test_readers_of_an_object_that_changes_all_the_time_see_its_bytes(backend: StorageBackend, objects: Any) -> None:
    shared = [objects.new(size, compressible=True, pieces=2) for size in (9_001, 900_000, (1 << 20) + 3)]
    objects.store(backend, shared)
    ended, failures = threading.Event(), []

    def read() -> None:
        while not ended.is_set():
            targets = [objects.empty(transfer, pieces=2) for transfer in shared]
            for result, target, transfer in zip(backend.load(targets), targets, shared, strict=True):
                if result.outcome is not OK:
                    failures.append(str(result))
                elif objects.payload(target) != objects.payload(transfer):
                    failures.append("loaded other bytes than were stored")

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for planes in (2, 0, 4, 8, 0, 1) * 6:
            objects.store(backend, [objects.keep(transfer, planes) for transfer in shared])
    finally:
        ended.set()
        for reader in readers:
            reader.join(30)
    assert failures == []
    assert all(objects.holds(backend, transfer) for transfer in shared)


def test_writers_of_both_kinds_at_once_leave_one_of_them_whole(backend: StorageBackend, objects: Any) -> None:
    transfer = objects.new(600_000, compressible=True)
    failures: list[Any] = []

    def write(planes: int) -> None:
        for _ in range(10):
            failures.extend(
                result for result in backend.store([objects.keep(transfer, planes)]) if result.outcome != OK
            )

    writers = [threading.Thread(target=write, args=(planes,)) for planes in (0, 2, 4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert failures == []
    assert objects.holds(backend, transfer)


REWRITE_FOR_EVER = """
import itertools, mmap, random, sys
import xxhash
from loracache.storage_backends.base import Kind, ObjectInfo, Outcome, Transfer, padded
from loracache.storage_backends.disk.backend import DiskBackend
from loracache.storage_backends.redis.backend import RedisBackend
which, where, seed, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
backend = DiskBackend(where) if which == "disk" else RedisBackend(where, segment_bytes=1 << 18)
content = bytes(byte & 15 for byte in random.Random(seed).randbytes(size))
view = memoryview(mmap.mmap(-1, padded(size)))
view[:size] = content
info = ObjectInfo(bytes([7]) * 32, b"", Kind.KV, bytes(32), size, xxhash.xxh3_64_intdigest(content))
for number in itertools.count():
    (result,) = backend.store([Transfer(info, [view], (0, 2, 4)[number % 3])])
    assert result.outcome is Outcome.OK, result
    if number < 3:
        print(result.stored, flush=True)
"""


def killed_writer(tmp_path: Path, objects: Any, which: str, where: str, after: float) -> Transfer:
    """Rewrites an object until it is killed in the middle of that; returns the object."""
    size = (2 << 20) + 5
    arguments = [sys.executable, "-c", REWRITE_FOR_EVER, which, where, "5", str(size)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    with subprocess.Popen(arguments, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        taken = [int(writer.stdout.readline()) for _ in range(3)]
        assert taken[0] == 0 < taken[1]
        threading.Event().wait(after)
        assert writer.poll() is None
        writer.kill()
    content = bytes(byte & 15 for byte in random.Random(5).randbytes(size))
    stored: Transfer = objects.of(content, key=bytes([7]) * 32)
    return stored


@pytest.mark.parametrize("after", [0.0, 0.011, 0.023, 0.037])
def test_a_killed_writer_leaves_one_of_both_on_disk(tmp_path: Path, objects: Any, disk: Any, after: float) -> None:
    transfer = killed_writer(tmp_path, objects, "disk", str(tmp_path / "disk"), after)
    backend = disk()
    list(backend.scan())
    assert objects.found(backend, transfer) is OK
    assert objects.holds(backend, transfer)


@pytest.mark.parametrize("after", [0.0, 0.011, 0.023, 0.037])
def test_a_killed_writer_leaves_one_of_both_in_redis(
    tmp_path: Path, objects: Any, any_redis: Any, redis_tier: Any, after: float
) -> None:
    transfer = killed_writer(tmp_path, objects, "redis", any_redis.url, after)
    assert objects.holds(redis_tier(any_redis.url), transfer)


def test_memory_counts_what_is_stored(objects: Any) -> None:
    backend = MemoryBackend(capacity=100_000)
    first, second = (objects.new(100_000, compressible=True) for _ in range(2))
    objects.store(backend, [first])
    assert backend.store([objects.keep(second, 2)])[0].outcome is Outcome.FULL
    assert 0 < stored(backend, objects.keep(first, 2)) < 60_000
    small = objects.new(30_000)
    objects.store(backend, [small])
    assert backend.store([first])[0].outcome is Outcome.FULL
    assert objects.holds(backend, first)
    backend.delete([first.info.key, small.info.key])
    objects.store(backend, [second])
