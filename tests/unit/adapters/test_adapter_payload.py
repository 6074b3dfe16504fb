# SPDX-License-Identifier: Apache-2.0
"""Payloads of adapters: the same bytes for the same content wherever they are written, and the folder given back."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import resource
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import TensorSpec, serialize_file

from loracache.adapters.payload import Packed, Packing, adapter_digest, export
from loracache.adapters.peft import CONFIG, WEIGHTS, PeftFolder
from loracache.errors import UsageError

BITS = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}
LONG = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPES = sorted(BITS)
FINITE = {"F32": 0xFF7FFFFF, "F16": 0xFBFF, "BF16": 0xFF7F}  # one bit of the exponent is never set


@dataclass(frozen=True)
class Tensor:
    """bits: the numbers' bit patterns, in PEFT's shape."""

    dtype: str
    bits: Any


Tensors = dict[str, Tensor]


def tensor(dtype: str, *shape: int, seed: int = 0) -> Tensor:
    """Any finite numbers, denormal and negative ones among them."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, shape, dtype=np.uint32)
    return Tensor(dtype, (bits & FINITE[dtype]).astype(BITS[dtype]))


def pair(module: str, rank: int, a: str = "F16", b: str = "F16", *, inside: int = 6, out: int = 5) -> Tensors:
    seed = len(module) + rank
    return {
        f"{module}.lora_A.weight": tensor(a, rank, inside, seed=seed),
        f"{module}.lora_B.weight": tensor(b, out, rank, seed=seed + 1),
    }


M = "base_model.model.model"
SETTINGS: dict[str, Any] = {
    "r": 4, "lora_alpha": 6.5, "use_rslora": True, "rank_pattern": {"v_proj": 2},
    "alpha_pattern": {"v_proj": 3, ".*": 7},
}  # fmt: skip
# As PEFT writes it: much that scales nothing, and in an order of its own.
CONFIG_TEXT = json.dumps(
    {"peft_type": "LORA", "target_modules": ["v_proj", "q_proj", "embed_tokens"], "lora_dropout": 0.1, "ü": "é\r\n"}
    | SETTINGS,
    indent=3,
    ensure_ascii=False,
)
TENSORS = (
    pair(f"{M}.layers.0.q_proj", 4, "F32", "F16")
    | pair(f"{M}.layers.0.v_proj", 2, "BF16", "BF16", out=7)
    | {
        f"{M}.embed_tokens.lora_embedding_A": tensor("F16", 4, 9, seed=3),
        f"{M}.embed_tokens.lora_embedding_B": tensor("F16", 6, 4, seed=4),
        f"{M}.embed_tokens.base_layer.weight": tensor("BF16", 9, 6, seed=5),
        f"{M}.lm_head.base_layer.weight": tensor("F32", 0, 6),
    }
)


def write(folder: Path, config: str = CONFIG_TEXT, tensors: Tensors = TENSORS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_bytes(config.encode())
    specs = {
        name: TensorSpec(
            dtype=LONG[it.dtype], shape=list(it.bits.shape), data_ptr=it.bits.ctypes.data, data_len=it.bits.nbytes
        )
        for name, it in tensors.items()
    }
    serialize_file(specs, str(folder / WEIGHTS))
    return folder


def turned(folder: Path, config: str, tensors: Tensors) -> Path:
    """As `write`, with tensors in reverse order and blanks and metadata in the header."""
    write(folder, config, tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "by hand"}}
    data = b""
    for name, it in reversed(tensors.items()):
        places = [len(data), len(data) + it.bits.nbytes]
        header[name] = {"shape": it.bits.shape, "data_offsets": places, "dtype": it.dtype}
        data += it.bits.tobytes()
    text = json.dumps(header, indent=1).encode() + b"   "
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def pack(folder: Path) -> tuple[bytes, str]:
    """(payload, digest)."""
    with PeftFolder(folder) as opened:
        packing = Packing(opened)
        payload = bytearray(b"\xaa" * packing.size)  # as memory that held something else
        digest = packing.write([memoryview(payload)])
        return bytes(payload), digest


