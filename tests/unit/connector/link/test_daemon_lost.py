# SPDX-License-Identifier: Apache-2.0
"""An engine that does nothing keeps no memory of a daemon that was killed."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from loracache.connectors.vllm.common.groups import KVGroup, Member
from loracache.connectors.vllm.link import pinned, worker
from loracache.connectors.vllm.link.scheduler import SchedulerLink
from loracache.connectors.vllm.link.worker import WorkerLink
from loracache.connectors.vllm.worker.layout import read_layout
from loracache.connectors.vllm.worker.loader import Loader
from loracache.connectors.vllm.worker.objects import GroupObjects
from loracache.connectors.vllm.worker.storer import Storer
from loracache.groups import Need
from loracache.kernels.page_copy import PageCopier


def mapped(inode: str) -> bool:
    return re.search(rf" {inode} +/memfd:loracache-arena", Path("/proc/self/maps").read_text()) is not None


def inode_of(serving: Any) -> str:
    found = re.search(r" (\d+) +/memfd:loracache-arena", Path(f"/proc/{serving.process.pid}/maps").read_text())
    assert found is not None
    return found.group(1)


def test_idle_threads_and_a_scheduler_let_go_of_a_killed_daemons_arena(daemon: Any, eventually: Any) -> None:
    serving = daemon(memory="512MiB")
    inode = inode_of(serving)
    layout = read_layout({"layer": torch.zeros(4, 2, 16, 32)}, 4)
    copier = PageCopier(layout.rows)
    scheduler = SchedulerLink(serving.url)
    objects = (GroupObjects(KVGroup(Need.ALL, 0, (Member(0, 16, ()),)), "s", (layout.block_bytes,)),)
    loader = Loader(serving.url, lambda: None, copier, objects, 5.0, lambda _: True, lambda *_: None)
    storer = Storer(serving.url, lambda: None, copier, objects, lambda _: True, lambda *_: None)
    adapters = WorkerLink(serving.url, "vllm-adapters", lambda: None, "cpu")
    eventually(lambda: scheduler.begin() and adapters.ready(), "all are connected")
    assert mapped(inode)
    serving.stop(signal.SIGKILL)
    eventually(lambda: not mapped(inode), "nobody maps the arena")
    again = daemon(memory="512MiB", socket=serving.socket)
    eventually(lambda: scheduler.begin() and adapters.ready(), "all are connected again")
    assert mapped(inode_of(again))
    for each in (storer, loader, scheduler, adapters.connection):
        each.close()


class Runtime:
    """Stands in for the GPU's, and sees what is mapped when it is called."""

    def __init__(self, pause: float) -> None:
        self.pause = pause
        self.calls: list[tuple[str, int, bool]] = []
        self.inode = ""

    def register(self, start: int, nbytes: int) -> int:
        time.sleep(self.pause)
        self.calls.append(("register", start, mapped(self.inode)))
        return 0

    def unregister(self, start: int) -> int:
        self.calls.append(("unregister", start, mapped(self.inode)))
        return 0


@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_pinned_memory_is_given_back_while_it_is_mapped_also_where_the_daemon_ends_meanwhile(
    daemon: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch, pause: float
) -> None:
    runtime = Runtime(pause)
    monkeypatch.setattr(worker, "CudaHost", lambda: runtime)
    monkeypatch.setattr(pinned, "_PIECE", 4 << 20)
    serving = daemon(memory="64MiB")
    runtime.inode = inode_of(serving)
    link = WorkerLink(serving.url, "vllm-load", lambda: None, "cuda")
    assert link.ready()
    eventually(lambda: len(runtime.calls) >= (2 if pause else 16), "it is registered")
    serving.stop(signal.SIGKILL)
    eventually(lambda: not mapped(runtime.inode), "nobody maps the arena")
    registered = [address for what, address, _ in runtime.calls if what == "register"]
    assert [address for what, address, _ in runtime.calls if what == "unregister"] == registered
    assert len(registered) < 16 or not pause
    assert all(was_mapped for *_, was_mapped in runtime.calls)
    link.connection.close()
