"""The documents say what the code does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from loracache.config import Config

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    missing = [key for key in Config.model_fields if f"\n| `{key}` |" not in text]
    assert not missing


def test_every_connector_setting_is_documented() -> None:
    options = pytest.importorskip("loracache.connectors.vllm.options")
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert not [field.name for field in fields(options.Options) if f"\n| `{field.name}` |" not in text]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere_and_targets_exist(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert not [link for link in links if not (document.parent / link).exists()]
    makefile = (ROOT / "Makefile").read_text()
    assert not [name for name in re.findall(r"`make ([a-z-]+)", text) if f"\n{name}:" not in makefile]
