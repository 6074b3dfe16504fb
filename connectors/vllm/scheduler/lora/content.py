# SPDX-License-Identifier: Apache-2.0
"""What is known of an adapter's content, and of a request's wait for one. Threading: the scheduler's loop."""

from __future__ import annotations

from dataclasses import dataclass

from loracache.backoff import Backoff

__all__ = ["Content", "Wait"]


@dataclass(slots=True)
class Content:
    """One content. path: a folder that holds it, or "". costs: pages by worker, once known. here: it can be copied in
    now. asked: the number of the question that fetches it, since: when it was. taken_in: when its folder last was.
    order: the number of the last order to copy it in, ready: how many workers did so. pauses: after failed copies.
    """

    digest: str
    pauses: Backoff
    path: str = ""
    costs: tuple[int, ...] | None = None
    here: bool = False
    asked: int = 0
    since: float = 0.0
    taken_in: float = 0.0
    lease: bytes = b""
    next_try: float = 0.0
    order: int = 0
    ready: int = 0
    problem: str = ""


@dataclass(slots=True)
class Wait:
    """A request's wait for a content that nobody has, or that could not be copied in. since: monotonic. cause: of the
    last copy that failed. over: it was given up."""

    since: float
    cause: str = ""
    over: bool = False