def unpack(payload: bytes) -> Packed:
    return Packed([memoryview(payload)])


def content(folder: Path) -> list[tuple[Any, ...]]:
    with PeftFolder(folder) as opened:
        return [(it.name, it.dtype, it.shape, b"".join(opened.chunks(it))) for it in opened.tensors]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("adapter") / "folder")


@pytest.fixture(scope="module")
def payload(folder: Path) -> bytes:
    return pack(folder)[0]


# -- what a payload is -------------------------------------------------------------------------------------------------


def test_a_payload_is_a_header_and_every_tensor_rank_major_at_64_bytes(payload: bytes) -> None:
    """Written down once more: what one version stores, another one reads."""
    named = [[name, it.dtype, list(it.bits.shape)] for name, it in sorted(TENSORS.items())]
    unscaled = {"bias": "none", "modules_to_save": None, "use_dora": False}
    settings_then_tensors = {"settings": dict(sorted((SETTINGS | unscaled).items())), "tensors": named}
    header = json.dumps(settings_then_tensors, separators=(",", ":"))
    expected = b"LoRA\0\0\0\1" + len(header).to_bytes(8, "little") + header.encode()
    for name, it in sorted(TENSORS.items()):
        expected += bytes(-len(expected) % 64)
        expected += (it.bits.T if name.endswith(("lora_B.weight", "embedding_B")) else it.bits).tobytes()
    assert payload == expected


def test_a_payload_tells_settings_modules_rows_and_what_the_file_held(payload: bytes) -> None:
    packed = unpack(payload)
    assert (packed.settings.rank, packed.settings.alpha, packed.settings.use_rslora) == (4, 6.5, True)
    modules = packed.modules()
    assert {name: (it.rank, it.scaling) for name, it in modules.items()} == {
        "model.layers.0.q_proj": (4, 7 / math.sqrt(4)),
        "model.layers.0.v_proj": (2, pytest.approx(3 / math.sqrt(2))),
        "model.embed_tokens": (4, 7 / math.sqrt(4)),
    }
    for module in modules.values():
        a, b = TENSORS[module.a.name].bits, TENSORS[module.b.name].bits
        assert (module.a.shape, module.b.shape) == (a.shape, b.shape)
        assert b"".join(packed.rows(module.a)) == a.tobytes()
        assert b"".join(packed.rows(module.b)) == b"".join(b[:, rank].tobytes() for rank in range(module.rank))
    assert {it.name: packed.original(it) for it in packed.tensors} == {
        name: it.bits.tobytes() for name, it in TENSORS.items()
    }


def test_rows_are_views_of_the_buffers(folder: Path) -> None:
    memory = bytearray(pack(folder)[0])
    packed = Packed([memoryview(memory)])
    stored = packed.tensors[0]
    (rows,) = packed.rows(stored)
    memory[stored.offset] ^= 1
    assert rows[0] == memory[stored.offset]


def scattered(size: int, cuts: list[float], gap: int) -> tuple[bytearray, list[memoryview]]:
    """Memory of extents in reverse order with gaps between them, and the views of them."""
    at = sorted({0, size, *(int(cut * size) for cut in cuts)})
    lengths = [end - start for start, end in itertools.pairwise(at)]
    memory = bytearray(b"\xaa" * (size + gap * (len(lengths) + 1)))
    views, end = [], len(memory) - gap
    for length in lengths:
        views += [memoryview(memory)[end - length : end], memoryview(b"")]
        end -= length + gap
    return memory, views


