# SPDX-License-Identifier: Apache-2.0
"""Namespaces and what engines call their models: kept over restarts, found among many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loracache.errors import UsageError
from loracache.keys import Namespace
from loracache.namespaces import Namespaces

IDENTITY = "0123456789abcdef" * 4


def space(model: str = IDENTITY, **fields: Any) -> Namespace:
    return Namespace(model, "float32", "layout", 16, **fields)


def test_names_outlive_the_daemon_and_are_those_of_the_model(tmp_path: Path) -> None:
    made = Namespaces(tmp_path)
    made.register(space().descriptor(), ["llama"])
    made.register(space(salt="ab" * 32).descriptor())
    made.register(space().descriptor(), ["assistant", "llama", ""])
    made.keep()
    again = Namespaces(tmp_path)
    assert sorted(again.names(IDENTITY)) == ["assistant", "llama"]
    for name in ("llama", "assistant", IDENTITY[:8]):
        assert set(again.matching(name, None, None)) == {space().digest(), space(salt="ab" * 32).digest()}
    assert list(again.names("nobody")) == [] == again.matching("nobody", None, None)


def test_files_without_names_are_read_as_ever(tmp_path: Path) -> None:
    for number, text in enumerate(["", "\n", "\n[]\n", "\nnonsense", '\n{"a": 1}', "\n[1]", "\n" + "[" * 100_000]):
        made = space(f"model {number}")
        (tmp_path / f"{made.digest().hex()}.json").write_text(made.descriptor() + text)
    again = Namespaces(tmp_path)
    assert len(again) == 7
    assert [list(again.names(f"model {number}")) for number in range(7)] == [[]] * 7


def test_a_file_that_is_no_descriptor_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "y.json").write_bytes(b"\xff\xfe")
    assert len(Namespaces(tmp_path)) == 0


def test_sixteen_names_are_kept_each_once(tmp_path: Path) -> None:
    made = Namespaces(tmp_path)
    made.register(space().descriptor(), ["twice", "twice", *(f"name {number}" for number in range(100))])
    made.register(space().descriptor(), ["another"])
    assert list(made.names(IDENTITY)) == ["twice", *(f"name {number}" for number in range(15))]
    assert made.matching("another", None, None) == []
    made.keep()
    assert len(json.loads(next(tmp_path.glob("*.json")).read_text().split("\n")[1])) == 16


def test_a_name_may_stand_for_several_models() -> None:
    made = Namespaces(None)
    for model in ("one", "two"):
        made.register(space(model).descriptor(), ["latest"])
    assert set(made.matching("latest", None, None)) == {space("one").digest(), space("two").digest()}


def test_a_model_that_is_called_by_its_identity_is_found_once() -> None:
    made = Namespaces(None)
    for number, model in enumerate(("find-model", "find-model-2")):
        made.register(space(model, salt=f"{number:064x}").descriptor(), ["find-model"])
    assert sorted(made.matching("find-model", None, None)) == sorted(made)


def test_among_many_namespaces_those_that_match_are_found_without_looking_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from loracache import namespaces as module

    made = Namespaces(None)
    for number in range(2000):
        fields = {"adapter": f"{number % 50:064x}" if number % 50 else "", "salt": f"{number:064x}"}
        made.register(space(f"{number % 100:08d}rest", **fields).descriptor(), [f"name {number % 100}"])
    looked = 0
    matches = module._matches

    def counting(*arguments: object) -> bool:
        nonlocal looked
        looked += 1
        return matches(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_matches", counting)
    for count, arguments in [
        (20, ("name 7", None, None)), (20, ("00000007", None, None)), (40, ("", f"{7:064x}", None)),
        (1, ("", None, f"{7:064x}")), (1, ("name 7", f"{7:064x}", f"{7:064x}")), (0, ("name 8", None, f"{7:064x}")),
    ]:  # fmt: skip
        looked = 0
        assert len(made.matching(*arguments)) == count
        assert looked <= max(count, 1)
    assert len(made.matching("", None, None)) == 2000


def test_a_full_folder_loses_the_name_and_serves_on(tmp_path: Path) -> None:
    folder = tmp_path / "namespaces"
    made = Namespaces(folder)
    folder.rmdir()
    folder.write_text("")
    made.register(space().descriptor(), ["llama"])
    assert list(made.names(IDENTITY)) == ["llama"]


def test_what_is_no_namespace_is_refused() -> None:
    with pytest.raises(UsageError):
        Namespaces(None).register("{}", ["llama"])
