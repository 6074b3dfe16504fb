# SPDX-License-Identifier: Apache-2.0
"""Hosted CI runs what exists, on every Python that is promised, with no more rights than reading."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import lowest  # scripts/lowest.py
import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: Path) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load(path.read_text())
    return loaded


def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_command_is_a_target_that_exists_or_the_whole(path: Path) -> None:
    commands = [line for step in steps(read(path)) if "run" in step for line in step["run"].strip().splitlines()]
    assert commands
    for command in commands:
        program, *words = re.sub(r"\$\{\{.*?\}\}", "VALUE", command).split()
        assert program in ("make", ".ci/run"), command
        named = [word for word in words if "=" not in word]
        assert program == ".ci/run" or named, command
        assert set(named) <= targets(), command


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_and_may_only_read(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in workflow[True]  # YAML reads "on" as a truth value
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 120
    for step in steps(workflow):
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", step.get("uses", "a/b@v0.0.0")), step
        assert not step.get("uses", "").startswith("actions/checkout") or step["with"]["persist-credentials"] is False


def test_the_matrix_is_every_python_that_the_package_names() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    named = [each.rpartition(" ")[2] for each in classifiers if re.search(r":: 3\.\d+$", each)]
    jobs = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    for job in ("check", "package"):
        assert jobs[job]["strategy"]["matrix"]["python"] == named


def test_the_lowest_versions_are_those_of_the_package_and_older_than_the_locks() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    found = dict(each.split("==") for each in lowest.lowest(text))
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"]
    needed = project["dependencies"] + extras["otel"] + extras["plot"]
    assert list(found) == [re.split(r"[\[><=]", each)[0] for each in needed]
    lock = (ROOT / "requirements" / "dev.lock").read_text()
    pinned = re.findall(r"^([A-Za-z0-9._-]+)==([0-9.]+)", lock, re.MULTILINE)
    locked = {name.lower().replace("_", "-"): version for name, version in pinned}

    def numbers(version: str) -> list[int]:
        return [int(each) for each in version.split(".")]

    assert not [name for name, version in found.items() if numbers(version) > numbers(locked[name])]
    with pytest.raises(ValueError, match="'numpy' has no lower bound"):
        lowest.lowest('[project]\ndependencies = ["numpy"]\noptional-dependencies = {otel = [], plot = []}\n')


def test_what_has_to_pass_is_a_program_of_targets_that_exist() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    named = set(re.findall(r"^make ([a-z-]+)$", script.read_text(), re.MULTILINE))
    assert {"check-lint", "docs", "test"} <= named <= targets()


def test_what_runs_before_a_commit_is_what_check_lint_runs() -> None:
    (local,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = [hook["entry"].split() for hook in local["hooks"]]
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    recipe = re.search(r"^check-lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe is not None
    checks = [[word for word in line.split() if word not in (".", "--check")] for line in recipe[1].splitlines()]
    assert [[word for word in hook if not word.startswith("--")] for hook in hooks] == checks
