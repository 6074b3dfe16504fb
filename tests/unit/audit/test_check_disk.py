# SPDX-License-Identifier: Apache-2.0
"""`loracache check` sees every fault of a disk folder, mends what is safe, and leaves what may be good."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loracache import CacheClient
from loracache.cli.app import app
from loracache.storage_backends.disk.lock import lock_folder


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def truncate(path: Path, nbytes: int) -> None:
    os.truncate(path, nbytes)


def add(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


# what is done, and the faults seen
BROKEN: dict[str, tuple[Callable[[Any], object], dict[str, int]]] = {
    "payload": (lambda kept: flip(kept.file(kept.chains[0][3]), 5000), {"damaged": 1}),
    "compressed": (lambda kept: flip(kept.file(kept.chains[1][3]), 4200), {"damaged": 1}),
    "header": (lambda kept: flip(kept.file(kept.chains[0][3]), 20), {"damaged": 1}),
    "truncated": (lambda kept: truncate(kept.file(kept.chains[2][3]), 5000), {"damaged": 1}),
    "empty": (lambda kept: truncate(kept.file(kept.chains[2][3]), 0), {"damaged": 1}),
    "misplaced": (
        lambda kept: kept.file(kept.chains[0][3]).write_bytes(kept.file(kept.chains[0][2]).read_bytes()),
        {"damaged": 1},
    ),
    "parent lost": (lambda kept: kept.file(kept.chains[0][1]).unlink(), {"orphan": 2, "manifest": 1}),
    "parent damaged": (lambda kept: flip(kept.file(kept.chains[1][0]), 4200), {"damaged": 1, "orphan": 3}),
    "no manifest": (lambda kept: (kept.path / "manifest").unlink(), {"manifest": 1}),
    "no such manifest": (lambda kept: (kept.path / "manifest").write_bytes(b"x"), {"manifest": 1}),
    "torn manifest": (lambda kept: add(kept.path / "manifest", b"x" * 50), {"manifest": 1}),
    "record damaged": (lambda kept: flip(kept.path / "manifest", 40), {"manifest": 2}),
    "leftovers": (lambda kept: (kept.path / "tmp" / "7").write_bytes(bytes(10)), {"leftover": 1}),
    "namespace": (
        lambda kept: (kept.path / "namespaces" / f"{'0' * 64}.json").write_bytes(b'{"model"'),
        {"damaged": 1},
    ),
    "name": (
        lambda kept: (kept.path / "adapters" / f"{'0' * 64}.json").write_bytes(b'["{}", ""]'),
        {"damaged": 1},
    ),
}


def test_a_folder_as_a_daemon_leaves_it_is_clean(kept: Any, check: Callable[..., Any]) -> None:
    before = {path: path.read_bytes() for path in kept.objects()}
    assert len(before) == 13
    code, said = check(kept, "--fix")
    assert (code, said) == (0, {"checked": {"disk": 13}, "left": 0, "findings": []})
    assert {path: path.read_bytes() for path in kept.objects()} == before


@pytest.mark.parametrize("case", BROKEN)
def test_a_fault_is_seen_mended_and_gone(case: str, kept: Any, check: Callable[..., Any], faults: Any) -> None:
    damage, expected = BROKEN[case]
    damage(kept)
    seen = {("disk", fault): count for fault, count in expected.items()}
    for _ in range(2):  # looking changes nothing
        code, said = check(kept)
        assert (code, faults(said)) == (1, seen)
        assert said["left"] == sum(expected.values())
    code, said = check(kept, "--fix")
    assert (code, faults(said), said["left"]) == (0, seen, 0)
    assert check(kept) == (0, {"checked": said["checked"], "left": 0, "findings": []})


def test_a_daemon_serves_what_a_fix_leaves(
    kept: Any, check: Callable[..., Any], daemon: Callable[..., Any], eventually: Callable[..., Any]
) -> None:
    for case in ("payload", "parent damaged", "truncated", "no manifest", "leftovers", "namespace", "name"):
        BROKEN[case][0](kept)
    assert check(kept, "--fix")[0] == 0
    running = daemon(disk_path=kept.path)
    client: Any
    with CacheClient(running.url) as client:
        eventually(lambda: client.status()["tiers"]["disk"]["scanned"])
        assert [client.lookup(keys).hits for keys in kept.chains] == [3, 0, 3]
        assert all(client.get(key) for key in (*kept.chains[0][:3], *kept.chains[2][:3]))
        assert client.find_adapter("team/one") == kept.adapter
        assert not [name for name in client.status()["counters"] if name.startswith(("failure.", "disk.orphans"))]
    assert running.stop() == 0
    assert check(kept)[0] == 0


def test_what_may_be_good_is_left(kept: Any, check: Callable[..., Any], faults: Any) -> None:
    newer = kept.file(kept.chains[0][0])
    raw = bytearray(newer.read_bytes())
    raw[8] = 9
    newer.write_bytes(raw)
    foreign = [kept.path / "notes.txt", newer.parent / "notes.txt", kept.path / "objects" / "zz"]
    for path in foreign:
        path.write_bytes(b"somebody's")
    link = newer.parent / (newer.name[:2] + "0" * 62)
    link.symlink_to(foreign[0])
    before = kept.objects()
    code, said = check(kept, "--fix")
    assert (code, said["left"]) == (1, 5)
    assert faults(said) == {("disk", "other_version"): 1, ("disk", "foreign"): 4}
    assert kept.objects() == before
    assert all(path.read_bytes() == b"somebody's" for path in (*foreign, link))


def test_objects_without_a_descriptor_are_left_with_their_children(kept: Any, check: Any, faults: Any) -> None:
    for path in (kept.path / "namespaces").iterdir():
        path.unlink()
    kept.file(bytes.fromhex(kept.adapter)).unlink()
    before = kept.objects()
    code, said = check(kept, "--fix")
    assert code == 1
    assert faults(said) == {("disk", "undescribed"): 12, ("disk", "manifest"): 1, ("names", "name_alone"): 1}
    assert kept.objects() == before


def test_a_wrong_integrity_key_removes_nothing(
    kept: Any, check: Any, faults: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORACACHE_INTEGRITY_KEY", "0123456789abcdef")
    before = kept.objects()
    code, said = check(kept, "--fix")
    assert (code, faults(said)) == (1, {("disk", "unproven"): 14})
    assert kept.objects() == before
    assert len(list((kept.path / "adapters").iterdir())) == 1


def test_a_folder_in_use_by_another_check_is_refused_and_says_by_whom(kept: Any, check: Any) -> None:
    other = lock_folder(kept.path, "check of process 7")
    code, said = check(kept)
    assert code == 2
    assert "is in use by the LoRACache check of process 7" in said["error"]
    assert "stop that one first" in said["error"]
    os.close(other)
    assert check(kept)[0] == 0


def test_people_get_a_table(kept: Any) -> None:
    truncate(kept.file(kept.chains[0][3]), 100)
    done = CliRunner().invoke(app, ["check", "--disk-path", str(kept.path), "--fix"], prog_name="loracache")
    whole, head, row, left = done.stdout.splitlines()
    assert done.exit_code == 0
    assert (whole, left) == ("disk: 12 objects are whole", "faults left: 0")
    assert head.split() == ["where", "fault", "count", "fixed", "bytes", "for", "example"]
    assert row.split()[:6] == ["disk", "damaged", "1", "1", "100", "B"]
    assert row.endswith(f"{kept.chains[0][3].hex()}: header has 100 bytes of 188")


def test_nothing_to_check_is_wrong_usage(kept: Any, check: Any, tmp_path: Path) -> None:
    code, said = check(kept, disk=False)
    assert code == 2
    assert "give --disk-path, --redis" in said["error"]
    kept.path = tmp_path / "nowhere"
    code, said = check(kept)
    assert code == 2
    assert "is not a disk tier" in said["error"]
    assert not kept.path.exists()
