# SPDX-License-Identifier: Apache-2.0
"""What is public is said: `__all__` of every module is true and kept to, and `loracache` has all that users hold."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import rooms  # scripts/rooms.py

import loracache
from loracache import CacheClient, errors

house = rooms.House.read(Path(__file__).parents[2])


def defined(body: list[ast.stmt]) -> Iterator[str]:
    """Names that a module binds at its top, under `if` and `try` too."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.If | ast.Try):
            yield from defined([*node.body, *node.orelse])


def all_of(module: str) -> list[str] | None:
    for node in rooms.parse(house.sources[module]).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            assert isinstance(names, list)
            return names
    return None


PUBLIC = {module: all_of(module) for module in house.sources}


@pytest.mark.parametrize("module", sorted(house.sources))
def test_all_is_there_and_true(module: str) -> None:
    names = set(defined(rooms.parse(house.sources[module]).body))
    if PUBLIC[module] is None:  # of a room's docstring, and of what is run and not imported
        assert module.endswith("__main__") or names <= {"annotations"}, f"{module} has no __all__"
        return
    listed = PUBLIC[module] or []
    assert len(listed) == len(set(listed)), f"{module}: a name twice in __all__"
    assert not set(listed) - names, f"{module}: not defined, but in __all__"


@pytest.mark.parametrize("module", sorted(house.sources))
def test_what_a_module_takes_from_another_is_public_there(module: str) -> None:
    modules: dict[str, str] = {}  # the name a module has here -> its own
    taken: set[tuple[str, str]] = set()
    tree = rooms.parse(house.sources[module])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in house.sources:
            for alias in node.names:
                if (whole := f"{node.module}.{alias.name}") in house.sources:
                    modules[alias.asname or alias.name] = whole
                else:
                    taken.add((node.module, alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            taken.add((modules[node.value.id], node.attr))
    hidden = {f"{origin}.{name}" for origin, name in taken if name not in (PUBLIC[origin] or ())}
    assert not hidden - house.sources.keys(), f"{module} takes what is not in __all__ there"


def ours(hint: object, seen: set[type]) -> None:
    """Adds every class of ours in a type, in its arguments, and in the fields of those that are dataclasses."""
    for argument in get_args(hint):
        ours(argument, seen)
    if isinstance(hint, type) and hint.__module__.startswith("loracache") and hint not in seen:
        seen.add(hint)
        if dataclasses.is_dataclass(hint):
            for each in get_type_hints(hint).values():
                ours(each, seen)


def test_all_that_client_calls_take_and_answer_is_exported() -> None:
    seen: set[type] = set()
    for name, method in inspect.getmembers(CacheClient, inspect.isfunction):
        if not name.startswith("_") or name == "__init__":
            for hint in get_type_hints(method).values():
                ours(hint, seen)
    assert len(seen) >= 8
    exported = {getattr(loracache, name) for name in loracache.__all__}
    assert not seen - exported
    assert not set(errors.__all__) - set(loracache.__all__)


def test_every_name_is_the_one_that_type_checkers_see() -> None:
    (checking,) = [node for node in rooms.parse(house.sources["loracache"]).body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module for node in checking.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(seen) | {"__version__"} == set(loracache.__all__) <= set(dir(loracache))
    for name, module in seen.items():
        assert getattr(loracache, name) is getattr(sys.modules[str(module)], name)
    with pytest.raises(AttributeError, match="no attribute 'Daemon'"):
        loracache.Daemon  # noqa: B018


def test_importing_loracache_loads_nothing_else_of_ours() -> None:
    code = "import sys, loracache; print([name for name in sys.modules if name.startswith('loracache.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
