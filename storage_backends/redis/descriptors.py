# SPDX-License-Identifier: Apache-2.0
"""Which namespaces have objects in the Redis, and what they are: one hash, <prefix>:namespaces.

Daemons that share a Redis never see each other's disks: by this hash one of them knows what another stored there. Redis
may evict it as any key, so that what goes on storing writes it again. What the fields mean is their writers' matter.
Threading: any number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from loracache.errors import Unavailable
from loracache.storage_backends.redis.hashes import RedisHash

__all__ = ["Descriptors"]

_AGAIN_S = 60.0  # a field that Redis evicted is missing no longer than that
_MOST_NOTED = 100_000


class Descriptors:
    """The hash `fields`. describe(namespace): the fields that say what a namespace is."""

    def __init__(self, fields: RedisHash, describe: Callable[[bytes], Mapping[bytes, bytes]]) -> None:
        self._hash = fields
        self._describe = describe
        self._noted: dict[bytes, float] = {}

    def note(self, namespaces: Collection[bytes]) -> None:
        """Have it known that these have objects. Where the Redis does not take it, the next call tries again."""
        now = time.monotonic()
        due = [each for each in namespaces if now - self._noted.get(each, -_AGAIN_S) >= _AGAIN_S]
        found = {field: value for each in due for field, value in self._describe(each).items()}
        if not found:
            return

        def put(server: Any) -> None:
            pipeline = server.pipeline(transaction=False)
            for field, value in found.items():
                pipeline.hsetnx(self._hash.key, field, value)
            pipeline.execute()

        try:
            self._hash.ask(put)
        except Unavailable:
            return  # the objects may be stored all the same: another node has them
        if len(self._noted) > _MOST_NOTED:
            self._noted.clear()
        self._noted.update(dict.fromkeys(due, now))

    def all(self) -> dict[bytes, bytes]:
        """All fields. Raises Unavailable."""
        return self._hash.all()

    def forget(self, fields: Collection[bytes]) -> None:
        """Drop fields. Raises Unavailable."""
        gone = list(fields)
        for start in range(0, len(gone), 1000):
            part = gone[start : start + 1000]
            self._hash.ask(lambda server, part=part: server.hdel(self._hash.key, *part))  # type: ignore[misc]
        for field in gone:
            self._noted.pop(field, None)

    def close(self) -> None:
        """Closes all connections. No call follows."""
        self._hash.close()