@given(st.lists(st.floats(0, 1, exclude_max=True), max_size=40), st.integers(0, 3))
def test_a_payload_is_the_same_in_one_piece_and_scattered(
    folder: Path, payload: bytes, cuts: list[float], gap: int
) -> None:
    memory, views = scattered(len(payload), cuts, gap)
    with PeftFolder(folder) as opened:
        packing = Packing(opened)
        assert packing.size == len(payload)
        digest = packing.write(views)
    assert digest == adapter_digest(str(folder))
    assert b"".join(views) == payload
    assert memory.count(0xAA) == payload.count(0xAA) + gap * (len(views) // 2 + 1), "written outside of the extents"
    packed = Packed(views)
    assert packed.modules() == unpack(payload).modules()
    assert packing.sizes() == {name: module.size for name, module in packed.modules().items()}
    assert {it.name: packed.original(it) for it in packed.tensors} == {
        name: it.bits.tobytes() for name, it in TENSORS.items()
    }


def test_the_same_content_makes_the_same_payload(tmp_path: Path, folder: Path, payload: bytes) -> None:
    other = {"base_model_name_or_path": "/elsewhere", "peft_type": "LORA", "bias": None, "inference_mode": False}
    again = turned(tmp_path / "deep" / "down", json.dumps(dict(reversed((other | SETTINGS).items()))), TENSORS)
    assert pack(again) == (payload, adapter_digest(str(folder)))


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 7}, {"use_rslora": False}, {"alpha_pattern": {".*": 7, "v_proj": 3}}, {"alpha_pattern": {}},
        {"rank_pattern": {"v_proj": 2, "x": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_other_scaling_makes_another_payload(tmp_path: Path, payload: bytes, change: dict[str, Any]) -> None:
    """The order of patterns scales too: the first that matches wins."""
    other, digest = pack(write(tmp_path, json.dumps(SETTINGS | change)))
    with PeftFolder(tmp_path) as opened:
        expected = opened.check()
    assert other != payload
    assert digest == adapter_digest(str(tmp_path))
    for name, module in unpack(other).modules().items():
        assert module.scaling == expected.scaling_of(name, module.rank)


def test_every_bit_of_a_tensor_is_in_the_payload_and_in_the_digest(tmp_path: Path, payload: bytes) -> None:
    seen = {adapter_digest(str(write(tmp_path)))}
    for name, it in TENSORS.items():
        if it.bits.size:
            bits = it.bits.copy()
            bits.flat[-1] ^= 1
            other, digest = pack(write(tmp_path, tensors=TENSORS | {name: Tensor(it.dtype, bits)}))
            seen.add(digest)
            assert sum(a != b for a, b in zip(other, payload, strict=True)) == 1
    assert len(seen) == len(TENSORS)


# -- back into a folder ------------------------------------------------------------------------------------------------


def test_an_exported_folder_is_the_one_that_was_packed(tmp_path: Path, folder: Path, payload: bytes) -> None:
    target = tmp_path / "not" / "there" / "yet"
    export(unpack(payload), target, CONFIG_TEXT)
    assert (target / CONFIG).read_bytes() == CONFIG_TEXT.encode()
    assert sorted(os.listdir(target)) == [CONFIG, WEIGHTS]
    assert os.listdir(target.parent) == [target.name]
    assert content(target) == content(folder)
    assert pack(target) == (payload, adapter_digest(str(folder)))


def test_without_its_configuration_a_folder_gets_what_scales_the_weights(
    tmp_path: Path, folder: Path, payload: bytes
) -> None:
    export(unpack(payload), tmp_path / "x")
    config = json.loads((tmp_path / "x" / CONFIG).read_text())
    assert {key: config[key] for key in SETTINGS} == SETTINGS
    assert list(config["alpha_pattern"]) == list(SETTINGS["alpha_pattern"])
    assert (config["peft_type"], config["target_modules"]) == ("LORA", ["embed_tokens", "q_proj", "v_proj"])
    with PeftFolder(tmp_path / "x") as opened, PeftFolder(folder) as first:
        assert opened.check() == first.check()
    assert pack(tmp_path / "x") == (payload, adapter_digest(str(folder)))


def filled(path: Path) -> None:
    path.mkdir()
    (path / "mine").touch()


THERE: dict[str, Callable[[Path], Any]] = {
    "empty folder": os.mkdir, "folder": filled, "file": Path.touch, "pipe": os.mkfifo,
    "link to nothing": lambda path: path.symlink_to("nowhere"), "link to folder": lambda path: path.symlink_to("/tmp"),
}  # fmt: skip


def look(target: Path) -> tuple[list[int], list[str]]:
    """What stands there; not when it was read last, which looking changes."""
    found = os.lstat(target)
    numbers = [found.st_mode, found.st_ino, found.st_uid, found.st_gid, found.st_size, found.st_mtime_ns]
    return numbers, os.listdir(target) if target.is_dir() else []


@pytest.mark.parametrize("what", list(THERE))
def test_what_is_there_already_is_not_touched_by_an_export(tmp_path: Path, payload: bytes, what: str) -> None:
    target = tmp_path / "x"
    THERE[what](target)
    before = look(target)
    with pytest.raises(UsageError, match=f"^{re.escape(str(target))} cannot be written: .*; give a folder that is not"):
        export(unpack(payload), target)
    assert os.listdir(tmp_path) == ["x"]
    assert before == look(target)


@pytest.fixture
def little_room() -> Iterator[Callable[[], None]]:
    """Files may have a few bytes only: a write fails as on a full disk, and for any user."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_export_that_fails_half_way_leaves_nothing_behind(
    tmp_path: Path, payload: bytes, little_room: Callable[[], None]
) -> None:
    little_room()
    with pytest.raises(UsageError, match=r"x cannot be written: .*File too large"):
        export(unpack(payload), tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_a_configuration_that_is_no_text_leaves_nothing_behind(tmp_path: Path, payload: bytes) -> None:
    with pytest.raises(UsageError, match=r"x cannot be written: .*surrogates not allowed"):
        export(unpack(payload), tmp_path / "x", '{"r": "\ud800"}')
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["file/x", "file/x/y", "\0", "n" * 256, "/proc/x", "/", ""])
def test_a_place_that_cannot_be_is_refused(tmp_path: Path, payload: bytes, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        export(unpack(payload), tmp_path / name if name else Path())
    assert os.listdir(tmp_path) == ["file"]


# -- any adapter -------------------------------------------------------------------------------------------------------


@st.composite
def adapters(draw: st.DrawFn) -> tuple[dict[str, Any], Tensors]:
    names = st.from_regex(r"[a-c]{1,2}(\.[0-9a-c]{1,3}){0,3}", fullmatch=True)
    modules = draw(st.lists(names, min_size=1, unique=True))
    config: dict[str, Any] = {"r": draw(st.integers(1, 20)), "lora_alpha": draw(st.floats(-9, 99) | st.integers(0, 64))}
    config |= {"use_rslora": draw(st.booleans()), "rank_pattern": {}, "alpha_pattern": {}}
    tensors: Tensors = {}
    for module in modules:
        rank = config["r"]
        if draw(st.booleans()):
            rank = config["rank_pattern"]["^" + module.replace(".", r"\.")] = draw(st.sampled_from([1, 2, 8, 33, 256]))
        if draw(st.booleans()):
            config["alpha_pattern"]["^" + module.replace(".", r"\.")] = draw(st.floats(0, 1e6))
        sizes = {"inside": draw(st.integers(1, 20)), "out": draw(st.integers(1, 20))}
        name = draw(st.sampled_from(["", "base_model.model."])) + module
        tensors |= pair(name, rank, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES)), **sizes)
    return config, tensors


@settings(max_examples=40)
@given(adapters(), st.booleans())
def test_any_adapter_comes_back_bit_for_bit(adapter: tuple[dict[str, Any], Tensors], with_config: bool) -> None:
    config, tensors = adapter
    with tempfile.TemporaryDirectory() as name:
        one, two = Path(name, "one"), Path(name, "two")
        packed, digest = pack(write(one, json.dumps(config), tensors))
        export(unpack(packed), two, json.dumps(config) if with_config else "")
        assert content(one) == content(two)
        assert pack(two) == (packed, digest)
        assert {it.rank for it in unpack(packed).modules().values()} <= {config["r"], *config["rank_pattern"].values()}
