# SPDX-License-Identifier: Apache-2.0
"""Every request there is, and how a received one is decoded. Pure functions; used by the daemon.

The unions are for `match`: mypy sees a request that no branch serves. A request is listed here to exist.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, get_args

from loracache.errors import ProtocolError
from loracache.wire import control_messages, protocol
from loracache.wire.fields import is_int

__all__ = [
    "OPERATIONS",
    "AdapterChange",
    "AnyRequest",
    "ControlRequest",
    "DataRequest",
    "QuotaRequest",
    "decode_request",
]

DataRequest = (
    protocol.Lookup
    | protocol.Acquire
    | protocol.Reserve
    | protocol.Commit
    | protocol.Release
    | protocol.Renew
    | protocol.Prefetch
    | protocol.Keep
    | protocol.Abort
    | protocol.Flush
    | protocol.Report
    | protocol.Status
    | protocol.Hello
    | protocol.Register
    | protocol.Resident
    | protocol.AdapterDigest
    | protocol.AdapterAdd
    | protocol.AdapterFind
    | protocol.AdapterShow
    | protocol.AdapterList
    | protocol.AdapterPrioritize
    | protocol.AdapterRemove
)
AdapterChange = protocol.AdapterAdd | protocol.AdapterPrioritize | protocol.AdapterRemove
ControlRequest = (
    control_messages.Locate
    | control_messages.LocateChain
    | control_messages.SpaceList
    | control_messages.Pin
    | control_messages.Unpin
    | control_messages.Evict
    | control_messages.Clear
    | control_messages.Admit
    | control_messages.Move
    | control_messages.Compress
    | control_messages.Decompress
    | control_messages.OperationShow
    | control_messages.OperationList
    | control_messages.Cancel
    | control_messages.ObjectList
    | control_messages.Tree
    | control_messages.EventList
    | control_messages.ConfigShow
    | control_messages.IndexCheck
)
QuotaRequest = control_messages.QuotaSet | control_messages.QuotaRemove | control_messages.QuotaList
AnyRequest = DataRequest | ControlRequest | QuotaRequest

OPERATIONS: dict[str, type[AnyRequest]] = {cls.operation: cls for cls in get_args(AnyRequest)}
_NEEDED = {cls: sum(field.default is MISSING for field in fields(cls)) for cls in OPERATIONS.values()}


def decode_request(message: Any) -> tuple[int, AnyRequest]:
    """(number, request) of a received message. Raises ProtocolError naming the field and the value."""
    if not isinstance(message, list) or len(message) < 2 or not is_int(message[0]):
        raise ProtocolError("a request is a list: number, operation, fields")
    number, operation, *values = message
    cls = OPERATIONS.get(operation) if isinstance(operation, str) else None
    if cls is None:
        raise ProtocolError(f"unknown operation {protocol.shown(operation)}; known: {', '.join(OPERATIONS)}")
    names = protocol.field_names(cls)
    if not _NEEDED[cls] <= len(values) <= len(names):
        raise ProtocolError(f"{operation} takes {len(names)} fields ({', '.join(names)}), not {len(values)}")
    request = cls(*values)
    if wrong := protocol.fault(request):
        raise ProtocolError(wrong)
    return number, request
