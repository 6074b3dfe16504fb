# SPDX-License-Identifier: Apache-2.0
"""Quotas of one tier: what each tenant, adapter and model takes of it, its share and its limit, kept exactly.

An owner is a tenant (the salt of a namespace), an adapter or a model that has a quota, its own or the default of its
kind. An object is of all owners that its namespace names; an adapter's weights are of that adapter alone, for all
tenants share them. What an owner takes is counted as objects enter and leave, in bytes of the tier's room.

Above its share (`soft`) an owner's objects may go for others, and go first; at or below it nobody else's may push them.
So the shares of a tier have to fit into it: those given by name are refused where they do not, and the share of a
default is halved until those of all who are there do. A store beyond the limit (`hard`) is refused.

However many objects there are, no call looks at them. Threading: the cache's thread.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from loracache.cache.state.index import Index
from loracache.errors import UsageError
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

__all__ = ["EVERY", "KINDS", "Belongs", "Group", "Owner", "Quota", "Shares", "Subject"]

KINDS = ("tenant", "adapter", "model")
EVERY = "*"  # the name of a kind's default
_MOST_HALVED = 62
_UNSEEN = 1 << 62


class Subject(NamedTuple):
    """Who has a quota. name: a salt's digest, an adapter's digest, a model's identity or name; EVERY: all of the kind
    that have none of their own."""

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class Quota:
    """Bytes of a tier. soft: the share. hard: the limit, None where there is none."""

    soft: int = 0
    hard: int | None = None


class Belongs(Protocol):
    """What a node and an object that is to become one say of whose they are."""

    @property
    def namespace(self) -> bytes:
        """Of a chunk."""

    @property
    def key(self) -> bytes:
        """Of the object."""

    @property
    def kind(self) -> Kind:
        """Chunk or adapter."""


class Owner:
    """One who has a quota. coming: bytes on their way into the tier, which its limit counts too. smallest: the least
    that an object of it took: with less above its share none of them may go. pushed, refused: objects that left for
    others, and that its limit kept out."""

    __slots__ = (
        "bytes",
        "coming",
        "groups",
        "hard",
        "named",
        "over",
        "pushed",
        "refused",
        "smallest",
        "soft",
        "subject",
    )

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.named = False
        self.soft = 0
        self.hard: int | None = None
        self.bytes = 0
        self.coming = 0
        self.refused = 0
        self.pushed = 0
        self.smallest = _UNSEEN
        self.over = False
        self.groups: dict[Group, None] = {}


class Group:
    """Objects that are of the same owners. policies: of its candidates, by rank (classes.py). over: how many of its
    owners are above their share. spaces: the namespaces, and adapters' keys, that were found to be of it."""

    __slots__ = ("over", "owners", "policies", "spaces")

    def __init__(self, owners: tuple[Owner, ...]) -> None:
        self.owners = owners
        self.over = 0
        self.policies: dict[int, Any] = {}
        self.spaces: set[bytes] = set()


