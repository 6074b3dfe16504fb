# SPDX-License-Identifier: Apache-2.0
"""Two engines share KV exactly where they compute with the same weights and configuration, wherever those lie. Real
configurations of vLLM, as an engine makes them from its arguments."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs

from loracache.connectors.vllm.identity import weight_files
from loracache.connectors.vllm.identity.model import ModelIdentity

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 320, "head_dim": 32,
    "max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "torch_dtype": "float32",
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of digests of this test's own, and files that were there before the engine started."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weight_files, "_process_start_ns", lambda: time.time_ns() + 60_000_000_000)
    return tmp_path / "cache" / "loracache" / "weights"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of two layers."""
    model = tmp_path / "model"
    model.mkdir()
    torch.manual_seed(1)
    names = {"model.embed_tokens.weight": (320, 64), "model.layers.0.self_attn.k_proj.weight": (64, 64)}
    save_file({name: torch.randn(shape) for name, shape in names.items()}, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps(LLAMA))
    return model


def config(model: Path | str, **options: Any) -> Any:
    """The configuration of an engine."""
    given: dict[str, Any] = {"dtype": "float32", "max_model_len": 1024, "skip_tokenizer_init": True} | options
    return EngineArgs(model=str(model), **given).create_engine_config()


def model_identity(vllm_config: Any, model_id: str = "") -> str:
    """The identity, waited for."""
    return ModelIdentity(vllm_config, model_id).wait()


def identity(model: Path | str, model_id: str = "", **options: Any) -> str:
    return model_identity(config(model, **options), model_id)


def changed(folder: Path, **values: Any) -> Path:
    """A copy of the model with other values in its config.json."""
    copy = folder.with_name(f"{folder.name}-{len(list(folder.parent.iterdir()))}")
    shutil.copytree(folder, copy)
    (copy / "config.json").write_text(json.dumps(LLAMA | values))
    return copy


def private(caplog: pytest.LogCaptureFixture, make: Any) -> str:
    """The reason for which two engines that `make` starts share with nobody."""
    caplog.clear()
    assert make() != make()
    return caplog.text


# -- what engines may differ in ----------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_prefix_caching": False},
        {"max_num_seqs": 3, "max_num_batched_tokens": 2048},
        {"max_model_len": 512},
        {"block_size": 64},
        {"gpu_memory_utilization": 0.5},
        {"served_model_name": "another"},
        {"enforce_eager": True},
        {"tensor_parallel_size": 2},
        {"seed": 7},
        {"enable_lora": True, "max_lora_rank": 64},
        {"max_logprobs": 3, "generation_config": "vllm"},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        {"kv_transfer_config": KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")},
        {"compilation_config": {"cudagraph_capture_sizes": [1, 2]}},
    ],
    ids=lambda options: ",".join(options) or "same",
)
def test_what_changes_no_kv_is_shared(folder: Path, options: dict[str, Any]) -> None:
    assert identity(folder) == identity(folder, **options)


def test_neither_path_nor_file_name_counts(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "another name"
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    (copy / "README.md").write_text("other")
    (copy / "original").mkdir()
    (copy / "original" / "consolidated.pth").write_bytes(b"other")
    (copy / "tokenizer_config.json").write_text("{}")
    assert identity(folder) == identity(copy)


# -- what they may not ----------


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"hf_overrides": ROPE},
        {"kv_cache_dtype_skip_layers": ["0"]},
        {"disable_sliding_window": True},
        {"additional_config": {"mine": 1}},
        {"attention_config": {"use_prefill_query_quantization": True}},
        {"load_format": "dummy"},
    ],
    ids=str,
)
def test_what_changes_kv_is_not_shared_whatever_the_model_is_called(folder: Path, options: dict[str, Any]) -> None:
    plain, other = config(folder), config(folder, **options)
    assert model_identity(plain) != model_identity(other)
    assert model_identity(plain, "mine") != model_identity(other, "mine")
    assert model_identity(plain, "mine") != model_identity(plain, "yours")


