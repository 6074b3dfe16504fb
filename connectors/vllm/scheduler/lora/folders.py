# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side: what is in the folders that adapters are asked for by.

The daemon is asked to take a folder in, and answers its digest. While none answers, or where it will not have the
folder, a thread of our own reads it, and downloads it first where the path is a name on a hub. One that is a pickle is
converted by such a thread before the daemon is asked. Nothing here waits.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vllm.lora.utils import get_adapter_absolute_path

from loracache.adapters.payload import ModuleSize, Packing, adapter_digest
from loracache.adapters.peft import PeftFolder
from loracache.connectors.vllm.common.recent import Recent
from loracache.connectors.vllm.link.scheduler import SchedulerLink
from loracache.connectors.vllm.lora.pickled import is_pickled, plain_folder
from loracache.connectors.vllm.lora.refusals import Refusal
from loracache.errors import LoRACacheError, UsageError

__all__ = ["FolderContent", "Folders"]

_log = logging.getLogger(__name__)
_READING_S = 600.0  # a download may take minutes; a file system that hangs takes for ever


@dataclass(frozen=True, slots=True)
class FolderContent:
    """digest: hex. place: where the folder is. sizes: by module; none where only the daemon has looked."""

    digest: str
    place: str
    sizes: Mapping[str, ModuleSize] = field(default_factory=dict)


@dataclass(slots=True)
class _Folder:
    """place: where it is as safetensors, "" while that is not known. asked: the number of the daemon's question.
    reading: a thread reads it. since: when either began. read: what the thread found, at first the place perhaps."""

    place: str = ""
    asked: int = 0
    since: float = 0.0
    reading: bool = False
    read: list[FolderContent | Refusal | str] = field(default_factory=list)


_Reader = Callable[[str, _Folder], FolderContent | str]


class Folders:
    """Questions for one engine's folders, by path. patience: seconds to wait for the daemon's answer."""

    def __init__(self, link: SchedulerLink, patience: float) -> None:
        self._link = link
        self._patience = patience
        self._folders: Recent[str, _Folder] = Recent()

    def ask(self, path: str) -> FolderContent | Refusal | None:
        """What is in a folder, why it cannot be served, or None while neither is known. An answer is given once."""
        folder = self._folders.used(path)
        if folder is None:
            folder = self._folders[path] = _Folder()
            for gone in self._folders.drop_oldest().values():  # whoever asked for it is gone too
                if gone.asked:
                    self._link.abandon(gone.asked)
        answer = self._look(folder, path)
        if answer is not None:
            del self._folders[path]
        return answer

    def forget(self, path: str) -> None:
        """What was asked about a folder is of no interest any more."""
        self._folders.pop(path, None)

    def _look(self, folder: _Folder, path: str) -> FolderContent | Refusal | None:
        now = time.monotonic()
        if folder.reading:
            if folder.read:
                return self._found(folder, folder.read.pop())
            late = Refusal(f"{path} was not read within {_READING_S:g} s", forever=False)
            return late if now - folder.since > _READING_S else None
        if not folder.place and os.path.isdir(path):
            if is_pickled(path):
                self._read(folder, path, _convert_folder)
                return None
            folder.place = path
        if not folder.asked:
            if folder.place and (self._link.answering() or self._link.begin()):
                folder.asked, folder.since = self._link.ask_adapter_add(folder.place), now
            if not folder.asked:
                self._read(folder, path)
            return None
        done, payload = self._link.answer(folder.asked)
        if not done:
            if now - folder.since > self._patience:  # the daemon is there, but silent
                self._read(folder, path)
            return None
        folder.asked = 0
        if isinstance(payload, str):  # it is none that can be served, or there is no room for it: look ourselves
            _log.warning("%s is not taken into the cache: %s", path, payload)
            self._link.count("adapter.refused", 1)
            self._read(folder, path)
            return None
        return FolderContent(str(payload[0]), folder.place) if payload else None

    def _found(self, folder: _Folder, read: FolderContent | Refusal | str) -> FolderContent | Refusal | None:
        if not isinstance(read, str):
            return read
        folder.place, folder.reading = read, False
        return None

    def _read(self, folder: _Folder, path: str, read: _Reader | None = None) -> None:
        folder.asked, folder.reading, folder.since = 0, True, time.monotonic()
        threading.Thread(target=_run, args=(read or _read_folder, path, folder), daemon=True).start()


def _convert_folder(path: str, folder: _Folder) -> str:
    return plain_folder(path)


def _read_folder(path: str, folder: _Folder) -> FolderContent:
    """What the daemon would have done, as far as it is needed; and before that find the folder, as vLLM does."""
    place = folder.place or plain_folder(get_adapter_absolute_path(path))
    with PeftFolder(place) as peft:
        sizes = Packing(peft).sizes()
    return FolderContent(adapter_digest(place), place, sizes)


def _run(read: _Reader, path: str, folder: _Folder) -> None:
    try:
        folder.read.append(read(path, folder))
    except LoRACacheError as error:
        folder.read.append(Refusal(str(error), isinstance(error, UsageError)))
    except Exception as error:  # noqa: BLE001 - top of the thread: an answer that never comes hangs a request
        folder.read.append(Refusal(repr(error), forever=False))
