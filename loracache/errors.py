# SPDX-License-Identifier: Apache-2.0
"""Every exception LoRACache raises on purpose.

    LoRACacheError
    ├── ConfigError            a setting is wrong: names the key, the value and the fix   (also ValueError)
    ├── UsageError             a call is wrong: bad key length, negative size, ...        (also ValueError)
    ├── ProtocolError          a frame is malformed, too large, or of another version
    ├── Unavailable            no daemon answers, or it stopped answering                 (also ConnectionError)
    ├── Rejected               the daemon understood the call and refuses it: names why
    │   └── Unknown            it names an adapter, model or operation that is not there
    └── LeaseLost              bytes held under a lease may have been reused meanwhile

Failures of a tier (disk full, Redis gone, checksum wrong) are not exceptions: they are counted misses, reported as
`storage_backends.base.Outcome` values and in `loracache status`.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "LeaseLost",
    "LoRACacheError",
    "ProtocolError",
    "Rejected",
    "Unavailable",
    "Unknown",
    "UsageError",
]


class LoRACacheError(Exception):
    """Base of all errors raised by LoRACache."""


class ConfigError(LoRACacheError, ValueError):
    """A setting is wrong; the message names the key, the value and the fix."""


class UsageError(LoRACacheError, ValueError):
    """A call is wrong in itself; nothing was sent and nothing changed."""


class ProtocolError(LoRACacheError):
    """A frame cannot be understood; the connection it came on is closed."""


class Unavailable(LoRACacheError, ConnectionError):
    """The daemon cannot be reached, or did not answer in time."""


class Rejected(LoRACacheError):
    """The daemon understood the call and refuses it; nothing changed."""


class Unknown(Rejected):
    """What the call names is not there."""


class LeaseLost(LoRACacheError):
    """A lease ended before its holder was done: what was read under it must not be used."""
