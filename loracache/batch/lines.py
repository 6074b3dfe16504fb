# SPDX-License-Identifier: Apache-2.0
"""A batch file of OpenAI's format: one request a line, plain or gzipped, from a file or from standard input.

What is kept of a line is where it stands: bodies are read again when they are sent. A pipe and a gzipped file go by
way of a temporary file.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import sys
import tempfile
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from loracache.batch import strict_json
from loracache.errors import ConfigError

__all__ = ["PATHS", "BatchFile", "Line", "LineFault"]

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
_MOST_LINE = 256 << 20  # bytes
_PART = 1 << 20  # of a line that may be longer than memory
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Line:
    """A request. number: of its line, from 1."""

    number: int
    custom_id: str
    path: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LineFault:
    """A line that is no request. field: the one that is wrong, "" for the whole line."""

    number: int
    custom_id: str | None
    field: str
    message: str


class BatchFile:
    """Lines of `path`, "-" for standard input. Raises ConfigError where it cannot be read."""

    def __init__(self, path: str) -> None:
        self.name = "standard input" if path == "-" else path
        self._file = self._opened(path)
        self._state = self._looked_at()
        self._starts = array("q")
        digest = hashlib.sha256()
        begin = at = 0
        while part := self._file.readline(_PART):
            digest.update(part)
            if begin == at:
                self._starts.append(-1)
            if part.strip():
                self._starts[-1] = begin
            at += len(part)
            if part.endswith(b"\n"):
                begin = at
        self.size = at
        """Bytes of the whole text."""
        self.digest = digest.hexdigest()
        """Of it."""

    def __len__(self) -> int:
        """Lines, blank ones too: so that a number is that of an editor."""
        return len(self._starts)

    @property
    def requests(self) -> int:
        """Lines that are not blank."""
        return sum(start >= 0 for start in self._starts)

    @property
    def changed(self) -> bool:
        """Whether somebody has written to it since it was opened."""
        return self._looked_at() != self._state

    def close(self) -> None:
        """The file is not read any more."""
        self._file.close()

    def lines(self) -> Iterator[Line | LineFault]:
        """All that are not blank, each checked; a custom_id that an earlier line has is a fault."""
        seen: set[str] = set()
        for number in range(1, len(self) + 1):
            if self._starts[number - 1] < 0:
                continue
            found = self.line(number)
            name = found.custom_id
            if isinstance(found, Line) and name in seen:
                told = f"line {number}: custom_id {found.custom_id[:100]!r} is an earlier line's; give each its own"
                found = LineFault(number, name, "custom_id", told)
            if name is not None:
                seen.add(name)
            yield found

    def line(self, number: int) -> Line | LineFault:
        """The request at line `number`, or what is wrong with it."""
        self._file.seek(self._starts[number - 1])
        text = self._file.readline(_MOST_LINE + 1)
        if len(text) > _MOST_LINE:
            return LineFault(number, None, "", f"line {number}: it is longer than {_MOST_LINE >> 20} MiB")
        return _checked(number, text)

    def _looked_at(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def _opened(self, path: str) -> IO[bytes]:
        if path == "-" and sys.stdin is None:
            raise ConfigError("standard input is closed; name a file")
        try:
            source: IO[bytes] = sys.stdin.buffer if path == "-" else Path(path).open("rb")  # noqa: SIM115
            if path == "-" or not source.seekable():
                source = _spooled(source)
            zipped = source.read(len(_GZIP)) == _GZIP
            source.seek(0)
            if not zipped:
                return source
            with source, gzip.GzipFile(fileobj=source) as text:
                return _spooled(cast(IO[bytes], text))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ConfigError(f"{self.name} is a damaged gzip file, or cut short: {error}") from None
        except OSError as error:
            raise ConfigError(f"{self.name} cannot be read: {error.strerror or error}") from None


def _spooled(source: IO[bytes]) -> IO[bytes]:
    """What comes of `source`, as a file that can be read again."""
    spool: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - BatchFile closes it
    shutil.copyfileobj(source, spool, 1 << 20)
    spool.seek(0)
    return spool


def _checked(number: int, text: bytes) -> Line | LineFault:
    try:
        found = strict_json.parse(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return LineFault(number, None, "", f"line {number}: it is not in UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return LineFault(number, None, "", f"line {number}: it is no JSON: {error}")
    if not isinstance(found, dict):
        return LineFault(number, None, "", f"line {number}: it is no JSON object")
    custom_id = found.get("custom_id")
    known = custom_id if isinstance(custom_id, str) else None

    def fault(field: str, problem: str) -> LineFault:
        return LineFault(number, known, field, f"line {number}: {field} {problem}")

    if not known:
        return fault("custom_id", f"is {_shown(custom_id)}; give each request one of its own, as text")
    if found.get("method", "POST") != "POST":
        return fault("method", f"is {_shown(found['method'])}; it must be POST")
    if found.get("url") not in PATHS:
        return fault("url", f"is {_shown(found.get('url'))}; it must be one of {', '.join(PATHS)}")
    body = found.get("body")
    if not isinstance(body, dict):
        return fault("body", f"is {_shown(body)}; it must be an object, the request's")
    if body.get("stream"):
        return fault("body.stream", "is set; an answer of a batch is one line")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        return fault("body.model", f"is {_shown(model)}; it must be text")
    return Line(number, known, found["url"], body)


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:100]
