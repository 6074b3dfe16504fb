# SPDX-License-Identifier: Apache-2.0
"""What a name stands for is on disk before the name is given, and a descriptor before what is stored under it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from loracache import CacheClient, Namespace, Rejected
from loracache.adapters.names import AdapterNames
from loracache.control.adapters import Adapters
from loracache.namespaces import Namespaces

NAMESPACE = Namespace("model", "float32", "layout", 16)
CONFIG = '{"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}'


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    """A PEFT folder of 640 kB."""
    import numpy as np

    folder = tmp_path / "peft"
    folder.mkdir()
    width = 10_000
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.lora_A.weight": (8, width), f"{module}.lora_B.weight": (width, 8)}
    save_file(
        {name: np.ones(shape, dtype=np.float32) for name, shape in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(CONFIG)
    return folder


def test_a_name_that_was_given_has_its_content_after_a_kill_without_any_flush(
    daemon: Any, tmp_path: Path, peft: Path, eventually: Any
) -> None:
    options = {"memory": "8MiB", "disk_path": tmp_path / "disk", "disk_sync": True}
    running = daemon(**options)
    digest = running.client().add_adapter(str(peft), "mine")
    running.stop(signal.SIGKILL)
    again = daemon(**options)
    eventually(lambda: again.status()["tiers"]["disk"]["scanned"], "the disk is read")
    assert again.client().find_adapter("mine") == digest
    assert again.client().get(bytes.fromhex(digest)) is not None


def test_a_name_is_not_given_to_what_the_disk_does_not_take(daemon: Any, tmp_path: Path, peft: Path) -> None:
    running = daemon(memory="8MiB", disk_path=tmp_path / "disk", disk="100KB", disk_sync=True)
    client = running.client()
    with pytest.raises(Rejected, match=r"in memory, but the disk does not take it.*disk_sync"):
        client.add_adapter(str(peft), "mine")
    assert client.find_adapter("mine") is None
    assert client.show_adapter(client.add_adapter(str(peft))).tiers == ("cpu",)


def test_a_name_waits_for_its_content_to_be_written(make_rig: Callable[..., Any], tmp_path: Path, peft: Path) -> None:
    rig = make_rig(pages=400, disk=4 << 20)

    async def add() -> None:
        adapters = Adapters(rig.cache, Namespaces(None), names, rig.posted.append)
        task = asyncio.ensure_future(adapters.add(str(peft), "mine"))
        while not rig.cache.disk.writer.depth:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert not task.done()
        assert names.find("mine") is None
        while not task.done():
            rig.settle()
            await asyncio.sleep(0.01)
        assert [names.find("mine").digest] == await task  # type: ignore[union-attr]
        adapters.close()

    names = AdapterNames(tmp_path / "names", None)
    asyncio.run(add())


def descriptor(disk: Path) -> Path:
    return disk / "namespaces" / f"{NAMESPACE.digest().hex()}.json"


def test_a_namespace_is_kept_when_its_registration_is_answered(daemon: Any, tmp_path: Path) -> None:
    running = daemon(disk_path=tmp_path / "disk", disk_sync=True)
    running.client().register(NAMESPACE)
    assert descriptor(tmp_path / "disk").read_text().startswith(NAMESPACE.descriptor())


def test_objects_without_a_kept_descriptor_are_not_called_durable(daemon: Any, tmp_path: Path) -> None:
    """They may be orphans after a restart. Once it can be written, a flush writes it."""
    disk = tmp_path / "disk"
    running = daemon(disk_path=disk, memory="4MiB")
    in_the_way = descriptor(disk)
    in_the_way.mkdir()
    client: CacheClient = running.client()
    root = client.register(NAMESPACE)
    with client.reserve(root, [os.urandom(32), os.urandom(32)], [10, 10], parents=[b"", b""]):
        pass
    flushed = client.flush()
    assert (flushed.durable, flushed.given_up) == ({"disk": 0}, {"disk": 2})
    in_the_way.rmdir()
    with client.reserve(root, [os.urandom(32)], [10], parents=[b""]):
        pass
    assert client.flush().complete
    assert in_the_way.is_file()
