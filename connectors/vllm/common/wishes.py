# SPDX-License-Identifier: Apache-2.0
"""What a request asks of the cache for itself: in `kv_transfer_params`, or by an orchestrator's `kv_hints`.

`kv_transfer_params` are shared with other connectors, so names that are not ours are theirs, unless one looks like a
slip. Of hints (vLLM 0.32 on: an envelope of actions, each with a type, a version and a payload) the types `pin`,
`retain`, `prefetch` and `demote` are ours. The front end refuses parameters that cannot be meant (frontend/wishes.py).
Hints are advice, of whoever routes requests and not of whoever sends them: one that cannot be meant, and a parameter
that came past the front end, is said in the log and left undone. Pure functions of what the request brings.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loracache.client.requests import MAX_TTL_S, PRIORITIES

__all__ = ["Wishes", "slips", "wishes_of", "wrong_wishes"]

_VERSION = "1"
_DEMOTE_TO = ("disk", "redis")


@dataclass(frozen=True, slots=True)
class Wishes:
    """store: whether its KV may be, or that of how many leading tokens. load: whether its KV may be. pin: seconds for
    which it stays in memory after the request, 0: as any other. keep: the same, but that it goes where nothing else
    may, and that its time begins anew with each use. priority: low, normal or high, "" as any other. prefetch: raise
    what slow tiers have of it as soon as it arrives. demote: the tier that its KV goes to after the request, or "".
    returns_in: seconds after its end in which its KV will be asked for again, 0: nobody knows.
    """

    store: bool | int = True
    load: bool = True
    pin: float = 0.0
    keep: float = 0.0
    priority: str = ""
    prefetch: bool = False
    demote: str = ""
    returns_in: float = 0.0

    @property
    def stored_tokens(self) -> int:
        """Leading tokens that may be stored."""
        if isinstance(self.store, bool):
            return sys.maxsize if self.store else 0
        return self.store

    @property
    def afterwards(self) -> bool:
        """Whether something is to be done when the request is over."""
        return bool(self.pin or self.keep or self.priority or self.demote or self.returns_in)


def wishes_of(request: Any) -> tuple[Wishes, list[str]]:
    """A request's wishes, and in words what of them cannot be served, naming value and fix."""
    params = getattr(request, "kv_transfer_params", None)
    problems = wrong_wishes(params) + slips(params)
    known = {name: value for name, value in _named(params) if name in _PARAMS and not _PARAMS[name](value)}
    return _of_hints(getattr(request, "kv_hints", None), Wishes(**known), problems), problems


def wrong_wishes(params: Any) -> list[str]:
    """Which `kv_transfer_params` of ours have a value that cannot be meant, naming value and fix."""
    checked = [(name, value, _PARAMS[name](value)) for name, value in _named(params) if name in _PARAMS]
    return [f"kv_transfer_params: {name}={value!r:.60} {problem}" for name, value, problem in checked if problem]


def slips(params: Any) -> list[str]:
    """Which names look like ours and are not: another connector's, or slips."""
    unknown = [(name, difflib.get_close_matches(str(name), _PARAMS, n=1, cutoff=0.75)) for name, _ in _named(params)]
    return [
        f"kv_transfer_params: {name!r:.60} is not known; did you mean {close[0]!r}?"
        for name, close in unknown
        if name not in _PARAMS and close
    ]


def _named(params: Any) -> list[tuple[Any, Any]]:
    return list(params.items()) if isinstance(params, Mapping) else []


def _of_hints(envelope: Any, wishes: Wishes, problems: list[str]) -> Wishes:
    for action in getattr(envelope, "actions", None) or ():
        kind, version = str(action.action_type), str(action.action_version)
        payload = action.payload if isinstance(action.payload, Mapping) else {}
        if kind not in _ACTIONS:
            continue  # somebody else's
        if version.partition(".")[0] != _VERSION:
            problems.append(f"kv_hints: {kind} has version {version!r:.20}; send version {_VERSION}")
            continue
        problem, change = _ACTIONS[kind](payload)
        if problem:
            problems.append(f"kv_hints: {kind}: {problem}")
        else:
            wishes = replace(wishes, **change)
    return wishes


def _flag(value: object) -> str:
    return "" if isinstance(value, bool) else "must be true or false"


def _flag_or_tokens(value: object) -> str:
    fits = isinstance(value, int) and value >= 0  # a bool, too
    return "" if fits else "must be true or false, or how many of its tokens, 0 or more"


def _seconds(value: object) -> str:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_TTL_S
    return "" if fits else f"must be seconds, more than 0 and at most {MAX_TTL_S:.0f}"


def _pin(payload: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    ttl = payload.get("ttl")
    problem = _seconds(ttl)
    return (f"ttl={ttl!r:.60} {problem}" if problem else ""), {"pin": ttl}


def _prefetch(payload: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Of this request, or, where its payload says when, of the one that goes on with it."""
    if "returns_in" not in payload:
        return "", {"prefetch": True}
    seconds = payload["returns_in"]
    problem = _seconds(seconds)
    return (f"returns_in={seconds!r:.60} {problem}" if problem else ""), {"returns_in": seconds}


def _demote(payload: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    tier = payload.get("tier", _DEMOTE_TO[0])
    problem = "" if tier in _DEMOTE_TO else f"tier={tier!r:.60} must be one of {', '.join(_DEMOTE_TO)}"
    return problem, {"demote": tier}


def _priority(value: object) -> str:
    return "" if isinstance(value, str) and value in PRIORITIES else f"must be one of {', '.join(PRIORITIES)}"


_PARAMS: dict[str, Callable[[object], str]] = {
    "store": _flag_or_tokens,
    "load": _flag,
    "pin": _seconds,
    "keep": _seconds,
    "priority": _priority,
    "returns_in": _seconds,
}
_ACTIONS: dict[str, Callable[[Mapping[str, Any]], tuple[str, dict[str, Any]]]] = {
    "pin": _pin,
    "retain": _pin,
    "prefetch": _prefetch,
    "demote": _demote,
}
