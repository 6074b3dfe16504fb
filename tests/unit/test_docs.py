# SPDX-License-Identifier: Apache-2.0
"""The documents say what the code does."""

from __future__ import annotations

import enum
import re
from dataclasses import fields
from pathlib import Path

import pytest
import rooms  # scripts/rooms.py
import typer

from loracache.cli.app import app
from loracache.config import Config
from loracache.results import Cause, Departure, NodeKind, OperationState, Refusal

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    missing = [key for key in Config.model_fields if f"\n| `{key}` |" not in text]
    assert not missing


def test_every_setting_has_a_flag_but_those_that_the_page_names() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    sentence = re.search(r"A flag is the key with dashes; ([^.]*) have no flag\.", text)
    assert sentence is not None
    without = set(re.findall(r"`(\w+)`", sentence[1]))
    serve = next(each for each in typer.main.get_command(app).commands.items() if each[0] == "serve")[1]  # type: ignore[attr-defined]
    flags = {option.name for option in serve.params} - {"config"}
    assert flags == Config.model_fields.keys() - without


def test_every_connector_setting_is_documented() -> None:
    options = pytest.importorskip("loracache.connectors.vllm.common.options")
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert not [field.name for field in fields(options.Options) if f"\n| `{field.name}` |" not in text]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere_and_targets_exist(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert not [link for link in links if not (document.parent / link).exists()]
    makefile = (ROOT / "Makefile").read_text()
    assert not [name for name in re.findall(r"`make ([a-z-]+)", text) if f"\n{name}:" not in makefile]


def test_the_table_and_the_picture_of_the_rooms_are_what_the_code_says() -> None:
    house = rooms.House.read(ROOT)
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("rooms.py --table -->\n")[2].partition("<!-- /rooms -->")[0]
    assert table == rooms.table(house), "write it anew: python scripts/rooms.py --table"
    picture = (ROOT / "docs" / "images" / "rooms.svg").read_text()
    assert picture == rooms.svg(house), "draw it anew: python scripts/rooms.py --svg docs/images/rooms.svg"


def test_files_that_documents_name_exist() -> None:
    for document in DOCUMENTS:
        named = set(
            re.findall(r"`((?:loracache|connectors|storage_backends|kernels)/[\w/]+\.py)`", document.read_text())
        )
        assert not [name for name in named if not (ROOT / name).exists()], document.name


def test_rooms_that_the_table_of_changes_names_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("| change | rooms |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([\w/.]+)`", row.split("|")[2]) for row in table.splitlines()[2:]]
    assert len(rows) >= 20
    for names in rows:
        assert 1 <= len({name.partition(".py")[0] for name in names}) <= 3
        for name in names:
            assert (ROOT / name).exists() or (ROOT / "loracache" / name).exists(), name


@pytest.mark.parametrize(
    ("column", "kind"),
    [("cause", Cause), ("departure", Departure), ("refusal", Refusal), ("state", OperationState), ("kind", NodeKind)],
)
def test_the_list_of_results_is_what_the_code_says(column: str, kind: type[enum.StrEnum]) -> None:
    """In the code's order, each with what it means and what to do."""
    text = (ROOT / "docs" / "control-api.md").read_text()
    table = text.partition(f"| {column} | what it means | what to do |\n|---|---|---|\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    assert [row[0] for row in rows] == [f"`{value}`" for value in kind if value]
    assert all(len(row) == 3 and all(row) for row in rows)
