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
    if fault := header.restore(found, compressed, [payload], None):
        return Verdict(None, Fault.DAMAGED, fault)
    if integrity_key is not None and (fault := header.restore(found, compressed, [payload], integrity_key)):
        return Verdict(info, Fault.UNPROVEN, fault)
    return Verdict(info)
