# SPDX-License-Identifier: Apache-2.0
"""`# fmt: skip` stands only where rows of a table would be torn apart: else, layout is the formatter's matter."""

from __future__ import annotations

import ast
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("loracache", "storage_backends", "kernels", "connectors", "tests", "examples", "benchmarks", "scripts")
MARK = "# fmt: skip"
MANY = 12  # arguments of a kernel: pointers, strides and sizes stand in rows


def marked_lines(path: Path) -> list[int]:
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    return [token.start[0] for token in tokens if token.type == tokenize.COMMENT and token.string == MARK]


def _header_end(node: ast.stmt) -> int:
    """The last line of what a mark at a compound statement keeps as it is: up to its body."""
    body = getattr(node, "body", None)
    return body[0].lineno - 1 if body else (node.end_lineno or node.lineno)


def _candidates(tree: ast.Module) -> Iterator[tuple[int, int, ast.AST]]:
    """First line, last line and node of each statement's header, and of each decorator."""
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            yield node.lineno, max(node.lineno, _header_end(node)), node
        for decorator in getattr(node, "decorator_list", []):
            yield decorator.lineno, decorator.end_lineno, decorator


def _rows(node: ast.expr) -> list[int]:
    """The line of each part of a literal: of its elements, or of a dictionary's keys."""
    if isinstance(node, ast.Dict):
        return [(key or value).lineno for key, value in zip(node.keys, node.values, strict=True)]
    return [each.lineno for each in node.elts] if isinstance(node, ast.List | ast.Tuple | ast.Set) else []


def _tabular(lines: list[int], least: int) -> bool:
    """Several lines, and on some of them more than one."""
    return len(lines) >= least and 1 < len(set(lines)) < len(lines)


def is_table(node: ast.AST, last: int) -> bool:
    """Whether what begins at `node` and ends in line `last` has rows: of a literal, or of many arguments."""
    for inner in ast.walk(node):
        if not isinstance(inner, ast.expr | ast.arguments) or getattr(inner, "lineno", 0) > last:
            continue
        if isinstance(inner, ast.arguments):
            if _tabular([each.lineno for each in (*inner.args, *inner.kwonlyargs) if each.lineno <= last], MANY):
                return True
        elif isinstance(inner, ast.Call):
            given = [each.lineno for each in (*inner.args, *(keyword.value for keyword in inner.keywords))]
            if _tabular(given, MANY):
                return True
        elif _tabular(_rows(inner), 4) or _rows_of_rows(inner):
            return True
    return False


def _rows_of_rows(node: ast.expr) -> bool:
    """A literal of literals: each of these is a row that stands in one line."""
    parts = node.values if isinstance(node, ast.Dict) else getattr(node, "elts", [])
    rows = [each for each in parts if isinstance(each, ast.List | ast.Tuple | ast.Set | ast.Dict)]
    return len({each.lineno for each in rows}) > 2


def needless(path: Path) -> list[int]:
    """The lines of `path` with a mark that keeps no table."""
    marks = marked_lines(path)
    if not marks:
        return []
    candidates = list(_candidates(ast.parse(path.read_text())))
    found = []
    for line in marks:
        within = [each for each in candidates if each[0] <= line <= each[1]]
        _, last, node = max(within, key=lambda each: each[0])
        if not is_table(node, last):
            found.append(line)
    return found


def test_only_tables_keep_their_own_layout() -> None:
    paths = {path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    found = {str(path.relative_to(ROOT)): lines for path in sorted(paths) if (lines := needless(path))}
    assert not found, f"{MARK} keeps no table in {found}; remove it and run ruff format"


@pytest.mark.parametrize(
    ("source", "table"),
    [
        ("A = {\n    1: 2, 3: 4,\n    5: 6, 7: 8,\n}", True),
        ("A = [\n    (1, 'a', 2), (3, 'b', 4), (5, 'c', 6),\n    (7, 'd', 8), (9, 'e', 10),\n]", True),
        ("def f(\n    a: int, b: int,\n    c: int,\n) -> None:", False),
        ("f(\n    a=1, b=2,\n    c=3,\n)", False),
        ("f(x,\n  y)", False),
        ("A = [\n    1, 2,\n]", False),
    ],
)
def test_a_table_is_told_from_arguments(source: str, table: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    body = "\n    pass" if source.startswith("def") else ""
    path.write_text(f"{source}  {MARK}{body}\n")
    assert needless(path) == ([] if table else [len(source.splitlines())])
