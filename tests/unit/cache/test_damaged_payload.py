# SPDX-License-Identifier: Apache-2.0
"""Damaged payloads of adapters: whatever the bytes are, they are refused in one way or read as a whole adapter."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from loracache.adapters.payload import Packed, Packing
from loracache.adapters.peft import CONFIG, WEIGHTS, PeftFolder
from loracache.errors import UsageError

MAGIC = b"LoRA\0\0\0\1"
A, B = ["q.lora_A.weight", "F32", [2, 16]], ["q.lora_B.weight", "F32", [16, 2]]
GOOD: dict[str, Any] = {"settings": {"r": 2, "lora_alpha": 2}, "tensors": [A, B]}
DATA = bytes(2 * 2 * 16 * 4)


@pytest.fixture(scope="module")
def payload(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("folder")
    (folder / CONFIG).write_text(json.dumps({"r": 2, "alpha_pattern": {"q_proj": 3}}))
    tensors = {
        "base_model.model.x.q_proj.lora_A.weight": np.ones((2, 5), dtype=np.float16),
        "base_model.model.x.q_proj.lora_B.weight": np.ones((3, 2), dtype=np.float32),
    }
    save_file(tensors, folder / WEIGHTS)
    with PeftFolder(folder) as opened:
        packing = Packing(opened)
        memory = bytearray(packing.size)
        packing.write([memoryview(memory)])
        return bytes(memory)


def use(payload: bytes) -> str:
    """Everything that a reader does with a payload; answers why it is refused, or "". Nothing else may be raised."""
    try:
        packed = Packed([memoryview(payload)])
    except UsageError as error:
        return str(error)
    for module in packed.modules().values():
        assert module.a.shape[0] == module.b.shape[1] == module.rank >= 1
        assert math.isfinite(module.scaling)
    for stored in packed.tensors:
        assert len(packed.original(stored)) == sum(map(len, packed.rows(stored))) == stored.nbytes
    return ""


def with_header(text: bytes, tail: bytes = b"") -> bytes:
    return MAGIC + len(text).to_bytes(8, "little") + text + tail


def changed(**change: Any) -> bytes:
    """A payload with other settings or tensors in its header, followed by as many bytes as GOOD's."""
    text = json.dumps(GOOD | change).encode()
    return with_header(text, bytes(-(16 + len(text)) % 64) + DATA)


def test_what_is_not_damaged_is_read(payload: bytes) -> None:
    assert use(payload) == use(changed()) == ""


def test_a_payload_cut_anywhere_is_refused(payload: bytes) -> None:
    assert [end for end in range(len(payload)) if not use(payload[:end])] == []


@pytest.mark.parametrize("tail", [b"\0", b"x" * 64, bytes(4096)], ids=len)
def test_a_payload_with_something_behind_it_is_refused(payload: bytes, tail: bytes) -> None:
    assert use(payload + tail) == "the object is not an adapter: its length is not what its header says"


@pytest.mark.parametrize("length", [0, 1, 10, 1 << 20, 1 << 31, 1 << 62, (1 << 64) - 1])
def test_a_length_that_the_header_does_not_have_is_refused(payload: bytes, length: int) -> None:
    assert use(payload[:8] + length.to_bytes(8, "little") + payload[16:])


def test_another_beginning_is_refused(payload: bytes) -> None:
    for bit in range(64):
        magic = (int.from_bytes(MAGIC, "little") ^ 1 << bit).to_bytes(8, "little")
        assert use(magic + payload[8:]) == "the object is not an adapter: it does not begin as one"


def test_a_flipped_bit_in_the_header_is_refused_or_makes_another_adapter(payload: bytes) -> None:
    for at in range(8, 16 + int.from_bytes(payload[8:16], "little")):
        for bit in range(8):
            assert use(payload[:at] + bytes([payload[at] ^ 1 << bit]) + payload[at + 1 :]) or at >= 16


