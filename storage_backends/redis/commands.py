# SPDX-License-Identifier: Apache-2.0
"""The commands on objects that every call of the Redis tier is made of: ask for headers, remove, let expire.

Threading: no state; each call uses the connection that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loracache.storage_backends.header import HEADER_BYTES
from loracache.storage_backends.redis.layout import Layout
from loracache.storage_backends.redis.resp import ErrorReply, ProtocolFault, Reply, Wire, command, opening

__all__ = ["RETIRED_S", "ObjectCommands"]

RETIRED_S = 60  # how long segments outlive their header: longer than a load takes that found it


@dataclass(frozen=True, slots=True)
class ObjectCommands:
    """How objects are laid out in one Redis, and the commands for that.

    cluster: a command may have keys of one slot only. segment_bytes: largest value written. ttl_s: how long an object
    lives that nobody loads; 0: for ever. Its segments outlive its header, so that none is found without them.
    """

    layout: Layout
    cluster: bool
    integrity_key: bytes | None
    segment_bytes: int
    ttl_s: int = 0

    def ask(self, wire: Wire, keys: Sequence[bytes]) -> list[Reply]:
        """The values under the headers' names of all `keys`, which live on by that, or the errors in their place, in
        one round trip."""
        if self.cluster or self.ttl_s:  # a node refuses a command with keys of several slots
            self._send(wire, [self.get(self.layout.header_key(key)) for key in keys])
            replies = [wire.value() for _ in keys]
            return [None if _is_other_type(each) else each for each in replies]
        wire.send([command(b"MGET", *(self.layout.header_key(key) for key in keys))])
        reply = wire.reply()
        if isinstance(reply, ErrorReply):
            return [reply] * len(keys)
        if isinstance(reply, list) and len(reply) == len(keys):
            return reply
        raise ProtocolFault("MGET was not answered with one value per key")

    def get(self, name: bytes, longer_s: int = 0) -> bytes:
        """The command that reads a value, and has it live on, so much longer than others."""
        if not self.ttl_s:
            return command(b"GET", name)
        return command(b"GETEX", name, b"EX", b"%d" % (self.ttl_s + longer_s))

    def set(self, name: bytes, value: Sequence[bytes | memoryview], longer_s: int = 0) -> list[bytes | memoryview]:
        """The command that writes a value, in parts."""
        words = [b"EX", b"%d" % (self.ttl_s + longer_s)] if self.ttl_s else []
        start = opening(3 + len(words), b"SET", name) + b"$%d\r\n" % sum(map(_nbytes, value))
        return [start, *value, b"\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)]

    def headers(self, wire: Wire, keys: Sequence[bytes]) -> list[Reply]:
        """As `ask`, but of each value no more than a header takes; what is empty is as good as not there."""
        self._send(wire, [self.question(key) for key in keys])
        replies = [wire.value() for _ in keys]
        return [None if not each or _is_other_type(each) else each for each in replies]

    def question(self, key: bytes) -> bytes:
        """The command for the header of one object."""
        return command(b"GETRANGE", self.layout.header_key(key), b"0", b"%d" % (HEADER_BYTES - 1))

    def alive(self, wire: Wire, keys: Sequence[bytes]) -> list[Reply]:
        """1 for each object that has a header, else 0."""
        self._send(wire, [command(b"EXISTS", self.layout.header_key(key)) for key in keys])
        return [wire.reply() for _ in keys]

    def unlink(self, wire: Wire, objects: Sequence[list[bytes]]) -> list[Reply]:
        """Removes the keys of each object, all in one round trip; per object 1 if its first key was there, or 0.

        Headers are the first, so that nobody finds one without its segments.
        """
        commands: list[bytes] = []
        for first, *rest in objects:
            commands.append(command(b"UNLINK", first))
            commands.append(command(b"UNLINK", *(rest or [first])))
        self._send(wire, commands)
        return [wire.reply() for _ in commands][::2]

    def retire(self, wire: Wire, segments: Sequence[bytes]) -> None:
        """Has segments expire that no header names any more."""
        self._send(wire, [command(b"EXPIRE", segment, b"%d" % RETIRED_S) for segment in segments])
        for _ in segments:
            wire.reply()

    @staticmethod
    def _send(wire: Wire, commands: Sequence[bytes]) -> None:
        if commands:
            wire.send([b"".join(commands)])


def _nbytes(part: bytes | memoryview) -> int:
    return part.nbytes if isinstance(part, memoryview) else len(part)


def _is_other_type(reply: Reply) -> bool:
    return isinstance(reply, ErrorReply) and reply.code == "WRONGTYPE"
