# SPDX-License-Identifier: Apache-2.0
"""Takes out of Redis what only Redis holds: of a model, an adapter or a tenant, or all of it.

Which namespaces those are, this daemon knows of its own engines and Redis of all others'; what nobody knows is left and
counted. Threading: the event loop; what reads descriptors or looks at all keys is done on the tier's thread.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from loracache.control.fields import count_deletions
from loracache.control.selection import ANY_MODEL, Selector, gather
from loracache.control.steps import all_written, answer
from loracache.errors import Unavailable
from loracache.keys import LORA_NAMESPACE
from loracache.namespaces import Namespaces
from loracache.results import Cause
from loracache.storage_backends.base import Outcome, Purge, Purpose

if TYPE_CHECKING:
    from loracache.cache.tier.io import TierIO
    from loracache.control.jobs import Operation

__all__ = ["Whose", "empty_redis", "known_in_redis", "whose_of"]

_LOOK_S = 0.25  # between two looks at how far it is


@dataclass(frozen=True, slots=True)
class Whose:
    """Whose objects go, in the words of Namespaces.matching. ours: the namespaces known here, and those of them that
    are meant. everything: nobody is asked whose they are. kept: keys of what stays all the same. counted: those of
    them that the operation has counted."""

    model: str = ""
    adapter: str | None = None
    salt: str | None = None
    everything: bool = False
    known: frozenset[bytes] = frozenset()
    ours: frozenset[bytes] = frozenset()
    kept: frozenset[bytes] = frozenset()
    counted: frozenset[bytes] = frozenset()

    def matching(self, namespaces: Namespaces) -> list[bytes]:
        """Digests of the namespaces that are meant."""
        return namespaces.matching(self.model, self.adapter, self.salt)


@dataclass(slots=True)
class _Choice:
    """Of what Redis says of its namespaces, whose objects go, and then what nobody needs any more."""

    whose: Whose
    shared: Namespaces = field(default_factory=lambda: Namespaces(None))
    wanted: set[bytes] = field(default_factory=set)

    def choose(self, fields: Mapping[bytes, bytes]) -> Purpose:
        if self.whose.everything:
            return Purpose(kept=self.whose.kept)
        self.shared.learn_fields(fields)
        self.wanted = {*self.whose.ours, *self.whose.matching(self.shared)}
        return Purpose(self.wanted, {*self.whose.known, *self.shared, LORA_NAMESPACE} - self.wanted)

    def over(self, did: Purge) -> list[bytes]:
        """Fields of namespaces that have nothing in Redis any more. Who stores there writes them again."""
        if self.whose.everything or did.error:
            return []
        left = {namespace: self.shared.get(namespace) for namespace in self.shared if namespace in did.present}
        gone = [namespace for namespace in self.shared if namespace not in left]
        models = {space.model for space in map(self.shared.get, gone) if space is not None}
        models -= {space.model for space in left.values() if space is not None}
        return gone + self.shared.name_fields(models)


async def known_in_redis(redis: TierIO, whose: Whose) -> bool:
    """Whether Redis knows of any namespace that is meant."""

    def look(fields: dict[bytes, bytes]) -> bool:
        shared = Namespaces(None)
        shared.learn_fields(fields)
        return bool(whose.matching(shared))

    known: asyncio.Future[bool] = answer(lambda done: redis.consult(look, done))
    return await known


def whose_of(selector: Selector, namespaces: Namespaces, scope: str) -> Generator[None, None, Whose | None]:
    """Of a selector of all that a model, an adapter or a tenant has, whose that is; None of any other. Yields between
    two slices, for others to be served."""
    if selector.keys is not None or selector.tokens is not None or (scope and selector.salt not in (None, scope)):
        return None
    model = "" if selector.model == ANY_MODEL else selector.model
    whose = Whose(model, selector.adapter, scope or selector.salt, known=frozenset(namespaces))
    ours = yield from gather(namespaces.matching_parts(whose.model, whose.adapter, whose.salt))
    return replace(whose, ours=frozenset(ours))


async def empty_redis(redis: TierIO, operation: Operation, deletions: Counter[Outcome], whose: Whose | None) -> None:
    """See to the end of the deletions that were asked for, and remove what only Redis knows of `whose`, as long as the
    operation runs. Raises Unavailable where not everything was seen or could be removed; what was is counted."""
    await all_written(redis)
    count_deletions(operation, deletions)
    if whose is None or not operation.running:
        return
    if not redis.available:
        why = redis.reason or "redis is left alone after a failure"
        raise Unavailable(f"{why}; nothing that only Redis holds was removed")
    choice, did = _Choice(whose), Purge()
    end: asyncio.Future[None] = answer(
        lambda done: redis.purge(choice.choose, choice.over, did, lambda: operation.running, done)
    )
    before = operation.objects, operation.nbytes
    while not end.done():
        await asyncio.wait({end}, timeout=_LOOK_S)
        operation.objects, operation.nbytes = before[0] + did.objects, before[1] + did.nbytes
    operation.skip(Cause.UNDESCRIBED, did.undescribed)
    operation.skip(Cause.HELD, len(did.kept - whose.counted))
    if did.error:
        raise Unavailable(
            f"{did.error}; {did.objects} objects that only Redis held were removed, and what is left there is not known"
        )
