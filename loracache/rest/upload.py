# SPDX-License-Identifier: Apache-2.0
"""Takes an uploaded PEFT folder in: the parts of a multipart body go straight to files in a folder of their own.

Only the two files that an adapter consists of are kept, under those very names; what else is in the folder (a README, a
tokenizer) is read past. Threading: the event loop; files are written on its threads.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from loracache.adapters.peft import CONFIG, CONVERT, PICKLES, WEIGHTS

__all__ = ["BadUpload", "discard", "receive", "remove_leftovers"]

_PREFIX = "upload-"
_AT_ONCE = 4 << 20
_MOST_PARTS = 64
_WANTED = (CONFIG, WEIGHTS)


class BadUpload(ValueError):
    """The body is not an upload; says what is wrong with which part."""


class _Parts:
    """What the parser calls: opens a file for each part that is wanted, and gathers what is to be written to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = b""
        self._header = b""
        self._disposition = b""
        self._file: IO[bytes] | None = None
        self._count = 0
        self.seen: list[str] = []
        self.unwritten: list[tuple[IO[bytes], bytes]] = []
        self.ended: list[IO[bytes]] = []
        self.pending = 0
        self.whole = False

    def on_part_begin(self) -> None:
        self._count += 1
        if self._count > _MOST_PARTS:
            raise BadUpload(f"more than {_MOST_PARTS} files; upload {CONFIG} and {WEIGHTS}")
        self._disposition = b""

    def on_header_begin(self) -> None:
        self._name = self._header = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._header

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"filename", b"").decode("utf-8", "replace")
        if not name or name in (".", "..") or any(each in name for each in "/\\\0"):
            raise BadUpload(f"{name[:200]!a} is not a file's name; give each part the bare name of its file")
        if name in self.seen:
            raise BadUpload(f"{name!a} is there twice")
        self.seen.append(name)
        self._file = open(self._folder / name, "xb", buffering=0) if name in _WANTED else None  # noqa: SIM115

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self.unwritten.append((self._file, data[start:end]))
            self.pending += end - start

    def on_part_end(self) -> None:
        if self._file is not None:
            self.ended.append(self._file)
            self._file = None

    def on_end(self) -> None:
        self.whole = True

    def write(self) -> None:
        """Bring what was gathered to the files. Blocks."""
        for file, data in self.unwritten:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
        self.unwritten.clear()
        self.pending = 0
        for file in self.ended:
            file.close()
        self.ended.clear()

    def close(self) -> None:
        """Close what is open still."""
        for file in (self._file, *self.ended):
            if file is not None:
                file.close()


async def receive(body: AsyncIterator[bytes], content_type: str, parent: Path) -> Path:
    """A new folder in `parent` with the two files. Raises BadUpload, and OSError where they cannot be written; nothing
    is left behind then.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise BadUpload(f"content-type is {content_type[:100]!a}; send multipart/form-data with a file a part")
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    parts = _Parts(folder)
    try:
        callbacks: Any = {name: getattr(parts, name) for name in dir(parts) if name.startswith("on_")}
        parser = MultipartParser(boundary, callbacks)
        async for data in body:
            parser.write(data)
            if parts.pending >= _AT_ONCE:
                await asyncio.to_thread(parts.write)
        parser.finalize()
        await asyncio.to_thread(parts.write)
        if not parts.whole:
            raise BadUpload("the body ends in the middle of a part; send it again")
        missing = [name for name in _WANTED if name not in parts.seen]
        if missing:
            pickled = f"; save pickles as safetensors{CONVERT}" if any(name in PICKLES for name in parts.seen) else ""
            what = f"{' and '.join(missing)} not among the files {parts.seen}"
            raise BadUpload(f"{what}; a PEFT folder has both{pickled}")
    except BaseException as error:
        parts.close()
        await discard(folder)
        if isinstance(error, FormParserError):
            raise BadUpload(f"the body is not multipart/form-data: {error}") from None
        raise
    return folder


async def discard(folder: Path) -> None:
    """Take a folder away with all that is in it."""
    await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))


def remove_leftovers(parent: Path) -> None:
    """What an earlier process did not come to remove. Blocks."""
    for folder in parent.glob(f"{_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)
