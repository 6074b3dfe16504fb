# SPDX-License-Identifier: Apache-2.0
"""Checks what a Redis holds under a prefix: headers against segments. Daemons may use it meanwhile, and Redis evicts on
its own: what seems wrong is looked at again after a while, longer than a store takes, and counts only if it still is.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import redis

from loracache.audit.faults import Fault, Report
from loracache.audit.objects import Verdict, judge
from loracache.config import Config
from loracache.errors import Unavailable
from loracache.keys import LORA_NAMESPACE
from loracache.storage_backends import header
from loracache.storage_backends.base import ObjectInfo
from loracache.storage_backends.redis.commands import RETIRED_S
from loracache.storage_backends.redis.hashes import RedisHash
from loracache.storage_backends.redis.layout import Layout, read_header
from loracache.storage_backends.redis.names import RedisNames
from loracache.storage_backends.redis.sentinel import Sentinels
from loracache.storage_backends.redis.slots import SlotMap, slot_of
from loracache.storage_backends.redis.urls import Target, parse_target

__all__ = ["RedisCheck", "check_redis"]

GRACE_S = 5.0  # a call of a backend lasts 2 s, and a second more for each 16 MiB
_TIMEOUT_S = 5.0
_COUNT = 1000  # keys that a server looks at in one step of a scan


@dataclass(slots=True)
class _Object:
    """What Redis has of one object. raw: its header as it was judged. named: its segments by that; None: all may be."""

    verdict: Verdict = field(default_factory=lambda: Verdict(None))
    raw: bytes | None = None
    named: list[bytes] | None = field(default_factory=list)
    nbytes: int = 0


class RedisCheck:
    """The check of the objects under `prefix` in the Redis at `target`."""

    def __init__(self, target: Target, prefix: str, report: Report, *, integrity_key: bytes | None, fix: bool) -> None:
        self.objects: dict[bytes, ObjectInfo] = {}  # those that are whole
        self._target = target
        self._prefix = prefix
        self._layout = Layout(prefix.encode())
        self._report = report
        self._integrity_key = integrity_key
        self._fix = fix

    def run(self) -> None:
        """Look at everything, and mend it where that was asked for. Raises Unavailable."""
        try:
            for client in self._clients():
                with client:
                    self._check(client)
        except (redis.RedisError, OSError) as error:
            said = self._target.said(error)
            raise Unavailable(f"redis {self._target.place}: {said.text}; {said.fix}") from None
        self._report.checked["redis"] = len(self.objects)

    def _clients(self) -> Iterator[Any]:
        """One for each server; all of an object is on one."""
        if self._target.cluster:
            slots = SlotMap(self._target)
            slots.owners([slot_of(self._prefix.encode())])
            if slots.lost:
                raise Unavailable(f"redis {self._target.place}: {slots.lost.text}; {slots.lost.fix}")
            yield from map(self._target.client, slots.nodes)
        elif self._target.service:
            yield self._target.client_of_master(Sentinels(self._target))
        else:
            yield self._target.client()

    def _check(self, client: Any) -> None:
        with contextlib.suppress(redis.exceptions.MovedError):  # rights are looked at before
            client.pttl(
                b"%b:{check}" % self._prefix.encode()
            )  # and before anything is changed here: one may be missing
        segments = self._scan(client)
        doubtful = {}
        for key, there in segments.items():
            made = self._look_at(client, key)
            if made.verdict.fault is not None or self._loose(made, there):
                doubtful[key] = there
            elif made.verdict.info is not None:
                self.objects[key] = made.verdict.info
        if doubtful:
            time.sleep(GRACE_S)
        for key, there in doubtful.items():
            self._settle(client, key, there)

    def _scan(self, client: Any) -> dict[bytes, set[bytes]]:
        """Key -> the Redis keys of its segments, for all of which anything is there."""
        found: dict[bytes, set[bytes]] = {}
        for name in client.scan_iter(match=f"{self._prefix}:{{*", count=_COUNT):
            read = self._layout.read_name(name)
            if read is not None:
                segments = found.setdefault(read[0], set())
                if read[1]:
                    segments.add(name)
            elif name != b"%b:{check}" % self._prefix.encode():  # which a daemon that starts tries its rights on
                self._report.add("redis", Fault.FOREIGN, name.decode(errors="replace"))
        return found

    def _look_at(self, client: Any, key: bytes) -> _Object:
        raw = _get(client, self._layout.header_key(key))
        if raw is None:
            return _Object()
        if isinstance(raw, str):
            return _Object(Verdict(None, Fault.DAMAGED, f"header: {raw}"))
        made = _Object(raw=raw, nbytes=len(raw))
        try:
            header.unpack(raw)
        except header.OtherVersion as error:
            made.verdict, made.named = Verdict(None, Fault.OTHER_VERSION, str(error)), None
            return made
        except header.HeaderError:
            pass
        found = read_header(key, raw)
        if not isinstance(found, header.Header):
            made.verdict = Verdict(None, Fault.DAMAGED, found if isinstance(found, str) else "")
            return made
        made.named = self._layout.held(found)
        made.verdict = self._judge(client, found, made)
        return made

    def _judge(self, client: Any, found: header.Header, made: _Object) -> Verdict:
        total = found.info.stored or found.info.size
        if not found.segment_bytes:
            whole = memoryview(made.raw or b"")[header.HEADER_BYTES :]
            if whole.nbytes != total:
                return Verdict(None, Fault.DAMAGED, "its value has the wrong length")
            return judge(found, whole, self._integrity_key)
        kept = bytearray()
        for segment in made.named or ():
            value = _get(client, segment)
            if value is None:
                return Verdict(None, Fault.INCOMPLETE, f"segment {segment.rpartition(b':')[2].decode()} is missing")
            if isinstance(value, str) or len(value) != min(found.segment_bytes, total - len(kept)):
                return Verdict(None, Fault.DAMAGED, "a segment has the wrong length or type")
            kept += value
            made.nbytes += len(value)
        return judge(found, memoryview(kept), self._integrity_key)

    @staticmethod
    def _loose(made: _Object, there: set[bytes]) -> set[bytes]:
        """Segments that no header names."""
        return there - set(made.named) if made.named is not None else set()

    def _settle(self, client: Any, key: bytes, there: set[bytes]) -> None:
        """The second look, which counts."""
        made = self._look_at(client, key)
        if made.verdict.info is not None:
            self.objects[key] = made.verdict.info
        fault = made.verdict.fault
        if fault is not None:
            name = self._layout.header_key(key)
            finding = self._report.add("redis", fault, f"{key.hex()}: {made.verdict.detail}", nbytes=made.nbytes)
            mends = fault in (Fault.DAMAGED, Fault.INCOMPLETE)
            # Stored anew meanwhile, it is another header.
            if mends and self._fix and (made.raw is None or _get(client, name) == made.raw):
                client.unlink(name)
                for segment in {*there, *(made.named or ())}:
                    client.expire(segment, RETIRED_S)
                finding.fixed += 1
            if mends:
                return  # its segments are that fault's
        for segment in self._loose(made, there):
            if client.pttl(segment) == -1:  # not gone, and not on its way
                nbytes = len(value) if isinstance(value := _get(client, segment), bytes) else 0
                finding = self._report.add("redis", Fault.ORPHAN, segment.decode(), nbytes=nbytes)
                if self._fix:
                    client.expire(segment, RETIRED_S)
                    finding.fixed += 1


def check_redis(
    config: Config, key: bytes | None, report: Report, *, fix: bool
) -> tuple[dict[bytes, ObjectInfo], list[bytes]]:
    """Check the Redis of `config`; answers its objects, and its records of names. Raises Unavailable."""
    assert config.redis is not None
    target = parse_target(config.redis, _TIMEOUT_S, config.redis_password_file)
    work = RedisCheck(target, config.redis_prefix, report, integrity_key=key, fix=fix)
    work.run()
    try:
        told = _descriptors(target, config.redis_prefix)
        for key_, info in work.objects.items():
            if info.namespace not in told:
                report.add("redis", Fault.UNDESCRIBED, f"{key_.hex()} of {info.namespace.hex()}", nbytes=info.size)
    except Unavailable as error:
        report.add("redis", Fault.UNREADABLE, f"the hash of namespaces: {error}")
    names = RedisNames(config.redis, prefix=config.redis_prefix, password_file=config.redis_password_file)
    try:
        return work.objects, names.all()
    except Unavailable as error:
        report.add("redis", Fault.UNREADABLE, f"the hash of names: {error}")
        return work.objects, []
    finally:
        names.close()


def _descriptors(target: Target, prefix: str) -> set[bytes]:
    """The namespaces that the Redis has a word on."""
    fields = RedisHash(target, f"{prefix}:namespaces")
    try:
        return {LORA_NAMESPACE, *fields.all()}
    finally:
        fields.close()


def _get(client: Any, name: bytes) -> bytes | str | None:
    """The value of a Redis key, None where there is none; in words what else it is."""
    try:
        value: bytes | None = client.get(name)
    except redis.ResponseError as error:
        if not str(error).startswith("WRONGTYPE"):
            raise
        return "it is of another type"
    return value
