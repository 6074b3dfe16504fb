# SPDX-License-Identifier: Apache-2.0
"""Removes all that the Redis has of some namespaces, whoever stored it, or all below the prefix.

Redis says of a name neither whose it is nor when one is evicted, and daemons of other versions write too: that nothing
is left is known by looking at every key and by nothing else. Segments without a header are nobody's, so that they may
be those of a namespace that goes: they go with it, unless their header comes within a grace time.

Threading: a Purger belongs to the call that makes it; `did` may be looked at from other threads meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from loracache.storage_backends import header
from loracache.storage_backends.base import Purge, Purpose
from loracache.storage_backends.redis.commands import ObjectCommands
from loracache.storage_backends.redis.resp import ErrorReply, Reply, Wire
from loracache.storage_backends.redis.walk import Slice, WalkRefused, walk

__all__ = ["Purger"]

GRACE_S = 5.0  # between two looks at a segment without a header: a call of a backend lasts 2 s, and 1 s for 16 MiB
_LOOK_S = 0.1
_PART = 500
_MOST_LOOSE = 1_000_000


class Purger:
    """One purge, of one server after the other. go_on(): whether it is still wanted."""

    def __init__(self, objects: ObjectCommands, purpose: Purpose, did: Purge, go_on: Callable[[], bool]) -> None:
        self._objects = objects
        self._purpose = purpose
        self._did = did
        self._go_on = go_on

    def run(self, wire: Wire) -> None:
        """Purge the server at the other end. What was not seen or could not be removed is an error in `did`."""
        loose: dict[bytes, list[bytes]] = {}
        try:
            for part in walk(wire, self._objects.layout):
                if not self._go_on():
                    return
                gone = self._remove(wire, part)
                doubtful = {key: names for key, names in part.segments.items() if key not in gone}
                if len(loose) < _MOST_LOOSE:
                    loose |= self._without_header(wire, doubtful)
        except WalkRefused as error:
            self._did.fail(str(error))
            return
        self._remove_loose(wire, loose)

    def _remove(self, wire: Wire, part: Slice) -> set[bytes]:
        """Answers the keys of those of which nothing is left."""
        going: dict[bytes, list[bytes]] = {}
        sizes: list[int] = []
        keys = [key for key in part.headers if key not in self._purpose.kept]
        self._did.kept.update(self._purpose.kept.intersection(part.headers))
        for key, raw in zip(keys, self._objects.headers(wire, keys), strict=True):
            if isinstance(raw, ErrorReply):
                self._did.fail(raw.text)
                continue
            found = self._judged(raw)
            if found is None:
                continue
            names = self._objects.layout.held(found) if isinstance(found, header.Header) else []
            # Among those that were seen may be others, of how it was kept before.
            going[key] = [self._objects.layout.header_key(key), *{*names, *part.segments.get(key, ())}]
            sizes.append((found.info.stored or found.info.size) if isinstance(found, header.Header) else 0)
        for reply, size in zip(self._objects.unlink(wire, list(going.values())), sizes, strict=True):
            if isinstance(reply, ErrorReply):
                self._did.fail(reply.text)
            elif reply == 1:
                self._did.objects += 1
                self._did.nbytes += size
        return set(going)

    def _judged(self, raw: Reply) -> header.Header | str | None:
        """What is to go, or None. What can never be loaded goes, too: whose it was cannot be known any more."""
        if raw is None:
            return "" if self._purpose.wanted is None else None
        try:
            found = header.unpack(raw if isinstance(raw, bytes) else b"")
        except header.OtherVersion as error:
            if self._purpose.wanted is None:
                return str(error)
            self._did.undescribed += 1
            return None
        except header.HeaderError as error:
            return str(error)
        namespace = found.info.namespace
        if self._purpose.wanted is None or namespace in self._purpose.wanted:
            return found
        if namespace not in self._purpose.others:
            self._did.undescribed += 1
        else:
            self._did.present.add(namespace)
        return None

    def _without_header(self, wire: Wire, segments: dict[bytes, list[bytes]]) -> dict[bytes, list[bytes]]:
        keys = list(segments)
        there = self._objects.alive(wire, keys)
        return {key: segments[key] for key, reply in zip(keys, there, strict=True) if reply == 0}

    def _remove_loose(self, wire: Wire, loose: dict[bytes, list[bytes]]) -> None:
        left = self._looked_at_again(wire, loose) if loose else []
        deadline = time.monotonic() + GRACE_S
        while left and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            if not self._go_on():
                return
        for start in range(0, len(left), _PART):
            keys = self._looked_at_again(wire, {key: loose[key] for key in left[start : start + _PART]})
            for reply in self._objects.unlink(wire, [loose[key] for key in keys]):
                if isinstance(reply, ErrorReply):
                    self._did.fail(reply.text)
                else:
                    self._did.loose += 1

    def _looked_at_again(self, wire: Wire, loose: dict[bytes, list[bytes]]) -> Sequence[bytes]:
        """Keys of those that have no header still and something left."""
        found: list[bytes] = []
        keys = list(loose)
        for start in range(0, len(keys), _PART):
            part = keys[start : start + _PART]
            found += self._without_header(wire, {key: loose[key] for key in part})
        return found
