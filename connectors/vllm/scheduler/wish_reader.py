# SPDX-License-Identifier: Apache-2.0
"""What requests ask for themselves, read by the scheduler's side; what cannot be meant is said once and counted."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from loracache.connectors.vllm.common.wishes import Wishes, wishes_of

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from loracache.connectors.vllm.link.scheduler import SchedulerLink

__all__ = ["WishReader"]

_log = logging.getLogger(__name__)
_SAID = 100  # different complaints that the log gets


class WishReader:
    """Of one engine's requests."""

    def __init__(self, link: SchedulerLink) -> None:
        self._link = link
        self._said: set[str] = set()

    def read(self, request: Request) -> Wishes:
        """Those of a request that can be meant."""
        wishes, problems = wishes_of(request)
        for problem in problems:
            self._link.count("wish.refused", 1)
            if problem not in self._said and len(self._said) < _SAID:
                self._said.add(problem)
                _log.warning("request %s: %s; it is served without that", request.request_id, problem)
        return wishes