def test_two_online_quantisations_of_one_checkpoint_differ(folder: Path) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"quantization": "fp8"},
        {"quantization": "fp8_per_tensor"},
        {"quantization": "fp8_per_tensor", "quantization_config": {"ignore": ["model.layers.0.*"]}},
        {"quantization": "fp8_per_block"},
    ]
    found = {identity(folder, "mine", dtype="bfloat16", **kind) for kind in kinds}
    assert len(found) == len(kinds)


def test_a_draft_model_counts_like_the_model(folder: Path) -> None:
    def drafted(draft: Path, **more: Any) -> str:
        speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2} | more
        return identity(folder, "mine", speculative_config=speculative)

    other = changed(folder, intermediate_size=128)
    trained = changed(folder)
    file = trained / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][101] += 1
    save_file(tensors, file)
    found = [identity(folder, "mine"), drafted(folder), drafted(other), drafted(trained)]
    assert len(set(found)) == 4
    assert drafted(changed(folder), rejection_sample_method="block") == drafted(folder)


def test_rows_of_a_weight_count(folder: Path) -> None:
    """Surgery on rows that no sample of a tensor's bytes would meet."""
    made = config(folder)
    found = [model_identity(made)]
    file = folder / "model.safetensors"
    for name, rows in (("model.embed_tokens.weight", (101, 102)), ("model.layers.0.self_attn.k_proj.weight", (20, 21))):
        tensors = load_file(file)
        for row in rows:
            tensors[name][row] += 1
        save_file(tensors, file)
        found.append(model_identity(made))
    assert len(set(found)) == 3


def test_every_byte_of_other_formats_counts(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    made, found = config(folder), set()
    for at in (0, 50_003, 99_999):
        data = bytearray(100_000)
        data[at] = 1
        file.write_bytes(data)
        found.add(model_identity(made))
    assert len(found) == 3


def test_effective_values_of_the_models_configuration_count(folder: Path) -> None:
    """config.json counts as it is after overrides: the same rope by file and by override is the same model."""
    by_file = identity(changed(folder, **ROPE))
    assert by_file != identity(folder)
    assert by_file == identity(folder, hf_overrides=ROPE)
    assert identity(changed(folder, torch_dtype="bfloat16", use_cache=False)) == identity(folder)


def test_max_model_len_counts_where_the_rope_depends_on_it(folder: Path) -> None:
    factors = [1.0] * 16
    long = changed(
        folder,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors, "long_factor": [2.0] * 16,
            "factor": 4.0, "original_max_position_embeddings": 1024,
        },
        original_max_position_embeddings=1024,
    )  # fmt: skip
    assert identity(long, max_model_len=1024) != identity(long, max_model_len=2048)


@pytest.mark.parametrize(
    "name",
    ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "hf_quant_config.json",
     "modeling_mine.py", "model.safetensors.index.json", "a file nobody knows.json"],
)  # fmt: skip
def test_files_that_say_how_to_compute_count(folder: Path, name: str) -> None:
    made = config(folder)
    found = [model_identity(made, "mine")]
    for text in ('{"a": 1}', '{"a": 2}'):
        (folder / name).write_text(text)
        found.append(model_identity(made, "mine"))
    assert len(set(found)) == 3


def test_variables_of_the_environment_that_change_numbers_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(folder)
    plain = model_identity(made)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", "5678")
    assert model_identity(made) == plain
    monkeypatch.setenv("VLLM_FLOAT32_MATMUL_PRECISION", "medium")
    assert model_identity(made) != plain


def test_dummy_weights_are_their_seed(folder: Path) -> None:
    found = [identity(folder, load_format="dummy", seed=seed) for seed in (3, 3, 4)]
    assert found[0] == found[1] != found[2]


