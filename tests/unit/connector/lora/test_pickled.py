# SPDX-License-Identifier: Apache-2.0
"""Adapters that are pickles are read by torch's `weights_only`, where torch is, and nothing in them is run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm.lora.request import LoRARequest

from loracache.adapters.payload import adapter_digest
from loracache.adapters.peft import CONFIG, WEIGHTS, PeftFolder
from loracache.connectors.vllm.lora import pickled as module
from loracache.connectors.vllm.lora.pickled import is_pickled, plain_folder
from loracache.errors import UsageError


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"loracache-converted-{os.getuid()}"


def pickled(adapter: Any, name: str = "adapter_model.bin") -> str:
    """The adapter as PEFT wrote it with `safe_serialization=False`."""
    tensors = load_file(f"{adapter.path}/{WEIGHTS}")
    torch.save(tensors, f"{adapter.path}/{name}")
    os.unlink(f"{adapter.path}/{WEIGHTS}")
    return str(adapter.path)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_pickle_has_the_digest_of_the_safetensors_it_could_be(
    make_adapter: Any, temporary_folder: Path, name: str, dtype: str
) -> None:
    adapter = make_adapter("a", dtype=dtype)
    assert plain_folder(adapter.path) == adapter.path
    before = adapter.path, pickled(adapter, name)
    assert is_pickled(adapter.path)
    plain = plain_folder(adapter.path)
    assert adapter_digest(plain) == adapter.digest
    assert Path(plain).parent == temporary_folder
    assert temporary_folder.stat().st_mode & 0o777 == 0o700
    assert (plain_folder(before[1]), sorted(os.listdir(temporary_folder))) == (plain, [Path(plain).name])


def test_another_content_is_another_folder_and_the_oldest_are_forgotten(
    make_adapter: Any, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_KEPT", 3)
    adapters = [make_adapter(f"number {number}", {"model.layers.0.mlp.up_proj": 1}) for number in range(6)]
    for number, adapter in enumerate(adapters):
        plain = plain_folder(pickled(adapter))
        assert adapter_digest(plain) == adapter.digest
        os.utime(plain, (number, number))
        assert len(os.listdir(temporary_folder)) <= 3
    assert adapter_digest(plain_folder(adapters[0].path)) == adapters[0].digest


class Evil:
    """Pickles run what is in them."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("/tmp/loracache-a-pickle-ran",)


@pytest.mark.parametrize(
    "content",
    [Evil(), {"a": Evil()}, [torch.zeros(1)], {"a": 1}, torch.zeros(2), None],
    ids=["code", "code inside", "list", "number", "tensor", "truncated"],
)
def test_what_is_not_tensors_alone_is_refused_and_nothing_is_run(
    make_adapter: Any, temporary_folder: Path, content: Any
) -> None:
    path = pickled(make_adapter("a"))
    file = Path(path, "adapter_model.bin")
    if content is None:
        file.write_bytes(file.read_bytes()[:-100])
    else:
        torch.save(content, file)
    with pytest.raises(UsageError, match=r"adapter_model\.bin is no pickle of tensors alone"):
        plain_folder(path)
    assert not os.path.exists("/tmp/loracache-a-pickle-ran")
    assert os.listdir(temporary_folder) == []


def test_a_folder_of_others_in_the_temporary_one_is_not_used(make_adapter: Any, temporary_folder: Path) -> None:
    path, elsewhere = pickled(make_adapter("a")), temporary_folder.with_name("elsewhere")
    elsewhere.mkdir(0o700)
    temporary_folder.symlink_to(elsewhere)
    with pytest.raises(UsageError, match="not a folder of ours alone"):
        plain_folder(path)
    temporary_folder.unlink()
    temporary_folder.mkdir()
    temporary_folder.chmod(0o755)
    with pytest.raises(UsageError, match="not a folder of ours alone"):
        plain_folder(path)


def test_tensors_that_share_their_memory_are_written_apart(make_adapter: Any) -> None:
    adapter = make_adapter("a")
    path = pickled(adapter)
    tensors = torch.load(f"{path}/adapter_model.bin", weights_only=True)
    stacked = torch.stack([tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]] * 2)
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = stacked[0]
    tensors["base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight"] = stacked.transpose(1, 2)[1].t()
    torch.save(tensors, f"{path}/adapter_model.bin")
    found = load_file(f"{plain_folder(path)}/{WEIGHTS}")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_command_that_a_refusal_names_converts(make_adapter: Any, tmp_path: Path) -> None:
    adapter = make_adapter("a")
    path = pickled(adapter)
    with pytest.raises(UsageError, match=r"python -m loracache\.connectors\.vllm\.lora\.pickled FOLDER NEW_FOLDER"):
        PeftFolder(path)
    command = [sys.executable, "-m", "loracache.connectors.vllm.lora.pickled", path, str(tmp_path / "new")]
    subprocess.run(command, check=True, timeout=120)
    assert adapter_digest(str(tmp_path / "new")) == adapter.digest
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 1
    assert "new" in again.stderr


@pytest.mark.parametrize("connected", [True, False])
def test_a_request_for_a_pickle_is_served(
    url: str, client: Any, make_engine: Any, make_adapter: Any, eventually: Any, connected: bool
) -> None:
    """The daemon takes the converted folder in; without one the workers read that."""
    adapter = make_adapter(f"pickled, {connected}")
    path = pickled(adapter)
    engine = make_engine(url if connected else "unix:///nowhere/loracache.sock")
    engine.arrive("a", LoRARequest("a", 1, path))
    eventually(lambda: engine.step() or engine.runs("a"))
    ((_, digest, place),) = engine.orders
    assert (digest, place) == (adapter.digest, plain_folder(path))
    assert (client.show_adapter(adapter.digest) is not None) == connected
    shutil.rmtree(path)
    engine.arrive("gone", LoRARequest("gone", 2, path))
    eventually(lambda: engine.step() or engine.failed)
    assert engine.refusals["gone"].forever
    assert Path(path, CONFIG).name in engine.refusals["gone"].why
