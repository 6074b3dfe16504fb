"""Says once that the daemon is gone and once that it is back, however often it is tried in between."""

from __future__ import annotations

import logging
import time

__all__ = ["Outage"]


class Outage:
    """One connection's outages, told to `log`."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._since: float | None = None

    def goes_on(self, error: Exception) -> None:
        """The daemon could not be reached, or was lost."""
        if self._since is None:
            self._since = time.monotonic()
            self._log.warning("%s; requests are computed without the cache until it is back", error)
        else:
            self._log.debug("%s", error)

    def over(self) -> None:
        """The daemon answers."""
        if self._since is not None:
            self._log.info("connected to the daemon again after %.0f s", time.monotonic() - self._since)
            self._since = None
