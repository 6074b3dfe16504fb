# SPDX-License-Identifier: Apache-2.0
"""Adapters by content: what scales or fills the weights makes another digest, what merely stores them does not."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from loracache.adapters import payload as adapters
from loracache.adapters.payload import AdapterDigests, adapter_digest, folder_identity
from loracache.errors import UsageError

CONFIG = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
    "bias": "none", "base_model_name_or_path": "org/model", "lora_dropout": 0.0, "inference_mode": True,
}  # fmt: skip
TENSORS: dict[str, np.ndarray[Any, Any]] = {
    "base_model.model.layers.0.q_proj.lora_A.weight": np.arange(64, dtype=np.float16).reshape(8, 8),
    "base_model.model.layers.0.q_proj.lora_B.weight": np.ones((4, 8), dtype=np.float32),
    "base_model.model.layers.1.q_proj.lora_A.weight": np.arange(64, dtype=np.float16).reshape(8, 8) + 1,
}
WEIGHTS = "adapter_model.safetensors"


def write(folder: Path, config: dict[str, Any] | str = CONFIG, tensors: dict[str, Any] = TENSORS) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return str(folder)


def by_hand(tensors: dict[str, Any], names: list[str], header_end: bytes = b"", metadata: bool = False) -> bytes:
    """A safetensors file with its tensors in the order of `names`, in header and in data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "written": "by hand"}} if metadata else {}
    data = b""
    for name in names:
        raw = tensors[name].tobytes()
        kind = {"float16": "F16", "float32": "F32"}[str(tensors[name].dtype)]
        header[name] = {
            "dtype": kind,
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode() + header_end
    return len(text).to_bytes(8, "little") + text + data


def test_the_digest_is_the_same_for_ever(tmp_path: Path) -> None:
    assert adapter_digest(write(tmp_path)) == "28bc7871683f321e813b91e66a503ac0f1bc9b363e7da96ddcad9bfdfdcad974"


def test_what_is_left_out_is_what_peft_takes_for_it(tmp_path: Path) -> None:
    short = {key: CONFIG[key] for key in ("peft_type", "r", "lora_alpha")}
    assert adapter_digest(write(tmp_path / "a")) == adapter_digest(write(tmp_path / "b", short))
    null = {**short, "use_rslora": None, "rank_pattern": None}
    assert adapter_digest(write(tmp_path / "a")) == adapter_digest(write(tmp_path / "c", null))


def test_path_name_and_leftovers_of_training_do_not_matter(tmp_path: Path) -> None:
    one = adapter_digest(write(tmp_path / "one"))
    other = CONFIG | {"base_model_name_or_path": "/elsewhere", "lora_dropout": 0.1, "inference_mode": False}
    reordered = dict(reversed(other.items()))
    assert adapter_digest(write(tmp_path / "deep" / "two", reordered)) == one
    (tmp_path / "one" / "README.md").write_text("a card")
    assert adapter_digest(str(tmp_path / "one")) == one


@pytest.mark.parametrize(
    ("turn", "header_end", "metadata"), [(1, b"", False), (-1, b"", False), (1, b"    ", False), (-1, b" ", True)]
)
def test_the_layout_of_the_file_does_not_matter(tmp_path: Path, turn: int, header_end: bytes, metadata: bool) -> None:
    one = adapter_digest(write(tmp_path / "one"))
    names = sorted(TENSORS)[::turn]
    write(tmp_path / "two")
    (tmp_path / "two" / WEIGHTS).write_bytes(by_hand(TENSORS, names, header_end, metadata))
    assert adapter_digest(str(tmp_path / "two")) == one


@pytest.mark.parametrize(
    "change",
    [
        {"r": 16}, {"lora_alpha": 32}, {"lora_alpha": 16.5}, {"use_rslora": True}, {"use_dora": True},
        {"rank_pattern": {"q_proj": 4}}, {"alpha_pattern": {"q_proj": 4}}, {"bias": "all"}, {"modules_to_save": ["x"]},
    ],
    ids=str,
)  # fmt: skip
def test_what_scales_the_weights_makes_another_adapter(tmp_path: Path, change: dict[str, Any]) -> None:
    assert adapter_digest(write(tmp_path / "a", CONFIG | change)) != adapter_digest(write(tmp_path / "b"))


def test_every_byte_of_every_tensor_counts(tmp_path: Path) -> None:
    write(tmp_path)
    raw = (tmp_path / WEIGHTS).read_bytes()
    data_starts = 8 + int.from_bytes(raw[:8], "little")
    digests = {adapter_digest(str(tmp_path))}
    places = range(data_starts, len(raw), 7)
    for at in places:
        (tmp_path / WEIGHTS).write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        digests.add(adapter_digest(str(tmp_path)))
    assert len(digests) == 1 + len(places)


def test_name_shape_dtype_and_number_of_tensors_count(tmp_path: Path) -> None:
    first, *_ = TENSORS
    others: list[dict[str, Any]] = [
        TENSORS,
        TENSORS | {first: TENSORS[first].reshape(4, 16)},
        TENSORS | {first: TENSORS[first].view(np.int16)},
        {name + "x" * (name == first): value for name, value in TENSORS.items()},
        {name: value for name, value in TENSORS.items() if name != first},
        TENSORS | {"empty": np.zeros((0, 4), dtype=np.float32)},
    ]
    assert len({adapter_digest(write(tmp_path / str(at), tensors=some)) for at, some in enumerate(others)}) == len(
        others
    )


def test_two_tensors_that_change_places_make_another_adapter(tmp_path: Path) -> None:
    one, _, two = sorted(TENSORS)
    swapped = TENSORS | {one: TENSORS[two], two: TENSORS[one]}
    assert adapter_digest(write(tmp_path / "a")) != adapter_digest(write(tmp_path / "b", tensors=swapped))


# -- what is not an adapter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["", "{", "[]", "7", "[" * 100_000, '{"r": 8}\xff'])
def test_a_configuration_that_is_none_is_refused_by_name(tmp_path: Path, config: str) -> None:
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(UsageError, match=r"adapter_config\.json is not a PEFT configuration"):
        adapter_digest(str(tmp_path))


def damaged() -> dict[str, bytes]:
    good = save(TENSORS)
    header = int.from_bytes(good[:8], "little")
    deep = b'{"a":' * 50_000
    return {
        "empty": b"",
        "short": good[:-1],
        "half": good[: len(good) // 2],
        "longer": good + b"x",
        "header cut": good[: 8 + header // 2],
        "header huge": (1 << 60).to_bytes(8, "little") + good[8:],
        "no json": good[:8] + b"x" * header + good[8 + header :],
        "deep json": len(deep).to_bytes(8, "little") + deep,
        "not safetensors": b"\x80\x04\x95" + bytes(100),
    }


@pytest.mark.parametrize("name", sorted(damaged()))
def test_weights_that_are_truncated_or_no_safetensors_are_refused_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(damaged()[name])
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors is not a safetensors file"):
        adapter_digest(str(tmp_path))


@pytest.mark.parametrize("missing", ["adapter_config.json", WEIGHTS])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    write(tmp_path)
    (tmp_path / missing).unlink()
    for call in (adapter_digest, folder_identity, AdapterDigests().digest):
        with pytest.raises(UsageError, match=missing):
            call(str(tmp_path))


@pytest.mark.parametrize("path", ["", "nowhere", "/dev/null", "with\0zero", "x" * 5000, "\ud800"])
def test_a_path_that_cannot_be_is_refused(path: str) -> None:
    with pytest.raises(UsageError):
        AdapterDigests().digest(path)


# -- digests remembered ------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every path whose content is read for a digest."""
    seen: list[str] = []
    compute: Callable[[str], str] = adapters.adapter_digest

    def counted(path: str) -> str:
        seen.append(path)
        return compute(path)

    monkeypatch.setattr(adapters, "adapter_digest", counted)
    return seen


def age(folder: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `seconds` had passed since the files were written: a change time cannot be set."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + seconds)


def test_a_settled_adapter_is_read_once(tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path)
    age(folder, 3600, monkeypatch)
    digests = AdapterDigests()
    assert digests.digest(folder) == digests.digest(folder) == (adapter_digest(folder), folder_identity(folder))
    assert reads == [folder]


def test_an_adapter_overwritten_in_place_is_noticed(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same path, inode, size and modification time: the change time tells."""
    folder = write(tmp_path)
    age(folder, 3600, monkeypatch)
    digests = AdapterDigests()
    before, identity = digests.digest(folder)
    file = tmp_path / WEIGHTS
    stat = file.stat()
    with file.open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        last = weights.read(1)
        weights.seek(-1, os.SEEK_END)
        weights.write(bytes([last[0] ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_ino, file.stat().st_size, file.stat().st_mtime_ns) == (
        stat.st_ino,
        stat.st_size,
        stat.st_mtime_ns,
    )
    after, changed = digests.digest(folder)
    assert after != before
    assert changed != identity
    assert len(reads) == 2


def test_a_configuration_overwritten_in_place_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path)
    age(folder, 3600, monkeypatch)
    digests = AdapterDigests()
    before, _ = digests.digest(folder)
    write(tmp_path, CONFIG | {"lora_alpha": 32})
    assert digests.digest(folder)[0] != before


def test_a_file_written_just_now_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    """It may change once more within one tick of the file system's clock."""
    folder = write(tmp_path)
    digests = AdapterDigests()
    assert digests.digest(folder) == digests.digest(folder)
    assert reads == [folder, folder]


def test_a_folder_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path)
    age(folder, 3600, monkeypatch)
    compute = adapters.adapter_digest

    def slow(path: str) -> str:
        digest = compute(path)
        write(tmp_path, tensors=TENSORS | {"new": np.zeros(1, dtype=np.float32)})
        return digest

    monkeypatch.setattr(adapters, "adapter_digest", slow)
    digests = AdapterDigests()
    with pytest.raises(UsageError, match="changed while it was read"):
        digests.digest(folder)
    monkeypatch.setattr(adapters, "adapter_digest", compute)
    assert digests.digest(folder)[0] == compute(folder)


def test_another_path_to_the_same_content_shares_the_digest(tmp_path: Path) -> None:
    one = write(tmp_path / "one")
    shutil.copytree(one, tmp_path / "two")
    (tmp_path / "three").symlink_to(one)
    digests = AdapterDigests()
    assert len({digests.digest(str(tmp_path / name))[0] for name in ("one", "two", "three")}) == 1


def test_digests_may_be_asked_for_from_any_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [write(tmp_path / str(at), CONFIG | {"r": at + 1}) for at in range(4)]
    age(folders[0], 3600, monkeypatch)
    expected = [adapter_digest(folder) for folder in folders]
    digests = AdapterDigests()
    found: list[list[str]] = []

    def ask() -> None:
        found.append([digests.digest(folder)[0] for _ in range(20) for folder in folders])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [expected * 20] * 4
