# SPDX-License-Identifier: Apache-2.0
"""Where the calls of the Redis tier go: to the one server, or to the master of the day.

A cluster's calls go by cluster.py, behind the same interface. Threading: any number of threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from loracache.storage_backends.base import Outcome, Result
from loracache.storage_backends.redis.connections import Connections
from loracache.storage_backends.redis.resp import Wire
from loracache.storage_backends.redis.urls import Lost, Target

__all__ = ["Call", "OneServer", "Servers", "finished"]


class Call(Protocol):
    """What is to be done about some items on one connection that moves about `nbytes`."""

    results: list[Result | None]  # one per item, None until it is known

    @property
    def nbytes(self) -> int: ...

    def run(self, wire: Wire) -> None:
        """Fills `results` as far as the connection lasts."""


class Servers(ABC):
    """The servers behind one URL. place: the URL as far as it may be shown."""

    place: str

    @abstractmethod
    def run(self, keys: Sequence[bytes], call: Callable[[Sequence[int]], Call]) -> list[Result]:
        """A result for each of the objects `keys`. `call` makes the call about those of the given numbers, all on one
        server; it is made once more for those that have moved to another."""

    @abstractmethod
    def everywhere(self, work: Callable[[Wire], object], nbytes: int = 0) -> Lost | None:
        """Gives `work` a connection for moving about `nbytes` to each server; how one was lost, where one was."""

    @abstractmethod
    def close(self) -> None:
        """Closes all connections. No call follows."""


def finished(call: Call, lost: Lost | None) -> list[Result]:
    """The results of a call that ended so; what it does not know is UNAVAILABLE."""
    unknown = Result(Outcome.UNAVAILABLE, detail=lost.text if lost else "")
    return [result or unknown for result in call.results]


class OneServer(Servers):
    """A server that has all keys; with sentinels, the one that is the master now."""

    def __init__(self, target: Target) -> None:
        self.place = target.place
        self._connections = Connections(target)

    def run(self, keys: Sequence[bytes], call: Callable[[Sequence[int]], Call]) -> list[Result]:
        made = call(range(len(keys)))
        lost = self._connections.talk(made.run, made.nbytes)
        return finished(made, lost)

    def everywhere(self, work: Callable[[Wire], object], nbytes: int = 0) -> Lost | None:
        return self._connections.talk(work, nbytes)

    def close(self) -> None:
        self._connections.close()
