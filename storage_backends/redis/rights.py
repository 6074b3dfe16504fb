# SPDX-License-Identifier: Apache-2.0
"""What the Redis tier must be allowed to do, tried out when the daemon starts, and again while something is amiss.

Every command we use is sent once, about one small key of ours that the last of them removes: a user without the rights
is told at once, and not by misses. What the rights suffice for is used. Threading: any thread, one call at a time.
"""

from __future__ import annotations

from loracache.errors import ConfigError
from loracache.storage_backends.base import Standing
from loracache.storage_backends.redis.commands import ObjectCommands
from loracache.storage_backends.redis.resp import ErrorReply, Wire, command
from loracache.storage_backends.redis.servers import Servers

__all__ = ["check"]

_NO_FAULT = {"OOM", "READONLY", "WRONGTYPE", "MISCONF", "NOREPLICAS"}  # passes, or is the key's wrong type on purpose
_ELSEWHERE = {
    "MOVED",
    "ASK",
    "TRYAGAIN",
    "CLUSTERDOWN",
    "LOADING",
    "MASTERDOWN",
    "CROSSSLOT",
}  # rights are looked at before
_OTHER_SETTINGS = {"NOAUTH", "WRONGPASS", "MOVED", "CLUSTERDOWN", "CROSSSLOT"}


def check(servers: Servers, objects: ObjectCommands, *, limited: bool) -> Standing:
    """What a server lets us do of what `objects` does, and of what a limit takes where there is one. Raises ConfigError
    where a server refuses our settings."""
    prefix, cluster = objects.layout.prefix, objects.cluster
    harmless = _NO_FAULT | (_ELSEWHERE if cluster else set())
    answered = 0
    refused: dict[str, ErrorReply] = {}

    def work(wire: Wire) -> None:
        nonlocal answered
        commands = _commands(objects, limited)
        wire.send([b"".join(encoded for _, encoded in commands)])
        for name, _ in commands:
            reply = wire.reply()
            if not isinstance(reply, ErrorReply) or reply.code in harmless:
                continue
            if "|" not in name or reply.code == "NOPERM":  # a policy may know no idle time, and has the other then
                refused[name] = reply
        answered += 1

    lost = servers.everywhere(work)
    if lost is not None and not answered:
        said = f"redis {servers.place}: {lost.text}; {lost.fix}"
        if lost.refused:
            raise ConfigError(said)
        return Standing(reads=False, writes=False, reason=said)
    if not refused:
        return Standing()
    name, first = next(iter(refused.items()))
    said = f"redis {servers.place}: the server answers {first.text!r} to {name}; {_fix(first, refused, prefix)}"
    if first.code in _OTHER_SETTINGS:
        raise ConfigError(said)
    if first.code in _ELSEWHERE:
        return Standing(reads=False, writes=False, reason=said)
    reading = {"GETRANGE", "GETEX"} if objects.ttl_s else {"GETRANGE", "GET"} | (set() if cluster else {"MGET"})
    return Standing(refused.keys().isdisjoint(reading), refused.keys().isdisjoint({"GETRANGE", "SET"}), said)


def _fix(first: ErrorReply, refused: dict[str, ErrorReply], prefix: bytes) -> str:
    if first.code == "NOPERM":
        rights = " ".join(f"+{name.lower()}" for name in refused)
        return f"give its user ~{prefix.decode()}:* {rights} (ACL SETUSER)"
    if first.code in ("LOADING", "MASTERDOWN", "TRYAGAIN"):
        return "it is asked again"
    if first.code in ("MOVED", "CLUSTERDOWN", "CROSSSLOT"):
        return "it is one node of a cluster: write redis+cluster:// (rediss+cluster://) in redis"
    return "correct redis"


def _commands(objects: ObjectCommands, limited: bool) -> list[tuple[str, bytes]]:
    """Names and encodings. The hash commands go to what the first of them made no hash: they change nothing. The keys
    of MGET are of two slots, so that any node of a cluster shows what it is.
    """
    prefix = objects.layout.prefix
    key = b"%b:{check}" % prefix
    words = (
        (b"SET", key, b""), (b"GET", key), (b"MGET", key, b"%b:{other}" % prefix), (b"HSET", key, b"f", b"v"),
        (b"HSETNX", key, b"f", b"v"), (b"HGET", key, b"f"), (b"HGETALL", key), (b"HDEL", key, b"f"),
        (b"GETRANGE", key, b"0", b"0"), (b"EXISTS", key), (b"SCAN", b"0", b"MATCH", key, b"COUNT", b"1"),
        (b"EXPIRE", key, b"60"), *([(b"GETEX", key, b"EX", b"60")] if objects.ttl_s else []), (b"UNLINK", key),
    )  # fmt: skip
    found = [(each[0].decode(), command(*each)) for each in words]
    budget = ((b"MEMORY", b"USAGE"), (b"OBJECT", b"IDLETIME"), (b"OBJECT", b"FREQ")) if limited else ()
    return [*((b"|".join(each).decode(), command(*each, key)) for each in budget), *found]
