# SPDX-License-Identifier: Apache-2.0
"""The promises of base.py, kept by every backend."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loracache.storage_backends.base import Kind, ObjectInfo, Outcome, Purge, Purpose, StorageBackend, Transfer
from loracache.storage_backends.disk.backend import DiskBackend
from loracache.storage_backends.memory import MemoryBackend
from loracache.storage_backends.redis.backend import RedisBackend

OK, MISS, CORRUPT, FAILED = Outcome.OK, Outcome.MISS, Outcome.CORRUPT, Outcome.FAILED
SIZES = [0, 1, 4095, 4096, 4097, 64 << 10, (64 << 10) + 1, 256 << 10, (256 << 10) + 1, (1 << 20) + 1, 3 << 20]


def outcomes(results: list[Any]) -> list[Outcome]:
    return [result.outcome for result in results]


@pytest.mark.parametrize("pieces", [1, 3, 2000])
def test_what_was_stored_is_loaded_byte_for_byte(backend: StorageBackend, objects: Any, pieces: int) -> None:
    sizes = [12 << 20] if pieces > 1024 else SIZES  # more pieces than one system call takes
    stored = [objects.new(size, pieces=pieces) for size in sizes]
    objects.store(backend, stored)
    for other in (1, 2, pieces):
        targets = [objects.empty(transfer, pieces=other) for transfer in stored]
        assert outcomes(backend.load(targets)) == [OK] * len(stored)
        assert [objects.payload(target) for target in targets] == [objects.payload(transfer) for transfer in stored]


def test_contains_answers_with_all_of_the_objects_info(backend: StorageBackend, objects: Any) -> None:
    adapter = objects.new(5000)
    chunk = objects.new(100, parent=adapter.info.key)
    objects.store(backend, [adapter, chunk])
    results = backend.contains([chunk.info.key, bytes(32), adapter.info.key])
    assert outcomes(results) == [OK, MISS, OK]
    assert [result.info for result in results] == [chunk.info, None, adapter.info]


@pytest.mark.parametrize("kind", list(Kind))
def test_an_object_is_of_the_kind_that_it_was_stored_as(backend: StorageBackend, objects: Any, kind: Kind) -> None:
    made = objects.new(100, parent=bytes(range(32)))
    stored = Transfer(replace(made.info, kind=kind), made.buffers)
    objects.store(backend, [stored])
    assert backend.contains([stored.info.key])[0].info == stored.info
    assert list(backend.scan()) == ([] if isinstance(backend, RedisBackend) else [stored.info])


def test_empty_batches_have_empty_answers(backend: StorageBackend) -> None:
    assert backend.contains([]) == backend.load([]) == backend.store([]) == backend.delete([]) == []


def test_nothing_is_found_before_it_is_stored(backend: StorageBackend, objects: Any) -> None:
    wanted = objects.new(9000)
    assert objects.found(backend, wanted) is MISS
    assert objects.load(backend, wanted) is MISS
    assert outcomes(backend.delete([wanted.info.key])) == [MISS]


def test_a_bad_item_fails_itself_and_no_other_of_its_store(backend: StorageBackend, objects: Any) -> None:
    first, unmatched, short, last = (objects.new(600_000) for _ in range(4))
    cut = Transfer(short.info, [short.buffers[0][:4096]])
    odd = Transfer(ObjectInfo(b"short key", b"", last.info.kind, bytes(32), 1, 0), objects.new(1).buffers)
    results = backend.store([first, objects.unmatched(unmatched), cut, odd, last])
    assert outcomes(results) == [OK, CORRUPT, FAILED, FAILED, OK]
    assert all(result.detail for result in results[1:4])
    assert [objects.holds(backend, transfer) for transfer in (first, unmatched, short, last)] == [
        True,
        False,
        False,
        True,
    ]


def test_a_bad_item_fails_itself_and_no_other_of_its_load(backend: StorageBackend, objects: Any) -> None:
    first, other, last = (objects.new(600_000, pieces=2) for _ in range(3))
    never = objects.new(600_000)
    objects.store(backend, [first, other, last])
    targets = [objects.empty(item) for item in (first, never, objects.unmatched(other), last)]
    targets.insert(1, Transfer(never.info, []))
    assert outcomes(backend.load(targets)) == [OK, FAILED, MISS, CORRUPT, OK]
    assert objects.payload(targets[0]) == objects.payload(first)
    assert objects.payload(targets[4]) == objects.payload(last)


def test_a_bad_item_fails_itself_and_no_other_of_its_delete(backend: StorageBackend, objects: Any) -> None:
    first, last = objects.new(600_000), objects.new(1)
    objects.store(backend, [first, last])
    assert outcomes(backend.delete([first.info.key, bytes(32), last.info.key, last.info.key])) == [OK, MISS, OK, MISS]
    assert outcomes(backend.contains([first.info.key, last.info.key])) == [MISS, MISS]
    assert objects.load(backend, first) is MISS


def test_a_payload_that_does_not_match_its_checksum_is_not_stored(backend: StorageBackend, objects: Any) -> None:
    wrong = objects.unmatched(objects.new(70_000))
    assert outcomes(backend.store([wrong])) == [CORRUPT]
    assert objects.found(backend, wrong) is MISS
    assert objects.load(backend, wrong) is MISS


@pytest.mark.parametrize("what", ["checksum", "size"])
def test_what_is_not_as_expected_is_corrupt_and_deleted(backend: StorageBackend, objects: Any, what: str) -> None:
    stored = objects.new(300_000)
    objects.store(backend, [stored])
    larger = Transfer(replace(stored.info, size=300_001), stored.buffers)
    expected = objects.unmatched(stored) if what == "checksum" else larger
    assert objects.load(backend, expected) is CORRUPT
    assert objects.found(backend, stored) is MISS
    assert objects.load(backend, stored) is MISS
    objects.store(backend, [stored])
    assert objects.holds(backend, stored)


def test_storing_twice_is_storing_once(backend: StorageBackend, objects: Any) -> None:
    stored = objects.new(600_000)
    objects.store(backend, [stored, stored])
    objects.store(backend, [stored])
    assert objects.holds(backend, stored)
    assert outcomes(backend.delete([stored.info.key])) == [OK]
    assert not objects.holds(backend, stored)


def test_what_lies_behind_the_payload_is_no_part_of_the_object(backend: StorageBackend, objects: Any) -> None:
    stored = objects.new(5000)
    objects.store(backend, [stored])
    stored.buffers[0][5000:] = bytes(len(stored.buffers[0]) - 5000)
    objects.store(backend, [stored])
    assert objects.holds(backend, stored)


def test_the_footprint_covers_the_payload(backend: StorageBackend) -> None:
    assert all(backend.footprint(size) >= size for size in SIZES)


def test_threads_on_the_same_keys_see_each_object_whole_or_not_at_all(backend: StorageBackend, objects: Any) -> None:
    shared = [objects.new(size, pieces=2) for size in (1, 5000, 600_000, 900_000)]
    failures: list[str] = []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        for turn in range(12):
            mine = shared[(number + turn) % 4 :] + shared[: (number + turn) % 4]
            if number == 0 and turn % 3 == 0:
                found = outcomes(backend.delete([transfer.info.key for transfer in mine]))
                allowed = {OK, MISS}
            elif number % 2:
                found, allowed = outcomes(backend.store(mine)), {OK}
            else:
                targets = [objects.empty(transfer) for transfer in mine]
                found, allowed = outcomes(backend.load(targets)), {OK, MISS}
                for outcome, target, transfer in zip(found, targets, mine, strict=True):
                    if outcome is OK and objects.payload(target) != objects.payload(transfer):
                        failures.append("loaded other bytes than were stored")
            if not set(found) <= allowed:
                failures.append(f"thread {number}: {found}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    objects.store(backend, shared)
    assert all(objects.holds(backend, transfer) for transfer in shared)


ACTIONS = st.lists(st.tuples(st.sampled_from(["store", "load", "delete", "contains"]), st.integers(0, 5)), max_size=25)


@given(actions=ACTIONS)
@settings(max_examples=25)
def check_against_a_dict(fresh: Callable[[], StorageBackend], objects: Any, actions: list[tuple[str, int]]) -> None:
    """A backend answers as a dict would, whatever is asked in whatever order, and again after a restart."""
    pool = [objects.new(size, key=bytes([size % 251]) * 32) for size in (0, 1, 4096, 5000, 300_000, 262_144)]
    held: set[int] = set()
    backend = fresh()
    backend.delete([transfer.info.key for transfer in pool])
    for action, number in actions:
        transfer = pool[number]
        expected = OK if number in held else MISS
        if action == "store":
            objects.store(backend, [transfer])
            held.add(number)
        elif action == "load":
            assert objects.holds(backend, transfer) is (number in held)
        elif action == "delete":
            assert outcomes(backend.delete([transfer.info.key])) == [expected]
            held.discard(number)
        else:
            assert objects.found(backend, transfer) is expected
    if not isinstance(backend, MemoryBackend):
        backend.close()
        backend = fresh()
    assert [objects.holds(backend, transfer) for transfer in pool] == [number in held for number in range(len(pool))]
    if not isinstance(backend, RedisBackend):
        assert {info.key for info in backend.scan()} == {pool[number].info.key for number in held}
    backend.close()


def test_memory_behaves_as_a_dict(objects: Any) -> None:
    check_against_a_dict(MemoryBackend, objects)


def test_disk_behaves_as_a_dict(objects: Any, tmp_path: Any) -> None:
    check_against_a_dict(lambda: DiskBackend(tmp_path), objects)


def test_redis_behaves_as_a_dict(objects: Any, redis_server: Callable[[], Any]) -> None:
    server = redis_server()
    check_against_a_dict(lambda: RedisBackend(server.url, segment_bytes=100_000), objects)


def test_scan_yields_what_is_held_and_parents_before_their_children(backend: StorageBackend, objects: Any) -> None:
    if isinstance(backend, RedisBackend):
        pytest.skip("what Redis holds is found by asking")
    root = objects.new(10)
    child = objects.new(10, parent=root.info.key)
    grandchild = objects.new(10, parent=child.info.key)
    gone = objects.new(10)
    objects.store(backend, [root, child, grandchild, gone])
    backend.delete([gone.info.key])
    assert list(backend.scan()) == [root.info, child.info, grandchild.info]


def test_redis_scan_yields_nothing(objects: Any, redis_server: Callable[[], Any], redis_tier: Any) -> None:
    backend = redis_tier(redis_server().url)
    objects.store(backend, [objects.new(10)])
    assert list(backend.scan()) == []


def test_a_purge_leaves_nothing_of_a_namespace_that_only_asking_finds(backend: StorageBackend, objects: Any) -> None:
    """What `scan` yields is the cache's own to delete; what it does not is removed by `purge`, and nothing else is."""
    mine, other, nobodys = (objects.new(size) for size in (600_000, 5000, 10))
    spaces = [bytes([number]) * 32 for number in range(3)]
    stored = [
        replace(each, info=replace(each.info, namespace=space))
        for each, space in zip((mine, other, nobodys), spaces, strict=True)
    ]
    objects.store(backend, stored)
    did = Purge()
    backend.purge(Purpose({spaces[0]}, {spaces[1]}), did, lambda: True)
    found = outcomes(backend.contains([each.info.key for each in stored]))
    if not isinstance(backend, RedisBackend):
        assert (did, found) == (Purge(), [OK, OK, OK])
        return
    assert did == Purge(objects=1, nbytes=600_000, undescribed=1, present={spaces[1]})
    assert found == [MISS, OK, OK]
    backend.purge(Purpose(), everything := Purge(), lambda: True)
    assert (everything.objects, everything.error) == (2, "")
    assert outcomes(backend.contains([each.info.key for each in stored])) == [MISS, MISS, MISS]


def test_memory_answers_full_and_keeps_what_it_has(objects: Any) -> None:
    backend = MemoryBackend(capacity=1000)
    first, second = objects.new(600), objects.new(600)
    assert outcomes(backend.store([first, second, first])) == [OK, Outcome.FULL, OK]
    backend.delete([first.info.key])
    assert outcomes(backend.store([second])) == [OK]