def tensors_with(at: int, part: int, value: Any) -> dict[str, Any]:
    """GOOD's tensors, one with another name (0), dtype (1) or shape (2)."""
    tensors = [list(A), list(B)]
    tensors[at][part] = value
    return {"tensors": tensors}


SHAPES = [[32], [2, 4, 4], [], None, "ab", 32, [4, 8], [-2, -16], [2.0, 16.0], ["2", "16"], [True, 32], [[2], 16]]
HUGE = [[1 << 40, 2], [1 << 62, 4], [1 << 63, 2], [10**30, 2], [2**32, 2**32], [math.inf, 2], [math.nan, 2]]


@pytest.mark.parametrize(
    "change",
    [
        *[{"settings": it} for it in (None, [], 7, "r", {"r": "2"}, {"r": 0}, {"r": 4}, {"r": 2, "use_dora": True})],  # type: ignore[var-annotated]
        *[{"settings": {"r": 2, "lora_alpha": it}} for it in ("x", math.nan, math.inf, [], 10**400)],  # type: ignore[var-annotated]
        *[{"settings": {"r": 2, "rank_pattern": it}} for it in ([1], "q", {"q": 1}, {"q": "2"}, {"(a++)$": 2})],
        *[{"settings": {"r": 2, "alpha_pattern": it}} for it in ([1], "q", {"q": "x"}, {"q": None}, {r"(.)(.)\2": 2})],
        *[{"tensors": it} for it in (None, [], 7, [A], [B], [A, B, A], [A[:2], B], [A, [*B, 1]], "xyz", {"xyz": 1})],
        *[tensors_with(0, 0, it) for it in ("q.lora_B.weight", "p.lora_A.weight", "q", None, 7)],
        *[tensors_with(0, 1, it) for it in ("F64", "f32", "F16", None, 4, [], {})],  # type: ignore[var-annotated]
        *[tensors_with(0, 2, it) for it in SHAPES], *[tensors_with(1, 2, it) for it in (*SHAPES, [0, 2], *HUGE)],
    ],
    ids=lambda change: str(change)[:80],
)  # fmt: skip
def test_a_header_that_describes_no_adapter_is_refused(change: dict[str, Any]) -> None:
    assert use(changed(**change)).startswith("the object is not an adapter: ")


def test_shapes_that_make_up_for_each_other_are_refused() -> None:
    """Together as long as the payload: by a negative size, or by one that is 0 in 64 bits."""
    for a, b in (([2, -16], [48, 2]), ([2, 48], [-16, 2]), ([2, 1 << 63], [32, 2])):
        assert use(changed(tensors=[[*A[:2], a], [*B[:2], b]]))


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    for damaged in (data, MAGIC + data, with_header(data)):
        assert use(damaged).startswith("the object is not an adapter: ")


WORDS = st.sampled_from(
    ["F32", "F16", "q.lora_A.weight", "q.lora_B.weight", "settings", "tensors", "r", "rank_pattern"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON, st.sampled_from([b"", bytes(64), DATA]))
def test_an_arbitrary_header_is_refused_or_makes_another_adapter(one: Any, two: Any, tail: bytes) -> None:
    for header in (one, {"settings": one, "tensors": two}, GOOD | {"settings": one}, GOOD | {"tensors": [A, two]}):
        use(with_header(json.dumps(header).encode(), tail))
    use(changed(settings=one))
    use(changed(settings={"r": 2, "lora_alpha": one, "alpha_pattern": {"q": two}}))
    use(changed(tensors=[A, [B[0], "F32", one]]))


def test_a_header_nested_without_end_is_refused() -> None:
    assert use(with_header(b"[" * 200_000))
    assert use(with_header(b'{"settings":' + b'{"r":' * 100_000))


@pytest.mark.parametrize("buffers", [[], [b""], [b"", b"LoRA"]], ids=len)
def test_no_buffers_hold_no_adapter(buffers: list[bytes]) -> None:
    with pytest.raises(UsageError, match="the object is not an adapter: it does not begin as one"):
        Packed([memoryview(buffer) for buffer in buffers])
