# SPDX-License-Identifier: Apache-2.0
"""Measures once per device from which size on fragments go straight, and keeps that in $XDG_CACHE_HOME/loracache."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from loracache.kernels.page_copy.choice import Choice
from loracache.kernels.page_copy.cubin import cache_folder, write_whole
from loracache.kernels.page_copy.device import Device, Direction
from loracache.kernels.page_copy.fragments import Fragments, Integers
from loracache.kernels.page_copy.lane import Lane

__all__ = ["choice_of", "measure"]

_VERSION = 1  # of the file, and of the kernels that it was measured with
_SIZES = tuple(1 << power for power in range(12, 18))  # 4 KiB to 128 KiB
_BYTES = 16 << 20  # of a copy
_ROUNDS = 3
_LONGEST_S = 0.4
_UNMEASURED = 64 << 10  # where the copy engines of an H100 reach 51 GB/s, as others measured
_STRAIGHT, _BOUNCING = Choice(0, 0), Choice(1 << 62, 1 << 62)


def choice_of(device: Device) -> Choice:
    """The choice for a device: as was measured before, or as is measured now."""
    path = cache_folder() / f"{device.identity}.json"
    try:
        kept = json.loads(path.read_bytes())
        found = Choice(kept["loads"], kept["stores"])
        if kept["version"] == _VERSION and all(type(each) is int and each >= 0 for each in (found.loads, found.stores)):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found, seconds = measure(device)
    kept = {"version": _VERSION, "loads": found.loads, "stores": found.stores, "seconds": seconds}
    write_whole(path, json.dumps(kept, indent=1).encode())
    return found


def measure(device: Device, sizes: tuple[int, ...] = _SIZES, nbytes: int = _BYTES) -> tuple[Choice, dict[str, Any]]:
    """Copy `nbytes` in fragments of each size either way; answers the choice, and seconds by direction and size."""
    began = time.monotonic()
    memory, host = device.allocate(nbytes), device.allocate_host(nbytes)
    seconds: dict[str, Any] = {}
    below = {}
    for direction in Direction:
        lanes = [Lane(device, direction, way) for way in (_STRAIGHT, _BOUNCING)]
        edges = np.array([host.address, host.address + nbytes], np.int64)
        measured: dict[int, list[float]] = {}
        for size in reversed(sizes):  # the large ones decide least, and take least
            fragments = _shuffled(memory.address, host.address, size, nbytes)
            if time.monotonic() - began > (_LONGEST_S if direction is Direction.STORE else _LONGEST_S / 2):
                break
            measured[size] = [min(_seconds(device, lane, fragments, edges) for _ in range(_ROUNDS)) for lane in lanes]
        below[direction] = _threshold(measured)
        seconds[direction.value] = {str(size): times for size, times in measured.items()}
    return Choice(below[Direction.LOAD], below[Direction.STORE]), seconds


def _threshold(measured: dict[int, list[float]]) -> int:
    """The size from which on straight copies are at least as fast."""
    if not measured:
        return _UNMEASURED
    threshold = 2 * max(measured)
    for size in sorted(measured, reverse=True):
        straight, bouncing = measured[size]
        if straight > bouncing:
            break
        threshold = size
    return threshold


def _shuffled(device: int, host: int, size: int, nbytes: int) -> Fragments:
    places = np.arange(nbytes // size) * size
    return Fragments(
        device + np.random.default_rng(1).permutation(places), host + places, np.full(len(places), size, np.int64)
    )


def _seconds(device: Device, lane: Lane, fragments: Fragments, edges: Integers) -> float:
    began = time.perf_counter()
    lane.submit(fragments, edges, None)
    device.synchronize(lane.end(device.event()))
    return time.perf_counter() - began
