# SPDX-License-Identifier: Apache-2.0
"""Every block that README.md and docs/*.md show is run by a test, or is listed with the reason why not."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from loracache.cli.app import app

TESTS = Path(__file__).parents[2]
RUNNERS = (
    TESTS / "unit" / "docs" / "test_shown_commands.py",
    TESTS / "e2e" / "test_shown_commands.py",
)


def asked_for(source: str) -> set[tuple[str, str]]:
    """(page, words) of every call of `shown` with two literals."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    words = [call.args for call in calls if ast.unparse(call.func).rpartition(".")[2] == "shown"]
    return {(page.value, first.value) for page, first in words}  # type: ignore[attr-defined]


def test_every_block_is_run_or_is_listed_with_a_reason(documented: Any) -> None:
    run = {documented.block(*each) for path in RUNNERS for each in asked_for(path.read_text())}
    listed = {documented.block(*each) for each in documented.NOT_RUN}
    elsewhere = {each for each in documented.blocks() if each.page in documented.RUN_ELSEWHERE}
    missing = set(documented.blocks()) - run - listed - elsewhere
    assert not missing, "run it (tests/unit/docs), or give the reason why not (NOT_RUN of tests/documented.py)"
    assert not listed & (run | elsewhere)
    assert all(len(reason) > 20 for reason in [*documented.NOT_RUN.values(), *documented.RUN_ELSEWHERE.values()])


def test_the_examples_that_run_elsewhere_are_all_there_is_on_their_page(documented: Any) -> None:
    assert {each.language for each in documented.blocks() if each.page == "python-api.md"} == {"python"}


def test_code_stands_in_fences_with_a_language(documented: Any) -> None:
    """What is only indented, or of no language, nobody would find."""
    for page in documented.PAGES:
        text, fences = re.subn(r"^```\w+\n(?:.*\n)*?```$", "", page.read_text(), flags=re.MULTILINE)
        assert "```" not in text, page.name
        assert "~~~" not in text, page.name
        assert not re.findall(r"\n\n(?:    |\t).*", text), page.name
        assert fences == page.read_text().count("```") / 2


def test_configurations_of_the_connector_are_taken(documented: Any) -> None:
    options = pytest.importorskip("loracache.connectors.vllm.common.options")
    shown = []
    for block in documented.blocks():
        words = shlex.split(block.text, comments=True) if "--kv-transfer-config" in block.text else []
        shown += [json.loads(words[at + 1]) for at, word in enumerate(words) if word == "--kv-transfer-config"]
    assert len(shown) >= 3
    for transfer in shown:
        assert options.Options.parse(transfer.pop("kv_connector_extra_config")).server == "unix:///run/loracache.sock"
        assert transfer == {
            "kv_connector": "LoRACacheConnector",
            "kv_connector_module_path": "loracache.connectors.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
        }


def test_verbs_and_options_that_the_text_names_exist(documented: Any) -> None:
    """`loracache VERB --option` in a sentence or a table."""
    names = 0
    for page in documented.PAGES:
        for words in re.findall(r"`(?:[^`]* \| )?loracache ([a-z][^`]*)`", page.read_text()):
            command: Any = typer.main.get_command(app)
            verb, *rest = words.replace("\\|", " ").split()
            command = command.commands.get(verb)
            assert command is not None, f"{page.name}: loracache {words}"
            if rest and rest[0] in getattr(command, "commands", {}):
                command = command.commands[rest[0]]
            known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
            asked = set(re.findall(r"(?<![\w-])--[a-z-]+", words)) - {"--help"}
            assert asked <= known, f"{page.name}: loracache {words}"
            names += 1
    assert names > 40


def test_files_and_modules_that_the_text_names_exist(documented: Any) -> None:
    folders = "benchmarks|deploy|examples|requirements|scripts|tests"
    found = []
    for page in [*documented.PAGES, documented.ROOT / "CONTRIBUTING.md"]:
        named = re.findall(rf"(?<![\w/])(?:{folders})/[\w./*-]*[\w/]", page.read_text())
        named += [
            f"{module.replace('.', '/')}.py" for module in re.findall(r"-m (loracache\.[\w.]+)", page.read_text())
        ]
        assert not [name for name in named if not list(documented.ROOT.glob(name))], page.name
        found += named
    assert len(found) > 25