def test_a_hub_snapshot_is_its_commit(folder: Path) -> None:
    snapshots = folder.parent / "models--x--y" / "snapshots"
    snapshots.mkdir(parents=True)
    found = []
    for commit in (COMMIT, COMMIT[::-1]):
        folder.rename(snapshots / commit)
        found.append(identity(snapshots / commit))
        (snapshots / commit).rename(folder)
    assert found[0] != found[1]


# -- weights that cannot be told from others ----------


def test_weights_that_vllm_takes_from_elsewhere_share_with_nobody(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def elsewhere() -> str:
        made = config(folder)
        made.load_config.load_format = "tensorizer"
        return model_identity(made)

    assert "tensorizer" in private(caplog, elsewhere)
    assert "set model_id" in caplog.text


def test_a_folder_without_weights_shares_with_nobody_but_by_its_model_id(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "model.safetensors").unlink()
    assert "set model_id" in private(caplog, lambda: identity(folder))
    assert identity(folder, "mine") == identity(folder, "mine") != identity(folder, "yours")


def test_files_that_changed_since_the_engine_started_share_with_nobody(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine may have loaded what was there before."""
    (folder / "preprocessor_config.json").write_text("{}")
    monkeypatch.undo()
    assert weight_files._process_start_ns() <= time.time_ns()
    made = config(folder)
    assert "model.safetensors changed since the engine started" in private(caplog, lambda: model_identity(made))
    assert "preprocessor_config.json changed" in private(caplog, lambda: model_identity(made, "mine"))


def test_a_file_that_changes_while_it_is_read_shares_with_nobody(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cache(weight_files.DigestCache):
        def get(self, state: Any) -> str:
            (folder / "model.safetensors").write_bytes(os.urandom(100))
            return super().get(state)

    monkeypatch.setattr("loracache.connectors.vllm.identity.model.DigestCache", Cache)
    assert "changed while it was read" in private(caplog, lambda: identity(folder))


def test_a_value_without_a_meaning_outside_this_process_shares_with_nobody(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for value in (object(), lambda: 0, torch.zeros(3)):
        reason = private(caplog, lambda value=value: identity(folder, additional_config={"hook": value}))
        assert "additional_config" in reason


# -- reading in the background ----------


def test_the_identity_is_unknown_while_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    class Slow(weight_files.DigestCache):
        def get(self, state: Any) -> str:
            go.wait(10)
            return super().get(state)

    monkeypatch.setattr("loracache.connectors.vllm.identity.model.DigestCache", Slow)
    found = ModelIdentity(config(folder))
    assert found.value() is None
    go.set()
    assert found.wait() == found.value() == identity(folder)


def test_digests_are_remembered_by_the_files_identity(folder: Path, own_cache: Path) -> None:
    file = folder / "model.safetensors"
    identity(folder)
    assert not list(own_cache.iterdir())  # written a moment ago: it could change once more and keep its times
    old = time.time() - 3600
    os.utime(file, (old, old))
    state = weight_files.FileState.of(file)
    cache = weight_files.DigestCache()
    cache.put(state, "ab" * 32)
    assert [path.stat().st_mode & 0o777 for path in [own_cache]] == [0o700]
    remembered = identity(folder)
    os.utime(file, (old + 1, old + 1))
    assert identity(folder) != remembered


@pytest.mark.parametrize("mode", [0o500, 0o777], ids=["unwritable", "open to others"])
def test_a_folder_that_cannot_be_trusted_holds_no_digests(folder: Path, own_cache: Path, mode: int) -> None:
    own_cache.mkdir(parents=True)
    state = weight_files.FileState.of(folder / "model.safetensors")
    weight_files.DigestCache().put(state, "ab" * 32)
    own_cache.chmod(mode)
    if mode == 0o777:
        assert weight_files.DigestCache().get(state) == ""
    assert identity(folder) == identity(folder)
    own_cache.chmod(0o700)
    assert weight_files.DigestCache().get(state) == "ab" * 32
