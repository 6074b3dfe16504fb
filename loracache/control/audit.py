# SPDX-License-Identifier: Apache-2.0
"""The audit log: what operators changed, when, and who it was. One JSON object a line.

Names and counts only: no token ids, no secrets. Threading: the event loop; a line is a few hundred bytes.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from loracache.errors import ConfigError
from loracache.folder import open_file
from loracache.logs import utc_text

__all__ = ["Audit"]

_MAY_PASS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
_log = logging.getLogger("loracache.audit")


class Audit:
    """Appends to the file at `path` (made with mode 0600, and made again where it was rotated away), or to the daemon's
    own log where there is none. Raises ConfigError for a file that cannot be one; a disk that is full or takes nothing
    is tried again with each line.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._descriptor = -1
        self._place = (0, 0)
        if path is not None:
            try:
                self._open(path)
            except OSError as error:
                if error.errno not in _MAY_PASS:
                    raise ConfigError(
                        f"audit_log={str(path)!r} cannot be written: {error.strerror}; give another file"
                    ) from None
                _log.warning("the audit log %s cannot be written now: %s; its lines go here", path, error.strerror)

    def write(self, by: str, verb: str, **facts: Any) -> None:
        """One line. by: who it was, as the kernel or a token says. What cannot be written goes to the daemon's log, and
        nothing fails for it."""
        told = {name: fact for name, fact in facts.items() if fact not in ("", None)}
        line = json.dumps({"time": utc_text(time.time()), "by": by, "verb": verb} | told)
        if self._path is None:
            _log.info("%s", line)
            return
        try:
            self._open(self._path)
            os.write(self._descriptor, line.encode() + b"\n")
        except OSError as error:
            _log.error("the audit log %s cannot be written (%s): %s", self._path, error.strerror, line)

    def close(self) -> None:
        """The last call."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self, path: Path) -> None:
        """Open the file, or open it again where another one, or none, stands in its place."""
        try:
            found = os.stat(path)
            place = (found.st_dev, found.st_ino)
        except FileNotFoundError:
            place = (0, 0)
        if self._descriptor >= 0 and place == self._place:
            return
        self.close()
        self._descriptor = open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        made = os.fstat(self._descriptor)
        self._place = (made.st_dev, made.st_ino)
