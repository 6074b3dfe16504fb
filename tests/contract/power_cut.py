# SPDX-License-Identifier: Apache-2.0
"""A file system that forgets: records what is done to the files below a folder, and builds what a power cut may leave.

What was done is durable once the file (its bytes) or the folder (its names) was synced after it; everything else may
have survived or not, each step by itself, a write also in part. That is more than a journal of a real file system
loses, and all that POSIX lets it.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

SECTOR = 512


@dataclass
class Name:
    """In folder `folder`, `name` stands for `inode` from now on, or (None) for nothing."""

    folder: int
    name: str
    inode: int | None
    instead_of: int | None = None
    """Of a removal: what the name has to stand for."""


@dataclass
class Write:
    """Bytes of a file; None: it is cut off at `offset`."""

    inode: int
    offset: int
    data: bytes | None


@dataclass
class Sync:
    """All that was done to the file or folder before is durable."""

    inode: int


@dataclass
class Tree:
    """Folders and files by number; folder 0 is the root."""

    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    files: dict[int, bytearray] = field(default_factory=dict)

    def apply(self, step: Name | Write) -> None:
        if isinstance(step, Name):
            names = self.folders.setdefault(step.folder, {})
            if step.inode is not None:
                names[step.name] = step.inode
            elif names.get(step.name) == step.instead_of:
                del names[step.name]
            return
        content = self.files.setdefault(step.inode, bytearray())
        if step.data is None:
            del content[step.offset :]
            content.extend(bytes(step.offset - len(content)))
        else:
            content.extend(bytes(max(0, step.offset - len(content))))
            content[step.offset : step.offset + len(step.data)] = step.data

    def build(self, path: Path, folder: int = 0) -> None:
        path.mkdir(mode=0o700, exist_ok=True)
        for name, inode in self.folders.get(folder, {}).items():
            if inode in self.folders:
                self.build(path / name, inode)
            else:
                (path / name).write_bytes(self.files.get(inode, b""))
                (path / name).chmod(0o600)

    def look(self, folder: int = 0) -> dict[str, Any]:
        """Everything, by name."""
        return {
            name: self.look(inode) if inode in self.folders else bytes(self.files.get(inode, b""))
            for name, inode in self.folders.get(folder, {}).items()
        }


def looked(path: Path) -> dict[str, Any]:
    """The same of a real folder."""
    return {each.name: looked(each) if each.is_dir() else each.read_bytes() for each in path.iterdir()}


class Recorder:
    """Below `root`, empty at first: `steps` is what was done, `tree` what is there now. Nothing is really synced."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.steps: list[Name | Write | Sync] = []
        self.tree = Tree()
        self._next = 1
        self._open: dict[int, int] = {}  # descriptor -> inode
        self._real: dict[str, Callable[..., Any]] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        ours = {
            "open": self._on_open, "close": self._on_close, "write": self._on_write, "pwrite": self._on_pwrite,
            "pwritev": self._on_pwritev, "ftruncate": self._on_truncate, "mkdir": self._on_mkdir,
            "rename": self._on_rename, "replace": self._on_rename, "unlink": self._on_unlink,
            "fsync": self._on_sync, "fdatasync": self._on_sync,
        }  # fmt: skip
        with contextlib.ExitStack() as stack:
            for name, call in ours.items():
                self._real[name] = getattr(os, name)
                stack.enter_context(patch.object(os, name, call))
            yield

    def cut(self, count: int, chance: random.Random, survives: float) -> Tree:
        """What may be left when the power goes after `count` steps: what was synced, and of the rest each step with a
        chance."""
        done = self.steps[:count]
        synced_at: dict[int, int] = {step.inode: at for at, step in enumerate(done) if isinstance(step, Sync)}
        left = Tree()
        left.folders |= {each: {} for each in self.tree.folders}
        for at, step in enumerate(done):
            if isinstance(step, Sync):
                continue
            if synced_at.get(step.folder if isinstance(step, Name) else step.inode, -1) > at:
                left.apply(step)
            elif chance.random() < survives:
                if isinstance(step, Write) and step.data and chance.random() < 0.5:
                    step = Write(
                        step.inode, step.offset, step.data[: chance.randrange(len(step.data)) // SECTOR * SECTOR]
                    )
                left.apply(step)
        return left

    # -- the calls ----------

    def _do(self, step: Name | Write) -> None:
        self.steps.append(step)
        self.tree.apply(step)

    def _place(self, path: Any) -> tuple[int, str] | None:
        """(folder, name) of a path below the root; None elsewhere."""
        try:
            parts = Path(os.fsdecode(path)).relative_to(self.root).parts
        except (ValueError, TypeError):
            return None
        folder = 0
        for part in parts[:-1]:
            folder = self.tree.folders[folder][part]
        return (folder, parts[-1]) if parts else (-1, "")

    def _inode(self, place: tuple[int, str]) -> int | None:
        return 0 if place[0] < 0 else self.tree.folders[place[0]].get(place[1])

    def _new(self) -> int:
        self._next += 1
        return self._next

    def _on_open(self, path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        descriptor: int = self._real["open"](path, flags, mode, **options)
        place = self._place(path)
        if place is None:
            return descriptor
        inode = self._inode(place)
        if inode is None:
            inode = self._new()
            self._do(Name(*place, inode))
            self._do(Write(inode, 0, None))
        elif flags & os.O_TRUNC:
            self._do(Write(inode, 0, None))
        self._open[descriptor] = inode
        return descriptor

    def _on_close(self, descriptor: int) -> None:
        self._open.pop(descriptor, None)
        self._real["close"](descriptor)

    def _on_write(self, descriptor: int, data: Any) -> int:
        if (
            inode := self._open.get(descriptor)
        ) is not None:  # all of ours append, or write from the start of a new file
            self._do(Write(inode, len(self.tree.files.get(inode, b"")), bytes(data)))
        count: int = self._real["write"](descriptor, data)
        return count

    def _on_pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        if (inode := self._open.get(descriptor)) is not None:
            self._do(Write(inode, offset, bytes(data)))
        count: int = self._real["pwrite"](descriptor, data, offset)
        return count

    def _on_pwritev(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        if (inode := self._open.get(descriptor)) is not None:
            self._do(Write(inode, offset, b"".join(buffers)))
        count: int = self._real["pwritev"](descriptor, buffers, offset)
        return count

    def _on_truncate(self, descriptor: int, length: int) -> None:
        if (inode := self._open.get(descriptor)) is not None:
            self._do(Write(inode, length, None))
        self._real["ftruncate"](descriptor, length)

    def _on_mkdir(self, path: Any, mode: int = 0o777, **options: Any) -> None:
        self._real["mkdir"](path, mode, **options)
        if (place := self._place(path)) is not None:
            inode = self._new()
            self.tree.folders[inode] = {}
            self._do(Name(*place, inode))

    def _on_rename(self, before: Any, after: Any, **options: Any) -> None:
        old, new = self._place(before), self._place(after)
        self._real["rename"](before, after, **options)
        if old is not None and new is not None:
            inode = self._inode(old)
            self._do(Name(*new, inode))
            self._do(Name(*old, None, inode))

    def _on_unlink(self, path: Any, **options: Any) -> None:
        self._real["unlink"](path, **options)
        if (place := self._place(path)) is not None:
            self._do(Name(*place, None, self._inode(place)))

    def _on_sync(self, descriptor: int) -> None:
        if (inode := self._open.get(descriptor)) is not None:
            self.steps.append(Sync(inode))
