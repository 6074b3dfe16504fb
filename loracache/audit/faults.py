# SPDX-License-Identifier: Apache-2.0
"""What a check finds: kinds of faults, and the report that counts them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

__all__ = ["Fault", "Finding", "Report"]

_MOST_EXAMPLES = 3
_ALL = 1 << 60


class Fault(enum.Enum):
    """A kind of fault, by the name it has in reports. What `fix` mends stands behind it; all else is left as it is,
    because it may be good, or because nobody here can know."""

    DAMAGED = "damaged"  # key, size, checksum or form are wrong: removed
    INCOMPLETE = "incomplete"  # an object of which Redis lost a segment: its header is removed, the rest expires
    ORPHAN = "orphan"  # disk: an object whose parent is not there, removed; Redis: a segment without header, expires
    MANIFEST = "manifest"  # it is missing or damaged, or does not say what the files say: written anew
    LEFTOVER = "leftover"  # a file that was never finished: removed
    UNPROVEN = "unproven"  # the bytes are whole, but their MAC is not of this integrity_key
    OTHER_VERSION = "other_version"  # written by another release
    UNREADABLE = "unreadable"  # the device refuses
    FOREIGN = "foreign"  # not ours
    UNDESCRIBED = "undescribed"  # its namespace has no descriptor, so that no model's name selects it
    NAME_ALONE = "name_alone"  # an adapter's name whose content is in no tier that was looked at
    CONTRADICTION = "contradiction"  # two places say different things of one key; the index beside a file: dropped
    MISSING = "missing"  # the index of a daemon names an object on disk that has no file: dropped from the index
    UNINDEXED = "unindexed"  # a file that the index of its daemon does not name
    STATE = "state"  # an entry of the index in a state that cannot be
    COUNT = "count"  # a daemon's books of a tier say another sum than what is there


@dataclass(slots=True)
class Finding:
    """The faults of one kind in one place. bytes: that they take. fixed: how many of `count` are mended."""

    place: str
    fault: Fault
    count: int = 0
    bytes: int = 0
    fixed: int = 0
    examples: list[str] = field(default_factory=list)


class Report:
    """What was looked at, and the faults found. checked: objects by place. notes: in words, what was not looked at.
    examples: how many of a kind are kept."""

    def __init__(self, examples: int = _MOST_EXAMPLES) -> None:
        self.checked: dict[str, int] = {}
        self.notes: list[str] = []
        self._examples = examples
        self._findings: dict[tuple[str, Fault], Finding] = {}

    @classmethod
    def of_all(cls) -> Report:
        """One that keeps every example, to be compared with another."""
        return cls(_ALL)

    def add(self, place: str, fault: Fault, example: str, *, nbytes: int = 0, count: int = 1) -> Finding:
        """Count a fault; whoever mends it counts that in the answer's `fixed`."""
        finding = self._findings.setdefault((place, fault), Finding(place, fault))
        finding.count += count
        finding.bytes += nbytes
        if len(finding.examples) < self._examples:
            finding.examples.append(example)
        return finding

    def add_common(self, one: Report, other: Report) -> None:
        """Count what two looks, of which both keep all examples, have both seen."""
        for finding in other.findings:
            before = one._findings.get((finding.place, finding.fault))
            seen = set(before.examples) if before is not None else set()
            for example in finding.examples:
                if example in seen:
                    self.add(finding.place, finding.fault, example, nbytes=finding.bytes // finding.count)

    @property
    def findings(self) -> list[Finding]:
        """By place, in the order of kinds."""
        order = list(Fault)
        return sorted(self._findings.values(), key=lambda each: (each.place, order.index(each.fault)))

    @property
    def left(self) -> int:
        """Faults that are not mended."""
        return sum(each.count - each.fixed for each in self.findings)
