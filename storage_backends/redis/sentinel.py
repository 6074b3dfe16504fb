# SPDX-License-Identifier: Apache-2.0
"""Who is the master of a service: asked of its sentinels whenever a connection is made, and never remembered.

The sentinels share half of a call's timeout among them, so that a call ends in time while some of them are silent.
Threading: any number of threads; each question has a connection of its own.
"""

from __future__ import annotations

import redis

from loracache.storage_backends.redis.urls import Address, Target

__all__ = ["Sentinels"]


class Sentinels:
    """The sentinels that `target` names."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._hosts = target.hosts  # the one that answered last comes first
        self._share_s = target.timeout_s / 2 / len(target.hosts) / 2  # it may be silent twice: connecting, answering

    def master(self) -> Address:
        """Raises redis.ConnectionError where no sentinel names one."""
        hosts = self._hosts
        said = []
        last: Exception | None = None
        for host in hosts:
            try:
                found = self._ask(host)
            except (redis.RedisError, OSError) as error:
                said.append(f"{host}: {self._target.said(error).text}")
                last = error
                continue
            self._hosts = (host, *(other for other in hosts if other != host))
            return found
        raise redis.ConnectionError(f"no master of {self._target.service!r}: {'; '.join(said)}") from last

    def discover_master(self, service: str) -> tuple[str, int]:
        """`master`, under the name by which redis-py's SentinelConnectionPool asks."""
        return self.master()

    def _ask(self, host: Address) -> Address:
        with self._target.guide(host, self._share_s) as client:
            found = client.sentinel_get_master_addr_by_name(self._target.service)
        if found is None:
            raise redis.ResponseError("it watches no service of this name")
        return Address(*found)
