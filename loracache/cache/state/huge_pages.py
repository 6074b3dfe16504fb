# SPDX-License-Identifier: Apache-2.0
"""What this machine says of huge pages: how large they are, how many are reserved, how much of a mapping lies in them.

Transparent ones are joined from small ones where the kernel finds the room; reserved ones (hugetlb) are set aside
before, and are there or not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

__all__ = ["HugePages", "huge_bytes", "reserved_pages"]

HugePages = Literal["transparent", "reserved"]
_HUGE = ("ShmemPmdMapped", "Shared_Hugetlb", "Private_Hugetlb")


def reserved_pages() -> tuple[int, int]:
    """(bytes of a reserved page, how many of them nobody has yet); (0, 0) where the kernel knows none."""
    fields = _fields(Path("/proc/meminfo").read_text())
    return fields.get("Hugepagesize", 0) * 1024, fields.get("HugePages_Free", 0) - fields.get("HugePages_Rsvd", 0)


def huge_bytes(start: int) -> int:
    """Bytes of the mapping at the address `start` that this process's page tables hold as huge pages. Walks the page
    tables of all it maps."""
    _, _, behind = Path("/proc/self/smaps").read_text().partition(f"\n{start:08x}-")
    fields = _fields(behind.partition("VmFlags:")[0].partition("\n")[2])
    return sum(fields.get(name, 0) for name in _HUGE) * 1024


def _fields(text: str) -> dict[str, int]:
    """Numbers of lines like "Name:   12 kB"."""
    lines = (line.split() for line in text.splitlines())
    return {name.rstrip(":"): int(number) for name, number, *_ in (line for line in lines if len(line) > 1)}