class Shares:
    """The quotas of `tier`, which has `limit` bytes. names(namespace) are the subjects that it is of, by kind, each in
    the words that a quota may use; None where nobody has told of the namespace yet."""

    def __init__(
        self, index: Index, tier: Tier, limit: int, names: Callable[[bytes], dict[str, tuple[str, ...]] | None]
    ) -> None:
        self._index = index
        self._tier = tier
        self.limit = limit
        self._names = names
        self.rest = Group(())
        self.quotas: dict[Subject, Quota] = {}
        self.owners: dict[Subject, Owner] = {}
        self.over: OrderedDict[Group, None] = OrderedDict()  # whose owners all are above their shares
        self._groups: dict[tuple[Owner, ...], Group] = {(): self.rest}
        self._of: dict[bytes, Group] = {}  # namespaces and adapters' keys
        self._met: set[bytes] = set()  # of those, whose candidates may stand where they stood when nobody had a quota
        self._halved = 0
        self._by_default = Counter[str]()  # owners without a quota of their own, by kind

    # -- what an operator says ----------

    def check(self, subject: Subject, quota: Quota) -> None:
        """Raises UsageError where the quota cannot be kept."""
        label = self._tier.label
        if quota.hard is not None and quota.hard < quota.soft:
            raise UsageError(
                f"hard={quota.hard} is less than soft={quota.soft}; give a hard quota of at least the soft"
            )
        others = sum(each.soft for given, each in self.quotas.items() if given != subject and given.name != EVERY)
        if subject.name != EVERY and quota.soft + others > self.limit:
            raise UsageError(
                f"soft={quota.soft}: the soft quotas of tier {label} would add up to {quota.soft + others} bytes, and "
                f"it has {self.limit}; give at most {max(0, self.limit - others)}, or lower others first"
            )

    def set(self, subject: Subject, quota: Quota) -> None:
        """Give a quota, in the place of an earlier one. What is there already is counted by `renew`. Raises UsageError
        as `check`."""
        self.check(subject, quota)
        self.quotas[subject] = quota
        if subject.name != EVERY and subject not in self.owners:
            self.owners[subject] = Owner(subject)
            self._by_default[subject.kind] += 1
        self._set_limits()

    def remove(self, subject: Subject) -> None:
        """End a quota. Raises KeyError where there is none."""
        del self.quotas[subject]
        self._set_limits()
        if (owner := self.owners.get(subject)) is not None:
            self._forget_empty((owner,))

    def used(self, subject: Subject) -> int:
        """Bytes that a subject with a quota takes."""
        owner = self.owners.get(subject)
        return owner.bytes if owner is not None else 0

    # -- whose ----------

    def group_of(self, item: Belongs) -> Group:
        """The group of an object."""
        return self.known(item) or self._meet(*_name(item))

    def known(self, item: Belongs) -> Group | None:
        """The same, where anybody has asked for it before."""
        return self._of.get(item.key if item.kind is Kind.LORA else item.namespace)

    def groups(self) -> Iterable[Group]:
        """All of them, of those without a quota too."""
        return self._groups.values()

    def renew(self, name: bytes, kind: Kind) -> bool:
        """Look anew whose a namespace, or an adapter's weights (by key), is; whether that has changed since the last
        time."""
        before, now = self._of.get(name), self._resolve(name, kind)
        met = name in self._met
        self._met.discard(name)
        if before is now:
            return met
        if before is not None:
            before.spaces.discard(name)
            self._add(before.owners, -self._taken(name, kind)[0])
        self._belongs(name, kind, now)
        self._forget_empty(before.owners if before is not None else ())
        return True

    def count(self, item: Belongs, amount: int) -> None:
        """An object's bytes come to the tier, or go; told before the index has counted them."""
        group = self.known(item)
        if group is None:
            group = self._meet(*_name(item), before=max(0, -amount) if item.kind is Kind.LORA else None)
        owners = group.owners
        if not owners:
            return
        for owner in owners:
            if 0 < amount < owner.smallest:
                owner.smallest = amount
        self._add(owners, amount)
        self._forget_empty(owners)

    def recount(self) -> Iterator[tuple[Owner, int]]:
        """Owners whose bytes are not the sum of what is of them, and that sum."""
        counted = Counter[Owner]()
        for group in self._groups.values():
            taken = sum(
                self._taken(name, Kind.LORA if name not in self._index.spaces else Kind.KV)[0] for name in group.spaces
            )
            for owner in group.owners:
                counted[owner] += taken
        for owner in self.owners.values():
            if owner.bytes != counted[owner]:
                yield owner, counted[owner]

    # -- limits ----------

    def beyond(self, item: Belongs, nbytes: int) -> int:
        """By how much so many bytes more of an object's owners would be beyond a limit of theirs; 0 where they fit."""
        most = 0
        for owner in self.group_of(item).owners:
            if owner.hard is not None:
                most = max(most, owner.bytes + owner.coming + nbytes - owner.hard)
        return most

    def refuse(self, item: Belongs) -> None:
        """Count a refusal."""
        for owner in self.group_of(item).owners:
            owner.refused += 1

    def charge(self, item: Belongs, nbytes: int) -> Callable[[], None]:
        """Bytes of an object are on their way into the tier, until what this answers is called."""
        owners = self.group_of(item).owners
        for owner in owners:
            owner.coming += nbytes
        return partial(self._settle, owners, nbytes)

    def _settle(self, owners: tuple[Owner, ...], nbytes: int) -> None:
        for owner in owners:
            owner.coming -= nbytes
        self._forget_empty(owners)

    def may_push(self, pusher: Group, item: Belongs, nbytes: int) -> bool:
        """Whether room for something of `pusher` may be made by an object's leaving, which takes so many bytes."""
        return all(owner in pusher.owners or owner.bytes - nbytes >= owner.soft for owner in self.group_of(item).owners)

    # -- inside ----------

    def _meet(self, name: bytes, kind: Kind, before: int | None = None) -> Group:
        group = self._resolve(name, kind)
        if self._belongs(name, kind, group, before) and group is not self.rest:
            self._met.add(name)
        return group

    def _belongs(self, name: bytes, kind: Kind, group: Group, before: int | None = None) -> int:
        """Answers how many objects of it there are. before: what one object took, where the index has its going or
        coming half done."""
        self._of[name] = group
        group.spaces.add(name)
        taken, objects = self._taken(name, kind) if before is None else (before, 1)
        for owner in group.owners if objects else ():
            owner.smallest = min(owner.smallest, max(1, taken // objects))  # they are mostly of one size
        self._add(group.owners, taken)
        return objects

    def _taken(self, name: bytes, kind: Kind) -> tuple[int, int]:
        """What the index has counted of a namespace or of an adapter's weights, and of how many objects."""
        if kind is Kind.LORA:
            node = self._index.get(name)
            held = node is not None and node.held_in(self._tier)
            return (self._index.costs[self._tier](node), 1) if node is not None and held else (0, 0)
        space = self._index.spaces.get(name)
        return (space.taken[self._tier], space.objects[self._tier]) if space is not None else (0, 0)

    def _resolve(self, name: bytes, kind: Kind) -> Group:
        subjects = {"adapter": (name.hex(),)} if kind is Kind.LORA else self._names(name)
        if subjects is None or not self.quotas:
            return self.rest
        found = (self._owner(kind, subjects.get(kind, ())) for kind in KINDS)
        owners = tuple(owner for owner in found if owner is not None)
        group = self._groups.get(owners)
        if group is None:
            group = self._groups[owners] = Group(owners)
            for owner in owners:
                owner.groups[group] = None
                group.over += owner.over
            self._stand(group)
        return group

    def _owner(self, kind: str, names: tuple[str, ...]) -> Owner | None:
        for name in names:
            if (subject := Subject(kind, name)) in self.quotas:
                return self.owners[subject]
        if not names or Subject(kind, EVERY) not in self.quotas:
            return None
        subject = Subject(kind, names[0])
        owner = self.owners.get(subject)
        if owner is None:
            owner = self.owners[subject] = Owner(subject)
            self._by_default[kind] += 1
            self._set_limits((owner,))
        return owner

    def _set_limits(self, changed: Iterable[Owner] | None = None) -> None:
        """What each owner may have, after quotas or owners (`changed`) have changed."""
        for owner in self.owners.values() if changed is None else ():
            if owner.named is not (named := owner.subject in self.quotas):
                owner.named = named
                self._by_default[owner.subject.kind] += -1 if named else 1
        halved = self._halved
        self._halve()
        for owner in list(self.owners.values()) if changed is None or halved != self._halved else changed:
            quota = self.quotas.get(owner.subject)
            if quota is None:
                default = self.quotas.get(Subject(owner.subject.kind, EVERY), Quota())
                quota = Quota(default.soft >> self._halved, default.hard)
            owner.soft, owner.hard = quota.soft, quota.hard
            self._weigh(owner)

    def _halve(self) -> None:
        """How often the defaults' shares are halved, so that all fit beside those that were given by name. Back only
        where a quarter would stay free, so that one who comes and goes does not have all of them reckoned anew."""
        room = self.limit - sum(quota.soft for subject, quota in self.quotas.items() if subject.name != EVERY)
        wanted = 0
        for kind in KINDS:
            if (default := self.quotas.get(Subject(kind, EVERY))) is not None and default.soft:
                wanted += default.soft * self._by_default[kind]
        while self._halved < _MOST_HALVED and wanted >> self._halved > room:
            self._halved += 1
        while self._halved and wanted >> (self._halved - 1) <= room * 3 // 4:
            self._halved -= 1

    def _add(self, owners: Iterable[Owner], amount: int) -> None:
        for owner in owners:
            owner.bytes += amount
            self._weigh(owner)

    def _weigh(self, owner: Owner) -> None:
        """Is it above its share, so that one of its objects may go?"""
        over = owner.bytes - owner.soft >= owner.smallest
        if over is owner.over:
            return
        owner.over = over
        for group in owner.groups:
            group.over += 1 if over else -1
            self._stand(group)

    def _stand(self, group: Group) -> None:
        if group.owners and group.over == len(group.owners):
            self.over.setdefault(group)
        else:
            self.over.pop(group, None)

    def _forget_empty(self, owners: Iterable[Owner]) -> None:
        """One that has no quota of its own is forgotten with the last that it has."""
        for owner in owners:
            if owner.bytes or owner.coming or owner.subject in self.quotas:
                continue
            if self.owners.get(owner.subject) is not owner:
                continue
            del self.owners[owner.subject]
            self._by_default[owner.subject.kind] -= 1
            for group in owner.groups:
                for name in group.spaces:
                    del self._of[name]
                    self._met.discard(name)
                del self._groups[group.owners]
                self.over.pop(group, None)
                for other in group.owners:
                    if other is not owner:
                        del other.groups[group]
            self._set_limits(())


def _name(item: Belongs) -> tuple[bytes, Kind]:
    return (item.key if item.kind is Kind.LORA else item.namespace), item.kind
