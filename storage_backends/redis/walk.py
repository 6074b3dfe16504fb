# SPDX-License-Identifier: Apache-2.0
"""One look at everything that a server holds below the prefix, whoever wrote it, a slice at a time.

What is there from the beginning to the end of a walk is seen in it. Threading: a walk belongs to the call that makes
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from loracache.storage_backends.redis.layout import Layout
from loracache.storage_backends.redis.resp import ErrorReply, ProtocolFault, Wire, command

__all__ = ["ENDLESS", "Slice", "WalkRefused", "walk"]

ENDLESS = 1 << 62  # bytes of a call that is as long as there are keys: its single waits are bounded all the same
_COUNT = 1000  # keys that a server looks at in one step: less than a millisecond


class WalkRefused(Exception):
    """The server does not let us look: in its words."""


@dataclass(slots=True)
class Slice:
    """What one step saw: keys of objects by their headers, and names of segments by their object's key. others: names
    below the prefix that are not ours."""

    headers: list[bytes] = field(default_factory=list)
    segments: dict[bytes, list[bytes]] = field(default_factory=dict)
    others: list[bytes] = field(default_factory=list)


def walk(wire: Wire, layout: Layout, count: int = _COUNT) -> Iterator[Slice]:
    """All keys of objects on the server at the other end, about `count` in a slice. Raises WalkRefused."""
    cursor = b"0"
    while True:
        wire.send([command(b"SCAN", cursor, b"MATCH", layout.prefix + b":{*", b"COUNT", b"%d" % count)])
        reply = wire.reply()
        if isinstance(reply, ErrorReply):
            raise WalkRefused(f"{reply.text} (SCAN)")
        if not isinstance(reply, list) or len(reply) != 2 or not isinstance(reply[1], list):
            raise ProtocolFault("SCAN was not answered with a cursor and names")
        seen = Slice()
        for name in reply[1]:
            if isinstance(name, bytes):
                _sort(name, layout, seen)
        yield seen
        if reply[0] == b"0" or not isinstance(reply[0], bytes):
            return
        cursor = reply[0]


def _sort(name: bytes, layout: Layout, seen: Slice) -> None:
    found = layout.read_name(name)
    if found is None:
        seen.others.append(name)
    elif found[1]:
        seen.segments.setdefault(found[0], []).append(name)
    else:
        seen.headers.append(found[0])
