# SPDX-License-Identifier: Apache-2.0
"""PEFT folders: what can be served is, scaled as PEFT does; all else is refused by file, tensor and reason."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracache.adapters import peft
from loracache.adapters.payload import Packing, adapter_digest
from loracache.adapters.peft import CONFIG, WEIGHTS, PeftFolder, Settings
from loracache.errors import UsageError

Tensor = tuple[str, tuple[int, ...], bytes]  # dtype, shape, data

ITEM = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1, "I32": 4, "BOOL": 1}
BITS = {"F64": "<u8", "F32": "<u4", "F16": "<u2", "BF16": "<u2"}
DTYPES = sorted(BITS)
Q = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."
MAGNITUDE = f"{PREFIX}{Q}.lora_magnitude_vector"

# An exponent with every bit set. The others of a number are sign and fraction.
EXPONENT = {"F64": 0x7FF << 52, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
SIGN = {"F64": 1 << 63, "F32": 1 << 31, "F16": 1 << 15, "BF16": 1 << 15}


def zeros(dtype: str, *shape: int) -> Tensor:
    return dtype, shape, bytes(ITEM[dtype] * math.prod(shape))


def pair(module: str = Q, rank: int = 8, dtype: str = "F16", prefix: str = PREFIX) -> dict[str, Tensor]:
    return {
        f"{prefix}{module}.lora_A.weight": zeros(dtype, rank, 6),
        f"{prefix}{module}.lora_B.weight": zeros(dtype, 5, rank),
    }


A, B = pair()


def safetensors(tensors: dict[str, Tensor]) -> bytes:
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write(folder: Path, config: dict[str, Any] | str = "{}", tensors: dict[str, Tensor] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    (folder / WEIGHTS).write_bytes(safetensors(pair() if tensors is None else tensors))
    return folder


def check(folder: Path) -> Settings:
    with PeftFolder(folder) as opened:
        return opened.check()


def refusal(folder: Path) -> str:
    """What the folder is refused with: the same by `check` and by what packs it."""
    with pytest.raises(UsageError) as refused:
        check(folder)
    with pytest.raises(UsageError, match=re.escape(str(refused.value))), PeftFolder(folder) as opened:
        Packing(opened)
    return str(refused.value)


# -- what is served ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 8, 256, 320, 512])
@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_is_divided_by_the_rank_or_by_its_root(tmp_path: Path, rank: int, rslora: bool) -> None:
    config = {"r": rank, "lora_alpha": 16.5, "use_rslora": rslora}
    found = check(write(tmp_path, config, pair(rank=rank)))
    assert found.rank_of(Q) == rank
    assert found.scaling_of(Q, rank) == pytest.approx(16.5 / (rank**0.5 if rslora else rank), rel=1e-12)


def test_what_is_left_out_is_what_peft_takes_for_it(tmp_path: Path) -> None:
    found = check(write(tmp_path, {"r": None, "use_dora": None, "rank_pattern": None, "bias": None}))
    assert (found.rank_of(Q), found.scaling_of(Q, 8)) == (8, 1.0)


@pytest.mark.parametrize("a", DTYPES)
@pytest.mark.parametrize("b", DTYPES)
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_dtypes_may_mix_and_names_may_lack_their_prefix(tmp_path: Path, a: str, b: str, prefix: str) -> None:
    names = list(pair(prefix=prefix))
    check(write(tmp_path, {}, {names[0]: zeros(a, 8, 6), names[1]: zeros(b, 5, 8)}))


def test_embeddings_are_served_and_copies_of_base_weights_are_passed_over(tmp_path: Path) -> None:
    embedding = f"{PREFIX}model.embed_tokens"
    tensors = pair() | {
        f"{embedding}.lora_embedding_A": zeros("BF16", 8, 100),
        f"{embedding}.lora_embedding_B": zeros("BF16", 6, 8),
        f"{embedding}.base_layer.weight": zeros("BF16", 100, 6),
        f"{PREFIX}lm_head.base_layer.weight": zeros("F32", 100, 6),
    }
    check(write(tmp_path, {"target_modules": ["q_proj", "embed_tokens"]}, tensors))


@pytest.mark.parametrize(
    "targets", [["q_proj"], [Q], ["self_attn.q_proj", "q_proj"], r".*\.q_proj", "all-linear", "(a+)+$", None], ids=str
)
def test_targets_may_be_a_list_of_suffixes_or_a_pattern_that_is_not_run(tmp_path: Path, targets: Any) -> None:
    check(write(tmp_path, {"target_modules": targets}))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "k_proj", "mlp.down_proj"], "exclude_modules": ["k_proj", "down_proj"]},
        {"target_modules": [Q, Q.replace("q_proj", "k_proj")], "exclude_modules": r".*k_proj"},
        {"target_modules": ["q_proj", "c_attn", "wqkv"], "exclude_modules": None},
        {"target_modules": [Q.replace("layers.0", "layers.1"), "q_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj"], "modules_to_save": ["classifier", "score"]},
    ],
    ids=["excluded", "all-linear without some", "of other models", "layers_to_transform", "modules_to_save"],
)
def test_targets_that_have_no_tensors_are_served_without(tmp_path: Path, config: dict[str, Any]) -> None:
    """As PEFT writes them: "all-linear" is resolved before what is excluded is left out, and names that this model does
    not have stay in the list. What was trained is in the file."""
    check(write(tmp_path, config))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "EVA", "orthogonal"])
def test_initialisations_that_leave_the_base_model_alone_are_served(tmp_path: Path, init: Any) -> None:
    off: dict[str, object] = {"use_dora": False, "modules_to_save": None, "layer_replication": [], "lora_bias": False}
    check(write(tmp_path, {"init_lora_weights": init, "lora_dropout": 0.1, "peft_type": "LORA", **off}))


# -- settings that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"), ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "use_dora=True"), ({"lora_bias": True}, "lora_bias=True"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"), ({"use_bdlora": True}, "use_bdlora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"), ({"use_qalora": True}, "use_qalora"),
        ({"target_parameters": ["w"]}, "target_parameters"), ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"bias": "all"}, "bias='all'"), ({"bias": "lora_only"}, "bias='lora_only'"), ({"bias": True}, "bias=True"),
        ({"init_lora_weights": "pissa"}, "'pissa'"), ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
        ({"init_lora_weights": "OLoRA"}, "'OLoRA'"), ({"init_lora_weights": "loftq"}, "'loftq'"),
        ({"use_rslora": "no"}, "use_rslora='no'"), ({"use_rslora": 1}, "use_rslora=1"),
        *[({"r": it}, f"r={it!r} must be an integer from 1 to 512") for it in (0, 513, -1, True, "8", 8.0, [8])],
        *[({"rank_pattern": {"q": it}}, f"rank_pattern['q']={it!r} must") for it in (0, 513, True, "8", None)],
        *[({"lora_alpha": it}, "lora_alpha=") for it in (math.nan, math.inf, -math.inf, "16", True, [1], 10**400)],
        *[({"alpha_pattern": {"q": it}}, "alpha_pattern['q']=") for it in (math.nan, "1", None, 10**400)],
        ({"rank_pattern": ["q"]}, "rank_pattern=['q'] must map"), ({"alpha_pattern": 7}, "alpha_pattern=7 must map"),
    ],
    ids=lambda given: str(given)[:50],
)  # fmt: skip
def test_settings_that_cannot_be_served_are_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    message = refusal(write(tmp_path, {"r": 8, "lora_alpha": 16} | change))
    assert message.startswith(f"{tmp_path / CONFIG}: ")
    assert reason in message


# -- tensors that are refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named", "reason"),
    [
        ({MAGNITUDE: zeros("F32", 5)}, MAGNITUDE, "DoRA is not supported"),
        ({"x.lora_A.bias": zeros("F32", 5)}, "x.lora_A.bias", "it is not a LoRA weight"),
        ({"lm_head.weight": zeros("F32", 5, 5)}, "lm_head.weight", "it is not a LoRA weight"),
        ({"x.lora_A.weight": zeros("F32", 8, 5)}, "x", "has no lora_B"),
        ({"x.lora_embedding_B": zeros("F32", 5, 8)}, "x", "has no lora_A"),
        ({"x.lora_A.weight": zeros("F32", 8, 5), "x.lora_embedding_B": zeros("F32", 5, 8)}, "x", "lora_"),
        (pair(prefix=""), Q, "twice"),
        ({f"{PREFIX}{Q}.lora_embedding_A": zeros("F32", 8, 5)}, Q, "twice"),
        *[
            ({name: zeros("F16", *shape)}, name, f"shape {shape}; {CONFIG} says {wanted}")
            for name, wanted, shapes in (
                (A, "(8, in)", [(8,), (8, 6, 1), (), (7, 6), (8, 0)]),
                (B, "(out, 8)", [(8,), (5, 8, 1), (), (5, 9), (0, 8)]),
            )
            for shape in shapes
        ],
        *[({A: zeros(it, 8, 6)}, A, f"is {it}; give one of F64, F32, F16, BF16") for it in ("I8", "I32", "BOOL")],
        ({"model.embed_tokens.base_layer.weight": zeros("I8", 2, 2)}, "embed_tokens.base_layer.weight", "is I8"),
    ],
)  # fmt: skip
def test_tensors_that_cannot_be_served_are_named(
    tmp_path: Path, change: dict[str, Tensor], named: str, reason: str
) -> None:
    message = refusal(write(tmp_path, {}, pair() | change))
    assert message.startswith(f"{tmp_path / WEIGHTS}: ")
    assert named in message
    assert reason in message


@pytest.mark.parametrize("name", ["score.weight", "model.lm_head.weight", "model.norm.weight"])
def test_whole_modules_are_refused_as_such(tmp_path: Path, name: str) -> None:
    config = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    message = refusal(write(tmp_path, config, pair() | {f"{PREFIX}{name}": zeros("F32", 3, 6)}))
    assert f"tensor '{PREFIX}{name}': it is not a LoRA weight, but a whole module's (modules_to_save)" in message


def test_a_rank_that_is_not_the_patterns_is_refused(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, {"r": 8, "rank_pattern": {"q_proj": 4}}))
    assert f"{A!r} has shape (8, 6); {CONFIG} says (4, in)" in message


@pytest.mark.parametrize("tensors", [{}, {"model.embed_tokens.base_layer.weight": zeros("F32", 2, 2)}], ids=len)
def test_a_file_without_lora_tensors_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    assert "adapter_model.safetensors holds no LoRA tensors" in refusal(write(tmp_path, {}, tensors))


NUMBERS = st.one_of(st.just(0), st.integers(0, (1 << 52) - 1))  # the fraction: an infinity, or any kind of NaN


@given(st.sampled_from(DTYPES), st.booleans(), st.integers(0, 47), NUMBERS, st.booleans())
def test_an_infinity_or_a_nan_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, in_b: bool, at: int, fraction: int, negative: bool
) -> None:
    bits = np.full(48, EXPONENT[dtype] - 1, dtype=BITS[dtype])  # close to the largest finite number
    bits[at] = EXPONENT[dtype] | fraction & ~EXPONENT[dtype] & (SIGN[dtype] - 1) | (SIGN[dtype] if negative else 0)
    name, shape = (B, (6, 8)) if in_b else (A, (8, 6))
    folder = write(tmp_path_factory.mktemp("folder"), {}, pair() | {name: (dtype, shape, bits.tobytes())})
    with PeftFolder(folder) as opened:
        packing = Packing(opened)
        with pytest.raises(UsageError, match=f"{WEIGHTS}: tensor '{name}' has an infinity or a NaN"):
            packing.write([memoryview(bytearray(packing.size))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_number_is_served(tmp_path: Path, dtype: str) -> None:
    if dtype == "F64":
        bits = np.random.default_rng(0).integers(0, 1 << 64, 65536, dtype=np.uint64)
    else:
        bits = np.arange(0, 2 * SIGN[dtype], 65521 if dtype == "F32" else 1, dtype=np.int64)
    bits = bits[bits & EXPONENT[dtype] != EXPONENT[dtype]]
    bits = bits[: len(bits) // 8 * 8].astype(BITS[dtype])
    folder = write(tmp_path, {}, pair() | {A: (dtype, (8, len(bits) // 8), bits.tobytes())})
    with PeftFolder(folder) as opened:
        packing = Packing(opened)
        assert packing.write([memoryview(bytearray(packing.size))]) == adapter_digest(str(folder))


# -- files that are refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pickle", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_named_and_not_read(tmp_path: Path, pickle: str) -> None:
    (write(tmp_path) / WEIGHTS).rename(tmp_path / pickle)
    wanted = rf"{WEIGHTS}' cannot be read.*; {pickle} is a pickle.*safetensors.*python -m loracache.connectors"
    with pytest.raises(UsageError, match=wanted):
        PeftFolder(tmp_path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


INSTEAD: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero"),
    "nothing": lambda _: None,
    "link to nothing": lambda path: path.symlink_to("nowhere"), "link to itself": lambda path: path.symlink_to(path),
    "socket": a_socket,
}  # fmt: skip


@pytest.mark.timeout(10)
@pytest.mark.parametrize("what", list(INSTEAD))
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_is_no_file_is_refused_at_once(short_tmp: Path, what: str, name: str) -> None:
    (write(short_tmp) / name).unlink()
    INSTEAD[what](short_tmp / name)
    before = len(os.listdir("/proc/self/fd"))
    for use in (PeftFolder, adapter_digest):
        with pytest.raises(UsageError, match=name):
            use(str(short_tmp))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_configuration_over_one_mib_is_refused(tmp_path: Path) -> None:
    limit = 1 << 20
    check(write(tmp_path, "{" + " " * (limit - 2) + "}"))
    write(tmp_path, "{" + " " * (limit - 1) + "}")
    with pytest.raises(UsageError, match=rf"{CONFIG} has more than {limit} bytes"):
        PeftFolder(tmp_path)


def test_a_header_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    length = (32 << 20) + 1
    with (write(tmp_path) / WEIGHTS).open("r+b") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(8 + length)
    with pytest.raises(UsageError, match=rf"{WEIGHTS} is not a safetensors file: its header of {length} bytes"):
        PeftFolder(tmp_path)


def test_names_may_be_long_but_not_too_long(tmp_path: Path) -> None:
    longest = "a" * (512 - len(".lora_A.weight"))
    check(write(tmp_path, {}, pair(longest, prefix="")))
    write(tmp_path, {}, pair(longest + "a", prefix=""))
    with pytest.raises(UsageError, match=rf"{WEIGHTS} is not a safetensors file: the name 'a{{40}}'\.\.\. has"):
        PeftFolder(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    file = write(tmp_path) / WEIGHTS
    os.truncate(file, min(int(file.stat().st_size * keep), file.stat().st_size - 1))
    with pytest.raises(UsageError, match=rf"{WEIGHTS} is not a safetensors file"):
        PeftFolder(tmp_path)


def test_a_file_that_ends_early_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    with PeftFolder(write(tmp_path)) as opened:
        packing = Packing(opened)
        os.truncate(tmp_path / WEIGHTS, (tmp_path / WEIGHTS).stat().st_size - 1)
        with pytest.raises(UsageError, match=rf"{WEIGHTS} is truncated in '{B}'"):
            packing.write([memoryview(bytearray(packing.size))])


def test_a_disk_that_fails_under_the_tensors_is_a_refusal_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with PeftFolder(write(tmp_path)) as opened:
        packing = Packing(opened)
        monkeypatch.setattr(os, "pread", fails)
        with pytest.raises(UsageError, match=rf"{WEIGHTS} cannot be read in '{A}': Input/output error"):
            packing.write([memoryview(bytearray(packing.size))])


def test_a_file_replaced_while_it_is_opened_is_read_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was checked is what is read: the offsets of one file would be wrong in another."""
    expected = adapter_digest(str(write(tmp_path)))
    open_file: Callable[..., int] = peft._open

    def replaced(path: Path, hint: Any) -> int:
        fd = open_file(path, hint)
        path.with_suffix(".new").write_bytes(b"{}")
        path.with_suffix(".new").replace(path)
        return fd

    monkeypatch.setattr(peft, "_open", replaced)
    assert adapter_digest(str(tmp_path)) == expected
