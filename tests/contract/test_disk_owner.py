# SPDX-License-Identifier: Apache-2.0
"""A disk folder that somebody else made, or prepared: nothing is written through it to anywhere else."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from loracache.adapters.names import AdapterNames
from loracache.errors import ConfigError
from loracache.namespaces import Namespaces
from loracache.storage_backends.base import Outcome
from loracache.storage_backends.disk.backend import DiskBackend

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs to give files to another user")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "disk"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file of somebody's, elsewhere."""
    file = tmp_path / "precious"
    file.write_text("precious")
    return file


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DiskBackend(path)
    for word in ("disk_path", str(path), *words):
        assert word in str(caught.value)


def test_what_is_made_is_open_to_its_user_alone(tmp_path: Path, objects: Any) -> None:
    before = os.umask(0)
    try:
        backend = DiskBackend(tmp_path / "deep" / "disk")
        backend.store([objects.new(9000)])
        backend.close()
        Namespaces(tmp_path / "deep" / "disk" / "namespaces")
        names = AdapterNames(tmp_path / "deep" / "disk" / "adapters", None)
        names.put("name", "ab" * 32, "{}")
    finally:
        os.umask(before)
    for each in (tmp_path / "deep").rglob("*"):
        assert stat.S_IMODE(each.stat().st_mode) == (0o700 if each.is_dir() else 0o600), each


@as_root
def test_a_folder_of_another_user_is_refused_with_the_fix(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY)
    refused(path, f"uid {NOBODY}", f"chown -R 0 {path}")
    DiskBackend(path / "below").close()


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_refused_with_the_fix(path: Path, mode: int) -> None:
    path.chmod(mode)
    refused(path, f"mode {mode:04o}", f"chmod go-w {path}")
    path.chmod(0o755)  # to look is allowed
    DiskBackend(path).close()


@pytest.mark.parametrize("name", ["lock", "manifest", "manifest.new", "tmp/0", "tmp/probe"])
@pytest.mark.parametrize("link", ["symbolic", "dangling", "hard"])
def test_no_link_is_followed_into_writing(
    path: Path, precious: Path, objects: Any, name: str, link: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loracache.storage_backends.disk.manifest._COMPACT_AT_LEAST", 1)
    place = path / name
    place.parent.mkdir(exist_ok=True, mode=0o700)
    if link == "hard":
        place.hardlink_to(precious)
    else:
        place.symlink_to(precious if link == "symbolic" else precious.with_name("made by us"))
    if name == "lock":
        refused(path, str(place))
    else:
        backend = DiskBackend(path)
        for _ in range(4):
            assert backend.store([objects.new(9000)])[0].outcome is Outcome.OK
            backend.delete([info.key for info in backend.scan()])
        backend.close()
    assert precious.read_text() == "precious"
    assert not precious.with_name("made by us").exists()


@pytest.mark.parametrize("name", ["objects", "tmp", "objects/7f"])
def test_no_folder_elsewhere_is_taken_for_one_of_ours(path: Path, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("")
    (path / name).parent.mkdir(exist_ok=True, mode=0o700)
    (path / name).symlink_to(elsewhere)
    refused(path, str(path / name))
    assert os.listdir(elsewhere) == ["file"]


@as_root
def test_a_folder_inside_that_another_user_left_is_refused(path: Path) -> None:
    (path / "tmp").mkdir(mode=0o700)
    os.chown(path / "tmp", NOBODY, NOBODY)
    refused(path, str(path / "tmp"), f"uid {NOBODY}")


@pytest.mark.parametrize("books", [Namespaces, lambda path: AdapterNames(path, None)], ids=["namespaces", "names"])
def test_books_are_kept_in_no_folder_elsewhere(path: Path, tmp_path: Path, books: Any) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (path / "books").symlink_to(elsewhere)
    with pytest.raises(FileExistsError, match="books"):
        books(path / "books")


def test_an_object_that_is_a_link_is_not_served(path: Path, tmp_path: Path, objects: Any) -> None:
    backend, stored = DiskBackend(path), objects.new(9000)
    objects.store(backend, [stored])
    (file,) = (path / "objects").glob("*/*")
    file.rename(tmp_path / "aside")
    file.symlink_to(tmp_path / "aside")
    assert objects.load(backend, stored) is Outcome.FAILED
    backend.close()


def test_a_pipe_in_a_files_place_holds_nobody_up(path: Path, objects: Any) -> None:
    os.mkfifo(path / "manifest")
    backend, stored = DiskBackend(path), objects.new(9000)
    objects.store(backend, [stored])
    backend.close()
    assert [info.key for info in DiskBackend(path).scan()] == [stored.info.key]
