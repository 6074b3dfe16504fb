# SPDX-License-Identifier: Apache-2.0
"""How each field of a message is checked: by its name, which means the same in every message. Pure functions that
answer what is wrong, or "".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, get_args

from loracache.keys import KEY_BYTES, is_digest

__all__ = ["CHECKS", "LEASE_BYTES", "MAX_TTL_S", "MAX_WAIT_S", "PRIORITIES", "Priority", "is_int"]

LEASE_BYTES = 16
MAX_TTL_S = 3600.0
MAX_WAIT_S = 600.0
Priority = Literal["low", "normal", "high"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)

_MAX_TEXT = 64 << 10
_MAX_SHORT = 300
_MAX_TEXTS = 1000
_OWNERS = ("tenant", "adapter", "model")  # who may have a quota
_COUNTER = re.compile(r"[a-z0-9_.]{1,64}")


def is_int(value: object) -> bool:
    """Whether it is an integer and no boolean."""
    return type(value) is int


def _text(value: object) -> str:
    return "" if isinstance(value, str) and len(value) <= _MAX_TEXT else f"must be a string of at most {_MAX_TEXT}"


def _keys(value: object) -> str:
    fits = isinstance(value, bytes) and len(value) % KEY_BYTES == 0
    return "" if fits else f"must be bytes, {KEY_BYTES} a key"


def _lease(value: object) -> str:
    fits = isinstance(value, bytes) and len(value) in (0, LEASE_BYTES)
    return "" if fits else f"must be {LEASE_BYTES} bytes"


def _ttl(value: object) -> str:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_TTL_S
    return "" if fits else f"must be seconds from 0 to {MAX_TTL_S:.0f}"


def _group(value: object) -> str:
    return "" if is_int(value) and 1 <= value <= 4096 else "must be an integer from 1 to 4096"  # type: ignore[operator]


def _count(value: object) -> str:
    return "" if is_int(value) and 1 <= value <= 10_000 else "must be an integer from 1 to 10000"  # type: ignore[operator]


def _requests(value: object) -> str:
    return "" if is_int(value) and -1 <= value < 2**31 else "must be a number of requests"  # type: ignore[operator]


def _unsigned(value: object) -> str:
    fits = isinstance(value, list) and all(is_int(item) and 0 <= item < 2**64 for item in value)
    return "" if fits else "must be a list of unsigned integers of 64 bits"


def _texts(value: object) -> str:
    fits = isinstance(value, list) and len(value) <= _MAX_TEXTS and all(isinstance(item, str) for item in value)
    return "" if fits else f"must be a list of strings, {_MAX_TEXTS} at most"


def _wait(value: object) -> str:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_WAIT_S
    return "" if fits else f"must be seconds from 0 to {MAX_WAIT_S:.0f}"


def _selector(value: object) -> str:
    if not isinstance(value, dict) or not value.keys() <= _SELECTOR.keys():
        return f"must be a map of {', '.join(_SELECTOR)}"
    problems = (
        f"must be valid: its {name} {_SELECTOR[name](item)}" for name, item in value.items() if _SELECTOR[name](item)
    )
    return next(problems, "")


def _short(value: object) -> str:
    return "" if isinstance(value, str) and len(value) <= _MAX_SHORT else f"must be a string of at most {_MAX_SHORT}"


def _tokens(value: object) -> str:
    return "" if isinstance(value, bytes) and len(value) % 4 == 0 else "must be bytes, 4 a token"


def _salt(value: object) -> str:
    fits = isinstance(value, str) and (not value or is_digest(value))
    return "" if fits else "must be empty or 64 hexadecimal digits"


def _counts(value: object) -> str:
    fits = isinstance(value, dict) and len(value) <= 64 and all(_is_count(*item) for item in value.items())
    return "" if fits else "must map at most 64 names of a-z, 0-9, _ and . to counts"


def _is_count(name: object, count: object) -> bool:
    return isinstance(name, str) and bool(_COUNTER.fullmatch(name)) and is_int(count) and 0 <= count < 2**32  # type: ignore[operator]


_SELECTOR: dict[str, Callable[[object], str]] = {
    "keys": _keys,
    "model": _short,
    "tokens": _tokens,
    "adapter": _short,
    "salt": _salt,
}

CHECKS: dict[str, Callable[[object], str]] = {
    "adapters": _keys,
    "after": _short,
    "beside": _keys,
    "by": _short,
    "checksums": _unsigned,
    "count": _count,
    "counts": _counts,
    "delay": _ttl,
    "descriptor": _text,
    "group": _group,
    "hard": lambda value: "" if is_int(value) and -1 <= value < 2**63 else "must be bytes, or -1 for none",  # type: ignore[operator]
    "keep": lambda value: "" if isinstance(value, bool) else "must be true or false",
    "keys": _keys,
    "kind": lambda value: "" if value in _OWNERS else "must be tenant, adapter or model",
    "lease": _lease,
    "name": _text,
    "names": _texts,
    "namespace": lambda value: "" if isinstance(value, bytes) and len(value) == KEY_BYTES else "must be 32 bytes",
    "parents": _keys,
    "path": _text,
    "prefill": lambda value: "" if is_int(value) and 0 <= value < 2**63 else "must be bytes a second",  # type: ignore[operator]
    "priority": lambda value: "" if value in ("", *PRIORITIES) else "must be low, normal or high",
    "running": _requests,
    "scope": _salt,
    "selector": _selector,
    "since": lambda value: "" if is_int(value) and 0 <= value < 2**63 else "must be an integer of 63 bits",  # type: ignore[operator]
    "sizes": _unsigned,
    "soft": lambda value: "" if is_int(value) and 0 <= value < 2**63 else "must be bytes",  # type: ignore[operator]
    "source": _text,
    "tier": _text,
    "tiers": _texts,
    "ttl": _ttl,
    "wait": _wait,
    "waiting": _requests,
    "wanted": _keys,
}
