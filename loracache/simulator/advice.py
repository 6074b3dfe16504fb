# SPDX-License-Identifier: Apache-2.0
"""Which memory, disk and policy a trace is worth: a curve over sizes, and the cheapest point that is nearly the best.

A point's worth is the share of the engines' prefill time that it saves. Of all points whose worth is within some
percent of the best one's, the cheapest by the prices of memory and disk is recommended. To end in bounded time it looks
at a sample of the chains (sampling.py), where the trace is long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from loracache.simulator.clock import Hardware
from loracache.simulator.replay import replay
from loracache.simulator.request import Request
from loracache.simulator.sampling import Sample, sampled, working_set
from loracache.simulator.store import Sizes, Way

__all__ = ["Advice", "Point", "Prices", "advise", "sizes_for"]

_HALVINGS = 7  # memory from the working set down to a 128th of it
_SMALLEST = 64 << 20
_MOST_BLOCKS = 4_000_000  # of all runs together: about a minute
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Prices:
    """Of a GiB of memory and of disk, in whatever money."""

    memory: float
    disk: float

    def of(self, memory: int, disk: int) -> float:
        """Of so many bytes."""
        return (memory * self.memory + disk * self.disk) / _GIB


@dataclass(frozen=True, slots=True)
class Point:
    """One run: sizes in bytes of the whole trace, and what it finds and saves."""

    memory: int
    disk: int
    policy: str
    hit_rate: float
    saved: float
    ttft_mean: float
    price: float

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Advice:
    """best: what is recommended; None where nothing saves anything. points: the curve. working_set: bytes of all that
    is asked for. sample: the share of the chains that was looked at."""

    best: Point | None
    points: Sequence[Point]
    working_set: int
    sample: float

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        best = self.best.as_dict() if self.best is not None else None
        return {
            "recommended": best, "sample": self.sample, "working_set": self.working_set,
            "points": [point.as_dict() for point in self.points],
        }  # fmt: skip


def sizes_for(working_set_bytes: int) -> list[int]:
    """Powers of two, from a 128th of the working set to all of it."""
    largest = max(_SMALLEST, 1 << (working_set_bytes - 1).bit_length())
    return sorted({max(_SMALLEST, largest >> halving) for halving in range(_HALVINGS + 1)})


def advise(
    requests: Sequence[Request],
    token_bytes: int,
    adapters: Sequence[int],
    ways: Sequence[Way],
    memories: Sequence[int],
    disks: Sequence[int],
    prices: Prices,
    within: float,
) -> Advice:
    """Replay all combinations. within: percent that the recommended point may be worth less than the best. No
    memories: those of `sizes_for`; no disks: none, and room for a quarter and for all of the working set."""
    everything = working_set(requests, token_bytes, adapters)
    memories = memories or sizes_for(everything)
    disks = disks or [0, memories[-1] // 4, memories[-1]]
    sample = sampled(requests, _MOST_BLOCKS / (len(ways) * len(memories) * len(disks)), token_bytes)
    sizes = [(memory, disk) for disk in disks for memory in memories]
    points = list(_points(sample, token_bytes, adapters, ways, sizes, prices))
    worth = max(point.saved for point in points) * (1 - within / 100)
    good = [point for point in points if point.saved >= worth > 0]
    best = min(good, key=lambda point: (point.price, -point.saved), default=None)
    return Advice(best, points, everything, sample.share)


def _points(
    sample: Sample,
    token_bytes: int,
    adapters: Sequence[int],
    ways: Sequence[Way],
    sizes: Sequence[tuple[int, int]],
    prices: Prices,
) -> Iterator[Point]:
    smaller = [int(nbytes * sample.share) for nbytes in adapters]
    hardware = Hardware()
    alone = sum(_alone(request, adapters, hardware) for request in sample.requests) / len(sample.requests)
    for way in ways:
        for memory, disk in sizes:
            scaled = Sizes(sample.scaled(memory), sample.scaled(disk), token_bytes, smaller)
            run = replay(sample.requests, scaled, way, hardware=hardware)
            saved = 1 - run.busy_mean / alone
            yield Point(memory, disk, way.label, run.hit_rate, saved, run.ttft_mean, prices.of(memory, disk))


def _alone(request: Request, adapters: Sequence[int], hardware: Hardware) -> float:
    """What a request keeps an engine busy for that holds nothing."""
    loaded = hardware.below.from_origin(adapters[request.adapter]) if request.adapter >= 0 else 0.0
    return request.tokens / hardware.prefill + loaded
