"""Two engines share KV exactly where they compute with the same weights and configuration, wherever those lie."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loracache.connectors.vllm.identity import model_identity, weights_digest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model(path: Path | str, *, config: dict[str, Any] | None = None, **rest: Any) -> Any:
    values = {"hidden_size": 64, "_name_or_path": str(path), "transformers_version": "5"} | (config or {})
    hf_config = SimpleNamespace(to_dict=lambda: values, _commit_hash=rest.pop("commit", None))
    settings = {"seed": 0, "revision": None, "dtype": "torch.bfloat16", "quantization": None} | rest
    return SimpleNamespace(model=str(path), hf_config=hf_config, **settings)


def digest(path: Path | str, load_format: str = "auto", **rest: Any) -> str:
    return weights_digest(model(path, **rest), load_format)


def identity(path: Path | str, model_id: str = "", draft: Any = None, **rest: Any) -> str:
    speculative = SimpleNamespace(method="eagle", draft_model_config=draft) if draft is not None else None
    config = SimpleNamespace(
        model_config=model(path, **rest),
        load_config=SimpleNamespace(load_format="auto"),
        speculative_config=speculative,
    )
    return model_identity(config, model_id)  # type: ignore[arg-type]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    rng = np.random.default_rng(1)
    tensors = {"a": rng.random(5000, np.float32), "b": rng.random(30000, np.float32), "c": np.zeros(0, np.float32)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_neither_path_nor_file_name_counts(weights: Path, tmp_path: Path) -> None:
    copy = tmp_path / "another name"
    shutil.copytree(weights, copy)
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    (copy / "README.md").write_text("other")
    assert digest(weights) == digest(copy)
    assert digest(weights).startswith("files:")
    assert identity(weights) == identity(copy)


@pytest.mark.parametrize("at", [0.0, 0.5, 0.9999], ids=["beginning", "middle", "end"])
def test_a_byte_of_a_tensors_sample_counts(weights: Path, at: float) -> None:
    before = digest(weights)
    file = weights / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + 20000 + int(120000 * at)] ^= 1  # tensor b
    file.write_bytes(data)
    assert digest(weights) != before


def test_names_shapes_and_sizes_count(weights: Path) -> None:
    digests = {digest(weights)}
    for tensors in ({"x": np.zeros((2, 3))}, {"y": np.zeros((2, 3))}, {"x": np.zeros((3, 2))}):
        save_file(tensors, weights / "model.safetensors")
        digests.add(digest(weights))
    save_file({"z": np.zeros(3)}, weights / "second.safetensors")
    digests.add(digest(weights))
    assert len(digests) == 5


def test_other_formats_are_sampled(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(bytes(100_000))
    digests = {digest(tmp_path)}
    for at in (0, 50_000, 99_999):
        data = bytearray(100_000)
        data[at] = 1
        file.write_bytes(data)
        digests.add(digest(tmp_path))
    file.write_bytes(bytes(100_001))
    assert len(digests | {digest(tmp_path)}) == 5


def test_dummy_weights_are_their_seed(weights: Path) -> None:
    assert digest(weights, "dummy", seed=3) == digest("/elsewhere", "dummy", seed=3) == "dummy:3"
    assert digest(weights, "dummy", seed=4) == "dummy:4"
    assert weights_digest(model(weights), SimpleNamespace(value="dummy")) == "dummy:0"


def test_a_hub_snapshot_is_its_commit(tmp_path: Path) -> None:
    folder = tmp_path / "models--x--y" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    assert digest(folder) == digest("x/y", commit=COMMIT) == f"hub:{COMMIT}"


def test_weights_that_cannot_be_told_apart_share_with_nobody(tmp_path: Path) -> None:
    plain = tmp_path / "snapshots" / "mine"
    plain.mkdir(parents=True)
    for name in ("x/y", plain):
        first, second = (digest(name, revision="main") for _ in range(2))
        assert first.startswith("unknown:")
        assert first != second


def test_what_changes_the_computation_changes_the_identity(weights: Path) -> None:
    draft = model(weights, config={"hidden_size": 8})
    found = [
        identity(weights),
        identity(weights, dtype="torch.float32"),
        identity(weights, quantization="fp8"),
        identity(weights, config={"rope_theta": 1}),
        identity(weights, draft=draft),
        identity(weights, draft=model(weights, config={"hidden_size": 9})),
        identity(weights, model_id="mine"),
        identity(weights, model_id="yours"),
        identity(weights, model_id="mine", dtype="torch.float32"),
    ]
    assert len(set(found)) == len(found)
    assert all(len(each) == 64 for each in found)
    assert identity(weights, config={"_name_or_path": "x", "torch_dtype": "y", "use_cache": False}) == found[0]


def test_a_model_id_stands_for_configuration_and_weights(weights: Path) -> None:
    other = identity("/nowhere", model_id="mine", config={"hidden_size": 1})
    assert identity(weights, model_id="mine") == other
