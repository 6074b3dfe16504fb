# SPDX-License-Identifier: Apache-2.0
"""From which size on fragments go straight: measured once per device, kept, told otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loracache.kernels.page_copy import PageCopier, lane, measuring
from loracache.kernels.page_copy.choice import Choice
from loracache.kernels.page_copy.device import Device
from loracache.kernels.page_copy.measuring import choice_of, measure
from loracache.kernels.page_copy.recording import RecordingDevice

MEASURED = Choice(8192, 4096)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Device]:
    """Devices that were measured, in no time."""
    found: list[Device] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def measure_now(device: Device) -> tuple[Choice, dict[str, object]]:
        found.append(device)
        return MEASURED, {"loads": {"4096": [2.0, 1.0]}}

    monkeypatch.setattr(measuring, "measure", measure_now)
    return found


def test_a_device_is_measured_once_and_another_by_itself(calls: list[Device], tmp_path: Path) -> None:
    one, other = RecordingDevice(), RecordingDevice()
    other.identity = "another"
    assert [choice_of(each) for each in (one, one, other, one)] == [MEASURED] * 4
    assert calls == [one, other]
    kept = json.loads((tmp_path / "loracache" / "recording.json").read_text())
    assert (kept["loads"], kept["stores"]) == (8192, 4096)
    assert kept["seconds"] == {"loads": {"4096": [2.0, 1.0]}}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"loads": 1, "stores": 1}', '{"version": 0, "loads": 1, "stores": 1}']
    + [f'{{"version": 1, "loads": {bad}, "stores": 1}}' for bad in ("-1", "1.5", "true", '"1"', "null")],
)
def test_what_is_kept_and_makes_no_sense_is_measured_anew(calls: list[Device], tmp_path: Path, content: str) -> None:
    path = tmp_path / "loracache" / "recording.json"
    path.parent.mkdir()
    path.write_text(content)
    assert choice_of(RecordingDevice()) == choice_of(RecordingDevice()) == MEASURED
    assert len(calls) == 1


def test_who_is_told_does_not_measure_and_without_kernels_everything_goes_straight(calls: list[Device]) -> None:
    layers = [torch.zeros(4, 4, dtype=torch.int64)]
    device = RecordingDevice()
    assert PageCopier(layers, device=device, bounce_below=4096)._gpu._choice == Choice(4096, 4096)  # type: ignore[union-attr]
    device.has_kernels = False
    assert PageCopier(layers, device=device, bounce_below=4096)._gpu._choice == Choice(0, 0)  # type: ignore[union-attr]
    assert not calls
    PageCopier(layers, device=RecordingDevice())
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("measured", "threshold"),
    [
        ({}, 65536),
        ({4: [1.0, 2.0], 8: [1.0, 2.0]}, 4),
        ({4: [2.0, 1.0], 8: [1.0, 2.0], 16: [1.0, 1.0]}, 8),
        (
            {4: [1.0, 2.0], 8: [2.0, 1.0], 16: [1.0, 2.0]},
            16,
        ),  # a small size that happened to go well counts for nothing
        ({4: [2.0, 1.0], 8: [2.0, 1.0]}, 16),
    ],
)
def test_the_threshold_is_where_straight_copies_become_as_fast(
    measured: dict[int, list[float]], threshold: int
) -> None:
    assert measuring._threshold(measured) == threshold


def test_measuring_copies_both_ways_by_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "SLOT_BYTES", 1 << 17)
    monkeypatch.setattr(measuring, "_LONGEST_S", 60.0)
    device = RecordingDevice()
    choice, seconds = measure(device, sizes=(4096, 8192), nbytes=1 << 18)
    assert {way: set(times) for way, times in seconds.items()} == {
        "loads": {"4096", "8192"},
        "stores": {"4096", "8192"},
    }
    assert {choice.loads, choice.stores} <= {4096, 8192, 16384}
    assert {(what, direction.value) for what, direction, *_ in device.submitted} == {
        ("copy", "loads"), ("copy", "stores"), ("launch", "loads"), ("launch", "stores"),
    }  # fmt: skip
