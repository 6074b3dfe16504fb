# SPDX-License-Identifier: Apache-2.0
"""Names of what left: which are remembered, how many, and that none of them is an object that keeps memory."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import OrderedDict

import pytest

from loracache.cache.policy.ghosts import PLACES, Ghosts
from loracache.cache.policy.names import Names


def names_of(count: int, seed: int = 0) -> list[int]:
    chance = random.Random(seed)
    return [chance.getrandbits(64) - (1 << 63) for _ in range(count)]


@pytest.mark.parametrize("wide", [False, True])
def test_a_name_is_remembered_with_its_last_number(wide: bool) -> None:
    names, many = Names(wide=wide), names_of(20_000)
    largest = (1 << 32) - 2 if wide else 254
    for each in many:
        names.add(each, 0, largest)
    for number, each in enumerate(many[:100]):
        names.add(each, 0, number)
    assert [names.get(each) for each in many] == [*range(100), *[largest] * 19_900]
    assert many[0] in names
    assert not [each for each in names_of(20_000, seed=1) if each in names]
    assert len(names) == 20_000


def test_a_name_that_is_taken_is_forgotten_and_no_other() -> None:
    names, many = Names(), names_of(5_000)
    for each in many:
        names.add(each, 0, 3)
    assert {names.take(each) for each in many[::2]} == {3}
    assert {names.take(each) for each in many[::2]} == {-1}
    assert {names.get(each) for each in many[1::2]} == {3}
    assert len(names) == 2_500


@pytest.mark.parametrize("wide", [False, True])
def test_a_name_that_comes_again_has_one_more_each_time_up_to_the_most(wide: bool) -> None:
    names, model = Names(least=1 << 13, wide=wide), Names(least=1 << 13, wide=wide)
    chance, many = random.Random(0), names_of(6_000)
    for _ in range(40_000):
        each = chance.choice(many)
        number = min(model.get(each) + 1, 3)
        model.add(each, 0, number)
        assert names.again(each, 3) == number
    assert (names._table, len(names)) == (model._table, len(model))


@pytest.mark.parametrize(("objects", "most"), [(0, 1 << 13), (2_500, 20_000)])
def test_the_oldest_are_forgotten_when_there_are_too_many(objects: int, most: int) -> None:
    names, many = Names(least=1 << 13), names_of(3 * most)
    for each in many:
        names.add(each, objects)
    assert most // 2 < len(names) <= most
    found = [each in names for each in many]
    assert sum(found[-most // 3 :]) > 0.99 * (most // 3)
    assert sum(found[:most]) < 0.01 * most
    assert sys.getsizeof(names._table) <= 8 * most


def test_next_to_none_is_forgotten_while_they_are_few() -> None:
    names, many = Names(least=1 << 13), names_of(5_600)
    for each in many:
        names.add(each, 0)
    assert sum(each in names for each in many) > 0.998 * len(many)


def test_a_table_that_doubles_moves_few_names_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    split, calls = Names._split_next, 0

    def count(names: Names) -> None:
        nonlocal calls
        calls += 1
        split(names)

    monkeypatch.setattr(Names, "_split_next", count)
    names = Names()
    for number, each in enumerate(names_of(20_000), start=1):
        names.add(each, 0)
        assert calls <= number
    assert calls > 250


def test_ghosts_are_the_last_within_the_limit_in_the_order_in_which_they_left() -> None:
    chance = random.Random(0)
    ghosts, model = Ghosts(1 << 12), OrderedDict[int, int]()
    for _ in range(20_000):
        if model and chance.random() < 0.3:
            place = chance.choice([next(iter(model)), *chance.sample(list(model), 1)])
            assert ghosts.take(place) == model.pop(place)
            assert ghosts.take(place) == 0
        nbytes, limit = chance.randrange(1, 100), chance.choice([5_000, 20_000])
        model[ghosts.add(nbytes, limit)] = nbytes
        while len(model) > 1 and sum(model.values()) > limit:
            assert ghosts.take(model.popitem(last=False)[0]) == 0
        assert (len(ghosts), ghosts.nbytes) == (len(model), sum(model.values()))


def test_ghosts_take_no_more_places_than_they_may_and_count_them_anew() -> None:
    ghosts = Ghosts(256)
    ghosts._next = ghosts._oldest = PLACES - 100
    places = [ghosts.add(1, 1 << 40) for _ in range(1000)]
    assert len(ghosts) == len(ghosts._sizes) == 256
    assert [ghosts.take(place) for place in places] == [0] * 744 + [1] * 256
    for _ in range(10_000):  # each comes again at once
        assert ghosts.take(ghosts.add(1, 1 << 40)) == 1
    assert len(ghosts._sizes) == 256


CLEARED = """
import gc, os, re, sys
from loracache.cache.policy import ADMISSIONS, POLICIES
from loracache.cache.policy.limits import Quotas
from loracache.cache.state.index import Index
from loracache.cache.state.slices import Slices, whole
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier

policy, admission = sys.argv[1:]
policies = {}
index = Index(lambda tier, node: policies[tier].offer(node), lambda extents: None)
Quotas(index, policies, Slices(lambda call: None)).add(Tier.CPU, POLICIES[policy], lambda node: node.size, 1 << 40)
admit = ADMISSIONS[admission](lambda: index.objects[Tier.CPU], lambda: index.objects[Tier.CPU], lambda: 1 << 20)

def resident():
    return int(re.search(r"Anonymous:\\s+(\\d+)", open("/proc/self/smaps_rollup").read())[1])

def serve(keys):
    policies[Tier.CPU].asked(keys)
    admit.asked(keys, index.leading(keys, 1 << Tier.CPU))
    for _ in admit.work():
        pass
    for key in keys:
        node = index.insert(ObjectInfo(key, b"", Kind.KV, bytes(32), 100, 0))
        if not node.held_in(Tier.CPU):
            index.enter(node, Tier.CPU)
            admit.came(node)

empty = resident()
held = []
for number in range(400):
    keys = [os.urandom(32) for _ in range(100)]
    serve(keys)
    held += keys
    index.shrink()
    if number > 300:  # it is full: what was there first goes, and some of it comes again
        for node in whole(policies[Tier.CPU].victims(10_000))[0]:
            index.leave(node, Tier.CPU)
        if not number % 10:
            serve(held[:100])
del held[:], keys, node
full = resident()
for node in list(index):
    index.leave(node, Tier.CPU)
del node
index.shrink()
for _ in admit.work():
    pass
gc.collect()
print((resident() - empty) / (full - empty))
"""


@pytest.mark.parametrize(
    ("policy", "admission"),
    [("adaptive", "all"), ("s3fifo", "all"), ("lru", "second_touch"), ("lru", "adaptive")],
)
def test_after_a_clear_little_memory_is_kept_for_names(policy: str, admission: str) -> None:
    """Names lie among the objects that they name: one of them keeps a MiB of memory that is free otherwise."""
    environment = os.environ | {"PYTHONMALLOC": "pymalloc"}
    script = [sys.executable, "-c", CLEARED, policy, admission]
    kept = float(subprocess.run(script, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout)
    assert kept < 0.4
