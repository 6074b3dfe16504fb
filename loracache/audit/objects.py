# SPDX-License-Identifier: Apache-2.0
"""Whether an object's bytes are what its header says, wherever they are kept. Nothing is changed here."""

from __future__ import annotations

from dataclasses import dataclass

from loracache.audit.faults import Fault
from loracache.storage_backends import header
from loracache.storage_backends.base import ObjectInfo

__all__ = ["Verdict", "judge"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """info: the object's, where its bytes are whole. fault, detail: what is wrong, if anything; an object that is
    `UNPROVEN` has both."""

    info: ObjectInfo | None
    fault: Fault | None = None
    detail: str = ""


def judge(found: header.Header, kept: memoryview, integrity_key: bytes | None) -> Verdict:
    """kept: the bytes as they are kept, `stored or size` of them."""
    info = found.info
    payload = memoryview(bytearray(info.size)) if info.stored else kept
    compressed = kept if info.stored else None
    fault = header.restore(found, compressed, [payload], integrity_key)
    if not fault:
        return Verdict(info)
    damage = header.restore(found, compressed, [payload], None) if integrity_key is not None else fault
    return Verdict(None, Fault.DAMAGED, damage) if damage else Verdict(info, Fault.UNPROVEN, fault)
