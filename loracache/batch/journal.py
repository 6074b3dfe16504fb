# SPDX-License-Identifier: Apache-2.0
"""What a batch has answered so far, on disk as it comes, so that a run that is killed goes on where it was.

`OUT.partial` is the journal: its first line says of which input, then one line an answer, in the order they came. A
line counts once its newline is there. At the end the output is written from it and renamed into place; then it goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

from loracache.errors import ConfigError

__all__ = ["Journal", "Order", "Recorded", "draft_of", "journal_of"]

_VERSION = 1
_KEPT = "what is answered is kept, and the same command goes on"


class Order(StrEnum):
    """How the output's lines stand: as the input's, or as they were answered."""

    INPUT = "input"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the journal says of a line. failed: it is an error. passing: one that another try may mend. decode: tokens
    of the answer."""

    number: int
    failed: bool
    passing: bool
    decode: int


def journal_of(output: Path) -> Path:
    """Where the journal of that output is. Raises ConfigError where it has no name."""
    if not output.name:
        raise ConfigError("the output's name is empty; give -o OUT.jsonl")
    return output.with_name(output.name + ".partial")


def draft_of(output: Path) -> Path:
    """Where that output is written before it has its name."""
    return output.with_name(output.name + ".tmp")


class Journal:
    """The journal of `output` for the input of that digest. Raises ConfigError where it is another input's, another run
    holds it, or the output is there already. lasting: it stays where the run ends before it is done."""

    def __init__(self, output: Path, digest: str, *, lasting: bool = True) -> None:
        self._output = output
        self.kept = _KEPT if lasting else "what is answered is lost; give -o a file to keep it"
        """What becomes of the answers where the run ends before it is done, in words."""
        self._path, self._ready = journal_of(output), draft_of(output)
        try:
            self._refuse_another()
            self._file: IO[bytes] = self._path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"{self._path} is another run's that is under way; wait for it, or end it") from None
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be written: {error.strerror}") from None
        self._places: dict[int, int] = {}  # line number -> where its last record begins
        try:
            self._begin(digest)
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def __len__(self) -> int:
        return len(self._places)

    def _refuse_another(self) -> None:
        """Raises ConfigError where the output is there, and not from a run that was killed as it ended."""
        for path in (self._output, self._ready):
            if os.path.lexists(path) and not self._path.exists():
                raise ConfigError(f"{path} is there already; move it away, or name another output")
        if not os.path.lexists(self._output):
            return
        both = self._ready.exists() and self._output.exists()
        if not both or not self._ready.samefile(self._output):
            raise ConfigError(f"{self._output} is there already, and not from this run; move it away: {self.kept}")

    def _begin(self, digest: str) -> None:
        """Read what is there, and cut off a record that a kill left unfinished."""
        self._file.seek(0)
        head, own = self._file.readline(), {"batch": _VERSION, "input": digest}
        of = _input_of(head)
        if of != digest or not head.endswith(b"\n"):
            if not _json(own).startswith(head) and (of is None or self._answers()):
                raise ConfigError(f"{self._path} is of another input; move it away, or give the input that it is of")
            self._file.truncate(0)  # nothing was answered, of whichever input
            self._write(own)
            return
        while True:
            at = self._file.tell()
            record = self._file.readline()
            if not record.endswith(b"\n"):
                self._file.truncate(at)
                return
            found = _parsed(record)
            if found is None:  # the machine lost power: it is asked again
                continue
            if found.passing:
                self._places.pop(found.number, None)
            else:
                self._places[found.number] = at

    def _answers(self) -> bool:
        """Whether any of the records from here on is an answer, and no error."""
        return any(found is not None and not found.failed for found in map(_parsed, self._file))

    def add(
        self, number: int, output: dict[str, Any], *, failed: bool = False, passing: bool = False, decode: int = 0
    ) -> None:
        """The line of the output that a line of the input gets; see Recorded. The next run tries what passes again."""
        record = {"line": number, "failed": failed, "passing": passing, "decode": decode, "output": output}
        self._places[number] = self._write(record)

    def recorded(self) -> Iterator[Recorded]:
        """What earlier runs have answered, and this one."""
        for place in sorted(self._places.values()):
            self._file.seek(place)
            found = _parsed(self._file.readline())
            if found is not None:  # else somebody has written to it since
                yield found

    def finish(self, order: str) -> None:
        """Write the output from the journal, and take the journal away. Raises ConfigError where that cannot be."""
        by_line = [self._places[number] for number in sorted(self._places)]
        ready = self._ready
        self._refuse_another()
        try:
            self._output.unlink(missing_ok=True)  # which is `ready`, from a run that was killed here
            ready.unlink(missing_ok=True)
            with ready.open("xb") as file:
                for found in self._records(by_line if order == Order.INPUT else sorted(by_line)):
                    file.write(_json(found["output"]))
                file.flush()
                os.fsync(file.fileno())
            _give_name(ready, self._output)
        except FileExistsError:
            ready.unlink()
            raise ConfigError(f"{self._output} came meanwhile; move it away: {self.kept}") from None
        except OSError as error:
            with contextlib.suppress(OSError):
                ready.unlink()
            raise ConfigError(f"{ready} cannot be written: {error.strerror}; {self.kept}") from None
        self._path.unlink(missing_ok=True)
        ready.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Leave the journal as it is, for the next run."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())
            with contextlib.suppress(OSError):  # a full disk, which a write has told
                self._file.close()

    def _records(self, places: list[int]) -> Iterator[dict[str, Any]]:
        for place in places:
            self._file.seek(place)
            found = json.loads(self._file.readline())
            assert isinstance(found, dict)
            yield found

    def _write(self, record: dict[str, Any]) -> int:
        """Append it; where it begins. Flushed to the system: it outlives a kill of this process."""
        try:
            self._file.seek(0, os.SEEK_END)
            at = self._file.tell()
            self._file.write(_json(record))
            self._file.flush()
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be written: {error.strerror}; {self.kept}") from None
        return at


def _input_of(head: bytes) -> str | None:
    """The digest of the input that a journal's first line names; None where it is none of ours."""
    try:
        said = json.loads(head)
    except (ValueError, RecursionError):
        return None
    right = isinstance(said, dict) and said.keys() == {"batch", "input"} and said["batch"] == _VERSION
    return str(said["input"]) if right else None


def _parsed(record: bytes) -> Recorded | None:
    """What a line of the journal says; None where it is not one that was written here."""
    try:
        found = json.loads(record)
        number, failed, passing, decode = (found[name] for name in ("line", "failed", "passing", "decode"))
        right = type(number) is int and number > 0 and type(decode) is int and 0 <= decode < 1 << 40
        right = right and type(failed) is type(passing) is bool and isinstance(found["output"], dict)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return Recorded(number, failed, passing, decode) if right else None


def _give_name(file: Path, name: Path) -> None:
    """`file` is `name`, too, from now on. Raises FileExistsError where there is one of that name."""
    try:
        name.hardlink_to(file)
    except FileExistsError:
        raise
    except OSError:  # a file system without such links
        file.replace(name)


def _json(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say and UTF-8 cannot
        return json.dumps(value, separators=(",", ":")).encode() + b"\n"
