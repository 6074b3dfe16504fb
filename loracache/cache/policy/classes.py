# SPDX-License-Identifier: Apache-2.0
"""Victims of one tier where there are quotas, priorities or kept objects: a policy of its own for each part.

A part is what is of the same owners (quotas.py) and of the same rank. Room for an object is made, as long as that takes

    1. what is its owners' own, where those are above their share, down to it;
    2. what is of others above theirs, never below it: of a few of them the one that is furthest above;
    3. what has no quota;
    4. what is its owners' own;

each time the lower ranks first, and what is kept only when all that gave too little, in the same order. So nobody is
pushed below its share by another's store, whatever ranks anybody claims, and a choice looks at no more than it takes
and at a few owners. Within a part the tier's policy decides, leaf first as ever. Threading: the cache's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from loracache.cache.policy.choice import NO_LIMIT, Choice
from loracache.cache.policy.leaf_first import LeafFirst
from loracache.cache.policy.line import repack
from loracache.cache.policy.quotas import Belongs, Group, Owner, Shares
from loracache.cache.state.index import Index, Node
from loracache.results import Departure
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

__all__ = ["HIGH", "KEPT", "LOW", "NORMAL", "Classes"]

LOW, NORMAL, HIGH, KEPT = range(4)
"""Ranks of objects."""
_PUSHED = (LOW, NORMAL, HIGH)
_LOOKED_AT = 8  # owners above their share, at each turn
_MOVED = 200  # candidates put into another part between two looks at the socket


class Classes:
    """A policy made of policies like `base`, which is the part without owners and of normal rank. rank(node): its
    rank."""

    def __init__(
        self, index: Index, tier: Tier, base: LeafFirst[Any], shares: Shares, rank: Callable[[Node], int]
    ) -> None:
        self.shares = shares
        self._index = index
        self._tier = tier
        self._base = base
        self._rank = rank
        self._standing: dict[Node, LeafFirst[Any]] = {}  # candidates that do not stand in `base`
        self.speeds, self.without = base.speeds, base.without
        shares.rest.policies[NORMAL] = base

    # -- Policy ----------

    def offer(self, node: Node) -> None:
        """`node` has become a leaf of the tier that may leave it."""
        policy = self._part(node)
        if policy is not self._base:
            self._standing[node] = policy
        else:
            self._standing.pop(node, None)  # which a choice withdrew
        policy.offer(node)

    def used(self, node: Node, before: int) -> None:
        """A candidate was used: its tick was `before`."""
        self._standing.get(node, self._base).used(node, before)

    def withdraw(self, node: Node) -> None:
        """A candidate has left the tier, or is no leaf of it any more."""
        self._standing.pop(node, self._base).withdraw(node)

    def gone(self, node: Node) -> None:
        """A node has left the tier; it may have stood in any part of its owners', and in what was there before."""
        self._standing.pop(node, None)
        group = self.shares.known(node)
        if group is not None and group is not self.shares.rest:
            self._base.gone(node)
        for policy in (group or self.shares.rest).policies.values():
            policy.gone(node)

    def asked(self, keys: Sequence[bytes]) -> None:
        """A lookup asks for a chain, held or not."""
        self._base.asked(keys)

    def may_push(self, wanting: Belongs | None, node: Node) -> bool:
        """Whether room for `wanting` may be made by what `node` takes, as things stand now."""
        pusher = self.shares.rest if wanting is None else self.shares.group_of(wanting)
        return self.shares.may_push(pusher, node, self._index.costs[self._tier](node))

    def pushed(self, node: Node) -> None:
        """It leaves for others, which is counted for its owners."""
        for owner in self.shares.group_of(node).owners:
            owner.pushed += 1

    def expect(self, batch: float) -> None:
        """So many requests run at once, as engines say; 0: nobody said."""
        for group in self.shares.groups():
            for policy in group.policies.values():
                policy.expect(batch)

    def shrink(self) -> None:
        """Few nodes are left of very many: keep no memory for the others."""
        repack(self._standing)
        for group in self.shares.groups():
            for policy in group.policies.values():
                policy.shrink()

    def reason(self, node: Node) -> Departure:
        """Why `node` leaves for others: although it is kept, its owners are above their shares, or the policy chose
        it."""
        if self._rank(node) == KEPT:
            return Departure.KEPT
        if self.shares.group_of(node) in self.shares.over:
            return Departure.OVER_QUOTA
        return self._part(node).reason(node)

    def beyond(self, wanting: Belongs, nbytes: int) -> int:
        """By how many bytes an object of so many would be beyond a limit of its owners'; 0 where it fits."""
        return self.shares.beyond(wanting, nbytes)

    def victims(
        self, nbytes: int, protected: Container[Node] = (), wanting: Belongs | None = None
    ) -> Generator[None, None, tuple[list[Node], int]]:
        """See Policy: room for `wanting`."""
        yield from self._base.prepare()
        mine = self.shares.rest if wanting is None else self.shares.group_of(wanting)
        choice = Choice(self._index, self._tier, protected, self._index.costs[self._tier], self._part)
        return (yield from _Turns(self.shares, mine).choose(choice, nbytes))

    def own_victims(
        self, nbytes: int, protected: Container[Node], wanting: Belongs
    ) -> Generator[None, None, tuple[list[Node], int]]:
        """The same among what is of those of the owners of `wanting` that have a limit, and of nobody else."""
        mine = self.shares.group_of(wanting)
        choice = Choice(self._index, self._tier, protected, self._index.costs[self._tier], self._part)
        return (yield from _Turns(self.shares, mine).choose_own(choice, nbytes))

    # -- parts ----------

    def _part(self, node: Node) -> LeafFirst[Any]:
        group, rank = self.shares.group_of(node), self._rank(node)
        policy: LeafFirst[Any] | None = group.policies.get(rank)
        if policy is None:
            policy = group.policies[rank] = self._base.sibling()
        return policy

    def move(self, node: Node) -> None:
        """Put a candidate where it belongs now."""
        if not node.offered >> self._tier & 1:
            return
        stands, part = self._standing.get(node, self._base), self._part(node)
        if stands is not part:
            self.withdraw(node)
            stands.gone(node)
            self.offer(node)

    def regroup(self) -> Iterator[None]:
        """Look anew whose everything is, after a quota was given or ended. Yields between two slices."""
        for namespace in list(self._index.spaces):
            yield from self.regroup_space(namespace)

    def regroup_space(self, namespace: bytes, ranked: bool = False) -> Iterator[None]:
        """The same of one namespace. ranked: its rank may have changed, whoever's it is."""
        space = self._index.spaces.get(namespace)
        first = self._index.get(space.keys[0]) if space is not None else None
        if first is None:
            return
        if first.kind is not Kind.LORA and not self.shares.renew(namespace, first.kind) and not ranked:
            yield
            return
        after = b""
        while (space := self._index.spaces.get(namespace)) is not None:
            keys = list(islice(space.keys.irange(after, inclusive=(False, True)), _MOVED))
            for node in map(self._index.get, keys):
                if node is not None and node.namespace == namespace:
                    if node.kind is Kind.LORA:
                        self.shares.renew(node.key, node.kind)
                    self.move(node)
            if len(keys) < _MOVED:
                return
            after = keys[-1]
            yield


