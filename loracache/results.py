# SPDX-License-Identifier: Apache-2.0
"""What comes of a call, as values that code compares: causes, states of operations, kinds of nodes.

Every value is the string that the socket, REST, counters and JSON carry; docs/control-api.md lists them with what each
asks of its reader. Values only; safe from any thread.
"""

from __future__ import annotations

import enum

__all__ = ["Cause", "Departure", "NodeKind", "OperationState", "Refusal"]


class Cause(enum.StrEnum):
    """Why an object was not written, read, found or changed. NONE is false; every other is true."""

    NONE = ""  # it was

    # Of a reservation or a commit
    EXISTS = "exists"  # it is held already
    BUSY = "busy"  # somebody is writing it
    NO_PARENT = "no_parent"  # what it depends on is not there
    TOO_LARGE = "too_large"  # larger than the arena, or empty
    FULL = "full"  # no room, and nothing that may leave
    OVER_QUOTA = "over_quota"  # beyond a hard quota
    LEASE_LOST = "lease_lost"  # the lease ended before its holder was done

    # Of a lookup or a load
    ABSENT = "absent"  # no tier has it
    MEMORY_FULL = "memory_full"  # no room in the arena to raise it into
    DISK_MISS = "disk_miss"  # f"{tier}_{outcome}": storage_backends.base.Outcome of the tier that should have it
    DISK_CORRUPT = "disk_corrupt"
    DISK_UNPROVEN = "disk_unproven"  # of another release or integrity_key, and left as it is
    DISK_FULL = "disk_full"
    DISK_UNAVAILABLE = "disk_unavailable"
    DISK_FAILED = "disk_failed"
    REDIS_MISS = "redis_miss"
    REDIS_CORRUPT = "redis_corrupt"
    REDIS_UNPROVEN = "redis_unproven"
    REDIS_FULL = "redis_full"
    REDIS_UNAVAILABLE = "redis_unavailable"
    REDIS_FAILED = "redis_failed"
    REDIS_DIFFERS = "redis_differs"  # other bytes than those that a lower tier of ours holds
    REDIS_SLOW = "redis_slow"  # it did not answer within `redis_lookup_ms`
    TIMEOUT = "timeout"  # not answered for when the reading ended

    # Of an operation: objects that were left as they are
    HELD = "held"  # leased, pinned, named, being written, or needed by what is
    STAYS = "stays"  # the same, of a move's source
    ALREADY = "already"  # nothing is to do
    UNDESCRIBED = "undescribed"  # only Redis has it, and nobody knows whose it is
    INCOMPRESSIBLE = "incompressible"  # compression makes it no smaller
    NOT_WRITTEN = "not_written"  # the target did not take it
    UNPROVEN = "unproven"  # of another release or integrity_key
    CORRUPT = "corrupt"  # what a tier says of a rewrite: storage_backends.base.Outcome
    UNAVAILABLE = "unavailable"  # of an engine's load or store: no daemon answers
    FAILED = "failed"

    # Of an engine's load, store or adapter, beside those above
    ADAPTER_CHANGED = "adapter_changed"  # other content is served under the adapter's name by now
    BUG = "bug"
    CANCELLED = "cancelled"  # the engine took the blocks back
    CHANGED = "changed"  # the adapter's folder is no longer what was read first
    CHECKSUM = "checksum"  # bytes in the arena disagree with their checksum
    COPY_FAILED = "copy_failed"  # the GPU refused or failed a copy
    DEADLINE = "deadline"
    EVICTED = "evicted"  # the engine took the adapter's pages back meanwhile
    POOL_FULL = "pool_full"
    REJECTED = "rejected"
    SHUTDOWN = "shutdown"
    SIZE = "size"  # an object of another size than the engine's chunks have
    UNUSABLE = "unusable"  # the engine cannot run this adapter


class Departure(enum.StrEnum):
    """Why an object left a tier: counters `evict.<tier>.<value>`, the cause of events. What is behind a dot says more
    of what is before it.
    """

    POLICY = "policy"  # room was needed, and the tier's policy chose it
    POLICY_ONCE = "policy.came_once"  # from among those that came once
    POLICY_AGAIN = "policy.came_again"  # from among those that came again
    OVER_QUOTA = "over_quota"  # the same, and its owners were above their shares
    KEPT = "kept"  # the same, and a request had asked to keep it: nothing else could go
    AHEAD = "ahead"  # the swapper keeps a little room free, and the tier's policy chose it
    MEMORY_FULL = "memory_full"  # the arena is full of what waits to be written, and this waited longest
    BUDGET = "budget"  # Redis has more than `redis_max_bytes`
    LEFT_ALONE = "left_alone"  # of another release or integrity_key, and its room was needed
    ASKED = "asked"  # somebody evicted or cleared it, or took its name away
    MOVED = "moved"  # an operation moved it
    PASSED = "passed"  # an operation raised it only to carry it elsewhere


class Refusal(enum.StrEnum):
    """Why admission has an object of the arena not written to a tier: counters `not_admitted.<tier>.<value>`. NONE is
    false; every other is true.
    """

    NONE = ""  # it is written
    FIRST_TOUCH = "first_touch"  # nobody has asked for it a second time
    BELOW_BENEFIT = "below_benefit"  # to read it back would take longer than to compute it again


class OperationState(enum.StrEnum):
    """How far an operation is."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class NodeKind(enum.StrEnum):
    """What a node of the dependency tree stands for."""

    BASE = "base"  # the base models
    ADAPTER = "adapter"
    SPACE = "space"  # a namespace: what is interchangeable of one model
    CHUNK = "chunk"
