# SPDX-License-Identifier: Apache-2.0
"""The settings of eviction and admission reach the tiers of a daemon."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from loracache import Flushed, Namespace

NAMESPACE = Namespace("model", "float32", "layout", 16)
SIZE = 60_000


def test_with_second_touch_the_disk_gets_what_is_asked_for_again(daemon: Any, tmp_path: Path) -> None:
    file = tmp_path / "loracache.yaml"
    file.write_text("policy: adaptive\ndisk_policy: cost\nadmission: second_touch\n")
    disk = tmp_path / "disk"
    client = daemon(config=file, memory="2MiB", page_size="4KiB", disk_path=disk, disk="64MiB").client()
    root = client.register(NAMESPACE)
    keys = [os.urandom(32) for _ in range(100)]  # three times what the arena holds
    for key in keys:
        with client.reserve(root, [key], [SIZE], parents=[b""]) as reservation:
            reservation.write(0, bytes(SIZE))
        assert reservation.causes == [""]
    assert client.flush() == Flushed({"disk": 0}, {"disk": 0})
    assert client.get(keys[-1]) == bytes(SIZE)
    assert client.flush() == Flushed({"disk": 1}, {"disk": 0})
    assert client.lookup(keys[:1]).hits == 0
    tiers = client.status()["tiers"]
    assert tiers["disk"]["objects"] == 1
    assert tiers["cpu"]["objects"] < 40
