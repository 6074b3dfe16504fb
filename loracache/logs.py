# SPDX-License-Identifier: Apache-2.0
"""How the daemon and its REST process log: lines for people, or one JSON object a line for what collects logs.

Of one kind of line a few are written each minute, and how many more there were: a full disk fails a thousand times a
second. A kind is a logger, a level and the message's format, so what should be told apart stands in the format.

Standard library only. Both processes write to standard error.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import threading
import time
from dataclasses import dataclass
from typing import Literal

__all__ = ["JsonFormatter", "LimitedHandler", "LogFormat", "set_up_logging", "utc_text"]

LogFormat = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
_WRITTEN = 5  # lines of one kind in a window; more of them say nothing new
_WINDOW_S = 60.0
_MOST_KINDS = 500
_WHOLE = "loracache.audit"  # whose every line is a record of its own
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


@dataclass(slots=True)
class _Window:
    """Lines of one kind since `began`: how many, and the last that was not written."""

    began: float
    lines: int = 0
    last: logging.LogRecord | None = None


class LimitedHandler(logging.Handler):
    """Hands records on to `target`, of one kind the first five in a minute. At its end, or when the process ends, one
    line says how many more there were. What is logged for debugging, and the audit log, passes whole.

    Threading: any; a timer's thread says what was left out.
    """

    def __init__(self, target: logging.Handler) -> None:
        super().__init__(target.level)
        self._target = target
        self._windows: dict[tuple[str, int, str], _Window] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Hand it on, or count it."""
        if record.levelno < logging.INFO or record.name == _WHOLE:
            self._target.handle(record)
            return
        now = time.monotonic()
        kind = (record.name, record.levelno, str(record.msg))
        if kind not in self._windows and len(self._windows) >= _MOST_KINDS:
            self._end_windows(_WINDOW_S)
            if len(self._windows) >= _MOST_KINDS:  # formats that somebody made up
                kind = ("", record.levelno, "")
        window = self._windows.get(kind)
        if window is None or now - window.began >= _WINDOW_S:
            if window is not None:
                self._end(kind, now)
            window = self._windows[kind] = _Window(now)
        window.lines += 1
        if window.lines <= _WRITTEN:
            self._target.handle(record)
            return
        if window.last is None:
            timer = threading.Timer(window.began + _WINDOW_S - now + 0.01, self._end_windows, (_WINDOW_S,))
            timer.daemon = True
            timer.start()
        window.last = record

    def close(self) -> None:
        """The process ends: say what was left out by now."""
        self._end_windows(0.0)
        super().close()

    def _end_windows(self, seconds: float) -> None:
        """Of those that began that long ago."""
        self.acquire()
        try:
            now = time.monotonic()
            for kind in [kind for kind, window in self._windows.items() if now - window.began >= seconds]:
                self._end(kind, now)
        finally:
            self.release()

    def _end(self, kind: tuple[str, int, str], now: float) -> None:
        window = self._windows.pop(kind)
        if window.last is not None:
            told = copy.copy(window.last)
            more, seconds = window.lines - _WRITTEN, max(1, round(now - window.began))
            told.msg = f"{window.last.getMessage()} ... and {more} more like it in {seconds} s"
            told.args = told.exc_info = told.exc_text = None
            self._target.handle(told)


def set_up_logging(level: str, log_format: LogFormat) -> None:
    """Log everything of at least `level` ("info") to standard error. As JSON that holds for warnings and for what
    would end as a traceback too: a reader of JSON lines cannot read those.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[LimitedHandler(handler)])
    if log_format == "json":
        logging.captureWarnings(True)
        sys.excepthook = lambda kind, error, trace: _log.critical("ended by", exc_info=(kind, error, trace))
        threading.excepthook = _thread_ended


def _thread_ended(end: threading.ExceptHookArgs) -> None:
    name = end.thread.name if end.thread is not None else "unknown"
    error = end.exc_value if end.exc_value is not None else end.exc_type()
    _log.critical("thread %s ended by", name, exc_info=error)
