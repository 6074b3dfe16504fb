# SPDX-License-Identifier: Apache-2.0
"""What a running daemon says that it holds: the entries of its index, all or by keys; and which of them to drop."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from loracache.audit.faults import Fault, Report
from loracache.client.client import CacheClient
from loracache.client.control import Selection
from loracache.errors import Unavailable
from loracache.storage_backends.base import Kind, ObjectInfo

__all__ = ["DaemonIndex"]

_PART = 1000  # keys of a question
_SCANNED_S, _LOOK_S = 60.0, 0.1
_BARRIER_S = 300.0  # what is queued in a large arena takes so long on a slow disk


class DaemonIndex:
    """The index of the daemon that `client` is connected to."""

    def __init__(self, client: CacheClient) -> None:
        self._client = client

    def wait_until_read(self) -> None:
        """Until it has read what an earlier run left on its disk: before, the index is not complete. Raises
        Unavailable where that does not end."""
        deadline = time.monotonic() + _SCANNED_S
        while True:
            status: Any = self._client.status()
            disk = status["tiers"].get("disk", {"scanned": True})
            if disk["scanned"]:
                return
            if time.monotonic() >= deadline:
                why = disk.get("reason") or "it is being read still; check again later"
                raise Unavailable(f"the daemon has not read its disk, so that its index is not complete: {why}")
            time.sleep(_LOOK_S)

    def all(self, tier: str = "") -> dict[bytes, ObjectInfo]:
        """Every object of a tier ("cpu", "disk"; "": of either)."""
        return {info.key: info for info in map(_info, self._client.objects(tier=tier))}

    def ask(self, keys: Iterable[bytes], tier: str = "") -> dict[bytes, ObjectInfo]:
        """Those of `keys` that it names now."""
        found: dict[bytes, ObjectInfo] = {}
        for part in _parts(list(keys)):
            found |= {info.key: info for info in map(_info, self._client.objects(Selection(keys=part), tier=tier))}
        return found

    def settle(self) -> None:
        """Wait until what it had taken in by now is written, and what it had evicted by now is deleted."""
        self._client.flush(_BARRIER_S)

    def drop_from_disk(self, keys: Iterable[bytes]) -> None:
        """Have entries dropped, with what depends on them, as an eviction does; what is pinned or named stays."""
        for part in _parts(list(keys)):
            self._client.evict(part, tiers=("disk",))
        self.settle()

    def recount(self, report: Report) -> None:
        """What the daemon finds wrong with its own index."""
        said = self._client.check_index()
        for key, words in said["examples"]:
            report.add("index", Fault.STATE, f"{key.hex()}: {words}")
        if said["faults"] > len(said["examples"]):
            count = said["faults"] - len(said["examples"])
            report.add("index", Fault.STATE, "and more", count=count)
        for tier, (objects, nbytes, there, bytes_there) in said["counts"].items():
            if (objects, nbytes) != (there, bytes_there):
                off = f"{objects - there:+} objects, {nbytes - bytes_there:+} bytes"
                report.add("index", Fault.COUNT, f"{tier}: the books are off by {off}")
        for tier, (used, least, most) in said["used"].items():
            if not least <= used <= most:
                off = used - (least if used < least else most)
                report.add("index", Fault.COUNT, f"{tier}: bytes in use are off by {off:+}")


def _parts(keys: list[bytes]) -> Iterator[list[bytes]]:
    return (keys[at : at + _PART] for at in range(0, len(keys), _PART))


def _info(said: dict[str, Any]) -> ObjectInfo:
    size, stored = int(said["size"]), int(said["stored"])
    return ObjectInfo(
        bytes.fromhex(said["key"]),
        bytes.fromhex(said["parent"]),
        Kind[str(said["kind"]).upper()],
        bytes.fromhex(said["namespace"]),
        size,
        int(said["checksum"], 16),
        stored if stored != size else 0,
    )
