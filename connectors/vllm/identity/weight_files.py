# SPDX-License-Identifier: Apache-2.0
"""Which weights an engine computes with: a digest of all bytes of their files.

A file is read once and its digest remembered under its identity (device, inode, size, times) in a folder of the user's.
Threading: `find_weights` runs where the engine starts and only looks at names and times; `content_digest` reads, on
threads of its own that give way to the engine.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracache.connectors.vllm.common.cores import leave_pinned_core
from loracache.errors import UsageError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

__all__ = ["DigestCache", "FileState", "Weights", "content_digest", "find_weights"]

_log = logging.getLogger(__name__)
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOCAL_FORMATS = {
    "auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "npcache", "pt", "gguf", "bitsandbytes",
    "sharded_state", "runai_streamer", "runai_streamer_sharded",
}  # fmt: skip
# What lies beside the weights and says how they are computed with (quantisation, image processors, code) counts by its
# content; what is known to make token ids or samples, or counts after overrides (config.json), does not.
_SETTINGS = re.compile(
    r"(?!(config|generation_config|tokenizer.*|tekken|vocab|merges|added_tokens|special_tokens_map|chat_template)\.json)"
    r".*\.(json|py)"
)
_PIECE = 1 << 20
_READERS = 2
_FRESH_NS = 2_000_000_000  # a file younger than this may change once more and keep its times


@dataclass(frozen=True, slots=True)
class FileState:
    """What a file was when it was looked at. device, inode, size in bytes, times in nanoseconds of the epoch."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, at: Path | int) -> FileState:
        """Of a path or an open file. Raises OSError."""
        found = os.stat(at)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of one model. name: what tells them from others without a look inside, or "". files: else what must
    be read, with their states when the engine started. settings: small files beside them, which count too.
    """

    name: str
    files: tuple[tuple[Path, FileState], ...] = ()
    settings: tuple[tuple[Path, FileState], ...] = ()


def find_weights(model: ModelConfig, load_config: Any, model_id: str = "") -> Weights:
    """Dummy weights are random by their seed, a hub snapshot is its commit, `model_id` is the user's word; other files
    must be read. Raises UsageError where none of this tells them from others.
    """
    load_format = str(getattr(load_config.load_format, "value", load_config.load_format))
    path = Path(model.model)
    commit: str | None = ""
    files: list[Path] = []
    settings: list[Path] = []
    if path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name):
        commit = path.name
    elif path.is_dir():
        every = sorted(path.iterdir())
        files = [file for file in every if _WEIGHTS.fullmatch(file.name)]
        settings = [file for file in every if _SETTINGS.fullmatch(file.name) and file.is_file()]
    elif path.is_file():
        files = [path]
    else:
        commit = getattr(model.hf_config, "_commit_hash", None)
    if model_id:
        return Weights(f"model_id:{model_id}", settings=_states(path, settings))
    if load_format == "dummy":
        return Weights(f"dummy:{model.seed}", settings=_states(path, settings))
    if load_format not in _LOCAL_FORMATS or getattr(model, "model_weights", None):
        raise UsageError(f"load_format {load_format} takes weights from elsewhere")
    if commit:
        return Weights(f"hub:{commit}")
    if not files:
        raise UsageError("they are not files that can be read")
    return Weights("", _states(path, files), _states(path, settings))


def content_digest(weights: Weights, cache: DigestCache, stop: threading.Event) -> str:
    """A name for the weights' content; reads what the cache does not know. Raises UsageError where a file changed or
    `stop` was set, OSError where one cannot be read.
    """
    settings = hashlib.sha256()
    for file, state in weights.settings:
        content = file.read_bytes()
        if FileState.of(file) != state:
            raise UsageError(f"{file.name} changed while it was read")
        settings.update(f"{file.name}\0{len(content)}\0".encode() + content)
    beside = f"+{settings.hexdigest()}" if weights.settings else ""
    if weights.name:
        return weights.name + beside
    known = {file: digest for file, state in weights.files if (digest := cache.get(state))}
    reader = _Reader([entry for entry in weights.files if entry[0] not in known], cache, stop)
    known |= reader.read()
    for file, state in weights.files:
        if FileState.of(file) != state:
            raise UsageError(f"{file.name} changed while it was read")
    whole = hashlib.sha256("".join(known[file] for file, _ in weights.files).encode())
    return f"files:{whole.hexdigest()}{beside}"


class DigestCache:
    """Digests of files in $XDG_CACHE_HOME/loracache/weights, one small file each. A folder that cannot be used, or that
    somebody else could write to, holds nothing."""

    def __init__(self) -> None:
        self._folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loracache" / "weights"
        self._usable = False
        with suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = os.lstat(self._folder)
            self._usable = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022

    def get(self, state: FileState) -> str:
        """The digest of the file in this state, or ""."""
        if self._usable:
            with suppress(OSError, ValueError):
                text = self._path(state).read_text("ascii")
                return text if re.fullmatch(r"[0-9a-f]{64}", text) else ""
        return ""

    def put(self, state: FileState, digest: str) -> None:
        """Remember a digest; one that cannot be written is made again next time."""
        if not self._usable:
            return
        path = self._path(state)
        draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}")
        with suppress(OSError):
            draft.write_text(digest, "ascii")
            os.replace(draft, path)

    def _path(self, state: FileState) -> Path:
        return self._folder / hashlib.sha256(repr(state).encode()).hexdigest()


class _Reader:
    """Reads files on two threads at most, at the lowest priority."""

    def __init__(self, files: list[tuple[Path, FileState]], cache: DigestCache, stop: threading.Event) -> None:
        self._size = sum(state.size for _, state in files)
        self._count = len(files)
        self._waiting = deque(sorted(files, key=lambda entry: -entry[1].size))
        self._cache = cache
        self._stop = stop
        self._digests: dict[Path, str] = {}
        self._error: Exception | None = None

    def read(self) -> dict[Path, str]:
        if not self._count:
            return {}
        began = time.monotonic()
        size = f"{self._size / 1e9:.2f} GB in {self._count} files"
        _log.info("reading the model's weights, %s, to tell them from others; the cache is used after that", size)
        threads = [
            threading.Thread(target=self._run, name=f"loracache-weights-{number}", daemon=True)
            for number in range(min(_READERS, self._count))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        _log.info("read the model's weights, %s, in %.1f s", size, time.monotonic() - began)
        return self._digests

    def _run(self) -> None:
        leave_pinned_core()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread alone
        try:
            while self._error is None:
                file, state = self._waiting.popleft()
                self._digests[file] = self._digest(file, state)
        except IndexError:
            pass
        except (OSError, UsageError) as error:
            self._error = error

    def _digest(self, file: Path, expected: FileState) -> str:
        began = time.time_ns()
        digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
        with open(file, "rb", buffering=0) as handle:
            before = FileState.of(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while size := handle.readinto(piece):
                digest.update(piece[:size])
                if self._stop.is_set():
                    raise UsageError("the engine ended first")
            after = FileState.of(handle.fileno())
        if not before == after == expected:
            raise UsageError(f"{file.name} changed while it was read")
        if began - max(after.mtime_ns, after.ctime_ns) > _FRESH_NS:
            self._cache.put(after, digest.hexdigest())
        return digest.hexdigest()


def _states(model: Path, files: list[Path]) -> tuple[tuple[Path, FileState], ...]:
    return tuple((file, _unchanged_since_start(model, file)) for file in files)


def _unchanged_since_start(model: Path, file: Path) -> FileState:
    """A file that changed since this process started may be another than the one that the engine loaded, and so may one
    behind a link that did."""
    started = _process_start_ns()
    links = [os.lstat(each) for each in (model, file) if each.is_symlink()]
    state = FileState.of(file)
    if max([state.ctime_ns, *(link.st_ctime_ns for link in links)]) > started:
        raise UsageError(f"{file.name} changed since the engine started")
    return state


def _process_start_ns() -> int:
    """When this process started, in nanoseconds of the epoch."""
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time_ns() - int(age * 1e9)
