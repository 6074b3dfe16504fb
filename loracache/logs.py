# SPDX-License-Identifier: Apache-2.0
"""How the daemon and its REST process log: lines for people, or one JSON object a line for what collects logs.

Standard library only. Both processes write to standard error.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from typing import Literal

__all__ = ["JsonFormatter", "LogFormat", "set_up_logging", "utc_text"]

LogFormat = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
_log = logging.getLogger(__name__)


def utc_text(seconds: float) -> str:
    """Unix seconds as ISO 8601 in UTC, with milliseconds."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(seconds % 1 * 1000):03d}Z"


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (UTC, milliseconds), level, logger, message; exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end. A line break inside a message or a traceback is `\\n` in the JSON string."""
        entry = {
            "time": utc_text(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up_logging(level: str, log_format: LogFormat) -> None:
    """Log everything of at least `level` ("info") to standard error. As JSON that holds for warnings and for what
    would end as a traceback too: a reader of JSON lines cannot read those.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if log_format == "json":
        logging.captureWarnings(True)
        sys.excepthook = lambda kind, error, trace: _log.critical("ended by", exc_info=(kind, error, trace))
        threading.excepthook = _thread_ended


def _thread_ended(end: threading.ExceptHookArgs) -> None:
    name = end.thread.name if end.thread is not None else "unknown"
    error = end.exc_value if end.exc_value is not None else end.exc_type()
    _log.critical("thread %s ended by", name, exc_info=error)
