# SPDX-License-Identifier: Apache-2.0
"""What the dashboard shows of the swapper, in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loracache import CacheClient
from loracache.wire import protocol

Chain = Callable[..., list[str]]


@pytest.fixture(scope="module")
def running(module_daemon: Any, eventually: Any, rest_is_up: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With a disk to raise from."""
    folder = tmp_path_factory.mktemp("disk")
    made = module_daemon(http="127.0.0.1:0", memory="16MiB", page_size="4KiB", disk_path=folder, disk="64MiB")
    eventually(lambda: rest_is_up(made), "REST answers")
    return made


def test_what_is_raised_before_anybody_asks_is_shown(
    page: Any, client: CacheClient, kv: Chain, eventually: Any
) -> None:
    keys = [bytes.fromhex(key) for key in kv(5, size=100_000)]
    client.flush()
    client.evict(keys, tiers=["cpu"])
    before: Any = client.status()
    client._call(protocol.Prefetch(bytes(16), b"".join(keys), 60.0, 0.1))
    client._call(protocol.Prefetch(bytes(15) + b"1", b"".join(keys), 60.0, 3600.0))
    client._call(protocol.Report({}, 1, 1, wanted=bytes(32)))
    raised = before["counters"].get("prefetch.objects", 0) + 5

    def counters() -> Any:
        return client.status()["counters"]

    eventually(lambda: counters().get("prefetch.objects") == raised, "they are raised")
    page.open()
    page.says("#ahead tbody", f"raised{raised}")
    page.says("#ahead tbody", "chains announced1")
    page.says("#ahead tbody", "pacefor returns")
    titles = [cell.get_attribute("title") for cell in page.all("#ahead td")]
    assert "200,000,000 bytes a second" in titles
    assert f"{format(before['counters'].get('prefetch.bytes', 0) + 500_000, ',')} bytes" in titles
