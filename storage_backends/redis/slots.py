# SPDX-License-Identifier: Apache-2.0
"""Which node of a Redis cluster has which slot, as the nodes themselves say.

The map is asked for before the first use and again when it was found in doubt: a node gone, a slot moved. Nodes are
asked one after another for about a call's timeout in all, those that seem alive first. Threading: any number of
threads; one asks, the others wait for its answer.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import redis
from redis.cluster import parse_cluster_slots
from redis.crc import REDIS_CLUSTER_HASH_SLOTS as SLOTS
from redis.crc import key_slot

from loracache.storage_backends.redis.urls import Address, Lost, Target

__all__ = ["SLOTS", "SlotMap", "slot_of"]

_MOVED = re.compile(r"MOVED (?P<slot>[0-9]{1,5}) (?P<host>.*):(?P<port>[0-9]{1,5})")
_AGAIN_S = 0.5  # between two questions
_STEPS = 4  # silent ones that fit into a timeout


def slot_of(key: bytes) -> int:
    """The slot of a Redis key: of what stands between its first braces, if anything."""
    return key_slot(key)


class SlotMap:
    """The slots of the cluster at `target`. `seems_alive` tells of a node whether it is worth asking."""

    def __init__(self, target: Target, seems_alive: Callable[[Address], bool] = lambda address: True) -> None:
        self._target = target
        self._seems_alive = seems_alive
        self._owners: list[Address | None] = [None] * SLOTS
        self._nodes: tuple[Address, ...] = ()
        self._in_doubt = True
        self._not_before = 0.0
        self._lock = threading.Lock()
        self.lost: Lost | None = None  # how the last attempt to learn the slots failed

    @property
    def nodes(self) -> tuple[Address, ...]:
        """Every node that has slots, as far as known."""
        return self._nodes

    def owners(self, slots: Sequence[int]) -> list[Address | None]:
        """The node of each slot; None where nobody has it or nobody can be asked."""
        if self._in_doubt or not self._nodes:
            with self._lock:
                self._learn()
        owners = self._owners
        return [owners[slot] for slot in slots]

    def doubt(self) -> None:
        """Has the slots asked for again at the next use."""
        self._in_doubt = True

    def moved(self, told: Iterable[str], by: Address) -> None:
        """Takes over what redirections say ("MOVED 3999 127.0.0.1:6381"), answered by the node `by`."""
        with self._lock:
            for match in filter(None, map(_MOVED.fullmatch, told)):
                if (slot := int(match["slot"])) < len(self._owners):
                    self._owners[slot] = Address(match["host"] or by.host, int(match["port"]))
            self._in_doubt = True
            self._not_before = time.monotonic() + _AGAIN_S  # other nodes hear of it later than we do

    def _learn(self) -> None:
        if (self._nodes and not self._in_doubt) or time.monotonic() < self._not_before:
            return
        self._in_doubt = not self._ask()
        self._not_before = time.monotonic() + _AGAIN_S

    def _ask(self) -> bool:
        """Asks node after node; whether one has answered."""
        deadline = time.monotonic() + self._target.timeout_s
        known = dict.fromkeys((*self._nodes, *self._target.hosts))
        for address in sorted(known, key=lambda each: not self._seems_alive(each)):
            try:
                with self._target.guide(address, self._target.timeout_s / _STEPS) as client:
                    answer = client.execute_command("CLUSTER SLOTS")
                self._take(parse_cluster_slots(answer, current_host=address.host))
            except (redis.RedisError, OSError) as error:
                lost = self._target.said(error)
                self.lost = replace(lost, text=f"{address}: {lost.text}")
            else:
                self.lost = None
                return True
            if time.monotonic() > deadline:
                break
        return False

    def _take(self, ranges: dict[tuple[int, int], dict[str, Any]]) -> None:
        if not ranges:
            raise redis.exceptions.ClusterDownError("the node knows of no slots")
        owners: list[Address | None] = [None] * SLOTS
        for (first, last), servers in ranges.items():
            host, port = servers["primary"]
            owners[first : last + 1] = [Address(host, int(port))] * (last + 1 - first)
        self._owners = owners
        self._nodes = tuple(dict.fromkeys(owner for owner in owners if owner is not None))
