# SPDX-License-Identifier: Apache-2.0
"""Quotas of all tiers, as the cache's other parts see them. Where nobody ever gave one, nothing is counted.

Threading: the cache's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

from loracache.cache.policy import Policy
from loracache.cache.policy.classes import NORMAL, Classes
from loracache.cache.policy.leaf_first import LeafFirst
from loracache.cache.policy.quotas import Belongs, Owner, Quota, Shares, Subject
from loracache.cache.policy.worth import Speeds
from loracache.cache.state.index import Index, Node
from loracache.cache.state.slices import Slices
from loracache.errors import UsageError
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

__all__ = ["Quotas"]


class Quotas:
    """names(namespace): as of Shares. limits: bytes of each tier that can have quotas."""

    def __init__(self, index: Index, policies: dict[Tier, Policy], slices: Slices) -> None:
        self._index = index
        self._policies = policies
        index.on_used = lambda tier, node, before: policies[tier].used(node, before)
        index.on_left = lambda tier, node: policies[tier].withdraw(node)
        index.on_gone = lambda tier, node: policies[tier].gone(node)
        index.on_few = self._shrink
        self._slices = slices
        self.limits: dict[Tier, int] = {}
        self.speeds = Speeds()  # of all the tiers' policies
        self.names: Callable[[bytes], dict[str, tuple[str, ...]] | None] = lambda namespace: None
        self.rank: Callable[[Node], int] = lambda node: NORMAL
        self.rank_of: Callable[[bytes], int] = lambda namespace: NORMAL  # of a namespace, by its adapter's name
        self.on_gone: Callable[[Node], None] = lambda node: None  # from the last tier
        self._classes: dict[Tier, Classes] = {}

    def add(
        self,
        tier: Tier,
        make: Callable[[Index, Tier, Callable[[Node], int]], Policy],
        cost: Callable[[Node], int],
        limit: int,
    ) -> None:
        """A tier of so many bytes, of which `cost` says what a node takes; make(index, tier, cost): its policy."""
        self._index.costs[tier], self.limits[tier] = cost, limit
        self._policies[tier] = make(self._index, tier, cost)
        self._policies[tier].speeds = self.speeds

    @property
    def given(self) -> bool:
        """Whether anybody ever gave one."""
        return bool(self._classes)

    def set(self, tier: Tier, subject: Subject, quota: Quota) -> None:
        """Give a quota; what is there already is counted in slices. Raises UsageError where it cannot be kept."""
        classes = self._of(tier)
        classes.shares.set(subject, quota)
        self._slices.run(classes.regroup())

    def check(self, tier: Tier, subject: Subject, quota: Quota) -> None:
        """Raises UsageError where `set` would."""
        self._of(tier).shares.check(subject, quota)

    def remove(self, tier: Tier, subject: Subject) -> bool:
        """End a quota; False where there is none. Raises UsageError for a tier that has none."""
        classes = self._of(tier)
        if subject not in classes.shares.quotas:
            return False
        classes.shares.remove(subject)
        self._slices.run(classes.regroup())
        return True

    def engage(self) -> None:
        """From now on ranks count, in every tier."""
        for tier in self.limits:
            self._of(tier)

    def move(self, node: Node) -> None:
        """A node's rank has changed."""
        for classes in self._classes.values():
            classes.move(node)

    def rerank(self, adapter: bytes) -> None:
        """The rank of what is of an adapter has changed, of its weights and its KV."""
        self._slices.run(self._rerank(adapter))

    def _rerank(self, adapter: bytes) -> Iterator[None]:
        node = self._index.get(adapter)
        if node is not None:
            self.move(node)
        for namespace in list(self._index.spaces):
            told = self.names(namespace)
            if told is not None and adapter.hex() in told["adapter"]:
                for classes in self._classes.values():
                    yield from classes.regroup_space(namespace, True)
            yield

    def tenant_of(self, node: Node) -> str:
        """The digest of its tenant's salt, "" where there is none."""
        found = self.names(node.namespace) if node.kind is not Kind.LORA else None
        return "".join(found["tenant"]) if found is not None else ""

    def learned(self, namespace: bytes) -> None:
        """Somebody has told of a namespace, of which there may be objects already."""
        if namespace in self._index.spaces:
            ranked = self.rank_of(namespace) != NORMAL
            for classes in self._classes.values():
                self._slices.run(classes.regroup_space(namespace, ranked))

    def all(self) -> Iterator[tuple[Tier, Subject, Quota, Owner | None]]:
        """Every quota, with the owner that it is of, where it is of one that is known."""
        for tier, classes in self._classes.items():
            for subject, quota in classes.shares.quotas.items():
                yield tier, subject, quota, classes.shares.owners.get(subject)

    def audit(self) -> Iterator[tuple[bytes, str]]:
        """Owners whose bytes are not what their namespaces and adapters take: (a name of theirs, words)."""
        for tier, classes in self._classes.items():
            for owner, counted in classes.shares.recount():
                name = next((name for group in owner.groups for name in group.spaces), b"")
                words = f"of {owner.subject.kind} {owner.subject.name}, said to take {owner.bytes} bytes of "
                yield name, f"{words}{tier.label}, not {counted}"

    # -- for those who move bytes ----------

    def refuses(self, tier: Tier, item: Belongs, nbytes: int) -> bool:
        """Whether an object is beyond a hard quota, which is counted."""
        if not self.beyond(tier, item, nbytes):
            return False
        self._classes[tier].shares.refuse(item)
        return True

    def beyond(self, tier: Tier, item: Belongs, nbytes: int) -> bool:
        """Whether so many bytes, of objects that are of the same owners as `item`, are beyond a hard quota."""
        classes = self._classes.get(tier)
        return classes is not None and classes.beyond(item, nbytes) > 0

    def charge(self, tier: Tier, item: Belongs, nbytes: int) -> Callable[[], None]:
        """Bytes are on their way into a tier, until what this answers is called: they are there, or will not come."""
        classes = self._classes.get(tier)
        return _nothing if classes is None else classes.shares.charge(item, nbytes)

    # -- inside ----------

    def _of(self, tier: Tier) -> Classes:
        """Raises UsageError for a tier that keeps no books here."""
        if tier not in self.limits:
            known = ", ".join(each.label for each in self.limits)
            bound = "; what Redis holds only Redis knows: bound it by redis_max_bytes and redis_ttl"
            raise UsageError(
                f"tier {tier.label} takes no quotas; give one of {known}{bound if tier is Tier.REDIS else ''}"
            )
        classes = self._classes.get(tier)
        if classes is None:
            base = cast("LeafFirst[int]", self._policies[tier])
            shares = Shares(self._index, tier, self.limits[tier], self.names)
            classes = self._classes[tier] = Classes(self._index, tier, base, shares, self.rank)
            self._policies[tier] = classes
            self._index.on_count = self._count
        return classes

    def _shrink(self) -> None:
        for policy in self._policies.values():
            policy.shrink()

    def _count(self, node: Node, tier: Tier, amount: int) -> None:
        classes = self._classes.get(tier)
        if classes is not None:
            classes.shares.count(node, amount)
        if not node.present:
            self.on_gone(node)


def _nothing() -> None:
    pass