class _Turns:
    """Whose turn it is in one choice of victims for `mine`."""

    def __init__(self, shares: Shares, mine: Group) -> None:
        self._shares = shares
        self._mine = mine
        self._going: dict[Owner, int] = {}  # bytes that are chosen
        self._spent: set[Any] = set()  # policies that have nobody for us any more

    def choose(self, choice: Choice, nbytes: int) -> Generator[None, None, tuple[list[Node], int]]:
        """All turns."""
        yield from self._take(choice, nbytes, self._any_turn)
        return list(choice.chosen), choice.freed

    def choose_own(self, choice: Choice, nbytes: int) -> Generator[None, None, tuple[list[Node], int]]:
        """Turns of our owners with a limit."""
        yield from self._take(choice, nbytes, self._own_turn)
        return list(choice.chosen), choice.freed

    def _take(
        self, choice: Choice, nbytes: int, turn: Callable[[], tuple[Group, Any, int] | None]
    ) -> Generator[None, None, None]:
        count = 0
        while choice.freed < nbytes and (found := turn()) is not None:
            group, policy, limit = found
            before = choice.freed
            yield from choice.take(policy, nbytes, limit)
            for owner in group.owners:
                self._going[owner] = self._going.get(owner, 0) + choice.freed - before
            self._spent.add(policy)
            self._spent -= choice.uncovered
            choice.uncovered.clear()
            count += 1
            if not count % _LOOKED_AT:
                yield

    def _any_turn(self) -> tuple[Group, Any, int] | None:
        for ranks in (_PUSHED, (KEPT,)):
            found = (
                self._above(ranks)
                or self._others(ranks)
                or self._of(self._shares.rest, ranks, NO_LIMIT)
                or self._own(ranks, self._mine.owners)
            )
            if found is not None:
                return found
        return None

    def _own_turn(self) -> tuple[Group, Any, int] | None:
        owners = [owner for owner in self._mine.owners if owner.hard is not None]
        return self._own(_PUSHED, owners) or self._own((KEPT,), owners)

    def _above(self, ranks: Sequence[int]) -> tuple[Group, Any, int] | None:
        """What is just ours, while we are above our shares."""
        return self._of(self._mine, ranks, min((self._excess(owner) for owner in self._mine.owners), default=0))

    def _others(self, ranks: Sequence[int]) -> tuple[Group, Any, int] | None:
        """One of those who are above their shares, each in its turn."""
        best: tuple[Group, Any, int] | None = None
        over = self._shares.over
        for count, group in enumerate(over):
            if count >= _LOOKED_AT and best is not None:
                break
            found = self._of(group, ranks, self._limit(group))
            if found is not None and (best is None or found[2] > best[2]):
                best = found
        if best is not None:
            over.move_to_end(best[0])
        return best

    def _own(self, ranks: Sequence[int], owners: Iterable[Owner]) -> tuple[Group, Any, int] | None:
        for owner in owners:
            for group in owner.groups:
                if (found := self._of(group, ranks, self._limit(group))) is not None:
                    return found
        return None

    def _of(self, group: Group, ranks: Sequence[int], limit: int) -> tuple[Group, Any, int] | None:
        """The lowest of the ranks of a group that is not spent, as long as some of it may go."""
        if limit > 0:
            for rank in ranks:
                policy = group.policies.get(rank)
                if policy is not None and policy not in self._spent:
                    return group, policy, limit
        return None

    def _limit(self, group: Group) -> int:
        """Bytes of a group that may go for us."""
        mine = self._mine.owners
        return min((self._excess(owner) for owner in group.owners if owner not in mine), default=NO_LIMIT)

    def _excess(self, owner: Owner) -> int:
        return owner.bytes - owner.soft - self._going.get(owner, 0)
